"""Look-ahead beside a real Slurm: what it prints of its plans, when we leave for them, and how often it is asked."""

import itertools
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

from llmwd.adapters import slurm
from llmwd.adapters.slurm import Answer
from llmwd.core import lookahead
from llmwd.core.lookahead import Heard
from tests.slurm.test_yield import supervised_beside
from tests.slurm.testbed import SlurmNode
from tests.waiting import wait_until

AHEAD = ("squeue -a -h --local --states=PD", "scontrol -a -o show reservations")


def asked(argv: list[str]) -> Answer:
    call = slurm.start(argv, 20)
    assert select.select([call], [], [], 20)[0], f"no answer: {argv}"
    answer = call.answer()
    assert answer.status == 0 and not answer.stderr, answer
    return answer


@pytest.fixture
def client(slurm_node: SlurmNode, monkeypatch: pytest.MonkeyPatch) -> SlurmNode:
    """The node, with this process as a client of it that has strange habits."""
    monkeypatch.setenv("SLURM_CONF", slurm_node.env["SLURM_CONF"])
    monkeypatch.setenv("SQUEUE_STATES", "R")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    return slurm_node


@pytest.fixture
def reserve(slurm_node: SlurmNode) -> Iterator[Callable[..., None]]:
    made: list[str] = []

    def order(*words: str) -> None:
        subprocess.run(["scontrol", *words], env={**os.environ, **slurm_node.env}, check=True, capture_output=True, timeout=30)

    def make(name: str, *more: str) -> None:
        order("create", "reservation", f"ReservationName={name}", "users=root", f"nodes={slurm_node.node}", "duration=60", *more)
        made.append(name)

    yield make
    for name in made:
        order("delete", f"ReservationName={name}")


def seen(node: SlurmNode) -> Heard:
    return lookahead.read_pending(asked(slurm.pending_jobs(lookahead.JOB_FIELDS)).stdout, node.node, alone=True)


def test_slurms_plans_are_read_as_they_are(client: SlurmNode, reserve: Callable[..., None]) -> None:
    assert lookahead.read_reservations(asked(slurm.reservations()).stdout, client.node) == Heard()
    assert seen(client) == Heard()
    now_at = time.time()
    reserve("maint", "starttime=now+7200", "flags=maint,ignore_jobs")
    heard = lookahead.read_reservations(asked(slurm.reservations()).stdout, client.node)
    assert [plan.who for plan in heard.plans] == ["reservation maint"] and not heard.unclear
    assert heard.plans[0].start_at == pytest.approx(now_at + 7200, abs=60)
    assert heard.plans[0].end_at == heard.plans[0].start_at + 3600
    assert lookahead.read_reservations(asked(slurm.reservations()).stdout, "another") == Heard()

    blocker = client.sbatch("exec sleep 600", "-n", "64", "-t", "5")
    client.wait_state(blocker, "RUNNING")
    begins = client.sbatch("exec sleep 600", "--gres=gpu:2", "--begin=now+300", "-t", "3")
    held = client.sbatch("exec sleep 600", "--gres=gpu:2", "--begin=now+300", "--hold", "-t", "3")
    planned = client.sbatch("exec sleep 600", "-n", "2", "--gpus=4", "-t", "3")
    alone = client.sbatch("exec sleep 600", "--exclusive", "-t", "3")
    plain = client.sbatch("exec sleep 600", "-t", "3")
    array = client.sbatch("exec sleep 600", "--array=0-9%3", "--gres=gpu:2", "--begin=now+300", "-t", "3")
    scheduled = {str(job) for job in (begins, planned, alone, plain, array)}
    # One and the same answer: the scheduler plans anew each second.
    def planned_all() -> Heard | None:
        found = seen(client)
        return found if {plan.job for plan in found.plans} >= scheduled else None

    heard = wait_until(planned_all, 60)
    assert not heard.unclear and str(held) not in {plan.job for plan in heard.plans}
    gpus = {int(plan.job): plan.gpus for plan in heard.plans}
    assert gpus == {begins: 2, planned: 4, alone: None, plain: 0, array: 6}
    starts = {int(plan.job): plan.start_at for plan in heard.plans}
    assert starts[begins] == pytest.approx(time.time() + 300, abs=90)
    assert starts[planned] == pytest.approx(time.time() + 300, abs=90)


def wrapped(folder: Path, calls: Path) -> str:
    """A PATH with Slurm's clients that note each call."""
    folder.mkdir()
    for name in ("scontrol", "squeue", "sinfo"):
        program = folder / name
        program.write_text(f'#!/bin/sh\necho "$(date +%s) {name} $*" >> {calls}\nexec {shutil.which(name)} "$@"\n')
        program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def ahead_calls(calls: Path) -> list[tuple[str, int]]:
    """Each look-ahead call's beginning, and the second at which it was made."""
    lines = [line.partition(" ") for line in calls.read_text().splitlines()]
    return [(words, int(at)) for at, _, line in lines for words in AHEAD if line.startswith(words)]


