"""Processes by pid and start time, trees, markers and Slurm's cgroups, with real processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmwd.adapters import procs
from tests.waiting import wait_until


@pytest.fixture
def child():
    """start(*argv, **keywords): a process that is killed after the test."""
    made: list[subprocess.Popen] = []

    def start(*argv: str, **keywords) -> subprocess.Popen:
        made.append(subprocess.Popen(argv or ("/bin/sleep", "1000"), **keywords))
        return made[-1]

    yield start
    for process in made:
        for pid in procs.descendants(process.pid):
            if (start := procs.start_ticks(pid)) is not None:
                procs.signal_process(pid, start, signal.SIGKILL)
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def test_a_process_is_named_by_pid_and_start_time(child):
    process = child()
    start = procs.start_ticks(process.pid)
    assert procs.alive(process.pid, start)
    assert not procs.alive(process.pid, start + 1)
    assert procs.start_ticks(2**22 + 1) is None and procs.stat(2**22 + 1) is None


def test_a_name_with_brackets_and_blanks_does_not_confuse_it(child, tmp_path):
    strange = tmp_path / "a) Z 1 (b"
    strange.symlink_to("/bin/sleep")
    process = child(str(strange), "1000")
    wait_until(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "a) Z 1 (b\n")
    found = procs.stat(process.pid)
    assert found.ppid == os.getpid() and not found.dead and found.start > procs.start_ticks(os.getpid())


def test_only_exactly_that_process_is_signalled(child):
    process = child()
    start = procs.start_ticks(process.pid)
    assert not procs.signal_process(process.pid, start - 1, signal.SIGKILL)
    assert process.poll() is None
    assert procs.signal_process(process.pid, start, signal.SIGKILL)
    assert process.wait() == -9
    assert not procs.signal_process(process.pid, start, signal.SIGKILL)


def test_a_zombie_is_not_alive(child):
    process = child("/bin/true")
    start = procs.start_ticks(process.pid)
    wait_until(lambda: procs.stat(process.pid).state == "Z")
    assert not procs.alive(process.pid, start)
    assert process.pid not in procs.descendants(os.getpid())


def test_a_process_that_lost_only_its_first_thread_is_alive(child):
    program = (
        "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(1000,)).start();"
        "ctypes.CDLL(None).syscall(60, 0)"  # exit(2) of this thread alone
    )
    if os.uname().machine != "x86_64":
        program = program.replace("syscall(60", "syscall(93")
    process = child(sys.executable, "-c", program)
    wait_until(lambda: procs.stat(process.pid).state == "Z")
    assert procs.alive(process.pid, procs.start_ticks(process.pid))


TREE = "import os, signal; [os.fork() for _ in range(3)]; print(flush=True); signal.pause()"


def test_descendants_are_the_whole_tree_parents_first(child):
    process = child(sys.executable, "-c", TREE, stdout=subprocess.PIPE)
    for _ in range(8):
        process.stdout.readline()
    pids = procs.descendants(process.pid)
    assert len(pids) == 7
    place = {process.pid: -1} | {pid: number for number, pid in enumerate(pids)}
    assert all(place[procs.stat(pid).ppid] < place[pid] for pid in pids)


def test_both_ways_to_find_children_agree_where_the_kernel_has_both(child):
    process = child(sys.executable, "-c", TREE, stdout=subprocess.PIPE)
    for _ in range(8):
        process.stdout.readline()
    by_scan = procs._children_by_scan()(process.pid)
    assert len(by_scan) == 3
    listed = Path("/proc/thread-self/children").exists()
    assert sorted(procs._children_by_task(process.pid)) == (sorted(by_scan) if listed else [])


def test_marked_processes_are_found_even_with_a_title(child):
    marker = f"test-{os.getpid()}"
    env = dict(os.environ, LLMWD_TREE=marker, SPT_NOENV="1")
    plain = child(env=env)
    child(env=dict(os.environ, LLMWD_TREE=marker + "0"))
    program = "import setproctitle, time; setproctitle.setproctitle('VLLM::EngineCore'); print(flush=True); time.sleep(1000)"
    titled = child(sys.executable, "-c", program, env=env, stdout=subprocess.PIPE)
    titled.stdout.readline()
    wanted = {(process.pid, procs.start_ticks(process.pid)) for process in (plain, titled)}
    wait_until(lambda: set(procs.find_marked(marker)) == wanted)


@pytest.mark.parametrize(
    "path, inside",
    [
        ("0::/system.slice/slurmstepd.scope/job_12/step_0/user/task_0", True),
        ("0::/system.slice/n1_slurmstepd.scope/job_12/step_extern/user", True),
        ("0::/system.slice/slurmstepd.scope/sABCDEF12345/step_0", True),
        ("5:devices:/slurm/uid_1000/job_77/step_0/task_0", True),
        ("5:devices:/slurm_n1/uid_1000/job_77", True),
        ("0::/user.slice/user-1000.slice/session-3.scope", False),
        ("0::/system.slice/slurmd.service", False),
        ("5:devices:/slurm/uid_1000", False),
        ("0::/home/job_3/uid_4", False),
    ],
)
def test_a_slurm_jobs_cgroup_is_recognised(path, inside):
    assert procs.job_cgroup(f"9:name=systemd:/\n{path}\n") == (path if inside else None)


def test_a_subreaper_gets_the_orphans_and_a_death_signal_works(child):
    program = """
import os, signal
from llmwd.adapters import procs
procs.set_subreaper()
out, end = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        os.write(end, b"%d" % os.getpid())
        signal.pause()
    os._exit(0)
orphan = int(os.read(out, 20))
os.wait()
print(procs.stat(orphan).ppid == os.getpid())
os.kill(orphan, 9)
print(os.wait()[0] == orphan)
if os.fork() == 0:
    if os.fork() == 0:
        procs.set_pdeathsig(9)
        os.write(end, b"%d" % os.getpid())
        signal.pause()
    os.read(out, 20)
    os._exit(0)
os.wait()
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    process = child(sys.executable, "-c", program, stdout=subprocess.PIPE)
    assert process.communicate(timeout=60)[0] == b"True\nTrue\n-9\n"
