"""What Slurm's jobs have on this node, from what was seen and answered."""

import pytest

from llmwd.core.claims import HIDDEN, Claims, JobView, NodeReading
from llmwd.core.gres import Claim, Failure
from llmwd.messages import JobSeen

DEADLINE_S = 2.0
NONE: frozenset[int] = frozenset()
COMPLETING = Claim(None, "it completes", completing=True, states=("COMPLETED", "COMPLETING"))
FINISHED = Claim(NONE, states=("COMPLETED",))
WAITS = Claim(NONE, states=("PENDING",))
UNDECIDABLE = Claim(None, "no indices", states=("MIXED",), used=0)
UNREADABLE = Claim(None, "weird[3] is no GRES item", states=("MIXED",))


def running(*gpus: int) -> Claim:
    return Claim(frozenset(gpus), states=("RUNNING",))


def seen(id: str, at_s: float = 1.0, *, gpus: tuple[int, ...] | None = None, empty: bool = False, by: str = "stepd") -> JobSeen:
    return JobSeen(id=id, sources=tuple(by.split("+")), seen_s=at_s, gpus=gpus, empty=empty)


def used(at_s: float, *gpus: int, completing: bool = False) -> NodeReading:
    return NodeReading(at_s, Claim(frozenset(gpus), completing=completing, states=("MIXED",)))


def view(claims: Claims, id: str = "7", now_s: float = 1.5) -> JobView | None:
    return next((view for view in claims.views(now_s) if view.id == id), None)


def answered(claims: Claims, claim: Claim, id: str = "7", now_s: float = 1.1) -> None:
    claims.asked(id)
    claims.answer(id, claim, now_s)


def failed(claims: Claims, failure: Failure, id: str = "7", now_s: float = 1.1) -> None:
    claims.asked(id)
    claims.fail(id, failure, "no answer", now_s)


@pytest.fixture
def claims() -> Claims:
    """One job, 7, seen at 1.0."""
    claims = Claims(DEADLINE_S)
    claims.see((seen("7"),), 1.0)
    return claims


def test_a_job_that_was_just_seen_is_pending_and_asked_for_once(claims: Claims) -> None:
    assert claims.due(1.0) == ("7",) and view(claims).pending
    claims.asked("7")
    assert claims.due(1.9) == ()


def test_the_answer_tells_the_gpus(claims: Claims) -> None:
    answered(claims, running(0, 1))
    assert view(claims).gpus == {0, 1} and view(claims).resolved_s == 1.1 and claims.due(99) == ()


def test_a_job_without_gpus_is_known_to_have_none(claims: Claims) -> None:
    answered(claims, running())
    assert view(claims, now_s=99).gpus == NONE


@pytest.mark.parametrize("failure", list(Failure))
def test_whoever_is_not_answered_for_within_the_deadline_may_have_any_gpu(claims: Claims, failure: Failure) -> None:
    failed(claims, failure)
    assert view(claims, now_s=2.99).pending and claims.next_s(2.5) == 3.0
    assert view(claims, now_s=3.0).gpus is None


def test_an_answer_that_cannot_be_decided_is_no_answer(claims: Claims) -> None:
    answered(claims, Claim(None, "cut", states=("RUNNING",)))
    assert view(claims, now_s=3).gpus is None and view(claims, now_s=3).why == "cut"


def test_whoever_is_not_answered_for_is_asked_again_ever_more_slowly(claims: Claims) -> None:
    pauses, now_s = [], 1.0
    for _ in range(7):
        failed(claims, Failure.timed_out, now_s=now_s)
        again_s = next(at for at in (now_s + pause / 10 for pause in range(1, 1000)) if claims.due(at))
        pauses.append(round(again_s - now_s))
        now_s = again_s
    assert pauses == [1, 2, 4, 8, 15, 15, 15]


def test_a_late_answer_settles_an_unknown_job(claims: Claims) -> None:
    answered(claims, running(3), now_s=9)
    assert view(claims, now_s=9).gpus == {3}


