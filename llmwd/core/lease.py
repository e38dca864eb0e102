"""Who has each GPU, and whether we may have some: the lease is granted, renewed and revoked here, nowhere else.

The lease is the only right to a GPU. Granting needs all the evidence: every working source has been read, nothing
is pending, a reading of the node is fresh, and enough GPUs have been free for RESUME_AFTER. Keeping it needs
fresh evidence that nobody else has one of its GPUs; any single sign of a conflict ends it.
"""

from collections.abc import Mapping, Sequence

import msgspec

from llmwd.core import lookahead
from llmwd.core.claims import JobView
from llmwd.core.gpumap import GpuLike, GpuMap
from llmwd.core.jobrun import SIMULATED
from llmwd.core.lookahead import Outlook
from llmwd.core.placement import choose
from llmwd.core.wording import name_gpus
from llmwd.messages import Hold, Lease, Revocation
from llmwd.vocab import Holder, Reason

# Slurm's words for a node on which nobody should begin anything (States of StateComplete, "+"-joined).
UNWELCOME = frozenset(
    "DRAIN DRAINING DRAINED DOWN MAINT MAINTENANCE RESERVED FAIL FAILING POWERING_DOWN POWER_DOWN POWERED_DOWN "
    "REBOOT REBOOT_ISSUED REBOOT_REQUESTED INVAL FUTURE UNKNOWN".split()
)

CLAIMS_TOLD = 3  # of those that keep us from having enough GPUs


class Occupant(msgspec.Struct, frozen=True):
    """Who has one GPU. `sure`: known, as against assumed because it is not known."""

    holder: Holder
    job: JobView | None = None
    why: str = ""


class Evidence(msgspec.Struct, frozen=True):
    """How good our knowledge is. renew_why/grant_why: empty when good enough, else what is missing; seen_s: when the
    detector saw what it reported last, from which on a lease counts (None: now)."""

    renew_why: str = ""
    grant_why: str = ""
    just_started: bool = False
    seen_s: float | None = None


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """All that the decision depends on. wanted: GPUs the active profile needs; holding: our processes may be there."""

    gpus: Sequence[GpuLike]
    gpu_map: GpuMap
    occupants: Mapping[str, Occupant]
    free_since_s: Mapping[str, float | None]
    wanted: int
    holding: frozenset[str]
    server_known: bool
    revoked_s: float | None = None  # the last revocation that the vLLM manager has heard of
    server_epoch: int = 0  # of the last lease whose server it has ended
    pending: bool
    lease: Lease | None
    hold: Hold | None
    node_states: tuple[str, ...]
    evidence: Evidence
    epoch: int
    gpus_why: str = ""  # why it is not known which GPUs this node has; "" when it is
    memory_short: str = ""  # in words; "" when memory is no reason
    conflict_s: float = float("-inf")  # when a lease was last given up to somebody else
    kept_s: float = float("-inf")  # when the lease was last found to be in nobody's way
    outlook: Outlook = Outlook()  # reservations and planned jobs that can need our GPUs
    memory_used: Mapping[str, int | None] = {}  # UUID -> bytes, at the driver's last reading


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """lease: what holds from now on (None: none). revocation: set when one ends now. blocked: why there is none."""

    lease: Lease | None
    revocation: Revocation | None = None
    blocked: Reason | None = None
    detail: str = ""
    look_again_s: float | None = None
    granted: bool = False


# Ends of a lease because somebody else has, or may have, one of its GPUs.
CONFLICTS = frozenset({Reason.yielded_to_job, Reason.unknown_job, Reason.gpu_in_use, Reason.gpu_unknown})


