"""The resolver's GPUs and the map from Slurm's indices to them, from what the driver and Slurm say, or said before.

A resolver that begins anew knows neither for a moment. Until both have told theirs it goes on with what its last
incarnation published: without it, a death of ours would cost the model, and a prolog would be told that nothing of ours
is on GPUs that nobody knows yet.
"""

from collections.abc import Iterable

from llmwd.adapters import procs
from llmwd.adapters.nvml import GpuInfo
from llmwd.adapters.rundir import read_fact
from llmwd.config import Settings
from llmwd.core.claims import JobView
from llmwd.core.gpumap import GpuLike, GpuMap, build_map, contradiction, simulated
from llmwd.messages import Envelope, Gpu, GpusFact, ServerFact
from llmwd.vocab import Worker
from llmwd.workers.base import Shell
from llmwd.workers.drivers import Driver
from llmwd.workers.slurmdesk import SlurmDesk


class NodeGpus:
    """`gpus` and `map` hold until refresh() finds others."""

    def __init__(self, shell: Shell, desk: SlurmDesk, driver: Driver, adopted: GpusFact | None):
        self._shell = shell
        self._desk = desk
        self._driver = driver
        self._adopted = adopted if driver.applies else None
        self._told = ""
        self._wrong_s: float | None = None  # when the driver first showed what contradicts the map
        self._map_of: object = None
        self.gpus: tuple[GpuLike, ...] = ()
        self.map = GpuMap(certain=False, by_index={}, why="not known yet", uuids=(), likely={})
        if self._adopted is not None:
            driver.adopt(tuple(GpuInfo(index=gpu.index, uuid=gpu.uuid, minor=gpu.minor, numa=gpu.numa) for gpu in adopted.gpus))
            driver.server_pid = _holder_of(read_fact(shell.boot.runtime, Worker.vllm))
        self.refresh(shell.boot.settings)

    def refresh(self, settings: Settings) -> None:
        """Look whether the driver, Slurm or the settings say something new."""
        sim, node = bool(settings.sim_gpus), self._desk.node
        gpus = simulated(settings.sim_gpus) if sim else self._driver.gpus()
        map_of = (gpus, node, self._desk.applies, self._driver.listed, settings.gpu_map)
        if map_of == self._map_of:
            return
        self.gpus, self._map_of = gpus, map_of
        settled = sim or node is not None or not self._desk.applies or bool(settings.gpu_map)
        if self._adopted is not None and not (self._driver.listed and settled) and _names(self._adopted.gpus) == _names(gpus):
            self.map = _map_of(self._adopted)
            return
        self._adopted = None
        total, types, counts = (node.gpus, node.types, node.counts) if node is not None else (None, None, ())
        if node is None and not self._desk.applies:
            total, types = len(gpus), 0  # no Slurm to disagree with
        self.map = build_map(gpus, total, types, settings.gpu_map, sim, counts)
        # Before the driver and Slurm have said anything, a map is only a list of what is not known yet.
        if not gpus or not settled:
            self._told = ""
        elif self.map.why != self._told:
            self._told = self.map.why
            self._shell.log.info("%d GPUs; %s", len(gpus), self.map.why)

    def contradicted(self, views: Iterable[JobView]) -> str:
        """Why the map must be wrong, by two readings of the driver that came after the jobs' GPUs were known: an id may be
        another run's by now."""
        read_s, jobs_on = self._driver.jobs_on()
        known = {view.id: view.gpus for view in views if view.gpus is not None and not view.pending and (view.resolved_s or 0.0) < read_s}
        wrong = contradiction(self.map, known, jobs_on)
        if not wrong:
            self._wrong_s = None
            return ""
        if self._wrong_s is None:
            self._wrong_s = read_s
            self._driver.beat_soon()
        return wrong if read_s > self._wrong_s else ""

    def holding(self, server: ServerFact | None) -> frozenset[str]:
        """UUIDs of the GPUs on which processes of ours may be."""
        if server is None:
            return frozenset()
        by_index = {index: uuid for uuid, index in self.map.likely.items()}
        if not by_index.keys() >= set(server.holding):
            return frozenset(self.map.uuids)  # held by a number that is on no map any more: anywhere
        return frozenset(by_index[index] for index in server.holding)

    def unknown_why(self) -> str:
        """Why it is not known which GPUs there are, empty if it is."""
        return "" if self.map.uuids else self._driver.gpus_why() or "it is not known yet which GPUs this node has"


def _map_of(fact: GpusFact) -> GpuMap:
    likely = {gpu.uuid: gpu.index for gpu in fact.gpus if gpu.uuid}
    return GpuMap(certain=fact.map_certain, by_index=fact.map_by_index, why=fact.map_why, uuids=tuple(likely), likely=likely)


def _names(gpus: Iterable[Gpu | GpuLike]) -> set[str]:
    return {gpu.uuid for gpu in gpus}


def _holder_of(envelope: Envelope | None) -> int | None:
    """The holder's pid by the manager's last fact, if that is still a holder: its tree is ours on the driver's list."""
    pid = envelope.fact.holder_pid if envelope is not None and isinstance(envelope.fact, ServerFact) else None
    return pid if pid is not None and procs.cmdline(pid).startswith(b"llmwd: holder") else None
