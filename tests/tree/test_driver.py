"""The whole tree with a driver: the real pynvml on a stand-in libnvidia-ml.so.1, whose world the test writes.

The jobs are simulated, the GPUs are the stand-in's. The stand-in lists what the test says, with any pid.
"""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmwd.adapters import procs
from llmwd.adapters.cgroups import read_mounts
from tests.fakes.nvml import FakeDriver, build
from tests.tree.supervised import Supervised
from tests.waiting import wait_until

MIB = 1 << 20
# Index, minor and PCI order agree.
FOUR = tuple(f"gpu uuid=GPU-{i} minor={i} pci=00000000:{i + 1:02X}:00.0 memory={90000 * MIB} used={400 * MIB}" for i in range(4))
Start = Callable[..., tuple[Supervised, FakeDriver]]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def driven(library: Path, tmp_path: Path) -> Iterator[Start]:
    """driven(*lines of the world, **settings): a tree on that driver's GPUs, serving on two of them by default."""
    made: list[Supervised] = []

    def make(*world: str, **settings: object) -> tuple[Supervised, FakeDriver]:
        driver = FakeDriver(library, tmp_path / "world")
        driver.write(*(world or FOUR))
        environ = {name: value for name, value in driver.env().items() if name not in os.environ or name == "LD_LIBRARY_PATH"}
        wished = {"SIM_GPUS": 0, "DETECTION": "sim,nvml", "LEASE_TTL": 4, "RESUME_AFTER": 0.2, **settings}
        gpus = wished.pop("profile_gpus", 2)
        tree = Supervised(tmp_path / "tree", wished, {"FAKE_ENGINE": 1, "NUM_GPUS": gpus}, environ=environ)
        made.append(tree)
        return tree.start(), driver

    yield make
    for tree in made:
        tree.close()


