"""Which jobs are here, when several sources look."""

from hypothesis import given
from hypothesis import strategies as st

from llmwd.core.presence import (
    LEFTOVER_AFTER_S, Change, Gpus, Look, Presence, all_looked, begin, choose, configured, jobs_fact, scanned, take,
)
from llmwd.messages import JobSeen
from llmwd.vocab import Source

SOURCES = (Source.stepd, Source.cgroup2, Source.procfs, Source.sim)


def look(source: Source, *jobs: str, at: float = 0.0) -> Look:
    return Look(source=source, jobs=dict.fromkeys(jobs), began_s=at)


def failed(source: Source) -> Look:
    return Look(source=source, jobs=None, began_s=0.0, why="permission denied")


def missing(source: Source) -> Look:
    return Look(source=source, jobs=None, began_s=0.0, absent=True, why="not here")


def after(state: Presence, *looks: Look) -> Presence:
    for number, one in enumerate(looks):
        state, _ = take(state, one, float(number))
    return state


def seen(state: Presence) -> dict[str, JobSeen]:
    return {job.id: job for job in jobs_fact(state, 99.0).jobs}


def test_a_job_that_any_source_sees_is_here() -> None:
    state = after(begin(SOURCES, False), look(Source.stepd), look(Source.cgroup2, "7"), look(Source.sim))
    assert seen(state)["7"].sources == (Source.cgroup2,)


def test_a_job_is_gone_when_the_last_source_has_lost_it() -> None:
    state = after(begin(SOURCES, False), look(Source.stepd, "7"), look(Source.cgroup2, "7"), look(Source.stepd))
    assert "7" in seen(state)
    state, change = take(state, look(Source.cgroup2), 9.0)
    assert change.gone == {"7"} and not seen(state)


def test_a_job_that_ends_while_another_begins_is_two_changes() -> None:
    state = after(begin(SOURCES, False), look(Source.stepd, "7"))
    _, change = take(state, look(Source.stepd, "8"), 5.0)
    assert change == Change(arrived=frozenset({"8"}), gone=frozenset({"7"}))


def test_the_first_sign_is_kept_while_any_source_sees_the_job() -> None:
    state = begin(SOURCES, False)
    for now_s, one in ((3.0, look(Source.stepd, "7")), (4.0, look(Source.cgroup2, "7")), (5.0, look(Source.stepd))):
        state, _ = take(state, one, now_s)
    assert seen(state)["7"].seen_s == 3.0


def test_an_id_that_comes_back_is_a_new_arrival() -> None:
    state = begin(SOURCES, False)
    for now_s, one in ((3.0, look(Source.stepd, "7")), (4.0, look(Source.stepd)), (5.0, look(Source.stepd, "7"))):
        state, change = take(state, one, now_s)
    assert seen(state)["7"].seen_s == 5.0 and change.arrived == {"7"}


def steps(*looks: Look) -> list[float]:
    """The first sign of job 7 as it is told after each look."""
    state, told = begin(SOURCES, False), []
    for number, one in enumerate(looks):
        state, _ = take(state, one, float(number))
        told.append(seen(state)["7"].seen_s)
    return told


def back(source: Source) -> Look:
    return Look(source=source, jobs={"7": None}, began_s=0.0, back=frozenset({"7"}))


def test_an_id_that_was_away_between_two_looks_is_another_run() -> None:
    state = after(begin(SOURCES, False), look(Source.stepd, "7"))
    state, change = take(state, back(Source.stepd), 5.0)
    assert seen(state)["7"].seen_s == 5.0 and change == Change(back=frozenset({"7"}))
    assert seen(state)["7"].lags_s == (0.0,)


def test_the_slower_sources_tell_of_the_same_other_run_and_of_no_third_one() -> None:
    here = [look(Source.stepd, "7"), look(Source.cgroup2, "7"), look(Source.procfs, "7")]
    assert steps(*here, back(Source.stepd), back(Source.cgroup2)) == [0, 0, 0, 3, 3]
    slower = [look(Source.cgroup2), look(Source.cgroup2, "7")]
    assert steps(*here, back(Source.stepd), *slower) == [0, 0, 0, 3, 3, 3]
    assert steps(*here, back(Source.stepd), back(Source.cgroup2), back(Source.cgroup2)) == [0, 0, 0, 3, 3, 5]