def test_the_deadline_counts_from_when_we_heard_not_from_the_first_sign() -> None:
    """A restarted resolver hears of jobs that were seen long ago, and has asked for none yet."""
    claims = Claims(DEADLINE_S)
    claims.see((seen("7", 1.0),), 1000.0)
    assert view(claims, now_s=1001.9).pending and view(claims, now_s=1002.0).gpus is None


def test_a_reading_that_began_later_covers_any_number_of_jobs(claims: Claims) -> None:
    claims.see((seen("7"), seen("8"), seen("9")), 1.0)
    assert claims.urgent() == 3
    claims.read(used(1.1, 0, 2), 1.2)
    assert claims.urgent() == 0
    assert all(view(claims, id, 99).covered and view(claims, id, 99).gpus == {0, 2} for id in "789")


def test_a_reading_that_began_before_the_job_says_nothing_of_it(claims: Claims) -> None:
    claims.read(used(0.9), 1.2)
    assert view(claims).pending and claims.urgent() == 1


def test_a_reading_that_was_quicker_than_the_news_covers_as_well() -> None:
    claims = Claims(DEADLINE_S)
    claims.read(used(5.0, 1), 5.1)
    claims.see((seen("7", 4.0),), 5.2)
    assert view(claims, now_s=5.2).covered


def test_a_reading_covers_nobody_while_something_completes(claims: Claims) -> None:
    """The node drops a job's GPUs when the job begins to complete: it may be this one."""
    claims.read(used(1.1, completing=True), 1.2)
    assert view(claims, now_s=1.5).pending and view(claims, now_s=3).gpus is None
    assert claims.urgent() == 0, "another reading would not help: the jobs have to be asked for"


def test_what_covers_a_job_follows_the_latest_quiet_reading(claims: Claims) -> None:
    claims.read(used(1.1, 0, 1, 2), 1.2)
    claims.read(used(2.0, 0), 2.1)
    assert view(claims).gpus == {0}
    claims.read(used(3.0, completing=True), 3.1)
    assert view(claims).gpus == {0}, "it may be the one that completes"


def test_a_hidden_job_is_not_asked_for_again_once_it_is_covered(claims: Claims) -> None:
    failed(claims, Failure.invalid_job)
    assert claims.reading_wanted()
    claims.read(used(1.2, 4), 1.3)
    assert claims.due(999) == () and view(claims, now_s=999).gpus == {4}


def test_a_simulated_job_tells_its_gpus_itself_and_no_reading_covers_it() -> None:
    claims = Claims(DEADLINE_S)
    claims.see((seen("a", gpus=(1,), by="sim"), seen("b", by="sim")), 1.0)
    claims.read(used(2.0), 2.1)
    assert view(claims, "a").gpus == {1} and view(claims, "b").gpus is None and claims.due(9) == ()
    claims.see((), 3.0)
    assert claims.views(3.0) == ()


def test_a_real_job_under_a_simulated_ones_id_is_asked_for() -> None:
    claims = Claims(DEADLINE_S)
    claims.see((seen("7", gpus=(), by="sim"),), 1.0)
    claims.see((seen("7", by="stepd+sim"),), 5.0)
    assert claims.due(5.0) == ("7",) and view(claims, now_s=5.1).pending and view(claims, now_s=7.0).gpus is None
    claims.see((seen("7", gpus=(), by="sim"),), 5.2)
    assert [view.leaving for view in claims.views(5.2)] == [False, True]


def test_a_job_that_left_keeps_its_gpus_until_a_later_quiet_reading(claims: Claims) -> None:
    answered(claims, running(0))
    claims.see((), 5.0)
    assert view(claims).leaving and claims.reading_wanted() and claims.completing()
    claims.read(used(4.9), 5.1)
    assert view(claims).gpus == {0}, "that reading began before it left"
    claims.read(used(5.2, completing=True), 5.3)
    assert view(claims).gpus == {0} and claims.completing()
    claims.read(used(6.2), 6.3)
    assert view(claims) is None and not claims.reading_wanted() and not claims.completing()


