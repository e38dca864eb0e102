"""The notifier as a real process, with a local ntfy server; long because each promise about a notice is one short test."""

import base64
import contextlib
import json
import os
import socket
import sqlite3
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from llmwd.adapters import rundir
from llmwd.adapters.journal import read_journal
from llmwd.adapters.ntfy import Result
from llmwd.adapters.outbox import Outbox
from llmwd.core import outbox, untold
from llmwd.core.notices import Notice
from llmwd.core.outbox import Book
from llmwd.messages import (
    Done,
    Envelope,
    GpusFact,
    NotifyOrder,
    Refused,
    ResetOrder,
    Revocation,
    RootFact,
    TunnelFact,
    WorkerState,
)
from llmwd.vocab import Event, NodePhase, Phase, Reason
from llmwd.workers import sending
from tests.fakes.ntfy import NtfyServer
from tests.workers.harness import Stage, server_fact

TOPIC = "secret-topic-of-node7"
ENOUGH_S = 20.0  # for a stop that is over as soon as all is told


class Notifier(Stage):
    """A notifier that is told to use `server`, under the topic above."""

    def __init__(self, folder: Path, server: NtfyServer, **settings: object):
        self.base = {"NTFY_TOPIC": TOPIC, "NTFY_SERVER": server.url, "LEASE_TTL": 4} | settings
        self.server = server
        super().__init__(folder, "notifier", **self.base)

    def be(self, phase: NodePhase, **fields: object) -> None:
        self.publish("vllm", server_fact(phase, **fields))

    def until_told(self, *titles: str) -> None:
        """These titles, one after the other, and nothing else."""
        self.until(lambda: len(self.server.titles) >= len(titles), what=f"{titles}; told: {self.server.titles}")
        assert self.server.titles == list(titles), self.log()


def kept_titles(stage: Stage) -> list[str]:
    """Of the notices that wait on disk."""
    return [json.loads(body)["title"] for (body,) in kept(stage, "name != 'state'")]


def kept(stage: Stage, which: str) -> list[tuple[bytes]]:
    """Bodies. It never makes the file: a notifier that has just begun may not have done so, nor the table in it."""
    path = stage.dirs.state / "outbox.sqlite3"
    if not path.exists():
        return []
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=30)) as there:
        made = there.execute("SELECT count(*) FROM sqlite_master WHERE name = 'kept'").fetchone()[0]
        return there.execute(f"SELECT body FROM kept WHERE {which}").fetchall() if made else []


def journal(stage: Stage) -> list[str]:
    return [json.loads(line)["event"] for line in read_journal(stage.dirs.state)]


@pytest.fixture
def server():
    with NtfyServer() as running:
        yield running


@pytest.fixture
def stage(tmp_path, server):
    with Notifier(tmp_path, server) as made:
        yield made


def revoked(job: str = "42") -> GpusFact:
    revocation = Revocation(epoch=7, reason=Reason.yielded_to_job, detail="", revoked_s=1.0, job=job, seen_s=1.0)
    return GpusFact(
        gpus=(), lease=None, revocation=revocation, claims=(), sources=(), hold=None, blocked=None, detail="",
        node_states=(), epoch=7, at_s=1.0,
    )  # fmt: skip


def quiet() -> GpusFact:
    return msgspec.structs.replace(revoked(), revocation=None)


def tunnel_up() -> TunnelFact:
    return TunnelFact(phase=Phase.ready, detail="", hostname="llm.example.org", since_at=0.0, at_s=0.0)


def test_a_notifier_that_is_not_configured_is_off_answers_the_line_and_carries_no_http_library(tmp_path, server):
    with Notifier(tmp_path, server, NTFY_TOPIC="") as stage:
        stage.start()
        stage.be(NodePhase.serving)
        stage.until_fact(phase=Phase.stopped, detail="off: NTFY_TOPIC is not set")
        stage.until(lambda: stage.worker.beats >= 3)
        assert stage.stop(5.0) == 0
        assert not {"requests", "urllib3"} & stage.modules()
        assert server.tries == []


