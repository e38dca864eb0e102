"""The resolver's view of the NVIDIA driver: which GPUs there are, and who is on them besides us.

Every question goes to a disposable process with a deadline, because a driver call can hang in the kernel for ever.
A driver that is there and does not answer makes its GPUs unknown, and so not ours.
"""

import time
from collections.abc import Callable

from llmwd.adapters import procs
from llmwd.adapters.nvml import DriverFailure, GpuInfo, GpuUse, Inventory, Probe, Use, driver_present
from llmwd.core.release import OnGpu
from llmwd.messages import SourceState
from llmwd.vocab import Source
from llmwd.workers.base import Shell, repeat_every_s

INVENTORY_WITHIN_S = 20.0  # without persistence mode the first call initialises every GPU
USE_WITHIN_S = 5.0
SOON_S = 0.1  # between questions while a release waits to be proved


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
        self._use: Use | None = None
        self._failure: DriverFailure | None = None
        self._known: dict[int, int] = {}  # processes of our tree: pid -> start time
        self._dead: frozenset[int] = frozenset()  # unknown and dead already at the last reading
        self._passing: frozenset[int] = frozenset()  # those of them that were new: may have been ours, asked about again
        self._watched: int | None = None
        self._probe = Probe() if self.applies else None

    def gpus(self) -> tuple[GpuInfo, ...]:
        return self._gpus

    def grant_why(self, now_s: float) -> str:
        """Why no lease may be granted on what the driver says, empty if one may."""
        if not self.applies:
            return ""
        if self._failure is not None:
            return f"the driver does not answer: {self._failure.text}"
        if not self._gpus:
            return "the driver has not been asked yet"
        if self._watches and (self._use is None or now_s - self._use.at_s > 4 * repeat_every_s(self._shell.boot.settings)):
            return "the driver has not said yet who is on the GPUs"
        if self._passing:
            return "the driver lists a process that has just ended, and is being asked again"
        return ""

    def foreign(self) -> dict[str, str]:
        """UUID -> who is on that GPU and is not ours; "" where the driver cannot say."""
        if not self._watches:
            return {}
        if self._failure is not None:
            return {gpu.uuid: "" for gpu in self._gpus}
        if self._use is None:
            return {}
        # A GPU that is lost does not even tell its name any more.
        told = {use.uuid for use in self._use.gpus}
        found = {gpu.uuid: "" for gpu in self._gpus if gpu.uuid not in told}
        for use in self._use.gpus:
            strangers = self._strangers(use)
            if use.error and use.uuid:
                found[use.uuid] = ""
            elif strangers:
                found[use.uuid] = f"process {', '.join(map(str, strangers))} is on it"
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

    def jobs_on(self) -> dict[str, frozenset[str]]:
        """UUID -> Slurm's ids of the jobs whose processes are on that GPU."""
        if not self._watches or self._use is None or self._failure is not None:
            return {}
        return {use.uuid: frozenset(job for process in use.processes for job in process.jobs) for use in self._use.gpus}

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
        kind, within_s = ("use", USE_WITHIN_S) if self._gpus else ("inventory", INVENTORY_WITHIN_S)
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

    def _overdue(self) -> None:
        if self._probe.overdue(time.monotonic()):
            self._heard(self._probe.kill())

    def _readable(self) -> None:
        answer = self._probe.receive()
        if answer is not None:
            self._heard(answer)

    def _heard(self, answer: Inventory | Use | DriverFailure) -> None:
        first = not self._gpus
        match answer:
            case Inventory():
                self._gpus, self._failure = tuple(gpu for gpu in answer.gpus if gpu.uuid), None
            case Use():
                self._take_use(answer)
            case DriverFailure():
                if self._failure is None:
                    self._shell.log.error("the NVIDIA driver does not answer: %s", answer.text)
                self._failure = answer
                if self._watched is not None:
                    self._shell.unwatch(self._watched)
                    self._watched = None
        works = self._failure is None and self._watches
        why = f"{self._failure.name}: {self._failure.text}" if self._failure else self.state.why
        self.state = SourceState(name=Source.nvml, works=works, why="" if works else why)
        self._changed()
        if first and self._gpus:
            self.beat()

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
