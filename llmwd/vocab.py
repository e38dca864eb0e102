"""The words of llmwd: every name that crosses a process, a log or a screen.

One spelling each, with its meaning beside it, because `llmwd-ctl explain` prints these texts.
"""

from enum import StrEnum


class Told(StrEnum):
    """An enum whose members carry one sentence for people."""

    meaning: str

    def __new__(cls, value: str, meaning: str) -> "Told":
        member = str.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member


class Phase(Told):
    """Where anything with a pid stands: workers, the vLLM server, Caddy, cloudflared."""

    stopped = "stopped", "not wanted, nothing runs"
    starting = "starting", "a process exists, but has not shown that it works"
    ready = "ready", "it has shown that it works"
    draining = "draining", "asked to end; may finish what it does until the grace is over"
    stopping = "stopping", "being killed; nothing of it may be left"
    backoff = "backoff", "ended by itself; started again when the backoff is over"
    failed = "failed", "ended too often, or for a reason that a restart cannot mend; waits for the operator"


class NodePhase(Told):
    """What llmwd as a whole does on this node (`phase` in `status`)."""

    serving = "serving", "the model answers requests on the leased GPUs"
    loading = "loading", "vLLM has been started on the leased GPUs, and does not answer yet"
    yielding = "yielding", "the GPUs are being given back; processes of ours may still be on them"
    waiting = "waiting", "no process of ours is on a GPU; the reason says what is waited for"
    held = "held", "llmwd stays away from the GPUs until `resume` or the time is over; the reason says who or what keeps it away"
    stopped = "stopped", "the supervisor is not running, or is ending"
    failed = "failed", "cannot serve without the operator; the reason says why"


class Reason(Told):
    """Why the node is in its phase, why a lease was revoked, why none is granted."""

    ready = "ready", "a one-token request was answered"
    loading = "loading", "the model is being loaded"
    starting = "starting", "llmwd has just been started and is still looking around"
    yielded_to_job = "yielded_to_job", "a Slurm job has been given GPUs that we use or need"
    unknown_job = "unknown_job", "a Slurm job is here whose GPUs could not be learned in time: it counts as one on ours"
    gpu_in_use = "gpu_in_use", "a process that is neither ours nor a known job's is on a GPU that we use or need"
    gpu_unknown = "gpu_unknown", "the driver or Slurm cannot say who uses a GPU: it counts as used"
    waiting_for_gpus = "waiting_for_gpus", "fewer GPUs are free than the profile needs"
    resume_delay = "resume_delay", "enough GPUs are free, but not yet for RESUME_AFTER seconds"
    no_evidence = "no_evidence", "what tells us about Slurm's jobs is silent or too old: no lease without evidence"
    node_draining = "node_draining", "Slurm says the node is draining, reserved, in maintenance or being rebooted"
    expected_job = "expected_job", "a reservation or a planned job needs these GPUs soon"
    no_gpus = "no_gpus", "the node has fewer GPUs than the profile needs"
    memory_pressure = "memory_pressure", "the node is short of memory while jobs or others run on it"
    held = "held", "the operator asked us to stay away (`llmwd-ctl yield`)"
    budget_broken = "budget_broken", "giving GPUs back took longer than YIELD_BUDGET: stays away until `resume`"
    map_contradicted = (
        "map_contradicted",
        "a job's process is on a GPU that Slurm's numbers do not give to it: nothing is certain until `resume`",
    )
    switching = "switching", "another profile was chosen, or its settings changed"
    not_wanted = "not_wanted", "no model is to run at present"
    lease_expired = "lease_expired", "the lease was not renewed in time"
    config_error = "config_error", "the active profile or the settings are not valid"
    server_backoff = "server_backoff", "vLLM ended by itself; it is started again when the backoff is over"
    server_failed = "server_failed", "vLLM ended too often or cannot start; waits for `switch` or `reset`"
    worker_failed = "worker_failed", "a worker ended too often and is in quarantine; waits for `reset`"
    stopping = "stopping", "llmwd is being stopped"
    stopped = "stopped", "no supervisor is running"


class Holder(Told):
    """Who has a GPU (`gpus[].holder` in `status`)."""

    free = "free", "nobody, on all the evidence there is"
    llmwd = "llmwd", "us: the lease covers it, or a process of ours is still on it"
    slurm = "slurm", "a Slurm job, running, completing or just allocated"
    other = "other", "a process that is neither ours nor a known job's"
    unknown = "unknown", "cannot be told; treated as used"


class Source(Told):
    """Where the evidence of jobs comes from (DETECTION chooses)."""

    stepd = "stepd", "sockets of slurmstepd in slurmd's spool folder"
    cgroup2 = "cgroup2", "job folders under slurmstepd's scope in cgroup v2"
    cgroup1 = "cgroup1", "job folders of cgroup v1"
    gresused = "gresused", "what slurmctld says is allocated on this node (sinfo, GresUsed)"
    procfs = "procfs", "cgroups and titles of the processes in /proc"
    nvml = "nvml", "processes that the NVIDIA driver lists on the GPUs"
    prolog = "prolog", "the node's prolog, by `llmwd-ctl release`: always heard, no choice of DETECTION"
    sim = "sim", "files in the simulation folder"


class Worker(Told):
    """The root's children."""

    detector = "detector", "which Slurm jobs are on this node"
    resolver = "resolver", "who holds which GPU; grants the lease"
    vllm = "vllm", "runs one model on the leased GPUs"
    door = "door", "the front door: keys, limits, and an answer while the model is away (Caddy)"
    tunnel = "tunnel", "public access through cloudflared"
    notifier = "notifier", "tells people through ntfy"


class Event(Told):
    """What people are told of (NTFY_EVENTS chooses; digest and test are always told)."""

    serving = "serving", "a model answers"
    yielding = "yielding", "GPUs are given back to a job or to others"
    resumed = "resumed", "the model answers again after a yield, a hold or a failure"
    switched = "switched", "another model answers"
    crashed = "crashed", "vLLM ended by itself and is started again"
    failed = "failed", "vLLM cannot be served without the operator"
    quarantined = "quarantined", "a worker of llmwd ended too often, or works again"
    tunnel = "tunnel", "the tunnel is up, down or failed"
    held = "held", "somebody keeps llmwd away from the GPUs"
    budget = "budget", "llmwd keeps itself away from the GPUs, because it broke a promise or cannot trust what it sees"
    stopped = "stopped", "llmwd ends in order"
    back = "back", "llmwd is heard of again after its dead man's notice"
    digest = "digest", "how much was never told"
    test = "test", "`llmwd-ctl notify`"


class Exit:
    """Exit codes of llmwd's programs."""

    done = 0
    refused = 1
    usage = 2
    not_running = 3
    timed_out = 4
