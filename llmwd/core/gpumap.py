"""From Slurm's index of a GPU to the GPU: exactly where it is certain, the union of the candidates where it is not.

A GRES index is a position in slurmd's own device order. That is PCI order with AutoDetect=nvml, the order of
the minor numbers with AutoDetect=nvidia or a File= list, and grouped by type where gres.conf has types: none of
them is NVML's index or CUDA's by right. Where every rule names the same GPU the map is certain. Elsewhere an
index stands for every GPU that some rule names, and so a job on it takes all of those from us: too many given
back is a loss, too few would hurt a job.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, permutations
from typing import Protocol, TypeVar

import msgspec

GROUPS_MAX = 5  # 120 orders of types; a node with more kinds of GPU counts as "any order"


class GpuLike(Protocol):
    """What is known of one GPU. `index`: NVML's; `pci`: domain:bus:device.function in hex; `name`: the model."""

    @property
    def index(self) -> int: ...
    @property
    def uuid(self) -> str: ...
    @property
    def minor(self) -> int | None: ...
    @property
    def pci(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def mig(self) -> bool: ...
    @property
    def mig_uuids(self) -> tuple[str, ...]: ...
    @property
    def nvlink(self) -> tuple[int, ...]: ...
    @property
    def numa(self) -> int | None: ...


Named = TypeVar("Named", bound=GpuLike)


class SimGpu(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU that is not there, for machines without a driver."""

    index: int
    uuid: str
    minor: int | None
    pci: str
    name: str = "simulated"
    mig: bool = False
    mig_uuids: tuple[str, ...] = ()
    nvlink: tuple[int, ...] = ()
    numa: int | None = None


def simulated(count: int) -> tuple[SimGpu, ...]:
    """`count` simulated GPUs: index, minor and PCI order are the same, UUIDs are SIM-0, SIM-1, ..."""
    return tuple(SimGpu(index=i, uuid=f"SIM-{i}", minor=i, pci=f"0000:{i + 1:02x}:00.0") for i in range(count))


def with_lost(before: Sequence[Named], now: Sequence[Named]) -> tuple[Named, ...]:
    """What the driver lists now, with the names of GPUs that are lost since: such a one does not tell its own any more,
    and is still the one at its place as long as the others are at theirs."""
    if [gpu.index for gpu in before] != [gpu.index for gpu in now]:
        return tuple(now)
    if any(new.uuid and new.uuid != old.uuid for old, new in zip(before, now)):
        return tuple(now)
    return tuple(new if new.uuid else old for old, new in zip(before, now))


class GpuMap(msgspec.Struct, frozen=True, kw_only=True):
    """Which GPUs (UUIDs) each of Slurm's indices can mean.

    certain: each index in `by_index` means one GPU, the whole of it even where the index is a MIG slice.
    likely: UUID -> one index for each GPU, all different. Exact where `certain` (the lowest of a MIG GPU's
    slices); elsewhere the PCI position: good for showing and for preferring high indices, never for deciding.
    """

    certain: bool
    by_index: dict[int, tuple[str, ...]]
    why: str
    uuids: tuple[str, ...]
    likely: dict[str, int]
    sim: bool = False

    def claimed(self, indices: Iterable[int] | None) -> frozenset[str]:
        """UUIDs of the GPUs that a job with these indices may have. None (not known): all of them.

        An index outside the map may be any GPU; but of simulated GPUs, Slurm's first ones, it is none: the
        node's real Slurm may well have more.
        """
        if indices is None:
            return frozenset(self.uuids)
        outside = () if self.sim else self.uuids
        return frozenset(chain.from_iterable(self.by_index.get(index, outside) for index in indices))


def contradiction(gpu_map: GpuMap, indices: Mapping[str, Iterable[int]], on: Mapping[str, Iterable[str]]) -> str:
    """Why the map must be wrong, one sentence, empty while nothing speaks against it.

    indices: job id -> Slurm's indices of its GPUs, for jobs that are known exactly; on: UUID -> ids of the jobs
    whose processes the driver shows there. A job's process on a GPU that the map does not give to the job means
    that another job's may as well be on one that the map calls free.
    """
    for uuid, jobs in on.items():
        for job in jobs:
            if job in indices and uuid not in gpu_map.claimed(indices[job]):
                has = ",".join(map(str, sorted(indices[job]))) or "none"
                return (
                    f"job {job} has Slurm's GPU {has} and a process on {uuid}, which is GPU {gpu_map.likely.get(uuid)} "
                    "here: set GPU_MAP in etc/config.env"
                )
    return ""


def build_map(
    gpus: Sequence[GpuLike],
    slurm_total: int | None,
    slurm_types: int | None,
    gpu_map: Mapping[int, str | int],
    sim: bool,
    type_counts: Sequence[int] = (),
) -> GpuMap:
    """The map for this node.

    slurm_total: how many GPUs the node's `Gres=` counts; slurm_types: how many types it names (0: untyped).
    None where Slurm did not say: then any index may be any GPU. type_counts: how many GPUs it gives each type, in any
    order; (): not told. gpu_map: the operator's GPU_MAP, Slurm's index
    -> UUID (a MIG device's stands for its GPU) or NVML index; it settles everything unless it is wrong.
    """
    if sim:
        return _exact(gpus, {gpu.index: gpu.uuid for gpu in gpus}, "simulated GPUs are numbered as Slurm's", sim=True)
    if gpu_map:
        named, problems = _operators(gpus, slurm_total, gpu_map)
        return _any(gpus, slurm_total, "; ".join(problems)) if problems else _exact(gpus, named, "GPU_MAP says so")
    obstacle = _obstacle(gpus, slurm_total, slurm_types, type_counts)
    if obstacle:
        return _any(gpus, slurm_total, obstacle)
    orders = [tuple(gpu.uuid for gpu in order) for order in _orders(gpus, slurm_types)]
    if len(set(orders)) == 1:
        why = "PCI order, minor numbers, NVML's order and Slurm's count agree"
        return _exact(gpus, dict(enumerate(orders[0])), why)
    return GpuMap(
        certain=False,
        by_index={index: tuple(sorted(set(names))) for index, names in enumerate(zip(*orders, strict=True))},
        why="the order of Slurm's GPUs is not certain (PCI order, minor numbers, NVML's order and types differ): "
        "every GPU that an index can mean counts as taken; GPU_MAP in etc/config.env settles it",
        uuids=_uuids(gpus),
        likely=_positions(gpus),
    )


def _obstacle(gpus: Sequence[GpuLike], slurm_total: int | None, slurm_types: int | None, type_counts: Sequence[int]) -> str:
    """Why not even candidates can be told, or nothing."""
    names = Counter(gpu.name for gpu in gpus)
    settle = "any index may be any GPU; GPU_MAP in etc/config.env settles it"
    if slurm_total is None:
        return f"Slurm did not say how many GPUs this node has: {settle}"
    cut = any(gpu.mig or gpu.mig_uuids for gpu in gpus)
    if slurm_total != len(gpus) and not cut:
        return f"Slurm counts {slurm_total} GPUs here, the driver {len(gpus)}; numbers may be shifted: {settle}"
    if cut:
        # Slices are numbered after the whole GPUs, in place, or by profile, depending on gres.conf.
        return f"GPUs are cut into MIG slices, which Slurm numbers in more than one way: {settle}"
    if any(not gpu.uuid for gpu in gpus) or len({gpu.uuid for gpu in gpus}) < len(gpus):
        return f"the driver does not name every GPU (one may be lost): {settle}"
    if len(gpus) == 1:
        return ""
    if any(gpu.minor is None or pci_key(gpu.pci) is None for gpu in gpus):
        return f"the driver does not tell every GPU's minor number and PCI address: {settle}"
    if slurm_types is None:
        return f"Slurm did not say which types of GPU this node has: {settle}"
    if slurm_types > 1 and (slurm_types != len(names) or len(names) > GROUPS_MAX):
        return f"Slurm has {slurm_types} types of GPU here and the driver {len(names)}: {settle}"
    if slurm_types > 1 and type_counts and sorted(type_counts) != sorted(names.values()):
        # Then its types are not the driver's names, and which GPU has which cannot be told.
        return f"Slurm's types of GPU here are not the driver's ({_counted(type_counts)} and {_counted(names.values())} GPUs): {settle}"
    return ""


def _counted(counts: Iterable[int]) -> str:
    return "+".join(map(str, sorted(counts, reverse=True)))


def _orders(gpus: Sequence[GpuLike], slurm_types: int | None) -> Iterable[list[GpuLike]]:
    """Every order that slurmd may have numbered these GPUs in."""
    keys = (lambda gpu: pci_key(gpu.pci) or (), lambda gpu: gpu.minor or 0, lambda gpu: gpu.index)
    for key in keys:
        by_key = sorted(gpus, key=key)
        yield by_key
        if slurm_types is not None and slurm_types > 1:
            for names in permutations(sorted({gpu.name for gpu in gpus})):
                yield [gpu for name in names for gpu in by_key if gpu.name == name]


def _operators(
    gpus: Sequence[GpuLike], slurm_total: int | None, gpu_map: Mapping[int, str | int]
) -> tuple[dict[int, str], list[str]]:
    """GPU_MAP with UUIDs for values, and what is wrong with it, one sentence each."""
    by_name: dict[str | int, GpuLike] = {}
    for gpu in gpus:
        by_name |= dict.fromkeys((gpu.index, str(gpu.index), gpu.uuid, *gpu.mig_uuids), gpu)
    named: dict[int, str] = {}
    problems = []
    for index, name in sorted(gpu_map.items()):
        gpu = by_name.get(name)
        if gpu is None or not gpu.uuid:
            problems.append(f"GPU_MAP gives {name} for index {index}, and the driver has no such GPU")
        elif gpu.uuid in named.values() and not gpu.mig_uuids:
            problems.append(f"GPU_MAP gives {name} for more than one index")
        else:
            named[index] = gpu.uuid
    if slurm_total is not None:
        missing = sorted(set(range(slurm_total)) - set(gpu_map))
        beyond = sorted(set(gpu_map) - set(range(slurm_total)))
        if missing:
            problems.append(f"GPU_MAP leaves out index {', '.join(map(str, missing))}")
        if beyond:
            problems.append(f"GPU_MAP has index {', '.join(map(str, beyond))}, and Slurm counts {slurm_total} GPUs")
    return named, problems


def _exact(gpus: Sequence[GpuLike], named: dict[int, str], why: str, sim: bool = False) -> GpuMap:
    likely: dict[str, int] = {}
    for index, uuid in sorted(named.items()):
        likely.setdefault(uuid, index)
    spare = max(named, default=-1) + 1  # GPUs that Slurm does not have come after its own
    for uuid in _positions(gpus):
        if uuid not in likely:
            likely[uuid] = spare
            spare += 1
    by_index: dict[int, tuple[str, ...]] = {index: (uuid,) for index, uuid in named.items()}
    return GpuMap(certain=True, by_index=by_index, why=why, uuids=_uuids(gpus), likely=likely, sim=sim)


def _any(gpus: Sequence[GpuLike], slurm_total: int | None, why: str) -> GpuMap:
    every = _uuids(gpus)
    count = len(gpus) if slurm_total is None else slurm_total
    by_index = dict.fromkeys(range(count), every)
    return GpuMap(certain=False, by_index=by_index, why=why, uuids=every, likely=_positions(gpus))


def _uuids(gpus: Sequence[GpuLike]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(gpu.uuid for gpu in gpus if gpu.uuid))


def _positions(gpus: Sequence[GpuLike]) -> dict[str, int]:
    told = all(pci_key(gpu.pci) for gpu in gpus)  # a lost GPU does not tell where it is
    ordered = sorted(gpus, key=lambda gpu: (pci_key(gpu.pci) if told else (), gpu.index))
    return {gpu.uuid: position for position, gpu in enumerate(ordered) if gpu.uuid}


def pci_key(pci: str) -> tuple[int, ...] | None:
    """A PCI address ("00000000:1B:00.0") as numbers that sort in PCI order; None if it is none."""
    try:
        numbers = tuple(int(part, 16) for part in pci.replace(".", ":").split(":"))
    except ValueError:
        return None
    return numbers if len(numbers) == 4 else None
