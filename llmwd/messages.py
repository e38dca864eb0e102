"""Every message between llmwd's processes, in one file on purpose: one tagged union for each channel.

*_s fields are seconds of CLOCK_MONOTONIC, which all processes of the node share; `*_at` fields are wall
time (seconds since the epoch), only for showing. GPU indices are Slurm's (the IDX of GRES) unless said.
"""

from typing import Annotated

import msgspec

from llmwd.vocab import Holder, NodePhase, Phase, Reason


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of everything that crosses a process."""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what messages are made of."""


# --- facts on the bus: whole snapshots, repeated on change and on a slow beat -----------------------


class SourceState(Part, kw_only=True):
    """One source of detection: whether it works here, and if not, why."""

    name: str
    works: bool
    why: str = ""


class JobSeen(Part, kw_only=True):
    """A Slurm job that at least one source sees on this node."""

    id: str  # Slurm's job id, or a SLUID where that is all the cgroup folder tells
    sources: tuple[str, ...]
    seen_s: float  # when the first sign of it arrived
    lags_s: tuple[float, ...] = ()  # for each of `sources` (or only the first ones): how long after the first sign it saw the job, too
    gpus: tuple[int, ...] | None = None  # told by the source itself (sim); None: has to be asked for
    empty: bool = False  # only a job folder without processes and without a socket, for some time


class JobCpus(Part, kw_only=True):
    """What the processes of a job may run on: different lists such as "0-3,8", as the kernel writes them."""

    id: str
    lists: tuple[str, ...]


class JobsFact(Message, tag="jobs", kw_only=True):
    """From the detector: which jobs are on this node."""

    jobs: tuple[JobSeen, ...]
    sources: tuple[SourceState, ...]
    scanned: bool  # every working source has been read whole at least once
    cpus: tuple[JobCpus, ...] = ()  # at the last look at processes
    at_s: float


class Gpu(Part, kw_only=True):
    """One GPU of the node and who has it."""

    index: int
    uuid: str
    minor: int | None = None
    numa: int | None = None  # its NUMA node
    holder: Holder = Holder.unknown
    job: str | None = None
    why: str = ""
    free_since_s: float | None = None


class Lease(Part, kw_only=True):
    """Our time-limited permission to use GPUs; ends by itself at `expires_s`."""

    epoch: int
    gpus: tuple[int, ...]
    uuids: tuple[str, ...]
    granted_s: float
    expires_s: float
    before_bytes: tuple[int | None, ...] = ()  # memory in use on each GPU before ours; None: not told


class Revocation(Part, kw_only=True):
    """Why and when the lease `epoch` ended. `seen_s` <= `resolved_s` <= `revoked_s`."""

    epoch: int
    reason: Reason
    detail: str
    revoked_s: float
    job: str | None = None
    seen_s: float | None = None
    resolved_s: float | None = None


class JobClaim(Part, kw_only=True):
    """What a job has. gpus None: not known (yet, or at all): counts as all."""

    id: str
    gpus: tuple[int, ...] | None
    sources: tuple[str, ...] = ()
    leaving: bool = False  # no longer seen here, but not confirmed to be over
    user: str = ""  # whose it is, where Slurm tells
    ends_at: float | None = None  # when its time limit ends, as Slurm told when it was asked


class Expected(Part, kw_only=True):
    """A reservation or a planned job that will use this node. gpus None: the whole node, or not known."""

    who: str  # "reservation maint", "job 12"
    start_at: float | None  # None: not understood
    start_s: float | None
    over_s: float | None  # it counts no longer from then on; None: until Slurm says so
    gpus: int | None
    job: str | None = None


class Plans(Part, kw_only=True):
    """What Slurm said last of one kind of plans, kept for our next incarnation."""

    kind: str
    asked_s: float  # -inf: never, or too long ago to count as an answer
    expected: tuple[Expected, ...] = ()


class Hold(Part, kw_only=True):
    """An order to stay away, the operator's or (`reason` says why) our own. until_at None: until `resume`."""

    since_at: float
    until_at: float | None = None
    by: str = ""
    reason: Reason = Reason.held
    detail: str = ""


