"""Slurm's jobs come first: which of them make us yield, that nothing delays it, and that the model comes back."""

import itertools
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from tests.fakes.ntfy import NtfyServer
from tests.tree.conftest import Start
from tests.tree.supervised import Supervised
from tests.waiting import wait_until


def servers(tree: Supervised) -> list[int]:
    """Every process of the model's tree."""
    return [pid for pid, cmd in tree.left() if b"server.py" in cmd]


def gone(tree: Supervised, within_s: float = 20) -> None:
    """Nothing of the model's tree is left. The tests' LEASE_TTL is far longer, so that it is no expiry."""
    wait_until(lambda: not servers(tree), within_s, what="the end of the model's tree")


def test_only_a_job_on_our_gpus_makes_us_yield(supervised: Start) -> None:
    tree = supervised()
    before = tree.serving()
    assert before["lease"]["gpus"] == [6, 7]
    tree.job(1, "0-4")
    tree.job(2, "")  # CPUs only
    status = tree.until(lambda status: {job["id"] for job in status["jobs"]} == {"1", "2"})
    assert status["server"]["pid"] == before["server"]["pid"] and status["phase"] == "serving"
    assert [gpu["holder"] for gpu in status["gpus"]] == ["slurm"] * 5 + ["free"] + ["llmwd"] * 2
    tree.job_over(1)
    tree.until(lambda status: len(status["jobs"]) == 1)
    assert tree.journal("lease_revoked") == []

    tree.job(3, "0-5,7")
    assert tree.phase("waiting")["reason"] == "yielded_to_job"
    assert servers(tree) == []
    released = tree.journal("released")[-1]
    assert released["job"] == "3"
    assert released["seen_s"] <= released["resolved_s"] <= released["revoked_s"] <= released["signalled_s"] <= released["gone_s"]
    tree.job_over(3)
    assert tree.serving()["server"]["pid"] != before["server"]["pid"]
    assert tree.answers()


def test_a_job_while_the_model_loads_is_a_yield_without_any_grace(supervised: Start) -> None:
    tree = supervised({"FAKE_READY_AFTER": 600, "FAKE_SWALLOW_TERM_WHILE_LOADING": 1, "FAKE_ENGINE": 1},
                      LEASE_TTL=60, YIELD_GRACE=30)
    tree.phase("loading")
    wait_until(lambda: len(servers(tree)) >= 2, 10)
    tree.job(1, "0-7")
    gone(tree)
    assert tree.phase("waiting")["reason"] == "yielded_to_job"


@pytest.mark.parametrize("kind", ["FAKE_IGNORE_TERM", "FAKE_HANG_ON_TERM", "FAKE_REFORK_ON_TERM"])
def test_a_serving_tree_that_will_not_end_is_killed_after_its_grace_grandchildren_included(supervised: Start, kind: str) -> None:
    count = 50 if kind == "FAKE_REFORK_ON_TERM" else 1
    tree = supervised({kind: count, "FAKE_ENGINE": 1, "FAKE_FORK_GRANDCHILD": 1, "FAKE_CHILDREN": 11},
                      LEASE_TTL=60, YIELD_GRACE=0.5)
    tree.serving()
    tree.job(1, "6")
    gone(tree)
    released = wait_until(lambda: tree.journal("released"), 10)[-1]
    assert released["reason"] == "yielded_to_job"
    if kind != "FAKE_REFORK_ON_TERM":  # which may run out of forks before
        assert released["killed_s"] is not None


def test_a_server_that_is_stopped_gives_its_gpus_back_all_the_same(supervised: Start) -> None:
    tree = supervised({"FAKE_ENGINE": 1}, LEASE_TTL=60, YIELD_GRACE=0.3)
    tree.serving()
    tree.signal("server", signal.SIGSTOP)
    tree.job(1, "6")
    gone(tree)


