"""Granting, keeping and ending the lease."""

from collections.abc import Callable

import msgspec
import pytest

from llmwd.core.claims import JobView
from llmwd.core.gpumap import GpuMap, build_map, simulated
from llmwd.core.jobrun import SIMULATED
from llmwd.core.lease import Decision, Evidence, Occupant, Situation, decide, free_since, name_job, occupy
from llmwd.messages import Hold, Lease
from llmwd.vocab import Holder, Reason

GPUS = simulated(4)
MAP = build_map(GPUS, 4, 0, {}, sim=False)
TTL_S, RESUME_S = 10.0, 10.0
EVER = dict.fromkeys(MAP.uuids, float("-inf"))
NONE: frozenset = frozenset()
LEASE = Lease(epoch=3, gpus=(2, 3), uuids=("SIM-2", "SIM-3"), granted_s=90.0, expires_s=105.0)


def job(id: str, *gpus: int, unknown: bool = False, **more: object) -> JobView:
    return JobView(id, None if unknown else frozenset(gpus), ("stepd",), seen_s=99.0, resolved_s=99.5, **more)


def by(*views: JobView, used: frozenset[int] = NONE, foreign: dict[str, str] | None = None, dirty: frozenset[str] = NONE):
    """foreign: UUID -> whose process is there; "" where the driver does not say."""
    told = {uuid: Occupant(Holder.other if who else Holder.unknown, why=who or "lost") for uuid, who in (foreign or {}).items()}
    return occupy(MAP, views, used, told, dict.fromkeys(dirty, "ours"))


def situation(**changes: object) -> Situation:
    """All is well, nothing is leased, two GPUs are wanted."""
    well = {
        "gpus": GPUS, "gpu_map": MAP, "occupants": {}, "free_since_s": EVER, "wanted": 2, "holding": NONE,
        "server_known": True, "pending": False, "lease": None, "hold": None, "node_states": ("IDLE",),
        "evidence": Evidence(), "epoch": 3,
    }
    return Situation(**(well | changes))


def decided(now_s: float = 100.0, **changes: object) -> Decision:
    return decide(situation(**changes), now_s, TTL_S, RESUME_S)


def test_no_epoch_is_granted_twice_though_the_resolver_has_lost_what_it_knew() -> None:
    """On a full disk its last fact is older than its last lease: the manager's word of that release would prove this one's."""
    assert decided(server_epoch=7).lease.epoch == 8 and decided(server_epoch=3).lease.epoch == 4 == decided(server_epoch=1).lease.epoch


def test_a_lease_is_granted_on_the_highest_free_gpus_with_the_next_epoch() -> None:
    decision = decided()
    assert decision.granted and decision.lease == Lease(
        epoch=4, gpus=(2, 3), uuids=("SIM-2", "SIM-3"), granted_s=100.0, expires_s=110.0, before_bytes=(None, None)
    )


def test_only_free_gpus_are_leased() -> None:
    assert decided(occupants=by(job("7", 3))).lease.gpus == (1, 2)


@pytest.mark.parametrize(
    ("changes", "blocked"),
    [
        ({"hold": Hold(since_at=0.0)}, Reason.held),
        ({"server_known": False}, Reason.starting),
        ({"wanted": 0}, None),
        ({"wanted": 5}, Reason.no_gpus),
        ({"occupants": by(job("7", 0, 1, 2))}, Reason.yielded_to_job),
        ({"occupants": by(used=frozenset({0, 1, 2}))}, Reason.yielded_to_job),
        ({"occupants": by(job("7", unknown=True))}, Reason.unknown_job),
        ({"occupants": by(foreign={"SIM-1": "process 5 is on it"}), "wanted": 4}, Reason.gpu_in_use),
        ({"occupants": by(foreign={"SIM-1": ""}), "wanted": 4}, Reason.gpu_unknown),
        ({"occupants": by(dirty=frozenset(MAP.uuids)), "holding": frozenset(MAP.uuids)}, Reason.waiting_for_gpus),
        ({"holding": frozenset({"SIM-0"})}, Reason.waiting_for_gpus),
        ({"memory_short": "42 %"}, Reason.memory_pressure),
        ({"pending": True}, Reason.waiting_for_gpus),
        ({"evidence": Evidence(renew_why="silent")}, Reason.no_evidence),
        ({"evidence": Evidence(grant_why="no reading")}, Reason.no_evidence),
        ({"evidence": Evidence(grant_why="no reading", just_started=True)}, Reason.starting),
        ({"free_since_s": {**EVER, "SIM-1": 90.1, "SIM-2": 90.1, "SIM-3": None}, "occupants": by(job("7", 3))}, Reason.resume_delay),
    ],
)
def test_nothing_is_granted_while_anything_is_against_it(changes: dict, blocked: Reason | None) -> None:
    decision = decided(**changes)
    assert decision.lease is None and not decision.granted and decision.blocked is blocked