def test_a_reservation_is_left_for_in_good_time_and_said(
    slurm_node: SlurmNode, reserve: Callable[..., None], tmp_path: Path
) -> None:
    """And the calls are counted while at it: two at the start, then one a minute."""
    reserve("maint", "starttime=now+150", "flags=maint,ignore_jobs")
    calls = tmp_path / "calls"
    tree = supervised_beside(slurm_node, tmp_path, LOOKAHEAD="on")
    tree.env["PATH"] = wrapped(tmp_path / "bin", calls)
    tree.state.mkdir(0o700, parents=True, exist_ok=True)
    (tree.state / "load_times.json").write_text('{"fake":[0.5]}')
    tree.start()
    try:
        tree.serving()
        coming = tree.status()["next"]  # nothing is begun before that is known
        assert tree.status()["phase"] == "serving"
        assert coming["who"] == "reservation maint" and coming["gpus"] is None
        assert "next" in tree.ctl("status").stdout and "reservation maint" in tree.ctl("status").stdout
        status = tree.phase("waiting", 120)
        left_s = datetime.fromisoformat(coming["start"]).timestamp() - time.time()
        assert status["reason"] == "expected_job" and "reservation maint" in status["detail"]
        assert 0 < left_s <= 60
        assert [entry["reason"] for entry in tree.journal("released")] == ["expected_job"]
        (jobs, first_s), (reservations, second_s), (again, third_s), *_ = ahead_calls(calls)
        assert (jobs, reservations, again) == (*AHEAD, AHEAD[0]) and second_s - first_s < 10 and third_s - second_s > 58
        assert '"fake":[0.5,' in (tree.state / "load_times.json").read_text()
    finally:
        tree.close()


def test_nothing_is_begun_that_a_reservation_would_end_before_it_has_loaded_whoever_is_restarted(
    slurm_node: SlurmNode, reserve: Callable[..., None], tmp_path: Path
) -> None:
    """Loading is assumed to take 300 s, as it has never been measured here."""
    reserve("maint", "starttime=now+240", "flags=maint,ignore_jobs")
    calls = tmp_path / "calls"
    tree = supervised_beside(slurm_node, tmp_path, LOOKAHEAD="on")
    tree.env["PATH"] = wrapped(tmp_path / "bin", calls)
    tree.start()
    try:
        status = tree.until(lambda status: status["reason"] == "expected_job")
        assert "reservation maint" in status["detail"] and status["next"]["who"] == "reservation maint"
        for restarts in (1, 2):
            tree.signal("resolver", signal.SIGKILL)
            killed_s = time.monotonic()
            wait_until(lambda: tree.worker("resolver")["restarts"] == restarts and tree.look().facts.gpus.at_s > killed_s, 30)
            readings = calls.read_text().count(" sinfo ")
            wait_until(lambda: calls.read_text().count(" sinfo ") > readings, 30, what="a reading of the node")
            status = tree.until(lambda status: status["reason"] == "expected_job")
            assert status["next"]["who"] == "reservation maint"
        assert tree.journal("lease_granted") == [] and tree.journal("server_started") == []
        made = ahead_calls(calls)
        assert [words for words, _ in made[:2]] == list(AHEAD)
        # From then on one a minute, and none for a restart.
        assert all(at_s - before_s > 58 for (_, before_s), (_, at_s) in itertools.pairwise(made[1:]))
    finally:
        tree.close()


def test_not_one_call_is_made_while_it_is_off_and_a_planned_job_is_left_for_once_it_is_on(
    client: SlurmNode, tmp_path: Path
) -> None:
    blocker = client.sbatch("exec sleep 600", "-n", "64", "-t", "4")
    client.wait_state(blocker, "RUNNING")
    planned = client.sbatch("exec sleep 600", "-n", "8", "--gres=gpu:8", "-t", "4")
    wait_until(lambda: seen(client).plans, 60, every_s=0.2, what="a planned job")
    calls = tmp_path / "calls"
    tree = supervised_beside(client, tmp_path, LOOKAHEAD_DRAIN=900, RECONCILE=1)
    tree.env["PATH"] = wrapped(tmp_path / "bin", calls)
    tree.start()
    try:
        assert tree.serving()["next"] is None
        readings = calls.read_text().count(" sinfo ")
        wait_until(lambda: calls.read_text().count(" sinfo ") >= readings + 3, 30, what="ordinary calls")
        assert ahead_calls(calls) == []

        tree.write_settings(LOOKAHEAD="on")
        tree.signal("root", signal.SIGHUP)
        status = tree.until(lambda status: status["reason"] == "expected_job" and status["phase"] == "waiting")
        assert status["next"]["who"] == f"job {planned}" and status["next"]["gpus"] == 8
        assert f"job {planned}" in status["detail"] and {words for words, _ in ahead_calls(calls)} <= set(AHEAD)
        assert [entry["reason"] for entry in tree.journal("released")] == ["expected_job"]

        tree.write_settings(LOOKAHEAD="off")
        tree.signal("root", signal.SIGHUP)
        assert tree.serving()["next"] is None
    finally:
        tree.close()


def test_a_controller_that_does_not_tell_its_plans_ends_nothing_and_is_mentioned_once(
    slurm_node: SlurmNode, tmp_path: Path
) -> None:
    tree = supervised_beside(slurm_node, tmp_path, LOOKAHEAD="on")
    tree.env["PATH"] = wrapped(tmp_path / "bin", tmp_path / "calls")
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Access/permission denied' >&2\nexit 1\n")
    tree.start()
    try:
        status = tree.serving()
        assert status["next"] is None and all(source["works"] for source in status["sources"] if source["name"] == "gresused")
        told = [line for line in tree.log("resolver").splitlines() if "look-ahead" in line]
        assert len(told) == 1 and "does not tell the pending jobs" in told[0] and "serving goes on" in told[0]
    finally:
        tree.close()
