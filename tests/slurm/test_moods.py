"""Slurm's moods, the jobs' side: allocations that leave no sign on the node, ends that take long, ids that come back.

Real jobs on a real node, the whole llmwd beside them. Where a mood leaves a source blind, that is arranged first, so
that what is tested is what is left.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from tests.slurm.ledger import Ledger, yields_started_twice
from tests.slurm.neighbours import TwoNodes
from tests.slurm.test_yield import jobs_of, supervised_beside, wait_for_job
from tests.slurm.testbed import SlurmNode, missing
from tests.slurm.testbed import _kill_if_in as kill_if_in
from tests.slurm.testbed import _pids_in as pids_in
from tests.tree.supervised import CHECKOUT, Supervised
from tests.waiting import wait_until

FOREVER = "exec sleep 600"
HOLDS_S = 5.0  # for as long nothing may change where nothing may change; longer than RECONCILE
NOBODY = 65534
NO_CGROUPS = "ProctrackType=proctrack/linuxproc\nJobAcctGatherType=jobacct_gather/none\n"


class MoodyNode(SlurmNode):
    """A node whose epilog waits for as long as the file `hold` is there, and that hides jobs from other users."""

    def __init__(self, folder: Path, **wanted: object):
        epilog, self.hold = folder.resolve() / "epilog", folder.resolve() / "hold"
        extra = f"Epilog={epilog}\nPrivateData=jobs\nMessageTimeout=60\n"
        super().__init__(folder, extra_conf=extra, **wanted)  # type: ignore[arg-type]
        epilog.write_text(f"#!/bin/sh\nwhile [ -e {self.hold} ]; do sleep 0.1; done\n")
        epilog.chmod(0o755)

    def cancel_all(self, within_s: float = 60) -> None:
        self.hold.unlink(missing_ok=True)
        super().cancel_all(within_s)


@pytest.fixture(scope="module")
def moody(tmp_path_factory: pytest.TempPathFactory, running_nodes: list[SlurmNode]) -> Iterator[MoodyNode]:
    if problem := missing():
        pytest.fail(problem, pytrace=False)
    with MoodyNode(tmp_path_factory.mktemp("s")) as node:
        running_nodes.append(node)
        yield node
        running_nodes.remove(node)


@contextmanager
def beside(node: SlurmNode, folder: Path, kind: type[Supervised] = Supervised, **settings: object) -> Iterator[Supervised]:
    tree = supervised_beside(node, folder, **settings)
    tree.__class__ = kind
    tree.start()
    try:
        yield tree
        assert yields_started_twice(tree) == []
    finally:
        tree.close()


def stays(tree: Supervised, condition: Callable[[dict], bool], what: str, for_s: float = HOLDS_S) -> None:
    """Every status within this time fulfils the condition."""
    end_s = time.monotonic() + for_s

    def over() -> bool:
        status = tree.status()
        assert condition(status), f"{what} did not stay so: {status}"
        return time.monotonic() >= end_s

    wait_until(over, for_s + 30, every_s=0.05)


def scontrol(node: SlurmNode, *words: str) -> None:
    subprocess.run(["scontrol", *words], env={**os.environ, **node.env}, check=True, capture_output=True, timeout=30)


def allocate(node: SlurmNode, gpus: int) -> None:
    """An allocation in which nothing runs."""
    command = ["salloc", "--no-shell", f"--gres=gpu:{gpus}"]
    subprocess.run(command, env={**os.environ, **node.env}, check=True, capture_output=True, timeout=30)


def holders(status: dict) -> list[str]:
    return [gpu["holder"] for gpu in status["gpus"]]


def of_slurm(status: dict, *gpus: int) -> bool:
    """Whether these GPUs count as some job's, and none of them is leased."""
    leased = status["lease"]["gpus"] if status["lease"] else []
    return all(holders(status)[gpu] == "slurm" for gpu in gpus) and not set(leased) & set(gpus)


def sources_of(tree: Supervised, job: int) -> set[str]:
    """The detector's sources that see this job."""
    fact = tree.look().facts.jobs
    return {source for seen in (fact.jobs if fact else ()) if seen.id == str(job) for source in seen.sources}