def occupy(
    gpu_map: GpuMap, jobs: Sequence[JobView], node_used: frozenset[int], foreign: Mapping[str, Occupant], dirty: Mapping[str, str]
) -> dict[str, Occupant]:
    """Who has each GPU besides us. foreign: UUID -> who is there by the driver's word, or why it has none.
    dirty: UUID -> what of ours is or may still be there."""
    occupants: dict[str, Occupant] = {}
    for uuid, why in dirty.items():
        occupants[uuid] = Occupant(Holder.llmwd, why=why)
    occupants |= foreign
    for uuid in gpu_map.claimed(node_used):
        occupants[uuid] = Occupant(Holder.slurm, why="allocated by Slurm")
    # The surest last: what is known exactly stands, and names the job.
    for view in sorted(jobs, key=lambda view: (view.gpus is not None, not view.covered)):
        sure = view.gpus is not None
        why = "" if sure else view.why or "its GPUs could not be learned"
        for uuid in gpu_map.claimed(view.gpus):
            if sure or uuid not in occupants or occupants[uuid].holder is Holder.llmwd:
                occupants[uuid] = Occupant(Holder.slurm if sure else Holder.unknown, view, why)
    return occupants


def free_since(
    before: Mapping[str, float | None], uuids: Sequence[str], occupants: Mapping[str, Occupant], now_s: float
) -> dict[str, float | None]:
    """Since when each GPU has been nobody else's. First seen free: since ever, so the first start does not wait."""
    since: dict[str, float | None] = {}
    for uuid in uuids:
        occupant = occupants.get(uuid)
        if occupant is not None and occupant.holder is not Holder.llmwd:
            since[uuid] = None
        elif uuid in before:
            since[uuid] = now_s if before[uuid] is None else before[uuid]
        else:
            since[uuid] = float("-inf")
    return since


def decide(now: Situation, now_s: float, lease_ttl_s: float, resume_after_s: float) -> Decision:
    """The lease from now on."""
    if now.lease is not None:
        return _keep(now, now_s, lease_ttl_s)
    return _grant(now, now_s, lease_ttl_s, resume_after_s)


def _keep(now: Situation, now_s: float, lease_ttl_s: float) -> Decision:
    lease = now.lease
    reason, detail, job = _against(now, now_s)
    if job is not None and job.covered and job.resolved_s is not None and job.resolved_s <= now.kept_s:
        # It may have any of the GPUs that the node counts, and was in nobody's way before: this is about another one.
        job, detail = None, "Slurm has allocated more of this node's GPUs"
    if reason is not None:
        revocation = Revocation(
            epoch=lease.epoch, reason=reason, detail=detail, revoked_s=now_s, job=job.id if job else None,
            seen_s=job.seen_s if job else None, resolved_s=job.resolved_s if job else None,
        )
        return Decision(lease=None, revocation=revocation, blocked=reason, detail=detail)
    if why := _unrenewed_why(now):
        return Decision(lease=lease, detail=why, look_again_s=lease.expires_s)
    return Decision(
        lease=msgspec.structs.replace(lease, expires_s=_until(now, now_s, lease_ttl_s)),
        look_again_s=lookahead.leave(now.outlook, now_s).at_s,
    )


def _unrenewed_why(now: Situation) -> str:
    """Why the lease is not renewed though nobody is known to be in its way; empty if it is.

    A resolver killed between telling a revocation and keeping it leaves the lease to the next one, which may know nothing
    yet of what was in its way: the manager knows that it is over, and would begin anew on it if it were renewed. It is
    not ended here: either what was in its way is found again, and named and judged as that, or it expires.
    """
    if now.evidence.renew_why:
        return now.evidence.renew_why
    if not now.server_known:
        return "the vLLM manager has not said yet whether it was revoked"
    if now.revoked_s is not None and now.revoked_s >= now.lease.granted_s:
        return "it had been revoked when the resolver was restarted"
    return ""


def _until(now: Situation, now_s: float, lease_ttl_s: float) -> float:
    """Whoever dies or hangs then, the server is gone this long after the last look that saw no job."""
    seen_s = now.evidence.seen_s
    return (now_s if seen_s is None else min(seen_s, now_s)) + lease_ttl_s


