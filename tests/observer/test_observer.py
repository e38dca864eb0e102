"""The observer finds what it is there for: each guarantee broken once, by stand-ins for a bad llmwd."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.observer.driver import DriverSight
from tests.observer.judge import Bounds, Judge
from tests.observer.sight import Job, Process, Sample, Sight, parse, start_of
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
BOUNDS = Bounds(ttl_s=4, grace_s=0.5, resolve_s=0.5)


class Told:
    """A judge that is shown one look after the other, 0.1 s apart."""

    def __init__(self) -> None:
        self.judge = Judge(BOUNDS, lambda word: None)
        self.now_s = 100.0
        self.pid = 0

    def process(self, role: str, *gpus: int, tree: str = "") -> Process:
        self.pid += 1
        return Process(self.pid, 1, 0, self.now_s - 0.1, self.now_s, "S", role, frozenset(gpus), tree)

    def see(self, *processes: Process, jobs: dict[str, Job] | None = None, for_s: float = 0.1,
            troubles: dict[str, Job] | None = None) -> list[str]:
        """The guarantees that were violated so far."""
        for _ in range(round(for_s / 0.1)):
            seen = {(each.pid, each.start): each for each in processes}
            self.judge.judge(Sample(self.now_s, self.now_s, seen, jobs or {}, troubles or {}))
            self.now_s += 0.1
        return [found["guarantee"] for found in self.judge.violations]

    def job(self, *gpus: int) -> Job:
        return Job(frozenset(gpus), self.now_s)


def test_a_server_that_stays_beside_a_job_is_found_and_a_quick_release_is_measured() -> None:
    told = Told()
    server = told.process("server", 6, 7, tree="a")
    told.see(server)
    job = {"1": told.job(7)}
    assert told.see(server, jobs=job, for_s=0.5) == []
    assert told.see(jobs=job) == [] and [round(took_s, 1) for took_s, _ in told.judge.releases] == [0.4]
    told.see(server, for_s=1)
    assert told.see(server, jobs={"2": told.job(0, 1)}, for_s=9) == []
    assert told.see(server, jobs={"3": told.job(6)}, for_s=4) == ["G1"]


def test_during_a_fault_the_bound_is_that_of_the_lease() -> None:
    told = Told()
    server = told.process("server", 6, 7, tree="a")
    told.see(server)
    told.judge.told({"event": "fault", "name": "x"}, told.now_s)
    job = {"1": told.job(7)}
    assert told.see(server, jobs=job, for_s=6) == []
    assert told.see(server, jobs=job, for_s=1) == ["G1"]


def test_a_server_started_on_a_jobs_gpu_is_found_and_so_are_two_on_one_gpu() -> None:
    told = Told()
    jobs = {"1": told.job(6)}
    told.see(jobs=jobs, for_s=2)
    assert told.see(told.process("server", 6, 7, tree="b"), jobs=jobs) == ["G1"]
    told = Told()
    both = told.process("server", 6, tree="a"), told.process("server", 6, tree="b")
    assert told.see(*both) == [] and told.see(*both, for_s=0.3) == ["G1"]


def test_what_outlives_the_root_is_found() -> None:
    told = Told()
    root, worker, again = told.process("root"), told.process("detector"), told.process("root")
    told.see(root, worker)
    assert told.see(worker, for_s=6) == []
    assert told.see(worker, again, for_s=1) == ["G5"]


def test_what_is_forked_after_the_roots_death_is_found_too() -> None:
    told = Told()
    root, server = told.process("root"), told.process("server", 6, tree="a")
    told.see(root, server)
    told.see(server, for_s=1)
    child = told.process("server", 6, tree="a")
    child.ppid = server.pid
    assert told.see(child, for_s=4) == []
    again = told.process("server", 7, tree="b")
    assert told.see(child, again, for_s=3) == ["G5"]


def test_a_server_that_ends_beside_a_job_without_gpus_is_found() -> None:
    for gpus, told_of, found in (((), False, ["G3"]), ((), True, []), ((6,), False, [])):
        told = Told()
        root, server = told.process("root"), told.process("server", 6, tree="a")
        told.see(root, server, for_s=8)
        if told_of:
            told.judge.told({"event": "happened"}, told.now_s)
        jobs = {"1": told.job(*gpus)}
        told.see(root, server, jobs=jobs, for_s=0.5)
        assert told.see(root, jobs=jobs, for_s=1) == found


def test_a_job_that_is_over_before_the_next_look_was_there_if_it_was_told() -> None:
    for gpus, found in (("6", []), ("what", []), ("", ["G3"])):
        told = Told()
        root, server = told.process("root"), told.process("server", 6, tree="a")
        told.see(root, server, for_s=8)
        jobs = {"1": told.job()}
        told.see(root, server, jobs=jobs, for_s=0.5)
        told.judge.told({"event": "job", "gpus": gpus}, told.now_s)
        assert told.see(root, jobs=jobs, for_s=1) == found


def test_a_notifier_that_is_stopped_widens_no_bound() -> None:
    for role, found in (("notifier", ["G1"]), ("resolver", [])):
        told = Told()
        server, other = told.process("server", 6, 7, tree="a"), told.process(role)
        other.state = "T"
        told.see(server, other)
        told.judge.told({"event": "fault", "name": "stopped", "roles": [role]}, told.now_s)
        assert told.see(server, other, jobs={"1": told.job(7)}, for_s=4) == found


def test_a_death_that_takes_another_with_it_is_found_unless_more_was_done() -> None:
    for more, found in ((False, ["G6"]), (True, [])):
        told = Told()
        one, two = told.process("detector"), told.process("resolver")
        told.see(one, two)
        told.judge.told({"event": "killed", "roles": ["detector"]}, told.now_s)
        if more:
            told.judge.told({"event": "happened"}, told.now_s)
        assert told.see(told.process("detector"), told.process("resolver"), for_s=3) == found


def test_what_ends_because_it_was_stopped_before_is_no_kills_fault() -> None:
    told = Told()
    worker, server = told.process("detector"), told.process("server", 6, tree="a")
    server.state = "T"
    told.see(worker, server, for_s=4)
    told.judge.told({"event": "killed", "roles": ["detector"]}, told.now_s)
    assert told.see(told.process("detector"), for_s=3) == []


def test_a_server_started_against_an_order_is_found() -> None:
    told = Told()
    told.judge.told({"event": "held"}, told.now_s)
    told.see(for_s=2)
    assert told.see(told.process("server", 6, tree="a")) == ["G8"]


def test_looks_that_came_late_are_nobodys_fault() -> None:
    told = Told()
    server = told.process("server", 6, tree="a")
    told.see(server)
    job = {"1": told.job(6)}
    told.see(server, jobs=job)
    told.now_s += 20
    assert told.see(server, jobs=job, for_s=1) == []


def test_a_server_beside_a_stranger_is_found_later_than_beside_a_job_and_no_jobs_bound_is_wider_for_it() -> None:
    told = Told()
    server = told.process("server", 6, 7, tree="a")
    told.see(server)
    stranger = {"the stranger 9 on GPU 7": Job(frozenset([7]), told.now_s, 2.5)}
    assert told.see(server, troubles=stranger, for_s=5) == []
    assert told.see(server, jobs={"1": told.job(6)}, troubles=stranger, for_s=2.8) == ["G1"]  # the stranger
    assert "stranger 9" in told.judge.violations[0]["text"]
    assert told.see(server, jobs=told.judge.before.jobs, troubles=stranger, for_s=0.4) == ["G1", "G1"]  # the job
    told = Told()
    told.see(troubles=stranger, for_s=10)
    assert told.see(told.process("server", 7, tree="b"), troubles=stranger) == ["G1"]


def test_what_may_stay_beside_slices_may_not_begin_there() -> None:
    told = Told()
    server = told.process("server", 6, tree="a")
    told.see(server)
    slices = {"slices on GPU 6": Job(frozenset([6]), told.now_s, 2.5, starts_only=True)}
    assert told.see(server, troubles=slices, for_s=20) == []
    assert told.see(told.process("server", 6, tree="b"), troubles=slices) == ["G1"]


def test_the_drivers_world_is_read_as_the_driver_reads_it(tmp_path: Path) -> None:
    gpus = [f"gpu uuid=GPU-{index} memory=1000 used=400" for index in range(3)]
    (tmp_path / "contexts").mkdir()
    contexts = f"contexts folder={tmp_path / 'contexts'} used=5"
    mine, pid = start_of(os.getpid()), os.getpid()
    (tmp_path / "contexts" / f"GPU-1.{pid}.{mine}").touch()
    (tmp_path / "contexts" / f"GPU-2.{pid}.{mine + 1}").touch()  # another process had this number
    sight = DriverSight(tmp_path / "world", start_of, BOUNDS.ttl_s)

    def seen(*lines: str, ours: set[int] = set(), served: frozenset[int] = frozenset()) -> set[str]:
        (tmp_path / "world").write_text("".join(f"{line}\n" for line in (*gpus, contexts, *lines)))
        return set(sight.look(1.0, ours, served))

    assert seen() == {f"the stranger {pid} on GPU 1"} and seen(ours={pid}) == set()
    assert seen(f"forget pid={pid}") == {f"the memory of the forgotten stranger {pid} on GPU 1"}
    assert seen("hang nvmlInit", ours={pid}) == {f"a driver that hangs on GPU {gpu}" for gpu in range(3)}
    assert seen("fail all 15 gpu=2", "mig gpu=0 uuid=MIG-a", ours={pid}) == {"a driver that says 15 on GPU 2", "slices on GPU 0"}
    assert seen(f"process gpu=0 pid={pid}", "process gpu=0 pid=4194305", ours=set()) == {
        f"the stranger {pid} on GPU 0", f"the stranger {pid} on GPU 1",
    }
    gpus[0] = gpus[0].replace("used=400", f"used={3 << 30}")
    assert seen(ours={pid}, served=frozenset([0])) == set()  # it may be ours
    assert seen(ours={pid}) == seen(ours={pid}, served=frozenset([0])) == {"memory on GPU 0"}


def test_what_becomes_a_server_late_may_have_become_it_any_time_since_the_last_look_at_its_environment(tmp_path: Path) -> None:
    sight = Sight("M=x", "/nobody", tmp_path, before_s=9.96)
    forked = Process(7, 1, 1, 5.0, 5.0)
    sight._describe(forked, ["M=x"], "python holder", 9.6)
    assert (forked.role, forked.not_before_s) == ("other", 5.0)
    sight._describe(forked, ["M=x", "CUDA_VISIBLE_DEVICES=SIM-6,SIM-7", "LLMWD_TREE=t"], "python server", 10.0)
    assert (forked.role, forked.gpus, forked.not_before_s, forked.first_s) == ("server", {6, 7}, 9.6, 10.0)
    new = Process(8, 1, 1, 9.96, 10.0)
    sight._describe(new, ["M=x", "CUDA_VISIBLE_DEVICES=SIM-5"], "python server", 10.0)
    assert new.not_before_s == 9.96


def test_jobs_are_read_as_they_are_written() -> None:
    assert parse("0-2,5\nfor=3") == {0, 1, 2, 5} and parse("") == frozenset() and parse("a few") is None


def test_it_sees_real_processes_and_says_so_by_its_exit_code(tmp_path: Path) -> None:
    (tmp_path / "job_1").write_text("1\n")
    command = [sys.executable, "-m", "tests.observer", "--mark", "OBSERVED_MARK=x", "--folder-in", "HOME", "--jobs-in", "JOBS", "--ttl", "2"]
    env = {"PATH": os.environ["PATH"], "HOME": "/nobody/has/this", "JOBS": str(tmp_path)}
    with (tmp_path / "seen").open("wb") as seen:
        observer = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=seen)
    try:
        wait_until(lambda: (tmp_path / "seen").read_text(), 30)
        observer.stdin.write(b'{"event": "fault", "name": "a while ago"}\n')
        observer.stdin.flush()
        server = subprocess.Popen(["sleep", "1000"], env=env | {"OBSERVED_MARK": "x", "CUDA_VISIBLE_DEVICES": "SIM-0,SIM-1", "LLMWD_TREE": "t"})
        wait_until(lambda: "violation" in (tmp_path / "seen").read_text(), 40)
        server.kill()
        server.wait()
        observer.stdin.close()
        assert observer.wait(30) == 1
        words = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
        assert words[-1]["event"] == "summary" and words[-1]["violations"][0]["guarantee"] == "G1"
    finally:
        observer.kill()
        observer.wait()
