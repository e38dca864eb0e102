"""Beside a real Slurm node whose controller, or whose client programs, have every fault: who yields, and what is told.

scontrol, sinfo and squeue on llmwd's PATH are stand-ins that do what a file says and are otherwise the real ones.
"""

import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmwd.adapters import procs
from tests.slurm.test_yield import jobs_of, supervised_beside, wait_for_job
from tests.slurm.testbed import SlurmNode
from tests.tree.supervised import Supervised
from tests.waiting import wait_until

PROGRAMS = ("scontrol", "sinfo", "squeue")
CALLS_PER_S = 10
# What is logged of an outage, or of an answer that is not understood.
REASON = re.compile(r"WARNING (slurmctld does not answer|scontrol tells nothing|.*not understood|squeue does not list)")

# What a stand-in does (shell); nothing: the real program.
FAULTS = {
    "hangs": "sleep 600",
    "hangs and shrugs off signals": "trap '' TERM HUP INT; (trap '' TERM HUP INT; sleep 600) & exec sleep 600",
    "fails without a word": "exit 1",
    "fails as when rate limited for ever": "echo 'slurm_load_jobs error: Slurm backoff' >&2; sleep 600",
    "prints garbage": "head -c 3000 /dev/urandom; echo; date +%N; exit 0",
    "prints nothing": "exit 0",
    "prints without end": "exec yes 'JobId=7 JobState=RUNNING'",
    "closes its output and lingers": "exec >&- 2>&- <&-; sleep 600",
    "dies of a signal": "kill -SEGV $$",
}


