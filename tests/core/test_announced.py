"""For how long the prolog's word counts."""

import pytest

from llmwd.core.announced import ANNOUNCED_FOR_S, Announced
from llmwd.core.claims import Claims, NodeReading
from llmwd.core.gres import Claim
from llmwd.messages import JobSeen

NONE: frozenset[int] = frozenset()


def reading(at_s: float, *gpus: int, completing: bool = False, known: bool = True) -> NodeReading:
    return NodeReading(at_s, Claim(frozenset(gpus) if known else None, completing=completing))


def other(at_s: float, id: str = "7", gpus: tuple[int, ...] | None = None) -> JobSeen:
    return JobSeen(id=id, sources=("stepd",), lags_s=(0.0,), seen_s=at_s, gpus=gpus)


@pytest.fixture
def announced() -> Announced:
    """Job 7 has GPUs 0 and 1, said at 10."""
    announced = Announced()
    announced.announce("7", frozenset({0, 1}), 10.0)
    return announced


def test_an_announced_job_is_one_that_is_seen_with_exactly_these_gpus(announced: Announced) -> None:
    claims = Claims(2.0)
    claims.see(announced.among(()), 10.0)
    (view,) = claims.views(10.0)
    assert (view.id, view.gpus, view.sources, view.seen_s, view.pending) == ("7", {0, 1}, ("prolog",), 10.0, False)
    (view,) = claims.views(99.0)
    assert view.gpus == {0, 1}  # and no deadline makes it an unknown one


def test_other_sources_join_it_in_the_order_in_which_they_saw_it(announced: Announced) -> None:
    (job,) = announced.among((other(10.5),))
    assert (job.sources, job.lags_s, job.seen_s, job.gpus) == (("prolog", "stepd"), (0.0, 0.5), 10.0, (0, 1))
    announced.announce("8", frozenset({2}), 20.0)
    late = next(job for job in announced.among((other(10.5), other(19.0, "8"))) if job.id == "8")
    assert (late.sources, late.lags_s, late.seen_s) == (("stepd", "prolog"), (0.0, 1.0), 19.0)


def test_gpus_that_another_source_tells_count_as_well(announced: Announced) -> None:
    assert announced.among((other(10.5, gpus=(5,)),))[0].gpus == (0, 1, 5)


def test_once_another_source_has_seen_it_it_goes_with_that(announced: Announced) -> None:
    announced.among((other(10.5),))
    assert not announced.expire(reading(20.0), NONE, 10.0 + 2 * ANNOUNCED_FOR_S)
    assert announced.among((other(10.5),))[0].gpus == (0, 1)
    assert announced.among(()) == () and "7" not in announced


def test_a_job_that_went_and_came_back_between_two_looks_is_another_run(announced: Announced) -> None:
    announced.among((other(10.5),))
    assert announced.among((other(30.0),)) == (other(30.0),)


def test_the_same_id_announced_again_has_the_new_gpus_at_once(announced: Announced) -> None:
    claims = Claims(2.0)
    claims.see(announced.among(()), 10.0)
    announced.announce("7", frozenset({4}), 30.0)
    claims.see(announced.among(()), 30.0)
    assert [view.gpus for view in claims.views(30.0)] == [{4}]


def test_a_sign_of_the_last_run_that_still_shows_is_none_of_the_run_that_is_announced(announced: Announced) -> None:
    """A requeued job in its prolog, while slurmstepd's socket of its last run is still there."""
    announced.among((other(10.5),))
    announced.announce("7", frozenset({4, 5}), 30.0)
    for signs in ((other(10.5),), (), (other(31.0),)):  # the old one, none, the new one
        (job,) = announced.among(signs)
        assert job.gpus == (4, 5) and job.seen_s == 30.0
    assert announced.among(()) == ()


def test_a_job_without_gpus_is_not_kept(announced: Announced) -> None:
    announced.announce("7", NONE, 11.0)
    announced.announce("9", NONE, 11.0)
    assert announced.among(()) == ()


def test_seen_by_nobody_it_goes_when_slurm_says_that_none_of_its_gpus_is_used(announced: Announced) -> None:
    assert not announced.expire(reading(9.9), NONE, 11.0)  # began before the word
    assert not announced.expire(reading(11.0, completing=True), NONE, 12.0)
    assert not announced.expire(reading(12.0, 1, 5), frozenset({1, 5}), 13.0)
    assert announced.expire(reading(13.0, 5), frozenset({5}), 14.0)
    assert announced.among(()) == ()


@pytest.mark.parametrize("said", [None, reading(11.0, known=False), reading(11.0, completing=True)])
def test_without_slurms_word_it_goes_after_a_time_that_is_longer_than_any_prolog(announced: Announced, said: NodeReading | None) -> None:
    end_s = 10.0 + ANNOUNCED_FOR_S
    assert announced.next_s(11.0) == end_s
    assert not announced.expire(said, NONE, end_s - 0.1)
    assert announced.expire(said, NONE, end_s)


def test_it_never_goes_while_slurm_says_that_its_gpus_are_used(announced: Announced) -> None:
    late_s = 10.0 + 9 * ANNOUNCED_FOR_S
    assert not announced.expire(reading(late_s, 0), frozenset({0}), late_s)
    assert not announced.expire(reading(late_s, known=False), frozenset({1}), late_s)
    assert announced.next_s(late_s) is None