def test_slurms_word_that_it_is_over_lets_a_job_go_at_once(claims: Claims) -> None:
    claims.asked("7")
    claims.see((), 1.05)
    claims.answer("7", COMPLETING, 1.1)
    assert view(claims).pending
    answered(claims, FINISHED, now_s=2.2)
    assert view(claims) is None


def test_a_job_that_left_before_its_answer_came_is_still_settled_by_it(claims: Claims) -> None:
    claims.asked("7")
    claims.see((), 1.05)
    claims.answer("7", running(), 1.1)
    assert view(claims, now_s=99).gpus == NONE and view(claims).leaving


def test_a_job_that_left_unasked_is_asked_for_all_the_same(claims: Claims) -> None:
    claims.see((), 1.05)
    assert claims.due(1.1) == ("7",)


def test_a_purged_job_needs_a_reading_that_began_after_it_left(claims: Claims) -> None:
    claims.read(NodeReading(1.1, UNDECIDABLE), 1.2)
    claims.see((), 2.0)
    failed(claims, Failure.invalid_job, now_s=2.1)
    assert view(claims) is not None
    claims.read(NodeReading(2.2, UNDECIDABLE), 2.3)
    failed(claims, Failure.invalid_job, now_s=2.4)
    assert view(claims) is None


def test_where_readings_have_no_indices_the_listing_lets_jobs_go(claims: Claims) -> None:
    answered(claims, running(0))
    claims.see((), 5.0)
    claims.read(NodeReading(5.2, UNDECIDABLE), 5.3)
    assert view(claims).gpus == {0} and claims.unsettled()
    claims.take_listing(frozenset(), 5.4)
    assert view(claims) is None and not claims.unsettled()


def test_a_listed_job_counts_without_any_sign_on_the_node() -> None:
    claims = Claims(DEADLINE_S)
    claims.read(NodeReading(1.0, UNDECIDABLE), 1.1)
    claims.take_listing(frozenset({"7"}), 1.2)
    assert view(claims).pending and claims.due(1.2) == ("7",)
    answered(claims, running(2))
    claims.see((seen("7", 3.0),), 3.0)
    claims.see((seen("7", 3.0),), 4.0)
    assert view(claims, now_s=99).gpus == {2}, "its first step is no other run"


def test_gpus_count_as_used_until_nothing_completes() -> None:
    claims = Claims(DEADLINE_S)
    claims.read(used(1.0, 0), 1.1)
    claims.read(used(2.0, 1, completing=True), 2.1)
    assert claims.used_by_node() == {0, 1}
    claims.read(used(3.0, 1), 3.1)
    assert claims.used_by_node() == {1}
    claims.read(NodeReading(4.0, UNDECIDABLE), 4.1)
    assert claims.used_by_node() == {1}, "until the listing has come"


def test_a_first_reading_in_the_middle_of_a_completion_settles_nothing() -> None:
    claims = Claims(DEADLINE_S)
    assert not claims.unsettled()
    claims.read(used(1.0, completing=True), 1.1)
    assert claims.unsettled()
    claims.read(used(2.0), 2.1)
    claims.read(used(3.0, completing=True), 3.1)
    assert not claims.unsettled()


def test_a_job_that_comes_back_keeps_what_it_had_until_it_is_asked_again(claims: Claims) -> None:
    answered(claims, running(0))
    claims.see((), 5.0)
    claims.see((seen("7", 6.0),), 6.0)
    assert view(claims, now_s=6.1).gpus == {0} and view(claims, now_s=6.1).pending and claims.due(6.0) == ("7",)
    answered(claims, running(3), now_s=6.2)
    assert view(claims, now_s=6.2).gpus == {3}


def test_what_covered_a_job_is_kept_over_a_restart_of_the_detector(claims: Claims) -> None:
    claims.read(used(1.1, 0), 1.2)
    claims.see((seen("7", 5.0),), 5.0)
    assert view(claims, now_s=5.1).gpus == {0} and view(claims, now_s=5.1).pending


