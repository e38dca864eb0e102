"""Texts within ntfy's limits; how long to wait after a failure."""

import json

from hypothesis import given
from hypothesis import strategies as st

from llmwd.core import noticetext
from llmwd.core.notices import About, Notice
from llmwd.core.noticetext import cut, retry_after_s, with_log
from llmwd.core.outbox import Book, Entry, put
from llmwd.vocab import Event


def entry(title: str = "t", message: str = "m", alarm: bool = False) -> Entry:
    notice = Notice(About.server, "k", title, message, "boom", Event.failed, alarm=alarm)
    return put(Book(), notice, ("ntfy",), 0.0).entries[0]


def body(entry: Entry, topic: str, priority: str) -> bytes:
    return noticetext.body(entry, topic, priority, (), "", 0.0)


@given(st.text(), st.integers(min_value=3, max_value=200))
def test_a_cut_text_fits_in_bytes_and_ends_with_a_whole_character(text, most_bytes):
    found = cut(text, most_bytes)
    assert len(found.encode()) <= most_bytes
    assert found == cut(found, most_bytes)


def test_a_long_message_in_any_script_stays_within_the_servers_limits():
    for char in ("a", "é", "漢", "🚀", '"', "\\", "\n", "\x07"):
        found = json.loads(body(entry(char * 9000, char * 9000), "topic", "default"))
        assert len(found["message"].encode()) <= 4096 and len(found["title"].encode()) <= 1024
        assert len(body(entry(char * 9000, char * 9000), "topic", "default")) <= 8192


def test_the_priority_of_an_ordinary_notice_is_the_operators_and_an_alarm_is_at_least_high():
    priorities = [json.loads(body(entry(), "t", name))["priority"] for name in ("min", "default", "urgent", "2")]
    assert priorities == [1, 3, 5, 2]
    alarms = [json.loads(body(entry(alarm=True), "t", name))["priority"] for name in ("min", "max")]
    assert alarms == [4, 5]


def test_waits_double_with_jitter_up_to_a_limit_and_a_429_is_given_more_time():
    assert [retry_after_s(tries, None, None, 0.0) for tries in (1, 2, 3)] == [2.0, 4.0, 8.0]
    assert retry_after_s(1, 429, 42901, 0.0) == 5.0 < retry_after_s(1, 429, 42901, 0.9)
    assert retry_after_s(99, 500, 50001, 0.99) <= 1.5 * noticetext.RETRY_MAX_S


def test_a_daily_quota_is_waited_for_until_just_after_midnight():
    for now_at, dice in ((0.0, 0.0), (1e9, 0.5), (1.7e9, 0.99)):
        then_at = now_at + retry_after_s(7, 429, noticetext.DAILY_QUOTA, dice, now_at)
        assert 300 <= then_at % noticetext.DAY_S < 600 and 0 < then_at - now_at <= noticetext.DAY_S + 600


def test_a_title_is_one_line():
    assert json.loads(body(entry("a\nb\r\n c"), "t", "3"))["title"] == "a b c"


def test_what_is_told_late_says_when_it_was():
    assert noticetext.text(entry(), 30.0) == "m"
    assert noticetext.text(entry(), 3600.0) == "m\n(This was at 1970-01-01 00:00:00 UTC.)"


def test_when_it_was_is_told_however_long_the_message_is():
    for char in ("m", "\x07", '"', "漢"):
        found = json.loads(noticetext.body(entry("t", char * 9000), "t", "3", (), "", 3600.0))["message"]
        assert found.endswith("\n(This was at 1970-01-01 00:00:00 UTC.)") and len(found.encode()) <= noticetext.MESSAGE_BYTES


def test_the_end_of_a_log_is_a_few_lines_at_most():
    found = with_log("m", "".join(f"line {number} {'x' * 400}\n\n" for number in range(50)))
    assert found.startswith("m\n\nThe end of its log:\n") and "line 49" in found and len(found) < 1600
    assert with_log("m", "\n \n") == "m"


def test_tags_keep_within_what_the_server_takes():
    found = json.loads(noticetext.body(entry(), "t", "3", tuple(f"tag-{number}" for number in range(90)), "https://x/", 0.0))
    assert found["tags"][:2] == ["boom", "tag-0"] and sum(len(tag) + 1 for tag in found["tags"]) <= 512
    assert found["click"] == "https://x/" and found["sequence_id"]
