"""Where and when a supervisor refuses to start, and how it takes new settings."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmwd.adapters import procs
from llmwd.adapters.cgroups import read_mounts
from tests.tree.conftest import Start
from tests.tree.supervised import CHECKOUT, MARK, Supervised
from tests.waiting import wait_until


def run_supervisor(tree: Supervised, **how: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "llmwd.supervisor"], env=tree.env, cwd=CHECKOUT, capture_output=True, text=True,
        timeout=60, stdin=subprocess.DEVNULL, **how,
    )


def test_a_second_supervisor_is_refused_with_the_pid_of_the_first(supervised: Start) -> None:
    tree = supervised()
    tree.all_ready()
    before = tree.pids()
    second = run_supervisor(tree)
    assert second.returncode == 1
    assert str(before["root"]) in second.stderr and "already running" in second.stderr
    assert "Traceback" not in second.stderr
    assert tree.pids() == before and tree.answers()


def test_of_many_started_at_once_exactly_one_runs_while_others_ask_who_does(supervised: Start) -> None:
    tree = supervised(start=False)
    tree.observe()
    programs = [
        subprocess.Popen([sys.executable, "-m", "llmwd.supervisor"], env=tree.env, cwd=CHECKOUT,
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(4)
    ]
    try:
        tree.all_ready()  # asks for the lock every 10 ms
        wait_until(lambda: sum(program.poll() is None for program in programs) == 1, 20)
        assert sorted(program.returncode or 0 for program in programs) == [0, 1, 1, 1]
    finally:
        for program in programs:
            program.terminate()
            program.wait(20)


def test_somebody_who_only_asks_who_runs_is_not_taken_for_a_supervisor(supervised: Start) -> None:
    tree = supervised(start=False)
    tree.runtime.mkdir(mode=0o700)
    lock = tree.runtime / "supervisor.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as `status` does, for a moment
        tree.start()
        wait_until(lambda: has_open(tree.process.pid, lock), 20, every_s=0.001)
    tree.serving()


def has_open(pid: int, path: Path) -> bool:
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed since
            if os.readlink(f"/proc/{pid}/fd/{fd}") == str(path):
                return True
    return False


@pytest.fixture(params=["v2", "v1"])
def job_cgroup(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A real cgroup folder with the name that Slurm gives a job's, below one that no detector looks into."""
    version = int(request.param[1])
    mount = next((mount for mount in read_mounts() if mount.version == version), None)
    assert mount is not None, f"cgroup {request.param} is not mounted here"
    top = Path(mount.point) / f"llmwd-test-{uuid.uuid4().hex}"
    inside = "node7_slurmstepd.scope/job_42/step_0" if version == 2 else "slurm_node7/uid_0/job_42"
    folders = [top / Path(*Path(inside).parts[:depth]) for depth in range(len(Path(inside).parts) + 1)]
    try:
        for folder in folders:
            folder.mkdir()
        yield folders[-1]
    finally:
        for folder in reversed(folders):
            wait_until(lambda: remove(folder), 10, what=f"removal of {folder}")