def test_the_answer_for_an_earlier_run_is_not_taken_for_the_later_one(claims: Claims) -> None:
    claims.asked("7")
    claims.see((seen("7", 2.0),), 2.0)
    claims.answer("7", running(), 2.1)
    assert view(claims, now_s=2.2).pending and claims.due(2.2) == ("7",)


def test_a_job_that_is_over_keeps_what_it_had_while_its_processes_are_here(claims: Claims) -> None:
    answered(claims, running(0))
    claims.see((seen("7", empty=True, by="cgroup2"),), 40.0)
    assert claims.due(40.0) == ("7",), "nothing else would ever tell that it is over"
    assert view(claims).gpus == {0}
    answered(claims, FINISHED, now_s=40.1)
    assert view(claims).gpus == NONE, "a folder without processes, and over by Slurm's word"


def test_new_signs_in_a_leftover_folder_are_another_run(claims: Claims) -> None:
    answered(claims, FINISHED)
    claims.see((seen("7", by="stepd+cgroup2"),), 5.0)
    assert view(claims, now_s=5.1).pending and claims.due(5.0) == ("7",)


def test_a_waiting_job_with_a_leftover_folder_counts_until_the_folder_is_proved_empty(claims: Claims) -> None:
    answered(claims, WAITS)
    assert view(claims).pending and view(claims, now_s=3).gpus is None
    claims.see((seen("7", empty=True),), 40.0)
    assert view(claims, now_s=40).gpus == NONE


def test_a_leftover_folder_of_a_purged_job_counts_until_a_quiet_reading(claims: Claims) -> None:
    claims.see((seen("7", empty=True),), 40.0)
    failed(claims, Failure.invalid_job, now_s=40)
    assert view(claims, now_s=41).gpus is None or view(claims, now_s=41).pending
    claims.read(NodeReading(41.0, UNDECIDABLE), 41.1)
    assert view(claims, now_s=42).gpus == NONE


def test_without_slurm_a_job_that_left_is_gone_and_one_that_is_here_is_unknown(claims: Claims) -> None:
    claims.slurm = False
    assert view(claims, now_s=99).gpus is None
    claims.see((), 100.0)
    assert claims.views(100.0) == () and not claims.reading_wanted()


def test_who_was_leaving_when_slurm_proved_absent_does_not_stay_for_ever(claims: Claims) -> None:
    claims.see((), 2.0)
    claims.slurm = False
    claims.see((), 3.0)
    assert claims.views(3.0) == ()


def test_those_that_nothing_is_known_of_are_asked_for_first(claims: Claims) -> None:
    claims.read(used(1.1), 1.2)
    claims.see((seen("7"), seen("8", 2.0)), 2.0)
    assert claims.due(2.0) == ("8", "7")


def test_a_job_that_is_over_and_still_has_processes_keeps_what_it_had(claims: Claims) -> None:
    answered(claims, running(0))
    claims.see((seen("7", empty=True, by="cgroup2"),), 40.0)
    answered(claims, FINISHED, now_s=40.1)
    claims.see((seen("7", by="cgroup2"),), 41.0)
    answered(claims, FINISHED, now_s=41.1)
    assert view(claims, now_s=99).gpus == {0}


def test_a_job_that_slurm_calls_over_before_it_told_what_it_had_needs_a_reading_that_agrees(claims: Claims) -> None:
    answered(claims, FINISHED)
    assert view(claims).pending and claims.reading_wanted()
    assert view(claims, now_s=3).gpus is None and "COMPLETED" in view(claims, now_s=3).why
    claims.read(used(1.2), 1.3)
    assert view(claims, now_s=3).gpus == NONE


def test_an_unknown_job_without_an_answer_of_its_own_tells_why_nobody_is_answered(claims: Claims) -> None:
    claims.trouble = "slurmctld does not answer"
    assert view(claims, now_s=3).why == "slurmctld does not answer"
    failed(claims, Failure.timed_out)
    assert view(claims, now_s=3).why == "no answer"


