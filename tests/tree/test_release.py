"""`llmwd-ctl release`, the prolog's order: it returns when nothing of ours is on the job's GPUs, and not before."""

import json
import signal
import time

from llmwd.messages import JobClaim
from tests.tree.conftest import Start
from tests.tree.supervised import Supervised
from tests.waiting import wait_until

DEAF = {"FAKE_IGNORE_TERM": 1, "FAKE_ENGINE": 1, "FAKE_FORK_GRANDCHILD": 1}


def servers(tree: Supervised) -> list[int]:
    return [pid for pid, cmd in tree.left() if b"server.py" in cmd]


def job(tree: Supervised, id: str) -> JobClaim | None:
    return next((claim for claim in tree.look().facts.gpus.claims if claim.id == id), None)


def test_an_overlap_revokes_at_once_and_is_answered_only_when_the_tree_is_gone(supervised: Start) -> None:
    tree = supervised(DEAF, LEASE_TTL=60, YIELD_GRACE=0.5)
    tree.serving()
    done = tree.ctl("release", "--job", "7", "--gpus", "0-6", "--within", "20")
    assert servers(tree) == []
    assert (done.returncode, done.stdout) == (0, "no process of ours is on GPUs 0-6\n")
    revoked = tree.journal("lease_revoked")[-1]
    assert (revoked["reason"], revoked["job"]) == ("yielded_to_job", "7")
    assert revoked["revoked_s"] - revoked["seen_s"] < 1
    answered = wait_until(lambda: tree.journal("prolog_answered"), what="its line, written after the answer")[-1]
    assert answered["proved"] and answered["took_s"] >= 0.5  # the grace of a server that ignores SIGTERM
    assert tree.phase("waiting")["lease"] is None
    assert job(tree, "7").sources == ("prolog",) and job(tree, "7").gpus == tuple(range(7))
    assert "prolog" in {source["name"] for source in tree.status()["sources"] if source["works"]}
    seen = tree.journal("job_seen")[-1]
    assert (seen["job"], seen["first"], seen["seen_s"], seen["lags"]) == ("7", "prolog", revoked["seen_s"], {})

    # What it announced survives the resolver, and ends with the job once another source has seen that.
    before = tree.worker("resolver")["pid"]
    tree.signal("resolver", signal.SIGKILL)
    tree.until(lambda status: tree.worker("resolver")["pid"] not in (None, before) and job(tree, "7"))
    tree.job(7, "0-6")
    tree.until(lambda status: set(job(tree, "7").sources) == {"prolog", "sim"})
    assert tree.status()["phase"] == "waiting"
    tree.job_over(7)
    tree.serving_on(6, 7)


def test_the_journal_says_by_how_much_the_prolog_was_ahead_of_the_others(supervised: Start) -> None:
    tree = supervised(RECONCILE=1)
    tree.serving()
    assert tree.ctl("release", "--job", "7", "--gpus", "7", "--within", "20").returncode == 0
    tree.job(7, "7")
    seen = wait_until(lambda: [line for line in tree.journal("job_seen") if line["lags"]], 30, what="the line with both")[-1]
    assert (seen["job"], seen["first"], set(seen["lags"])) == ("7", "prolog", {"sim"}) and seen["lags"]["sim"] > 0
    assert "job 7 was seen first by prolog, sim +" in tree.ctl("history").stdout
    told = json.loads(tree.ctl("report", "--json").stdout)["yields"][-1]
    assert (told["job"], told["first"], told["lags"], told["overlap_s"]) == ("7", "prolog", seen["lags"], 0)


def test_a_release_that_is_not_proved_in_time_is_said_to_be_so(supervised: Start) -> None:
    tree = supervised(DEAF, LEASE_TTL=60, YIELD_GRACE=4)
    tree.serving()
    done = tree.ctl("release", "--job", "7", "--gpus", "0-7", "--within", "0.5", "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 4 and not told["released"] and told["took_s"] >= 0.5
    assert "GPUs 0-7" in told["detail"] and "0.5 s" in told["detail"]
    assert wait_until(lambda: tree.journal("prolog_answered"), what="its line, written after the answer")[-1]["proved"] is False
    again = tree.ctl("release", "--job", "7", "--gpus", "0-7", "--within", "20")
    assert again.returncode == 0 and servers(tree) == []


def test_a_job_on_other_gpus_is_answered_at_once_and_serving_goes_on(supervised: Start) -> None:
    tree = supervised()
    pid = tree.serving()["server"]["pid"]
    for gpus in ("0-5", "none"):
        told = json.loads(tree.ctl("release", "--job", "8", "--gpus", gpus, "--within", "20", "--json").stdout)
        assert told["released"] and told["took_s"] < 5
    assert tree.status()["server"]["pid"] == pid and tree.status()["phase"] == "serving"
    assert tree.journal("lease_revoked") == [] and tree.journal("prolog_answered") == []


def test_while_a_start_is_under_way_it_is_answered_only_when_that_has_ended(supervised: Start) -> None:
    """The moment in which a lease is granted and the manager has not said yet what it holds."""
    tree = supervised({"FAKE_READY_AFTER": 600, "FAKE_SWALLOW_TERM_WHILE_LOADING": 1}, LEASE_TTL=60, RESUME_AFTER=0)
    wait_until(lambda: tree.status()["lease"], 30, every_s=0.001)
    done = tree.ctl("release", "--job", "7", "--gpus", "0-7", "--within", "20")
    assert done.returncode == 0 and servers(tree) == []


def test_a_resolver_that_hangs_costs_no_more_than_the_time_that_was_given(supervised: Start) -> None:
    tree = supervised(LEASE_TTL=60)  # so that the root does not restart it meanwhile
    tree.serving()
    tree.signal("resolver", signal.SIGSTOP)
    began_s = time.monotonic()
    done = tree.ctl("release", "--job", "7", "--gpus", "6", "--within", "1")
    assert done.returncode == 4 and 1 <= time.monotonic() - began_s < 20
    assert "did not answer" in done.stderr
    tree.signal("resolver", signal.SIGCONT)
    assert tree.ctl("release", "--job", "7", "--gpus", "6", "--within", "20").returncode == 0


def test_without_a_supervisor_it_says_so(supervised: Start) -> None:
    tree = supervised(start=False)
    done = tree.ctl("release", "--job", "7", "--gpus", "6")
    assert done.returncode == 3 and "no supervisor" in done.stderr
