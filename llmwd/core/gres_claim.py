"""What a job holds on one node, decided from what was understood of its record.

The readers of text and of JSON collect the same facts; this is the one place that judges them. It
must be right about a text that was cut anywhere, because the reader of a pipe can never be sure: a
set of GPUs or "none" is only given when something in the record proves it, else it is not decidable.
"""

import re
from collections import Counter

import msgspec

from llmwd.core import hostlist
from llmwd.core.gres_detail import Detail

# Base states in which the controller has taken the GPUs back (while COMPLETING is not said as well).
OVER = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED LAUNCH_FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED"
    " TIMEOUT".split()
)
# Not started, or to be started again; a node in its NodeList would contradict that.
WAITING = frozenset("PENDING REQUEUED REQUEUE_FED REQUEUE_HOLD RESV_DEL_HOLD SPECIAL_EXIT".split())

_SLUID = re.compile(r"s[0-9A-HJKMNP-TV-Z]{13}\Z")


def is_sluid(job: str | None) -> bool:
    """Whether this is the name of one run of a job (26.05 names cgroups so), and no JobId."""
    return job is not None and _SLUID.match(job) is not None


class Claim(msgspec.Struct, frozen=True):
    """What a piece of Slurm's output says about the GPUs of one node."""

    gpus: frozenset[int] | None  # GRES indices; None: not decidable; empty: certainly none
    why: str = ""  # one sentence, always set when gpus is None
    completing: bool = False  # the job or node says COMPLETING, or a node's state is not told
    states: tuple[str, ...] = ()  # of the job or the node, upper case: ("MIXED", "DRAIN")
    total: int | None = None  # node: GPUs in Gres=, if told
    user: str = ""  # whose job it is, "" where that is not told; only for showing
    ends_at: float | None = None  # the end of the job's time limit, None where that is not told; only for showing
    used: int | None = None  # node, gpus None: how many are in use at least, if that much was understood


class Line(msgspec.Struct, frozen=True):
    """The detail of one run of equal nodes."""

    nodes: str  # a hostlist
    detail: Detail
    whole: bool  # something follows it in the text, so it cannot have been cut
    legacy: bool = False  # GRES_IDX= of 20.02 and before, without JOB_GRES


class JobFacts(msgspec.Struct, frozen=True):
    """What was understood of a job's record."""

    states: tuple[str, ...]  # () = not told
    nodes: str | None  # the hostlist of the allocation; None = not told
    node_count: int | None
    lines: tuple[Line, ...]
    totals: dict[str, int] | None  # GPU-like amounts of the whole job; None = not told
    alloc_has_gpu: bool
    why: str = ""  # set when the record contradicts itself
    user: str = ""
    ends_at: float | None = None


def judge(job: JobFacts, node: str) -> Claim:
    """What this job holds on this node."""
    completing = "COMPLETING" in job.states
    try:
        gpus, why = _judge(job, node, completing)
    except hostlist.HostlistError as error:
        gpus, why = None, str(error)
    return Claim(gpus, "" if gpus is not None else why, completing, job.states, user=job.user, ends_at=job.ends_at)


def _judge(job: JobFacts, node: str, completing: bool) -> tuple[frozenset[int] | None, str]:
    if job.why:
        return None, job.why
    if not job.states:
        return None, "the record does not tell the job's state: it is cut or of an unknown form"
    loose = _is_loose(job, node)
    mine = [line for line in job.lines if hostlist.contains(line.nodes, node, loose=loose)]
    for line in mine:
        if line.detail.gpus is None:
            return None, line.detail.why
    held = frozenset[int]().union(*(line.detail.gpus or () for line in mine))
    missing = _missing(job)
    if held:
        return _held(job, mine, held, missing)
    none = frozenset[int]()
    listed = None if job.nodes is None else hostlist.contains(job.nodes, node, loose=loose)
    nowhere = job.nodes is not None and hostlist.names_nothing(job.nodes)
    if listed is False and not mine and not nowhere:
        return none, ""  # also while it completes: NodeList holds the nodes that still have to finish
    live = completing or any(state not in OVER | WAITING for state in job.states)
    if not live:
        if any(state in WAITING for state in job.states) and not nowhere:
            return None, "the job waits, yet its record does not say that it has no nodes"
        return none, ""
    return _nothing_seen(job, mine, missing, completing)


def _is_loose(job: JobFacts, node: str) -> bool:
    """Compare first labels only where no list of the record has the node by its exact name."""
    lists = [line.nodes for line in job.lines] + ([job.nodes] if job.nodes is not None else [])
    return not any(hostlist.contains(text, node) for text in lists)


def _missing(job: JobFacts) -> bool:
    """Whether the lines carry less than the job's totals: some line is cut or not there."""
    if job.totals is None:
        return False
    found = Counter[str]()
    told: set[tuple[str, frozenset[int] | None]] = set()
    for line in job.lines:
        if not line.detail.readable:
            return any(job.totals.values())
        if (line.nodes, line.detail.gpus) in told:
            continue  # a line given twice does not make up for what is missing in both
        told.add((line.nodes, line.detail.gpus))
        for name, amount in line.detail.counts.items():
            found[name] += amount * hostlist.count(line.nodes)
    return any(found[name] < amount for name, amount in job.totals.items())


def _held(
    job: JobFacts, mine: list[Line], held: frozenset[int], missing: bool
) -> tuple[frozenset[int] | None, str]:
    """GPUs were seen on this node: are they all?"""
    if all(line.legacy for line in mine):
        return held, ""  # 20.02 and before print no totals to compare with
    if (missing or job.totals is None) and not all(line.whole for line in mine):
        return None, "the text ends within the list of GPUs"
    if not missing:
        return held, ""
    nodes = job.node_count if job.nodes is None else hostlist.count(job.nodes)
    told = sum(hostlist.count(line.nodes) for line in job.lines)
    if nodes == 1 or nodes == told and all(line.detail.readable for line in job.lines):
        return None, "the list of GPUs holds fewer than the job's totals"
    return held, ""  # what is missing belongs to the other nodes: this node's line is whole


def _nothing_seen(
    job: JobFacts, mine: list[Line], missing: bool, completing: bool
) -> tuple[frozenset[int] | None, str]:
    """A live job, and no GPU seen on this node: is that proof that it has none here?"""
    none = frozenset[int]()
    if job.totals is None:
        if mine and all(line.legacy and line.whole for line in mine) and not job.alloc_has_gpu:
            return none, ""
        return None, "the record does not tell the job's GRES: it is cut, or detail (-d) was not asked for"
    if not any(job.totals.values()):
        if job.alloc_has_gpu and not job.totals:
            return None, "the job's TRES have GPUs, its GRES have none"
        return none, ""
    if completing:
        return None, "the job has GPUs and is completing: Slurm no longer says which"
    if missing:
        return None, "the job has GPUs, but not all are on the lines of this text"
    if mine:
        return (none, "") if all(line.whole for line in mine) else (None, "the text ends within this node's line")
    covered = sum(hostlist.count(line.nodes) for line in job.lines)
    if job.nodes is None and job.node_count is not None and job.node_count == covered:
        return none, ""  # all nodes of the job are there, and this is none of them
    return None, "the job has GPUs, but its record has no line for this node"
