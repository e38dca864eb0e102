"""Whether GPUs that were given back are really free of us, and whether that was quick enough. Pure.

Our own word is not enough for a proof: the processes may be gone while the driver still tears their contexts down.
So after the tree is gone the driver is asked until it lists none of our processes on these GPUs and their memory is
back at the level before. What it still shows keeps the GPUs ours and dirty. A release that broke YIELD_BUDGET is a
reason to stay away; a driver that merely does not answer is not: then the GPUs are unknown anyway.
"""

from collections.abc import Mapping

import msgspec

from llmwd.messages import Lease, ReleaseProof, Revocation, ServerFact
from llmwd.vocab import Reason

# A driver's own bookkeeping moves by some MiB; a context alone takes hundreds.
SPARE_BYTES = 128 << 20

# Ends of a lease for which somebody else waits. Others (a switch, a lease that ran out) are judged by no budget.
JUDGED = frozenset(
    {
        Reason.yielded_to_job,
        Reason.unknown_job,
        Reason.gpu_in_use,
        Reason.gpu_unknown,
        Reason.node_draining,
        Reason.memory_pressure,
        Reason.map_contradicted,
        Reason.held,
    }
)


class OnGpu(msgspec.Struct, frozen=True, kw_only=True):
    """What the driver shows of one GPU, in a reading that began at `at_s`. error: it cannot tell."""

    at_s: float
    ours: tuple[int, ...] = ()
    strangers: bool = False
    used_bytes: int | None = None
    error: str = ""


def begin(lease: Lease, revocation: Revocation) -> ReleaseProof:
    """The release that a revocation begins."""
    begun_s = revocation.revoked_s if revocation.seen_s is None else revocation.seen_s
    return ReleaseProof(
        epoch=lease.epoch, gpus=lease.gpus, uuids=lease.uuids, before_bytes=lease.before_bytes,
        reason=revocation.reason, job=revocation.job, begun_s=begun_s,
    )  # fmt: skip


def server_says(proof: ReleaseProof, server: ServerFact, revoked_s: float, lost: bool) -> ReleaseProof:
    """With the manager's word: the tree is gone when a manager that has heard of the end holds nothing any more.

    lost: the manager is in quarantine; its tree ended with the lease.
    """
    if proof.gone_s is not None or server.holding:
        return proof
    if server.released is not None and server.released.epoch == proof.epoch:
        return msgspec.structs.replace(proof, gone_s=server.released.gone_s)
    if lost or server.heard_s >= revoked_s:
        return msgspec.structs.replace(proof, gone_s=server.at_s)
    return proof


def driver_says(proof: ReleaseProof, shown: Mapping[str, OnGpu] | None, now_s: float) -> ReleaseProof:
    """With the driver's reading, by UUID. None: there is no driver to ask, so the tree's end is the proof."""
    if proof.gone_s is None or proof.proved_s is not None:
        return proof
    if shown is None:
        # A lease that is taken over after its revocation may end long after its tree has.
        return msgspec.structs.replace(proof, proved_s=max(proof.gone_s, proof.begun_s), left="")
    left = [text for place, uuid in enumerate(proof.uuids) if (text := _left(proof, place, shown.get(uuid)))]
    if left:
        return msgspec.structs.replace(proof, left="; ".join(left))
    return msgspec.structs.replace(proof, proved_s=now_s, left="")


def _left(proof: ReleaseProof, place: int, on: OnGpu | None) -> str:
    gpu = proof.gpus[place]
    if on is None or on.at_s < proof.gone_s:
        return f"GPU {gpu}: the driver has not said yet that it is free of us"
    if on.error:
        return f"GPU {gpu}: the driver cannot say who is on it ({on.error})"
    if on.ours:
        return f"GPU {gpu}: the driver still lists our process {', '.join(map(str, on.ours))}"
    before = proof.before_bytes[place] if place < len(proof.before_bytes) else None
    # With somebody else on it already, how much memory is ours cannot be told.
    if before is None or on.used_bytes is None or on.strangers or on.used_bytes <= before + SPARE_BYTES:
        return ""
    return f"GPU {gpu}: {(on.used_bytes - before) / 2**20:.0f} MiB more are in use than before"


def shows_leftovers(proof: ReleaseProof, shown: Mapping[str, OnGpu] | None) -> bool:
    """The driver has looked since the tree's end, and something of us is still there."""
    if shown is None or proof.gone_s is None or proof.proved_s is not None:
        return False
    seen = [on for uuid in proof.uuids if (on := shown.get(uuid)) is not None]
    return bool(proof.left) and any(on.at_s >= proof.gone_s and not on.error for on in seen)


def dirty(proof: ReleaseProof | None) -> dict[str, str]:
    """GPUs (UUIDs) that are not free because the last release is not proved, and what is left there."""
    if proof is None or proof.proved_s is not None:
        return {}
    return dict.fromkeys(proof.uuids, proof.left or "the release is not proved yet")


def took_s(proof: ReleaseProof, now_s: float) -> float:
    """From the first sign to the proof, or up to now."""
    return (now_s if proof.proved_s is None else proof.proved_s) - proof.begun_s


def broken(proof: ReleaseProof, leftovers: bool, budget_s: float, now_s: float) -> str:
    """Why this release broke the budget, one sentence, empty while it did not (or was judged already)."""
    if proof.judged or proof.reason not in JUDGED:
        return ""
    names = f"GPU{'s' if len(proof.gpus) > 1 else ''} {', '.join(map(str, proof.gpus))}"
    who = f" for job {proof.job}" if proof.job else ""
    gone_after_s = (now_s if proof.gone_s is None else proof.gone_s) - proof.begun_s
    if gone_after_s > budget_s:
        state = "are not all gone yet" if proof.gone_s is None else f"were gone after {gone_after_s:.1f} s"
        return f"{names}{who}: our processes {state}, and YIELD_BUDGET is {budget_s:g} s"
    if leftovers and now_s - proof.begun_s > budget_s:
        return f"{names}{who}: given back, but not within YIELD_BUDGET ({budget_s:g} s): {proof.left}"
    return ""


def within_budget(proof: ReleaseProof, budget_s: float) -> bool:
    """The verdict on a release that is proved. It is the one that `broken` acts on: a proof that came late only because
    the driver was slow to answer breaks nothing."""
    return not proof.judged and not broken(proof, False, budget_s, proof.begun_s)


def proved_by(shown: Mapping[str, OnGpu] | None) -> str:
    """Whose word a proof is: the driver's, or, where there is none to ask, the end of the process tree."""
    return "tree" if shown is None else "driver"


def unproved(
    uuids: frozenset[str], lease: Lease | None, proof: ReleaseProof | None, server: ServerFact | None, holding: frozenset[str]
) -> str:
    """Why it cannot be said that nothing of ours is on these GPUs; empty when it can. holding: our processes may be there."""
    if not uuids:
        return ""
    if server is None:
        return "the vLLM manager has not said yet what it holds"
    if lease is not None and uuids & set(lease.uuids):
        return "they are still leased"
    if uuids & holding:
        return "processes of ours may still be there"
    if proof is not None and proof.proved_s is None and uuids & set(proof.uuids):
        return proof.left or "the last server's end is not confirmed yet"
    return ""


def judge_at_s(proof: ReleaseProof, budget_s: float) -> float | None:
    """When to look whether the budget is broken."""
    if proof.judged or proof.proved_s is not None or proof.reason not in JUDGED:
        return None
    return proof.begun_s + budget_s + 0.001
