"""The node's status, made from the workers' latest facts. Pure.

A fact that has not been renewed for STALE_AFTER_S is not believed where believing it could hurt somebody: a silent
resolver's GPUs are shown as unknown, an expired lease as none.
"""

from datetime import UTC, datetime
from typing import Any

import msgspec

from llmwd.core.shown import (
    ShownDoor,
    ShownExpected,
    ShownGpu,
    ShownHold,
    ShownJob,
    ShownLease,
    ShownMap,
    ShownModel,
    ShownNeighbour,
    ShownNotices,
    ShownRelease,
    ShownRoot,
    ShownServer,
    ShownTunnel,
    ShownWorker,
    Status,
)
from llmwd.core.wording import spell_gpus
from llmwd.messages import (
    DoorFact,
    Envelope,
    Fact,
    Gpu,
    GpusFact,
    JobsFact,
    NoticesFact,
    RootFact,
    ServerFact,
    SourceState,
    TunnelFact,
    WorkerState,
)
from llmwd.vocab import Holder, NodePhase, Phase, Reason, Worker

STALE_AFTER_S = 15.0


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known; None where a worker has said nothing yet."""

    root: RootFact | None = None
    jobs: JobsFact | None = None
    gpus: GpusFact | None = None
    server: ServerFact | None = None
    door: DoorFact | None = None
    tunnel: TunnelFact | None = None
    notices: NoticesFact | None = None


def gather(envelopes: list[Envelope | None]) -> Facts:
    """Sort the retained facts by their kind; what is missing stays None."""
    names = {
        RootFact: "root", JobsFact: "jobs", GpusFact: "gpus", ServerFact: "server", DoorFact: "door",
        TunnelFact: "tunnel", NoticesFact: "notices",
    }  # fmt: skip
    found: dict[str, Any] = {names[type(envelope.fact)]: envelope.fact for envelope in envelopes if envelope is not None}
    return Facts(**found)


def torn(facts: Facts) -> bool:
    """The vLLM manager answers a fact of the resolver that is newer than the one here."""
    return facts.gpus is not None and facts.server is not None and facts.server.heard_s > facts.gpus.at_s


def iso(at: float | None) -> str | None:
    """Seconds since the epoch as 2026-01-31T12:00:00Z."""
    return None if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def status_of(node: str, running: tuple[int, int] | None, facts: Facts, now_s: float) -> Status:
    """The status at the monotonic time `now_s`.

    `running`: (pid, start ticks) of who holds the supervisor's lock, None if nobody does. Facts of
    another supervisor than that one are a dead one's and count for nothing.
    """
    if running is None:
        return Status(node=node, phase=NodePhase.stopped, reason=Reason.stopped)
    root, server, tunnel = facts.root, facts.server, facts.tunnel
    if root is None or (root.pid, root.start) != running:
        return Status(node=node, phase=NodePhase.waiting, reason=Reason.starting, root=ShownRoot(pid=running[0] or None))
    phase, reason, detail, since_at = _node_phase(root, server, facts.gpus)
    stale = _stale(facts, now_s)
    return Status(
        node=root.node,
        phase=phase,
        reason=reason,
        detail=detail,
        since=iso(since_at),
        model=ShownModel(server.profile, server.model_name, server.served_as) if server else ShownModel(),
        lease=_lease(facts.gpus, now_s),
        gpus=_gpus(facts.gpus, Worker.resolver in stale),
        jobs=_jobs(facts, Worker.resolver in stale),
        server=_server(server),
        neighbour=_neighbour(server),
        next=_next(facts.gpus) if Worker.resolver not in stale else None,
        memory=facts.gpus.memory if facts.gpus and Worker.resolver not in stale else None,
        door=_show_door(facts.door) if facts.door else ShownDoor(),
        tunnel=_show_tunnel(tunnel) if tunnel else ShownTunnel(),
        notices=_show_notices(facts.notices) if facts.notices else ShownNotices(),
        hold=_hold(facts.gpus),
        gpu_map=ShownMap(facts.gpus.map_certain, facts.gpus.map_why) if facts.gpus else ShownMap(),
        release=_release(facts.gpus),
        sources=_sources(facts),
        workers=tuple(
            ShownWorker(each.name, each.pid, each.phase, each.restarts, iso(each.since_at), each.detail)
            for each in root.workers
        ),
        stale=stale,
        root=ShownRoot(root.pid, iso(root.started_at), root.version),
    )


def _show_door(fact: DoorFact) -> ShownDoor:
    return ShownDoor(fact.phase, fact.detail, iso(fact.since_at), fact.socket, fact.port, fact.keys, fact.reachable, fact.code)


def _show_tunnel(fact: TunnelFact) -> ShownTunnel:
    return ShownTunnel(
        fact.phase, fact.detail, fact.hostname, fact.mode, iso(fact.since_at), fact.connections, fact.locations, fact.name
    )


def _show_notices(fact: NoticesFact) -> ShownNotices:
    return ShownNotices(
        fact.phase, fact.detail, fact.waiting, fact.sent, fact.failed, fact.lost, iso(fact.last_sent_at), fact.kept,
        iso(fact.deadman_at), fact.deadman,
    )  # fmt: skip


def _node_phase(
    root: RootFact, server: ServerFact | None, gpus: GpusFact | None
) -> tuple[NodePhase, Reason, str, float | None]:
    """The vLLM manager speaks for the node, except where it cannot know or cannot speak any more."""
    if root.stopping:
        return NodePhase.stopped, Reason.stopping, "", None
    failed = {each.name: each for each in root.workers if each.phase == Phase.failed}
    # A quarantined detector or resolver does not stop a yield, which comes with the end of the lease;
    # after it the node would show "no evidence" for ever, which hides what the operator has to do.
    blind = server is None or server.node_phase == NodePhase.waiting
    for name in (Worker.vllm, *((Worker.resolver, Worker.detector) if blind else ())):
        if name in failed:
            return NodePhase.failed, Reason.worker_failed, _joined(name, failed[name]), failed[name].since_at
    if server is None:
        return NodePhase.waiting, Reason.starting, "", root.started_at
    lost = gpus.revocation if gpus is not None and gpus.lease is None else None
    if lost is not None and lost.epoch == server.lease_epoch and server.node_phase in (NodePhase.serving, NodePhase.loading):
        return NodePhase.yielding, lost.reason, lost.detail, None  # the manager's own fact is on its way
    if server.node_phase is NodePhase.held and gpus is not None and gpus.hold is None and gpus.at_s > server.heard_s:
        return NodePhase.waiting, gpus.blocked or Reason.starting, gpus.detail, None  # the same after a resume
    detail = server.detail
    if not detail and gpus is not None and gpus.blocked == server.reason:
        detail = gpus.detail
    return server.node_phase, server.reason, detail, server.since_at


def _joined(name: str, worker: WorkerState) -> str:
    return f"{name}: {worker.detail}" if worker.detail else f"{name} is in quarantine"


def _stale(facts: Facts, now_s: float) -> tuple[str, ...]:
    told: dict[str, Fact | None] = {
        "root": facts.root,
        Worker.detector: facts.jobs,
        Worker.resolver: facts.gpus,
        Worker.vllm: facts.server,
        Worker.door: facts.door,
        Worker.tunnel: facts.tunnel,
        Worker.notifier: facts.notices,
    }
    return tuple(str(name) for name, fact in told.items() if fact is not None and now_s - fact.at_s > STALE_AFTER_S)


def _lease(fact: GpusFact | None, now_s: float) -> ShownLease | None:
    if fact is None or fact.lease is None or fact.lease.expires_s <= now_s:
        return None
    return ShownLease(fact.lease.epoch, fact.lease.gpus)


def _gpus(fact: GpusFact | None, stale: bool) -> tuple[ShownGpu, ...]:
    if fact is None:
        return ()

    def shown(gpu: Gpu) -> ShownGpu:
        if stale:
            return ShownGpu(gpu.index, gpu.minor, gpu.uuid, Holder.unknown, None, "the resolver is silent")
        return ShownGpu(gpu.index, gpu.minor, gpu.uuid, gpu.holder, gpu.job, gpu.why)

    return tuple(shown(gpu) for gpu in fact.gpus)


def _jobs(facts: Facts, stale: bool) -> tuple[ShownJob, ...]:
    """The resolver's claims: it merges what the sources call one job by different names."""
    if facts.gpus is not None and not stale:
        return tuple(ShownJob(claim.id, claim.gpus) for claim in facts.gpus.claims)
    seen = facts.jobs.jobs if facts.jobs else ()
    return tuple(ShownJob(job.id, job.gpus) for job in seen if not job.empty)


