"""The stand-in driver as a part of the stage: what goes wrong with it, and with others on its GPUs."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.chaos.plan import DRIVER_HANGS, GPUS
from tests.fakes.nvml import FakeDriver, build
from tests.observer.sight import start_of

MIB = 1 << 20
CONTEXT_MIB = 3000  # more than a driver keeps for itself
LOST, MISMATCH = 15, 18  # NVML_ERROR_GPU_IS_LOST, NVML_ERROR_LIB_RM_VERSION_MISMATCH


def _gpu(index: int, used_mib: int = 400) -> str:
    return f"gpu uuid=GPU-{index} minor={index} pci=00000000:{index + 1:02X}:00.0 memory={90000 * MIB} used={used_mib * MIB}"


class Faults:
    """GPUS GPUs. Every server of the tree's that is told `contexts` is on those that it was given, while it lives."""

    def __init__(self, folder: Path):
        folder.mkdir()
        self.contexts = folder / "contexts"
        self.contexts.mkdir()
        self.driver = FakeDriver(build(folder), folder / "world")
        self.driver.write(*map(_gpu, range(GPUS)), f"contexts folder={self.contexts} used={CONTEXT_MIB * MIB}")
        self.strangers: list[subprocess.Popen] = []

    def environ(self) -> dict[str, str]:
        found = self.driver.env()
        return {name: found[name] for name in ("LD_LIBRARY_PATH", "LLMWD_FAKE_NVML")}

    def on(self, gpu: int) -> list[int]:
        """The living processes on it."""
        found = [name.split(".") for name in os.listdir(self.contexts) if name.startswith(f"GPU-{gpu}.")]
        return [int(pid) for _, pid, start in found if start_of(int(pid)) == int(start)]

    def spoil(self, how: str, gpu: int, leased: list[int]) -> tuple[str, Callable[[], None]]:
        """What was done, in words ("": nothing, there is nobody whom it could befall), and what takes it back.

        leased: the GPUs that the tree has just now: none of these is cut, or filled by nobody."""
        free = next(at for at in (gpu, *range(GPUS)) if at not in leased)
        lines: list[str] = []
        stranger = None
        match how:
            case "lost":
                lines = [f"fail all {LOST} gpu={gpu}"]
            case "mismatch":
                lines = [f"fail nvmlInitWithFlags {MISMATCH}"]
            case "stranger" | "forgotten-stranger":
                stranger = self._stranger(gpu)
                lines = [f"forget pid={stranger.pid}"] if how == "forgotten-stranger" else []
            case "forgotten":
                lines = [f"forget pid={pid}" for at in leased for pid in self.on(at)]
            case "ghost":  # stays listed after its end
                lines = [f"process gpu={at} pid={pid} used={MIB}" for at in leased for pid in self.on(at)]
            case "slices":
                lines = [f"mig gpu={free} uuid=MIG-{free}a", f"mig gpu={free} uuid=MIG-{free}b"]
            case "memory":
                return self._fill(free)
            case _ if how in DRIVER_HANGS:
                lines = [f"hang {how}"]
        if lines:
            self.driver.add(*lines)

        def heal() -> None:
            if lines:
                self.driver.remove(*lines)
            if stranger is not None:
                self._end(stranger)

        return "; ".join(lines or ([f"pid {stranger.pid}"] if stranger is not None else [])), heal

    def _fill(self, gpu: int) -> tuple[str, Callable[[], None]]:
        full = _gpu(gpu, 80000)

        def become(line: str) -> None:
            self.driver.write(*(line if old.startswith(f"gpu uuid=GPU-{gpu} ") else old for old in self.driver.lines))

        become(full)
        return full, lambda: become(_gpu(gpu))

    def _stranger(self, gpu: int) -> subprocess.Popen:
        process = subprocess.Popen(["cat"], env={"PATH": os.environ["PATH"]}, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
        self.strangers.append(process)
        (self.contexts / f"GPU-{gpu}.{process.pid}.{start_of(process.pid)}").touch()
        return process

    def _end(self, stranger: subprocess.Popen) -> None:
        stranger.stdin.close()
        stranger.wait()
        self.strangers.remove(stranger)

    def close(self) -> None:
        for stranger in list(self.strangers):
            self._end(stranger)