def test_the_story_of_a_day_is_told_in_order(stage):
    stage.publish("resolver", quiet())
    stage.start()
    stage.until_fact(phase=Phase.ready, sent=0)
    stage.be(NodePhase.serving)
    stage.until_told("Serving tiny on node7")
    stage.publish("tunnel", tunnel_up())
    stage.until_told("Serving tiny on node7", "Tunnel up: https://llm.example.org")
    stage.publish("resolver", revoked())
    stage.be(NodePhase.yielding)
    stage.be(NodePhase.waiting)
    stage.until(lambda: len(stage.server.titles) == 3)
    stage.be(NodePhase.loading)
    stage.be(NodePhase.serving, ready_at=2000.0)
    stage.until(lambda: len(stage.server.titles) == 4)
    stage.until_fact(sent=4, waiting=0, failed=0)
    assert stage.stop(ENOUGH_S) == 0
    stage.until_told(
        "Serving tiny on node7", "Tunnel up: https://llm.example.org", "Yielded to Slurm job 42 on node7",
        "Resumed: tiny on node7", "Stopped: llmwd on node7",
    )  # fmt: skip
    assert {message["topic"] for message in stage.server.messages} == {TOPIC}
    assert stage.server.messages[0]["priority"] == 3


def test_a_release_that_takes_long_is_told_before_it_is_over(stage):
    stage.publish("resolver", quiet())
    stage.start()
    stage.be(NodePhase.serving)
    stage.until_told("Serving tiny on node7")
    stage.publish("resolver", revoked())
    stage.be(NodePhase.yielding)
    stage.until_told("Serving tiny on node7", "Yielding to Slurm job 42 on node7")


def test_a_restarted_notifier_tells_nothing_twice_and_the_next_news(stage):
    stage.start()
    stage.be(NodePhase.serving)
    stage.until_told("Serving tiny on node7")
    stage.until_fact(sent=1)
    stage.worker.kill()
    stage.start()
    stage.be(NodePhase.serving)
    stage.until(lambda: stage.worker.beats >= 3)
    stage.be(NodePhase.failed, reason=Reason.server_failed)
    stage.until_told("Serving tiny on node7", "Failed on node7")
    assert stage.server.messages[1]["priority"] == 4


def test_the_outbox_is_private_and_has_no_write_ahead_log(stage):
    stage.start()
    stage.be(NodePhase.serving)
    stage.until_fact(sent=1, waiting=0, kept="")
    path = stage.dirs.state / "outbox.sqlite3"
    assert path.stat().st_mode & 0o077 == 0
    with sqlite3.connect(path) as there:
        assert there.execute("PRAGMA journal_mode").fetchone()[0] != "wal"
        (state,) = there.execute("SELECT body FROM kept WHERE name = 'state'").fetchone()
    assert json.loads(state)["told"]["profile"] == "tiny"


def test_a_server_that_is_busy_is_tried_again_later_and_left_alone_meanwhile(stage):
    stage.server.plan[:] = ["500"]
    stage.start()
    stage.be(NodePhase.serving)
    fact = stage.until_fact(phase=Phase.backoff, waiting=1)
    assert "answers 500" in fact.detail
    stage.be(NodePhase.failed, reason=Reason.server_failed)
    stage.until_told("Serving tiny on node7", "Failed on node7")
    first, second, _ = stage.server.tries
    assert second[0] - first[0] >= 1.9
    stage.until_fact(phase=Phase.ready, detail="", sent=2, waiting=0)