@pytest.fixture
def stranger() -> Iterator[int]:
    """The pid of a process that is not llmwd's."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield child.pid
    child.communicate()


def on(gpu: int, pid: int, **more: object) -> str:
    return f"process gpu={gpu} pid={pid} used={500 * MIB}" + "".join(f" {key}={value}" for key, value in more.items())


def holder_of(status: dict, index: int) -> str:
    return next(gpu["holder"] for gpu in status["gpus"] if gpu["index"] == index)


def test_a_process_of_ours_is_ours_and_a_strangers_is_a_yield_and_keeps_a_free_gpu_from_us(driven: Start, stranger: int) -> None:
    tree, driver = driven(RESUME_AFTER=2)  # it waits long enough to be seen, and for the driver's word on GPU 2
    status = tree.serving_on(2, 3)
    driver.write(*FOUR, on(2, status["server"]["pid"], while_alive=1), on(3, status["server"]["pid"], while_alive=1), on(0, stranger))
    tree.until(lambda status: holder_of(status, 0) == "other", what="the stranger on GPU 0 seen")
    now = tree.status()  # neither our own process nor his was a reason
    assert now["phase"] == "serving" and now["server"]["pid"] == status["server"]["pid"]
    driver.add(on(3, stranger))
    status = tree.until(lambda status: status["phase"] == "waiting", what="a yield to the stranger")
    assert status["reason"] == "gpu_in_use" and str(stranger) in status["detail"]
    driver.write(*FOUR, on(3, stranger))
    tree.serving_on(1, 2)  # not 3, where he still is


def test_what_the_driver_still_lists_keeps_the_gpus_dirty_and_breaks_the_budget_until_resume(driven: Start) -> None:
    tree, driver = driven(YIELD_BUDGET=3, profile_gpus=4)  # enough for the end of the tree, which is not what breaks it
    pid = tree.serving_on(0, 1, 2, 3)["server"]["pid"]
    ghost = on(3, pid)  # stays listed when the process is long gone
    driver.add(ghost)
    tree.job(1, "3")
    status = tree.phase("held")
    assert status["reason"] == "budget_broken" and f"still lists our process {pid}" in status["detail"]
    assert status["hold"]["reason"] == "budget_broken" and status["hold"]["until"] is None
    assert status["release"]["proved"] is False and str(pid) in status["release"]["left"]
    tree.job_over(1)
    tree.until(lambda status: not status["jobs"] and holder_of(status, 3) == "llmwd", what="GPU 3 ours and dirty, not free")
    assert "YIELD_BUDGET" in tree.ctl("status").stdout and wait_until(lambda: tree.journal("budget_broken"), 10)
    driver.remove(ghost)
    proved = tree.until(lambda status: status["release"]["proved"], what="the proof")["release"]
    assert proved["took_s"] > 3 and wait_until(lambda: tree.journal("release_proved"), 10)[-1]["within_budget"] is False
    assert tree.status()["phase"] == "held"
    tree.ctl("resume")
    tree.serving_on(0, 1, 2, 3)


def test_memory_that_is_not_back_delays_the_proof_and_within_the_budget_it_is_no_more(driven: Start) -> None:
    tree, driver = driven(YIELD_BUDGET=60, profile_gpus=4)
    tree.serving_on(0, 1, 2, 3)
    full = FOUR[3].replace(f"used={400 * MIB}", f"used={80000 * MIB}")
    driver.write(*FOUR[:3], full)
    tree.job(1, "3")
    status = tree.until(lambda status: status["release"] and "79600 MiB more" in status["release"]["left"], what="the memory missed")
    assert not status["release"]["proved"]
    tree.job_over(1)
    driver.write(*FOUR)
    tree.serving_on(0, 1, 2, 3)
    line = wait_until(lambda: tree.journal("release_proved"), 10)[-1]
    assert line["within_budget"] and line["begun_s"] <= line["gone_s"] < line["proved_s"]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("hang nvmlDeviceGetMemoryInfo", "did not answer in time"),
        ("fail nvmlInitWithFlags 18", "different versions"),
        ("fail all 15 gpu=3", "the driver says NVML_ERROR_GPU_IS_LOST of it"),
    ],
)
def test_a_driver_that_hangs_fails_or_loses_a_gpu_is_a_yield_with_the_reason_and_never_the_end_of_us(
    driven: Start, fault: str, words: str
) -> None:
    tree, driver = driven(profile_gpus=4)
    before = tree.serving_on(0, 1, 2, 3)
    driver.add(fault)
    status = tree.until(
        lambda status: status["server"]["pid"] is None or status["lease"] and 3 not in status["lease"]["gpus"], 40, "a yield"
    )
    assert wait_until(lambda: tree.journal("lease_revoked"), 10)[-1]["reason"] == "gpu_unknown"
    assert words in str(status) or words in (tree.state / "logs" / "resolver.log").read_text()
    driver.remove(fault)
    after = tree.serving_on(0, 1, 2, 3)  # by itself: a driver that did not answer breaks no budget
    assert {w["name"]: w["restarts"] for w in after["workers"]} == {w["name"]: w["restarts"] for w in before["workers"]}


def test_where_the_orders_differ_the_union_of_the_candidates_is_claimed_until_gpu_map_settles_it(driven: Start) -> None:
    minors = {0: 3, 1: 2, 2: 1, 3: 0}
    mixed = [FOUR[i].replace(f"minor={i}", f"minor={minor}") for i, minor in minors.items()]
    tree, _ = driven(*mixed, NUM_GPUS=2)
    status = tree.serving_on(2, 3)
    assert status["gpu_map"]["certain"] is False and "GPU_MAP" in tree.ctl("status").stdout
    tree.job(1, "0")  # GPU-0 by PCI order, GPU-3 by minor numbers: both count
    tree.serving_on(1, 2)
    tree.job_over(1)
    tree.write_settings(GPU_MAP="0=0,1=1,2=2,3=3")
    tree.ctl("reload")
    tree.until(lambda status: status["gpu_map"]["certain"] and "GPU_MAP says so" in status["gpu_map"]["why"], what="the settled map")
    tree.job(2, "0")
    tree.until(lambda status: holder_of(status, 0) == "slurm" and holder_of(status, 3) != "slurm", what="only GPU 0 claimed")


@pytest.fixture
def process_of_a_job() -> Iterator[int]:
    """A process in a cgroup that is named as Slurm names a job's, below one that no detector looks into."""
    mount = next((mount for mount in read_mounts() if mount.version == 2), None) or read_mounts()[0]
    parts = ["slurmstepd.scope", "job_7"] if mount.version == 2 else ["slurm", "uid_0", "job_7"]
    folders = [Path(mount.point) / f"llmwd-test-{uuid.uuid4().hex}"]
    for part in parts:
        folders.append(folders[-1] / part)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        for folder in folders:
            folder.mkdir()
        (folders[-1] / "cgroup.procs").write_text(str(child.pid))
        yield child.pid
    finally:
        child.communicate()
        for folder in reversed(folders):
            wait_until(lambda folder=folder: _removed(folder), 10, what=f"removal of {folder}")


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def test_a_jobs_process_on_a_gpu_that_is_not_the_jobs_by_the_map_makes_us_give_everything_back(
    driven: Start, process_of_a_job: int
) -> None:
    tree, driver = driven()
    tree.serving_on(2, 3)
    tree.job(7, "0")
    tree.until(lambda status: holder_of(status, 0) == "slurm")
    assert tree.status()["phase"] == "serving"
    driver.add(on(1, process_of_a_job))  # not on a GPU of ours, and yet nothing is certain any more
    status = tree.phase("held")
    assert status["reason"] == "map_contradicted" and "job 7" in status["detail"] and "GPU_MAP" in status["detail"]
    assert tree.status()["lease"] is None