def test_no_listing_lets_a_job_go_while_something_completes(claims: Claims) -> None:
    answered(claims, running(0))
    claims.see((), 5.0)
    claims.read(NodeReading(5.2, Claim(None, "no indices", completing=True, used=0)), 5.3)
    claims.take_listing(frozenset(), 5.4)
    assert view(claims).gpus == {0}


def test_news_of_a_job_that_comes_late_is_not_covered_by_a_reading_in_which_something_completes() -> None:
    claims = Claims(DEADLINE_S)
    claims.read(used(5.0, completing=True), 5.1)
    claims.see((seen("7", 4.0),), 5.2)
    assert view(claims, now_s=5.3).pending


def counted(started_s: float, count: int) -> NodeReading:
    return NodeReading(started_s, Claim(None, "no indices", used=count))


def hidden(claims: Claims, now_s: float) -> JobView | None:
    return view(claims, HIDDEN, now_s)


def test_gpus_that_slurm_counts_beyond_those_of_the_jobs_it_shows_may_be_any(claims: Claims) -> None:
    answered(claims, running(0, 1))
    claims.read(counted(2.0, 2), 2.1)
    claims.take_listing(frozenset(), 2.2)
    assert hidden(claims, 99) is None
    claims.read(counted(3.0, 3), 3.1)
    assert hidden(claims, 3.1).pending and claims.reading_wanted(), "it may have been over by the time of the listing"
    claims.read(counted(3.15, 3), 3.17)
    assert not claims.reading_wanted() and claims.next_s(3.1) == 3.1 + DEADLINE_S
    claims.take_listing(frozenset(), 3.2)
    assert hidden(claims, 3.1 + DEADLINE_S).gpus is None, "unknown is never taken for none"
    claims.read(counted(20.0, 2), 20.1)
    assert hidden(claims, 99) is None


def test_on_a_reading_that_does_not_even_count_no_lease_is_granted_and_none_is_ended(claims: Claims) -> None:
    """Jobs may be hidden (PrivateData), and nothing says that there are any."""
    answered(claims, running(0))
    claims.read(used(2.0, 0, 1), 2.1)
    for at_s in (3.0, 60.0, 900.0):
        claims.read(NodeReading(at_s, UNREADABLE), at_s + 0.1)
        claims.take_listing(frozenset({"7"}), at_s + 0.2)
        assert claims.unsettled() and claims.unreadable() == UNREADABLE.why
        assert [view.gpus for view in claims.views(at_s + 50)] == [{0}] and claims.used_by_node() == {0, 1}
    claims.read(used(1000.0, 0), 1000.1)
    assert not claims.unsettled() and claims.used_by_node() == {0}


def test_who_was_hidden_stays_so_while_the_readings_do_not_even_count(claims: Claims) -> None:
    answered(claims, running(0))
    claims.read(counted(2.0, 3), 2.1)
    claims.take_listing(frozenset(), 2.2)
    claims.read(NodeReading(3.0, UNREADABLE), 3.1)
    claims.take_listing(frozenset(), 3.2)
    assert hidden(claims, 99).gpus is None
    claims.read(counted(20.0, 1), 20.1)
    assert hidden(claims, 99) is None


def test_a_job_that_left_is_not_let_go_by_a_listing_beside_a_reading_that_does_not_even_count(claims: Claims) -> None:
    answered(claims, running(0))
    claims.see((), 5.0)
    claims.read(NodeReading(5.2, UNREADABLE), 5.3)
    claims.take_listing(frozenset(), 5.4)
    assert view(claims).gpus == {0} and claims.unanswered_leaving() == ("7",)
    answered(claims, FINISHED, now_s=5.5)
    assert view(claims) is None


def test_a_listing_that_never_came_does_not_settle_the_reading_that_wanted_it(claims: Claims) -> None:
    """Only counted, squeue fails, and then the node tells which GPUs while something completes."""
    claims.read(used(1.1, 3), 1.2)
    answered(claims, running(0))
    claims.see((), 5.0)
    claims.read(counted(5.2, 2), 5.3)
    claims.read(used(6.0, 2, completing=True), 6.1)
    assert claims.used_by_node() == {2, 3} and view(claims).gpus == {0}
    claims.take_listing(frozenset(), 6.2)
    assert claims.used_by_node() == {2, 3} and view(claims).gpus == {0}, "one that comes late says nothing either"