class Clients:
    """A folder for PATH with everything that is on it, and stand-ins for Slurm's client programs."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True)
        for path in os.environ["PATH"].split(os.pathsep):
            for program in Path(path).iterdir() if os.path.isdir(path) else ():
                if program.name not in PROGRAMS and not (folder / program.name).is_symlink():
                    (folder / program.name).symlink_to(program)
        for name in PROGRAMS:
            self.restore(name)

    def restore(self, name: str) -> None:
        draft = self.folder / f".{name}"
        draft.write_text(f'#!/bin/sh\n. "{self.folder}/{name}.fault"\nexec {shutil.which(name)} "$@"\n')
        draft.chmod(draft.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
        self.fault(name, "")
        draft.rename(self.folder / name)

    def fault(self, names: str, what: str) -> None:
        """From now on; written whole, by a rename."""
        for name in names.split():
            draft = self.folder / f".{name}.fault"
            draft.write_text(f"{what}\n")
            draft.rename(self.folder / f"{name}.fault")

    def remove(self, names: str) -> None:
        for name in names.split():
            (self.folder / name).unlink()


class Beside:
    """One llmwd that serves on GPUs 6 and 7 of the node, its clients, and what was told and asked since a mark."""

    def __init__(self, node: SlurmNode, folder: Path):
        self.node = node
        self.clients = Clients(folder / "bin")
        self.tree = supervised_beside(node, folder, RECONCILE=2, SCONTROL_TIMEOUT=1.5, RESOLVE_DEADLINE=1)
        self.tree.env["PATH"] = str(self.clients.folder)
        self.tree.start()

    def serving(self) -> None:
        """All is well, and counted from here."""
        wait_until(lambda: not jobs_of(self.tree.status()), 60, every_s=0.05, what="no job")
        self.tree.serving_on(6, 7)
        self.log_at = len(self.tree.log("resolver"))
        self.began_s = time.monotonic()
        self.known = {name: len(self.tree.journal(name)) for name in ("released", "lease_revoked")}

    def log(self) -> list[str]:
        return self.tree.log("resolver")[self.log_at :].splitlines()

    def release(self) -> dict:
        """The release since the mark."""
        return wait_until(lambda: self.tree.journal("released")[self.known["released"] :], 30, what="a release")[0]

    def told(self) -> list[str]:
        return [line for line in self.log() if REASON.search(line)]

    def check_cost(self) -> None:
        calls = sum("asking Slurm:" in line for line in self.log())
        assert calls <= 2 + CALLS_PER_S * (time.monotonic() - self.began_s)

    def children(self) -> list[bytes]:
        """Command lines of the resolver's and the detector's descendants, zombies included, and of strays."""
        parents = {self.tree.worker(name)["pid"] for name in ("resolver", "detector")}
        found = []
        for entry in Path("/proc").iterdir():
            state = procs.stat(int(entry.name)) if entry.name.isdigit() else None
            if state is not None and state.ppid in parents:
                found.append((state, procs.cmdline(int(entry.name))))
        return found + [line for _, line in self.tree.left() if line.startswith((b"sleep\0", b"yes\0"))]

    def check_recovery(self) -> None:
        """The fault is over, and so is the job: serving again, and nothing is left."""
        self.tree.serving_on(6, 7)
        wait_until(lambda: not self.children(), 20, every_s=0.05, what=f"the end of {self.children()}")
        self.check_cost()
        assert len(self.tree.journal("lease_revoked")) - self.known["lease_revoked"] <= 1


@pytest.fixture(scope="module")
def one_for_all(slurm_node: SlurmNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Beside]:
    beside = Beside(slurm_node, tmp_path_factory.mktemp("c"))
    yield beside
    beside.tree.close()


@pytest.fixture
def beside(one_for_all: Beside) -> Iterator[Beside]:
    one_for_all.serving()
    yield one_for_all
    for name in PROGRAMS:
        one_for_all.clients.restore(name)


def a_job_without_gpus(beside: Beside) -> int:
    job = beside.node.sbatch("exec sleep 600")
    wait_for_job(beside.tree, job, [])
    return job


@pytest.mark.parametrize("fault", [*FAULTS, "are missing"])
def test_nothing_can_be_asked_so_a_job_counts_as_one_on_our_gpus_until_it_can(beside: Beside, fault: str) -> None:
    node, tree = beside.node, beside.tree
    harmless = a_job_without_gpus(beside)
    if fault == "are missing":
        beside.clients.remove("scontrol sinfo squeue")
    else:
        beside.clients.fault("scontrol sinfo squeue", FAULTS[fault])
    tree.until(lambda status: any(source["name"] == "gresused" and not source["works"] for source in status["sources"]))
    assert tree.status()["phase"] == "serving", "a job that is known to have no GPUs, and silence, end no lease"

    job = node.sbatch("exec sleep 600", "--gres=gpu:1")
    release = beside.release()
    assert release["reason"] == "unknown_job" and release["gone_s"] - release["seen_s"] < 1 + 4
    status = tree.until(lambda status: status["phase"] == "waiting")
    assert status["lease"] is None and jobs_of(status)[str(harmless)] == []
    told = wait_until(beside.told, 10, what="the reason in the log")
    assert re.search(r"job \d+: .{10}", status["detail"]), "the reason, for the operator"
    assert told and all(len(line) < 10_000 for line in told)

    for name in PROGRAMS:
        beside.clients.restore(name)
    tree.serving_on(6, 7)  # once it is known that the job has GPU 0
    # A reading of the node may have been enough for that; scontrol's word on the job itself comes a little later.
    tree.until(lambda status: jobs_of(status) == {str(harmless): [], str(job): [0]}, what="all that the jobs have")
    beside.check_recovery()
    assert len(beside.told()) <= 3, "one line for the node, one for jobs, and one of a call that was under way"


@pytest.mark.parametrize("fault", ["hangs", "prints garbage", "prints without end", "is missing"])
@pytest.mark.parametrize("program", ["scontrol", "sinfo"])
def test_one_of_the_two_is_enough_to_learn_what_a_job_has(beside: Beside, program: str, fault: str) -> None:
    node, tree = beside.node, beside.tree
    if fault == "is missing":
        beside.clients.remove(program)
    else:
        beside.clients.fault(program, FAULTS[fault])
    elsewhere = node.sbatch("exec sleep 600", "--gres=gpu:1")
    node.wait_state(elsewhere, "RUNNING")
    wait_until(lambda: str(elsewhere) in jobs_of(tree.status()), 20, every_s=0.05, what="the job is known")
    job = node.sbatch("exec sleep 600", "--gres=gpu:7")
    release = beside.release()
    assert release["reason"] == "yielded_to_job" and release["gone_s"] - release["revoked_s"] < 4
    assert beside.known["released"] + 1 == len(tree.journal("released")), "the first job is on none of ours"
    node.scancel(elsewhere, job)
    beside.clients.restore(program)
    beside.check_recovery()
    assert len(beside.told()) <= 2, beside.told()


STALE = {
    "a job that is gone": "exec {real} --local show job {done} -d",
    "another job's record": "exec {real} --local show job {other} -d",
    "its own id, and that it is over": 'echo "JobId=$4 JobName=x\n   JobState=COMPLETED Reason=None\n   NodeList={node}\n'
    '   NumNodes=1\n   JOB_GRES=(null)\n   WorkDir=/\n"; exit 0',
    "an invalid id": 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1',
}


@pytest.mark.parametrize("what", STALE)
def test_a_scontrol_that_prints_something_else_hides_no_job(beside: Beside, what: str) -> None:
    node = beside.node
    done = node.sbatch("true", "--gres=gpu:8")
    wait_until(lambda: node.state(done) == "COMPLETED", 30)
    beside.serving()
    other = a_job_without_gpus(beside)
    lines = {"real": shutil.which("scontrol"), "done": done, "other": other, "node": node.node}
    beside.clients.fault("scontrol", STALE[what].format(**lines))
    job = node.sbatch("exec sleep 600", "--gres=gpu:8")
    release = beside.release()
    assert release["reason"] in ("yielded_to_job", "unknown_job") and release["gone_s"] - release["revoked_s"] < 4
    assert release["revoked_s"] - (release["seen_s"] or release["revoked_s"]) < 1 + 1
    node.scancel(other, job)
    beside.clients.restore("scontrol")
    beside.check_recovery()


@pytest.mark.parametrize("how", ["down", "stopped"])
def test_slurmctld_goes_away_while_a_job_is_on_its_way_and_comes_back(
    make_slurm_node: Callable[..., SlurmNode], tmp_path: Path, how: str
) -> None:
    """The job is in its prolog when its controller goes; nobody can say what it has when its folder appears."""
    prolog = tmp_path / "prolog"
    prolog.write_text(f"#!/bin/sh\ntouch {tmp_path}/begun\nwhile test ! -e {tmp_path}/go; do sleep 0.05; done\n")
    prolog.chmod(0o755)
    (tmp_path / "go").touch()
    node = make_slurm_node(prolog=prolog)
    beside = Beside(node, tmp_path / "b")
    try:
        beside.serving()
        harmless = a_job_without_gpus(beside)
        for name in ("go", "begun"):
            (tmp_path / name).unlink()
        job = node.sbatch("exec sleep 600", "--gres=gpu:1")
        wait_until(lambda: (tmp_path / "begun").exists(), 30)
        node.kill_ctld() if how == "down" else node.stop_ctld()
        # Whatever was answered before, the job is asked for after its folder has appeared.
        (tmp_path / "go").touch()
        release = beside.release()
        assert release["reason"] == "unknown_job" and release["gone_s"] - release["seen_s"] < 1 + 4
        waiting = beside.tree.until(lambda status: status["phase"] == "waiting" and "not answer" in status["detail"])
        assert jobs_of(waiting)[str(harmless)] == []
        beside.tree.until(lambda status: any(s["name"] == "gresused" and not s["works"] for s in status["sources"]))
        wait_until(lambda: sum("asking Slurm" in line for line in beside.log()) > 4, 60, what="more questions")
        node.start_ctld() if how == "down" else node.cont_ctld()
        beside.check_recovery()
        # As above: what the node's reading tells is enough for serving, and comes before scontrol's word on the job.
        beside.tree.until(lambda status: jobs_of(status) == {str(harmless): [], str(job): [0]}, what="all that the jobs have")
        assert len(beside.told()) <= 3, beside.told()
        assert any("answers again" in line for line in beside.log())
    finally:
        node.cont_ctld()
        beside.tree.close()


def test_a_client_that_is_slowed_down_by_the_controllers_rate_limit_only_takes_longer(beside: Beside) -> None:
    beside.clients.fault("scontrol sinfo squeue", "sleep 0.4")
    pid = beside.tree.status()["server"]["pid"]
    harmless = a_job_without_gpus(beside)
    assert beside.tree.status()["server"]["pid"] == pid
    job = beside.node.sbatch("exec sleep 600", "--gres=gpu:8")
    assert beside.release()["reason"] == "yielded_to_job"
    beside.node.scancel(harmless, job)
    beside.check_recovery()
    assert beside.told() == []