# Written out, so that one that is left out of UNWELCOME is missed.
@pytest.mark.parametrize(
    "state",
    "DRAIN DRAINING DRAINED DOWN MAINT MAINTENANCE RESERVED FAIL FAILING POWERING_DOWN POWER_DOWN POWERED_DOWN REBOOT "
    "REBOOT_ISSUED REBOOT_REQUESTED INVAL FUTURE UNKNOWN".split(),
)
def test_a_node_that_slurm_wants_empty_is_left_and_not_taken(state: str) -> None:
    assert decided(node_states=("MIXED", state)).blocked is Reason.node_draining
    assert decided(node_states=("MIXED", state), lease=LEASE).revocation.reason is Reason.node_draining


def test_gpus_are_taken_again_when_enough_of_them_have_been_free_long_enough() -> None:
    since = {"SIM-0": 95.0, "SIM-1": 92.0, "SIM-2": 94.0, "SIM-3": 99.0}
    waits = decided(free_since_s=since)
    assert waits.blocked is Reason.resume_delay and waits.look_again_s == 104.0
    assert decided(104.0, free_since_s=since).lease.gpus == (1, 2)


@pytest.mark.parametrize("at_s", [0.1, 1 / 3, 12345.678901, 98765.4321])
def test_the_time_it_asks_to_be_woken_at_is_late_enough(at_s: float) -> None:
    since = dict.fromkeys(MAP.uuids, at_s)
    again_s = decided(at_s, free_since_s=since).look_again_s
    assert decided(again_s, free_since_s=since).granted


@pytest.mark.parametrize(
    ("occupants", "detail"),
    [
        (by(job("7", 1, 2, 3)), "job 7 has GPUs 1-3"),
        (by(job("7", 0, 3), job("8", 2)), "job 8 has GPU 2"),
        (by(used=frozenset({0, 2, 3})), "GPUs 0,2-3: allocated by Slurm"),
        (by(job("7", unknown=True)), "job 7: its GPUs could not be learned"),
        (by(foreign={"SIM-2": "process 5 is on it", "SIM-3": "process 5 is on it"}), "GPUs 2-3: process 5 is on it"),
    ],
)
def test_what_ends_a_lease_is_told_with_all_the_gpus_it_has(occupants: dict[str, Occupant], detail: str) -> None:
    assert decided(lease=LEASE, occupants=occupants).revocation.detail == detail
    blocked = decided(occupants=occupants, wanted=4).detail
    assert blocked.split("; ")[1] in (detail, "job 7 has GPUs 0,3")


def test_all_who_keep_us_from_having_enough_are_told_the_surest_first_and_not_too_many() -> None:
    mixed = by(job("7", unknown=True), used=frozenset({0}), foreign={"SIM-2": "process 5 is on it"})
    waits = decided(occupants=mixed, wanted=4)
    assert waits.blocked is Reason.yielded_to_job
    assert waits.detail == (
        "0 of 4 GPUs are free; GPU 0: allocated by Slurm; GPU 2: process 5 is on it; job 7: its GPUs could not be learned"
    )
    many = decided(occupants=by(*(job(str(number), number) for number in range(4))), wanted=4)
    assert many.detail == "0 of 4 GPUs are free; job 0 has GPU 0; job 1 has GPU 1; job 2 has GPU 2; 1 more"


def test_a_lease_is_renewed_on_fresh_evidence_and_only_then() -> None:
    assert decided(lease=LEASE).lease == msgspec.structs.replace(LEASE, expires_s=110.0)
    kept = decided(lease=LEASE, evidence=Evidence(renew_why="the detector is silent"))
    assert kept.lease == LEASE and kept.look_again_s == 105.0 and kept.revocation is None