def test_a_folder_that_had_gone_tells_of_another_run_although_a_slow_source_still_shows_the_last_one() -> None:
    here = [look(Source.stepd, "7"), look(Source.procfs, "7"), look(Source.stepd)]
    assert steps(*here, look(Source.stepd, "7"), look(Source.cgroup2, "7")) == [0, 0, 0, 3, 3]


def test_what_procfs_does_not_find_once_has_not_gone() -> None:
    assert steps(look(Source.stepd, "7"), look(Source.procfs, "7"), look(Source.procfs), look(Source.procfs, "7")) == [0] * 4


def test_a_source_that_cannot_look_keeps_the_jobs_it_saw() -> None:
    state = after(begin(SOURCES, False), look(Source.stepd, "7"), failed(Source.stepd))
    assert "7" in seen(state)


def test_a_source_whose_place_is_gone_has_no_jobs() -> None:
    assert not seen(after(begin(SOURCES, False), look(Source.stepd, "7"), missing(Source.stepd)))


def test_nothing_is_scanned_before_every_source_has_looked() -> None:
    state = after(begin(SOURCES, False), *(look(source) for source in SOURCES[:-1]))
    assert not scanned(state) and not all_looked(state)
    assert scanned(after(state, look(SOURCES[-1])))


def test_a_source_that_is_missing_here_does_not_block_unless_it_was_named() -> None:
    looks = [missing(Source.stepd), failed(Source.procfs), missing(Source.cgroup2), look(Source.sim)]
    assert scanned(after(begin(SOURCES, named=False), *looks))
    assert not scanned(after(begin(SOURCES, named=True), *looks))


def test_a_source_that_worked_and_broke_blocks_until_it_works_or_is_missing() -> None:
    state = after(begin(SOURCES, False), *map(look, SOURCES), failed(Source.stepd))
    assert not scanned(state)
    assert scanned(after(state, look(Source.stepd)))
    assert scanned(after(state, missing(Source.stepd)))


def test_where_slurm_is_one_source_that_sees_its_jobs_has_to_work() -> None:
    blind = [failed(Source.stepd), missing(Source.cgroup2), missing(Source.procfs), look(Source.sim)]
    elsewhere = after(begin(SOURCES, named=False), *blind)
    assert scanned(elsewhere)
    for job_cgroups in (True, False):
        here = configured(elsewhere, job_cgroups)
        assert not scanned(here) and not scanned(choose(here, SOURCES, named=False))
        assert {state.name for state in jobs_fact(here, 9.0).sources if not state.works and state.why} == set(SOURCES[:-1])
        assert all(scanned(after(here, look(source))) for source in (Source.stepd, Source.procfs))


def test_a_cgroup_source_sees_nothing_where_slurm_makes_no_cgroups_and_says_so() -> None:
    views = [failed(Source.stepd), look(Source.cgroup2), missing(Source.procfs), look(Source.sim)]
    state = after(begin(SOURCES, named=False), *views)
    assert scanned(configured(state, job_cgroups=True)) and not scanned(configured(state, job_cgroups=False))
    told = {state.name: state for state in jobs_fact(configured(state, job_cgroups=False), 9.0).sources}
    assert not told["cgroup2"].works and "no cgroups" in told["cgroup2"].why
    beside = after(begin(SOURCES[1:3], named=True), look(Source.cgroup2), look(Source.procfs))
    assert scanned(configured(beside, job_cgroups=False)), "named, it has to work, and does"


def test_the_fact_says_which_source_does_not_work_and_why() -> None:
    fact = jobs_fact(after(begin(SOURCES, True), failed(Source.stepd)), 1.0)
    assert [(state.name, state.works, state.why) for state in fact.sources][0] == ("stepd", False, "permission denied")


