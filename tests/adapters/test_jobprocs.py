"""Jobs by their processes, looked at by a child that can be abandoned."""

import os
import sys
import time
from pathlib import Path

import pytest

from llmwd.adapters.jobprocs import INITIAL_PID_NAMESPACE, JobProcesses, hidden
from tests.waiting import wait_until

V2 = "0::/system.slice/{}slurmstepd.scope/{}/step_batch/user/task_special\n"
V1 = "6:freezer:/slurm{}/uid_0/job_{}/step_0\n0::/\n"


def process(proc: Path, cgroup: str, comm: str = "python", cmdline: bytes = b"python\0", status: str = "") -> None:
    folder = proc / str(len(list(proc.iterdir())) + 100)
    folder.mkdir()
    (folder / "cgroup").write_text(cgroup)
    (folder / "comm").write_text(comm + "\n")
    (folder / "cmdline").write_bytes(cmdline)
    (folder / "status").write_text(status)


def look(source: JobProcesses) -> dict[str, object] | None:
    assert source.begin()
    wait_until(lambda: source.collect(time.monotonic()), within_s=30)
    return source.jobs()


def fake(tmp_path: Path, node: str = "") -> JobProcesses:
    source = JobProcesses(node, str(tmp_path))
    return source


def test_jobs_are_found_by_the_cgroups_of_both_versions(tmp_path: Path) -> None:
    process(tmp_path, V2.format("", "job_1"))
    process(tmp_path, V2.format("n1_", "job_2"))
    process(tmp_path, V2.format("", "sEKNKTV3WPV500"))
    process(tmp_path, V1.format("", 4))
    process(tmp_path, V1.format("_n1", 5))
    process(tmp_path, "0::/../../system.slice/slurmstepd.scope/job_6\n")
    assert set(look(fake(tmp_path)) or ()) == {"1", "2", "sEKNKTV3WPV500", "4", "5", "6"}


@pytest.mark.parametrize(
    "cgroup",
    [
        "0::/system.slice/slurmstepd.scope/system\n",
        "0::/system.slice/slurmd.service\n",
        "0::/user.slice/job_9\n",
        "6:freezer:/other/uid_0/job_9\n",
        V2.format("", "job_9").strip() + " (deleted)\n",
    ],
)
def test_other_cgroups_are_no_jobs(cgroup: str, tmp_path: Path) -> None:
    process(tmp_path, cgroup)
    assert look(fake(tmp_path)) == {}


def test_what_a_jobs_own_processes_may_run_on_is_told_with_it(tmp_path: Path) -> None:
    for job, cpus in (("1", "0-3"), ("1", "0-3"), ("1", "8,10"), ("2", ""), ("3", "4 5")):
        process(tmp_path, V2.format("n1_", f"job_{job}"), status=f"Name:\tx\nCpus_allowed:\tf\nCpus_allowed_list:\t{cpus}\nMems:\n")
    process(tmp_path, V2.format("n1_", "job_1"), "slurmstepd", b"slurmstepd: [1.batch]\0", "x\nCpus_allowed_list:\t0-63\n")
    process(tmp_path, V2.format("n2_", "job_9"), status="x\nCpus_allowed_list:\t1\n")
    process(tmp_path, "0::/user.slice\n", status="x\nCpus_allowed_list:\t2\n")
    source = fake(tmp_path, "n1")
    assert set(look(source) or ()) == {"1", "2", "3"}
    assert [(job.id, job.lists) for job in source.cpus] == [("1", ("0-3", "8,10"))]


def test_a_slurmstepd_names_its_job_in_its_title_where_no_cgroup_does(tmp_path: Path) -> None:
    process(tmp_path, "0::/\n", "slurmstepd", b"slurmstepd: [12.batch]\0")
    process(tmp_path, "0::/\n", "slurmstepd", b"slurmstepd: [13.4 stepmgr]\0")
    process(tmp_path, "0::/\n", "slurmstepd", b"/usr/sbin/slurmstepd infinity\0")
    process(tmp_path, "0::/\n", "liar", b"slurmstepd: [99.batch]\0")
    assert set(look(fake(tmp_path)) or ()) == {"12", "13"}


def test_a_title_of_another_users_making_does_not_count(tmp_path: Path) -> None:
    process(tmp_path, "0::/\n", "slurmstepd", b"slurmstepd: [12.batch]\0")
    os.chown(next(tmp_path.iterdir()), 65534, 65534)
    assert look(fake(tmp_path)) == {}


def test_another_nodes_jobs_do_not_count_where_this_node_is_named(tmp_path: Path) -> None:
    process(tmp_path, V2.format("n1_", "job_1"))
    process(tmp_path, V2.format("n2_", "job_2"), "slurmstepd", b"slurmstepd: [2.batch]\0")
    process(tmp_path, V2.format("", "job_3"))
    waiting = "0::/system.slice/n2_slurmstepd.scope/system\n"
    process(tmp_path, waiting, "slurmstepd", b"slurmstepd: [4.batch]\0")
    assert set(look(fake(tmp_path, "n1")) or ()) == {"1", "3"}


def test_the_real_proc_can_be_read() -> None:
    source = JobProcesses()
    assert look(source) is not None and source.check().works


def test_a_look_that_hangs_is_killed_and_repeated_once_before_it_counts() -> None:
    source = JobProcesses(argv=(sys.executable, "-c", "import time; time.sleep(600)"))
    for again in (True, False):
        assert source.begin() and source.fileno() is not None
        child = source._child
        assert not source.collect(time.monotonic())
        assert source.collect(source.deadline_s)
        assert child is not None and child.wait(30) < 0
        assert source.again() is again
    assert source.jobs() is None and not source.check().works and not source.absent


def test_half_an_answer_is_none(tmp_path: Path) -> None:
    source = JobProcesses(argv=(sys.executable, "-c", "print('7 -', flush=True); import os; os._exit(1)"))
    assert look(source) is None


def test_a_good_look_after_a_failed_one_works_again(tmp_path: Path) -> None:
    source = fake(tmp_path)
    good, source._argv = source._argv, (sys.executable, "-c", "import time; time.sleep(600)")
    source.begin()
    assert source.collect(source.deadline_s)
    source._argv = good
    assert source.again()
    assert look(source) == {} and source.check().works


@pytest.mark.parametrize(
    ("options", "uid", "gids", "visible"),
    [
        ("rw", 1000, {1000}, True), ("rw,hidepid=2", 1000, {1000}, False), ("rw,hidepid=invisible", 1000, {1000}, False),
        ("rw,gid=50,hidepid=2", 1000, {50}, True), ("rw,gid=50,hidepid=2", 1000, {1000}, False),
        ("rw,hidepid=2", 0, {0}, True), ("rw,hidepid=0", 1000, {1000}, True),
    ],
)
def test_hidepid_makes_the_source_absent(options: str, uid: int, gids: set[int], visible: bool) -> None:
    mountinfo = f"22 27 0:21 / /proc rw,relatime - proc proc {options}\n"
    assert (hidden(mountinfo, uid, gids, INITIAL_PID_NAMESPACE) == "") is visible


def test_a_containers_own_proc_says_nothing_about_the_node() -> None:
    assert "container" in hidden("", 0, {0}, "pid:[4026532000]")
