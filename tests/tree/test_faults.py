"""Faults of our own that the random ones (test_chaos.py) do not reach on purpose, each judged by what must be true."""

import os
import resource
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from tests.chaos.disk import Disk
from tests.fakes.ntfy import NtfyServer
from tests.fakes.wallclock import WallClock
from tests.tree.conftest import Start
from tests.tree.supervised import WORKERS, Supervised
from tests.waiting import wait_until

STUBBORN = {"FAKE_ENGINE": 1, "FAKE_FORK_GRANDCHILD": 1, "FAKE_CHILDREN": 11, "FAKE_IGNORE_TERM": 1}


def servers(tree: Supervised) -> set[int]:
    return {pid for pid, cmd in tree.left() if b"server.py" in cmd}


def at_one_blow(tree: Supervised, *names: str) -> None:
    """SIGKILL to all of these in the same instant: stopped first, so that none sees another die."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        tree.signal(" ".join(names), number)


@pytest.mark.parametrize("killed", [("holder", "vllm", "root"), ("holder", *WORKERS, "root")], ids=["the three", "all"])
def test_nothing_is_left_when_all_who_would_clear_up_die_in_the_same_instant(supervised: Start, killed: tuple[str, ...]) -> None:
    """`pkill -9 -f llmwd`: an engine without its server would stay on the GPUs for ever."""
    tree = supervised(STUBBORN, LEASE_TTL=60)
    tree.all_ready()
    assert len(servers(tree)) >= 14
    at_one_blow(tree, *killed)
    wait_until(lambda: not tree.left(), 15, every_s=0.05, what=f"the end of {tree.left()}")


def gone(tree: Supervised, within_s: float) -> None:
    wait_until(lambda: not servers(tree), within_s, what=f"the end of the server {servers(tree)}")


def bound_s(tree: Supervised) -> float:
    """When a server must be gone whatever is broken, with time for a busy machine: the observer has a closer look."""
    return tree.settings["LEASE_TTL"] + 1 + 15


@pytest.mark.parametrize("others", ["", "root"])
def test_a_holder_that_hangs_in_the_middle_of_a_release_keeps_no_gpu(supervised: Start, others: str) -> None:
    """After its acknowledgement; with the root, whose death alone would end the tree, dead as well."""
    tree = supervised(STUBBORN, LEASE_TTL=30, YIELD_GRACE=1)
    tree.all_ready()
    holder = tree.server_fact().holder_pid
    tree.job(1, "0-7")
    wait_until(lambda: "yielded_to_job: " in tree.log("server"), every_s=0.001, what="its acknowledgement")
    tree.signal_pid(holder, signal.SIGSTOP)
    if others:
        tree.signal("root", signal.SIGKILL)
    gone(tree, 20)  # and not only with the lease


def test_manager_and_root_killed_while_the_holder_is_stopped_leave_nothing(supervised: Start) -> None:
    tree = supervised(STUBBORN, LEASE_TTL=4)
    tree.all_ready()
    tree.signal("holder", signal.SIGSTOP)
    at_one_blow(tree, "vllm", "root")
    wait_until(lambda: not tree.left(), bound_s(tree), every_s=0.05, what=f"the end of {tree.left()}")


def test_an_idle_holder_that_hangs_is_met_before_it_is_needed(supervised: Start) -> None:
    tree = supervised({"FAKE_ENGINE": 1}, LEASE_TTL=4)
    before = tree.all_ready()
    tree.signal("holder", signal.SIGSTOP)
    after = tree.until(lambda status: status["phase"] == "serving" and status["server"]["pid"] != before["server"]["pid"])
    assert after["server"]["deaths"] == 1 and "its holder hangs" in tree.journal("server_died")[0]["how"]
    assert [worker["restarts"] for worker in after["workers"]] == [0] * 6


def test_a_resolver_that_was_killed_before_it_kept_a_revocation_does_not_bring_the_lease_back(supervised: Start) -> None:
    tree = supervised(LEASE_TTL=8)
    tree.all_ready()
    file = tree.runtime / "facts" / "resolver.bin"
    kept = file.read_bytes()
    tree.job(1, "0-7")
    gone(tree, 10)
    tree.phase("waiting")
    wait_until(lambda: tree.journal("release_proved"), what="the proof, which is not what is to be lost here")
    tree.signal("root", signal.SIGSTOP)  # so that the next resolver finds what this one would have left then
    pid = tree.worker("resolver")["pid"]
    tree.signal("resolver", signal.SIGKILL)
    wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, 10, what="the end of the resolver")
    file.write_bytes(kept)
    tree.job_over(1)
    tree.signal("root", signal.SIGCONT)
    tree.serving()
    assert [line["epoch"] for line in tree.journal("server_started")] == [1, 2]
    ends = [(line["epoch"], line["reason"]) for line in tree.journal("lease_revoked")]
    assert ends == [(1, "yielded_to_job"), (1, "lease_expired")]
    proved = wait_until(lambda: tree.journal("release_proved")[1:], 10)[-1]
    assert (proved["epoch"], proved["took_s"], proved["within_budget"]) == (1, 0, True)


def test_a_manager_that_comes_back_to_an_empty_folder_finds_its_holder(supervised: Start) -> None:
    tree = supervised(STUBBORN, LEASE_TTL=60)
    tree.all_ready()
    old, holder = servers(tree), tree.server_fact().holder_pid
    for path in tree.runtime.glob("*vllm*"):  # what the root looks at to see whether its folder is there stays
        if not path.name.startswith("bus"):
            path.unlink()
    tree.signal("vllm", signal.SIGKILL)
    wait_until(lambda: not old & servers(tree) and holder not in {pid for pid, _ in tree.left()}, 10, what="the end of the old tree")
    tree.all_ready()


# The others are left to chance.
PAIRS = (("vllm", "holder"), ("root", "holder"), ("root", "vllm"), ("detector", "resolver"), ("resolver", "vllm"))


def test_whichever_two_of_ours_hang_a_job_gets_its_gpus_within_the_leases_time(supervised: Start) -> None:
    """One after the other on one tree, and it always serves again once they go on."""
    tree = supervised({"FAKE_ENGINE": 1}, LEASE_TTL=4, RESTART_INTENSITY=1000)
    for number, pair in enumerate(PAIRS):
        tree.all_ready()
        pids = {**tree.pids(), "holder": tree.server_fact().holder_pid}
        for name in pair:  # by these numbers, which are let go on below: a worker may be another one by then
            tree.signal_pid(pids[name], signal.SIGSTOP)
        tree.job(number, "0-7")
        gone(tree, bound_s(tree))
        for name in pair:
            tree.signal_pid(pids[name], signal.SIGCONT)
        tree.until(lambda status: status["phase"] != "serving")  # or it would seem to serve again at once
        tree.job_over(number)


def test_a_server_that_falls_silent_is_killed_and_started_again(supervised: Start) -> None:
    """Healthy by its own word, and nothing is answered: not a model that serves."""
    tree = supervised({"FAKE_SILENT_AFTER": 2, "FAKE_ENGINE": 1}, PROBE_INTERVAL=0.4)
    before = tree.serving()["server"]["pid"]
    tree.until(lambda status: status["server"]["deaths"] == 1)
    assert "answers nothing" in tree.journal("server_died")[0]["how"]
    assert tree.serving()["server"]["pid"] != before


@pytest.mark.parametrize("limit", [resource.RLIMIT_NOFILE, resource.RLIMIT_AS], ids=["files", "memory"])
def test_workers_without_files_or_memory_left_yield_all_the_same(supervised: Start, limit: int) -> None:
    tree = supervised({"FAKE_ENGINE": 1}, LEASE_TTL=4, RESTART_INTENSITY=1000)
    tree.all_ready()
    for name in ("detector", "resolver", "vllm"):
        pid = tree.pids()[name]
        used = max(map(int, os.listdir(f"/proc/{pid}/fd"))) + 1
        if limit == resource.RLIMIT_AS:
            used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(pid, limit, (used, used))
    tree.job(1, "0-7")
    gone(tree, bound_s(tree))
    tree.job_over(1)
    if limit == resource.RLIMIT_AS:  # nothing says that a start fails for this, and it is inherited
        tree.signal("detector resolver vllm", signal.SIGKILL)
    tree.all_ready()


def test_a_root_that_cannot_fork_lives_on_and_forks_again_once_it_can(supervised: Start) -> None:
    tree = supervised(RESTART_INTENSITY=1)
    before = tree.all_ready()
    root = before["root"]["pid"]
    allowed = resource.prlimit(root, resource.RLIMIT_NOFILE)
    resource.prlimit(root, resource.RLIMIT_NOFILE, (3, allowed[1]))  # a dead worker's descriptors are no use either
    tree.signal("detector vllm", signal.SIGKILL)
    tree.job(1, "0-7")
    gone(tree, bound_s(tree))
    wait_until(lambda: tree.log("root").count("cannot be forked") >= 6, 20, what="attempts")
    resource.prlimit(root, resource.RLIMIT_NOFILE, allowed)
    tree.job_over(1)
    tree.until(lambda status: [each["restarts"] for each in status["workers"]] == [0, 1, 0, 1, 0, 0])
    assert tree.all_ready()["root"]["pid"] == root


def test_workers_that_hang_for_want_of_memory_do_not_outlive_their_root(supervised: Start) -> None:
    """Python's Thread.start() waits for ever for a thread that had no memory to begin; nobody is left to end such a worker."""
    with NtfyServer() as ntfy:
        tree = supervised(LEASE_TTL=4, NTFY_TOPIC="t", NTFY_SERVER=ntfy.url)
        tree.all_ready()
        pids = {name: pid for name, pid in tree.pids().items() if name in WORKERS}
        for pid in pids.values():
            used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
            resource.prlimit(pid, resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
        tree.job(1, "0-7")
        gone(tree, bound_s(tree))
        tree.signal("root", signal.SIGKILL)
        wait_until(lambda: not tree.left(), bound_s(tree), what=f"the end of {tree.left()}")


def test_a_manager_in_quarantine_frees_the_gpus_and_people_are_told(supervised: Start) -> None:
    with NtfyServer() as ntfy:
        tree = supervised({"FAKE_ENGINE": 1}, LEASE_TTL=3, RESTART_INTENSITY=1, NTFY_TOPIC="t", NTFY_SERVER=ntfy.url)
        tree.all_ready()

        def quarantined() -> bool:
            if tree.worker("vllm")["phase"] == "ready":
                tree.signal("vllm", signal.SIGKILL)
            return tree.worker("vllm")["phase"] == "failed"

        wait_until(quarantined, 30, every_s=0.05)
        gone(tree, bound_s(tree))
        wait_until(lambda: [each for each in ntfy.messages if "In quarantine" in each["title"] and "vllm" in each["title"]], 30)
        assert tree.ctl("reset").returncode == 0
        wait_until(lambda: [each for each in ntfy.messages if "Workers again" in each["title"]], 30)


def test_the_wall_clock_may_jump_an_hour_back_and_forth(supervised: Start, tmp_path: Path) -> None:
    """The machine's own stays as it is: only our processes see it."""
    clock = WallClock(tmp_path)
    tree = supervised(start=False, LEASE_TTL=4)
    tree.env |= clock.environ
    tree.start()
    before = tree.all_ready()
    began_s = time.monotonic()
    for hours in (-1, 1, -1, 0, 1):
        clock.shift(hours * 3600)
        wait_until(lambda: time.monotonic() > began_s + 5, 10) if hours == 1 else None
        assert tree.answers()
    status = tree.all_ready()
    assert status["server"]["pid"] == before["server"]["pid"] and tree.journal("lease_revoked") == []
    assert [worker["restarts"] for worker in status["workers"]] == [0] * 6
    wall = [entry["at"] for entry in tree.journal()]
    for hours, job in ((-1, 1), (1, 2)):
        clock.shift(hours * 3600)
        tree.job(job, "0-7")
        gone(tree, 20)
        tree.phase("waiting")
        tree.job_over(job)
        tree.all_ready()
    assert tree.ctl("yield", "--for", "2").returncode == 0
    gone(tree, 20)
    assert [line["reason"] for line in tree.journal("lease_revoked")] == ["yielded_to_job", "yielded_to_job", "held"]
    clock.shift(-3600)
    tree.all_ready(20)
    assert tree.journal()[-1]["at"] != wall[-1], "the clock was not seen to change"


def job_in(folder: Path, id: int, gpus: str) -> None:
    (folder / f".{id}").write_text(gpus)
    (folder / f".{id}").rename(folder / f"job_{id}")


def test_a_runtime_folder_that_is_deleted_delays_no_yield_and_it_begins_again_in_a_new_one(supervised: Start, tmp_path: Path) -> None:
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    tree = supervised({"FAKE_ENGINE": 1}, LEASE_TTL=60, SIM_DIR=jobs)
    tree.all_ready()
    root = tree.status()["root"]["pid"]
    tree.forget()
    job_in(jobs, 1, "0-7")
    gone(tree, 20)
    (jobs / "job_1").unlink()
    status = tree.all_ready()
    assert status["root"]["pid"] == root and tree.process.poll() is None
    assert "was deleted under us" in tree.log("root") and tree.answers()
    assert tree.ctl("yield").returncode == 0
    gone(tree, 20)
    tree.forget()
    assert tree.phase("held")["reason"] == "held"
    assert tree.stop() == 0


def test_a_runtime_folder_on_a_full_disk_delays_no_yield_costs_no_model_and_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    disk = Disk(tmp_path / "run", mib=1)
    tree = Supervised(tmp_path, {"FAKE_ENGINE": 1, "SIM_DIR": tmp_path / "jobs", "LEASE_TTL": 60})
    try:
        tree.start().all_ready()
        tree.tell("fault", name="disk", open=True)
        full = disk.spoil("full")  # only root can make a small disk: else it is not, and the rest has to hold all the same
        job_in(tmp_path / "jobs", 1, "0-7")
        gone(tree, 20)
        (tmp_path / "jobs" / "job_1").unlink()
        wait_until(lambda: servers(tree), 20, what="the model back, though nothing of it can be written")
        # The next one may find what was true before the lease: then the model has to go, because nobody vouches for it.
        tree.signal_pid(tree.worker("resolver")["pid"], signal.SIGKILL)
        job_in(tmp_path / "jobs", 2, "0-7")
        gone(tree, bound_s(tree))
        wait_until(lambda: [line["epoch"] for line in tree.journal("released")] == [1, 2], 20, what="the second release")
        (tmp_path / "jobs" / "job_2").unlink()
        assert tree.ctl("status").returncode == 0  # as it was
        asked_s = time.monotonic()
        wait_until(lambda: time.monotonic() > asked_s + 6, what="the root's next showing of itself, each five seconds")
        # Now and then a write finds the room that another one left.
        told = {worker: tree.log(worker).count("No space left on device") for worker in ("root", "resolver", "vllm")}
        assert max(told.values()) <= 2, told  # of two incarnations
        assert any(told.values()) or not full
        disk.heal()
        tree.tell("healed", name="disk")
        tree.all_ready()
        assert tree.answers() and [line["epoch"] for line in tree.journal("server_started")] == [1, 2, 3]
    finally:
        disk.heal()
        tree.close()
        disk.close()


def test_lies_on_the_holders_socket_do_not_keep_the_gpus(supervised: Start) -> None:
    tree = supervised({"FAKE_ENGINE": 1}, LEASE_TTL=60)
    tree.all_ready()
    path = str(next(tree.runtime.glob("holder-vllm.sock")))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as liar:
        liar.connect(path)
        liar.send(b'{"type":"renew","expires_s":1e300}')
        tree.job(1, "0-7")
        gone(tree, 20)


def test_a_guard_that_is_stopped_does_not_outlive_its_root(supervised: Start) -> None:
    tree = supervised(LEASE_TTL=4)
    tree.serving()
    guard = wait_until(lambda: [pid for pid, cmdline in tree.left() if cmdline.startswith(b"guard of vllm")], what="the guard")[0]
    tree.signal_pid(guard, signal.SIGSTOP)
    tree.signal("root", signal.SIGKILL)
    wait_until(lambda: not tree.left(), 20, what=f"the end of {tree.left()}")