def told_by(tree: Supervised, epoch: int, *sources: str) -> dict:
    """The journal's line about who saw the job, once all of these are in it."""

    def line() -> dict | None:
        lines = [each for each in tree.journal("job_seen") if each["epoch"] == epoch]
        return next((each for each in lines if set(sources) == {each["first"], *each["lags"]}), None)

    return wait_until(line, 30, every_s=0.1, what=f"the line with {', '.join(sources)}")


def test_the_driver_is_a_witness_of_a_job_the_last_one_or_the_first(driven: Start, process_of_a_job: int) -> None:
    tree, driver = driven(RECONCILE=1, profile_gpus=4)
    epoch = tree.serving_on(0, 1, 2, 3)["lease"]["epoch"]
    tree.job(7, "3")
    tree.until(lambda status: holder_of(status, 3) == "slurm", what="the job on GPU 3")
    driver.add(on(3, process_of_a_job))
    seen = told_by(tree, epoch, "sim", "nvml")
    assert (seen["job"], seen["first"]) == ("7", "sim") and seen["lags"]["nvml"] > 0
    assert "job 7 was seen first by sim, nvml +" in tree.ctl("history").stdout
    tree.job_over(7)
    driver.write(*FOUR)
    epoch = tree.serving_on(0, 1, 2, 3)["lease"]["epoch"]

    driver.add(on(2, process_of_a_job))  # nobody has told yet that the job is here
    assert told_by(tree, epoch, "nvml")["job"] == "7"
    assert tree.journal("lease_revoked")[-1]["reason"] == "gpu_in_use"
    tree.job(7, "2")
    seen = told_by(tree, epoch, "nvml", "sim")
    assert (seen["job"], seen["first"]) == ("7", "nvml") and seen["lags"]["sim"] > 0
    last = json.loads(tree.ctl("report", "--json").stdout)["yields"][-1]
    assert (last["reason"], last["job"], last["first"], last["lags"]) == ("gpu_in_use", "7", "nvml", seen["lags"])


def test_a_resolver_that_is_killed_knows_the_gpus_at_once_and_costs_nobody_the_model(driven: Start) -> None:
    tree, driver = driven()
    before = tree.serving_on(2, 3)
    tree.job(1, "0")  # on another GPU: which it is has to be known at once, too
    tree.until(lambda status: holder_of(status, 0) == "slurm", what="the job on GPU 0")
    tree.signal("resolver", signal.SIGKILL)
    tree.until(lambda status: next(w for w in status["workers"] if w["name"] == "resolver")["restarts"] == 1 and status["lease"])
    restarted_s = time.monotonic()
    # Longer than the adopted lease would last: it was renewed, on evidence of the new one's own.
    wait_until(lambda: time.monotonic() > restarted_s + 5 or not tree.status()["lease"], 20, what="the time of a lease")
    after = tree.serving_on(2, 3)
    assert after["server"]["pid"] == before["server"]["pid"] and after["gpu_map"]["certain"]
    assert not tree.journal("lease_revoked")
    tree.job(2, "2")
    tree.serving_on(1, 3)


def test_a_prolog_is_not_told_that_gpus_are_free_which_a_new_resolver_does_not_know_yet(driven: Start) -> None:
    tree, driver = driven(YIELD_GRACE=4)
    tree.write_profile("stubborn", FAKE_IGNORE_TERM=1, FAKE_ENGINE=1)
    tree.ctl("switch", "stubborn")
    server = tree.until(lambda status: status["phase"] == "serving" and status["model"]["profile"] == "stubborn")["server"]["pid"]
    driver.add("hang nvmlDeviceGetCount_v2")
    tree.signal("resolver", signal.SIGKILL)
    answer = tree.ctl("release", "--job", "7", "--gpus", "2", "--within", "2")
    assert procs.alive(server, procs.start_ticks(server)) and answer.returncode == 4, answer


