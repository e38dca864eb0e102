"""Who saw the job that ended a lease, from what every source told when: the first, the lags, which job, and for how long."""

import msgspec
import pytest

from llmwd.core.announced import ANNOUNCED_FOR_S, Announced
from llmwd.core.release import begin
from llmwd.core.witnesses import LAST_LOOK_S, Sights, Witnesses, both_looks, look, looked_until_s, witnesses
from llmwd.messages import JobSeen, Lease, Revocation
from llmwd.vocab import Reason

LEASE = Lease(epoch=4, gpus=(6, 7), uuids=("A", "B"), granted_s=1.0, expires_s=90.0)
END = Revocation(epoch=4, reason=Reason.yielded_to_job, detail="", revoked_s=100.2, job="77", seen_s=100.0)
NAMELESS = msgspec.structs.replace(END, job=None, seen_s=None)
IN_USE = msgspec.structs.replace(NAMELESS, reason=Reason.gpu_in_use)
BEGUN = begin(LEASE, END)
QUIET = look(Sights(), (), {}, 50.0)  # both have been asked, and said that nobody is there


def job(seen_s: float = 100.0, *sources: str, id: str = "77", lags_s: tuple[float, ...] = (0.0,)) -> JobSeen:
    return JobSeen(id=id, sources=sources or ("stepd",), seen_s=seen_s, lags_s=lags_s)


def told(revocation: Revocation, *jobs: JobSeen, before: Witnesses | None = None, **sights: object) -> Witnesses | None:
    return witnesses(BEGUN, revocation, before, jobs, Sights(**sights))


def test_the_first_witness_and_the_lags_of_the_others() -> None:
    seen = told(END, job(100.0, "stepd", "cgroup2", lags_s=(0.0, 0.018)), node={6: 100.5, 7: 100.4, 0: 3.0}, driver={("B", "77"): 101.5})
    assert (seen.job, seen.first, seen.seen_s) == ("77", "stepd", 100.0)
    assert seen.lags == {"cgroup2": pytest.approx(0.018), "gresused": pytest.approx(0.4), "nvml": pytest.approx(1.5)}
    assert told(END) is None  # it is gone already


def test_the_driver_is_a_witness_of_the_job_on_whichever_gpu_it_shows_it_and_of_no_other() -> None:
    seen = told(END, job(), driver={("B", "77"): 103.0, ("C", "77"): 102.0, ("A", "5"): 101.0})
    assert seen.lags == {"nvml": pytest.approx(2.0)}
    first = told(END, job(), driver={("A", "77"): 99.5})
    assert (first.first, first.seen_s, first.lags) == ("nvml", 99.5, {"stepd": pytest.approx(0.5)})
    assert told(END, driver={("A", "77"): 101.0}).first == "nvml"  # nobody else sees it, or not any more


def test_where_the_prolog_announced_the_job_its_word_is_one_witness_more() -> None:
    announced = Announced()
    announced.announce("77", frozenset({6}), 99.0)
    alone = told(END, *announced.among(()))
    assert (alone.first, alone.seen_s, alone.lags) == ("prolog", 99.0, {})
    seen = told(END, *announced.among((job(101.0, "stepd", "procfs", lags_s=(0.0, 1.5)),)))
    assert (seen.first, seen.lags) == ("prolog", {"stepd": pytest.approx(2.0), "procfs": pytest.approx(3.5)})
    announced.announce("77", frozenset({6}), 110.0)  # it is requeued, and its last run still shows
    again = told(END, *announced.among((job(101.0),)))
    assert (again.first, again.seen_s, again.lags) == ("prolog", 110.0, {})


def test_where_slurmctld_was_first_the_job_that_appears_next_is_it() -> None:
    old, new, node = job(20.0, id="5"), job(101.0), {6: 100.2, 7: 100.2}
    seen = told(NAMELESS, old, new, node=node)
    assert (seen.job, seen.first, seen.lags) == ("77", "gresused", {"stepd": pytest.approx(0.8)})
    assert told(NAMELESS, new, job(101.0, id="78")) is None  # which of the two?
    assert told(NAMELESS, new, job(101.0, id="78"), before=seen).job == "77"  # it was the first
    by_driver = told(NAMELESS, old, node=node, driver={("A", "77"): 102.0, ("A", "5"): 60.0, ("C", "6"): 102.0})
    assert (by_driver.job, by_driver.first, by_driver.lags) == ("77", "gresused", {"nvml": pytest.approx(1.8)})


