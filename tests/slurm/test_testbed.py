"""The test bed itself: what the other tests in this folder take for granted."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.slurm.testbed import SlurmError, SlurmNode, cgroup_mounts
from tests.waiting import wait_until

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm_testbed.py"


@pytest.fixture(params=["v1", "v2"])
def node(request: pytest.FixtureRequest) -> SlurmNode:
    return request.getfixturevalue("slurm_node" if request.param == "v2" else "slurm_node_v1")


def cgroup_folders_of(name: str) -> list[Path]:
    roots = set(cgroup_mounts().values())
    return [Path(folder) for root in roots for folder, _, _ in os.walk(root) if name in Path(folder).name]


def processes_of(folder: Path) -> list[str]:
    """Processes that work in the folder or whose command names it: daemons, slurmstepds, jobs."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                text = f"{process.cwd()} {process.cmdline()}"
                if str(folder) in text:
                    found.append(f"{process.pid} {text}")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_a_new_node_is_idle_and_has_no_job_folder(node: SlurmNode) -> None:
    assert node.node_state() == "idle"
    assert not list(node.scope.glob("job_*"))


def test_a_job_with_two_gpus_has_a_folder_while_it_lives(node: SlurmNode) -> None:
    job = node.sbatch("exec sleep 600", "--gres=gpu:2")
    wait_until(node.job_dir(job).is_dir, what="job folder")
    wait_until(lambda: list(node.spool.glob(f"{node.node}_{job}.*")), what="slurmstepd's socket")
    assert node.state(job) == "RUNNING"
    node.scancel(job)
    wait_until(lambda: not node.job_dir(job).exists(), what="job folder gone")
    node.wait_state(job, "CANCELLED")


def test_scontrol_names_the_indices_of_the_jobs_gpus(node: SlurmNode) -> None:
    two, none, one = (node.sbatch("exec sleep 600", *args) for args in (["--gres=gpu:2"], [], ["--gres=gpu:1"]))
    for job in (two, none, one):
        node.wait_state(job, "RUNNING")
    command = ["scontrol", "show", "job", str(two), "-d"]
    shown = subprocess.run(command, env={**os.environ, **node.env}, capture_output=True, text=True, check=True).stdout
    assert "JOB_GRES=gpu:h200:2" in shown
    assert "GRES=gpu:h200:2(IDX:0-1)" in shown
    assert [node.gpus_of(job) for job in (two, none, one)] == [{0, 1}, set(), {2}]


def test_an_unknown_job_is_unknown(node: SlurmNode) -> None:
    assert node.state(9999) == "UNKNOWN"


def test_an_ordinary_user_may_watch_the_spool_and_the_scope(node: SlurmNode) -> None:
    job = node.sbatch()
    wait_until(node.job_dir(job).is_dir, what="job folder")
    assert stat.S_IMODE(node.spool.stat().st_mode) == 0o755
    assert stat.S_IMODE(node.scope.stat().st_mode) == 0o755
    assert stat.S_IMODE(node.job_dir(job).stat().st_mode) == 0o755


def test_jobs_live_through_a_restart_of_slurmd(node: SlurmNode) -> None:
    job = node.sbatch("exec sleep 600", "--gres=gpu:1")
    wait_until(node.job_dir(job).is_dir, what="job folder")
    node.restart_slurmd()
    node.heal()
    assert node.state(job) == "RUNNING"
    assert node.job_dir(job).is_dir()
    node.kill_slurmd()
    assert node.job_dir(job).is_dir()
    node.start_slurmd()
    later = node.sbatch()
    wait_until(node.job_dir(later).is_dir, within_s=60, what="folder of a job after the restart")


def test_an_ended_slurmctld_comes_back_with_its_jobs(node: SlurmNode) -> None:
    job = node.sbatch("exec sleep 600", "--gres=gpu:4")
    node.wait_state(job, "RUNNING")
    node.kill_ctld()
    node.start_ctld()
    wait_until(lambda: node.gpus_of(job) == {0, 1, 2, 3}, what="the job known again")


def test_a_killed_slurmctld_may_forget_a_job_that_runs_on(node: SlurmNode) -> None:
    job = node.sbatch("exec sleep 600", "--gres=gpu:4")
    wait_until(node.job_dir(job).is_dir, what="job folder")
    node.kill_ctld(signal.SIGKILL)
    assert node.job_dir(job).is_dir()
    node.start_ctld()
    node.cancel_all()
    assert not node.job_dir(job).exists()


def test_a_stopped_slurmctld_does_not_answer_until_it_continues(node: SlurmNode) -> None:
    node.stop_ctld()
    command = ["scontrol", "--local", "show", "config"]
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(command, env={**os.environ, **node.env}, capture_output=True, timeout=1)
    node.cont_ctld()
    assert node.node_state() == "idle"


def test_the_node_is_emptied_between_tests_part_one_leaves_a_mess(node: SlurmNode) -> None:
    job = node.sbatch("trap '' TERM; sleep 600 & wait; wait", "--gres=gpu:8")
    wait_until(node.job_dir(job).is_dir, what="job folder")
    node.sbatch("exec sleep 600", "--gres=gpu:8")  # pending
    node.kill_slurmd()
    node.stop_ctld()


