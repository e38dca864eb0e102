"""yield, resume, switch, reset: what is asked of whom, and what --wait waits for."""

import signal
import time

import pytest

from llmwd.messages import Done, Hold, NotifyOrder, Refused, ResetOrder, ResumeOrder, SwitchOrder, YieldOrder
from llmwd.vocab import NodePhase, Phase, Reason, Worker
from tests.waiting import wait_until


def held(stand):
    return stand.gpus(lease=None, hold=Hold(since_at=time.time()), blocked=Reason.held)


def off(stand, **changes):
    return stand.server(phase=Phase.stopped, node_phase=NodePhase.held, reason=Reason.held, holding=(), **changes)


@pytest.mark.parametrize(
    "words", [("yield",), ("yield", "--wait"), ("resume",), ("reset",), ("stop",), ("reload",), ("simulate", "end", "1")]
)
def test_an_order_without_a_supervisor_exits_3(stand, words):
    done = stand.ctl(*words)
    assert done.returncode == 3 and "start it with ./start.sh" in done.stderr


def test_yield_goes_to_the_resolver_with_its_time_and_who_asked(stand):
    stand.begin()
    stand.obliging_desk(Worker.resolver)
    done = stand.ctl("yield", "--for", "1h30m")
    assert (done.returncode, done.stdout) == (0, "resolver does it\n")
    [order] = stand.orders
    assert isinstance(order, YieldOrder) and order.for_s == 5400 and order.by


@pytest.mark.parametrize(("text", "seconds"), [("2h", 7200), ("30m", 1800), ("90s", 90), ("45", 45), ("1d", 86400)])
def test_durations_are_understood(stand, text, seconds):
    stand.begin()
    stand.obliging_desk(Worker.resolver)
    assert stand.ctl("yield", "--for", text).returncode == 0
    assert stand.orders[0].for_s == seconds


@pytest.mark.parametrize("text", ["", "h", "2 hours", "-5s", "0", "0s", "1m1h", "nan", "999999999999d"])
def test_what_is_no_duration_is_an_error_of_usage(stand, text):
    stand.begin()
    done = stand.ctl("yield", "--for", text)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_resume_goes_to_the_resolver(stand):
    stand.begin()
    stand.obliging_desk(Worker.resolver)
    assert stand.ctl("resume").returncode == 0
    assert isinstance(stand.orders[0], ResumeOrder)


def test_a_refusal_exits_1_with_the_workers_own_words(stand):
    stand.begin()
    stand.desk(Worker.resolver, lambda order: Refused(problems=("the state folder is full", "make room")))
    done = stand.ctl("resume")
    assert done.returncode == 1
    assert "the state folder is full\nmake room" in done.stderr


def test_a_worker_that_does_not_answer_exits_4(stand):
    stand.begin()
    stand.desk(Worker.resolver, lambda order: None)
    done = stand.ctl("resume")
    assert done.returncode == 4 and "did not answer within 5 s" in done.stderr


def test_yield_wait_returns_when_no_process_of_ours_is_on_a_gpu_and_not_before(stand):
    stand.begin()

    def obey(order):
        stand.say(held(stand))
        stand.say(stand.server(node_phase=NodePhase.yielding, reason=Reason.held, phase=Phase.draining))
        return Done(detail="yielding")

    stand.desk(Worker.resolver, obey)
    waiting = stand.start_ctl("yield", "--wait")
    assert waiting.stdout.readline() == "yielding\n"
    assert waiting.stderr.readline().startswith("yielding: ")
    assert waiting.poll() is None
    stand.say(off(stand))
    out, _ = waiting.communicate(timeout=30)
    assert waiting.returncode == 0 and "no process of ours" in out


def test_yield_wait_is_not_fooled_by_a_manager_that_has_not_heard_of_the_hold_yet(stand):
    stand.begin()
    stand.say(stand.server(node_phase=NodePhase.waiting, reason=Reason.resume_delay, holding=(), phase=Phase.stopped))
    stand.desk(Worker.resolver, lambda order: stand.say(held(stand)) or Done(detail="yielding"))
    done = stand.ctl("yield", "--wait", "--timeout", "1")
    assert done.returncode == 4 and "not there after 1 s" in done.stderr