# --- no sign on the node -------------------------------------------------------------------------------


def test_an_allocation_without_a_step_makes_us_yield_by_gresused_alone(slurm_node: SlurmNode, tmp_path: Path) -> None:
    with beside(slurm_node, tmp_path) as tree:
        tree.serving()
        allocate(slurm_node, 8)
        status = tree.phase("waiting")
        assert status["reason"] == "yielded_to_job"
        assert not list(slurm_node.scope.glob("job_*")) and not list(slurm_node.spool.glob(f"{slurm_node.node}_*"))
        stays(tree, lambda status: of_slurm(status, *range(8)), "the allocation")
        slurm_node.cancel_all()
        tree.serving()


def test_a_job_whose_prolog_takes_long_is_left_for_at_once_and_named_when_it_begins(
    tmp_path: Path, make_slurm_node: Callable[..., SlurmNode]
) -> None:
    go, prolog = tmp_path / "go", tmp_path / "prolog"
    prolog.write_text(f"#!/bin/sh\nwhile [ ! -e {go} ]; do sleep 0.05; done\n")
    prolog.chmod(0o755)
    node = make_slurm_node(prolog=prolog)
    with closing(supervised_beside(node, tmp_path, RECONCILE=1, YIELD_GRACE=25)) as tree:
        tree.write_profile("fake", FAKE_IGNORE_TERM=1)
        server = tree.start().serving()["server"]["pid"]
        job = node.sbatch(FOREVER, "--gres=gpu:8")
        assert tree.phase("yielding")["reason"] == "yielded_to_job"
        assert not node.job_dir(job).exists()
        # The journal is written after the fact is out.
        assert wait_until(lambda: tree.journal("lease_revoked"), what="the journal's line")[-1]["job"] is None
        go.touch()
        wait_for_job(tree, job, list(range(8)))
        # The manager, who writes the line about the release, hears of the job's name by itself.
        named_s = tree.look().facts.gpus.at_s
        wait_until(lambda: tree.server_fact().heard_s >= named_s, what="a manager that knows the job")
        tree.signal_pid(server, signal.SIGKILL)
        release = tree.released_for(job)
        assert (release["job"], release["seen_s"]) == (str(job), None)
        proved = wait_until(lambda: tree.journal("release_proved"), what="the release's proof")[-1]
        assert (proved["job"], proved["begun_s"]) == (str(job), release["revoked_s"])


@pytest.mark.alone
@pytest.mark.parametrize(
    ("detection", "seer"),
    [
        ("stepd,cgroup2,gresused,sim", "stepd"),
        ("procfs,gresused,sim", "procfs"),
        ("cgroup2,procfs,gresused,sim", "procfs"),  # slurmd's scope is there, and stays empty
    ],
)
def test_a_site_without_job_cgroups_is_served_by_sockets_or_processes(
    detection: str, seer: str, make_slurm_node: Callable[..., SlurmNode], tmp_path: Path
) -> None:
    node = make_slurm_node(extra_conf=NO_CGROUPS)
    ledger = Ledger(tmp_path)
    with beside(node, tmp_path, DETECTION=detection, RECONCILE=60) as tree:  # GresUsed comes too late to help
        tree.serving()
        job = ledger.sbatch(node, "sleep 600", "--gres=gpu:8")
        wait_for_job(tree, job, list(range(8)))
        assert tree.phase("waiting")["reason"] == "yielded_to_job"
        assert not list(node.scope.glob("job_*"))
        assert sources_of(tree, job) == {seer}
        ledger.cancel(node, job)
        tree.serving()
        assert ledger.wrongs(tree) == []


class AsNobody(Supervised):
    """llmwd as an ordinary user, who may read the test's folders all the same (pytest's are root's alone)."""

    def start(self) -> "AsNobody":
        for path in (self.home.parent, *self.home.parent.rglob("*")):
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        reading = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(
                [*become, *reading, sys.executable, "-m", "llmwd.supervisor"], env=self.env, cwd=CHECKOUT,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,
            )
        return self