def test_the_node_is_emptied_between_tests_part_two_finds_it_idle(node: SlurmNode) -> None:
    assert node.node_state() == "idle"
    assert not list(node.scope.glob("job_*"))
    node.wait_state(node.sbatch("exec sleep 600", "--gres=gpu:8"), "RUNNING")


@pytest.mark.parametrize("cgroup", ["v1", "v2"])
def test_two_nodes_at_once_do_not_see_each_other(cgroup: str, make_slurm_node: Callable[..., SlurmNode]) -> None:
    first, second = make_slurm_node(cgroup=cgroup), make_slurm_node(cgroup=cgroup, gpus=2)
    assert first.scope != second.scope
    job = first.sbatch("exec sleep 600", "--gres=gpu:8")
    wait_until(first.job_dir(job).is_dir, what="job folder")
    assert not list(second.scope.glob("job_*"))
    second.stop()
    assert first.job_dir(job).is_dir()
    assert first.state(job) == "RUNNING"


@pytest.mark.parametrize("cgroup", ["v1", "v2"])
def test_stop_leaves_no_process_and_no_cgroup_folder(cgroup: str, make_slurm_node: Callable[..., SlurmNode]) -> None:
    node = make_slurm_node(cgroup=cgroup)
    job = node.sbatch("sleep 600 & sleep 600", f"--chdir={node.folder}")
    wait_until(node.job_dir(job).is_dir, what="job folder")
    assert processes_of(node.folder)
    assert cgroup_folders_of(node.node)
    node.stop()
    wait_until(lambda: not processes_of(node.folder), what="no process left")
    assert not cgroup_folders_of(node.node)


@pytest.mark.parametrize("cgroup", ["v1", "v2"])
def test_stop_also_ends_jobs_whose_daemons_were_killed(cgroup: str, make_slurm_node: Callable[..., SlurmNode]) -> None:
    node = make_slurm_node(cgroup=cgroup)
    job = node.sbatch("exec sleep 600", f"--chdir={node.folder}")
    wait_until(node.job_dir(job).is_dir, what="job folder")
    node.kill_slurmd()
    node.kill_ctld(signal.SIGKILL)
    assert processes_of(node.folder)
    node.stop()
    wait_until(lambda: not processes_of(node.folder), what="no process left")
    assert not cgroup_folders_of(node.node)


def test_the_prolog_runs_before_the_job_has_a_folder(tmp_path: Path, make_slurm_node: Callable[..., SlurmNode]) -> None:
    seen, go = tmp_path / "seen", tmp_path / "go"
    prolog = tmp_path / "prolog"
    prolog.write_text(f'#!/bin/sh\necho "$SLURM_JOB_GPUS" > {seen}\nwhile [ ! -e {go} ]; do sleep 0.05; done\n')
    prolog.chmod(0o755)
    node = make_slurm_node(prolog=prolog)
    job = node.sbatch("exec sleep 600", "--gres=gpu:2")
    wait_until(lambda: seen.exists() and seen.read_text() == "0,1\n", what="prolog")
    assert not node.job_dir(job).exists()
    go.touch()
    wait_until(node.job_dir(job).is_dir, what="job folder")


def test_the_folder_of_a_killed_node_can_be_used_again(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("s")
    with SlurmNode(folder) as left_over:
        job = left_over.sbatch("exec sleep 600", "--gres=gpu:8")
        wait_until(left_over.job_dir(job).is_dir, what="job folder")
        left_over.kill_slurmd()
        left_over.kill_ctld(signal.SIGKILL)
        with SlurmNode(folder) as node:
            assert node.node_state() == "idle"
            assert node.state(job) == "UNKNOWN"
            assert left_over.job_dir(job).is_dir()


def test_a_node_that_cannot_start_says_why_with_the_daemons_logs(tmp_path: Path) -> None:
    node = SlurmNode(tmp_path / "n", extra_conf="SelectType=select/absent\n")
    with pytest.raises(SlurmError, match=r"(?s)did not start.*slurmctld.*select/absent"):
        node.start()
    assert not processes_of(node.folder)
    assert not cgroup_folders_of(node.node)


def test_the_command_prints_how_to_use_it_and_takes_everything_down(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("s")
    command = [sys.executable, str(SCRIPT), "up", "--dir", str(folder), "--gpus", "3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        lines: list[str] = []
        while not any("Ctrl-C" in line for line in lines):
            line = process.stdout.readline()
            assert line, lines
            lines.append(line)
        setting = next(line for line in lines if "export SLURM_CONF=" in line).strip().partition("=")[2]
        asked = ["sinfo", "-h", "-o", "%n %T %G"]
        answer = subprocess.run(asked, env={**os.environ, "SLURM_CONF": setting}, capture_output=True, text=True)
        name, state, gres = answer.stdout.split()
        assert (state, gres) == ("idle", "gpu:h200:3")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert not processes_of(folder)
    assert not cgroup_folders_of(name)
