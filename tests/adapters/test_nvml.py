"""The driver through the real pynvml and the real probe process, on a stand-in libnvidia-ml.so.1."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmwd.adapters.nvml import Answer, DriverFailure, Inventory, Probe, Use, driver_present
from llmwd.adapters.nvml_probe import numa_node
from tests.fakes.nvml import FakeDriver, build
from tests.waiting import wait_until

WITHIN_S = 60.0
# Index, minor and PCI order are three different orders here.
TWO_GPUS = (
    "gpu uuid=GPU-a minor=1 pci=00000000:3B:00.0 name=NVIDIA_H200 memory=1000 used=10 nvlink=1",
    "gpu uuid=GPU-b minor=0 pci=00000000:1B:00.0 name=NVIDIA_H200 memory=1000 used=10 nvlink=0",
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def driver(library: Path, tmp_path: Path) -> FakeDriver:
    driver = FakeDriver(library, tmp_path / "world")
    driver.write(*TWO_GPUS)
    return driver


@pytest.fixture
def probe(driver: FakeDriver) -> Iterator[Probe]:
    probe = Probe(env=driver.env())
    yield probe
    probe.close()


def answer(probe: Probe, kind: str) -> Answer:
    failure = probe.ask(kind, within_s=WITHIN_S, now_s=time.monotonic())
    return failure or received(probe)


def received(probe: Probe) -> Answer:
    select.select([probe.fileno()], [], [], WITHIN_S)
    return wait_until(probe.receive, WITHIN_S)


def gone(pid: int) -> bool:
    """Ended; whether it is reaped already does not matter."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter: it was reaped between opening and reading
        return True


def test_the_inventory_tells_what_each_gpu_is(probe: Probe) -> None:
    before_s = time.monotonic()
    told = answer(probe, "inventory")
    assert isinstance(told, Inventory)
    a, b = told.gpus
    assert (a.index, a.uuid, a.minor, a.pci, a.name) == (0, "GPU-a", 1, "0000:3b:00.0", "NVIDIA H200")
    assert (b.index, b.uuid, b.minor, b.pci, b.memory_bytes) == (1, "GPU-b", 0, "0000:1b:00.0", 1000)
    assert (a.nvlink, b.nvlink) == ((1,), (0,))
    assert (a.mig, a.error, b.error) == (False, "", "")
    assert told.driver == "550.54.15"
    assert before_s <= told.at_s <= time.monotonic()


def test_use_tells_the_processes_and_the_memory_of_each_gpu(driver: FakeDriver, probe: Probe) -> None:
    driver.add("process gpu=1 pid=77 used=500 kind=compute", "process gpu=1 pid=78 used=5 kind=graphics")
    told = answer(probe, "use")
    assert isinstance(told, Use)
    a, b = told.gpus
    assert (a.processes, a.used_bytes) == ((), 10)
    assert [(p.pid, p.kind, p.used_bytes) for p in b.processes] == [(77, "compute", 500), (78, "graphics", 5)]
    assert (b.uuid, b.used_bytes, b.error) == ("GPU-b", 515, "")


def test_many_processes_are_all_listed(driver: FakeDriver, probe: Probe) -> None:
    driver.add(*(f"process gpu=0 pid={pid} used=1" for pid in range(100, 180)))
    told = answer(probe, "use")
    assert isinstance(told, Use)
    assert [process.pid for process in told.gpus[0].processes] == list(range(100, 180))


def test_a_process_that_the_driver_forgets_is_gone_from_the_next_answer(driver: FakeDriver, probe: Probe) -> None:
    driver.add("process gpu=0 pid=77 used=500")
    first = answer(probe, "use")
    driver.remove("process gpu=0 pid=77 used=500")
    second = answer(probe, "use")
    assert isinstance(first, Use) and isinstance(second, Use)
    assert [len(use.gpus[0].processes) for use in (first, second)] == [1, 0]


def test_a_process_is_listed_only_while_it_lives(driver: FakeDriver, probe: Probe) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as server:
        driver.add(f"process gpu=0 pid={server.pid} used=500 while_alive=1")
        living = answer(probe, "use")
        server.kill()
    dead = answer(probe, "use")
    assert isinstance(living, Use) and isinstance(dead, Use)
    assert [p.pid for p in living.gpus[0].processes] == [server.pid]
    assert (dead.gpus[0].processes, dead.gpus[0].used_bytes) == ((), 10)