def test_a_reading_that_tells_which_gpus_ends_what_only_the_listing_showed() -> None:
    claims = Claims(DEADLINE_S)
    claims.read(counted(1.0, 1), 1.1)
    claims.take_listing(frozenset({"7"}), 1.2)
    answered(claims, running(2), now_s=1.3)
    claims.read(used(2.0, 2), 2.1)
    assert view(claims).leaving and claims.used_by_node() == {2}
    claims.read(used(3.0), 3.1)
    assert view(claims) is None and claims.used_by_node() == NONE


def test_a_listed_job_that_is_being_asked_for_hides_nobody(claims: Claims) -> None:
    answered(claims, running(0, 1))
    claims.read(counted(2.0, 4), 2.1)
    claims.take_listing(frozenset({"8"}), 2.2)
    assert hidden(claims, 99) is None, "it has a deadline of its own"
    answered(claims, running(2), "8", 2.4)
    assert hidden(claims, 99).gpus is None, "it does not have them all"


def test_a_count_from_before_a_job_left_says_nothing_of_those_who_stayed(claims: Claims) -> None:
    answered(claims, running(0, 1))
    claims.read(counted(2.0, 2), 2.1)
    claims.see((), 3.0)
    answered(claims, FINISHED, now_s=3.1)
    assert hidden(claims, 99) is None
    claims.read(counted(4.0, 1), 4.1)
    assert hidden(claims, 4.2) is not None


@pytest.mark.parametrize("indices", [True, False])
def test_of_a_storm_nothing_is_kept(indices: bool) -> None:
    """Two thousand jobs, a hundred at a time: some are asked for, some are listed, some come back; a reading settles them."""
    claims, now_s = Claims(DEADLINE_S), 10.0
    for first in range(0, 2000, 100):
        ids = [str(id) for id in range(first, first + 100)]
        claims.see(tuple(seen(id, now_s) for id in ids), now_s)
        answered(claims, running(0), ids[0], now_s)
        failed(claims, Failure.invalid_job, ids[1], now_s)
        claims.asked(ids[2])  # and while it is, the job goes
        claims.see((), now_s + 0.05)
        claims.see((seen(ids[3], now_s + 0.06),), now_s + 0.06)
        claims.see((), now_s + 0.07)
        claims.read(used(now_s + 0.02) if indices else counted(now_s + 0.02, 0), now_s + 0.08)
        claims.take_listing(frozenset() if indices else frozenset(ids[4:6]), now_s + 0.09)
        claims.fail(ids[2], Failure.timed_out, "no answer", now_s + 0.1)
        now_s += 0.1
    assert len(claims.views(now_s)) > 50
    claims.read(used(now_s) if indices else counted(now_s, 0), now_s + 0.1)
    claims.take_listing(frozenset(), now_s + 0.1)
    claims.read(used(now_s + 0.2) if indices else counted(now_s + 0.2, 0), now_s + 0.3)
    claims.take_listing(frozenset(), now_s + 0.3)
    assert claims.views(now_s + 99) == () and claims.next_s(now_s) is None and not claims.reading_wanted()
    kept = (claims._jobs, claims._leaving, claims._asked, claims._local, claims._listed)
    assert not any(kept)


def test_a_job_that_is_here_is_asked_for_before_all_that_came_and_went(claims: Claims) -> None:
    claims.see(tuple(seen(str(id), 1.0) for id in range(100, 200)), 1.0)
    claims.see((), 1.5)
    claims.see((seen("200", 2.0),), 2.0)
    assert claims.due(2.0)[0] == "200"
    assert claims.urgent() == 102, "one reading settles them all"
    claims.read(used(2.1, 3), 2.2)
    assert claims.urgent() == 0 and claims.due(99) == ("200",)