def test_it_resumes_on_whichever_gpus_are_free(supervised: Start) -> None:
    tree = supervised()
    tree.serving()
    tree.job(1, "2-7")
    tree.serving_on(0, 1)
    tree.job(2, "1")
    assert tree.phase("waiting")["reason"] == "yielded_to_job"
    tree.job_over(1)
    tree.serving_on(6, 7)


def test_twenty_jobs_at_once_cost_one_yield_and_one_resume(supervised: Start) -> None:
    tree = supervised(RESUME_AFTER=5)  # longer than it takes to end nineteen jobs, whose GPUs are free from then on
    tree.serving()
    for job in range(1, 21):
        tree.job(job, str(job % 8))
    status = tree.phase("waiting")
    status = tree.until(lambda status: len(status["jobs"]) == 20)
    assert {gpu["holder"] for gpu in status["gpus"]} == {"slurm"} and status["lease"] is None
    for job in range(1, 20):
        tree.job_over(job)
        assert tree.status()["lease"] is None
    tree.job_over(20)
    tree.serving()
    assert len(tree.journal("lease_revoked")) == 1 and len(tree.journal("lease_granted")) == 2


def test_a_job_that_cannot_be_read_counts_as_one_on_our_gpus(supervised: Start) -> None:
    tree = supervised(RESOLVE_DEADLINE=0.5)
    tree.serving()
    tree.job(1, "a few")
    status = tree.phase("waiting")
    assert status["reason"] == "unknown_job" and status["jobs"] == [{"id": "1", "gpus": None}]
    assert {gpu["holder"] for gpu in status["gpus"]} == {"unknown"}
    tree.job_over(1)
    tree.serving()


@pytest.mark.parametrize("busy", ["tunnel notifier", "server"])
def test_no_other_worker_is_waited_for(supervised: Start, busy: str) -> None:
    tree = supervised({"FAKE_ENGINE": 1}, LEASE_TTL=60, YIELD_GRACE=0.3)
    tree.all_ready()
    tree.signal(f"{busy} root", signal.SIGSTOP)
    tree.job(1, "0-7")
    gone(tree)
    tree.signal_pid(tree.process.pid, signal.SIGCONT)


def test_a_notice_that_nobody_takes_slows_no_yield(supervised: Start) -> None:
    with NtfyServer() as ntfy:
        ntfy.plan[:] = ["hang"] * 100
        tree = supervised({"FAKE_ENGINE": 1}, LEASE_TTL=60, YIELD_GRACE=0.3, NTFY_TOPIC="t", NTFY_SERVER=ntfy.url)
        tree.all_ready()
        wait_until(lambda: ntfy.tries, 30, what="a notice that hangs")
        tree.job(1, "0-7")
        gone(tree)
        assert tree.phase("waiting")["reason"] == "yielded_to_job"
        waiting = tree.until(lambda status: status["notices"]["waiting"] >= 2)["notices"]
        assert waiting["sent"] == 0 and waiting["kept"] == ""


def test_the_detector_killed_just_as_a_job_arrives_costs_no_conflict(supervised: Start) -> None:
    tree = supervised(LEASE_TTL=60)
    tree.all_ready()
    tree.signal("detector", signal.SIGKILL)
    tree.job(1, "0-7")
    gone(tree)


def test_manager_and_resolver_killed_just_as_a_job_arrives_cost_no_conflict(supervised: Start) -> None:
    tree = supervised(LEASE_TTL=60)
    tree.all_ready()
    tree.signal("vllm resolver detector", signal.SIGKILL)
    tree.job(1, "0-7")
    gone(tree)
    assert tree.phase("waiting")["reason"] == "yielded_to_job"