def test_the_processes_of_mig_devices_count_for_their_gpu(driver: FakeDriver, probe: Probe) -> None:
    driver.add("mig gpu=1 uuid=MIG-x", "mig gpu=1 uuid=MIG-y", "process gpu=1 mig=1 pid=77 used=5")
    told, use = answer(probe, "inventory"), answer(probe, "use")
    assert isinstance(told, Inventory) and isinstance(use, Use)
    assert [(gpu.mig, gpu.mig_uuids) for gpu in told.gpus] == [(False, ()), (True, ("MIG-x", "MIG-y"))]
    assert [process.pid for process in use.gpus[1].processes] == [77]
    assert use.gpus[1].error == ""


def test_a_lost_gpu_is_an_error_of_its_own_and_does_not_hide_the_other(driver: FakeDriver, probe: Probe) -> None:
    driver.add("fail all 15 gpu=0", "process gpu=1 pid=77 used=5")
    told, use = answer(probe, "inventory"), answer(probe, "use")
    assert isinstance(told, Inventory) and isinstance(use, Use)
    assert [gpu.error for gpu in told.gpus] == ["NVML_ERROR_GPU_IS_LOST", ""]
    assert [gpu.error for gpu in use.gpus] == ["NVML_ERROR_GPU_IS_LOST", ""]
    assert (told.gpus[1].uuid, use.gpus[1].processes[0].pid) == ("GPU-b", 77)


@pytest.mark.parametrize("kind", ["Compute", "Graphics"])
def test_a_gpu_whose_processes_cannot_be_listed_has_an_error(driver: FakeDriver, probe: Probe, kind: str) -> None:
    driver.add(f"fail nvmlDeviceGet{kind}RunningProcesses_v3 999 gpu=1")
    told = answer(probe, "use")
    assert isinstance(told, Use)
    assert [gpu.error for gpu in told.gpus] == ["", "NVML_ERROR_UNKNOWN"]


def test_a_driver_older_than_510_is_asked_by_its_older_calls(driver: FakeDriver, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    old = FakeDriver(build(tmp_path / "old", "-DMISSING_V3"), driver.world)
    driver.add("process gpu=0 pid=77 used=5")
    probe = Probe(env=old.env())
    told = answer(probe, "use")
    probe.close()
    assert isinstance(told, Use)
    assert ([p.pid for p in told.gpus[0].processes], told.gpus[0].error) == ([77], "")


def test_a_version_mismatch_is_a_failure_with_advice_and_over_after_the_mending(
    driver: FakeDriver, probe: Probe
) -> None:
    driver.add("fail nvmlInitWithFlags 18")
    failure = answer(probe, "inventory")
    assert isinstance(failure, DriverFailure)
    assert failure.name == "NVML_ERROR_LIB_RM_VERSION_MISMATCH"
    assert "reboot the node" in failure.text
    assert probe.pid is None  # the outdated library would stay loaded in it
    driver.remove("fail nvmlInitWithFlags 18")
    assert isinstance(answer(probe, "inventory"), Inventory)


def test_an_error_that_nvml_h_does_not_have_is_told_by_its_number(driver: FakeDriver, probe: Probe) -> None:
    driver.add("fail nvmlDeviceGetCount_v2 4711")
    failure = answer(probe, "use")
    assert isinstance(failure, DriverFailure)
    assert failure.name == "NVML_ERROR_4711"


def test_without_a_driver_the_failure_is_one_sentence(tmp_path: Path) -> None:
    # A file that is no library stands before a real driver, should this machine have one.
    (tmp_path / "libnvidia-ml.so.1").write_text("")
    probe = Probe(env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)})
    failure = answer(probe, "inventory")
    probe.close()
    assert isinstance(failure, DriverFailure)
    assert failure.name == "NVML_ERROR_LIBRARY_NOT_FOUND"
    assert "install the NVIDIA driver" in failure.text and "\n" not in failure.text


def test_a_call_that_hangs_is_overdue_killed_and_the_next_question_is_answered(
    driver: FakeDriver, probe: Probe
) -> None:
    assert isinstance(answer(probe, "use"), Use)
    driver.add("hang nvmlDeviceGetMemoryInfo")
    now_s = time.monotonic()
    assert probe.ask("use", within_s=0.3, now_s=now_s) is None
    pid = probe.pid
    assert pid and not probe.overdue(now_s)
    wait_until(lambda: probe.overdue(time.monotonic()))
    assert probe.receive() is None
    failure = probe.kill()
    assert failure.name == "DRIVER_HANGS" and "asked for: use" in failure.text
    wait_until(lambda: gone(pid))
    assert not probe.busy and probe.fileno() == -1
    driver.remove("hang nvmlDeviceGetMemoryInfo")
    assert isinstance(answer(probe, "use"), Use)


