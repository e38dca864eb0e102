"""What Slurm has planned for this node, and what follows: when to leave in good time, when not to begin.

Two answers are read: the reservations, and the pending jobs. A job concerns this node when its planned node is this
one; one that only has a time (`--begin`) when it asks for this node, or no other node of the cluster has GPUs.
A node or a number of GPUs that is not understood counts as this node and as all of them; a time that is not
understood keeps a model from being started, but ends none. Jobs that begin are detected as always: all of this is
courtesy, so no answer is no conflict.

Slurm's times are wall times (in UTC, because the commands are told so). They become monotonic when they arrive, so
that a clock that is set afterwards moves nothing.
"""

import re
from collections.abc import Collection, Sequence
from datetime import UTC, datetime

import msgspec

from llmwd.core import hostlist
from llmwd.core.hostlist import HostlistError
from llmwd.messages import Expected

# Assumed for a profile that has never been ready here.
LOAD_ASSUMED_S = 300.0
# A job that has not come this long after its planned start is not waited for. Longer than it takes to hear of a new plan.
JOB_WAIT_S = 150.0

JOB_FIELDS = (
    "JobID", "ArrayTaskID", "Reason", "StartTime", "SchedNodes", "ReqNodes",
    "tres-per-job", "tres-per-node", "tres-per-socket", "tres-per-task", "OverSubscribe",
)  # fmt: skip
_NO_TIME = frozenset({"N/A", "Unknown", "None", "NONE", "(null)"})
_NO_TRES = frozenset({"N/A", "(null)"})
_EMPTY = "No reservations in the system"
_NUMBER = re.compile(r"[0-9]{1,9}\Z")
_FIELD = re.compile(r"(?:^|\s)([A-Za-z]+)=")
# gres:gpu:2 (to 22.05), gres/gpu:a100:2 (23.02 on), gres/gpu=2; a missing number is 1
_ASKED = re.compile(r"(?:gres[:/])?(?P<name>[\w.-]+)(?:[:=](?P<type>[^:=(]*[^:=(0-9][^:=(]*))?(?:[:=](?P<count>[0-9]{1,9}))?(?:\([^)]*\))?\Z")
_TASKS = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9})(?::([1-9][0-9]{0,8}))?)?\Z")  # 3, 1-9, 1-9:2


class Plan(msgspec.Struct, frozen=True):
    """What Slurm has planned here, in wall time. start_at None: not understood. gpus None: the whole node, or not known."""

    who: str
    start_at: float | None
    gpus: int | None
    end_at: float | None = None
    job: str | None = None


class Heard(msgspec.Struct, frozen=True):
    """One answer. unclear: what was not understood of it, one text each."""

    plans: tuple[Plan, ...] = ()
    unclear: tuple[str, ...] = ()


def read_reservations(text: str, node: str) -> Heard:
    """From `scontrol -o show reservations`: those that have the node among theirs, whoever may use them."""
    plans: list[Plan] = []
    unclear: list[str] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if line == _EMPTY:
            continue
        fields = _fields(line)
        if "ReservationName" not in fields:
            unclear.append(f"a reservation: {line[:200]!r}")
            plans.append(Plan("a reservation that was not understood", None, None))
            continue
        # Such a reservation moves on with the clock and never begins.
        if "TIME_FLOAT" in fields.get("Flags", "") or not _has(fields.get("Nodes"), node, unclear):
            continue
        who = f"reservation {fields['ReservationName']}"
        start_at = _time(fields.get("StartTime", ""), who, unclear)
        end_at = _time(fields.get("EndTime", ""), who, unclear)
        plans.append(Plan(who, start_at, _reserved(fields.get("TRES", "")), end_at))
    return Heard(tuple(plans), tuple(unclear))