def test_a_lease_that_the_manager_knows_to_be_revoked_is_not_renewed_and_what_ended_it_is_found_again() -> None:
    taken_over = {"lease": LEASE, "revoked_s": 99.5, "pending": True}  # the job that ended it is being asked about
    kept = decided(**taken_over)
    assert kept.lease == LEASE and kept.look_again_s == LEASE.expires_s and "revoked" in kept.detail
    assert decided(**taken_over, occupants=by(job("7", 3))).revocation.reason is Reason.yielded_to_job
    expired = decided(105.0, **taken_over).revocation
    assert expired.reason is Reason.lease_expired and expired.detail == kept.detail
    earlier = decided(lease=LEASE, revoked_s=LEASE.granted_s - 0.1)  # that was the lease before
    assert earlier.lease.expires_s == 110.0


def test_a_lease_is_not_renewed_before_the_manager_has_said_whether_it_was_revoked() -> None:
    assert decided(lease=LEASE, server_known=False).lease == LEASE
    assert decided(105.0, lease=LEASE, server_known=False).revocation.reason is Reason.lease_expired


def test_a_lease_ends_at_its_expiry_whatever_else_is_well() -> None:
    ended = decided(105.0, lease=LEASE)
    assert ended.lease is None and ended.revocation.reason is Reason.lease_expired and ended.revocation.epoch == 3


def test_a_slurmctld_that_is_away_ends_no_lease() -> None:
    assert decided(lease=LEASE, evidence=Evidence(grant_why="slurmctld does not answer")).lease.expires_s == 110.0


def test_a_lease_counts_from_the_detectors_last_look_not_from_its_renewal() -> None:
    """Else a detector that hangs, and then a manager that does, would add up their times."""
    assert decided(lease=LEASE, evidence=Evidence(seen_s=97.0)).lease.expires_s == 107.0
    assert decided(evidence=Evidence(seen_s=97.0)).lease.expires_s == 107.0
    assert decided(lease=LEASE, evidence=Evidence(seen_s=200.0)).lease.expires_s == 110.0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"occupants": by(job("7", 3))}, Reason.yielded_to_job),
        ({"occupants": by(used=frozenset({2}))}, Reason.yielded_to_job),
        ({"occupants": by(job("7", unknown=True))}, Reason.unknown_job),
        ({"occupants": by(foreign={"SIM-2": "process 5"})}, Reason.gpu_in_use),
        ({"occupants": by(foreign={"SIM-2": ""})}, Reason.gpu_unknown),
        ({"hold": Hold(since_at=0.0, by="me")}, Reason.held),
        ({"memory_short": "42 %"}, Reason.memory_pressure),
        ({"wanted": 0}, Reason.not_wanted),
        ({"wanted": 1}, Reason.switching),
        ({"gpu_map": build_map(GPUS[:3], 3, 0, {}, sim=False), "gpus": GPUS[:3]}, Reason.gpu_unknown),
    ],
)
def test_any_sign_of_a_conflict_ends_the_lease(changes: dict, reason: Reason) -> None:
    decision = decided(lease=LEASE, **changes)
    assert decision.lease is None and decision.revocation.reason is decision.blocked is reason


@pytest.mark.parametrize(
    "changes",
    [
        {"occupants": by(job("7", 0, 1))},
        {"occupants": by(job("7"))},
        {"occupants": by(foreign={"SIM-0": "process 5"})},
        {"occupants": by(dirty=frozenset({"SIM-2", "SIM-3"})), "holding": frozenset({"SIM-2", "SIM-3"})},
        {"pending": True},
        {"wanted": 0, "holding": frozenset({"SIM-2"})},
        {"server_known": False, "wanted": 0},
    ],
)
def test_what_is_no_conflict_leaves_the_lease_alone(changes: dict) -> None:
    assert decided(lease=LEASE, **changes).lease is not None


def test_a_revocation_names_the_job_and_its_times_even_among_our_own_processes() -> None:
    occupants = by(job("8", 0), job("7", 3), used=frozenset({0, 3}), dirty=frozenset({"SIM-2", "SIM-3"}))
    gone = decided(lease=LEASE, occupants=occupants).revocation
    assert (gone.job, gone.seen_s, gone.resolved_s, gone.revoked_s) == ("7", 99.0, 99.5, 100.0)