def test_an_answer_that_comes_late_is_taken_if_nobody_killed_the_probe(driver: FakeDriver, probe: Probe) -> None:
    driver.add("hang nvmlDeviceGetCount_v2")
    assert probe.ask("use", within_s=0.01, now_s=time.monotonic()) is None
    wait_until(lambda: probe.overdue(time.monotonic()))
    driver.remove("hang nvmlDeviceGetCount_v2")
    assert isinstance(received(probe), Use)


def test_a_probe_that_dies_over_a_question_is_a_failure_and_one_that_dies_idle_is_not(probe: Probe) -> None:
    assert isinstance(answer(probe, "use"), Use)
    idle = probe.pid
    assert idle
    os.kill(idle, signal.SIGKILL)
    wait_until(lambda: gone(idle))
    assert isinstance(answer(probe, "use"), Use)
    assert probe.pid and probe.pid != idle
    os.kill(probe.pid, signal.SIGSTOP)
    assert probe.ask("use", within_s=WITHIN_S, now_s=time.monotonic()) is None
    os.kill(probe.pid, signal.SIGKILL)
    failure = received(probe)
    assert isinstance(failure, DriverFailure)
    assert failure.name == "PROBE_DIED"
    assert isinstance(answer(probe, "use"), Use)


def test_no_further_probe_is_sent_into_a_driver_that_holds_three(probe: Probe) -> None:
    # Nothing can be made unkillable here, so living processes stand for those that SIGKILL did not end.
    script = [sys.executable, "-c", "input()"]
    held = [subprocess.Popen(script, stdin=subprocess.PIPE) for _ in range(3)]
    probe._stuck.extend(held)
    failure = answer(probe, "use")
    assert isinstance(failure, DriverFailure)
    assert failure.name == "DRIVER_HANGS" and str(held[2].pid) in failure.text
    for child in held:
        child.communicate(b"\n")
    assert isinstance(answer(probe, "use"), Use)


def test_two_questions_at_once_are_a_mistake_of_the_caller(probe: Probe) -> None:
    assert probe.ask("use", within_s=WITHIN_S, now_s=0.0) is None
    with pytest.raises(RuntimeError):
        probe.ask("use", within_s=WITHIN_S, now_s=0.0)


def test_the_probe_has_a_title_of_its_own(probe: Probe) -> None:
    assert isinstance(answer(probe, "use"), Use)
    assert Path(f"/proc/{probe.pid}/cmdline").read_bytes().startswith(b"llmwd: nvml\0")


def test_the_driver_is_closed_before_the_answer(driver: FakeDriver, probe: Probe) -> None:
    driver.add("fail nvmlShutdown 999")
    failure = answer(probe, "use")
    assert isinstance(failure, DriverFailure)
    assert failure.name == "NVML_ERROR_UNKNOWN"


def test_the_probe_dies_with_its_parent_even_while_the_driver_hangs(driver: FakeDriver) -> None:
    driver.add("hang nvmlDeviceGetCount_v2")
    script = (
        "from llmwd.adapters.nvml import Probe\n"
        "probe = Probe()\n"
        "probe.ask('use', within_s=60, now_s=0)\n"
        "print(probe.pid, flush=True)\n"
        "input()\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], env=driver.env(), stdin=pipe, stdout=pipe) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        wait_until(lambda: Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"llmwd: nvml\0"))
        parent.kill()
    wait_until(lambda: gone(pid))


def test_the_probe_ends_when_its_standard_input_does(driver: FakeDriver) -> None:
    program = [sys.executable, "-m", "llmwd.adapters.nvml_probe"]
    done = subprocess.run(program, env=driver.env(), input=b'{"ask": "use"}\n', capture_output=True, timeout=WITHIN_S)
    assert (done.returncode, done.stdout.count(b"\n"), done.stderr) == (0, 1, b"")


def test_pynvml_never_enters_the_process_that_asks() -> None:
    script = "import sys, llmwd.adapters.nvml; sys.exit('pynvml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_the_numa_node_is_none_where_the_machine_has_none(tmp_path: Path) -> None:
    for pci, text in (("0000:1b:00.0", "1\n"), ("0000:1c:00.0", "-1\n")):
        folder = tmp_path / "bus/pci/devices" / pci
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(text)
    assert [numa_node(f"0000:{bus}:00.0", tmp_path) for bus in ("1b", "1c", "1d")] == [1, None, None]


def test_a_driver_is_present_by_its_kernel_module_or_its_library(library: Path, tmp_path: Path) -> None:
    assert driver_present(tmp_path, {"LD_LIBRARY_PATH": f":{library}"})
    (tmp_path / "version").write_text("NVRM version: ...")
    assert driver_present(tmp_path, {})