def read_pending(text: str, node: str, alone: bool) -> Heard:
    """From `squeue --states=PD -O` with JOB_FIELDS, each ended by `|`: those with a time, on this node.

    alone: no other node of the cluster has GPUs, so a job that names no node will come here.
    """
    plans: list[Plan] = []
    unclear: list[str] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        words = [word.strip() for word in line.split("|")]
        if len(words) != len(JOB_FIELDS) + 1:
            unclear.append(f"a pending job: {line[:200]!r}")
            plans.append(Plan("a pending job that was not understood", None, None))
            continue
        job, tasks, reason, start, planned, asked = words[:6]
        nodes = asked if hostlist.names_nothing(planned) else planned
        # A held job keeps its --begin, and does not begin.
        if start in _NO_TIME or reason.startswith("JobHeld"):
            continue
        if hostlist.names_nothing(nodes) and not alone or not hostlist.names_nothing(nodes) and not _has(nodes, node, unclear):
            continue
        who = f"job {job}"
        plans.append(Plan(who, _time(start, who, unclear), _of_all(tasks, _asked(*words[6:11])), job=job))
    return Heard(tuple(plans), tuple(unclear))


def _fields(line: str) -> dict[str, str]:
    found = list(_FIELD.finditer(line))
    ends = [match.start() for match in found] + [len(line)]
    return {match[1]: line[match.end() : end].strip() for match, end in zip(found, ends[1:], strict=True)}


def _has(nodes: str | None, node: str, unclear: list[str]) -> bool:
    try:
        return nodes is None or hostlist.contains(nodes, node)
    except HostlistError as error:
        unclear.append(str(error))
        return True


def _time(text: str, who: str, unclear: list[str]) -> float | None:
    if text in _NO_TIME:
        return None
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S").replace(tzinfo=UTC).timestamp()
    except ValueError:
        unclear.append(f"the time {text[:40]!r} of {who}")
        return None


def _reserved(tres: str) -> int | None:
    """GPUs of a reservation on all its nodes, so at most as many on this one. None: it may use any.

    A reservation of cores alone has no GPUs in its TRES either; its jobs may ask for GPUs all the same.
    """
    counts = dict(item.partition("=")[::2] for item in tres.split(",") if item.startswith("gres/"))
    if "gres/gpu" in counts:
        counts = {"gres/gpu:": counts["gres/gpu"]}
    typed = [count for name, count in counts.items() if name.startswith("gres/gpu:")]
    return sum(map(int, typed)) if typed and all(map(_NUMBER.match, typed)) else None


def _asked(per_job: str, per_node: str, per_socket: str, per_task: str, sharing: str) -> int | None:
    """GPUs that a pending job will have on one node, at most. None: all of them, or not known."""
    if sharing == "NO":
        return None  # --exclusive gets all that the node has
    node, job = _count(per_node), _count(per_job)
    if node != 0:
        return node
    if job != 0:
        return job
    return 0 if _count(per_socket) == 0 and _count(per_task) == 0 else None