def test_where_the_driver_was_first_it_is_the_job_whose_process_it_showed_on_our_gpus() -> None:
    driver = {("A", "77"): IN_USE.revoked_s, ("C", "5"): 60.0}
    first = told(IN_USE, driver=driver)
    assert (first.job, first.first, first.seen_s, first.lags) == ("77", "nvml", IN_USE.revoked_s, {})
    assert told(IN_USE, job(101.2), driver=driver).lags == {"stepd": pytest.approx(1.0)}
    assert told(IN_USE, job(101.2), before=first).first == "stepd"  # its process is gone, the job is not
    assert told(IN_USE, driver={("A", "77"): IN_USE.revoked_s + 1}) is None  # came when the stranger had had his way
    assert told(IN_USE, job(100.3)) is None
    assert told(IN_USE, driver={("A", "77"): 100.0, ("B", "78"): 100.0}) is None


@pytest.mark.parametrize("reason", [Reason.held, Reason.node_draining, Reason.gpu_unknown])
def test_where_no_job_was_waiting_no_job_is_taken_for_it(reason: Reason) -> None:
    end = msgspec.structs.replace(NAMELESS, reason=reason)
    assert told(end, job(100.5), driver={("A", "77"): 100.1}) is None
    assert looked_until_s(end, None, 15.0) == end.revoked_s


def test_what_was_there_at_the_first_reading_is_no_witness() -> None:
    first = look(Sights(), {6}, {"A": {"77"}}, 100.3)
    assert told(END, job(), node=first.node, driver=first.driver).lags == {}
    later = look(QUIET, {6}, {"A": {"77"}, "B": set()}, 100.5)
    assert told(END, job(), node=later.node, driver=later.driver).lags == {"gresused": pytest.approx(0.5), "nvml": pytest.approx(0.5)}


def test_a_sight_lasts_for_as_long_as_it_is_told_and_no_answer_changes_nothing() -> None:
    seen = look(QUIET, {6}, {"A": {"77"}}, 60.0)
    assert look(seen, None, None, 61.0) == seen
    assert look(seen, {6, 7}, {"A": {"77", "78"}}, 62.0) == Sights(node={6: 60.0, 7: 62.0}, driver={("A", "77"): 60.0, ("A", "78"): 62.0})
    assert look(look(seen, {7}, {}, 63.0), {6}, {"A": {"77"}}, 64.0) == Sights(node={6: 64.0}, driver={("A", "77"): 64.0})
    assert look(Sights(), None, None, 1.0) == Sights()


def test_two_looks_tell_together_more_than_either() -> None:
    one, other = Witnesses("77", "stepd", 100.0, {"nvml": 2.0}), Witnesses("77", "procfs", 101.0, {"nvml": 4.0, "gresused": 0.5})
    both = both_looks(one, other)
    assert (both.first, both.seen_s) == ("stepd", 100.0)
    assert both.lags == {"nvml": pytest.approx(2.0), "procfs": pytest.approx(1.0), "gresused": pytest.approx(1.5)}
    assert both_looks(None, one) is one and both_looks(one, None) is one
    assert both_looks(Witnesses("5", "stepd", 100.3, {}), one) is one  # the revocation was found to be for this one


def test_each_source_has_its_turn_from_the_jobs_first_sign_on_the_node_on() -> None:
    turn_s = 15.0 + LAST_LOOK_S
    assert looked_until_s(END, None, 15.0) == looked_until_s(NAMELESS, None, 15.0) == END.revoked_s + turn_s
    assert looked_until_s(IN_USE, None, 15.0) == IN_USE.revoked_s
    assert looked_until_s(END, Witnesses("77", "stepd", 100.0, {"nvml": 9.0}), 15.0) == END.revoked_s + turn_s
    # Other prologs may keep it for minutes from having a process.
    assert looked_until_s(END, Witnesses("77", "prolog", 100.0, {"gresused": 9.0}), 15.0) == END.revoked_s + ANNOUNCED_FOR_S
    assert looked_until_s(END, Witnesses("77", "prolog", 100.0, {"stepd": 90.0, "procfs": 91.5}), 15.0) == 190.0 + turn_s