def test_what_goes_wrong_with_us_is_tried_again_and_drops_nothing(tmp_path, server, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/ca.pem")
    with Notifier(tmp_path, server, NTFY_SERVER=server.url.replace("http:", "https:")) as stage:
        stage.start()
        stage.be(NodePhase.failed, reason=Reason.server_failed)
        fact = stage.until_fact(phase=Phase.backoff)
        assert (fact.waiting, fact.failed) == (1, 0)
        stage.until(lambda: kept_titles(stage) == ["Failed on node7"])


def test_an_exception_that_nobody_expects_drops_nothing():
    """beside() gives None for it."""
    shell, outcomes = SimpleNamespace(beside=lambda work, then: then(None)), []
    book = outbox.put(Book(), Notice(None, "", "t", "m", "boom", Event.failed), ("ntfy",), 0.0)
    sending.Lane(shell, "ntfy", lambda entry: 1 / 0).begin(book, 0.0, lambda entry, outcome: outcomes.append(outcome.result))
    assert outcomes == [Result.again]


def test_an_answer_that_is_lost_leads_to_another_try_that_replaces_the_first(stage):
    stage.server.plan[:] = ["cut"]
    stage.start()
    stage.be(NodePhase.serving)
    stage.until_fact(sent=1, waiting=0)
    assert len(stage.server.tries) == len(stage.server.cache) == 2
    stage.until_told("Serving tiny on node7")


def test_what_happens_while_the_server_is_down_is_told_in_order_and_once_even_by_a_killed_notifiers_next_incarnation(stage):
    stage.start()
    stage.be(NodePhase.serving)
    stage.until_told("Serving tiny on node7")
    stage.until_fact(sent=1, waiting=0)  # the fact is later than what it tells
    stage.server.down()
    stage.publish("tunnel", tunnel_up())
    stage.until_fact(waiting=1)
    stage.be(NodePhase.failed, reason=Reason.server_failed)
    stage.until_fact(waiting=2, kept="")
    stage.until(lambda: len(kept_titles(stage)) == 2, what="both on disk")
    stage.worker.kill()
    stage.start()
    stage.until_fact(waiting=2, phase=Phase.backoff)
    stage.be(NodePhase.failed, reason=Reason.server_failed)
    stage.be(NodePhase.serving, ready_at=2000.0)
    stage.until_fact(waiting=3)
    stage.server.up()
    stage.until_told(
        "Serving tiny on node7", "Tunnel up: https://llm.example.org", "Failed on node7", "Resumed: tiny on node7"
    )
    stage.until_fact(waiting=0, phase=Phase.ready)
    assert len({message["sequence_id"] for message in stage.server.cache}) == 4


def test_a_notifier_that_is_killed_after_the_server_has_accepted_repeats_it_without_doubling_it(stage):
    stage.server.plan[:] = ["late"]
    stage.start()
    stage.be(NodePhase.serving)
    stage.until(lambda: stage.server.messages, what="accepted, and not answered")
    stage.worker.kill()
    stage.start()
    stage.until_fact(sent=1, waiting=0)
    assert len(stage.server.cache) == 2
    stage.until_told("Serving tiny on node7")


def test_a_stop_without_network_leaves_its_notices_to_the_next_start(stage):
    stage.server.down()
    stage.start()
    stage.be(NodePhase.serving)
    stage.until_fact(waiting=1)
    assert stage.stop(4.0) == 0
    stage.server.up()
    stage.start()
    # A third may follow: to this start the manager of the stage, which has not stopped, serves.
    stage.until(lambda: stage.server.titles[:2] == ["Serving tiny on node7", "Stopped: llmwd on node7"])


def test_a_damaged_outbox_is_set_aside_and_said(stage):
    (stage.dirs.state / "outbox.sqlite3").write_bytes(b"no database at all, but long enough to look at" * 40)
    stage.start()
    stage.be(NodePhase.serving)
    stage.until_told("Serving tiny on node7")
    assert "was damaged" in stage.log() and (stage.dirs.state / "outbox.damaged").exists()


def test_without_a_place_on_disk_notices_are_told_from_memory_and_that_is_said_once(stage):
    (stage.dirs.state / "outbox.sqlite3").mkdir()  # as root, whom no mode stops, a folder in its place is as good as a full disk
    stage.start()
    stage.be(NodePhase.serving)
    stage.until_told("Serving tiny on node7")
    stage.be(NodePhase.failed, reason=Reason.server_failed)
    stage.until_told("Serving tiny on node7", "Failed on node7")
    fact = stage.until_fact(sent=2, waiting=0)
    assert "outbox.sqlite3" in fact.kept and stage.log().count("in memory only") == 1


def test_a_server_that_refuses_us_is_left_alone_until_it_is_asked_for_again(stage):
    stage.server.plan[:] = ["403"]
    stage.start()
    stage.be(NodePhase.serving)
    fact = stage.until_fact(phase=Phase.failed, failed=1, waiting=1)
    assert "answers 403" in fact.detail and "NTFY_TOPIC" in fact.detail
    stage.be(NodePhase.failed, reason=Reason.server_failed)
    stage.until_fact(waiting=2)
    beats = stage.worker.beats
    stage.until(lambda: stage.worker.beats > beats + 2)
    assert len(stage.server.tries) == 1
    stage.server.plan[:] = ["401"]
    assert isinstance(stage.order(ResetOrder(by="ann")), Done)
    stage.until_fact(phase=Phase.failed, failed=2, waiting=2)
    assert isinstance(stage.order(NotifyOrder(message="m", by="ann")), Refused)
    stage.reload(**stage.base)
    stage.until_told("Serving tiny on node7", "Failed on node7", "Test from llmwd on node7")
    stage.until_fact(phase=Phase.ready, waiting=0)
    assert isinstance(stage.order(NotifyOrder(message="m", by="ann")), Done)
    assert [name for name in journal(stage) if name == "notice_failed"] == ["notice_failed"] * 2


def test_a_token_and_a_password_come_from_files_and_a_new_one_is_taken_at_once(tmp_path, server):
    secret, password = tmp_path / "token", tmp_path / "password"
    secret.write_text("tk_wrong_and_long_enough\n")
    secret.chmod(0o600)
    basic = "Basic " + base64.b64encode(b"ann:pass-word-1").decode()
    server.users = {"Bearer tk_right_and_long_enough": {TOPIC}, basic: {TOPIC}}
    with Notifier(tmp_path, server, NTFY_TOKEN_FILE=secret) as stage:
        stage.start()
        stage.be(NodePhase.serving)
        assert "answers 401" in stage.until_fact(phase=Phase.failed).detail
        secret.write_text("tk_right_and_long_enough\n")
        stage.order(ResetOrder(by="ann"))
        stage.until_told("Serving tiny on node7")
        password.write_text("pass-word-1\n")
        stage.reload(**stage.base | {"NTFY_TOPIC": ""})
        stage.until_fact(phase=Phase.stopped)
        stage.reload(**stage.base | {"NTFY_TOKEN_FILE": "", "NTFY_USER": "ann", "NTFY_PASSWORD_FILE": password})
        stage.until_fact(phase=Phase.ready)  # read: before that the notice would go out with the token, which is good
        stage.be(NodePhase.failed, reason=Reason.server_failed)
        assert f"chmod 600 {password}" in stage.until_fact(phase=Phase.failed).detail
        password.chmod(0o600)
        stage.order(ResetOrder(by="ann"))
        stage.until_told("Serving tiny on node7", "Failed on node7")
        stage.stop(5.0)
        written = [path for folder in (stage.dirs.state, stage.dirs.runtime) for path in folder.rglob("*") if path.is_file()]
        for each in (b"tk_right_and", b"tk_wrong_and", b"pass-word-1", basic.encode()):
            assert not [path for path in written if each in path.read_bytes()]


def test_tags_and_the_way_to_the_status_page_are_sent_and_events_can_be_left_out(tmp_path, server):
    more = {"NTFY_TAGS": "gpu,lab", "TUNNEL_HOSTNAME": "llm.example.org", "TUNNEL_MODE": "none", "NTFY_EVENTS": "serving,stopped"}
    with Notifier(tmp_path, server, **more) as stage:
        stage.start()
        stage.be(NodePhase.serving)
        stage.until_told("Serving tiny on node7")
        assert server.messages[0]["tags"] == ["white_check_mark", "gpu", "lab"]
        assert server.messages[0]["click"] == "https://llm.example.org/"
        stage.be(NodePhase.failed, reason=Reason.server_failed)
        stage.be(NodePhase.serving, ready_at=2000.0)
        assert stage.stop(ENOUGH_S) == 0
        stage.until_told("Serving tiny on node7", "Stopped: llmwd on node7")


def test_a_failure_is_told_with_the_end_of_the_servers_log_without_secrets(stage):
    stage.dirs.logs.mkdir(exist_ok=True)
    (stage.dirs.logs / "server.log").write_text("begin\n" * 1000 + "api_key='sk-abcdefghijklmnop'\nCUDA out of memory\n")
    stage.start()
    stage.be(NodePhase.failed, reason=Reason.server_failed)
    stage.until_told("Failed on node7")
    assert stage.server.messages[0]["message"].endswith("CUDA out of memory")
    assert "sk-abc" not in stage.server.messages[0]["message"]


def test_a_secret_that_the_cut_would_go_through_is_taken_out_of_a_log_before(stage):
    stage.dirs.logs.mkdir(exist_ok=True)
    (stage.dirs.logs / "server.log").write_text(f"token tk_{'S' * 60} {'y' * 1465}\n")
    stage.start()
    stage.be(NodePhase.failed, reason=Reason.server_failed)
    stage.until_told("Failed on node7")
    assert stage.server.messages[0]["message"].endswith("yyy") and "SSS" not in stage.server.messages[0]["message"]


def test_a_log_that_cannot_be_read_holds_up_no_notice(stage):
    stage.dirs.logs.mkdir(exist_ok=True)
    os.mkfifo(stage.dirs.logs / "server.log")  # as on a file system that hangs
    stage.start()
    stage.be(NodePhase.failed, reason=Reason.server_failed)
    stage.until_told("Failed on node7")
    stage.publish("tunnel", tunnel_up())
    stage.until_told("Failed on node7", "Tunnel up: https://llm.example.org")
    assert stage.stop(5.0) == 0


def test_a_worker_in_quarantine_is_told_with_the_end_of_its_log(stage):
    stage.dirs.logs.mkdir(exist_ok=True)
    (stage.dirs.logs / "vllm.log").write_text("Traceback\nMemoryError: no more of it\n")
    broken = WorkerState(name="vllm", pid=None, phase=Phase.failed, restarts=5, since_at=0.0, detail="killed by signal 9")
    fact = RootFact(pid=1, start=1, stopping=False, workers=(broken,), started_at=0.0, node="node7", home="/", version="", at_s=1.0)
    rundir.retain_fact(stage.dirs.runtime, "root", msgspec.msgpack.encode(Envelope(sender="root", pid=1, epoch=1, seq=1, fact=fact)))
    stage.start()
    stage.until_told("In quarantine on node7: vllm")
    message = stage.server.messages[0]["message"]
    assert "killed by signal 9" in message and message.endswith("Traceback\nMemoryError: no more of it")


def test_the_server_tells_the_death_of_a_node_and_nothing_after_an_orderly_end(tmp_path, server):
    with Notifier(tmp_path, server, NTFY_DEADMAN=30) as stage:
        stage.start()
        stage.be(NodePhase.serving)
        fact = stage.until_fact(deadman_at=lambda at: at)
        assert 1700 < fact.deadman_at - time.time() <= 1801 and len(server.scheduled) == 1
        stage.worker.kill()
        stage.start()
        stage.until(lambda: len(server.tries) >= 3, what="renewed by the next incarnation")
        stage.until_fact(deadman_at=lambda at: at)
        assert len(server.scheduled) == 1
        stage.worker.kill()
        server.pass_time(1900)
        stage.until_told("Serving tiny on node7", "No sign of life from llmwd on node7")
        assert server.messages[1]["priority"] == 4
        stage.start()
        stage.until_fact(deadman_at=lambda at: at)
        assert stage.stop(ENOUGH_S) == 0
        assert server.scheduled == []


def with_deadman(stage: Notifier, waiting: int = 0) -> None:
    """Started, and the server holds a dead man's notice that is known on disk."""
    stage.start()
    stage.be(NodePhase.serving)
    stage.until_fact(deadman_at=lambda at: at, waiting=waiting)
    assert len(stage.server.scheduled) == 1


def kept_state(stage: Stage) -> outbox.State:
    rows = kept(stage, "name = 'state'")
    return msgspec.json.decode(rows[0][0], type=outbox.State) if rows else outbox.State()


@pytest.mark.parametrize("trouble", ["another service is down", "429", "one DELETE fails"])
def test_no_death_is_told_after_an_orderly_end_whatever_else_does_not_work(tmp_path, server, trouble):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        urls = f"json://127.0.0.1:{taken.getsockname()[1]}/hook" if trouble == "another service is down" else ""
        with Notifier(tmp_path, server, NTFY_DEADMAN=30, NOTIFY_URLS=urls) as stage:
            with_deadman(stage, 1 if urls else 0)
            if trouble == "429":
                server.plan[:] = ["429"] * 9
            elif trouble == "one DELETE fails":
                server.delete_plan[:] = ["503"]
            assert stage.stop(5.0) == 0
            assert server.scheduled == [] and kept_state(stage).back == ()


def test_what_an_orderly_end_could_not_take_back_is_taken_back_by_the_next_start(tmp_path, server):
    with Notifier(tmp_path, server, NTFY_DEADMAN=30) as stage:
        with_deadman(stage)
        server.delete_plan[:] = ["503"] * 99
        assert stage.stop(5.0) == 0
        (left,) = kept_state(stage).back
        assert [kept["sequence_id"] for _, kept in server.scheduled] == [left.sid] and len(server.deletes) > 1
        server.delete_plan.clear()
        stage.start()
        stage.until(lambda: left.sid not in [kept["sequence_id"] for _, kept in server.scheduled])
        stage.until(lambda: kept_state(stage).back == ())


def test_a_death_that_was_told_is_taken_from_the_screen_when_we_are_heard_again(tmp_path, server):
    with Notifier(tmp_path, server, NTFY_DEADMAN=1) as stage:
        with_deadman(stage)
        (dead,) = [kept["sequence_id"] for _, kept in server.scheduled]
        stage.until(lambda: kept_state(stage).deadman.fires_at)
        stage.worker.kill()
        server.pass_time(90)
        stage.until_told("Serving tiny on node7", "No sign of life from llmwd on node7")
        state = kept_state(stage)
        past = msgspec.structs.replace(state, deadman=msgspec.structs.replace(state.deadman, fires_at=time.time() - 10))
        with sqlite3.connect(stage.dirs.state / "outbox.sqlite3") as there:
            there.execute("UPDATE kept SET body = ? WHERE name = 'state'", (msgspec.json.encode(past),))
        stage.start()
        stage.until(lambda: server.titles == ["Serving tiny on node7", "Heard again: llmwd on node7"])
        assert ("ok", dead) in server.deletes


def test_another_server_gets_a_dead_mans_notice_only_once_it_has_shown_that_it_can(tmp_path, server):
    with NtfyServer() as old:
        old.old = True
        with Notifier(tmp_path, server, NTFY_DEADMAN=30) as stage:
            with_deadman(stage)
            stage.reload(**stage.base | {"NTFY_SERVER": old.url})
            stage.until(lambda: server.scheduled == [], what="taken back at the former server")
            stage.be(NodePhase.failed, reason=Reason.server_failed)
            assert "2.16" in stage.until_fact(deadman=lambda why: why, sent=2, waiting=0).deadman  # 2: the old one has answered
            stage.reload(**stage.base | {"NTFY_SERVER": old.url, "NTFY_DEADMAN": 0})
            stage.until_fact(deadman="")  # so that the words below are those of the next reload
            stage.reload(**stage.base)
            stage.until_fact(deadman="waits for the first notice, to see that the server can (from ntfy 2.16 on)")
            stage.be(NodePhase.serving, ready_at=2000.0)
            stage.until(lambda: server.scheduled)
            # Changed while nobody ran: its id stays, for the case that the server comes back.
            stage.until(lambda: kept_state(stage).deadman.fires_at)
            stage.worker.kill()
            stage.boot = msgspec.structs.replace(
                stage.boot, settings=msgspec.structs.replace(stage.boot.settings, ntfy_server=old.url)
            )
            stage.start()
            stage.until(lambda: len(kept_state(stage).back) == 1)
            assert old.scheduled == [] and kept_state(stage).replaces is False


def test_an_outbox_that_cannot_be_read_for_a_while_is_not_forgotten(tmp_path, server):
    with Notifier(tmp_path, server, NTFY_DEADMAN=30, LEASE_TTL=20) as stage:
        with_deadman(stage)
        (dead,) = [kept["sequence_id"] for _, kept in server.scheduled]
        server.down()
        stage.be(NodePhase.failed, reason=Reason.server_failed)
        stage.until(lambda: kept_titles(stage) == ["Failed on node7"])
        stage.worker.kill()
        lock = sqlite3.connect(stage.dirs.state / "outbox.sqlite3", isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")
        stage.be(NodePhase.loading)
        stage.start()
        assert "locked" in stage.until_fact(kept=lambda why: why).kept
        lock.execute("ROLLBACK")
        lock.close()
        server.up()
        stage.until_told("Serving tiny on node7", "Failed on node7")
        stage.until_fact(kept="", waiting=0, deadman_at=lambda at: at)
        assert [kept["sequence_id"] for _, kept in server.scheduled] == [dead]
        assert kept_state(stage).told.server.startswith("failed")


def test_a_server_that_is_too_old_for_a_dead_mans_notice_gets_none(tmp_path, server):
    server.old = True
    with Notifier(tmp_path, server, NTFY_DEADMAN=30) as stage:
        stage.start()
        stage.be(NodePhase.serving)
        assert "2.16" in stage.until_fact(sent=1, waiting=0).deadman
        assert len(server.tries) == 1 and server.scheduled == []
        assert stage.stop(5.0) == 0


def test_another_service_gets_the_notices_through_apprise_and_its_address_is_written_nowhere(tmp_path, server):
    token = "very-secret-webhook-token"
    url = f"json://127.0.0.1:{server.server_port}/{token}?format=text"
    with Notifier(tmp_path, server, NOTIFY_URLS=url) as stage:
        stage.start()
        stage.be(NodePhase.serving)
        stage.until(lambda: server.hooks, 60, what="the hook")
        assert server.hooks[0]["title"] == "Serving tiny on node7"
        stage.until_fact(sent=2, waiting=0)
        stage.stop(10.0)
        written = [path for folder in (stage.dirs.state, stage.dirs.runtime) for path in folder.rglob("*") if path.is_file()]
        assert written and all(token.encode() not in path.read_bytes() for path in written)


@pytest.mark.parametrize(("word", "least_s"), [("429", 4.9), ("42908", 60.0)])
def test_a_server_that_limits_us_is_left_alone_for_longer(stage, word, least_s):
    stage.server.plan[:] = [word]
    stage.start()
    stage.be(NodePhase.serving)
    assert "limit reached" in stage.until_fact(phase=Phase.backoff, waiting=1, failed=0).detail
    if least_s < 10:
        stage.until_told("Serving tiny on node7")
        first, second = stage.server.tries
        assert second[0] - first[0] >= least_s
    else:
        beats = stage.worker.beats
        stage.until(lambda: stage.worker.beats > beats + 8)  # longer than for 42901
        assert len(stage.server.tries) == 1 and kept_titles(stage) == ["Serving tiny on node7"]


def kept_before(stage: Stage, book: Book) -> None:
    """The outbox as an earlier incarnation left it."""
    box = Outbox(stage.dirs.state)
    box.read()
    box.keep({"state": msgspec.json.encode(book.state)} | {one.sid: msgspec.json.encode(one) for one in book.entries})
    box.close()


def many(number: int, at: float) -> Book:
    book = Book(state=outbox.State(salt="before", dests=("ntfy",)))
    for turn in range(number):
        book = outbox.put(book, Notice(None, "", f"notice {turn}", "m", "boom", Event.switched), ("ntfy",), at)
    return book


def test_what_is_too_old_is_told_in_one_notice(stage):
    kept_before(stage, many(7, time.time() - outbox.EXPIRES_AFTER_S - 1))
    stage.start()
    stage.until_told("7 notices of node7 were never told")
    assert stage.server.messages[0]["message"] == "Not told in time: 7 switched."
    assert stage.until_fact(waiting=0).lost == 7


def test_what_is_too_much_is_told_in_one_notice(stage):
    kept_before(stage, many(untold.MOST_ENTRIES + 5, time.time()))
    stage.server.plan[:] = ["500"] * 99
    stage.start()
    stage.until_fact(waiting=untold.MOST_ENTRIES + 1, lost=5)
    assert "5 notices of node7 were never told" in kept_titles(stage)


def test_flapping_is_told_in_one_notice_that_counts(stage):
    stage.publish("resolver", quiet())
    stage.start()
    for turn in range(5):
        stage.be(NodePhase.serving, ready_at=1000.0 + turn, lease_epoch=7 + turn)
        stage.until(lambda: f"serving:tiny:{1000 + turn}.000" == kept_state(stage).told.server)
        stage.be(NodePhase.yielding, lease_epoch=7 + turn)
        stage.until(lambda: f"yielding:{7 + turn}" == kept_state(stage).told.server)
        stage.be(NodePhase.waiting)
        stage.until(lambda: f"yielded:{7 + turn}" == kept_state(stage).told.server)
    stage.until(lambda: "5 yields in 10 minutes: node7" in kept_titles(stage))
    assert stage.stop(ENOUGH_S) == 0
    told = [title.split()[0] for title in stage.server.titles]
    assert told == ["Serving", "Yielded", "Resumed:", "Yielded", "Resumed:", "5", "Stopped:"]


def test_a_corrected_address_gets_what_waited_for_the_wrong_one(tmp_path, server):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        with Notifier(tmp_path, server, NTFY_TOPIC="", NOTIFY_URLS=f"json://127.0.0.1:{taken.getsockname()[1]}/wrong") as stage:
            stage.start()
            stage.be(NodePhase.failed, reason=Reason.server_failed)
            stage.until_fact(phase=Phase.backoff, waiting=1)
            stage.reload(**stage.base | {"NTFY_TOPIC": "", "NOTIFY_URLS": ""})
            stage.until_fact(phase=Phase.stopped, waiting=1)
            stage.reload(**stage.base | {"NTFY_TOPIC": "", "NOTIFY_URLS": f"json://127.0.0.1:{server.server_port}/right"})
            stage.until_fact(waiting=0, sent=1)
            assert [hook["title"] for hook in server.hooks] == ["Failed on node7"]


def test_a_notice_that_is_not_accepted_does_not_hold_up_the_others(stage):
    stage.server.plan[:] = ["400"]
    stage.start()
    stage.be(NodePhase.serving)
    stage.until_fact(phase=Phase.ready, failed=1, waiting=0)
    stage.be(NodePhase.failed, reason=Reason.server_failed)
    stage.until_told("Failed on node7")


def test_a_server_that_hangs_slows_neither_the_heartbeat_nor_the_end(stage):
    stage.server.plan[:] = ["hang", "hang"]
    stage.start()
    stage.be(NodePhase.serving)
    stage.until(lambda: len(stage.server.tries) == 1)
    beats = stage.worker.beats
    stage.until(lambda: stage.worker.beats >= beats + 2)
    assert stage.stop(2.0) == 0
    assert "ended before" in stage.log()


def test_the_topic_is_in_no_log_and_in_no_fact(stage):
    stage.server.plan[:] = ["500", "echo-topic"]
    stage.start()
    stage.be(NodePhase.serving)
    stage.until_fact(phase=Phase.failed)
    stage.stop(5.0)
    written = [path for folder in (stage.dirs.state, stage.dirs.runtime) for path in folder.rglob("*") if path.is_file()]
    assert written and all(TOPIC.encode() not in path.read_bytes() for path in written)


def test_switching_notices_on_by_a_reload_tells_what_is_so_now(tmp_path, server):
    with Notifier(tmp_path, server, NTFY_TOPIC="") as stage:
        stage.start()
        stage.be(NodePhase.serving)
        stage.until_fact(phase=Phase.stopped)
        stage.reload(**stage.base | {"NTFY_TOPIC": TOPIC})
        stage.until_told("Serving tiny on node7")
