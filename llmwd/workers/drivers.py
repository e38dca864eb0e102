"""The resolver's view of the NVIDIA driver: which GPUs there are, and who is on them besides us.

Every question goes to a disposable process with a deadline, because a driver call can hang in the kernel for ever.
A driver that is there and does not answer makes its GPUs unknown, and so not ours.
"""

import time
from collections.abc import Callable, Container

from llmwd.adapters import procs
from llmwd.adapters.nvml import DriverFailure, GpuInfo, GpuUse, Inventory, Kind, Probe, Use, driver_present
from llmwd.core import patience
from llmwd.core.gpumap import with_lost
from llmwd.core.lease import Occupant
from llmwd.core.patience import Patience
from llmwd.core.release import OnGpu
from llmwd.messages import SourceState
from llmwd.vocab import Holder, Source
from llmwd.workers.base import Shell, repeat_every_s

INVENTORY_EVERY_S = 300.0  # what no reading shows, such as GPUs that got another order with a reloaded driver
SOON_S = 0.1  # between questions while a release waits to be proved
# An idle GPU's driver keeps some hundred MiB for itself. Who has more is somebody, listed or not: another PID namespace,
# a context that is being torn down.
IDLE_MOST_BYTES = 2 << 30


class Driver:
    """`changed()` is called after every answer. server_pid: the holder, whose descendants are ours."""

    def __init__(self, shell: Shell, changed: Callable[[], None]):
        self._shell = shell
        self._changed = changed
        self.server_pid: int | None = None
        settings = shell.boot.settings
        wanted = "auto" in settings.detection or Source.nvml.value in settings.detection
        self.applies = not settings.sim_gpus and driver_present()
        why = "" if self.applies else "GPUs are simulated (SIM_GPUS)" if settings.sim_gpus else "no NVIDIA driver here"
        self._watches = wanted and self.applies
        if self.applies and not wanted:
            why = "not in DETECTION"
        self.state = SourceState(name=Source.nvml, works=False, why=why)
        self._gpus: tuple[GpuInfo, ...] = ()
        self._listed_s: float | None = None  # when the GPUs were listed last, None: they were taken over, or are not known
        self._stale = False  # they may be others by now
        self._patience = Patience()
        self._use: Use | None = None
        self._failure: DriverFailure | None = None
        self._errors: dict[int, str] = {}  # of single GPUs, as told
        self._known: dict[int, int] = {}  # processes of our tree: pid -> start time
        self._dead: frozenset[int] = frozenset()  # unknown and dead already at the last reading
        self._passing: frozenset[int] = frozenset()  # those of them that were new: may have been ours, asked about again
        self._watched: int | None = None
        self._probe = Probe() if self.applies else None

    def adopt(self, gpus: tuple[GpuInfo, ...]) -> None:
        """What our last incarnation knew, until the driver itself has listed its GPUs."""
        if self.applies:
            self._gpus = gpus

    def gpus(self) -> tuple[GpuInfo, ...]:
        """All that the driver lists; uuid "" of one that was lost before it told its name."""
        return self._gpus

    @property
    def listed(self) -> bool:
        """Whether the driver has listed its GPUs to us."""
        return self._listed_s is not None

    def gpus_why(self) -> str:
        """Why it is not known which GPUs there are, or not of all, empty if it is."""
        nameless = [str(gpu.index) for gpu in self._gpus if not gpu.uuid]
        if nameless:
            return f"the driver does not tell the names of its GPUs {', '.join(nameless)} (lost?)"
        if not self.applies or self._gpus:
            return ""
        return f"the driver does not answer: {self._failure.text}" if self._failure else "the driver has not answered yet"

    def grant_why(self, now_s: float) -> str:
        """Why no lease may be granted on what the driver says, empty if one may."""
        if not self.applies:
            return ""
        if self._failure is not None:
            return f"the driver does not answer: {self._failure.text}"
        if not self.listed or self._stale:
            return "the driver has not listed its GPUs yet"
        if self._watches and (self._use is None or now_s - self._use.at_s > 4 * repeat_every_s(self._shell.boot.settings)):
            return "the driver has not said yet who is on the GPUs"
        if self._passing:
            return "the driver lists a process that has just ended, and is being asked again"
        return ""

    def renew_why(self) -> str:
        """Why a lease that was taken over may not be renewed on what the driver says, empty if it may."""
        if self._watches and self._use is None and self._failure is None:
            return "the driver has not said yet who is on the GPUs"
        return ""

    def foreign(self, ours: Container[str]) -> dict[str, Occupant]:
        """Who is on each GPU (UUID) and is not us, or why the driver cannot tell; nothing of those that are free of
        others. ours: GPUs on which memory in use may be ours."""
        if not self._watches:
            return {}
        if self._failure is not None:
            return {gpu.uuid: _unknown(f"the driver does not answer: {self._failure.text}") for gpu in self._gpus if gpu.uuid}
        if self._use is None:
            return {}
        # A GPU that is lost does not even tell its name any more.
        errors = {use.index: use.error for use in self._use.gpus}
        told = {use.uuid: use for use in self._use.gpus if use.uuid}
        found = {gpu.uuid: _unknown(_failed(errors.get(gpu.index, ""))) for gpu in self._gpus if gpu.uuid and gpu.uuid not in told}
        for uuid, use in told.items():
            strangers = self._strangers(use)
            if use.error:
                found[uuid] = _unknown(_failed(use.error))
            elif strangers:
                found[uuid] = Occupant(Holder.other, why=f"process {', '.join(map(str, strangers))} is on it")
            elif not use.processes and uuid not in ours and (use.used_bytes or 0) > IDLE_MOST_BYTES:
                found[uuid] = _unknown(f"{use.used_bytes / 2**30:.1f} GiB are in use there, and the driver lists no process")
        return found

    def shown(self) -> dict[str, OnGpu] | None:
        """What the driver shows of each GPU (by UUID) to judge a release by; None: it is not asked here."""
        if not self._watches:
            return None
        if self._use is None:
            return {}
        error = self._failure.text if self._failure is not None else ""
        return {
            use.uuid: OnGpu(
                at_s=self._use.at_s, ours=tuple(process.pid for process in use.processes if process.pid in self._known),
                strangers=bool(self._strangers(use)), used_bytes=use.used_bytes, error=error or use.error,
            )
            for use in self._use.gpus
        }  # fmt: skip

    def jobs_on(self) -> tuple[float, dict[str, frozenset[str]]]:
        """(when the driver was asked, UUID -> Slurm's ids of the jobs whose processes are on that GPU)."""
        if not self._watches or self._use is None or self._failure is not None:
            return float("-inf"), {}
        return self._use.at_s, {use.uuid: frozenset(job for process in use.processes for job in process.jobs) for use in self._use.gpus}

    def used_bytes(self, uuid: str) -> int | None:
        """Memory in use on that GPU at the last reading, None if not told."""
        return next((use.used_bytes for use in self._use.gpus if use.uuid == uuid), None) if self._use else None

    def beat(self) -> None:
        """Ask the next question, unless one is still open."""
        if self._probe is None:
            return
        now_s = time.monotonic()
        if self._probe.busy:
            if self._probe.overdue(now_s):
                self._heard(self._probe.kill())
            return
        old = self._listed_s is None or self._stale or now_s - self._listed_s > INVENTORY_EVERY_S
        kind: Kind = "inventory" if old else "use"
        within_s = self._patience.inventory_s if old else self._patience.use_s
        if kind == "use" and not self._watches:
            return
        self.learn()
        failure = self._probe.ask(kind, within_s, now_s)
        if failure is not None:
            self._heard(failure)
            return
        # Not only on the slow beat: a driver that hangs is known to hang when its time is over.
        self._shell.at("driver-overdue", now_s + within_s + 0.01, self._overdue)
        if self._probe.fileno() != self._watched:
            self._watched = self._probe.fileno()
            self._shell.watch(self._watched, self._readable)

    def beat_soon(self) -> None:
        """Ask in a moment, apart from the slow beat."""
        if self._watches:
            self._shell.at("driver-soon", time.monotonic() + SOON_S, self.beat)

    def close(self) -> None:
        """Let go of the process that asks."""
        if self._watched is not None:
            self._shell.unwatch(self._watched)
            self._watched = None
        for timer in ("driver-overdue", "driver-soon"):
            self._shell.cancel(timer)
        if self._probe is not None:
            self._probe.close()

    def _overdue(self) -> None:
        if self._probe.overdue(time.monotonic()):
            self._heard(self._probe.kill())

    def _readable(self) -> None:
        answer = self._probe.receive()
        if answer is not None:
            self._heard(answer)

    def _heard(self, answer: Inventory | Use | DriverFailure) -> None:
        listed = isinstance(answer, Inventory)
        match answer:
            case Inventory():
                self._gpus = with_lost(self._gpus, answer.gpus) if self.listed else answer.gpus
                self._listed_s, self._stale = time.monotonic(), False
                if not self._watches:  # else who is on them has to be told as well
                    self._failure = None
            case Use():
                self._take_use(answer)
            case DriverFailure():
                if self._failure is None:
                    self._shell.log.error("the NVIDIA driver does not answer: %s", answer.text)
                self._failure, self._stale = answer, True  # it may come back with other GPUs
                self._patience = patience.failed()
                if self._watched is not None:
                    self._shell.unwatch(self._watched)
                    self._watched = None
        if not isinstance(answer, DriverFailure):
            self._patience = patience.answered(self._patience, listed, time.monotonic() - answer.at_s)
            self._tell_errors(answer)
        works = self._failure is None and self._watches
        why = f"{self._failure.name}: {self._failure.text}" if self._failure else self.state.why
        self.state = SourceState(name=Source.nvml, works=works, why="" if works else why)
        self._changed()
        if listed and self._gpus:
            self.beat()

    def _tell_errors(self, answer: Inventory | Use) -> None:
        """A single GPU that fails is no failure of the driver: say it once."""
        errors = {gpu.index: gpu.error for gpu in answer.gpus if gpu.error}
        for index, error in errors.items():
            if self._errors.get(index) != error:
                self._shell.log.error("GPU %d of the driver's counts as in use: %s", index, _failed(error))
        self._errors = errors

    def _take_use(self, use: Use) -> None:
        # Our tree is looked at before the question and after the answer: what is new in between is ours as well.
        self.learn()
        listed = {process.pid for gpu in use.gpus for process in gpu.processes}
        self._known = {pid: start for pid, start in self._known.items() if pid in listed or procs.alive(pid, start)}
        for pid in listed & self._known.keys():
            found = procs.stat(pid)
            if found is not None and found.start != self._known[pid]:
                del self._known[pid]  # the number is another process's by now
        unknown = listed - self._known.keys()
        dead = frozenset(pid for pid in unknown if (found := procs.stat(pid)) is None or found.dead)
        # It began and ended within the question: perhaps a helper of our tree, and then it is not listed again.
        self._dead, self._passing = dead, dead - self._dead
        self._use, self._failure = use, None
        now, then = [_identity(gpu) for gpu in use.gpus], [_identity(gpu) for gpu in self._gpus]
        # One that is lost has no name, and is the one that it was.
        self._stale = len(now) != len(then) or any(a != b for a, b in zip(now, then) if a[1])
        if self._passing:
            self.beat_soon()

    def _strangers(self, use: GpuUse) -> list[int]:
        return [
            process.pid for process in use.processes if process.pid not in self._known and process.pid not in self._passing
        ]

    def learn(self) -> None:
        """Remember the processes of our tree: the driver may list one that ends before it is asked again."""
        if self._watches and self.server_pid is not None:
            self._known |= {pid: found.start for pid, found in procs.walk(self.server_pid)}


def _identity(gpu: GpuInfo | GpuUse) -> tuple[int, str, bool, tuple[str, ...]]:
    return gpu.index, gpu.uuid, gpu.mig, gpu.mig_uuids


def _unknown(why: str) -> Occupant:
    return Occupant(Holder.unknown, why=why)


def _failed(error: str) -> str:
    return f"the driver says {error} of it" if error else "the driver does not name it any more"
