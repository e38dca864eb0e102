"""Which CPUs are near which memory, as the kernel tells it."""

import os
from pathlib import Path

NODES = Path("/sys/devices/system/node")


def node_cpus(node: int, folder: Path = NODES) -> str:
    """The CPUs of a NUMA node as the kernel writes them ("0-15,32-47"); "" where it does not tell."""
    try:
        return (folder / f"node{node}" / "cpulist").read_text().strip()
    except OSError:
        return ""


def allowed_cpus() -> frozenset[int]:
    """The CPUs that we may run on ourselves: never is anything of ours sent elsewhere."""
    return frozenset(os.sched_getaffinity(0))
