"""The GRES items Slurm prints, for a job on one node or for a whole node.

    gpu:a100:2(IDX:0-1)          GPUs 0 and 1; the index counts all GPUs of the node, whatever their type
    gpu:a100(CNT:2)  gpu:2       two GPUs, but not which
    shard:a40:3(1/4,2/4)         used/total for each GPU in turn; any use takes the whole GPU
    gpu(IDX:2,4)                 up to 20.02
    gres:gpu:2  gres/gpu:2       the same under its long name, in what users ask for and in some answers
    gpu:a100:4(S:0-1)            configured: sockets, no index

Items are joined by commas, and commas also occur inside their parentheses. The one reader here
serves every form: what it cannot prove it calls not decidable, never none.
"""

import re
from collections.abc import Iterable

import msgspec

from llmwd.core import hostlist

# What takes a GPU: the GPU itself (a MIG slice is one too) and the ways of sharing it.
GPU_NAMES = frozenset({"gpu", "shard", "mps"})
# A site is free in its names. One of these words in a name that nobody knows: GPUs may be what it hands out ...
_LIKE_GPU = re.compile("gpu|mig|shard|mps|nvidia")
# ... unless it is known for a measure of them.
_HARMLESS = re.compile("(gpu|nvidia)_?(mem|memory|vram|util|utilization)")

# Slurm prints bit lists into 64 bytes (a node's GresUsed) or 128 (a job's detail) and cuts silently.
_MAYBE_CUT_CHARS = 60

_ITEM = re.compile(
    r"(?:gres[:/](?=[a-z_]))?"
    r"(?P<name>[A-Za-z_][\w.+-]*)"
    r"(?P<middle>(?::(?:\(null\)|[^:(),\s]+))*)"
    r"(?P<parens>(?:\((?:[^()]|\(null\))*\))*)\Z",
    re.IGNORECASE,
)
_PAREN = re.compile(r"\(((?:[^()]|\(null\))*)\)")
_COUNT = re.compile(r"([0-9]{1,15})([KMGTP]?)\Z", re.IGNORECASE)
_SHARE = re.compile(r"([0-9]{1,15})/([0-9]{1,15})\Z")
_TRES = re.compile(r"(?:^|,)\s*(?:gres[/:])?([a-z_][\w.+-]*)(?::[^=,]*?)?[=:]([0-9]+)", re.IGNORECASE)
_NOTHING = frozenset({"", "(null)"})
_TELL_NO_GPU = ("S:", "CNT:")  # the parentheses that say nothing of which: sockets, amounts


class Detail(msgspec.Struct, frozen=True):
    """What a list of GRES items says."""

    gpus: frozenset[int] | None  # None: not decidable
    why: str = ""  # set when gpus is None
    counts: dict[str, int] = {}  # amounts told of what takes GPUs; names told with 0 are in it too
    readable: bool = True  # False: not even the counts can be trusted


class _Item(msgspec.Struct, frozen=True):
    name: str
    type: str
    count: int | None
    parens: tuple[str, ...]
    counted: bool  # `(CNT:2)`


def takes_gpus(name: str) -> bool:
    """Whether what a site calls so (lower case) takes GPUs, or may."""
    return name in GPU_NAMES or (_LIKE_GPU.search(name) is not None and not _HARMLESS.fullmatch(name))


def _split(text: str) -> list[str] | None:
    """The items: split at commas outside parentheses; None if these do not balance."""
    items, depth, start = [], 0, 0
    for at, char in enumerate(text):
        if char == "(":
            depth += 1
        elif char == ")":
            depth -= 1
            if depth < 0:
                return None
        elif char == "," and depth == 0:
            items.append(text[start:at])
            start = at + 1
    items.append(text[start:])
    return items if depth == 0 else None


def _number(text: str) -> int | None:
    """A count such as `4` or `40K`, or None."""
    found = _COUNT.match(text)
    return int(found[1]) * 1024 ** " KMGTP".index(found[2].upper() or " ") if found else None


def _item(text: str) -> _Item | None:
    """One item, or None if it is none."""
    found = _ITEM.match(text)
    if not found:
        return None
    parens = tuple(_PAREN.findall(found["parens"]))
    middle = found["middle"].split(":")[1:]
    count = None
    # `gpu:8(CNT:2)` has a type called 8: the counted form has no amount before the parenthesis.
    counted = any(paren.startswith("CNT:") for paren in parens)
    if middle and not counted:
        count = _number(middle[-1])
        if count is not None:
            middle = middle[:-1]
    for paren in parens:
        if paren.startswith("CNT:"):
            count = _number(paren[4:])
    if count is None and not any(paren.startswith("IDX:") for paren in parens):
        return None  # a bare word: a cut item, or another column of the output
    return _Item(found["name"].lower(), ":".join(middle), count, parens, counted)


