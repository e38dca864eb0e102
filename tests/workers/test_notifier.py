"""The notifier as a real process, with a local ntfy server."""

import json
from pathlib import Path

import msgspec
import pytest

from llmwd.messages import GpusFact, Revocation, TunnelFact
from llmwd.vocab import NodePhase, Phase, Reason
from tests.fakes.ntfy import NtfyServer
from tests.workers.harness import Stage, server_fact

TOPIC = "secret-topic-of-node7"


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
    assert stage.stop(5.0) == 0
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


def test_what_was_told_is_kept_private(stage):
    stage.start()
    stage.be(NodePhase.serving)
    stage.until_fact(sent=1)
    path = stage.dirs.state / "notices.json"
    assert json.loads(path.read_text())["profile"] == "tiny" and path.stat().st_mode & 0o077 == 0


def test_a_server_that_is_busy_is_tried_again_later_and_left_alone_meanwhile(stage):
    stage.server.plan[:] = ["500"]
    stage.start()
    stage.be(NodePhase.serving)
    fact = stage.until_fact(phase=Phase.backoff, waiting=1)
    assert "answers 500" in fact.detail
    stage.be(NodePhase.failed, reason=Reason.server_failed)
    stage.until_told("Failed on node7")
    first, second = stage.server.tries
    assert second[0] - first[0] >= 1.9
    stage.until_fact(phase=Phase.ready, detail="", sent=1, waiting=0)


def test_an_answer_that_is_lost_leads_to_another_try(stage):
    stage.server.plan[:] = ["cut"]
    stage.start()
    stage.be(NodePhase.serving)
    stage.until_told("Serving tiny on node7", "Serving tiny on node7")


def test_a_server_that_refuses_us_is_left_alone_until_the_settings_are_read_again(stage):
    stage.server.plan[:] = ["403"]
    stage.start()
    stage.be(NodePhase.serving)
    fact = stage.until_fact(phase=Phase.failed, failed=1, waiting=1)
    assert "answers 403" in fact.detail and "NTFY_TOPIC" in fact.detail
    stage.be(NodePhase.failed, reason=Reason.server_failed)
    beats = stage.worker.beats
    stage.until(lambda: stage.worker.beats > beats + 2)
    assert len(stage.server.tries) == 1
    stage.reload(**stage.base)
    stage.until_told("Failed on node7")
    stage.until_fact(phase=Phase.ready, waiting=0)


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