def _against(now: Situation, now_s: float) -> tuple[Reason | None, str, JobView | None]:
    """What ends the lease, if anything does: conflicts first, they are what cannot wait."""
    lease = now.lease
    for uuid in lease.uuids:
        occupant = now.occupants.get(uuid)
        if occupant is not None and occupant.holder is not Holder.llmwd:
            return (*_conflict(now, occupant), occupant.job)
    if now_s >= lease.expires_s:
        return Reason.lease_expired, _unrenewed_why(now) or "the lease was not renewed in time", None
    if now.hold is not None:
        return now.hold.reason, _ordered(now.hold), None
    unwelcome = UNWELCOME & set(now.node_states)
    if unwelcome:
        return Reason.node_draining, f"Slurm says {'+'.join(now.node_states)}", None
    if now.memory_short:
        return Reason.memory_pressure, now.memory_short, None
    coming = lookahead.leave(now.outlook, now_s)
    if coming.why:
        return Reason.expected_job, coming.why, None
    if any(uuid not in now.gpu_map.uuids for uuid in lease.uuids):
        return Reason.gpu_unknown, "a leased GPU is no longer there", None
    if now.server_known and now.wanted == 0 and not now.holding:
        return Reason.not_wanted, "", None
    if now.server_known and now.wanted != len(lease.uuids) and now.wanted > 0:
        return Reason.switching, f"{now.wanted} GPUs are wanted now, {len(lease.uuids)} were", None
    return None, "", None


def name_job(revocation: Revocation, leased: Sequence[str], occupants: Mapping[str, Occupant]) -> Revocation:
    """With the job that it was for, once that is known: slurmctld may say that a GPU is allocated before there is any sign
    of the job itself. Its times stay empty, for what ended the lease came before them."""
    if revocation.reason is not Reason.yielded_to_job or revocation.job is not None:
        return revocation
    for uuid in leased:
        occupant = occupants.get(uuid)
        view = occupant.job if occupant is not None and occupant.holder is Holder.slurm else None
        if view is not None and not view.covered and view.sources != SIMULATED:
            return msgspec.structs.replace(revocation, job=view.id)
    return revocation


def _ordered(hold: Hold) -> str:
    return hold.detail or (f"ordered by {hold.by}" if hold.by else "")


def _conflict(now: Situation, occupant: Occupant) -> tuple[Reason, str]:
    """What this occupant is to us, and all of the node's GPUs that it has."""
    alike = [uuid for uuid, other in now.occupants.items() if _whose(other) == _whose(occupant)]
    gpus = name_gpus(tuple(now.gpu_map.likely[uuid] for uuid in alike if uuid in now.gpu_map.likely))
    if occupant.holder is Holder.other:
        return Reason.gpu_in_use, f"{gpus}: {occupant.why}"
    if occupant.job is None:
        return Reason.yielded_to_job if occupant.holder is Holder.slurm else Reason.gpu_unknown, f"{gpus}: {occupant.why}"
    if occupant.holder is Holder.unknown:
        return Reason.unknown_job, f"job {occupant.job.id}: {occupant.why}"
    return Reason.yielded_to_job, f"job {occupant.job.id} has {gpus}"


def _whose(occupant: Occupant) -> tuple[Holder, str | None, str]:
    return occupant.holder, occupant.job.id if occupant.job else None, occupant.why


