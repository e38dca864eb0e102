"""Which CPUs the model's processes run on: near the leased GPUs, and off the cores that Slurm gave to jobs.

What Slurm gave is read from what job processes may run on. A job that may run everywhere says nothing by that.
Of `CPU_IDs` in Slurm's own words no use is made: they count cores in Slurm's order, which is the kernel's only on
some machines.
"""

from collections.abc import Iterable, Mapping

import msgspec

BESIDE_GPUS = 2  # vLLM wants a core for each GPU's worker, one for the engine and one for the API server


class Choice(msgspec.Struct, frozen=True):
    """cpus: what to run on, never empty unless nothing is allowed; why: in words."""

    cpus: frozenset[int]
    why: str


def cpu_list(text: str) -> frozenset[int]:
    """`0-3,8` as a set; empty for "". Raises ValueError for what is no such list."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, dash, last = part.partition("-")
        cpus |= set(range(int(first), int(last if dash else first) + 1))
    return frozenset(cpus)


def fewest(allowed: int, gpus: int) -> int:
    """So many CPUs are needed: 2 and one for each GPU, or half of a machine that is smaller than that."""
    return max(1, min(BESIDE_GPUS + gpus, allowed // 2))


def choose(
    allowed: frozenset[int], nodes: Mapping[int, frozenset[int]], jobs: Mapping[str, Iterable[frozenset[int]]], gpus: int
) -> Choice:
    """CPUs for a server on `gpus` GPUs. nodes: NUMA nodes of these GPUs, with their CPUs; jobs: what the processes of
    each job may run on.

    Best first: near the GPUs and off the jobs' cores; off the jobs' cores; near the GPUs; all. Off the jobs' cores
    counts more than near the GPUs, because only the first is to anybody else's good.
    """
    near = frozenset().union(*nodes.values()) & allowed
    place = f"NUMA node{'s' if len(nodes) > 1 else ''} {','.join(map(str, sorted(nodes)))}" if near else "any NUMA node"
    near = near or allowed
    told = {job: [cpus for cpus in lists if not allowed <= cpus] for job, lists in jobs.items()}
    taken = {job: frozenset().union(*lists) & allowed for job, lists in told.items()}
    theirs = frozenset().union(*taken.values())
    names = ", ".join(sorted(job for job, cpus in taken.items() if cpus))
    beside = f"off the cores of job{'s' if ',' in names else ''} {names}"
    enough = fewest(len(allowed), gpus)
    if not theirs:
        return Choice(near, place) if len(near) >= enough else Choice(allowed, f"{place} has too few CPUs: all are used")
    if len(near - theirs) >= enough:
        return Choice(near - theirs, f"{place}, {beside}")
    if len(allowed - theirs) >= enough:
        return Choice(allowed - theirs, beside)
    if len(near) >= enough:
        return Choice(near, f"{place}; too few are left {beside}")
    return Choice(allowed, f"all; too few are left {beside}")