def test_a_hidden_job_that_was_in_nobodys_way_before_is_not_the_one_that_came_later() -> None:
    """Else the release would be judged by YIELD_BUDGET from that one's first sign on, however long ago."""
    covered = job("7", 2, 3, covered=True)
    at_once = decided(lease=LEASE, occupants=by(covered), kept_s=99.4).revocation
    assert (at_once.job, at_once.seen_s) == ("7", 99.0)
    later = decided(lease=LEASE, occupants=by(covered), kept_s=99.6).revocation
    assert (later.reason, later.job, later.seen_s) == (Reason.yielded_to_job, None, None) and "more" in later.detail
    assert decided(lease=LEASE, occupants=by(job("7", 2)), kept_s=99.6).revocation.job == "7"  # what is known exactly stands


@pytest.mark.parametrize(
    ("later", "name"),
    [
        ((job("7", 3),), "7"),
        ((job("8", 0), job("9", 2, 3)), "9"),
        ((), None),
        ((job("8", 0),), None),  # not one of ours
        ((job("7", 2, 3, covered=True),), None),  # it may have been any of those that the node counts
        ((job("7", unknown=True),), None),
        ((JobView("7", frozenset({3}), SIMULATED),), None),  # slurmctld knows nothing of it
    ],
)
def test_a_job_that_slurmctld_was_first_to_tell_of_gets_its_name_when_it_is_seen(later: tuple[JobView, ...], name: str | None) -> None:
    used = frozenset({2, 3})
    gone = decided(lease=LEASE, occupants=by(used=used)).revocation
    assert (gone.reason, gone.job) == (Reason.yielded_to_job, None)
    named = name_job(gone, LEASE.uuids, by(*later, used=used))
    assert named == msgspec.structs.replace(gone, job=name)
    assert name_job(named, LEASE.uuids, by(job("10", 2, 3), used=used)).job == (name or "10")  # a name stays


def test_what_a_slurm_job_did_not_end_gets_no_name() -> None:
    gone = decided(lease=LEASE, hold=Hold(since_at=0.0)).revocation
    assert name_job(gone, LEASE.uuids, by(job("7", 3))) == gone


def test_a_conflict_counts_before_every_other_reason() -> None:
    gone = decided(200.0, lease=LEASE, occupants=by(job("7", 3)), hold=Hold(since_at=0.0), wanted=0).revocation
    assert gone.reason is Reason.yielded_to_job


@pytest.mark.parametrize("turn", [tuple, lambda views: tuple(reversed(views))])
def test_who_is_known_to_have_a_gpu_is_shown_before_who_may_have_it(turn: Callable) -> None:
    views = turn((job("exact", 0), job("covered", 0, 1, covered=True), job("unknown", unknown=True)))
    shown = {uuid: occupant.job.id for uuid, occupant in by(*views, used=frozenset({0, 1})).items()}
    assert shown == {"SIM-0": "exact", "SIM-1": "covered", "SIM-2": "unknown", "SIM-3": "unknown"}
    assert by(*views)["SIM-2"].holder is Holder.unknown


def test_an_index_that_may_be_several_gpus_takes_them_all() -> None:
    unsure = GpuMap(certain=False, by_index={0: ("A", "B"), 1: ("A", "B")}, why="", uuids=("A", "B"), likely={"A": 0, "B": 1})
    assert set(occupy(unsure, (job("7", 0),), NONE, {}, {})) == {"A", "B"}


def test_what_was_never_seen_taken_is_free_since_ever_and_the_rest_since_it_was_left() -> None:
    taken = by(job("7", 0))
    since = free_since({}, MAP.uuids, taken, 5.0)
    assert since == {"SIM-0": None, "SIM-1": float("-inf"), "SIM-2": float("-inf"), "SIM-3": float("-inf")}
    since = free_since(since, MAP.uuids, {}, 8.0)
    assert since["SIM-0"] == 8.0 and free_since(since, MAP.uuids, {}, 9.0)["SIM-0"] == 8.0


def test_our_own_processes_do_not_make_a_gpu_wait() -> None:
    assert free_since(EVER, MAP.uuids, {"SIM-1": Occupant(Holder.llmwd)}, 5.0) == EVER


def test_after_a_conflict_nothing_is_taken_for_resume_after_not_even_gpus_that_were_free_all_along() -> None:
    soon = decided(conflict_s=95.0)
    assert (soon.lease, soon.blocked, soon.look_again_s) == (None, Reason.resume_delay, 105.0)
    assert decided(conflict_s=90.0).granted
