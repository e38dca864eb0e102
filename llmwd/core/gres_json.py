"""The same facts from `scontrol --json show job` (23.02 and later) and `show node`.

Only the fields that are needed are typed; a reply that does not fit them is not decidable. A cut
reply is no JSON, so nothing here has to guess whether the text is whole.
"""

from typing import Any

import msgspec

from llmwd.core import hostlist
from llmwd.core.gres_claim import Claim, JobFacts, Line, is_sluid, judge
from llmwd.core.gres_detail import read_detail, read_totals, tres_has_gpu
from llmwd.core.gres_node import node_claim, same_host


class _Number(msgspec.Struct):
    """A number as newer versions print it; `set` False means there is none."""

    number: int | float = 0
    set: bool = True


class _Named(msgspec.Struct):
    name: str = ""
    nodename: str = ""


class _Nodes(msgspec.Struct):
    list: str | None = None
    allocation: Any = None


class _Resources(msgspec.Struct):
    nodes: str | _Nodes | None = None  # a string up to v0.0.40, an object from v0.0.41
    allocated_nodes: Any = None


_Id = int | _Number | None


class _Job(msgspec.Struct):
    job_id: _Id = None
    array_job_id: _Id = None
    array_task_id: _Id = None
    het_job_id: _Id = None
    het_job_offset: _Id = None
    sluid: str | None = None
    job_state: str | list[str] | None = None
    nodes: str | None = None
    node_count: _Id = None
    user_name: Any = None  # only shown: whatever it is, it must not make the record unreadable
    gres_detail: list[str] | None = None
    gres_total: str | None = None
    tres_alloc_str: str | None = None
    job_resources: _Resources | None = None


class _Node(msgspec.Struct):
    name: str = ""
    gres: str | None = None
    gres_used: str | None = None
    state: str | list[str] | None = None


class _Reply(msgspec.Struct):
    jobs: list[_Job] | None = None
    nodes: list[_Node] | None = None


_DECODER = msgspec.json.Decoder(_Reply)


def _int(value: _Id) -> int | None:
    if isinstance(value, _Number):
        return int(value.number) if value.set else None
    return value


def _words(value: str | list[str] | None) -> tuple[str, ...]:
    if value is None:
        return ()
    return tuple(word.strip().upper() for word in ([value] if isinstance(value, str) else value))


def _names(entries: Any) -> str | None:
    """A hostlist of the names in `allocation` or `allocated_nodes`, in their order."""
    try:
        named = msgspec.convert(entries, list[_Named])
    except msgspec.ValidationError:
        return None
    names = [entry.name or entry.nodename for entry in named]
    return ",".join(names) if names and all(names) else None


def _node_list(job: _Job) -> str | None:
    """The nodes in the order of gres_detail; None when the reply does not tell them."""
    resources = job.job_resources
    if resources is not None:
        if isinstance(resources.nodes, str) and resources.nodes:
            return resources.nodes
        if isinstance(resources.nodes, _Nodes):
            found = resources.nodes.list or _names(resources.nodes.allocation)
            if found:
                return found
        if found := _names(resources.allocated_nodes):
            return found
    return job.nodes


def _user(value: Any) -> str:
    return value[:64] if isinstance(value, str) and value.isprintable() else ""


def _facts(job: _Job, node: str) -> JobFacts:
    """A job of the reply. HostlistError when its node list is none."""
    nodes = _node_list(job)
    details = job.gres_detail
    has_gpu = tres_has_gpu([job.tres_alloc_str or ""])
    # Without totals the TRES say at least that there are GPUs; where they are not counted as TRES the details alone
    # decide, which are whole because the reply is: but there are none of a job that completes.
    totals = read_totals(job.gres_total) if job.gres_total else None
    why, lines = "", []
    if details and nodes is not None and hostlist.count(nodes) == len(details):
        lines = [
            Line(name, read_detail(detail.strip()), whole=True)
            for name, detail in zip(hostlist.expand(nodes), details, strict=True)
        ]
    elif details and (nodes is None or _names_node(nodes, node)):
        why = "the reply has not as many GRES details as nodes"
    if totals is None and details is not None and (any(details) or "COMPLETING" not in _words(job.job_state)):
        counted = [name for line in lines for name, amount in line.detail.counts.items() if amount]
        totals = {(counted or ["gpu"])[0]: 1} if has_gpu else {}
    return JobFacts(_words(job.job_state), nodes, _int(job.node_count), tuple(lines), totals, has_gpu, why, _user(job.user_name))


def _names_node(nodes: str, node: str) -> bool:
    return hostlist.contains(nodes, node) or hostlist.contains(nodes, node, loose=True)


def _claim(job: _Job, node: str) -> Claim:
    try:
        return judge(_facts(job, node), node)
    except hostlist.HostlistError as error:
        return Claim(None, str(error), "COMPLETING" in _words(job.job_state), _words(job.job_state))


def _ids(job: _Job) -> set[str]:
    """The names under which a job can be asked for."""
    array, task = _int(job.array_job_id), _int(job.array_task_id)
    leader, offset = _int(job.het_job_id), _int(job.het_job_offset)
    ids = {str(_int(job.job_id)), job.sluid or ""}
    if array and task is not None:
        ids.add(f"{array}_{task}")
    if leader and offset is not None:
        ids.add(f"{leader}+{offset}")
    return ids - {"", "None"}


def _node_claim(nodes: list[_Node], node: str) -> Claim:
    mine = [entry for entry in nodes if entry.name == node]
    mine = mine or [entry for entry in nodes if same_host(entry.name, node)]
    if len(mine) != 1:
        return Claim(None, f"the reply has {len(mine) or 'no'} records of node {node}", completing=True)
    words = _words(mine[0].state)
    return node_claim(mine[0].gres_used, mine[0].gres, "+".join(words) if words else None)


def read_json(text: str, node: str, job: str | None) -> Claim:
    """A job (or, in a reply about nodes, the node) of a --json reply of scontrol or squeue."""
    at = text.find("{")  # warnings may stand before it
    try:
        reply = _DECODER.decode(text[max(at, 0) :])
    except (msgspec.DecodeError, UnicodeError, RecursionError, OverflowError) as error:
        return Claim(None, f"the text is not the JSON of a Slurm command: {error}", completing=True)
    if reply.jobs is None:
        if reply.nodes is None:
            return Claim(None, "the JSON has neither jobs nor nodes", completing=True)
        return _node_claim(reply.nodes, node)
    if is_sluid(job) and len(reply.jobs) == 1:
        job = None  # asked for by its run; older data parsers do not print that name
    mine = [entry for entry in reply.jobs if job is None or job in _ids(entry)]
    if len(mine) != 1:
        return Claim(None, f"the reply has {len(mine) or 'no'} records of job {job or '(not named)'}")
    return _claim(mine[0], node)
