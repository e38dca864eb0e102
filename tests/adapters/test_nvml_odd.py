"""What not every driver, GPU or user has: slices, lists that may be read, numbers that are told. As in test_nvml.py."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmwd.adapters.nvml import DriverFailure, GpuInfo, GpuUse, Inventory, Probe, Use
from llmwd.adapters.nvml_probe import GROWTH_RETRIES
from tests.adapters.test_nvml import TWO_GPUS, answer
from tests.fakes.nvml import FakeDriver, build

OLD = TWO_GPUS[0] + " sliceable=0"
SLICED = (*TWO_GPUS, "mig gpu=1 uuid=MIG-x", "mig gpu=1 uuid=MIG-y")
LISTS = [f"nvmlDeviceGet{kind}RunningProcesses_v3" for kind in ("Compute", "Graphics")]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def driver(library: Path, tmp_path: Path) -> FakeDriver:
    return FakeDriver(library, tmp_path / "world")


@pytest.fixture
def probe(driver: FakeDriver) -> Iterator[Probe]:
    probe = Probe(env=driver.env())
    yield probe
    probe.close()


def inventory(probe: Probe) -> tuple[GpuInfo, ...]:
    told = answer(probe, "inventory")
    assert isinstance(told, Inventory), told
    return told.gpus


def use(probe: Probe) -> tuple[GpuUse, ...]:
    told = answer(probe, "use")
    assert isinstance(told, Use), told
    return told.gpus


def pids(gpu: GpuUse) -> list[int]:
    return [process.pid for process in gpu.processes]


def test_a_gpu_that_cannot_be_sliced_is_a_whole_one_without_an_error(driver: FakeDriver, probe: Probe) -> None:
    driver.write(OLD, TWO_GPUS[1], "process gpu=0 pid=77 used=5")
    for gpu in (inventory(probe)[0], use(probe)[0]):
        assert (gpu.uuid, gpu.mig, gpu.mig_uuids, gpu.error) == ("GPU-a", False, (), "")
    assert pids(use(probe)[0]) == [77]


def test_what_a_gpu_has_no_number_for_is_not_told_and_no_error(driver: FakeDriver, probe: Probe) -> None:
    """As with memory that the CPU and the GPU share."""
    driver.write(*TWO_GPUS, "fail nvmlDeviceGetMemoryInfo 3 gpu=0", "process gpu=0 pid=77 used=5")
    one, now = inventory(probe)[0], use(probe)[0]
    assert (one.memory_bytes, one.error) == (None, "")
    assert (now.used_bytes, pids(now), now.error) == (None, [77], "")


@pytest.mark.parametrize("kind", ["compute", "graphics"])
def test_a_process_whose_memory_is_not_told_is_on_the_gpu_all_the_same(driver: FakeDriver, probe: Probe, kind: str) -> None:
    driver.write(*TWO_GPUS, f"process gpu=0 pid=77 used=-1 kind={kind}", f"process gpu=0 pid=78 used=5 kind={kind}")
    gpu = use(probe)[0]
    assert [(p.pid, p.kind, p.used_bytes) for p in gpu.processes] == [(77, kind, None), (78, kind, 5)]
    assert (gpu.used_bytes, gpu.error) == (15, "")


def test_the_list_of_a_sliced_gpu_is_for_privileged_users_and_its_slices_lists_are_enough(driver: FakeDriver, probe: Probe) -> None:
    driver.write(*SLICED, "process gpu=1 pid=77 used=5", "process gpu=1 mig=1 pid=78 used=5")
    ordinary = use(probe)[1]
    assert (ordinary.mig, pids(ordinary), ordinary.error) == (True, [77, 78], "")
    driver.add("privileged")
    assert use(probe)[1] == ordinary  # each of them once


@pytest.mark.parametrize("name", LISTS)
def test_only_a_sliced_gpu_may_refuse_its_list(driver: FakeDriver, probe: Probe, name: str) -> None:
    driver.write(*TWO_GPUS, f"fail {name} 4 gpu=1")
    assert [gpu.error for gpu in use(probe)] == ["", "NVML_ERROR_NO_PERMISSION"]


def test_a_sliced_gpu_may_refuse_nothing_but_its_own_list(driver: FakeDriver, probe: Probe) -> None:
    driver.write(*SLICED, f"fail {LISTS[0]} 4 gpu=1")  # the slices' as well
    assert [gpu.error for gpu in use(probe)] == ["", "NVML_ERROR_NO_PERMISSION"]


def test_a_slice_that_is_kept_from_us_leaves_its_gpu_unknown(driver: FakeDriver, probe: Probe) -> None:
    driver.write(*SLICED, "fail nvmlDeviceGetMigDeviceHandleByIndex 4 gpu=1")
    for gpus in (inventory(probe), use(probe)):
        assert [gpu.error for gpu in gpus] == ["", "NVML_ERROR_NO_PERMISSION"]


def test_a_gpu_without_graphics_has_none_and_one_without_computing_is_not_vouched_for(driver: FakeDriver, probe: Probe) -> None:
    driver.write(*TWO_GPUS, f"fail {LISTS[0]} 3 gpu=1", f"fail {LISTS[1]} 3 gpu=0", "process gpu=0 pid=77 used=5")
    a, b = use(probe)
    assert (pids(a), a.error, b.error) == ([77], "", "NVML_ERROR_NOT_SUPPORTED")


def test_a_driver_from_before_mig_tells_what_there_is_and_cannot_vouch_for_any_gpu(driver: FakeDriver, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    old = FakeDriver(build(tmp_path / "old", "-DMISSING_V2"), driver.world)
    old.write(*TWO_GPUS)
    probe = Probe(env=old.env())
    told, now = inventory(probe), use(probe)
    probe.close()
    assert [(gpu.uuid, gpu.mig, gpu.error) for gpu in told] == [("GPU-a", False, ""), ("GPU-b", False, "")]
    assert [gpu.error for gpu in now] == ["NVML_ERROR_FUNCTION_NOT_FOUND"] * 2


@pytest.mark.parametrize("times", [1, 2])
def test_a_list_that_grows_while_it_is_read_is_read_again(driver: FakeDriver, probe: Probe, times: int) -> None:
    driver.write(*TWO_GPUS, "process gpu=0 pid=77 used=5", f"grow gpu=0 times={times} pid=5000")
    gpu = use(probe)[0]
    listed = pids(gpu)
    assert gpu.error == "" and listed[0] == 77 and len(listed) > 7 * times
    assert listed[1:] == list(range(5000, 5000 + len(listed) - 1))


def test_a_list_that_outgrows_every_reading_leaves_its_gpu_unknown_until_it_holds_still(driver: FakeDriver, probe: Probe) -> None:
    driver.write(*TWO_GPUS, "process gpu=0 pid=77 used=5", f"grow gpu=0 times={2 * GROWTH_RETRIES + 1} pid=5000")
    for error in ("NVML_ERROR_INSUFFICIENT_SIZE", "NVML_ERROR_INSUFFICIENT_SIZE", ""):
        a, b = use(probe)
        assert (a.error, b.error) == (error, "")
    assert pids(a)[:2] == [77, 5000]


def test_without_pynvml_the_failure_is_one_sentence(driver: FakeDriver, tmp_path: Path) -> None:
    (tmp_path / "pynvml.py").write_text("raise ImportError('not here')\n")
    probe = Probe(env=driver.env() | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])})
    failure = answer(probe, "use")
    probe.close()
    assert failure == DriverFailure(name="PYNVML_MISSING", text="pynvml cannot be imported: not here")