class ReleaseProof(Part, kw_only=True):
    """How the end of the lease `epoch` stands: begun, the tree gone (`gone_s`), and proved (`proved_s`), which is
    when the driver lists no process of ours on these GPUs and their memory is back at `before_bytes`; where there
    is no driver, when the tree is gone. Until then the GPUs are not free."""

    epoch: int
    gpus: tuple[int, ...]
    uuids: tuple[str, ...]
    before_bytes: tuple[int | None, ...] = ()
    reason: Reason
    job: str | None = None
    begun_s: float  # the first sign of what ended it, or the revocation
    gone_s: float | None = None
    proved_s: float | None = None
    left: str = ""  # what is still there, or why that cannot be told
    judged: bool = False  # it broke the budget, and that has been dealt with


class MemoryPressure(Part, kw_only=True):
    """How much the node waits for memory: percent of the last ten seconds, by the kernel; None: not told, see why."""

    some_percent: float | None
    full_percent: float | None
    limit_percent: float  # 0: not watched
    short: bool  # so much that we stay away
    why: str = ""


class GpusFact(Message, tag="gpus", kw_only=True):
    """From the resolver: who has which GPU, and the lease."""

    gpus: tuple[Gpu, ...]
    lease: Lease | None
    revocation: Revocation | None
    claims: tuple[JobClaim, ...]
    sources: tuple[SourceState, ...]
    hold: Hold | None
    blocked: Reason | None  # why no lease is granted, None while one is
    detail: str
    node_states: tuple[str, ...]
    memory: MemoryPressure | None = None
    expected: Expected | None = None  # the next one that can need our GPUs; only with LOOKAHEAD
    plans: tuple[Plans, ...] = ()  # all that is known of what comes, whether it concerns us or not
    epoch: int  # of the last lease ever granted
    proof: ReleaseProof | None = None  # of the last lease that ended
    map_certain: bool = True  # whether each of Slurm's indices is known to be one GPU
    map_why: str = ""
    map_by_index: dict[int, tuple[str, ...]] = {}  # Slurm's index -> UUIDs of the GPUs that it can mean
    at_s: float


class Courtesy(Part, kw_only=True):
    """How a service stands back behind others, as wished or as found. Never less than what was inherited is set."""

    nice: int = 0
    oom_score_adj: int = 0
    io_priority: int | None = None  # best-effort level, 7 comes last; None: none was set
    cpus: tuple[int, ...] = ()  # (): as inherited


class Released(Part, kw_only=True):
    """The last end of a server that was on a lease's GPUs. Times as in HolderState."""

    epoch: int
    gone_s: float


class ServerFact(Message, tag="server", kw_only=True):
    """From the vLLM manager: what is wanted, what runs, what the node does as a whole."""

    profile: str | None
    model_name: str | None
    served_as: str | None
    wanted_gpus: int  # 0: nothing is to run (no valid profile, failed, stopping)
    phase: Phase
    node_phase: NodePhase
    reason: Reason
    detail: str
    since_at: float
    holding: tuple[int, ...]  # GPUs that processes of ours may be on
    lease_epoch: int | None = None
    pid: int | None = None  # the `vllm serve` process
    holder_pid: int | None = None
    url: str | None = None
    bin: str | None = None
    ready_at: float | None = None
    started_at: float | None = None
    load_s: float | None = None  # how long the active profile loads, as measured; None: never measured
    deaths: int = 0  # times it ended by itself since this supervisor began
    courtesy: Courtesy | None = None  # as the kernel tells it of the server
    courtesy_detail: str = ""  # how its CPUs were chosen
    released: Released | None = None
    heard_s: float = 0.0  # `at_s` of the GpusFact that this is the answer to
    revoked_s: float | None = None  # of the last revocation that it has heard of
    at_s: float


