"""When the node counts as short of memory, and when that is over."""

import pytest

from llmwd.core.pressure import Reading, Shortage, parse, step, told

LIMIT, RESUME_S = 10.0, 10.0
SHORT = Shortage(short=True)


def after(before: Shortage, some: float, now_s: float = 100.0, others: bool = True, limit: float = LIMIT) -> Shortage:
    return step(before, Reading(some, 0.0), limit, others, now_s, RESUME_S)


def test_the_kernels_words() -> None:
    text = "some avg10=12.34 avg60=1.00 avg300=0.20 total=17\nfull avg10=3.00 avg60=0.00 avg300=0.00 total=9\n"
    assert parse(text) == Reading(12.34, 3.0)


@pytest.mark.parametrize("text", ["", "some avg10=1.00 avg60", "some avg10=nan avg60=0\nfull avg10=0 x", "\0" * 20])
def test_what_is_not_understood_is_no_reading(text: str) -> None:
    assert parse(text) is None


def test_pressure_at_the_limit_counts_while_others_are_on_the_node_and_only_then() -> None:
    assert after(Shortage(), 10.0).short
    assert not after(Shortage(), 9.99).short
    assert not after(Shortage(), 99.0, others=False).short


def test_it_is_over_only_after_long_enough_below_half_of_the_limit() -> None:
    now = after(SHORT, 4.0, 100.0)
    assert now == Shortage(True, 100.0) and after(now, 4.0, 109.9).short
    assert not after(now, 4.0, 110.0).short
    assert after(SHORT, 5.0) == SHORT  # half is not below half
    again = after(now, 7.0, 105.0)
    assert again == SHORT and after(again, 1.0, 111.0) == Shortage(True, 111.0)


def test_while_it_lasts_it_goes_on_even_when_the_others_have_left() -> None:
    assert after(SHORT, 20.0, others=False).short and after(SHORT, 7.0, others=False).short


def test_switched_off_or_not_to_be_read_it_is_no_reason() -> None:
    assert after(SHORT, 99.0, limit=0.0) == Shortage()
    assert step(SHORT, None, LIMIT, True, 1.0, RESUME_S) == Shortage()


def test_the_words_say_how_much_and_which_setting() -> None:
    assert "42 %" in told(SHORT, Reading(42.0, 0.0), LIMIT) and "MEMORY_PRESSURE=10" in told(SHORT, Reading(42.0, 0.0), LIMIT)
    assert told(Shortage(), Reading(42.0, 0.0), LIMIT) == ""
