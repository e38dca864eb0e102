"""Storms: thousands of folders, hundreds of jobs, more events than inotify's queue holds.

Every time: no conflict is missed, no yield is started twice, the controller is spared, memory stays flat. Calls are
counted by programs of our own in front of Slurm's.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmwd.core.claims import Claims
from llmwd.messages import JobSeen
from llmwd.vocab import Source
from llmwd.workers.slurmdesk import SlurmDesk
from tests.fakes.loop_shell import LoopShell
from tests.slurm.ledger import Ledger, yields_started_twice
from tests.slurm.test_yield import supervised_beside, wait_for_job
from tests.slurm.testbed import SlurmNode
from tests.tree.supervised import Supervised
from tests.waiting import wait_until

COUNTED = ("scontrol", "sinfo", "squeue")
CALL_EVERY_S = 0.1
BURST = 2
STORM_S = 20.0
# Beyond what the first storm needed, which Python keeps: 0.1 to 0.4 for a second, 0.7 to 1 for two more with yields. What
# a storm brings is 2,000 jobs of more than a kilobyte each.
GROWTH_MIB = 1.5
QUEUE = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())


class Counted:
    """A folder for PATH whose programs write down when they were called, and become the real ones.

    That is when the kernel made their process: on a busy machine it runs a while later, and two of them close together."""

    def __init__(self, folder: Path):
        self.bin, self._log = folder / "counted", folder / "calls"
        self.bin.mkdir()
        for name in COUNTED:
            program = self.bin / name
            program.write_text(
                f'#!/bin/sh\nread -r stat < /proc/$$/stat\necho "$(echo "$stat" | cut -d " " -f 22) {name} $*" >> {self._log}\n'
                f'exec {shutil.which(name)} "$@"\n'
            )
            program.chmod(0o755)

    def calls(self) -> list[tuple[float, str]]:
        """(seconds since boot, command line), without the detector's one question about the configuration."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        pairs = [line.split(" ", 1) for line in lines]
        return [(int(ticks) / os.sysconf("SC_CLK_TCK"), command) for ticks, command in pairs if command != "scontrol show config"]

    def too_many(self) -> list[str]:
        """Stretches of time with more calls than one every CALL_EVERY_S and a burst; a process starts up to 50 ms late."""
        times = sorted(at for at, _ in self.calls())
        return [
            f"{last - first + 1} calls within {times[last] - times[first]:.2f} s"
            for first in range(len(times))
            for last in range(first + BURST, len(times))
            if last - first + 1 > BURST + (times[last] - times[first] + 0.05) / CALL_EVERY_S + 1
        ]


@pytest.fixture
def counted(tmp_path: Path) -> Counted:
    return Counted(tmp_path)


@pytest.fixture(params=["v2"])
def node(request: pytest.FixtureRequest) -> SlurmNode:
    return request.getfixturevalue("slurm_node_v1" if request.param == "v1" else "slurm_node")


@pytest.fixture
def tree(request: pytest.FixtureRequest, node: SlurmNode, tmp_path: Path, counted: Counted) -> Iterator[Supervised]:
    """Beside the node, every call counted, and every SIGTERM to a server; the slow looks come so rarely that they cannot
    be what helps."""
    made = supervised_beside(node, tmp_path, RECONCILE=60, LEASE_TTL=getattr(request, "param", 30))
    made.env["PATH"] = f"{counted.bin}:{made.env['PATH']}"
    made.write_profile("fake", FAKE_NOTE_TERM=tmp_path / "terms")
    yield made.start()
    made.close()
    terms = Counter((tmp_path / "terms").read_text().split())
    assert yields_started_twice(made) == [] and set(terms.values()) == {1}, "a server was told to end more than once"


# Half of its LEASE_TTL the detector may be silent for.
HANGS_S = 55.0
HANGS = pytest.mark.parametrize("tree", [120], indirect=True)


def own_mib(tree: Supervised, worker: str) -> float:
    """What it shares with nobody: the rest depends on who else lives."""
    text = Path(f"/proc/{tree.pids()[worker]}/smaps_rollup").read_text()
    return int(re.search(r"^Private_Dirty:\s+(\d+)", text, re.MULTILINE)[1]) / 1024


