"""What `llmwd-ctl status` shows, from the workers' latest facts. One file: the types and rows are one contract.

The object is a contract: scripts and dashboards read it, so fields are only ever added. Times in it are
ISO 8601 in UTC. A fact that has not been renewed for STALE_AFTER_S is not believed where believing it
could hurt somebody: a silent resolver's GPUs are shown as unknown, an expired lease as none.
"""

import textwrap
from datetime import UTC, datetime

import msgspec

from llmwd.messages import (
    DoorFact,
    Envelope,
    Gpu,
    GpusFact,
    JobsFact,
    MemoryPressure,
    NoticesFact,
    RootFact,
    ServerFact,
    SourceState,
    TunnelFact,
    WorkerState,
)
from llmwd.vocab import Holder, NodePhase, Phase, Reason, Worker

STALE_AFTER_S = 15.0
WHY_COLUMNS = 67  # of 80: the rest is the margin and the label


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
    return Facts(**{names[type(envelope.fact)]: envelope.fact for envelope in envelopes if envelope is not None})


class ShownModel(msgspec.Struct, frozen=True):
    profile: str | None = None
    name: str | None = None
    served_as: str | None = None


class ShownLease(msgspec.Struct, frozen=True):
    epoch: int
    gpus: tuple[int, ...]


class ShownGpu(msgspec.Struct, frozen=True):
    index: int
    minor: int | None
    uuid: str
    holder: Holder
    job: str | None
    why: str = ""


class ShownJob(msgspec.Struct, frozen=True):
    """gpus None: not known, counts as all."""

    id: str
    gpus: tuple[int, ...] | None


class ShownServer(msgspec.Struct, frozen=True):
    """No argv here: it may hold an API key."""

    pid: int | None = None
    phase: Phase = Phase.stopped
    url: str | None = None
    ready_since: str | None = None
    bin: str | None = None
    deaths: int = 0


class ShownNeighbour(msgspec.Struct, frozen=True):
    """How the server stands back behind others, by the kernel's word. cpus: such as "0-15,32-47"."""

    nice: int
    oom_score_adj: int
    io_priority: int | None
    cpus: str
    detail: str = ""


class ShownExpected(msgspec.Struct, frozen=True):
    """The next reservation or planned job that can need our GPUs. gpus None: the whole node, or not known."""

    who: str
    start: str | None
    gpus: int | None


class ShownDoor(msgspec.Struct, frozen=True):
    """reachable: requests reach the model; else code says why not. port: on 127.0.0.1."""

    phase: Phase = Phase.stopped
    detail: str = ""
    since: str | None = None
    socket: str | None = None
    port: int | None = None
    keys: int = 0
    reachable: bool = False
    code: str = ""


class ShownTunnel(msgspec.Struct, frozen=True):
    phase: Phase = Phase.stopped
    detail: str = ""
    hostname: str | None = None
    mode: str = ""
    since: str | None = None
    connections: int = 0
    locations: tuple[str, ...] = ()


class ShownNotices(msgspec.Struct, frozen=True):
    """waiting: in the outbox; kept: why that is not on disk; deadman: when the server tells that we are dead, unless renewed."""

    phase: Phase = Phase.stopped
    detail: str = ""
    waiting: int = 0
    sent: int = 0
    failed: int = 0
    lost: int = 0
    last_sent: str | None = None
    kept: str = ""
    deadman: str | None = None
    deadman_detail: str = ""


class ShownHold(msgspec.Struct, frozen=True):
    since: str | None
    until: str | None
    by: str
    reason: Reason = Reason.held
    detail: str = ""


class ShownMap(msgspec.Struct, frozen=True):
    """Whether each of Slurm's GPU indices is known to be one GPU."""

    certain: bool = True
    why: str = ""


class ShownRelease(msgspec.Struct, frozen=True):
    """The last time GPUs were given back. proved: the driver shows nothing of us; left: what it shows, or why it cannot."""

    epoch: int
    gpus: tuple[int, ...]
    reason: Reason
    proved: bool
    took_s: float | None
    left: str


class ShownWorker(msgspec.Struct, frozen=True):
    name: str
    pid: int | None
    phase: Phase
    restarts: int
    since: str | None = None
    detail: str = ""


