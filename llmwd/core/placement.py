"""Which of the free GPUs to take: the best interconnect first, then the highest indices.

Slurm fills a node from its lowest index, so a lease on the highest ones is asked back last. A tensor-parallel
model on GPUs without NVLink between them, or on two NUMA nodes, is slower all the time, so that counts more.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from math import comb
from typing import TypeVar

from llmwd.core.gpumap import GpuLike

Gpu = TypeVar("Gpu", bound=GpuLike)

EXACT_UP_TO = 1000  # sets that are all compared; 12 GPUs choose 6 are 924. A few milliseconds at most


def choose(free: Sequence[Gpu], n: int, rank: Mapping[str, int] | None = None) -> tuple[Gpu, ...] | None:
    """`n` of the free GPUs, lowest index first; None if there are fewer, or n < 1.

    rank: UUID -> Slurm's index (`GpuMap.likely`); NVML's index without it. The best set has the most pairs with
    NVLink, then the most pairs on one NUMA node, then the highest indices. Beyond EXACT_UP_TO sets, one set is
    grown from each GPU and the best of those taken: the best of all wherever NVLink joins whole groups.
    The same GPUs give the same answer, whatever their order.
    """
    if n < 1 or n > len(free):
        return None
    ranks = rank or {}
    gpus = sorted(free, key=lambda gpu: (ranks.get(gpu.uuid, gpu.index), gpu.uuid), reverse=True)
    linked = [_mask(j for j, b in enumerate(gpus) if b.index in a.nvlink or a.index in b.nvlink) for a in gpus]
    near = [_mask(j for j, b in enumerate(gpus) if a.numa is not None and a.numa == b.numa) for a in gpus]

    def quality(chosen: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
        mask = _mask(chosen)
        return (
            sum((linked[i] & mask).bit_count() for i in chosen),
            sum((near[i] & mask).bit_count() for i in chosen),
            tuple(-i for i in chosen),  # positions ascend from the highest index
        )

    def grown(seed: int) -> tuple[int, ...]:
        chosen, mask = [seed], 1 << seed
        while len(chosen) < n:
            rest = (i for i in range(len(gpus)) if not mask >> i & 1)
            best = max(rest, key=lambda i: ((linked[i] & mask).bit_count(), (near[i] & mask).bit_count(), -i))
            chosen.append(best)
            mask |= 1 << best
        return tuple(sorted(chosen))

    everything = range(len(gpus))
    few = comb(len(gpus), n) <= EXACT_UP_TO
    sets: Iterable[tuple[int, ...]] = combinations(everything, n) if few else (grown(seed) for seed in everything)
    best = max(sets, key=quality)
    return tuple(gpus[i] for i in reversed(best))


def _mask(bits: Iterable[int]) -> int:
    mask = 0
    for bit in bits:
        mask |= 1 << bit
    return mask