class DoorFact(Message, tag="door", kw_only=True):
    """From the front door's worker. phase stopped with detail "off": DOOR is off."""

    phase: Phase
    detail: str
    socket: str | None = None  # the unix socket that it answers on, None: on none
    port: int | None = None  # the same on 127.0.0.1
    keys: int = 0  # that open it at present
    reachable: bool = False  # requests reach the model
    code: str = ""  # why not, the word that people get
    pid: int | None = None
    since_at: float
    at_s: float


class TunnelFact(Message, tag="tunnel", kw_only=True):
    """From the tunnel manager. phase stopped with detail "off": not configured. hostname: a quick tunnel's once it is
    known. name: TUNNEL_NAME. connections: the living ones, to the locations (`ams01`) of Cloudflare's."""

    phase: Phase
    detail: str
    hostname: str | None = None
    pid: int | None = None
    since_at: float
    at_s: float
    mode: str = ""
    connections: int = 0
    locations: tuple[str, ...] = ()
    name: str = ""


class NoticesFact(Message, tag="notices", kw_only=True):
    """From the notifier. detail: off, or what hinders sending; failed: given up; lost: too old, or too many."""

    phase: Phase
    detail: str
    sent: int = 0
    failed: int = 0
    waiting: int = 0
    at_s: float
    lost: int = 0
    last_sent_at: float | None = None
    kept: str = ""  # why the outbox is not on disk, "" while it is
    deadman_at: float | None = None  # when the server tells that we are dead, unless it is renewed
    deadman: str = ""  # why there is none though it is wanted


class WorkerState(Part, kw_only=True):
    """One child of the root."""

    name: str
    pid: int | None
    phase: Phase
    restarts: int
    since_at: float
    detail: str = ""


class RootFact(Message, tag="root", kw_only=True):
    """From the root, as a retained file only: it has no place on the bus."""

    pid: int
    start: int  # start time of the root in clock ticks since boot: names the process beyond its pid
    stopping: bool
    workers: tuple[WorkerState, ...]
    started_at: float
    node: str
    home: str
    version: str
    at_s: float


Fact = JobsFact | GpusFact | ServerFact | DoorFact | TunnelFact | NoticesFact | RootFact


class Envelope(Part, kw_only=True):
    """What a bus packet holds besides its topic. A gap in `seq` or a new `epoch` is seen by the reader."""

    sender: str
    pid: int
    epoch: int
    seq: int
    fact: Fact


# --- orders on the desk: asked by llmwd-ctl, answered by the one worker that can ---------------------
#
# They come from outside, so each field has bounds that the decoder keeps, before any worker meets it: a time that is
# no number has ended a worker's loop. (NaN is above no least value.)

