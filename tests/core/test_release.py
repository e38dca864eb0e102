"""When a release counts as proved, what is still left, and when it broke the budget."""

import msgspec
import pytest

from llmwd.core.gpumap import build_map, contradiction, simulated
from llmwd.core.release import (
    SPARE_BYTES,
    OnGpu,
    begin,
    broken,
    dirty,
    driver_says,
    judge_at_s,
    server_says,
    shows_leftovers,
    took_s,
    unproved,
)
from llmwd.messages import Lease, Released, ReleaseProof, Revocation, ServerFact
from llmwd.vocab import NodePhase, Phase, Reason

MIB = 1 << 20
LEASE = Lease(epoch=4, gpus=(6, 7), uuids=("A", "B"), granted_s=1.0, expires_s=90.0, before_bytes=(10 * MIB, None))
END = Revocation(epoch=4, reason=Reason.yielded_to_job, detail="", revoked_s=100.2, job="77", seen_s=100.0)
BEGUN = begin(LEASE, END)
GONE = msgspec.structs.replace(BEGUN, gone_s=101.0)


def server(**changes: object) -> ServerFact:
    fact = ServerFact(
        profile="glm", model_name="org/GLM", served_as="glm", wanted_gpus=2, phase=Phase.stopped,
        node_phase=NodePhase.waiting, reason=Reason.yielded_to_job, detail="", since_at=60.0, holding=(), at_s=101.5,
    )  # fmt: skip
    return msgspec.structs.replace(fact, **changes)


def free(**changes: object) -> dict[str, OnGpu]:
    """Both GPUs as the driver shows them after the end, the first with changes."""
    rest = OnGpu(at_s=101.1, used_bytes=10 * MIB)
    return {"A": msgspec.structs.replace(rest, **changes), "B": rest}


def test_it_begins_with_the_first_sign_or_without_one_with_the_revocation() -> None:
    assert (BEGUN.begun_s, BEGUN.job, BEGUN.gone_s, BEGUN.proved_s) == (100.0, "77", None, None)
    assert begin(LEASE, msgspec.structs.replace(END, seen_s=None)).begun_s == 100.2


def test_the_tree_is_gone_when_a_manager_that_has_heard_of_the_end_holds_nothing() -> None:
    assert server_says(BEGUN, server(heard_s=100.1), 100.2, lost=False).gone_s is None  # it may be starting one right now
    assert server_says(BEGUN, server(holding=(6, 7), heard_s=100.3), 100.2, lost=False).gone_s is None
    assert server_says(BEGUN, server(heard_s=100.3), 100.2, lost=False).gone_s == 101.5
    told = server(heard_s=100.3, released=Released(epoch=4, gone_s=100.9))
    assert server_says(BEGUN, told, 100.2, lost=False).gone_s == 100.9
    older = server(heard_s=100.1, released=Released(epoch=3, gone_s=50.0))
    assert server_says(BEGUN, older, 100.2, lost=False).gone_s is None
    assert server_says(BEGUN, server(), 100.2, lost=True).gone_s == 101.5


def test_until_it_is_proved_the_gpus_are_not_free() -> None:
    assert set(dirty(BEGUN)) == set(dirty(GONE)) == {"A", "B"} and dirty(None) == {}


def test_without_a_driver_the_trees_end_is_the_proof() -> None:
    assert driver_says(BEGUN, None, 102.0).proved_s is None
    assert driver_says(GONE, None, 102.0).proved_s == 101.0


def test_the_driver_proves_it_by_listing_nothing_of_ours_with_the_memory_back() -> None:
    proved = driver_says(GONE, free(), 101.2)
    assert (proved.proved_s, proved.left, dirty(proved)) == (101.2, "", {})
    assert took_s(proved, 500.0) == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("shown", "word"),
    [
        ({}, "has not said yet"),
        (free(at_s=100.9), "has not said yet"),
        (free(ours=(12, 13)), "still lists our process 12, 13"),
        (free(used_bytes=10 * MIB + SPARE_BYTES + MIB), "129 MiB more are in use than before"),
        (free(error="GPU is lost"), "cannot say who is on it (GPU is lost)"),
    ],
)
def test_what_is_left_is_named_and_keeps_both_gpus_dirty(shown: dict[str, OnGpu], word: str) -> None:
    proof = driver_says(GONE, shown, 101.2)
    assert proof.proved_s is None and proof.left.startswith("GPU 6: ") and word in proof.left
    assert dirty(proof) == {"A": proof.left, "B": proof.left}