def memory(tree: Supervised) -> dict[str, float]:
    return {worker: own_mib(tree, worker) for worker in ("detector", "resolver")}


def grown(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """By how many MiB, of those that grew beyond measure."""
    return {name: after[name] - before[name] for name in before if after[name] - before[name] > GROWTH_MIB}


def quiet(status: dict) -> bool:
    """Serving, and nobody else has a GPU. (Other tests' slurmstepds may be seen for a moment.)"""
    return sorted(gpu["holder"] for gpu in status["gpus"]) == ["free"] * 6 + ["llmwd"] * 2 and status["phase"] == "serving"


Storm = Callable[[int, int], float]


def storm_in(node: SlurmNode, place: str) -> Storm:
    """Signs of (count) jobs from a (first) id on, made and removed a hundred at a time; how long it took."""

    def folder(number: int) -> tuple[Callable[[], None], Callable[[], None]]:
        path = node.scope / f"job_{number}"
        return lambda: path.mkdir(parents=True), path.rmdir

    def socket_name(number: int) -> tuple[Callable[[], None], Callable[[], None]]:
        path = node.spool / f"{node.node}_{number}.0"
        return path.touch, path.unlink

    def storm(count: int, first: int) -> float:
        began_s = time.monotonic()
        for start in range(first, first + count, 100):
            signs = [(socket_name if place == "sockets" else folder)(number) for number in range(start, start + 100)]
            for make, _ in signs:
                make()
            for _, remove in signs:
                remove()
        return time.monotonic() - began_s

    return storm


@pytest.mark.parametrize(
    ("node", "place"), [("v2", "folders"), ("v1", "folders"), ("v2", "sockets")], indirect=["node"],
)
def test_two_thousand_folders_hide_no_job_and_cost_neither_calls_nor_memory(
    node: SlurmNode, place: str, tree: Supervised, counted: Counted, tmp_path: Path
) -> None:
    ledger, storm = Ledger(tmp_path), storm_in(node, place)
    pids = tree.serving() and tree.pids()
    assert storm(2000, 100_000) < STORM_S  # 0.1 s where nobody else works
    # One that it finds as a whole, as on a busy machine it may find any of the later ones: that takes the most at once.
    tree.signal("detector", signal.SIGSTOP)
    try:
        storm(2000, 120_000)
    finally:
        tree.signal("detector", signal.SIGCONT)
    continued_s = time.monotonic()
    wait_until(lambda: tree.look().facts.jobs.at_s > continued_s, 60, what="a detector that has read all of it")
    tree.until(quiet, 60, "serving, no job left")
    before = memory(tree)
    assert storm(2000, 150_000) < STORM_S
    tree.until(quiet, 60, "serving, no job left")
    assert grown(before, memory(tree)) == {}

    for number in range(2):
        storm(1000, 200_000 + 2000 * number)
        job = ledger.sbatch(node, "sleep 600", "--gres=gpu:8")
        storm(1000, 201_000 + 2000 * number)
        wait_for_job(tree, job, list(range(8)))
        tree.phase("waiting")
        ledger.cancel(node, job)
        tree.until(quiet, 60, "serving, no job left")

    assert ledger.wrongs(tree) == []
    # A folder that Slurm knows nothing of may be taken for a conflict; a conflict is never taken for a folder.
    assert len(tree.journal("released")) <= 5
    assert counted.too_many() == []
    assert grown(before, memory(tree)) == {}
    assert {name: pid for name, pid in tree.pids().items() if name != "server"} == {
        name: pid for name, pid in pids.items() if name != "server"
    }


def test_an_array_of_two_hundred_jobs_never_meets_a_lease(
    node: SlurmNode, tree: Supervised, counted: Counted, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path)
    tree.serving()
    node.sbatch(ledger.script("sleep 0.2"), "--gres=gpu:1", "--array=1-200")
    wait_until(lambda: sum(run.ended_at < float("inf") for run in ledger.runs()) == 200, 240, every_s=0.5)
    tree.until(quiet, 60, "serving, no job left")
    assert len({run.job for run in ledger.runs()}) == 200
    assert any(run.gpus & {6, 7} for run in ledger.runs())
    assert ledger.wrongs(tree) == []
    assert {entry["reason"] for entry in tree.journal("lease_revoked")} <= {"yielded_to_job", "unknown_job"}
    assert counted.too_many() == []


@HANGS
def test_a_job_whose_event_was_lost_in_an_overflow_is_found_at_once(
    node: SlurmNode, tree: Supervised, tmp_path: Path
) -> None:
    tree.serving()
    ledger = Ledger(tmp_path)
    began_s = time.monotonic()
    tree.signal("detector", signal.SIGSTOP)
    try:
        overflow(node.spool / f"{node.node}_77777.0", node.scope / "job_77777")
        job = ledger.sbatch(node, "sleep 600", "--gres=gpu:8")  # its events find both queues full
        node.wait_state(job, "RUNNING")
        assert time.monotonic() - began_s < HANGS_S, "the root takes the detector for hung: the machine is too slow"
    finally:
        tree.signal("detector", signal.SIGCONT)
    continued_s = time.monotonic()
    release = tree.released_for(job)
    assert release["job"] == str(job)
    assert release["seen_s"] - continued_s < 5  # the slow scans and readings come later
    wait_for_job(tree, job, list(range(8)))
    assert tree.worker("detector")["restarts"] == 0


@HANGS
def test_a_job_that_is_requeued_while_the_detector_hangs_is_asked_for_its_new_gpus_at_once(
    node: SlurmNode, tree: Supervised, tmp_path: Path
) -> None:
    """One job alone, so that nothing else makes us ask: with one GPU, and after its requeue with all of them."""

    def scontrol(*words: object) -> None:
        subprocess.run(["scontrol", *map(str, words)], env={**os.environ, **node.env}, check=True, timeout=30)

    tree.serving()
    ledger = Ledger(tmp_path)
    job = ledger.sbatch(node, "exec sleep 600", "--gres=gpu:1", "--requeue")
    wait_for_job(tree, job, [0])
    assert tree.status()["phase"] == "serving"
    began_s = time.monotonic()
    tree.signal("detector", signal.SIGSTOP)
    try:
        ledger.ends(job)
        scontrol("requeue", job)
        node.wait_state(job, "PENDING")
        # Not in the second of its requeue: the credential of a run that begins in it counts as revoked with the last one's.
        scontrol("update", f"JobId={job}", "TresPerNode=gres:gpu:8", "StartTime=now+2")
        ledger.begun(job)
        assert time.monotonic() - began_s < HANGS_S, "the root takes the detector for hung: the machine is too slow"
    finally:
        tree.signal("detector", signal.SIGCONT)
    continued_s = time.monotonic()
    assert tree.released_for(job)["revoked_s"] - continued_s < 5  # the next reading comes later
    wait_for_job(tree, job, list(range(8)))
    assert tree.worker("detector")["restarts"] == 0


def overflow(socket_name: Path, folder: Path) -> None:
    """One event more than fits, for each of the two queues; a name that comes and goes is never merged."""
    for _ in range(QUEUE // 2 + 1):
        socket_name.touch()
        socket_name.unlink()
    for _ in range(QUEUE // 2 + 1):
        folder.mkdir()
        folder.rmdir()


def test_a_question_whose_turn_has_not_come_waits_for_its_turn_and_no_longer(
    slurm_node: SlurmNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job right after the first two calls: the burst is used up, and nothing else happens on the node."""
    monkeypatch.setenv("SLURM_CONF", slurm_node.env["SLURM_CONF"])
    job = slurm_node.sbatch("exec sleep 600", "--gres=gpu:2")
    slurm_node.wait_state(job, "RUNNING")
    deadline_s = 60.0
    shell, claims = LoopShell(tmp_path, slurm_node=slurm_node.node, reconcile_s=60.0), Claims(deadline_s)
    desk = SlurmDesk(shell, claims, socket.gethostname(), lambda: None)  # type: ignore[arg-type]
    desk.pump()
    shell.until(lambda: claims.reading is not None, 30)  # also of a resolver that begins with a lease: not RECONCILE later
    seen_s = time.monotonic()
    claims.see((JobSeen(id=str(job), sources=(Source.stepd,), seen_s=seen_s),), seen_s)
    desk.pump()
    shell.until(lambda: claims.views(time.monotonic())[0].gpus == {0, 1}, 30)
    desk.close()
    shell.close()
