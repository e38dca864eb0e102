"""The resolver's view of the NVIDIA driver: which GPUs there are, and who is on them besides us.

Every question goes to a disposable process with a deadline, because a driver call can hang in the kernel for ever.
A driver that is there and does not answer makes its GPUs unknown, and so not ours.
"""

import time
from collections.abc import Callable

from llmwd.adapters import procs
from llmwd.adapters.nvml import DriverFailure, GpuInfo, Inventory, Probe, Use, driver_present
from llmwd.messages import SourceState
from llmwd.vocab import Source
from llmwd.workers.base import Shell, repeat_every_s

INVENTORY_WITHIN_S = 20.0  # without persistence mode the first call initialises every GPU
USE_WITHIN_S = 5.0


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
        self._ours_before: frozenset[int] = frozenset()
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
        return ""

    def foreign(self, now_s: float) -> dict[str, str]:
        """UUID -> who is on that GPU and is not ours; "" where the driver cannot say."""
        if not self._watches:
            return {}
        if self._failure is not None:
            return {gpu.uuid: "" for gpu in self._gpus}
        found: dict[str, str] = {}
        for use in self._use.gpus if self._use else ():
            strangers = [process.pid for process in use.processes if process.pid not in self._ours_before]
            if use.error:
                found[use.uuid] = ""
            elif strangers:
                found[use.uuid] = f"process {', '.join(map(str, strangers))} is on it"
        return found

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
        self._ours_before = self._ours()
        failure = self._probe.ask(kind, within_s, now_s)
        if failure is not None:
            self._heard(failure)
            return
        if self._probe.fileno() != self._watched:
            self._watched = self._probe.fileno()
            self._shell.watch(self._watched, self._readable)

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
                # A process of our tree that is new since the question is ours as well.
                self._ours_before |= self._ours()
                self._use, self._failure = answer, None
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

    def _ours(self) -> frozenset[int]:
        if self.server_pid is None:
            return frozenset()
        return frozenset(procs.descendants(self.server_pid))