def test_the_manager_killed_in_the_middle_of_a_release_changes_nothing(supervised: Start) -> None:
    tree = supervised({"FAKE_IGNORE_TERM": 1, "FAKE_ENGINE": 1}, LEASE_TTL=60, YIELD_GRACE=3)
    tree.all_ready()
    tree.job(1, "0-7")
    tree.phase("yielding")
    tree.signal("vllm", signal.SIGKILL)
    gone(tree)
    assert tree.phase("waiting")["reason"] == "yielded_to_job"
    tree.job_over(1)
    tree.all_ready()


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 256 KiB, which the test fills when it likes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k,mode=0700", "llmwd-test", folder], check=True)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_delays_no_yield_and_prevents_no_resume(full_disk: Path, tmp_path: Path) -> None:
    tree = Supervised(tmp_path / "tree", {"LEASE_TTL": 60}, {"FAKE_ENGINE": 1})
    tree.state = full_disk
    tree.env["LLMWD_STATE_DIR"] = str(full_disk)
    tree.start()
    try:
        tree.all_ready()
        with (full_disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(b"x" * 512)
        tree.job(1, "0-7")
        gone(tree)
        tree.phase("waiting")
        tree.job_over(1)
        tree.serving()
        ordered = tree.ctl("yield")
        assert ordered.returncode == 0 and "not kept" in ordered.stdout
        gone(tree)
        # A worker that dies now can write no log, and works all the same.
        tree.signal("resolver", signal.SIGKILL)
        tree.until(lambda status: tree.worker("resolver")["restarts"] == 1 and tree.worker("resolver")["phase"] == "ready")
    finally:
        tree.close()


def test_a_read_only_disk_delays_no_yield(full_disk: Path, tmp_path: Path) -> None:
    tree = Supervised(tmp_path / "tree", {"LEASE_TTL": 60})
    tree.state = full_disk
    tree.env["LLMWD_STATE_DIR"] = str(full_disk)
    tree.start()
    try:
        tree.all_ready()
        # Logs that are open for writing keep a mount writable; a bind mount over it does not ask them.
        subprocess.run(["mount", "--bind", full_disk, full_disk], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", full_disk], check=True)
        try:
            tree.job(1, "0-7")
            gone(tree)
            tree.phase("waiting")
            assert tree.journal("released") == []  # it could not be written, indeed
        finally:
            subprocess.run(["umount", "-l", full_disk], check=True)
    finally:
        tree.close()


def test_the_journal_says_who_saw_the_job_and_how_many_requests_were_cut(supervised: Start) -> None:
    tree = supervised(profile={"FAKE_TOKEN_EVERY": 0.5})
    tree.serving()
    body = json.dumps({"model": "fake", "prompt": "a", "max_tokens": 1000, "stream": True}).encode()
    streams = []
    for _ in range(3):
        asked = Request(f"http://127.0.0.1:{tree.port}/v1/completions", body, {"Content-Type": "application/json", **tree.authorized()})
        streams.append(urlopen(asked))
    looks, ours = looked(tree), itertools.count(1)
    # One look of the manager's may have begun before the last stream: the second one after it has not.
    wait_until(lambda: looked(tree) - next(ours) >= looks + 2, 60, every_s=0.5, what="two looks of the manager at the load")
    tree.job(1, "7")
    gone(tree)
    released = wait_until(lambda: tree.journal("released"), 10)[-1]
    assert released["requests"] == 3 and released["requests_looked_s"] < released["revoked_s"]
    proved = wait_until(lambda: tree.journal("release_proved"), 10)[-1]
    assert proved["job"] == "1" and proved["within_budget"] and proved["proved_s"] == released["gone_s"]
    seen = wait_until(lambda: tree.journal("job_seen"), 10)[-1]
    assert (seen["job"], seen["first"], seen["lags"], seen["seen_s"]) == ("1", "sim", {}, proved["begun_s"])
    for stream in streams:
        stream.close()


def looked(tree: Supervised) -> int:
    """How often the server's counters have been read, by us as well."""
    text = urlopen(f"http://127.0.0.1:{tree.port}/metrics").read().decode()
    return int(float(next(line for line in text.splitlines() if line.startswith("fake:looks")).split()[-1]))