def test_a_gpu_that_is_cut_into_slices_while_we_run_makes_the_map_uncertain_and_is_left_alone(driven: Start) -> None:
    tree, driver = driven(profile_gpus=1)
    assert tree.serving_on(3)["gpu_map"]["certain"]
    driver.add("mig gpu=0 uuid=MIG-a", "mig gpu=0 uuid=MIG-b")
    tree.until(lambda status: not status["gpu_map"]["certain"] and "MIG" in status["gpu_map"]["why"], what="the slices seen")
    assert tree.status()["phase"] == "serving"  # nobody else is here
    tree.job(1, "1")  # a slice of GPU 0, or GPU 1: any GPU
    status = tree.phase("waiting")
    assert {gpu["holder"] for gpu in status["gpus"]} == {"slurm"}


def test_a_gpu_that_is_lost_at_our_start_leaves_the_map_uncertain_and_is_taken_when_it_is_back(driven: Start) -> None:
    lost = "fail all 15 gpu=1"
    tree, driver = driven(*FOUR, lost, profile_gpus=3)
    status = tree.serving_on(0, 2, 3)
    assert not status["gpu_map"]["certain"] and "lost" in status["gpu_map"]["why"]
    assert "NVML_ERROR_GPU_IS_LOST" in tree.log("resolver")
    tree.write_profile("fake", NUM_GPUS=4)
    tree.ctl("reload")
    tree.until(lambda status: status["reason"] == "gpu_unknown" and "GPUs 1 (lost?)" in status["detail"], what="too few GPUs")
    driver.remove(lost)
    assert tree.serving_on(0, 1, 2, 3)["gpu_map"]["certain"]


def test_memory_that_nobody_on_the_list_has_keeps_a_gpu_from_us(driven: Start) -> None:
    full = FOUR[3].replace(f"used={400 * MIB}", f"used={80000 * MIB}")
    tree, driver = driven(*FOUR[:3], full)
    status = tree.serving_on(1, 2)
    gpu = next(gpu for gpu in status["gpus"] if gpu["index"] == 3)
    assert gpu["holder"] == "unknown" and "78.1 GiB" in gpu["why"] and "no process" in gpu["why"]


def test_a_driver_that_hangs_from_the_start_is_told_as_that_and_not_as_a_node_without_gpus(driven: Start) -> None:
    tree, driver = driven(*FOUR, "hang nvmlDeviceGetCount_v2")
    assert tree.until(lambda status: status["reason"] == "gpu_unknown")["detail"] == "the driver has not answered yet"
    tree.until(lambda status: "did not answer in time" in status["detail"] and status["reason"] == "gpu_unknown", 40, "its silence told")
    driver.remove("hang nvmlDeviceGetCount_v2")
    tree.serving_on(2, 3)


def test_a_strangers_graphics_count_as_much_as_his_computing(driven: Start, stranger: int) -> None:
    tree, driver = driven(RESUME_AFTER=2)  # time for the driver to say that GPU 2 is free of us: else it would be 0 and 1
    tree.serving_on(2, 3)
    driver.add(on(3, stranger, kind="graphics"))
    tree.serving_on(1, 2)
    assert tree.journal("lease_revoked")[-1]["reason"] == "gpu_in_use"


def test_a_model_on_two_gpus_gets_a_pair_that_nvlink_joins_and_the_other_pair_when_a_job_comes(driven: Start) -> None:
    pairs = [f"{gpu} nvlink={(2, 3, 0, 1)[i]}" for i, gpu in enumerate(FOUR)]
    tree, _ = driven(*pairs)
    tree.serving_on(1, 3)  # not 2 and 3, the highest
    tree.job(1, "3")
    tree.serving_on(0, 2)  # not 1 and 2
    tree.job(2, "0")
    tree.serving_on(1, 2)  # better than none


def test_gpus_that_cannot_be_sliced_and_do_not_tell_a_processes_memory_are_used_and_given_back(driven: Start, stranger: int) -> None:
    tree, driver = driven(*(f"{gpu} sliceable=0" for gpu in FOUR), RESUME_AFTER=2)  # as above
    status = tree.serving_on(2, 3)
    assert status["gpu_map"]["certain"]
    driver.add(f"process gpu=3 pid={stranger} used=-1")
    tree.serving_on(1, 2)
    assert tree.journal("lease_revoked")[-1]["reason"] == "gpu_in_use"