def _indices(item: _Item, listed: str) -> frozenset[int] | None:
    """The GPUs of `IDX:…`; None when the list is cut or contradicts the amount."""
    if listed in ("", "N/A"):
        return frozenset() if not item.count else None
    try:
        gpus = frozenset(hostlist.ascending(listed))
    except hostlist.HostlistError:
        return None
    if item.name == "gpu" and item.count is not None:
        return gpus if len(gpus) == item.count else None
    # A share's amount says nothing about how many GPUs it lies on, and the oldest form has none.
    enough = item.count is None or len(gpus) <= item.count
    return gpus if enough and len(listed) < _MAYBE_CUT_CHARS else None


def _shares(item: _Item, listed: str) -> frozenset[int] | None:
    """The GPUs of `0/4,2/4`; None when it is no such list or holds less than the amount."""
    if listed == "(null)":
        return frozenset() if item.count == 0 else None
    found = [_SHARE.match(share) for share in listed.split(",")]
    if not all(found):
        return None
    used = [int(share[1]) for share in found if share]
    if item.count is None or sum(used) < item.count or any(int(share[1]) > int(share[2]) for share in found if share):
        return None
    return frozenset(index for index, amount in enumerate(used) if amount)


def _gpus(item: _Item) -> frozenset[int] | None:
    """The GPUs one item takes; None when it takes some and does not say which."""
    told = [paren for paren in item.parens if not paren.startswith(_TELL_NO_GPU)]
    if item.name not in GPU_NAMES:
        # Its indices are its own, and no GPU numbers. What Slurm only counts (CNT) has no devices at all.
        return frozenset() if told in ([], ["IDX:N/A"]) and (item.counted or item.count == 0) else None
    if len(told) > 1:
        return None
    if told and told[0].startswith("IDX:"):
        return _indices(item, told[0][4:])
    if told:
        return None if item.name == "gpu" else _shares(item, told[0])
    return frozenset() if item.count == 0 else None


def _fault(items: list[_Item], taken: list[frozenset[int]]) -> str:
    """A contradiction among items that are each in order; "" if there is none."""
    whole = [gpus for item, gpus in zip(items, taken, strict=True) if item.name == "gpu"]
    if sum(map(len, whole)) > len(frozenset().union(*whole)):
        return "the list gives one GPU to two items"
    for name in GPU_NAMES - {"gpu"}:
        mine = [(item, gpus) for item, gpus in zip(items, taken, strict=True) if item.name == name]
        by_place = any("/" in paren for item, _ in mine for paren in item.parens)
        if by_place and len({item.type for item, _ in mine}) > 1 and any(gpus for _, gpus in mine):
            # The places of a list of shares count within its type, so they name no GPU of the node.
            return f"{name} of several types: the places in their lists are not GPU numbers"
    return ""


def read_detail(text: str) -> Detail:
    """What a list of GRES items says about GPUs. `(null)` and nothing at all: none."""
    if text in _NOTHING:
        return Detail(frozenset())
    pieces = _split(text)
    if pieces is None:
        return Detail(None, f"the GRES list {text[-40:]!r} ends in the middle of an item", readable=False)
    items: list[_Item] = []
    for piece in pieces:
        item = _item(piece)
        if item is None:
            return Detail(None, f"{piece[:60]!r} is no GRES item", readable=False)
        if takes_gpus(item.name):
            items.append(item)
    counts: dict[str, int] = {}
    taken: list[frozenset[int]] = []
    why = ""
    # A bare amount under a name that nobody knows: of GPUs, or of what has no devices. So it is no count of GPUs either.
    readable = all(item.name in GPU_NAMES or item.parens or not item.count for item in items)
    for item in items:
        gpus = _gpus(item)
        amount = item.count if item.count is not None else len(gpus or ())
        counts[item.name] = counts.get(item.name, 0) + amount
        if gpus is None:
            why = why or f"{item.name} is in use, but the list does not say surely which GPUs"
        else:
            taken.append(gpus)
    why = why or _fault(items, taken)
    return Detail(None, why, counts, readable) if why else Detail(frozenset().union(*taken), "", counts)


def read_totals(text: str) -> dict[str, int] | None:
    """The amounts of what takes GPUs in a list of totals (`JOB_GRES=`, `Gres=`); None if unreadable.

    A name without an amount counts as one.
    """
    if text in _NOTHING:
        return {}
    pieces = _split(text)
    if pieces is None:
        return None
    totals: dict[str, int] = {}
    for piece in pieces:
        found = _ITEM.match(piece)
        if not found:
            return None
        name, item = found["name"].lower(), _item(piece)
        if takes_gpus(name):
            totals[name] = totals.get(name, 0) + (1 if item is None or item.count is None else item.count)
    return totals


def tres_has_gpu(texts: Iterable[str]) -> bool:
    """Whether a TRES list (`cpu=8,gres/gpu:a100=2`) grants any GPU or share of one.

    Only whether, not how many: typed and untyped entries count the same GPUs twice.
    """
    return any(
        takes_gpus(found[1].lower()) and int(found[2][:15]) > 0 for text in texts for found in _TRES.finditer(text)
    )
