"""What the vLLM manager wants and what it shows, from what it knows: no process, no clock."""

import msgspec

from llmwd.messages import GpusFact, Lease
from llmwd.vocab import NodePhase, Phase, Reason


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """All that counts. tree_gpus: GPUs the living tree was started on (None: there is none); recipe: what it was
    started with, against `wanted_recipe` of the active profile (None: no valid profile). revoked_s: of the last
    revocation that was heard of, by whichever incarnation."""

    gpus: GpusFact | None
    phase: Phase
    alive: bool
    tree_gpus: tuple[int, ...] | None
    recipe: str | None
    wanted_recipe: str | None
    profile_gpus: int
    config_detail: str
    failure_detail: str
    releasing_reason: Reason | None
    stopping: bool
    revoked_s: float | None = None
    lease_ttl_s: float = 0.0


class Plan(msgspec.Struct, frozen=True):
    """run: the lease to be served on (None: nothing is to run). end: why a living tree has to go, if it has to."""

    run: Lease | None
    end: Reason | None
    wanted_gpus: int


def plan(now: Serving, now_s: float) -> Plan:
    """Compare what may run with what runs."""
    lease = now.gpus.lease if now.gpus is not None else None
    if lease is not None and (lease.expires_s <= now_s or _came_back(lease, now)):
        lease = None
    startable = now.wanted_recipe is not None and not now.stopping and now.phase is not Phase.failed
    # A profile that became invalid takes nothing down: what runs keeps running, and keeps its lease.
    keeps = now.alive and not now.stopping and now.wanted_recipe is None and now.tree_gpus is not None
    wanted = now.profile_gpus if startable else len(now.tree_gpus) if keeps else 0
    end = _end(now, lease) if now.alive else None
    run = lease if startable and lease is not None and len(lease.gpus) == wanted and (now.alive or _fresh(lease, now, now_s)) else None
    return Plan(run=run, end=end, wanted_gpus=wanted)


def _fresh(lease: Lease, now: Serving, now_s: float) -> bool:
    """Whether to start on it. A resolver that lives renews it before only a quarter is left: such a one is what a manager
    knows who was stopped, may be revoked in a word that waits to be read, and could end before the program's holder is there."""
    return lease.expires_s - now_s > now.lease_ttl_s / 4


def _came_back(lease: Lease, now: Serving) -> bool:
    """Whether it was revoked, and is only there again: a resolver killed between telling that and keeping it takes over
    what it kept before. It counts once it has been renewed on what was seen after the revocation."""
    return now.revoked_s is not None and max(lease.granted_s, lease.expires_s - now.lease_ttl_s) <= now.revoked_s


def _end(now: Serving, lease: Lease | None) -> Reason | None:
    if now.stopping:
        return Reason.stopping
    if now.gpus is None:
        return None  # a manager just restarted has not heard of the lease yet; the dead-man's switch runs
    if lease is None:
        # A lease that nobody revoked has expired: the revocation shown is then of an earlier one.
        revocation = now.gpus.revocation if now.gpus.lease is None else None
        return revocation.reason if revocation is not None else Reason.lease_expired
    if now.tree_gpus is None or not set(now.tree_gpus) <= set(lease.gpus):
        return Reason.lease_expired
    if now.wanted_recipe is not None and now.recipe != now.wanted_recipe:
        return Reason.switching
    return None


def shown(now: Serving) -> tuple[NodePhase, Reason, str]:
    """The node's phase, why, and a sentence more."""
    if now.alive and now.releasing_reason is not None:
        return NodePhase.yielding, now.releasing_reason, _revoked(now)
    if now.alive and now.phase is Phase.ready:
        return NodePhase.serving, Reason.ready, now.config_detail
    if now.alive:
        return NodePhase.loading, Reason.loading, now.config_detail
    if now.stopping:
        return NodePhase.stopped, Reason.stopping, ""
    if now.gpus is not None and now.gpus.hold is not None:
        return NodePhase.held, now.gpus.hold.reason, now.gpus.hold.detail or now.gpus.detail
    if now.wanted_recipe is None:
        return NodePhase.failed, Reason.config_error, now.config_detail
    if now.phase is Phase.failed:
        return NodePhase.failed, Reason.server_failed, now.failure_detail
    if now.phase is Phase.backoff:
        return NodePhase.waiting, Reason.server_backoff, now.failure_detail
    if now.gpus is None:
        return NodePhase.waiting, Reason.starting, ""
    blocked = now.gpus.blocked or Reason.starting
    if blocked is Reason.no_gpus:
        return NodePhase.failed, blocked, now.gpus.detail
    return NodePhase.waiting, blocked, now.gpus.detail


def _revoked(now: Serving) -> str:
    revocation = now.gpus.revocation if now.gpus is not None else None
    return revocation.detail if revocation is not None and revocation.reason is now.releasing_reason else ""
