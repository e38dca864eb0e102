"""A worker's death is local: it alone is restarted, the others keep their pids, the model goes on answering."""

import signal

import pytest

from tests.tree.conftest import Start
from tests.tree.supervised import WORKERS, Supervised, pids_in
from tests.waiting import wait_until


def replaced(tree: Supervised, before: dict[str, int], names: set[str], within_s: float = 30) -> dict[str, int]:
    """The pids once exactly `names` have new ones and all work; the model has to answer all the while."""

    def done() -> dict[str, int] | None:
        assert tree.answers(), "the model did not answer meanwhile"
        status = tree.status()
        now = pids_in(status)
        changed = {name for name in now if now[name] != before[name]}
        ready = status["phase"] == "serving" and all(worker["phase"] == "ready" for worker in status["workers"])
        return now if ready and names <= changed else None

    now = wait_until(done, within_s, every_s=0.05, what=f"the restart of {names}")
    assert {name for name in now if now[name] != before[name]} == names
    return now


def test_each_worker_that_is_killed_is_restarted_alone_while_the_model_serves(supervised: Start) -> None:
    tree = supervised()
    tree.all_ready()
    pids = tree.pids()
    for name in WORKERS:
        tree.signal(name, signal.SIGKILL)
        pids = replaced(tree, pids, {name})
        assert tree.worker(name)["restarts"] == 1
    assert tree.journal("lease_revoked") == [] and len(tree.journal("server_started")) == 1


def test_all_workers_killed_at_once_come_back_and_the_model_never_stops(supervised: Start) -> None:
    tree = supervised()
    tree.all_ready()
    pids = tree.pids()
    tree.signal("vllm resolver", signal.SIGKILL)
    pids = replaced(tree, pids, {"vllm", "resolver"})
    tree.signal(" ".join(WORKERS), signal.SIGKILL)
    replaced(tree, pids, set(WORKERS))
    assert tree.journal("lease_revoked") == []


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_that_hangs_is_killed_and_restarted_alone(supervised: Start, name: str) -> None:
    tree = supervised(LEASE_TTL=4)
    tree.all_ready()
    before = tree.pids()
    tree.signal(name, signal.SIGSTOP)
    replaced(tree, before, {name})
    assert "no heartbeat" in tree.log("root")


def restarts(status: dict, name: str) -> int:
    return next(worker["restarts"] for worker in status["workers"] if worker["name"] == name)


def test_a_restarted_manager_adopts_a_server_that_still_loads(supervised: Start) -> None:
    tree = supervised({"FAKE_READY_AFTER": 3})
    pid = tree.until(lambda status: status["phase"] == "loading" and status["server"]["pid"])["server"]["pid"]
    tree.signal("vllm", signal.SIGKILL)
    status = tree.until(lambda status: restarts(status, "vllm") == 1 and status["phase"] == "serving")
    assert status["server"]["pid"] == pid


def test_a_worker_that_dies_again_and_again_goes_into_quarantine_alone_until_the_operator_resets_it(
    supervised: Start,
) -> None:
    tree = supervised(RESTART_INTENSITY=2)
    tree.all_ready()
    before = tree.pids()
    kill_until_quarantine(tree, "notifier")
    after = tree.pids()
    assert after["notifier"] is None and before | {"notifier": None} == after
    assert tree.answers() and tree.status()["phase"] == "serving"
    assert "in quarantine" in tree.log("root") and "signal 9" in tree.worker("notifier")["detail"]

    done = tree.ctl("reset")
    assert done.returncode == 0 and "notifier" in done.stdout
    tree.until(lambda status: tree.worker("notifier")["phase"] == "ready")
    assert tree.pids()["server"] == before["server"]


def kill_until_quarantine(tree: Supervised, name: str) -> None:
    def failed() -> bool:
        if tree.worker(name)["phase"] == "ready":
            tree.signal(name, signal.SIGKILL)
        return tree.worker(name)["phase"] == "failed"

    wait_until(failed, 30, every_s=0.02, what=f"quarantine of {name}")


def test_a_manager_in_quarantine_leaves_the_gpus_by_the_dead_mans_switch(supervised: Start) -> None:
    tree = supervised(RESTART_INTENSITY=1, LEASE_TTL=3)
    tree.all_ready()
    kill_until_quarantine(tree, "vllm")
    wait_until(lambda: not [cmd for _, cmd in tree.left() if b"server.py" in cmd], 10, every_s=0.1)
    status = tree.status()
    assert (status["phase"], status["reason"]) == ("failed", "worker_failed")
    # Nobody could use the lease any more: it is not kept for ever, and the GPUs are shown as what they are.
    tree.until(lambda status: status["lease"] is None and {gpu["holder"] for gpu in status["gpus"]} == {"free"}, 30, "free GPUs")

    assert tree.ctl("reset").returncode == 0
    tree.all_ready()
    assert tree.answers()


def test_blind_detection_in_quarantine_ends_the_lease_and_reset_brings_the_model_back(supervised: Start) -> None:
    tree = supervised(RESTART_INTENSITY=1, LEASE_TTL=3)
    tree.all_ready()
    kill_until_quarantine(tree, "detector")
    status = tree.phase("failed")
    assert status["reason"] == "worker_failed" and status["lease"] is None and status["server"]["pid"] is None
    # The tree ends with the lease by itself, and may do so before the resolver has written why.
    assert wait_until(lambda: tree.journal("lease_revoked"), what="the end of the lease")[-1]["reason"] == "lease_expired"
    assert tree.ctl("reset").returncode == 0
    tree.all_ready()


def test_a_holder_that_is_killed_takes_its_tree_with_it_and_the_server_is_started_again(supervised: Start) -> None:
    tree = supervised({"FAKE_ENGINE": 1, "FAKE_FORK_GRANDCHILD": 1, "FAKE_IGNORE_TERM": 1})
    before = tree.all_ready()
    old = {pid for pid, cmd in tree.left() if b"server.py" in cmd}
    assert len(old) >= 3
    tree.signal("holder", signal.SIGKILL)
    after = tree.until(lambda status: status["phase"] == "serving" and status["server"]["pid"] != before["server"]["pid"])
    assert not old & {pid for pid, _ in tree.left()}
    assert after["server"]["deaths"] == 1
    assert [worker["restarts"] for worker in after["workers"]] == [0] * 6


@pytest.mark.parametrize("names", ["vllm holder", "holder vllm"])
def test_manager_and_holder_killed_together_leave_nothing_and_the_model_comes_back(supervised: Start, names: str) -> None:
    tree = supervised({"FAKE_ENGINE": 1, "FAKE_FORK_GRANDCHILD": 1})
    before = tree.all_ready()
    old = {pid for pid, cmd in tree.left() if b"server.py" in cmd}
    tree.signal(names, signal.SIGKILL)
    tree.until(lambda status: status["phase"] == "serving" and status["server"]["pid"] != before["server"]["pid"])
    assert not old & {pid for pid, _ in tree.left()}


def test_a_holder_that_hangs_does_not_keep_the_gpus_from_a_job(supervised: Start) -> None:
    tree = supervised({"FAKE_ENGINE": 1}, LEASE_TTL=30)
    tree.all_ready()
    tree.signal("holder", signal.SIGSTOP)
    tree.job(1, "0-7")
    assert tree.phase("waiting", 20)["reason"] == "yielded_to_job"
    assert not [cmd for _, cmd in tree.left() if b"server.py" in cmd or b"holder" in cmd]
    assert tree.journal("released")[-1]["job"] == "1"
