"""Real Slurm and the stand-in driver together: its indices, the driver's GPUs, and a resolver that knows neither yet."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes.nvml import FakeDriver, build
from tests.slurm.test_yield import supervised_beside, wait_for_job
from tests.slurm.testbed import SlurmNode
from tests.tree.supervised import Supervised

MIB = 1 << 20
PERMUTED = (3, 2, 1, 0, 4, 5, 6, 7)  # minor numbers in PCI order
Start = Callable[..., Supervised]


def world(minors: tuple[int, ...]) -> list[str]:
    return [
        f"gpu uuid=GPU-{i} minor={minor} pci=00000000:{i + 1:02X}:00.0 name=NVIDIA_H200 memory={90000 * MIB} used={400 * MIB}"
        for i, minor in enumerate(minors)
    ]


@pytest.fixture
def beside(slurm_node: SlurmNode, tmp_path: Path) -> Iterator[Start]:
    """beside(minor numbers, **settings): llmwd on that driver's eight GPUs beside the Slurm node, serving on two."""
    driver = FakeDriver(build(tmp_path), tmp_path / "world")
    made: list[Supervised] = []

    def make(minors: tuple[int, ...] = tuple(range(8)), **settings: object) -> Supervised:
        driver.write(*world(minors))
        wished = {"SIM_GPUS": 0, "DETECTION": "stepd,cgroup2,gresused,procfs,nvml,sim", **settings}
        tree = supervised_beside(slurm_node, tmp_path, **wished)
        tree.env |= {name: value for name, value in driver.env().items() if name not in os.environ or name == "LD_LIBRARY_PATH"}
        made.append(tree)
        return tree.start()

    yield make
    for tree in made:
        tree.close()


def holders(status: dict) -> dict[str, str]:
    return {gpu["uuid"]: gpu["holder"] for gpu in status["gpus"]}


def slurms(status: dict) -> set[str]:
    return {uuid for uuid, holder in holders(status).items() if holder == "slurm"}


def test_slurms_indices_are_the_drivers_gpus_where_all_orders_agree(slurm_node: SlurmNode, beside: Start) -> None:
    tree = beside()
    before = tree.serving_on(6, 7)
    assert before["gpu_map"]["certain"]
    job = slurm_node.sbatch("exec sleep 600", "--gres=gpu:2")
    assert slurms(wait_for_job(tree, job, [0, 1])) == {"GPU-0", "GPU-1"}
    # Whoever dies and comes back knows the GPUs, the map and the job at once: no reason to end a model.
    tree.signal("resolver", signal.SIGKILL)
    tree.until(lambda status: next(w for w in status["workers"] if w["name"] == "resolver")["restarts"] == 1, what="a new resolver")
    assert slurms(wait_for_job(tree, job, [0, 1])) == {"GPU-0", "GPU-1"}
    assert tree.serving_on(6, 7)["server"]["pid"] == before["server"]["pid"] and not tree.journal("lease_revoked")
    every = slurm_node.sbatch("exec sleep 600", "--gres=gpu:6")
    assert tree.released_for(every)["reason"] == "yielded_to_job"
    proof = tree.until(lambda status: status["release"] and status["release"]["proved"], what="the driver's proof")
    assert proof["reason"] == "yielded_to_job"


def test_where_the_minor_numbers_differ_both_candidates_count_until_gpu_map_settles_it(slurm_node: SlurmNode, beside: Start) -> None:
    tree = beside(PERMUTED)
    assert not tree.serving_on(6, 7)["gpu_map"]["certain"]
    job = slurm_node.sbatch("exec sleep 600", "--gres=gpu:1")
    assert slurms(wait_for_job(tree, job, [0])) == {"GPU-0", "GPU-3"}  # the first by PCI address, and minor number 0
    tree.write_settings(GPU_MAP="0=3,1=2,2=1,3=0,4=4,5=5,6=6,7=7")
    assert tree.ctl("reload").returncode == 0
    status = tree.until(lambda status: status["gpu_map"]["certain"], what="the operator's map")
    assert slurms(status) == {"GPU-3"} and status["phase"] == "serving"
