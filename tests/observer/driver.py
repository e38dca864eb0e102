"""What the stand-in driver's world says against our being on a GPU: read from its file, not from the driver.

The file's language is told in tests/fakes/nvml/libnvidia_ml.c. GPUs are numbered as their lines are.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.observer.sight import Job

ANSWER_S = 1.5  # for an answer, and what it leads to
HANG_S = 5.0  # how long it is waited for
IDLE_MOST_BYTES = 2 << 30
_WORD = re.compile(r"(\w+)=(\S+)")


@dataclass
class DriverSight:
    """world: its file. start_of(pid): the start time of a living process, None of another. ttl_s: LEASE_TTL, in each
    quarter of which there is a question to the driver."""

    world: Path
    start_of: Callable[[int], int | None]
    ttl_s: float
    troubles: dict[str, Job] = field(default_factory=dict)

    def look(self, now_s: float, ours: set[int], served: frozenset[int]) -> dict[str, Job]:
        """What is against us, by its words, each since it was first seen. ours: pids; served: GPUs with a server of ours."""
        try:
            lines = self.world.read_text().splitlines()
        except OSError:
            return self.troubles
        found: dict[str, Job] = {}

        def against(what: str, gpu: int, hangs_s: float = 0.0, starts_only: bool = False) -> None:
            name = f"{what} on GPU {gpu}"
            slow_s = self.ttl_s / 4 + ANSWER_S + hangs_s
            found[name] = self.troubles.get(name) or Job(frozenset([gpu]), now_s, slow_s, starts_only)

        gpus = [dict(_WORD.findall(line)) for line in lines if line.startswith("gpu ")]
        forgotten = {int(dict(_WORD.findall(line))["pid"]) for line in lines if line.startswith("forget ")}
        for line in lines:
            kind, _, rest = line.partition(" ")
            words = dict(_WORD.findall(line))
            where = [int(words["gpu"])] if "gpu" in words else range(len(gpus))
            if kind in ("contexts", "process"):
                for gpu, pid in self._listed(kind, words, [each["uuid"] for each in gpus]):
                    if pid not in ours and pid not in forgotten:
                        against(f"the stranger {pid}", gpu)
                    elif pid not in ours and gpu not in served:
                        against(f"the memory of the forgotten stranger {pid}", gpu, starts_only=True)
            elif kind == "hang":
                for gpu in where:
                    against("a driver that hangs", gpu, HANG_S)
            elif kind == "fail":
                for gpu in where:
                    against(f"a driver that says {rest.split()[1]}", gpu)
            elif kind == "mig":
                against("slices", int(words["gpu"]), starts_only=True)
        for gpu, words in enumerate(gpus):
            if int(words.get("used", 0)) > IDLE_MOST_BYTES and (gpu not in served or f"memory on GPU {gpu}" in self.troubles):
                against("memory", gpu, starts_only=True)
        self.troubles = found
        return found

    def _listed(self, kind: str, words: dict[str, str], uuids: list[str]) -> list[tuple[int, int]]:
        """(GPU, pid) of the living processes of that line. A dead one that stays on the list is nobody."""
        if kind == "process":
            pid = int(words["pid"])
            return [(int(words["gpu"]), pid)] if self.start_of(pid) is not None else []
        found = []
        for name in os.listdir(words["folder"]):
            uuid, pid, start = name.split(".")
            if self.start_of(int(pid)) == int(start):
                found.append((uuids.index(uuid), int(pid)))
        return found
