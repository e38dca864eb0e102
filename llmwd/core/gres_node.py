"""The GPUs in use on a node: `scontrol show node NODE -d` and `sinfo -O GresUsed:256,StateComplete:64`.

GresUsed is set at allocation, before any prolog, and drops a GPU when the job starts to complete;
so a claim of nothing is only worth something together with `completing` False.
"""

import re

import msgspec

from llmwd.core import gres_failure
from llmwd.core.gres_claim import Claim
from llmwd.core.gres_detail import Detail, read_detail, read_totals

_RECORD = re.compile(r"^NodeName=(\S+)", re.MULTILINE)
_FIELD = re.compile(r"(?:(?<=\s)|^)(Gres|GresUsed|State)=(\S*)")

# The marks behind a state (node_state_flag in Slurm), and the short words of sinfo's compact form.
_MARKS = {
    "*": "NOT_RESPONDING",
    "$": "MAINT",
    "~": "POWERED_DOWN",
    "#": "POWERING_UP",
    "%": "POWERING_DOWN",
    "!": "POWER_DOWN",
    "@": "REBOOT_REQUESTED",
    "^": "REBOOT_ISSUED",
    "-": "PLANNED",
}
_WORDS = {
    "ALLOC": "ALLOCATED",
    "COMP": "COMPLETING",
    "DRAINED": "DRAIN",
    "DRAINING": "DRAIN",
    "DRNG": "DRAIN",
    "MIX": "MIXED",
    "NO_RESPOND": "NOT_RESPONDING",
    "PLND": "PLANNED",
    "RESV": "RESERVED",
}


def read_states(text: str) -> tuple[str, ...]:
    """`IDLE*+COMPLETING` as words in upper case, each once, marks spelled out; () for no state at all."""
    words: list[str] = []
    for piece in text.upper().split("+"):
        found = re.match(r"([A-Z_]+)([*$~#%!@^-]*)\Z", piece)
        if not found:
            return ()
        words.append(_WORDS.get(found[1], found[1]))
        words += [_MARKS[mark] for mark in found[2]]
    return tuple(dict.fromkeys(words))


def same_host(name: str, node: str) -> bool:
    """Whether the names differ by a domain that only one of them has."""
    return name != node and ("." in name) != ("." in node) and name.split(".")[0] == node.split(".")[0]


def node_claim(used: str | None, configured: str | None, state: str | None) -> Claim:
    """A claim from the values of GresUsed, Gres and State; None stands for one that is not told."""
    states = read_states(state) if state is not None else ()
    # A state that is not told may have been COMPLETING: saying so only delays the taking of a GPU.
    completing = not states or "COMPLETING" in states
    totals = read_totals(configured) if configured is not None else None
    total = totals.get("gpu", 0) if totals is not None else None

    def claim(gpus: frozenset[int] | None, why: str = "") -> Claim:
        return Claim(gpus, why, completing, states, total)

    if used is None or used in ("", "(null)", "N/A"):
        if totals == {}:
            return claim(frozenset())  # Slurm knows of no GPU here, so it can give none away
        return claim(None, "the text does not tell GresUsed: it is cut, or detail (-d) was not asked for")
    detail = read_detail(used)
    if detail.gpus is None:
        return msgspec.structs.replace(claim(None, detail.why), used=_at_least(detail))
    if totals and (not detail.counts or totals.get("gpu") and "gpu" not in detail.counts):
        return claim(None, "the node has GPUs, but GresUsed does not mention them")
    return claim(detail.gpus)


def _at_least(detail: Detail) -> int | None:
    """How many GPUs are in use although it is not said which; shares are on one at least."""
    if not detail.readable:
        return None
    shared = any(amount for name, amount in detail.counts.items() if name != "gpu")
    return max(detail.counts.get("gpu", 0), int(shared))


def read_node(text: str, node: str) -> Claim:
    """The record of this node in `scontrol show node [NODE] -d`, in lines or with -o."""
    starts = list(_RECORD.finditer(text))
    told = [found for found in starts if found.end() < len(text)]
    mine = [found for found in told if found[1] == node] or [found for found in told if same_host(found[1], node)]
    if not mine:
        return Claim(None, f"no record of node {node}: {gres_failure.sentence(text)}", completing=True)
    if len(mine) > 1:
        return Claim(None, f"several records answer to the name {node}", completing=True)
    later = [found.start() for found in starts if found.start() > mine[0].start()]
    record = text[mine[0].start() : min(later, default=len(text))]
    values: dict[str, str] = {}
    for found in _FIELD.finditer(record):
        if found.end() == len(text) - mine[0].start():
            continue  # nothing follows it: it may be cut
        if values.setdefault(found[1], found[2]) != found[2]:
            return Claim(None, f"the record tells {found[1]} twice, and differently", completing=True)
    return node_claim(values.get("GresUsed"), values.get("Gres"), values.get("State"))


def read_sinfo(text: str, node: str, total: int = 0) -> Claim:
    """`sinfo -a -h -N -n NODE -O GresUsed:256,StateComplete:64`: a line for each partition of the node.

    Give the text as it came, its last newline included: a value at the very end may be cut.
    total: how many GPUs the node is known to have; then a GresUsed without them is no word of theirs.
    """
    claims: list[Claim] = []
    for line in text.splitlines(keepends=True):
        words = line.split()
        if words and (words[0] == node or same_host(words[0], node)):
            words = words[1:]  # some put the node's name first
        if not words or words[0].upper() == "GRES_USED":
            continue
        closed = line[-1:].isspace()
        if len(words) == 1 and not closed:
            return Claim(None, f"the line ends in the middle of GresUsed ({words[0][-40:]!r})", completing=True)
        if len(words) > 2:
            return Claim(None, f"the line {line.strip()[:80]!r} is not of sinfo's form", completing=True)
        # Without Gres= beside it, "(null)" is the controller's word that no GRES is configured.
        configured = f"gpu:{total}" if total else "(null)" if words[0] == "(null)" else None
        state = words[1] if len(words) == 2 and closed else None
        claims.append(node_claim(words[0], configured, state))
    if not claims:
        return Claim(None, f"sinfo says nothing about {node}: {gres_failure.sentence(text)}", completing=True)
    for claim in claims:
        if claim.gpus is None:
            return Claim(None, claim.why, any(c.completing for c in claims), claim.states, used=claim.used)
    gpus = frozenset[int]().union(*(claim.gpus or () for claim in claims))
    states = tuple(dict.fromkeys(word for claim in claims for word in claim.states))
    return Claim(gpus, "", any(claim.completing for claim in claims), states, total or None)