class ShownRoot(msgspec.Struct, frozen=True):
    pid: int | None = None
    started: str | None = None
    version: str | None = None


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The object of `llmwd-ctl status --json`. `stale`: workers that have been silent for too long."""

    node: str
    phase: NodePhase
    reason: Reason
    detail: str = ""
    since: str | None = None
    model: ShownModel = ShownModel()
    lease: ShownLease | None = None
    gpus: tuple[ShownGpu, ...] = ()
    jobs: tuple[ShownJob, ...] = ()
    server: ShownServer = ShownServer()
    neighbour: ShownNeighbour | None = None
    memory: MemoryPressure | None = None
    next: ShownExpected | None = None
    door: ShownDoor = ShownDoor()
    tunnel: ShownTunnel = ShownTunnel()
    notices: ShownNotices = ShownNotices()
    hold: ShownHold | None = None
    gpu_map: ShownMap = ShownMap()
    release: ShownRelease | None = None
    sources: tuple[SourceState, ...] = ()
    workers: tuple[ShownWorker, ...] = ()
    stale: tuple[str, ...] = ()
    root: ShownRoot = ShownRoot()


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
        fact.phase, fact.detail, fact.hostname, fact.mode, iso(fact.since_at), fact.connections, fact.locations
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
    detail = server.detail
    if not detail and gpus is not None and gpus.blocked == server.reason:
        detail = gpus.detail
    return server.node_phase, server.reason, detail, server.since_at


def _joined(name: str, worker: WorkerState) -> str:
    return f"{name}: {worker.detail}" if worker.detail else f"{name} is in quarantine"


def _stale(facts: Facts, now_s: float) -> tuple[str, ...]:
    told = {
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


# --- words for people ---------------------------------------------------------------------------------


def spell_duration(seconds: float) -> str:
    """The two biggest units: 4 s, 3m 12s, 2h 5m, 3d 4h."""
    left = max(0, int(seconds))
    if left < 60:
        return f"{left} s"
    parts = []
    for name, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or parts:
            parts.append((count, name))
    return " ".join(f"{count}{name}" for count, name in parts[:2] if count)


def spell_gpus(gpus: tuple[int, ...] | None) -> str:
    """GPU indices as Slurm writes them: (0, 1, 2, 5) is 0-2,5."""
    if gpus is None:
        return "unknown"
    runs: list[list[int]] = []
    for index in sorted(gpus):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or "none"


def name_gpus(gpus: tuple[int, ...]) -> str:
    """`no GPU`, `GPU 3` or `GPUs 0-2,5`."""
    return f"GPU{'s' if len(gpus) > 1 else ''} {spell_gpus(gpus)}" if gpus else "no GPU"


def age_s(since: str | None, now_at: float) -> float | None:
    """Seconds from an ISO time of the status to the wall time `now_at`."""
    return None if since is None else now_at - datetime.fromisoformat(since).timestamp()


def briefed(status: Status) -> Status:
    """For a screen: each source's reason in one line, cut at a word. Programs and the logs get the whole of it."""
    return msgspec.structs.replace(status, sources=tuple(_briefed(source) for source in status.sources))


def _briefed(source: SourceState) -> SourceState:
    width = WHY_COLUMNS - len(f"{source.name}: ")
    return msgspec.structs.replace(source, why=textwrap.shorten(source.why, width, placeholder=" …"))


def summary_rows(status: Status, now_at: float) -> list[tuple[str, str]]:
    """(label, text) of everything that fits on a line; rows with nothing to say are left out."""
    server, hold, tunnel = status.server, status.hold, status.tunnel
    rows = []
    if hold is not None:
        until = f"until {hold.until}" if hold.until else "until `llmwd-ctl resume`"
        told = hold.detail or (f"asked for by {hold.by}" if hold.by else "")
        rows.append(("held", f"{until}, {told}" if told else until))
    if status.model.profile:
        name = status.model.name if status.model.name != status.model.profile else None
        rows.append(("model", " · ".join(part for part in (status.model.profile, name) if part)))
    if status.lease is not None:
        rows.append(("lease", f"{name_gpus(status.lease.gpus)} · epoch {status.lease.epoch}"))
    if status.release is not None and not status.release.proved and status.release.left:
        rows.append(("release", f"of {name_gpus(status.release.gpus)} is not complete: {status.release.left}"))
    if not status.gpu_map.certain and status.gpus:
        rows.append(("GPU map", status.gpu_map.why))
    if server.pid is not None:
        ready = age_s(server.ready_since, now_at)
        told = f"ready for {spell_duration(ready)}" if ready is not None else str(server.phase)
        url = server.url if server.phase == Phase.ready else None
        rows.append(("server", " · ".join(part for part in (url, f"pid {server.pid}", told) if part)))
    if status.neighbour is not None:
        rows.append(("neighbour", _spell_neighbour(status.neighbour)))
    if status.memory is not None:
        rows.append(("memory", _spell_memory(status.memory)))
    if status.next is not None:
        rows.append(("next", _spell_next(status.next, now_at)))
    if status.jobs:
        rows.append(("jobs", "; ".join(_spell_job(job) for job in status.jobs)))
    elif status.gpus:
        rows.append(("jobs", "none"))
    if status.door.phase != Phase.stopped:
        rows.append(("door", _spell_door(status.door)))
    elif status.workers:
        rows.append(("door", status.door.detail or "off"))
    if tunnel.phase != Phase.stopped:
        place = f"https://{tunnel.hostname}" if tunnel.hostname else None
        rows.append(("tunnel", " · ".join(part for part in (_spell_tunnel(tunnel, now_at), place, tunnel.detail) if part)))
    elif status.workers:
        rows.append(("tunnel", tunnel.detail or "off"))
    if status.notices.phase != Phase.stopped:
        rows.append(("notices", _spell_notices(status.notices, now_at)))
    return rows


