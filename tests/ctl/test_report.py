"""`report` and `history`: for a terminal, for a program, and as one file for an administrator."""

import json
import logging
import os
import signal
import threading
import time
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from xml.etree.ElementTree import fromstring

import msgspec
import pytest

from llmwd.adapters.journal import Journal
from llmwd.ctl.history import told_of
from llmwd.ctl.page import page
from llmwd.ctl.past import read_past
from llmwd.ctl.reporting import as_object, report_of
from llmwd.ctl.reportscreen import show_report
from tests.ctl.stand import Stand

VOID = {"meta", "br", "hr", "img", "input", "link"}
NASTY = '<script>alert("x")</script>&\'"'


def write(stand: Stand, *events: tuple[float, str, dict], number: int | None = None) -> None:
    """Lines of so many seconds ago."""
    now_at, now_s = time.time(), time.monotonic()
    name = "journal.jsonl" if number is None else f"journal.jsonl.{number}"
    rows = [{"at": now_at - ago_s, "mono_s": now_s + 1e6 - ago_s, "worker": "vllm", "event": event, **more} for ago_s, event, more in events]
    (stand.dirs.state / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def week(stand: Stand, broken: bool = False) -> None:
    """Two days of serving, in two files; a job that got its GPUs back; a drill."""
    mono_s = time.monotonic() + 1e6
    seen_s = mono_s - 90_000
    took_s = 7.5 if broken else 0.42
    write(
        stand,
        (172_800, "supervisor_started", {"pid": 1, "version": "0"}),
        (172_790, "lease_granted", {"epoch": 1, "gpus": [2, 3]}),
        (172_790, "server_started", {"epoch": 1, "gpus": [2, 3], "profile": "glm"}),
        (172_790, "phase", {"phase": "loading", "reason": "loading", "detail": ""}),
        (172_700, "phase", {"phase": "serving", "reason": "ready", "detail": ""}),
        (172_600, "gpus", {"llmwd": [2, 3], "free": [0, 1]}),
        number=1,
    )
    write(
        stand,
        (89_999, "lease_revoked", {"epoch": 1, "reason": "yielded_to_job", "detail": NASTY, "job": "77", "seen_s": seen_s, "resolved_s": seen_s + 0.01, "revoked_s": seen_s + 0.02}),
        (89_998, "released", {"epoch": 1, "reason": "yielded_to_job", "gpus": [2, 3], "job": "77", "signalled_s": seen_s + 0.03, "model_gone_s": seen_s + 0.1, "gone_s": seen_s + took_s - 0.1, "killed_s": None, "requests": 2}),
        (89_998, "phase", {"phase": "waiting", "reason": "yielded_to_job", "detail": ""}),
        (89_997, "release_proved", {"epoch": 1, "gpus": [2, 3], "reason": "yielded_to_job", "job": "77", "begun_s": seen_s, "gone_s": seen_s + took_s - 0.1, "proved_s": seen_s + took_s, "took_s": took_s, "budget_s": 5.0, "within_budget": not broken}),
        (80_000, "gpus", {"slurm": [2, 3], "free": [0, 1]}),
        (70_000, "drill", {"epoch": 9, "job": "900001", "gpus": [2], "while_phase": "serving", "took_s": 0.4, "budget_s": 5.0, "passed": True, "verdict": f"proved within 0.40 s {NASTY}"}),
        (60_000, "supervisor_stopped", {"pid": 1}),
    )  # fmt: skip


class Reader(HTMLParser):
    """Every element is closed, in order; collects what a page could load or run, its text and its plots."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.names: list[str] = []
        self.outside: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.outside += [f"{name}={value}" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset") or name.startswith("on")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def read_page(path: Path) -> tuple[str, Reader]:
    text, reader = path.read_text(), Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return text, reader


def test_the_report_for_a_terminal_says_it_in_words_and_fits_80_columns(stand: Stand) -> None:
    week(stand)
    done = stand.ctl("report")
    assert done.returncode == 0 and done.stderr == ""
    words = " ".join(done.stdout.split())
    assert "llmwd had to give GPUs back once, once for a Slurm job." in words and "the longest took 0.42 s (job 77)" in words
    assert "It never took longer than it may (YIELD_BUDGET, 5 s)." in words and "while serving): proved within 0.40 s" in words
    assert all(len(line.rstrip()) <= 80 for line in done.stdout.splitlines())


def test_the_report_for_a_program_is_one_object_with_all_of_it(stand: Stand) -> None:
    week(stand)
    told = json.loads(stand.ctl("report", "--days", "7", "--json").stdout)
    one, = told["yields"]
    assert (one["job"], one["gpus"], one["broken"], one["requests"]) == ("77", [2, 3], False, 2)
    assert one["total_s"] == pytest.approx(0.42) and one["overlap_s"] == pytest.approx(0.32) and one["at"].endswith("Z")
    assert told["sums"]["parts"]["total_s"]["p99"] == pytest.approx(0.42) and told["sums"]["gpu_hours"]["harvested"] == pytest.approx(2 * 82_791 / 3600)
    assert told["budget_s"] == 5 and told["drill"]["passed"] and told["settings"]["NUM_GPUS"] == "2 GPUs" and told["settings"]["YIELD_BUDGET"] == "5 s"
    assert told["spans"][0]["begin"] < told["spans"][-1]["end"] and told["words"] and told["not_measured"]


def test_the_page_is_one_file_that_loads_and_runs_nothing_and_is_well_formed(stand: Stand, tmp_path: Path) -> None:
    week(stand)
    done = stand.ctl("report", "--html", str(tmp_path / "report.html"))
    assert done.returncode == 0 and done.stdout == ""
    text, reader = read_page(tmp_path / "report.html")
    assert reader.outside == [] and "script" not in reader.names and not {"link", "img", "iframe", "object"} & set(reader.names)
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert any(NASTY in data for data in reader.words), "what comes out of the journal is text"
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    plots = [fromstring(each.split("</svg>")[0].join(("<svg", "</svg>"))) for each in text.split("<svg")[1:]]
    assert len(plots) == 4 and len(plots[1].findall("circle")) == 1
    assert all(0 <= float(rect.get("x")) <= 760 and float(rect.get("width")) >= 0 for plot in plots for rect in plot.iter("rect"))


def test_a_broken_budget_cannot_be_overlooked(stand: Stand, tmp_path: Path) -> None:
    week(stand, broken=True)
    stand.ctl("report", "--html", str(tmp_path / "a.html"))
    text, reader = read_page(tmp_path / "a.html")
    assert 'class="summary broken"' in text and 'class="point broken"' in text and "7.50 s BROKEN" in reader.words
    assert "It took longer than it may (YIELD_BUDGET) once" in " ".join(reader.words)


@pytest.mark.parametrize("event", ["released", "release_proved", "lease_revoked", "job_seen", "drill", "gpus", "budget_broken", "lease_granted"])
@pytest.mark.parametrize("value", [1.7e308, 1e300, 10**30, 10**400, -1e300, 0.0, "\x1b\x00\ufffe", {"stepd": 1e300}, [10**30]], ids=str)
def test_an_absurd_line_breaks_no_report(stand: Stand, tmp_path: Path, event: str, value: object) -> None:
    week(stand)
    names = ("epoch", "proved_s", "gone_s", "signalled_s", "took_s", "budget_s", "seen_s", "revoked_s", "requests", "lags", "gpus", "job", "llmwd", "verdict")
    rows = [{"at": time.time(), "mono_s": time.monotonic() + 1e6, "worker": "a", "event": event, "epoch": 1, name: value} for name in names]
    with (stand.dirs.state / "journal.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    past = read_past(stand.dirs)
    history = past.history(7)
    report = report_of(history, "here", "1", 7, False, {})
    path = tmp_path / "a.html"
    path.write_text(page(report, history))
    read_page(path)
    assert "\x1b" not in path.read_text()
    assert json.loads(msgspec.json.encode(as_object(report)))
    show_report(report)
    assert all(msgspec.json.encode(told_of(line)) for line in past.journaled.lines)


def test_the_last_drill_is_shown_with_its_time_however_old_it_is_and_that_there_was_none(stand: Stand) -> None:
    week(stand)
    shown = " ".join(stand.ctl("report", "--days", "0.1").stdout.split())
    assert f"last drill ({datetime.fromtimestamp(time.time() - 70_000):%Y-%m-%d}" in shown and "while serving): proved within" in shown
    assert json.loads(stand.ctl("report", "--days", "0.1", "--json").stdout)["drill"]["while_phase"] == "serving"
    write(stand, (100, "supervisor_started", {"pid": 1, "version": "0"}))
    assert "last drill: none yet" in stand.ctl("report").stdout


def test_simulated_jobs_have_a_table_of_their_own(stand: Stand, tmp_path: Path) -> None:
    week(stand)
    assert "to simulated jobs" not in stand.ctl("report").stdout
    with (stand.dirs.state / "journal.jsonl").open("a") as file:
        row = {"at": time.time() - 50_000, "mono_s": time.monotonic() + 1e6 - 50_000, "worker": "resolver", "event": "job_seen", "epoch": 1, "first": "sim", "lags": {}}
        file.write(json.dumps(row) + "\n")
    shown = stand.ctl("report").stdout
    assert "giving GPUs back to simulated" in shown and "Half of them were over" in shown
    stand.ctl("report", "--html", str(tmp_path / "a.html"))
    words = read_page(tmp_path / "a.html")[1].words
    assert "Its parts for simulated jobs" in words and "Its parts" not in words


def test_a_pipe_a_link_and_a_device_are_written_into_and_stay_what_they_are(stand: Stand, tmp_path: Path) -> None:
    week(stand)
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert stand.ctl("report", "--html", str(tmp_path / "link")).returncode == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text().startswith("<!DOCTYPE html>")
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    assert stand.ctl("report", "--html", str(tmp_path / "pipe")).returncode == 0
    reader.join(10)
    assert read[0].endswith("</html>\n") and (tmp_path / "pipe").is_fifo()
    assert stand.ctl("report", "--html", "/dev/stdout").stdout.startswith("<!DOCTYPE html>")


def test_an_empty_journal_is_no_error(stand: Stand, tmp_path: Path) -> None:
    done = stand.ctl("report")
    assert done.returncode == 0 and "nothing has been written" in done.stdout
    assert json.loads(stand.ctl("report", "--json").stdout)["words"] == ["Nothing is recorded in this period."]
    assert stand.ctl("report", "--html", str(tmp_path / "a.html")).returncode == 0
    read_page(tmp_path / "a.html")
    assert stand.ctl("history").returncode == 0 and json.loads(stand.ctl("history", "--json").stdout) == []


@pytest.mark.parametrize("days", ["0", "-1", "a", "nan", "inf", "1e9", ""])
def test_what_is_no_number_of_days_is_an_error_of_usage_in_one_sentence(stand: Stand, days: str) -> None:
    done = stand.ctl("report", "--days", days)
    assert done.returncode == 2 and "is not a number of days: write 7" in done.stderr


def test_a_place_that_cannot_be_written_is_said(stand: Stand, tmp_path: Path) -> None:
    done = stand.ctl("report", "--html", str(tmp_path / "none" / "a.html"))
    assert done.returncode == 1 and "cannot be written" in done.stderr and "Traceback" not in done.stderr


def test_the_history_tells_the_last_events_in_order_over_a_rotation(stand: Stand) -> None:
    week(stand)
    with (stand.dirs.state / "journal.jsonl.1").open("a") as file:
        file.write(json.dumps({"at": time.time() - 172_000, "mono_s": time.monotonic() + 1e6 - 172_000, "event": "resumed", "by": "\x1b[2Jmallory"}) + "\n")
    assert r"resumed by \x1b[2Jmallory" in stand.ctl("history").stdout
    lines = stand.ctl("history", "-n", "9").stdout.splitlines()
    assert any("GPUs: 2 llmwd, 2 free" in line for line in lines) and lines[-1].endswith("llmwd ended in order")
    assert any("GPUs 2-3 left: yielded_to_job, 0.29 s after the signal, 2 requests cut" in line for line in lines)
    told = json.loads(stand.ctl("history", "-n", "3", "--json").stdout)
    assert [each["event"] for each in told] == ["gpus", "drill", "supervisor_stopped"] and told[1]["details"]["took_s"] == 0.4


def test_following_the_history_tells_what_is_added_over_a_rotation_and_nothing_twice(stand: Stand) -> None:
    week(stand)
    following = stand.start_ctl("history", "-n", "1", "--json", "-f")

    def told() -> str:
        return json.loads(following.stdout.readline())["event"]

    try:
        assert told() == "supervisor_stopped"
        journal = Journal(stand.dirs.state, "resolver", logging.getLogger("test"))
        journal.write("gpus", slurm=[2, 3], free=[0, 1])  # as it was: no event
        journal.write("lease_granted", epoch=10, gpus=[0, 1])
        assert told() == "lease_granted"
        path = stand.dirs.state / "journal.jsonl"
        path.rename(path.with_suffix(".jsonl.1"))
        journal.write("gpus", llmwd=[0, 1], slurm=[2, 3])
        assert told() == "gpus"
    finally:
        following.send_signal(signal.SIGINT)
        rest, errors = following.communicate(timeout=30)
    assert following.returncode == 130 and rest == "" and "Traceback" not in errors
