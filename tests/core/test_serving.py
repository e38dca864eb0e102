"""What the vLLM manager wants, ends and shows."""

import msgspec
import pytest

from llmwd.core.serving import Plan, Serving, plan, shown
from llmwd.messages import GpusFact, Hold, Lease, Revocation
from llmwd.vocab import NodePhase, Phase, Reason

LEASE = Lease(epoch=3, gpus=(2, 3), uuids=("a", "b"), granted_s=0.0, expires_s=110.0)
OLD = Revocation(epoch=2, reason=Reason.yielded_to_job, detail="job 7 has GPU 3", revoked_s=50.0, job="7")


def fact(lease: Lease | None = LEASE, **more: object) -> GpusFact:
    told = {"revocation": None, "claims": (), "sources": (), "hold": None, "blocked": None, "detail": "", "node_states": ()}
    return GpusFact(gpus=(), lease=lease, epoch=3, at_s=100.0, **(told | more))


IDLE = Serving(
    gpus=fact(), phase=Phase.stopped, alive=False, tree_gpus=None, recipe=None, wanted_recipe="r", profile_gpus=2,
    config_detail="", failure_detail="", releasing_reason=None, stopping=False,
)
RUNS = msgspec.structs.replace(IDLE, phase=Phase.ready, alive=True, tree_gpus=(2, 3), recipe="r")


def planned(base: Serving, now_s: float = 100.0, **changes: object) -> Plan:
    return plan(msgspec.structs.replace(base, **changes), now_s)


def test_a_lease_that_covers_the_profile_is_served_on() -> None:
    assert planned(IDLE) == Plan(run=LEASE, end=None, wanted_gpus=2)
    assert planned(RUNS).end is None


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"gpus": None}, 2),
        ({"gpus": fact(None)}, 2),
        ({"profile_gpus": 1}, 1),
        ({"profile_gpus": 4}, 4),
        ({"stopping": True}, 0),
        ({"phase": Phase.failed}, 0),
        ({"wanted_recipe": None}, 0),
    ],
)
def test_nothing_starts_without_a_lease_of_the_profiles_size_and_a_reason(changes: dict, wanted: int) -> None:
    assert planned(IDLE, **changes) == Plan(run=None, end=None, wanted_gpus=wanted)


def test_nothing_starts_on_a_lease_that_has_expired() -> None:
    assert planned(IDLE, now_s=110.0).run is None


def test_nothing_starts_on_a_lease_that_nobody_has_renewed_for_long_and_what_runs_on_it_goes_on() -> None:
    assert planned(IDLE, 107.4, lease_ttl_s=10.0).run == LEASE
    assert planned(IDLE, 107.5, lease_ttl_s=10.0).run is None
    assert planned(RUNS, 107.5, lease_ttl_s=10.0) == Plan(run=LEASE, end=None, wanted_gpus=2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stopping": True}, Reason.stopping),
        ({"gpus": fact(None, revocation=msgspec.structs.replace(OLD, epoch=3))}, Reason.yielded_to_job),
        ({"gpus": fact(None)}, Reason.lease_expired),
        ({"gpus": fact(msgspec.structs.replace(LEASE, gpus=(3,)))}, Reason.lease_expired),
        ({"gpus": fact(msgspec.structs.replace(LEASE, gpus=(1, 2)))}, Reason.lease_expired),
        ({"tree_gpus": None}, Reason.lease_expired),
        ({"wanted_recipe": "another"}, Reason.switching),
    ],
)
def test_a_tree_that_the_lease_or_the_profile_does_not_cover_has_to_end(changes: dict, reason: Reason) -> None:
    assert planned(RUNS, **changes).end is reason
    assert planned(RUNS, alive=False, **changes).end is None


def test_a_lease_that_was_not_renewed_is_not_blamed_on_the_job_before_it() -> None:
    assert planned(RUNS, now_s=110.0, gpus=fact(revocation=OLD)).end is Reason.lease_expired


def test_a_manager_that_has_not_heard_of_the_lease_yet_ends_nothing() -> None:
    assert planned(RUNS, gpus=None).end is None


def test_a_bad_profile_takes_nothing_down_and_keeps_its_gpus() -> None:
    assert planned(RUNS, wanted_recipe=None, profile_gpus=0) == Plan(run=None, end=None, wanted_gpus=2)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"alive": True, "phase": Phase.ready}, (NodePhase.serving, Reason.ready)),
        ({"alive": True, "phase": Phase.starting}, (NodePhase.loading, Reason.loading)),
        ({"alive": True, "phase": Phase.draining, "releasing_reason": Reason.held}, (NodePhase.yielding, Reason.held)),
        ({"alive": True, "phase": Phase.ready, "stopping": True, "releasing_reason": Reason.stopping}, (NodePhase.yielding, Reason.stopping)),
        ({"stopping": True}, (NodePhase.stopped, Reason.stopping)),
        ({"gpus": fact(None, hold=Hold(since_at=0.0)), "wanted_recipe": None}, (NodePhase.held, Reason.held)),
        ({"wanted_recipe": None}, (NodePhase.failed, Reason.config_error)),
        ({"phase": Phase.failed}, (NodePhase.failed, Reason.server_failed)),
        ({"phase": Phase.backoff}, (NodePhase.waiting, Reason.server_backoff)),
        ({"gpus": None}, (NodePhase.waiting, Reason.starting)),
        ({"gpus": fact(None, blocked=Reason.no_gpus)}, (NodePhase.failed, Reason.no_gpus)),
        ({"gpus": fact(None, blocked=Reason.resume_delay)}, (NodePhase.waiting, Reason.resume_delay)),
    ],
)
def test_what_is_shown_is_what_happens(changes: dict, told: tuple) -> None:
    assert shown(msgspec.structs.replace(IDLE, **changes))[:2] == told


def test_while_yielding_the_job_is_named() -> None:
    now = msgspec.structs.replace(RUNS, releasing_reason=Reason.yielded_to_job, gpus=fact(None, revocation=OLD))
    assert shown(now)[2] == "job 7 has GPU 3"


@pytest.mark.parametrize(
    ("lease", "runs"),
    [
        (LEASE, False),
        (msgspec.structs.replace(LEASE, granted_s=102.1), True),  # another one
        (msgspec.structs.replace(LEASE, expires_s=113.0), True),  # renewed on what was seen at 103
        (msgspec.structs.replace(LEASE, expires_s=111.0), False),
    ],
)
def test_a_lease_that_was_revoked_does_not_come_back_unless_it_is_renewed_after_that(lease: Lease, runs: bool) -> None:
    heard = {"revoked_s": 102.0, "lease_ttl_s": 10.0, "gpus": fact(lease)}
    assert (planned(IDLE, 104.0, **heard).run == lease) is runs
    assert (planned(RUNS, 104.0, **heard).end is None) is runs