def test_a_simulated_job_never_hides_a_real_one_with_its_id() -> None:
    simulated = Look(source=Source.sim, jobs={"7": ()}, began_s=0.0)
    for order in (SOURCES, SOURCES[::-1]):
        state = after(begin(order, False), simulated)
        assert seen(state)["7"].gpus == ()
        assert seen(after(state, look(Source.stepd, "7")))["7"].gpus is None


def test_a_folder_alone_is_a_leftover_once_all_processes_were_looked_at_long_after() -> None:
    state = begin(SOURCES, False)
    state, _ = take(state, look(Source.procfs, at=0.0), 0.0)
    state, _ = take(state, look(Source.cgroup2, "7"), 1.0)
    for began_s, empty in ((2.0, False), (LEFTOVER_AFTER_S + 0.9, False), (LEFTOVER_AFTER_S + 1, True)):
        state, _ = take(state, look(Source.procfs, at=began_s), began_s)
        assert seen(state)["7"].empty is empty


def test_a_folder_with_a_process_or_a_socket_is_no_leftover() -> None:
    for source in (Source.procfs, Source.stepd):
        state = begin(SOURCES, False)
        for now_s in (0.0, 50.0, 100.0):
            state, _ = take(state, look(Source.cgroup2, "7"), now_s)
            state, _ = take(state, look(Source.procfs, at=now_s), now_s)
            state, _ = take(state, look(source, "7", at=now_s), now_s)
        assert not seen(state)["7"].empty


def test_a_folder_is_no_leftover_when_processes_cannot_be_seen() -> None:
    state = after(begin(SOURCES, False), look(Source.procfs), look(Source.cgroup2, "7"), look(Source.procfs, at=99.0))
    assert seen(state)["7"].empty
    assert not seen(after(state, failed(Source.procfs)))["7"].empty


def test_other_sources_chosen_keep_what_the_remaining_ones_saw() -> None:
    state = after(begin(SOURCES, False), look(Source.stepd, "7"), look(Source.sim, "8"))
    state = choose(state, (Source.stepd, Source.cgroup1), named=True)
    assert set(seen(state)) == {"7"} and not scanned(state)


IDS = st.sampled_from([str(number) for number in range(5)])
JOBS = st.none() | st.dictionaries(IDS, st.none() | st.tuples(st.integers(0, 7)))
LOOKS = st.lists(st.tuples(st.sampled_from(SOURCES), JOBS, st.booleans(), st.floats(0, 60)), max_size=40)


@given(LOOKS, st.booleans())
def test_whatever_is_seen_the_fact_tells_it_and_every_change_is_told_once(
    steps: list[tuple[Source, dict[str, Gpus] | None, bool, float]], named: bool
) -> None:
    state, now_s = begin(SOURCES, named), 0.0
    told: set[str] = set()
    last: dict[Source, set[str]] = {}
    first_s: dict[str, float] = {}
    for source, jobs, absent, passed_s in steps:
        now_s += passed_s
        one = Look(source=source, jobs=jobs, began_s=now_s, absent=absent and jobs is None)
        state, change = take(state, one, now_s)
        if jobs is not None or one.absent:
            last[source] = set(jobs or ())
        assert not change.arrived & change.gone
        assert not change.arrived & told and change.gone <= told
        before = told
        told = (told | change.arrived) - change.gone
        assert change.back <= before - change.gone and all(job in (jobs or {}) for job in change.back)
        first_s = {job: now_s if job in change.arrived | change.back else first_s[job] for job in told}
        fact = jobs_fact(state, now_s)
        ids = [job.id for job in fact.jobs]
        assert set(ids) == told == set().union(*last.values()) and len(ids) == len(told)
        for job in fact.jobs:
            assert job.sources and set(job.sources) == {name for name, jobs_ in last.items() if job.id in jobs_}
            assert job.seen_s == first_s[job.id]
            assert not job.empty or set(job.sources) == {Source.cgroup2}
        if fact.scanned:
            assert last.keys() >= {state.name for state in fact.sources if state.works}
            assert not named or all(state.works for state in fact.sources)