def test_yield_wait_ends_with_1_when_somebody_resumes_meanwhile(stand):
    stand.begin()
    stand.desk(Worker.resolver, lambda order: stand.say(held(stand)) or Done(detail="yielding"))
    waiting = stand.start_ctl("yield", "--wait")
    waiting.stderr.readline()
    stand.say(stand.gpus())
    _, errors = waiting.communicate(timeout=30)
    assert waiting.returncode == 1 and "ended meanwhile" in errors


def test_ctrl_c_while_waiting_exits_130_without_a_traceback(stand):
    stand.begin()
    stand.obliging_desk(Worker.resolver)
    waiting = stand.start_ctl("yield", "--wait")
    waiting.stderr.readline()
    waiting.send_signal(signal.SIGINT)
    _, errors = waiting.communicate(timeout=30)
    assert waiting.returncode == 130 and "Traceback" not in errors


def test_a_supervisor_that_ends_while_somebody_waits_exits_3(stand):
    stand.begin()
    stand.obliging_desk(Worker.resolver)
    waiting = stand.start_ctl("yield", "--wait")
    waiting.stderr.readline()
    stand.root.kill()
    stand.root.wait()
    waiting.communicate(timeout=30)
    assert waiting.returncode == 3


# --- switch -------------------------------------------------------------------------------------------


def link(stand) -> str:
    return (stand.dirs.home / "active-model.env").readlink().name


def test_switch_without_a_supervisor_chooses_for_the_next_start(stand):
    stand.profile("new")
    done = stand.ctl("switch", "new")
    assert done.returncode == 0 and "no supervisor is running" in done.stdout
    assert link(stand) == "new.env"


def test_switch_wait_without_a_supervisor_chooses_and_exits_3(stand):
    stand.profile("new")
    assert stand.ctl("switch", "new", "--wait").returncode == 3
    assert link(stand) == "new.env"


def test_switch_to_an_unknown_profile_exits_1_and_lists_what_there_is(stand):
    stand.profile("a-model")
    done = stand.ctl("switch", "nope")
    assert done.returncode == 1
    assert "there is no profile nope" in done.stderr and "a-model" in done.stderr


def test_switch_to_a_profile_with_mistakes_tells_all_of_them_and_asks_nobody(stand):
    stand.begin()
    stand.obliging_desk(Worker.vllm)
    (stand.dirs.home / "models/bad.env").write_text("NUM_GPUS=many\nVLLM_ARGS='--port 99999999'\n")
    done = stand.ctl("switch", "bad")
    assert done.returncode == 1
    for part in ("models/bad.env:1: NUM_GPUS", "MODEL_NAME", "nothing was changed"):
        assert part in done.stderr, part
    assert stand.orders == []
    assert not (stand.dirs.home / "active-model.env").is_symlink()


def test_switch_asks_the_manager(stand):
    stand.profile("new")
    stand.begin()
    stand.obliging_desk(Worker.vllm)
    assert stand.ctl("switch", "new").returncode == 0
    [order] = stand.orders
    assert isinstance(order, SwitchOrder) and order.profile == "new"


def test_switch_checks_the_profile_in_the_running_supervisors_home(stand, tmp_path):
    stand.profile("new")
    stand.begin()
    stand.obliging_desk(Worker.vllm)
    assert stand.ctl("switch", "new", LLMWD_HOME=str(tmp_path / "elsewhere")).returncode == 0


def test_switch_wait_succeeds_when_the_new_model_serves_and_not_while_the_old_one_does(stand):
    stand.profile("new")
    stand.begin()
    stand.obliging_desk(Worker.vllm)
    waiting = stand.start_ctl("switch", "new", "--wait")
    assert waiting.stdout.readline() == "vllm does it\n"
    waiting.stderr.readline()
    stand.say(stand.server(profile="new", node_phase=NodePhase.loading, reason=Reason.loading, since_at=time.time()))
    assert waiting.stderr.readline().startswith("loading: ")
    assert waiting.poll() is None
    stand.say(stand.server(profile="new", since_at=time.time()))
    out, _ = waiting.communicate(timeout=30)
    assert waiting.returncode == 0 and "new is being served" in out