def _spell_notices(found: ShownNotices, now_at: float) -> str:
    """`none waits · last sent 3m ago · dead man's notice in 28m`, `ALARM: … · 3 wait`."""
    parts = [f"ALARM: {found.detail}" if found.phase == Phase.failed else "", f"{found.waiting or 'none'} wait{'' if found.waiting > 1 else 's'}"]
    age, fires = age_s(found.last_sent, now_at), age_s(found.deadman, now_at)
    parts.append(f"last sent {spell_duration(age)} ago" if age is not None else "")
    parts.append(f"{found.lost} never told" if found.lost else "")
    parts.append(found.detail if found.phase != Phase.failed else "")
    parts.append(f"in memory only ({found.kept})" if found.kept else "")
    parts.append(f"dead man's notice in {spell_duration(-fires)}" if fires is not None else "")
    parts.append(f"dead man's notice: {found.deadman_detail}" if found.deadman_detail else "")
    return " · ".join(part for part in parts if part)


def _spell_door(door: ShownDoor) -> str:
    """`open · 2 keys · 127.0.0.1:8080`, `says yielded_to_job · …`, `failed · why`."""
    if door.phase != Phase.ready:
        return " · ".join(part for part in (str(door.phase), door.detail) if part)
    keys = f"{door.keys} key{'s' if door.keys != 1 else ''}" if door.keys else "no key: llmwd-ctl key add NAME"
    place = f"127.0.0.1:{door.port}" if door.port else ""
    return " · ".join(part for part in ("open" if door.reachable else f"says {door.code}", keys, place, door.detail) if part)


def _spell_tunnel(tunnel: ShownTunnel, now_at: float) -> str:
    """`ready for 3m (named, 4 connections: ams01, fra03)`."""
    age = age_s(tunnel.since, now_at)
    count = f"{tunnel.connections} connection{'s' if tunnel.connections != 1 else ''}" if tunnel.connections else ""
    places = f"{count}: {', '.join(tunnel.locations)}" if tunnel.locations else count
    more = ", ".join(part for part in (tunnel.mode, places) if part)
    told = f"{tunnel.phase} for {spell_duration(age)}" if age is not None else str(tunnel.phase)
    return f"{told} ({more})" if more else told


def _spell_neighbour(found: ShownNeighbour) -> str:
    level = "as inherited" if found.io_priority is None else f"best-effort {found.io_priority}"
    cpus = f"CPUs {found.cpus}" + (f" ({found.detail})" if found.detail else "")
    return " · ".join((f"nice {found.nice}", f"oom_score_adj {found.oom_score_adj}", f"I/O {level}", cpus))


def _spell_memory(memory: MemoryPressure) -> str:
    if memory.some_percent is None:
        return f"pressure not watched: {memory.why}"
    limit = f"yields at {memory.limit_percent:g} % beside others" if memory.limit_percent else "not watched (MEMORY_PRESSURE=0)"
    return f"pressure {memory.some_percent:g} % · {limit}" + (" · short" if memory.short else "")


def _spell_next(coming: ShownExpected, now_at: float) -> str:
    needs = "the whole node" if coming.gpus is None else f"{coming.gpus} GPU{'' if coming.gpus == 1 else 's'}"
    age = age_s(coming.start, now_at)
    if age is None:
        return f"{coming.who} at a time that was not understood ({needs})"
    when = f"in {spell_duration(-age)}" if age < 0 else "begun"
    return f"{coming.who} at {coming.start}, {when} ({needs})"


def _spell_job(job: ShownJob) -> str:
    if job.gpus is None:
        return f"{job.id} on GPUs nobody could tell"
    return f"{job.id} on {name_gpus(job.gpus)}" if job.gpus else f"{job.id} without GPUs"
