"""How the model's processes stand back behind the jobs beside them: a part of the vLLM manager's shell.

The holder sets it all at the start. Only the CPUs change while the server lives, as jobs come and go: then every
thread of the tree is moved from here, one process in a turn of the loop, so that no yield waits for it.
"""

import time
from collections.abc import Iterator

from llmwd.adapters import courtesy, numa, procs
from llmwd.config import Settings
from llmwd.core.affinity import Choice, choose, cpu_list
from llmwd.messages import Courtesy, GpusFact, JobsFact
from llmwd.workers.base import Shell

PASSES = 2  # what is forked during the first may have the old CPUs
OFF = "off"


class Neighbour:
    """`wish` for a start, `beat` while it lives; `found` and `detail` are shown."""

    def __init__(self, shell: Shell):
        self._shell = shell
        self._jobs: dict[str, tuple[str, ...]] = {}
        self._confined: frozenset[int] | None = None
        self._passes = 0
        self._walk: Iterator[tuple[int, procs.Stat]] = iter(())
        self._read_of: tuple[object, ...] = ()
        self.found: Courtesy | None = None
        self.detail = ""

    def on_jobs(self, fact: JobsFact) -> None:
        here = {job.id for job in fact.jobs}
        self._jobs = {id: sum((job.lists for job in fact.cpus if job.id == id), ()) for id in here & {job.id for job in fact.cpus}}

    def wish(self, settings: Settings, gpus: GpusFact, indices: tuple[int, ...]) -> Courtesy:
        """For a server that is about to start on these GPUs."""
        choice = self._choose(settings, gpus, indices)
        self._confined, self._passes, self.detail = choice.cpus, 0, choice.why
        level = None if settings.io_priority == OFF else int(settings.io_priority)
        return Courtesy(
            nice=settings.nice, oom_score_adj=settings.oom_score_adj, io_priority=level, cpus=tuple(sorted(choice.cpus)),
        )

    def read(self, pid: int | None, when: object) -> None:
        """Ask the kernel anew how the server stands, if `when` is another than the last time."""
        if (pid, when) != self._read_of:
            self._read_of = (pid, when)
            told = courtesy.found(pid) if pid is not None else None
            self.found = None if told is None else Courtesy(**{**told, "cpus": tuple(told["cpus"])})

    def beat(self, settings: Settings, gpus: GpusFact | None, indices: tuple[int, ...], holder_pid: int) -> None:
        """Move the living tree if other CPUs are right by now."""
        self._read_of = ()
        if gpus is None:
            return
        choice = self._choose(settings, gpus, indices)
        self.detail = choice.why
        if self._confined is None and self.found is not None:  # taken over from our last incarnation
            self._confined = frozenset(self.found.cpus)
        if choice.cpus != self._confined:
            self._shell.log.info("CPUs of the model's processes from now on: %s (%s)", sorted(choice.cpus), choice.why)
            self._confined, self._passes = choice.cpus, PASSES
        if self._passes:
            self._passes -= 1
            self._walk = procs.walk(holder_pid)
            self._move()

    def _move(self) -> None:
        for pid, seen in self._walk:
            if procs.alive(pid, seen.start):
                courtesy.confine(pid, self._confined)
            self._shell.at("confine", time.monotonic(), self._move)
            return

    def gone(self) -> None:
        """The tree has ended."""
        self._shell.cancel("confine")
        self._walk, self._confined, self._passes = iter(()), None, 0
        self.read(None, None)

    def _choose(self, settings: Settings, gpus: GpusFact, indices: tuple[int, ...]) -> Choice:
        allowed = numa.allowed_cpus()
        if settings.cpu_affinity == OFF:
            return Choice(allowed, "CPU_AFFINITY=off")
        near = {gpu.numa for gpu in gpus.gpus if gpu.index in indices and gpu.numa is not None}
        nodes = {node: cpus for node in near if (cpus := _cpus(numa.node_cpus(node)))}
        jobs = {job: [_cpus(text) for text in lists] for job, lists in self._jobs.items()}
        return choose(allowed, nodes, jobs, len(indices))


def _cpus(text: str) -> frozenset[int]:
    try:
        return cpu_list(text)
    except ValueError:  # the kernel writes no such thing: it tells us nothing
        return frozenset()
