"""The model's processes stand back behind everybody else on the node; those that have to answer do not."""

import json
import os
import time
from pathlib import Path

from llmwd.adapters import courtesy, procs
from tests.fakes.nvml import FakeDriver, build
from tests.waiting import wait_until


def as_found(pid: int) -> tuple[int, int, int | None, int]:
    found = courtesy.found(pid)
    return found["nice"], found["oom_score_adj"], found["io_priority"], len(found["cpus"])


def test_the_server_stands_back_with_all_its_children_and_nobody_else_of_us_does(supervised) -> None:
    node = supervised(profile={"FAKE_ENGINE": 1, "FAKE_CHILDREN": 11, "FAKE_FORK_GRANDCHILD": 1})
    status = node.serving()
    ordinary, all_cpus = as_found(os.getpid()), len(os.sched_getaffinity(0))
    holder = node.server_fact().holder_pid
    tree = procs.descendants(holder)
    assert len(tree) == 14 and {as_found(pid) for pid in tree} == {(10, 800, 7, all_cpus)}
    ours = [*node.pids().values(), holder]
    assert {as_found(pid) for pid in ours if pid and pid not in tree} == {ordinary}
    assert {name: status["neighbour"][name] for name in ("nice", "oom_score_adj", "io_priority")} == {
        "nice": 10, "oom_score_adj": 800, "io_priority": 7,
    }  # fmt: skip
    shown = " ".join(node.ctl("status").stdout.split())
    assert "neighbour nice 10 · oom_score_adj 800 · I/O best-effort 7 · CPUs 0" in shown
    assert json.loads(node.ctl("status", "--json").stdout)["neighbour"] == status["neighbour"]

    node.signal("vllm", 9)  # the restarted manager finds out by itself how the server stands
    wait_until(lambda: node.worker("vllm")["restarts"] == 1 and node.status()["neighbour"] == status["neighbour"], 30)


def test_each_of_it_can_be_switched_off(supervised) -> None:
    node = supervised(NICE=0, OOM_SCORE_ADJ=0, IO_PRIORITY="off", CPU_AFFINITY="off")
    node.serving()
    assert as_found(node.server_fact().pid) == as_found(os.getpid())


def in_place_of(*pairs: tuple[Path, str]) -> tuple[str, ...]:
    """The program in front of the supervisor's that lets it alone see our files in the kernel's places."""
    mounts = " && ".join(f"mount --bind {ours} {place}" for ours, place in pairs)
    return "unshare", "-m" if os.geteuid() == 0 else "-rm", "sh", "-c", f'{mounts} && exec "$@"', "sh"


def test_the_tree_runs_near_the_gpus_that_it_is_on(supervised, tmp_path: Path) -> None:
    """A stand-in driver, and a stand-in for /sys: GPUs 0 and 1 are on NUMA node 0 with half of the CPUs, 2 and 3 on 1."""
    everything = sorted(os.sched_getaffinity(0))
    halves = everything[: len(everything) // 2] or everything, everything[len(everything) // 2 :]
    world, sys = [], tmp_path / "sys"
    for gpu in range(4):
        world.append(f"gpu uuid=GPU-{gpu} minor={gpu} pci=00000000:{gpu + 1:02X}:00.0 memory=1000000 used=1000")
        device = sys / "bus" / "pci" / "devices" / f"0000:{gpu + 1:02x}:00.0"
        device.mkdir(parents=True)
        (device / "numa_node").write_text(f"{gpu // 2}\n")
    for number, cpus in enumerate(halves):
        node = sys / "devices" / "system" / "node" / f"node{number}"
        node.mkdir(parents=True)
        (node / "cpulist").write_text(",".join(map(str, cpus)) + "\n")
    driver = FakeDriver(build(tmp_path), tmp_path / "world")
    driver.write(*world)
    node = supervised({"FAKE_ENGINE": 1, "FAKE_CHILDREN": 3}, start=False, SIM_GPUS=0, DETECTION="sim,nvml", RESUME_AFTER=0.2)
    node.env |= {name: value for name, value in driver.env().items() if name not in os.environ or name == "LD_LIBRARY_PATH"}
    node.within = in_place_of((sys, "/sys"))
    node.start()
    for number, gpus in ((1, (2, 3)), (0, (0, 1))):
        node.serving_on(*gpus)
        tree = procs.descendants(node.server_fact().holder_pid)
        assert {tuple(courtesy.found(pid)["cpus"]) for pid in tree} == {tuple(halves[number])}
        row = wait_until(lambda: node.status()["neighbour"], 10)
        assert row["detail"] == f"NUMA node {number}" and row["cpus"]
        node.job(7, "2-3")


PRESSURE = "some avg10={0:05.2f} avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"


def press(file: Path, percent: float) -> None:
    """In its place, as it is mounted, and never empty: a text that says nothing would be the end of the shortage."""
    with file.open("r+b" if file.exists() else "xb") as stand_in:
        stand_in.write(PRESSURE.format(percent).encode())


def test_a_node_short_of_memory_is_left_to_its_jobs_until_that_is_over(supervised, tmp_path: Path) -> None:
    stand_in = tmp_path / "pressure"
    press(stand_in, 50)
    node = supervised(start=False, LEASE_TTL=4, RESUME_AFTER=1)
    node.within = in_place_of((stand_in, "/proc/pressure/memory"))
    node.start().serving()  # alone on the node it hurts nobody
    assert node.status()["memory"]["some_percent"] == 50
    node.job(7, "0")  # not on a GPU of ours
    status = node.until(lambda status: status["reason"] == "memory_pressure" and status["phase"] == "waiting")
    assert "50 %" in status["detail"] and status["memory"]["short"]
    assert node.journal("lease_revoked")[-1]["reason"] == "memory_pressure"
    assert node.left() and status["server"]["pid"] is None

    press(stand_in, 7)  # less than the limit, more than half of it
    node.until(lambda status: status["memory"]["some_percent"] == 7)
    node.signal("resolver", 9)  # what it has found out survives it
    killed_s = time.monotonic()
    wait_until(lambda: node.look().facts.gpus.at_s > killed_s and node.worker("resolver")["restarts"] == 1, 30)
    assert node.status()["memory"]["short"] and node.status()["phase"] == "waiting"
    press(stand_in, 4)
    node.serving()
    assert not node.status()["memory"]["short"] and node.status()["jobs"] == [{"id": "7", "gpus": [0]}]