def _grant(now: Situation, now_s: float, lease_ttl_s: float, resume_after_s: float) -> Decision:
    if now.hold is not None:
        return Decision(lease=None, blocked=now.hold.reason, detail=_ordered(now.hold))
    if not now.server_known:
        return Decision(lease=None, blocked=Reason.starting, detail="the vLLM manager has not reported yet")
    if now.wanted < 1:
        return Decision(lease=None, blocked=None)
    if now.gpus_why and now.wanted > len(now.gpu_map.uuids):
        return Decision(lease=None, blocked=Reason.gpu_unknown, detail=now.gpus_why)
    if now.wanted > len(now.gpu_map.uuids):
        return Decision(
            lease=None, blocked=Reason.no_gpus,
            detail=f"the profile needs {now.wanted} GPUs, this node has {len(now.gpu_map.uuids)}",
        )
    if UNWELCOME & set(now.node_states):
        return Decision(lease=None, blocked=Reason.node_draining, detail=f"Slurm says {'+'.join(now.node_states)}")
    if now.memory_short:
        return Decision(lease=None, blocked=Reason.memory_pressure, detail=now.memory_short)
    missing = now.evidence.renew_why or now.evidence.grant_why
    free = [gpu for gpu in now.gpus if gpu.uuid not in now.occupants]
    if len(free) < now.wanted:
        return _too_few(now, len(free))
    coming = lookahead.begin(now.outlook, now_s)
    if coming.why:
        return Decision(lease=None, blocked=Reason.expected_job, detail=coming.why, look_again_s=coming.at_s)
    if missing:
        return Decision(
            lease=None, blocked=Reason.starting if now.evidence.just_started else Reason.no_evidence, detail=missing
        )
    if now.pending:
        return Decision(lease=None, blocked=Reason.waiting_for_gpus, detail="a job has arrived and is being asked about")
    rested = [gpu for gpu in free if now_s >= now.free_since_s[gpu.uuid] + resume_after_s]
    resting = _resting(now, now_s, free, rested, resume_after_s)
    if resting is not None:
        return resting
    if now.holding:
        return Decision(lease=None, blocked=Reason.waiting_for_gpus, detail="the last server's processes are not gone yet")
    chosen = choose(rested, now.wanted, now.gpu_map.likely)
    lease = Lease(
        before_bytes=tuple(now.memory_used.get(gpu.uuid) for gpu in chosen),
        # Not one that the manager has given back already, should what we knew of it be lost.
        epoch=max(now.epoch, now.server_epoch) + 1, gpus=tuple(now.gpu_map.likely[gpu.uuid] for gpu in chosen),
        uuids=tuple(gpu.uuid for gpu in chosen), granted_s=now_s, expires_s=_until(now, now_s, lease_ttl_s),
    )
    return Decision(lease=lease, granted=True)


def _resting(
    now: Situation, now_s: float, free: Sequence[GpuLike], rested: Sequence[GpuLike], resume_after_s: float
) -> Decision | None:
    """Why nothing is taken yet although enough is free: a GPU, or the node, is left alone for a while after a job."""
    if len(rested) < now.wanted:
        ages = sorted((now.free_since_s[gpu.uuid] for gpu in free))
        at_s = ages[now.wanted - 1] + resume_after_s
        return Decision(
            lease=None, blocked=Reason.resume_delay, look_again_s=at_s,
            detail=f"{len(free)} GPUs are free; taken after {resume_after_s:g} s",
        )
    calm_s = now.conflict_s + resume_after_s
    if now_s < calm_s:
        # Jobs come in storms: on other GPUs the model would be in the way of the next one.
        return Decision(
            lease=None, blocked=Reason.resume_delay, look_again_s=calm_s,
            detail=f"taken {resume_after_s:g} s after the last conflict",
        )
    return None


def _too_few(now: Situation, free: int) -> Decision:
    """Not enough is free: the reason is the strongest claim on what is missing, the detail tells of the others as well."""
    taken = [occupant for occupant in now.occupants.values() if occupant.holder is not Holder.llmwd]
    if not taken:
        return Decision(lease=None, blocked=Reason.waiting_for_gpus, detail="the last server's processes are not gone yet")
    order = (Holder.slurm, Holder.other, Holder.unknown)
    each = {_whose(occupant): occupant for occupant in taken}.values()
    claims = sorted(each, key=lambda occupant: (order.index(occupant.holder), occupant.job is None))
    told = [f"{free} of {now.wanted} GPUs are free", *(_conflict(now, claim)[1] for claim in claims[:CLAIMS_TOLD])]
    told += [f"{len(claims) - CLAIMS_TOLD} more"] if len(claims) > CLAIMS_TOLD else []
    return Decision(lease=None, blocked=_conflict(now, claims[0])[0], detail="; ".join(told))
