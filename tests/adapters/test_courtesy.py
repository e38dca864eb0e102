"""A service stands back behind others, and so does all that it starts; the holder itself does not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmwd.adapters import courtesy, numa
from llmwd.messages import Courtesy, Release
from tests.adapters.held import hold, running  # noqa: F401
from tests.waiting import wait_until

WISH = Courtesy(nice=10, oom_score_adj=800, io_priority=7, cpus=(min(os.sched_getaffinity(0)),))
TREE = ("--engine", "--tracker", "--fork-grandchild", "--children", "12")
AS_WISHED = {"nice": 10, "oom_score_adj": 800, "io_priority": 7, "cpus": list(WISH.cpus)}


def everybody(held) -> list[int]:
    told = held.report()
    return [told["pid"], *sum(told["pids"].values(), [])]


@pytest.fixture
def sleeper():
    """A process of our own to look at."""
    child = subprocess.Popen(["sleep", "600"])
    yield child
    child.kill()
    child.wait()


def test_the_server_and_all_its_children_stand_back_and_the_holder_does_not(hold) -> None:
    held = hold(*TREE, courtesy=WISH)
    pids = everybody(held)
    assert len(pids) == 16 and [courtesy.found(pid) for pid in pids] == [AS_WISHED] * len(pids)
    assert courtesy.found(held.process.pid) == courtesy.found(os.getpid())
    for pid in pids:  # and in the words of others
        assert subprocess.run(["ionice", "-p", str(pid)], capture_output=True, text=True).stdout.strip() == "best-effort: prio 7"
        with open(f"/proc/{pid}/stat") as file:
            assert file.read().rpartition(")")[2].split()[16] == "10"
    assert "could not be set" not in held.output()
    assert held.released(grace_s=0.0).gone_s
    assert not running(pids)


def group_of(pid: int) -> str:
    """The nice level of a session, where the kernel schedules sessions as groups."""
    path = Path(f"/proc/{pid}/autogroup")
    return path.read_text().split()[-1] if path.exists() else "not built in"


def test_what_is_to_end_stands_back_no_longer_in_whatever_session_it_is(hold) -> None:
    held = hold("--ignore-term", *TREE, courtesy=WISH)
    pids = everybody(held)
    if group_of(pids[0]) != "not built in":
        assert group_of(pids[0]) == "10" != group_of(held.process.pid)
    assert held.link.send(Release(grace_s=60.0, reason="test"))
    held.until(lambda state: state.signalled_s)
    staying = [pid for pid in pids if running([pid])]
    assert len(staying) > 10
    wait_until(lambda: {group_of(pid) for pid in staying} == {group_of(held.process.pid)}, 30)
    if os.geteuid() == 0:  # others need RLIMIT_NICE
        wait_until(lambda: {courtesy.found(pid)["nice"] for pid in staying} == {courtesy.found(held.process.pid)["nice"]}, 30)
    assert held.released(grace_s=0.0).gone_s


def test_a_kernel_that_refuses_a_session_for_now_is_asked_again(monkeypatch, sleeper) -> None:
    monkeypatch.setattr(courtesy, "_group_level", lambda pid: {"self": "0", sleeper.pid: "10"}[pid])
    real = open

    def refuses(path, *more):
        if str(path).endswith("/autogroup"):
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return real(path, *more)

    monkeypatch.setattr("builtins.open", refuses)
    assert courtesy.hurry([sleeper.pid]) is False
    monkeypatch.setattr("builtins.open", real)
    monkeypatch.setattr(courtesy, "_group_level", lambda pid: "0")
    assert courtesy.hurry([sleeper.pid]) is True


def test_without_a_wish_a_service_stays_ordinary(hold) -> None:
    pid = hold().report()["pid"]
    assert courtesy.found(pid) == courtesy.found(os.getpid())


def test_what_cannot_be_had_is_said_and_stops_neither_the_start_nor_the_rest(hold) -> None:
    held = hold(courtesy=Courtesy(nice=5, oom_score_adj=5000, io_priority=6, cpus=(4095,)))
    found = courtesy.found(held.report()["pid"])
    ours = courtesy.found(os.getpid())
    assert found == ours | {"nice": 5, "io_priority": 6}
    wait_until(lambda: "llmwd: cpus" in held.output() and "llmwd: oom_score_adj 5000 could not be set" in held.output())


def test_never_less_than_what_was_inherited() -> None:
    code = (
        "import json, os, sys; from llmwd.adapters import courtesy as c;"
        "os.nice(15); open('/proc/self/oom_score_adj', 'w').write('900');"
        "c._ioprio(0, 1, 0, 3 << 13); print(c.stand_back({'nice': 10, 'oom_score_adj': 800, 'io_priority': 0, 'cpus': []}));"
        "print(c._get_ioprio(0)[0], json.dumps(c.found(os.getpid())))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.startswith("[]\n3 ") and '"nice": 15' in told and '"oom_score_adj": 900' in told


def test_a_machine_whose_numbers_are_not_known_is_told_of_and_harms_nothing(monkeypatch, sleeper) -> None:
    monkeypatch.setattr(courtesy, "IOPRIO_SYSCALLS", {})
    assert courtesy.found(sleeper.pid)["io_priority"] is None
    wish = courtesy.found(os.getpid()) | {"io_priority": 7}
    assert courtesy.stand_back(wish) == [f"io_priority 7 could not be set: not known how on {os.uname().machine}"]


def test_a_living_tree_is_moved_with_all_its_threads(hold) -> None:
    held = hold(*TREE, courtesy=WISH)
    everyone, wide = everybody(held), numa.allowed_cpus()
    # It reports itself before it starts its thread.
    wait_until(lambda: max(len(os.listdir(f"/proc/{pid}/task")) for pid in everyone) > 1, what="a process with several threads")
    for cpus in (wide, frozenset(WISH.cpus)):
        for pid in everyone:
            courtesy.confine(pid, cpus)
        threads = [int(thread) for pid in everyone for thread in os.listdir(f"/proc/{pid}/task")]
        assert {frozenset(os.sched_getaffinity(thread)) for thread in threads} == {cpus}


def test_a_process_that_is_gone_is_nothing_to_stumble_over() -> None:
    child = subprocess.Popen(["sleep", "600"])
    child.send_signal(signal.SIGKILL)
    child.wait()
    courtesy.confine(child.pid, numa.allowed_cpus())
    assert courtesy.found(child.pid) is None


def test_a_numa_nodes_cpus_as_the_kernel_tells_them(tmp_path) -> None:
    (tmp_path / "node1").mkdir()
    (tmp_path / "node1" / "cpulist").write_text("16-31\n")
    assert numa.node_cpus(1, tmp_path) == "16-31"
    assert numa.node_cpus(7, tmp_path) == ""
