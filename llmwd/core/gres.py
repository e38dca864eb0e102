"""What Slurm's output says about the GPUs of one node: the one door to every form of it.

    form       command                                                       read by
    job        scontrol show job JOB -d [-o]                                 gres_job
    node       scontrol show node NODE -d                                    gres_node
    sinfo      sinfo -a -h -N -n NODE -O GresUsed:256,StateComplete:64       gres_node
    json       scontrol --json show job JOB (or show node NODE)              gres_json
    resources  scontrol show resources JOB (25.11; owner and operator only)  here
    stderr     what any of them says when it fails                           gres_failure

Each reader is pure, never raises, and returns a Claim. The rule for all: unknown is never taken for
none. An empty set needs proof, and so does the completeness of any other set; a text may be cut
anywhere, by Slurm's own buffers or by a process that was killed while it printed. pyslurm would need
the site's own libslurm at build time, so the text is read.
"""

import re

from llmwd.core import gres_failure
from llmwd.core.gres_claim import Claim, is_sluid
from llmwd.core.gres_detail import read_detail, takes_gpus
from llmwd.core.gres_failure import Failure, classify_failure, form_of, read_config
from llmwd.core.gres_job import read_job, read_jobs
from llmwd.core.gres_json import read_json
from llmwd.core.gres_node import read_node, read_sinfo, same_host

__all__ = [
    "FORMS",
    "Claim",
    "Failure",
    "classify_failure",
    "form_of",
    "is_sluid",
    "read",
    "read_config",
    "read_job",
    "read_jobs",
    "read_json",
    "read_node",
    "read_resources",
    "read_sinfo",
    "read_stderr",
]

FORMS: tuple[str, ...] = ("job", "node", "sinfo", "json", "resources", "stderr")

_BLOCK = re.compile(r"^Node=(\S+)", re.MULTILINE)
_GRES = re.compile(r"^[ \t]+Gres=(\S*)([^\n]*)(\n|\Z)", re.MULTILINE)


def _resource(name: str, rest: str) -> str:
    """A ` Gres=` line as the item that a job's detail would have."""
    values = dict(word.split("=", 1) for word in rest.split() if "=" in word)
    kind = f":{values['Type']}" if values.get("Type") not in (None, "", "(null)") else ""
    return f"{name}{kind}:{values.get('Count', '')}(IDX:{values.get('Index', '')})"


def read_resources(text: str, node: str) -> Claim:
    """This node's block: `Node=n2 …` and a line ` Gres=gpu Type=a100 Count=1 Index=3` for each GRES.

    The form has neither totals nor an end mark, so at the end of the text "no GPU" is not decidable.
    """
    starts = list(_BLOCK.finditer(text))
    mine = [at for at, found in enumerate(starts) if found[1] == node]
    mine = mine or [at for at, found in enumerate(starts) if same_host(found[1], node)]
    if len(mine) != 1:
        return Claim(None, f"the text has {len(mine) or 'no'} blocks for node {node}: {gres_failure.sentence(text)}")
    last = mine[0] + 1 == len(starts)
    block = text[starts[mine[0]].start() : len(text) if last else starts[mine[0] + 1].start()]
    if last and not block.endswith("\n"):
        return Claim(None, "the text ends in the middle of a line")
    items = [_resource(found[1], found[2]) for found in _GRES.finditer(block) if takes_gpus(found[1].lower())]
    if not items and last:
        return Claim(None, "the text ends before a GPU of this node is named")
    detail = read_detail(",".join(items))
    return Claim(detail.gpus, detail.why)


def read_stderr(text: str, node: str) -> Claim:
    """Slurm's error text: never decidable, but it can be said why."""
    return Claim(None, gres_failure.sentence(text))


def read(form: str, text: str, node: str, job: str | None = None) -> Claim:
    """What a text of the given form says. ValueError for an unknown form, and only for that."""
    match form:
        case "job":
            return read_job(text, node, job)
        case "json":
            return read_json(text, node, job)
        case "node":
            return read_node(text, node)
        case "sinfo":
            return read_sinfo(text, node)
        case "resources":
            return read_resources(text, node)
        case "stderr":
            return read_stderr(text, node)
    raise ValueError(f"unknown form {form!r}: one of {', '.join(FORMS)}")