LONGEST_S = 10 * 365 * 86400.0
GPUS_MOST = 1024
Seconds = Annotated[float, msgspec.Meta(ge=0, le=LONGEST_S)]
Name = Annotated[str, msgspec.Meta(max_length=256, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
JobId = Annotated[str, msgspec.Meta(pattern=r"\A[0-9]{1,18}\Z")]
GpuIndex = Annotated[int, msgspec.Meta(ge=0, lt=GPUS_MOST)]


class YieldOrder(Message, tag="yield", kw_only=True):
    """To the resolver: give all GPUs back and stay away (for_s None: until `resume`)."""

    for_s: Seconds | None
    by: Name


class ResumeOrder(Message, tag="resume", kw_only=True):
    """To the resolver: the hold is over."""

    by: Name


class SwitchOrder(Message, tag="switch", kw_only=True):
    """To the vLLM manager: serve this profile from now on."""

    profile: Name
    by: Name


class ResetOrder(Message, tag="reset", kw_only=True):
    """To the vLLM manager, the tunnel manager, the front door or the notifier: forget the failures and try again."""

    by: Name


class NotifyOrder(Message, tag="notify", kw_only=True):
    """To the notifier: a notice to try it. Done when all were told, or wait; Refused when one refuses."""

    message: Text
    by: Name


class ReleaseOrder(Message, tag="release_gpus", kw_only=True):
    """To the resolver, from the node's prolog: this job has these GPUs. Done when nothing of ours is there any more."""

    job: JobId
    gpus: Annotated[tuple[GpuIndex, ...], msgspec.Meta(max_length=GPUS_MOST)]
    within_s: Seconds  # after that: Refused, `timed_out`
    by: Name


Order = YieldOrder | ResumeOrder | SwitchOrder | ResetOrder | NotifyOrder | ReleaseOrder


class Done(Message, tag="done", kw_only=True):
    """The order is carried out, or on its way where that takes time."""

    detail: str


class Refused(Message, tag="refused", kw_only=True):
    """The order is not carried out. `problems`: one sentence each."""

    problems: tuple[str, ...]
    timed_out: bool = False  # it was begun, and is not done within the time that the order gives


Reply = Done | Refused


# --- the line between root and worker -----------------------------------------------------------------


class Hello(Message, tag="hello", kw_only=True):
    """Worker to root: the process runs its own code."""

    pid: int


class Ready(Message, tag="ready", kw_only=True):
    """Worker to root: it works."""


class Beat(Message, tag="beat", kw_only=True):
    """Worker to root, from the work loop itself."""


class Drained(Message, tag="drained", kw_only=True):
    """Worker to root: nothing is left to do, it ends now."""


class Stop(Message, tag="stop", kw_only=True):
    """Root to worker: end in order within `within_s` seconds."""

    within_s: float


class Reload(Message, tag="reload", kw_only=True):
    """Root to worker: read the settings again."""


ToRoot = Hello | Ready | Beat | Drained
ToWorker = Stop | Reload


# --- the holder's socket: JSON, because the holder is a standard-library program of a few megabytes ---


class HolderSpec(Part, kw_only=True):
    """What the holder is told on its standard input when it starts."""

    service: str  # "vllm", "cloudflared"
    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str
    socket: str  # path it listens on, mode 0600
    log: str  # the service's output, rotated
    log_max_bytes: int
    log_keep: int
    expires_s: float  # dead-man's switch: monotonic time at which the tree ends unless renewed
    grace_s: float  # between SIGTERM and SIGKILL when it ends by itself (expiry, root gone)
    marker: str  # value of LLMWD_TREE in the tree's environment
    note: dict[str, str | int | float | None]  # the manager's own memory, given back to a restarted manager
    courtesy: Courtesy | None = None  # None: as we are ourselves
    umask: int | None = None  # the service's; None: as ours is
    site: str | None = None  # folder that holds setproctitle
    ttl_s: float = 300.0  # LEASE_TTL: no renewal reaches further
    kin: int | None = None  # the root's pid: of its children renewals are taken; None: of anybody


class Renew(Message, tag="renew", kw_only=True):
    """To the holder: the lease now ends at `expires_s`. It answers with its state. ttl_s: LEASE_TTL as it is now."""

    expires_s: float
    ttl_s: float | None = None


class Release(Message, tag="release", kw_only=True):
    """To the holder: end the tree now. SIGTERM to all of it, SIGKILL to what is left after `grace_s`."""

    grace_s: float
    reason: str


class Note(Message, tag="note", kw_only=True):
    """To the holder: remember this for the next manager (e.g. since when the server is ready)."""

    note: dict[str, str | int | float | None]


ToHolder = Renew | Release | Note


class HolderState(Message, tag="state", kw_only=True):
    """From the holder, first thing on every connection and on every change.

    `gone_s` set: the tree is gone, no process of it is left; the holder exits after sending it.
    """

    service: str
    pid: int
    start: int  # the holder's start time in clock ticks since boot
    marker: str
    server_pid: int | None  # the process that was started (None: could not be started)
    status: int | None = None  # its exit status once it ended: >= 0 exit code, < 0 minus the signal
    error: str = ""  # why it could not be started
    pids: tuple[int, ...] = ()  # every living process of the tree
    started_s: float
    expires_s: float
    note: dict[str, str | int | float | None]
    releasing: str | None = None  # reason, once the end was ordered or decided
    signalled_s: float | None = None
    killed_s: float | None = None  # when SIGKILL was needed
    model_gone_s: float | None = None  # processes that hold the model are gone
    gone_s: float | None = None


FromHolder = HolderState
