"""The operator's word: yield, resume, switch, reset, stop, status; what it does, and that it survives restarts."""

import json
import signal
import time

import pytest

from tests.tree.conftest import Start
from tests.tree.supervised import WORKERS, Supervised


def done(tree: Supervised, *words: str) -> str:
    ended = tree.ctl(*words, within_s=60)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_yield_holds_until_resume_through_restarts_of_the_resolver_and_of_llmwd(supervised: Start) -> None:
    tree = supervised()
    tree.all_ready()
    done(tree, "yield", "--wait")
    status = tree.status()
    assert (status["phase"], status["reason"], status["lease"]) == ("held", "held", None)
    assert status["server"]["pid"] is None
    tree.until(lambda status: {gpu["holder"] for gpu in status["gpus"]} == {"free"})

    tree.signal("resolver", signal.SIGKILL)
    tree.until(lambda status: tree.worker("resolver")["restarts"] == 1 and tree.worker("resolver")["phase"] == "ready")
    assert tree.phase("held")["hold"] is not None

    tree.stop()
    tree.start()
    tree.phase("held")
    tree.until(lambda status: {worker["phase"] for worker in status["workers"]} == {"ready"})
    assert tree.status()["phase"] == "held"
    assert len(tree.journal("lease_granted")) == 1

    done(tree, "resume")
    tree.serving()
    assert [entry["event"] for entry in tree.journal("held") + tree.journal("resumed")] == ["held", "resumed"]
    assert all(entry["by"] for entry in tree.journal("held") + tree.journal("resumed"))


def test_a_yield_for_a_time_ends_by_itself_after_a_restart_too(supervised: Start) -> None:
    tree = supervised()
    tree.all_ready()
    done(tree, "yield", "--for", "12s", "--wait")  # long enough for an end and a start within it
    assert tree.status()["hold"]["until"] is not None
    tree.stop()
    tree.start()
    tree.phase("held")
    tree.serving(60)
    assert tree.status()["hold"] is None


def test_an_order_that_cannot_be_read_any_more_counts_as_stay_away(supervised: Start) -> None:
    tree = supervised(start=False)
    tree.state.mkdir(parents=True, mode=0o700)
    (tree.state / "orders.json").write_bytes(b"\x00garbage")
    tree.start()
    tree.phase("held")
    done(tree, "resume")
    tree.serving()


def test_switch_serves_another_profile_on_as_many_gpus_as_it_wants_and_is_kept(supervised: Start) -> None:
    tree = supervised(start=False)
    tree.write_profile("wide", NUM_GPUS=4)
    tree.start()
    before = tree.all_ready()
    done(tree, "switch", "wide", "--wait")
    status = tree.status()
    assert status["phase"] == "serving" and status["model"]["profile"] == "wide"
    assert status["server"]["pid"] != before["server"]["pid"]
    tree.serving_on(4, 5, 6, 7)
    assert tree.answers("wide") and not tree.answers("fake")
    assert (tree.home / "active-model.env").readlink().name == "wide.env"
    tree.stop()
    tree.start()
    assert tree.serving()["model"]["profile"] == "wide"


def test_a_switch_to_a_profile_with_mistakes_or_to_none_is_refused_and_touches_nothing(supervised: Start) -> None:
    tree = supervised(start=False)
    tree.write_profile("bad", NUM_GPUS="lots")
    tree.write_profile("too-wide", NUM_GPUS=9)
    tree.start()
    tree.all_ready()
    before = tree.pids()
    for name, told in (("bad", "models/bad.env:"), ("too-wide", "NUM_GPUS"), ("absent", "no profile absent")):
        refused = tree.ctl("switch", name, "--wait")
        assert refused.returncode == 1 and told in refused.stderr and "Traceback" not in refused.stderr
    assert tree.ctl("switch", "../../etc/passwd").returncode in (1, 2)
    assert tree.pids() == before and tree.answers()
    assert (tree.home / "active-model.env").readlink().name == "fake.env"


def test_a_switch_while_a_job_has_the_gpus_takes_effect_when_it_is_gone(supervised: Start) -> None:
    tree = supervised(start=False)
    tree.write_profile("other")
    tree.start()
    tree.all_ready()
    tree.job(1, "0-7")
    tree.phase("waiting")
    done(tree, "switch", "other")
    tree.job_over(1)
    assert tree.serving()["model"]["profile"] == "other"


def test_a_switch_in_the_middle_of_loading_does_not_wait_for_the_old_model(supervised: Start) -> None:
    tree = supervised({"FAKE_READY_AFTER": 600}, start=False)
    tree.write_profile("quick")
    tree.start()
    tree.phase("loading")
    done(tree, "switch", "quick", "--wait")
    assert tree.answers("quick")