@pytest.mark.parametrize(
    ("phase", "reason"), [(NodePhase.failed, Reason.server_failed), (NodePhase.waiting, Reason.no_gpus), (NodePhase.held, Reason.held)]
)
def test_switch_wait_exits_1_with_the_reason_when_waiting_cannot_help(stand, phase, reason):
    stand.profile("new")
    stand.begin()

    def obey(order):
        stand.say(stand.gpus(lease=None, hold=Hold(since_at=0.0, by="ann") if phase is NodePhase.held else None))
        stand.say(stand.server(profile="new", node_phase=phase, reason=reason, detail="so it is", since_at=time.time()))
        return Done(detail="switching")

    stand.desk(Worker.vllm, obey)
    done = stand.ctl("switch", "new", "--wait")
    assert done.returncode == 1 and "so it is" in done.stderr and reason in done.stderr


def test_switch_wait_to_the_profile_that_failed_does_not_take_the_old_failure_for_the_new_one(stand):
    stand.profile("new")
    stand.begin()
    stand.say(stand.server(profile="new", node_phase=NodePhase.failed, reason=Reason.server_failed))
    stand.obliging_desk(Worker.vllm)
    waiting = stand.start_ctl("switch", "new", "--wait")
    waiting.stderr.readline()
    stand.say(stand.server(profile="new", since_at=time.time()))
    waiting.communicate(timeout=30)
    assert waiting.returncode == 0


def test_switch_wait_gives_up_after_its_timeout(stand):
    stand.profile("new")
    stand.begin()
    stand.obliging_desk(Worker.vllm)
    assert stand.ctl("switch", "new", "--wait", "--timeout", "1s").returncode == 4


# --- reset, stop, reload ------------------------------------------------------------------------------


def test_reset_goes_to_manager_tunnel_and_root(stand):
    stand.begin()
    stand.obliging_desk(Worker.vllm)
    stand.obliging_desk(Worker.door)
    stand.obliging_desk(Worker.tunnel)
    stand.obliging_desk(Worker.notifier)
    assert stand.ctl("reset").returncode == 0
    assert [type(order) for order in stand.orders] == [ResetOrder] * 4
    wait_until(lambda: stand.signals == ["SIGUSR1"])


def test_reset_does_not_ask_a_worker_in_quarantine_which_has_no_process_to_answer(stand):
    stand.begin()
    stand.say(stand.root_fact("vllm", "notifier"))
    stand.obliging_desk(Worker.door)
    stand.obliging_desk(Worker.tunnel)
    done = stand.ctl("reset")
    assert done.returncode == 0
    assert "vllm: started again" in done.stdout and "notifier: started again" in done.stdout
    assert len(stand.orders) == 2


def test_notify_asks_the_notifier_and_tells_what_it_says(stand):
    stand.begin()
    stand.obliging_desk(Worker.notifier)
    done = stand.ctl("notify", "--message", "maintenance")
    assert done.returncode == 0
    assert [(type(order), order.message) for order in stand.orders] == [(NotifyOrder, "maintenance")]


def test_stop_ends_the_root_and_returns_when_it_is_gone(stand):
    stand.begin()
    assert stand.ctl("stop").returncode == 0
    assert stand.root.wait(timeout=30) == 0
    assert stand.signals == ["SIGTERM"]
    assert stand.ctl("stop").returncode == 3


def test_stop_exits_4_when_the_root_takes_longer(stand):
    stand.begin("--deaf")
    done = stand.ctl("stop", "--timeout", "1s")
    assert done.returncode == 4 and str(stand.root.pid) in done.stderr


def test_reload_tells_the_root(stand):
    stand.profile("new")
    (stand.dirs.home / "active-model.env").symlink_to("models/new.env")
    stand.begin()
    assert stand.ctl("reload").returncode == 0
    wait_until(lambda: stand.signals == ["SIGHUP"])


def test_reload_refuses_settings_with_mistakes_and_leaves_the_root_alone(stand):
    stand.begin()
    (stand.dirs.home / "etc/config.env").write_text("NUM_GPUS=many\n")
    done = stand.ctl("reload")
    assert done.returncode == 1 and "etc/config.env:1: NUM_GPUS" in done.stderr
    assert stand.signals == []


def test_a_choice_that_cannot_be_kept_is_refused(stand):
    stand.profile("glm")
    stand.dirs.home.chmod(0o500)
    try:
        assert f"the choice cannot be kept in {stand.dirs.home}: Permission denied" in stand.refused("switch", "glm")
    finally:
        stand.dirs.home.chmod(0o700)