def test_jobs_that_slurm_hides_from_us_are_those_of_gresused(moody: MoodyNode, tmp_path: Path) -> None:
    ledger = Ledger(moody.folder)
    with beside(moody, tmp_path, AsNobody) as tree:
        tree.serving()
        first = ledger.sbatch(moody, "sleep 600", "--gres=gpu:2")
        # The node's reading may come before the first sign of the job itself.
        status = tree.until(
            lambda status: of_slurm(status, 0, 1) and str(first) in jobs_of(status), what="the hidden job, and its GPUs claimed"
        )
        assert jobs_of(status)[str(first)] is None  # what it has by itself is not told
        stays(tree, lambda status: status["phase"] == "serving", "a model beside a hidden job that does not touch it")
        second = ledger.sbatch(moody, "sleep 600", "--gres=gpu:6")
        tree.phase("waiting")
        ledger.cancel(moody, first, second)
        tree.serving()
        log = tree.log("resolver")
        assert f"show job {first}" in log and ledger.wrongs(tree) == []


class CountingNode(MoodyNode):
    """One whose GresUsed has counts and no indices, as where gres.conf names neither types nor cores."""

    def _write_files(self) -> None:
        super()._write_files()
        for name in ("slurm.conf", "gres.conf"):
            path = self.folder / name
            path.write_text(path.read_text().replace("gpu:h200:", "gpu:").replace(" Type=h200", ""))