def test_arguments_that_vllm_refuses_fail_at_once_and_a_reset_tries_again(supervised: Start) -> None:
    tree = supervised({"FAKE_EXIT_AFTER": 0.1, "FAKE_EXIT_CODE": 2, "FAKE_READY_AFTER": 60})
    status = tree.phase("failed")
    assert status["reason"] == "server_failed" and "exit code 2" in status["detail"]
    assert status["server"]["deaths"] == 1
    tree.until(lambda status: status["lease"] is None)  # ended by the resolver, once it has heard
    tree.write_profile("fake")
    done(tree, "reset")
    tree.serving()


def test_a_crash_loop_is_spread_by_a_backoff_and_ends_in_failed_until_reset_or_switch(supervised: Start) -> None:
    tree = supervised({"FAKE_EXIT_AFTER": 0.05, "FAKE_EXIT_CODE": 1, "FAKE_READY_AFTER": 60},
                      RESTART_INTENSITY=2, BACKOFF_MIN=1)
    tree.until(lambda status: status["reason"] == "server_backoff")
    status = tree.phase("failed")
    assert status["reason"] == "server_failed" and status["server"]["deaths"] == 3
    at_s = [entry["mono_s"] for entry in tree.journal("server_started")]
    assert len(at_s) == 3 and all(later - earlier >= 0.15 for earlier, later in zip(at_s, at_s[1:]))
    tree.write_profile("good")
    done(tree, "switch", "good", "--wait")
    assert tree.answers("good")


@pytest.mark.parametrize("stopped", [*WORKERS, "root", " ".join(WORKERS) + " root"])
def test_status_answers_quickly_whoever_hangs(supervised: Start, stopped: str) -> None:
    tree = supervised(LEASE_TTL=60)
    tree.all_ready()
    before = tree.pids()
    tree.signal(stopped, signal.SIGSTOP)
    took_s = [float("inf")]
    for _ in range(10):  # the quickest of some, because other tests have the same two cores
        if min(took_s) < 1.0:
            break
        began_s = time.monotonic()
        status = json.loads(done(tree, "status", "--json"))
        took_s.append(time.monotonic() - began_s)
        assert status["server"]["pid"] == before["server"] and status["phase"] == "serving"
    assert min(took_s) < 1.0


def test_status_as_json_keeps_its_contract(supervised: Start) -> None:
    tree = supervised()
    tree.all_ready()
    tree.job(7, "0,2")
    tree.until(lambda status: status["jobs"])
    status = json.loads(done(tree, "status", "--json"))
    wanted = {
        "node": None, "phase": None, "reason": None, "since": None, "model": {"profile", "name", "served_as"},
        "lease": {"epoch", "gpus"}, "server": {"pid", "phase", "url", "ready_since"}, "tunnel": {"phase"}, "root": {"pid"},
    }
    for name, fields in wanted.items():
        assert status[name] is not None and (fields is None or fields <= set(status[name])), name
    assert {"index", "minor", "uuid", "holder", "job"} <= set(status["gpus"][0])
    assert {"id": "7", "gpus": [0, 2]} in status["jobs"]
    assert [status["gpus"][index]["job"] for index in (0, 1, 2)] == ["7", None, "7"]
    assert {worker["name"] for worker in status["workers"]} == set(WORKERS)
    assert all({"name", "pid", "phase", "restarts"} <= set(worker) for worker in status["workers"])
    pid = status["server"]["pid"]
    assert any(found == pid and b"serve" in cmd for found, cmd in tree.left())


def test_without_a_supervisor_orders_say_so_with_their_exit_code(supervised: Start) -> None:
    tree = supervised(start=False)
    for words in (["status"], ["yield"], ["resume"], ["stop"], ["reset"], ["reload"]):
        ended = tree.ctl(*words)
        assert ended.returncode == 3 and "no supervisor" in ended.stderr, words
    assert tree.ctl("nonsense").returncode == 2


def test_an_order_to_a_worker_that_hangs_times_out_with_its_exit_code(supervised: Start) -> None:
    tree = supervised(LEASE_TTL=60)
    tree.all_ready()
    tree.signal("resolver", signal.SIGSTOP)
    assert tree.ctl("yield").returncode == 4


def test_switch_to_a_profile_whose_program_is_missing_is_refused_and_the_model_stays(supervised: Start) -> None:
    tree = supervised()
    before = tree.serving()
    tree.write_profile("nowhere", LLM_BIN="/nonexistent/vllm")
    refused = tree.ctl("switch", "nowhere")
    assert refused.returncode == 1 and "/nonexistent/vllm" in refused.stdout + refused.stderr
    assert tree.status()["server"]["pid"] == before["server"]["pid"]
    assert (tree.home / "active-model.env").readlink().name == "fake.env"
