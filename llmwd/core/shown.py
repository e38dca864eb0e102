"""The object that `llmwd-ctl status --json` prints: scripts and dashboards read it, so fields are only ever added.

Times in it are ISO 8601 in UTC. It is made in core/nodestatus.py.
"""

import msgspec

from llmwd.messages import MemoryPressure, SourceState
from llmwd.vocab import Holder, NodePhase, Phase, Reason


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
    name: str = ""


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
