"""Slurm's hostlists (`dgx-[01-03,7],r[1-2]n[01-10]`), without expanding them to answer a question.

A list from the controller may name 100,000 nodes; asking "is this node in it, where, how many are
there" costs time in the length of the text, not in the number of nodes.
Zero padding counts: `a3` is not `a003`. python-hostlist (GPL) and ClusterShell's NodeSet both expand,
and NodeSet folds paddings; neither fits a pure, small core.
"""

import re
from itertools import pairwise, product

_DIGITS = 18  # longer numbers are no node names, and int() of thousands of digits is an attack
_PARTS = 16  # Slurm knows a handful of dimensions
_RANGE = re.compile(rf"([0-9]{{1,{_DIGITS}}})(?:-([0-9]{{1,{_DIGITS}}}))?\Z")
_WORD = re.compile(r"[\w.-]*\Z")
_NOTHING = frozenset({"", "(null)", "None", "N/A", "None assigned"})

Span = tuple[str, int]  # ("007", 12): from 7 to 12, written with at least three digits
Part = str | tuple[Span, ...]  # a literal, or the ranges of one bracket
Entry = tuple[Part, ...]


class HostlistError(ValueError):
    """The text is no hostlist: cut, or of a form this module does not know."""


def names_nothing(text: str) -> bool:
    """Whether Slurm's text stands for "no nodes": empty, `(null)`, `N/A`, `None`."""
    return text.strip() in _NOTHING


def _commas(text: str) -> list[str]:
    """The entries of a list: split at commas outside brackets."""
    entries, depth, start = [], 0, 0
    for at, char in enumerate(text):
        if char == "[":
            depth += 1
        elif char == "]":
            depth -= 1
        elif char == "," and depth == 0:
            entries.append(text[start:at])
            start = at + 1
        if depth not in (0, 1):
            break
    if depth != 0:
        raise HostlistError(f"unbalanced brackets in the hostlist {text[:80]!r}")
    entries.append(text[start:])
    return entries


def _ranges(text: str) -> tuple[Span, ...]:
    spans = []
    for piece in text.split(","):
        found = _RANGE.match(piece)
        if not found:
            raise HostlistError(f"{piece[:40]!r} is not a range of node numbers")
        low, high = found[1], int(found[2] or found[1])
        if high < int(low):
            raise HostlistError(f"the range {piece[:40]!r} runs backwards")
        spans.append((low, high))
    return tuple(spans)


def _entry(text: str) -> Entry:
    parts: list[Part] = []
    for piece in re.split(r"(\[[^\]]*\])", text):
        if piece.startswith("["):
            parts.append(_ranges(piece[1:-1]))
        elif not _WORD.match(piece):
            raise HostlistError(f"{piece[:40]!r} is not part of a node name")
        elif piece:
            parts.append(piece)
    if not any(char.isalnum() for char in text):
        raise HostlistError("the hostlist has an entry without a name")
    if len(parts) > _PARTS:
        raise HostlistError(f"the entry {text[:40]!r} has too many brackets")
    return tuple(parts)


def parse(text: str) -> tuple[Entry, ...]:
    """The entries of a hostlist; () for `(null)` and its like. HostlistError when it is none."""
    return () if names_nothing(text) else tuple(_entry(entry) for entry in _commas(text))


def _span_size(span: Span) -> int:
    return span[1] - int(span[0]) + 1


def _size(parts: Entry) -> int:
    """How many nodes the parts name."""
    total = 1
    for part in parts:
        if not isinstance(part, str):
            total *= sum(map(_span_size, part))
    return total


def _in_ranges(number: str, spans: tuple[Span, ...]) -> list[int]:
    """The positions of a written number among the numbers of one bracket."""
    found, before = [], 0
    value = int(number)
    for low, high in spans:
        if int(low) <= value <= high and number == str(value).zfill(len(low)):
            found.append(before + value - int(low))
        before += high - int(low) + 1
    return found


def _places(parts: Entry, node: str) -> list[int]:
    """The positions of a node in one entry; the last bracket counts fastest, as Slurm prints it."""
    if not parts:
        return [] if node else [0]
    head, rest = parts[0], parts[1:]
    if isinstance(head, str):
        return _places(rest, node[len(head) :]) if node.startswith(head) else []
    found = []
    for width in range(1, min(len(node), _DIGITS) + 1):
        if not ("0" <= node[width - 1] <= "9"):
            break
        for place in _in_ranges(node[:width], head):
            found += [place * _size(rest) + later for later in _places(rest, node[width:])]
    return found


def _first_label(entry: Entry) -> Entry | None:
    """The entry without its domain, or None if it has none."""
    for at, part in enumerate(entry):
        if isinstance(part, str) and "." in part:
            label = part.split(".", 1)[0]
            return entry[:at] + ((label,) if label else ())
    return None


def _loose_places(entry: Entry, node: str) -> list[int]:
    """Positions when exactly one side carries a domain: `cn-002` and `cn-002.cluster.edu`."""
    short = _first_label(entry)
    if "." in node:
        return _places(entry, node.split(".", 1)[0]) if short is None else []
    if short is None:
        return []
    # What follows the first label may hold brackets too; each repeats the label.
    repeats = _size(entry) // _size(short)
    return [place * repeats + later for place in _places(short, node) for later in range(min(repeats, 64))]


def places(text: str, node: str, *, loose: bool = False) -> list[int]:
    """The positions (from 0) of a node in a hostlist, in Slurm's order; [] if it is not in it.

    loose: compare the first label only, where one of the two names has no domain. Ask strictly
    first: on a site that has both `a` and `a.lab`, they are two nodes.
    """
    find = _loose_places if loose else _places
    found, before = [], 0
    for entry in parse(text):
        found += [before + place for place in find(entry, node)]
        before += _size(entry)
    return found


def contains(text: str, node: str, *, loose: bool = False) -> bool:
    """Whether a hostlist names a node. HostlistError when the text is none."""
    return bool(places(text, node, loose=loose))


def count(text: str) -> int:
    """How many nodes a hostlist names. HostlistError when the text is none."""
    return sum(map(_size, parse(text)))


def _written(part: Part) -> list[str]:
    if isinstance(part, str):
        return [part]
    return [str(n).zfill(len(low)) for low, high in part for n in range(int(low), high + 1)]


def expand(text: str, limit: int = 65536) -> list[str]:
    """The names of a hostlist in Slurm's order. HostlistError when it is none or names more than limit."""
    if count(text) > limit:
        raise HostlistError(f"the hostlist {text[:40]!r} names more than {limit} nodes")
    return ["".join(parts) for entry in parse(text) for parts in product(*map(_written, entry))]


def ascending(text: str, limit: int = 4096) -> list[int]:
    """The numbers of a bit list (`0-1,3`), which Slurm prints in rising order.

    HostlistError when it is none, does not rise (the end of a cut list: `98-103` becomes `98-10`), or
    holds more than `limit` numbers.
    """
    spans = [(int(low), high) for low, high in _ranges(text)]
    if any(after[0] <= before[1] for before, after in pairwise(spans)):
        raise HostlistError(f"the list {text[:40]!r} does not rise")
    if sum(high - low + 1 for low, high in spans) > limit:
        raise HostlistError(f"the list {text[:40]!r} is too long")
    return [number for low, high in spans for number in range(low, high + 1)]