def _server(fact: ServerFact | None) -> ShownServer:
    if fact is None:
        return ShownServer()
    return ShownServer(fact.pid, fact.phase, fact.url, iso(fact.ready_at), fact.bin, fact.deaths)


def _neighbour(fact: ServerFact | None) -> ShownNeighbour | None:
    if fact is None or fact.courtesy is None:
        return None
    found = fact.courtesy
    return ShownNeighbour(found.nice, found.oom_score_adj, found.io_priority, spell_gpus(found.cpus), fact.courtesy_detail)


def _next(fact: GpusFact | None) -> ShownExpected | None:
    if fact is None or fact.expected is None:
        return None
    return ShownExpected(fact.expected.who, iso(fact.expected.start_at), fact.expected.gpus)


def _hold(fact: GpusFact | None) -> ShownHold | None:
    if fact is None or fact.hold is None:
        return None
    hold = fact.hold
    return ShownHold(iso(hold.since_at), iso(hold.until_at), hold.by, hold.reason, hold.detail)


def _release(fact: GpusFact | None) -> ShownRelease | None:
    proof = fact.proof if fact is not None else None
    if proof is None:
        return None
    took_s = None if proof.proved_s is None else round(proof.proved_s - proof.begun_s, 4)
    return ShownRelease(proof.epoch, proof.gpus, proof.reason, proof.proved_s is not None, took_s, proof.left)


def _sources(facts: Facts) -> tuple[SourceState, ...]:
    """Detector's and resolver's sources; one that both know works only if it works for both."""
    merged: dict[str, SourceState] = {}
    for fact in (facts.jobs, facts.gpus):
        for source in fact.sources if fact else ():
            known = merged.get(source.name)
            if known is None or known.works:
                merged[source.name] = source
    return tuple(merged.values())
