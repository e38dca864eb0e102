"""When a holder counts as hanging."""

import math

from llmwd.core.hearing import Hearing


def test_who_has_been_asked_nothing_owes_no_answer() -> None:
    assert Hearing().deaf_at_s(5) == math.inf
    assert Hearing().renewed(10).heard(11, False, False).deaf_at_s(5) == math.inf


def test_a_renewal_is_to_be_answered_counted_from_the_first_that_was_not() -> None:
    assert Hearing().renewed(10).renewed(12).deaf_at_s(5) == 15
    assert Hearing().renewed(10).heard(11, False, False).renewed(20).deaf_at_s(5) == 25


def test_a_release_is_to_be_acknowledged_and_then_to_be_over_after_its_grace() -> None:
    ordered = Hearing().released(10, 2)
    assert ordered.deaf_at_s(5) == 11
    assert ordered.heard(10.1, False, False).deaf_at_s(5) == 11  # the answer to something earlier
    assert ordered.heard(10.1, True, False).deaf_at_s(5) == 13
    assert ordered.heard(10.1, True, False).heard(12.5, True, False).deaf_at_s(5) == 13


def test_a_later_release_can_only_shorten_it() -> None:
    acknowledged = Hearing().released(10, 2).heard(10.1, True, False)
    assert acknowledged.released(10.5, 0).deaf_at_s(5) == 11.5
    assert acknowledged.released(12, 60).deaf_at_s(5) == 13


def test_after_sigkill_it_has_the_time_that_the_kernel_takes_while_it_goes_on_talking() -> None:
    killed = Hearing().released(10, 2).heard(12, True, True)
    assert killed.deaf_at_s(5) == 13
    assert killed.heard(40, True, True).deaf_at_s(5) == 41