@pytest.mark.parametrize(
    "more", [{"used_bytes": 10 * MIB + SPARE_BYTES}, {"used_bytes": None}, {"used_bytes": 10**12, "strangers": True}]
)
def test_memory_that_cannot_be_ours_for_sure_does_not_count(more: dict[str, object]) -> None:
    assert driver_says(GONE, free(**more), 101.2).proved_s == 101.2


def test_the_budget_is_broken_by_processes_that_stay_and_by_what_the_driver_still_shows() -> None:
    assert not broken(BEGUN, False, 5.0, 104.9)
    assert "processes are not all gone yet" in broken(BEGUN, False, 5.0, 105.1)
    late = msgspec.structs.replace(BEGUN, gone_s=107.5)
    assert "gone after 7.5 s" in broken(late, False, 5.0, 107.6) and "job 77" in broken(late, False, 5.0, 107.6)
    lists = driver_says(GONE, free(ours=(12,)), 105.2)
    assert shows_leftovers(lists, free(ours=(12,)))
    assert "still lists our process 12" in broken(lists, True, 5.0, 105.2)


def test_a_driver_that_does_not_answer_breaks_no_budget() -> None:
    silent = driver_says(GONE, free(error="it hangs") | {"B": OnGpu(at_s=50.0)}, 200.0)
    assert not shows_leftovers(silent, free(error="it hangs") | {"B": OnGpu(at_s=50.0)})
    assert not broken(silent, False, 5.0, 200.0) and dirty(silent)


@pytest.mark.parametrize("reason", [Reason.lease_expired, Reason.switching, Reason.not_wanted])
def test_ends_that_nobody_waits_for_are_not_judged(reason: Reason) -> None:
    proof: ReleaseProof = msgspec.structs.replace(BEGUN, reason=reason)
    assert not broken(proof, True, 5.0, 500.0) and judge_at_s(proof, 5.0) is None


def test_it_is_judged_once_and_looked_at_when_the_budget_is_over() -> None:
    assert judge_at_s(BEGUN, 5.0) == pytest.approx(105.001)
    judged = msgspec.structs.replace(BEGUN, judged=True)
    assert judge_at_s(judged, 5.0) is None and not broken(judged, True, 5.0, 500.0)


def test_a_jobs_process_where_the_map_does_not_put_the_job_contradicts_the_map() -> None:
    gpu_map = build_map(simulated(4), 4, 0, {}, sim=False)
    on = {"SIM-1": {"77"}, "SIM-2": {"78"}}
    assert contradiction(gpu_map, {"77": {0, 1}, "78": {2}}, on) == ""
    assert contradiction(gpu_map, {"77": {0, 1}}, on) == ""  # what 78 has is not known: nothing to compare
    assert "job 78 has Slurm's GPU 3 and a process on SIM-2, which is GPU 2" in contradiction(gpu_map, {"78": {3}}, on)


def test_nothing_of_ours_is_on_a_jobs_gpus_when_neither_lease_nor_tree_nor_an_open_release_is() -> None:
    ended, quiet, both, none = BEGUN, server(), frozenset(LEASE.uuids), frozenset[str]()
    assert unproved(both, None, None, quiet, none) == ""
    assert unproved(both, LEASE, None, quiet, none)
    assert unproved(both, None, None, quiet, both)
    assert unproved(both, None, ended, quiet, none)
    assert unproved(both, None, msgspec.structs.replace(ended, left="GPU 6: 300 MiB"), quiet, none) == "GPU 6: 300 MiB"
    assert unproved(both, None, msgspec.structs.replace(ended, proved_s=9.0), quiet, none) == ""
    assert unproved(both, None, None, None, none)  # a manager that has said nothing yet may hold anything
    assert unproved(frozenset({"another"}), LEASE, ended, quiet, both) == ""
    assert unproved(none, LEASE, ended, None, both) == ""