def remove(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:  # a process is just ending in it
        return not folder.exists()
    return True


def test_a_start_inside_a_slurm_job_is_refused_with_the_reason(supervised: Start, job_cgroup: Path) -> None:
    tree = supervised(start=False)
    refused = run_supervisor(tree, preexec_fn=lambda: (job_cgroup / "cgroup.procs").write_text(str(os.getpid())))
    assert refused.returncode == 1
    assert "inside a Slurm job" in refused.stderr and "job_42" in refused.stderr and "outside Slurm" in refused.stderr
    assert not tree.runtime.exists()


def test_all_mistakes_in_the_settings_are_told_together_and_nothing_starts(supervised: Start) -> None:
    tree = supervised(start=False, NUM_GPUS="many", RESUME_AFTER="soon", DETECTION="magic")
    refused = run_supervisor(tree)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    for name in ("NUM_GPUS", "RESUME_AFTER", "DETECTION"):
        assert any(name in line and "etc/config.env:" in line for line in refused.stderr.splitlines()), refused.stderr


def test_settings_that_bash_cannot_read_are_told_with_their_line(supervised: Start) -> None:
    tree = supervised(start=False)
    with (tree.home / "etc" / "config.env").open("a") as file:
        file.write("NUM_GPUS=(1\n")
    refused = run_supervisor(tree)
    assert refused.returncode == 1 and "etc/config.env:" in refused.stderr and "Traceback" not in refused.stderr


def test_a_profile_with_mistakes_is_shown_and_mended_without_a_restart(supervised: Start) -> None:
    tree = supervised({"NUM_GPUS": "lots"})
    status = tree.phase("failed")
    assert status["reason"] == "config_error" and "models/fake.env:" in status["detail"]
    tree.write_profile("fake")
    assert tree.ctl("reload").returncode == 0
    tree.serving()


# --- SIGHUP ---------------------------------------------------------------------------------------------


def reload(tree: Supervised, times: int) -> None:
    """SIGHUP, until the root has read its settings (for the `times`-th time) or refused them."""
    tree.process.send_signal(signal.SIGHUP)
    wait_until(lambda: tree.log("root").count("settings read again") >= times, 20)


def renewed_for_s(tree: Supervised) -> float:
    fact = tree.look().facts.gpus
    return fact.lease.expires_s - fact.at_s


def test_new_settings_come_into_force_without_touching_the_server(supervised: Start) -> None:
    tree = supervised()
    tree.all_ready()
    before = tree.pids()
    tree.write_settings(RESUME_AFTER=7, LEASE_TTL=9, NTFY_PRIORITY="low", POLL_INTERVAL=1, YIELD_GRACE=2, BACKOFF_MAX=60)
    reload(tree, 1)
    wait_until(lambda: renewed_for_s(tree) > 6.5, what="the resolver's first use of LEASE_TTL")  # it reads them by itself
    # A job comes and goes elsewhere: proof that the resolver has gone on since.
    tree.job(1, "0")
    tree.until(lambda status: status["jobs"])
    assert tree.pids() == before and tree.answers()
    tree.job(2, "1-7")
    tree.phase("waiting")
    tree.job_over(2)
    tree.until(lambda status: status["reason"] == "resume_delay" and "7 s" in status["detail"], what="RESUME_AFTER's new value")
    tree.write_settings(RESUME_AFTER=0)
    reload(tree, 2)
    tree.serving()


def test_new_arguments_of_the_active_profile_restart_the_server_and_only_it(supervised: Start) -> None:
    tree = supervised()
    tree.all_ready()
    before = tree.pids()
    tree.write_profile("fake", VLLM_ARGS="--served-model-name fake --max-model-len 4096")
    reload(tree, 1)
    tree.until(lambda status: status["phase"] == "serving" and status["server"]["pid"] not in (None, before["server"]))
    after = tree.pids()
    assert after | {"server": 0} == before | {"server": 0}
    assert b"4096" in procs.cmdline(after["server"])
    assert tree.journal("released")[-1]["reason"] == "switching"


def test_settings_with_mistakes_change_nothing_and_are_told_with_file_and_line(supervised: Start) -> None:
    tree = supervised()
    tree.all_ready()
    before = tree.pids()
    tree.write_settings(RESUME_AFTER="soon")
    tree.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "RESUME_AFTER" in tree.log("root") and "RESUME_AFTER" in tree.log("vllm"), 20)
    assert "etc/config.env:" in tree.log("root")
    assert tree.pids() == before and tree.answers()

    # Neither does the death of a worker that cannot read them now, nor a yield.
    tree.signal("vllm", signal.SIGKILL)
    tree.until(lambda status: status["phase"] == "serving" and tree.worker("vllm")["restarts"] == 1)
    wait_until(lambda: tree.worker("vllm")["phase"] == "ready")
    assert tree.pids()["server"] == before["server"] and tree.answers()


def test_after_a_reload_with_mistakes_a_yield_is_still_followed_by_a_resume(supervised: Start) -> None:
    tree = supervised()
    tree.all_ready()
    tree.write_profile("fake", NUM_GPUS="none of your business")
    tree.process.send_signal(signal.SIGHUP)
    tree.until(lambda status: "models/fake.env" in status["detail"])
    tree.job(1, "all-of-them")
    tree.phase("waiting")
    tree.job_over(1)
    tree.serving()
    assert tree.answers()


def test_no_process_of_a_test_is_unseen(supervised: Start) -> None:
    """The checks of these tests rest on the mark: every process of a tree carries it."""
    tree = supervised({"FAKE_FORK_GRANDCHILD": 1})
    tree.all_ready()
    marked = {pid for pid, _ in tree.left()}
    assert marked >= set(tree.pids().values()) and len(marked) >= 9, MARK