def _of_all(tasks: str, gpus: int | None) -> int | None:
    """GPUs of all tasks of a pending array that can run at once: it has one record (`1-9:2,12%4`), however many they are.

    Slurm cuts a long list and ends it with dots: then how many there are is not known.
    """
    if tasks in _NO_TIME or not gpus:
        return gpus
    listed, _, most = tasks.partition("%")
    ranges = [_TASKS.match(part) for part in listed.split(",")]
    if None in ranges or most and not _NUMBER.match(most):
        return None
    count = sum(1 + max(int(one[2] or one[1]) - int(one[1]), 0) // int(one[3] or 1) for one in ranges)
    return gpus * min(count, int(most or count))


def _count(tres: str) -> int | None:
    if tres in _NO_TRES:
        return 0
    total = 0
    for item in tres.split(","):
        asked = _ASKED.match(item.strip())
        if asked is None or asked["name"] in ("shard", "mps"):
            return None
        if asked["name"] == "gpu":
            total += int(asked["count"] or 1)
    return total


# --- what follows -------------------------------------------------------------------------------------


def place(plan: Plan, now_at: float, now_s: float) -> Expected:
    """The plan on the monotonic clock, which showed `now_s` when the wall clock showed `now_at`."""

    def monotonic(at: float | None) -> float | None:
        return None if at is None else now_s + (at - now_at)

    start_s, over_s = monotonic(plan.start_at), monotonic(plan.end_at)
    if plan.job is not None and start_s is not None:
        over_s = start_s + JOB_WAIT_S
    return Expected(who=plan.who, job=plan.job, gpus=plan.gpus, start_at=plan.start_at, start_s=start_s, over_s=over_s)


class Outlook(msgspec.Struct, frozen=True):
    """What concerns our GPUs, soonest first, and how long leaving and loading take. load_s None: never measured."""

    mine: tuple[Expected, ...] = ()
    drain_s: float = 60.0
    load_s: float | None = None


class Verdict(msgspec.Struct, frozen=True):
    """why: in words, empty if nothing is against it; at_s: when that may change by itself."""

    why: str = ""
    at_s: float | None = None


def concerning(
    expected: Sequence[Expected], ours: int, others: int, total: int, jobs: Collection[str], now_s: float
) -> tuple[Expected, ...]:
    """Those that can need one of `ours` GPUs, soonest first; unknown times are first of all.

    others: GPUs in use by others now, who may stay. Slurm does not know of us: only what fits beside all of this
    concerns us not. jobs: ids of the jobs that are here, whose GPUs are counted already.
    """
    live = sorted(
        (each for each in expected if (each.over_s is None or now_s < each.over_s) and each.job not in jobs and each.gpus != 0),
        key=lambda each: float("-inf") if each.start_s is None else each.start_s,
    )
    found = []
    for number, each in enumerate(live):
        start_s = now_s if each.start_s is None else max(each.start_s, now_s)
        together = [one.gpus for one in live[: number + 1] if one is each or one.over_s is None or one.over_s > start_s]
        if None in together or sum(together) + ours + others > total:
            found.append(each)
    return tuple(found)


def leave(outlook: Outlook, now_s: float) -> Verdict:
    """Whether the GPUs are to be left now."""
    for each in outlook.mine:
        if each.start_s is not None and now_s >= each.start_s - outlook.drain_s:
            return Verdict(spell(each))
    times = [each.start_s - outlook.drain_s for each in outlook.mine if each.start_s is not None]
    return Verdict(at_s=min(times, default=None))


def begin(outlook: Outlook, now_s: float) -> Verdict:
    """Whether to begin would pay: the model must have time to load, and then to serve at least as long."""
    load_s = LOAD_ASSUMED_S if outlook.load_s is None else outlook.load_s
    for each in outlook.mine:
        if each.start_s is None or each.start_s < now_s + outlook.drain_s + 2 * load_s:
            told = "has loaded within" if outlook.load_s is not None else "is assumed to load within"
            why = f"{spell(each)}, and the model {told} {load_s:.0f} s" if each.start_s is None or each.start_s > now_s else spell(each)
            return Verdict(why, each.over_s)
    return Verdict()


def spell(each: Expected) -> str:
    """`reservation maint at 2026-01-31T12:00:00Z (the whole node)`."""
    when = "at a time that was not understood" if each.start_at is None else _written(each.start_at)
    what = "the whole node" if each.gpus is None else f"{each.gpus} GPU{'' if each.gpus == 1 else 's'}"
    return f"{each.who} {when} ({what})"


def _written(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):at %Y-%m-%dT%H:%M:%SZ}"


# --- how long a model loads ---------------------------------------------------------------------------

LOADS_KEPT = 5
LoadTimes = dict[str, tuple[float, ...]]  # profile -> seconds from start to ready, the last one last


def measured(times: LoadTimes, profile: str, took_s: float) -> LoadTimes:
    """With one more measured start."""
    return times | {profile: (*times.get(profile, ()), took_s)[-LOADS_KEPT:]}


def load_s(times: LoadTimes, profile: str | None) -> float | None:
    """The longest of the profile's last starts: files that are in memory once need not be the next time."""
    return max(times.get(profile or "", ()), default=None)