@pytest.mark.parametrize("kind", [Supervised, AsNobody])
def test_where_slurm_only_counts_the_gpus_in_use_those_that_no_shown_job_has_may_be_any(
    kind: type[Supervised], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if problem := missing():
        pytest.fail(problem, pytrace=False)
    with CountingNode(tmp_path_factory.mktemp("s")) as node, beside(node, tmp_path, kind) as tree:
        pid = tree.serving()["server"]["pid"]
        allocate(node, 2)  # no step: nothing but slurmctld shows it
        if kind is Supervised:
            tree.until(lambda status: of_slurm(status, 0, 1), what="the job's GPUs, by the listing of jobs")
            stays(tree, lambda status: status["phase"] == "serving", "a model beside a job that does not touch it")
            assert tree.status()["server"]["pid"] == pid
            allocate(node, 6)
            assert tree.phase("waiting")["reason"] == "yielded_to_job"
        else:
            assert tree.phase("waiting")["reason"] == "unknown_job"
            stays(tree, lambda status: not status["lease"], "no lease beside somebody hidden")
        node.cancel_all()
        tree.serving()


# --- ends that are none --------------------------------------------------------------------------------


def test_a_job_that_completes_for_long_keeps_its_gpus_even_from_a_resolver_that_never_saw_it(
    moody: MoodyNode, tmp_path: Path
) -> None:
    with beside(moody, tmp_path) as tree:
        tree.serving()
        job = moody.sbatch(FOREVER, "--gres=gpu:8")
        wait_for_job(tree, job, list(range(8)))
        moody.hold.touch()
        moody.scancel(job)
        moody.wait_state(job, "COMPLETING")
        # By now nothing but that word is left of it: no folder, no socket, no process, and GresUsed says none.
        wait_until(lambda: not moody.job_dir(job).exists() and not list(moody.spool.glob(f"*_{job}.*")))
        stays(tree, lambda status: of_slurm(status, *range(8)), "the completing job")
        tree.signal("resolver detector", signal.SIGKILL)
        stays(tree, lambda status: not status["lease"], "no lease beside a job that completes")
        moody.hold.unlink()
        tree.serving()


def test_a_suspended_job_keeps_its_gpus_and_a_requeued_one_comes_back_with_others(
    slurm_node: SlurmNode, tmp_path: Path
) -> None:
    node, ledger = slurm_node, Ledger(tmp_path)
    with beside(node, tmp_path) as tree:
        tree.serving()
        job = ledger.sbatch(node, "sleep 600", "--gres=gpu:7", "--requeue")
        wait_for_job(tree, job, list(range(7)))
        tree.phase("waiting")

        scontrol(node, "suspend", str(job))
        node.wait_state(job, "SUSPENDED")
        stays(tree, lambda status: of_slurm(status, *range(7)), "the suspended job")
        tree.signal("resolver", signal.SIGKILL)
        stays(tree, lambda status: not status["lease"], "no lease beside a suspended job")
        scontrol(node, "resume", str(job))
        wait_for_job(tree, job, list(range(7)))

        ledger.ends(job)
        scontrol(node, "requeue", str(job))
        node.wait_state(job, "PENDING")
        tree.serving_on(6, 7)
        filler = node.sbatch(FOREVER, "--gres=gpu:1")
        wait_for_job(tree, filler, [0])
        scontrol(node, "update", f"JobId={job}", "StartTime=now")
        wait_for_job(tree, job, list(range(1, 8)))
        assert tree.phase("waiting")["reason"] == "yielded_to_job"

        ledger.ends(job)
        scontrol(node, "requeue", str(job))
        node.wait_state(job, "PENDING")
        tree.serving_on(6, 7)
        # The same id, the same GPUs; not in the second of its requeue, see test_storms.
        scontrol(node, "update", f"JobId={job}", "StartTime=now+2")
        wait_for_job(tree, job, list(range(1, 8)))
        tree.phase("waiting")
        # The journal's line is written after the fact is out, by another process than the one that tells the phase.
        wait_until(lambda: len(tree.journal("lease_revoked")) >= 3, what="the journal's lines")
        assert len(tree.journal("lease_revoked")) == 3 and ledger.wrongs(tree) == []


def test_a_job_that_is_over_before_slurm_says_what_it_had_leaves_nothing_behind(
    slurm_node: SlurmNode, tmp_path: Path, slow_scontrol: Path
) -> None:
    ledger = Ledger(tmp_path)
    tree = supervised_beside(slurm_node, tmp_path, SCONTROL_TIMEOUT=5)
    tree.env["PATH"] = f"{slow_scontrol}:{tree.env['PATH']}"
    tree.start()
    try:
        pid = tree.serving()["server"]["pid"]
        for number in range(4):
            ledger.sbatch(slurm_node, "sleep 0.1", "--gres=gpu:2" if number % 2 else "--gres=gpu:0")
        wait_until(lambda: len([run for run in ledger.runs() if run.ended_at < float("inf")]) == 4, 60)
        tree.until(lambda status: holders(status)[:2] == ["free"] * 2, 60, "no job left")
        assert tree.status()["server"]["pid"] == pid and tree.journal("lease_revoked") == []
        ledger.sbatch(slurm_node, "sleep 0.1", "--gres=gpu:8")
        wait_until(lambda: [run.ended_at < float("inf") for run in ledger.runs()] == [True] * 5, 60)
        tree.until(lambda status: holders(status) == ["free"] * 6 + ["llmwd"] * 2, 60, "no job left, and serving")
        assert ledger.wrongs(tree) == [] and yields_started_twice(tree) == []
        assert [entry["reason"] for entry in tree.journal("lease_revoked")] in ([], ["yielded_to_job"], ["unknown_job"])
    finally:
        tree.close()


@pytest.fixture
def slow_scontrol(tmp_path: Path) -> Path:
    """A folder for PATH in which scontrol answers about a job after two seconds."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "scontrol"
    program.write_text(f'#!/bin/sh\ncase "$*" in *"show job"*) sleep 2;; esac\nexec {shutil.which("scontrol")} "$@"\n')
    program.chmod(0o755)
    return folder


# --- several -------------------------------------------------------------------------------------------


def test_of_two_slurmds_on_a_host_only_ours_counts_and_of_a_heterogeneous_job_our_component(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if problem := missing():
        pytest.fail(problem, pytrace=False)
    with TwoNodes(tmp_path_factory.mktemp("s")) as node, beside(node, tmp_path) as tree:
        pid = tree.serving()["server"]["pid"]
        theirs = node.sbatch(FOREVER, "-p", "both", "-w", node.other, "--gres=gpu:8")
        node.wait_state(theirs, "RUNNING")
        stays(tree, lambda status: str(theirs) not in jobs_of(status), "the neighbour's job unseen")
        assert "slurm" not in holders(tree.status())

        def component(name: str, gpus: int) -> list[str]:
            return ["-p", "both", "-w", name, f"--gres=gpu:{gpus}"]

        node.scancel(theirs)
        # The leader is on the other node; ours has the next id, and no sign but the step's.
        leader = node.sbatch("srun --het-group=0,1 sleep 600", *component(node.other, 1), ":", *component(node.node, 2))
        wait_for_job(tree, leader + 1, [0, 1])
        assert str(leader) not in jobs_of(tree.status())
        assert tree.status()["server"]["pid"] == pid
        second = node.sbatch(FOREVER, *component(node.node, 6), ":", *component(node.other, 1))  # the leader is here
        wait_for_job(tree, second, list(range(2, 8)))
        assert tree.phase("waiting")["reason"] == "yielded_to_job"
        node.scancel(leader, second)
        tree.serving()


# --- slurmd comes and goes ------------------------------------------------------------------------------


def take_folders_away(node: SlurmNode) -> None:
    """What slurmd and its jobs made, gone: scope (or tree) and spool, as after a reboot or a careless stop."""
    node.kill_slurmd(signal.SIGTERM)
    node._end_cgroup()

    def gone() -> bool:
        shutil.rmtree(node.spool, ignore_errors=True)  # a slurmstepd that is ending takes its socket away itself
        return not node.spool.exists()

    wait_until(gone, what="the end of slurmd's spool folder")


@pytest.mark.parametrize("cgroup", ["v2", "v1"])
def test_llmwd_that_was_there_before_slurm_takes_nothing_until_slurm_says_so(
    cgroup: str, make_slurm_node: Callable[..., SlurmNode], tmp_path: Path
) -> None:
    node = make_slurm_node(cgroup=cgroup)
    ledger = Ledger(tmp_path)
    take_folders_away(node)
    node.kill_ctld()
    with beside(node, tmp_path) as tree:
        tree.until(lambda status: status["phase"] == "waiting", what="phase waiting")
        stays(tree, lambda status: not status["lease"], "no lease without Slurm", 3)
        node.start_ctld()
        first = ledger.sbatch(node, "sleep 600", "--gres=gpu:6")  # starts as soon as there is a slurmd
        stays(tree, lambda status: not status["lease"], "no lease without slurmd's folders", 3)
        node.start_slurmd()
        wait_for_job(tree, first, list(range(6)))
        tree.serving_on(6, 7)

        # The folders vanish under a serving model and come back at once, with a job in them.
        ledger.cancel(node, first)
        wait_until(lambda: not node.job_dir(first).exists())
        take_folders_away(node)
        node.start_slurmd()
        second = ledger.sbatch(node, "sleep 600", "--gres=gpu:8")
        tree.until(lambda status: of_slurm(status, *range(8)), what="the next job's GPUs claimed")
        tree.phase("waiting")
        quick = {"stepd", f"cgroup{cgroup[1]}"}
        wait_until(lambda: quick <= sources_of(tree, second), 20, every_s=0.1, what="seen by both folders")

        # The spool folder is lost while a job runs. A new slurmd does not find the job's slurmstepd without its socket,
        # so slurmctld counts the job as over and gives its GPUs away: its processes still have them.
        ledger.begun(second)
        shutil.move(node.spool, node.folder / "lost")
        stays(tree, lambda status: of_slurm(status, *range(8)), "the job whose socket was lost", 2)
        node.restart_slurmd()
        node.scancel(second)
        third = ledger.sbatch(node, "sleep 600", "--gres=gpu:6")
        wait_for_job(tree, third, list(range(6)))
        assert pids_in(node.job_dir(second))
        stays(tree, lambda status: of_slurm(status, *range(8)), "the forgotten job that still runs")
        assert ledger.wrongs(tree) == []
        ledger.ends(second)
        for pid in pids_in(node.job_dir(second)):
            with suppress(FileNotFoundError, ProcessLookupError):  # ended with the one before
                if Path(f"/proc/{pid}/comm").read_text() != "slurmstepd\n":  # which takes the folder away when they are gone
                    kill_if_in(pid, node.node)
        tree.serving_on(6, 7)
