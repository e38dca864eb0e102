"""However it ends, nothing of it is left: in order, at once, or by the root's violent death."""

import os
import signal
import subprocess

import pytest

from llmwd.adapters import procs
from tests.tree.conftest import Start
from tests.tree.supervised import Supervised
from tests.waiting import wait_until

STUBBORN = {"FAKE_ENGINE": 1, "FAKE_FORK_GRANDCHILD": 1, "FAKE_CHILDREN": 11, "FAKE_IGNORE_TERM": 1}


def nothing_left(tree: Supervised, within_s: float = 20) -> None:
    wait_until(lambda: not tree.left(), within_s, every_s=0.05, what=f"the end of everything: {tree.left()}")


@pytest.mark.parametrize(
    "killed", ["root", "root vllm", "root holder", "root detector resolver", "resolver vllm detector tunnel notifier root"]
)
def test_after_the_roots_violent_death_nothing_is_left(supervised: Start, killed: str) -> None:
    tree = supervised(STUBBORN)
    tree.all_ready()
    assert len(tree.left()) >= 1 + 5 + 1 + 14  # the root, the workers, the holder, the server's tree: all are seen here
    tree.signal(killed, signal.SIGKILL)
    nothing_left(tree)


@pytest.mark.parametrize("stopped", ["vllm", "resolver detector notifier tunnel vllm"])
def test_stopped_workers_do_not_outlive_the_root_either(supervised: Start, stopped: str) -> None:
    tree = supervised(STUBBORN, LEASE_TTL=60)
    tree.all_ready()
    tree.signal(f"{stopped} root", signal.SIGSTOP)
    tree.signal("root", signal.SIGKILL)
    nothing_left(tree)


def test_a_supervisor_started_after_a_violent_death_serves_again(supervised: Start) -> None:
    tree = supervised()
    tree.all_ready()
    tree.signal("root", signal.SIGKILL)
    tree.process.wait(10)
    tree.start()  # at once: what is left of the first is still ending
    tree.all_ready()
    assert tree.answers()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything_in_reverse_order_with_exit_0(supervised: Start, number: int) -> None:
    tree = supervised(STUBBORN, YIELD_GRACE=4)
    tree.all_ready()
    started = {worker["name"]: (worker["pid"], procs.start_ticks(worker["pid"])) for worker in tree.status()["workers"]}
    tree.process.send_signal(number)
    # The tree is deaf to SIGTERM and takes its whole grace, so the order can be seen.
    wait_until(lambda: not procs.alive(*started["tunnel"]), 10)
    status = tree.phase("stopped")
    assert status["reason"] == "stopping"
    assert all(procs.alive(*started[name]) for name in ("vllm", "resolver", "detector", "notifier"))
    assert tree.process.wait(20) == 0
    assert tree.left() == []
    released = tree.journal("released")[-1]
    assert released["reason"] == "stopping" and released["killed_s"] - released["signalled_s"] >= 3.9
    assert tree.journal("supervisor_stopped") and tree.ctl("status").returncode == 3
    assert "ended by itself" not in tree.log("root")


def test_a_second_signal_ends_everything_at_once(supervised: Start) -> None:
    tree = supervised(STUBBORN, YIELD_GRACE=30)
    tree.all_ready()
    tree.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "ending in order" in tree.log("root"), 10)
    assert tree.left()
    tree.process.send_signal(signal.SIGTERM)
    assert tree.process.wait(29) == 0
    assert tree.left() == []


def test_stop_waits_until_nothing_is_left(supervised: Start) -> None:
    tree = supervised()
    tree.all_ready()
    stopped = tree.ctl("stop")
    assert stopped.returncode == 0, stopped.stderr
    tree.process.wait(10)
    assert tree.left() == []
    assert tree.ctl("stop").returncode == 3


def test_a_worker_that_hangs_delays_the_end_by_its_time_only(supervised: Start) -> None:
    tree = supervised(LEASE_TTL=60)
    tree.all_ready()
    tree.signal("detector", signal.SIGSTOP)
    assert tree.stop() == 0
    assert tree.left() == []
    assert "detector did not end in time" in tree.log("root")


def test_what_we_did_not_start_is_left_alone_even_under_our_servers_name(supervised: Start) -> None:
    tree = supervised()
    bystander = subprocess.Popen(["sleep", "1000"], env={"PATH": os.environ["PATH"]})
    namesake = subprocess.Popen(
        ["bash", "-c", "exec -a 'vllm serve fake' sleep 1000"], env={"PATH": os.environ["PATH"]}, start_new_session=True
    )
    try:
        tree.all_ready()
        tree.job(1, "0-7")
        tree.phase("waiting")
        assert tree.stop() == 0
        assert bystander.poll() is None and namesake.poll() is None
    finally:
        for process in (bystander, namesake):
            process.kill()
            process.wait()
