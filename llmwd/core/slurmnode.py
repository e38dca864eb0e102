"""Which of Slurm's nodes this host is, and what it says of itself: from one listing of all nodes."""

import re

import msgspec

# gpu:a100:4(S:0-1),gpu:2 ... : name, optional type, count
_GPU = re.compile(r"(?:^|,)gpu(?::(?P<type>[^:,()]+))?:(?P<count>\d+)(?:\([^)]*\))?")


_NAME = re.compile(r"[A-Za-z0-9][\w.-]*\Z")
# A client that names a controller or a way to one: Slurm is configured here, though nobody answers.
_CONTROLLER = re.compile(r"no config from|connect failure|unable to contact|connection refused|timed? ?out", re.IGNORECASE)


class SlurmNode(msgspec.Struct, frozen=True):
    """A node's name and the GPUs that `Gres=` counts. types 0: none is named; those without one are a type; counts: how
    many of each type, in no order. others: there are other nodes with GPUs."""

    name: str
    gpus: int
    types: int
    others: bool = False
    counts: tuple[int, ...] = ()


class Search(msgspec.Struct, frozen=True):
    """What was found. why: of no node; absent: the listing is Slurm's, and this host has no part in it."""

    node: SlurmNode | None = None
    why: str = ""
    absent: bool = False


def has_controller(stderr: str) -> bool:
    """Whether what a client says shows that Slurm is configured, although it got no configuration."""
    return bool(_CONTROLLER.search(stderr))


def is_listing(text: str) -> bool:
    """Whether a text is sinfo's listing at all, so that a host which is not in it is none of Slurm's."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    named = all(len(words) >= 3 and _NAME.match(words[0]) and _NAME.match(words[1]) for words in lines)
    return named and any(words[2] == "(null)" or ":" in words[2] for words in lines)


def find(listing: str, host: str, name: str) -> Search:
    """This host's node, or why there is none.

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
            found[node] = read_gres(node, gres)
    if len(found) == 1:
        mine = next(iter(found.values()))
        return Search(msgspec.structs.replace(mine, others=not with_gpus <= {mine.name}))
    if found:
        return Search(why=f"several of Slurm's nodes are on this host ({', '.join(sorted(found))}): set SLURM_NODE")
    return Search(why=f"Slurm has no node {name}" if name else f"Slurm has no node on the host {host}", absent=True)


def split_reading(text: str, width: int) -> tuple[str, str]:
    """sinfo's answer about the node's use, cut into its first columns, `width` characters a line, and the Gres behind
    them ("" where none is told). A node has the same Gres in each of its partitions."""
    lines = text.splitlines(keepends=True)
    first = [line[:width] + ("\n" if line.endswith("\n") and len(line) > width else "") for line in lines]
    gres = next((line[width:].strip() for line in lines if line.endswith("\n") and line[width:].strip()), "")
    return "".join(first), gres


def _same(name: str, host: str) -> bool:
    return name == host or name.split(".")[0] == host.split(".")[0]


def read_gres(node: str, gres: str) -> SlurmNode:
    """The node by its `Gres=`."""
    counts: dict[str | None, int] = {}
    for match in _GPU.finditer(gres):
        counts[match["type"]] = counts.get(match["type"], 0) + int(match["count"])
    return SlurmNode(node, sum(counts.values()), 0 if counts.keys() == {None} else len(counts), counts=tuple(sorted(counts.values())))
