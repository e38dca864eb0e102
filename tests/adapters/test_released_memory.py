"""How long after its end the driver still lists a process: on the stand-in driver, and on the real one where there is one.

The real one is asked with a process that has a CUDA context and 2 GiB (tests/fakes/gpuholder.py) on its first GPU; the
times are printed (pytest -rP) and in the report (record_property).
"""

import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmwd.adapters import procs
from llmwd.adapters.nvml import Answer, GpuUse, Inventory, Kind, Probe, Use
from llmwd.core.gpumap import pci_key
from llmwd.core.release import SPARE_BYTES
from tests.fakes import gpuholder
from tests.fakes.nvml import FakeDriver, build
from tests.waiting import wait_until

REAL = Path("/proc/driver/nvidia/version").exists()
MIB = 2048


class Gpu:
    """The first GPU of a driver, with whoever is put on it."""

    def __init__(self, driver: FakeDriver | None):
        self.driver = driver
        self.probe = Probe(driver.env() if driver is not None else None)

    def ask(self, kind: Kind) -> Answer:
        assert self.probe.ask(kind, 30, time.monotonic()) is None
        select.select([self.probe.fileno()], [], [], 30)
        return wait_until(self.probe.receive, 30, what="the driver's answer")

    def use(self) -> GpuUse:
        answer = self.ask("use")
        assert isinstance(answer, Use), answer
        return answer.gpus[0]

    def hold(self) -> subprocess.Popen[str]:
        if self.driver is None:
            words = [sys.executable, gpuholder.__file__, str(MIB)]
        else:
            words = [sys.executable, "-c", "import signal; print('there', flush=True); signal.sigwait({signal.SIGUSR1})"]
        child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert child.stdout.readline() == "there\n"
        if self.driver is not None:
            self.driver.add(f"process gpu=0 pid={child.pid} used={MIB << 20} while_alive=1")
        return child


@pytest.fixture(params=["stand-in", "real"] if REAL else ["stand-in"])
def gpu(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Gpu]:
    driver = None
    if request.param == "stand-in":
        driver = FakeDriver(build(tmp_path), tmp_path / "world")
        driver.write(f"gpu uuid=GPU-0 minor=0 pci=00000000:01:00.0 memory={90000 << 20} used={400 << 20}")
    made = Gpu(driver)
    yield made
    made.probe.close()


def test_every_gpu_tells_what_the_map_and_the_lease_need(gpu: Gpu) -> None:
    inventory, use = gpu.ask("inventory"), gpu.ask("use")
    assert isinstance(inventory, Inventory) and isinstance(use, Use) and inventory.gpus
    for each in inventory.gpus:
        assert each.uuid and each.minor is not None and pci_key(each.pci) and each.memory_bytes and not each.error, each
    assert [(each.index, each.uuid, each.mig) for each in inventory.gpus] == [(each.index, each.uuid, each.mig) for each in use.gpus]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_after_its_end_a_process_is_not_listed_and_its_memory_is_back(
    gpu: Gpu, number: signal.Signals, record_property: Callable[[str, object], None]
) -> None:
    before = gpu.use().used_bytes
    child = gpu.hold()
    try:
        wait_until(lambda: child.pid in {each.pid for each in gpu.use().processes}, 30, what="the process listed")
        began_s = time.monotonic()
        procs.signal_process(child.pid, procs.start_ticks(child.pid), number)
        assert child.wait(30) == -number
        ended_s = time.monotonic()

        def free() -> bool:
            now = gpu.use()
            return child.pid not in {each.pid for each in now.processes} and now.used_bytes <= before + SPARE_BYTES

        wait_until(free, 60, what="a GPU without it")
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    times = {"ended_s": round(ended_s - began_s, 3), "free_s": round(time.monotonic() - began_s, 3)}
    record_property(number.name, times)
    print(number.name, times)
