"""Which of Slurm's nodes this host is, and what it says of itself: from one listing of all nodes."""

import re

import msgspec

# gpu:a100:4(S:0-1),gpu:2 ... : name, optional type, count
_GPU = re.compile(r"(?:^|,)gpu(?::(?P<type>[^:,()]+))?:(?P<count>\d+)(?:\([^)]*\))?")


_NAME = re.compile(r"[A-Za-z0-9][\w.-]*\Z")


class SlurmNode(msgspec.Struct, frozen=True):
    """A node's name and the GPUs that `Gres=` counts. types 0: none is named; those without one are a type.
    others: there are other nodes with GPUs."""

    name: str
    gpus: int
    types: int
    others: bool = False


def is_listing(text: str) -> bool:
    """Whether a text is sinfo's listing at all, so that a host which is not in it is none of Slurm's."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    named = all(len(words) >= 3 and _NAME.match(words[0]) and _NAME.match(words[1]) for words in lines)
    return named and any(words[2] == "(null)" or ":" in words[2] for words in lines)


def find(listing: str, host: str, name: str) -> tuple[SlurmNode | None, str]:
    """(this host's node, "") or (None, why not).

    listing: `sinfo -a -h -N -O NodeList:128,NodeHost:128,Gres:256`, a line per node and partition.
    name: SLURM_NODE, or "" to go by the host's name.
    """
    found: dict[str, SlurmNode] = {}
    with_gpus: set[str] = set()
    for line in listing.splitlines():
        words = line.split()
        if len(words) < 2:
            continue
        node, node_host = words[:2]
        gres = "".join(words[2:])
        if _GPU.search(gres):
            with_gpus.add(node)
        matches = node == name if name else _same(node_host, host) or _same(node, host)
        if matches:
            found[node] = _read(node, gres)
    if len(found) == 1:
        mine = next(iter(found.values()))
        return msgspec.structs.replace(mine, others=not with_gpus <= {mine.name}), ""
    if found:
        return None, f"several of Slurm's nodes are on this host ({', '.join(sorted(found))}): set SLURM_NODE"
    return None, f"Slurm has no node {name}" if name else f"Slurm has no node on the host {host}"


def _same(name: str, host: str) -> bool:
    return name == host or name.split(".")[0] == host.split(".")[0]


def _read(node: str, gres: str) -> SlurmNode:
    gpus = list(_GPU.finditer(gres))
    types = {match["type"] for match in gpus}
    return SlurmNode(node, sum(int(match["count"]) for match in gpus), 0 if types == {None} else len(types))
