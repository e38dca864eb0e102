"""Publishing to a real HTTP server that answers like ntfy, well and badly."""

import json
import socket

import pytest

from llmwd.adapters import ntfy
from llmwd.adapters.ntfy import Result, publish
from tests.fakes.ntfy import NtfyServer

TOPIC = "secret-topic"
BODY = json.dumps({"topic": TOPIC, "title": "Größe 🚀", "message": "m"}, ensure_ascii=False).encode()


@pytest.fixture
def server():
    with NtfyServer() as running:
        yield running


def test_a_notice_arrives_with_any_character_in_its_title(server):
    assert publish(server.url, TOPIC, BODY).result is Result.sent
    assert server.titles == ["Größe 🚀"]


@pytest.mark.parametrize(
    ("answer", "result", "code"),
    [
        ("429", Result.again, 42901), ("42908", Result.again, 42908), ("500", Result.again, 50001),
        ("503", Result.again, 50301), ("cut", Result.again, None), ("portal", Result.again, None),
        ("401", Result.refused, 40101), ("403", Result.refused, 40301), ("404", Result.refused, 40401),
        ("redirect", Result.refused, None), ("400", Result.bad, 40009), ("413", Result.bad, 41303),
    ],
)  # fmt: skip
def test_each_failure_is_tried_again_given_up_or_a_reason_to_stop(server, answer, result, code):
    server.plan[:] = [answer]
    outcome = publish(server.url, TOPIC, BODY)
    assert outcome.result is result and outcome.code == code and outcome.why
    assert len(server.tries) == 1


def test_a_server_that_does_not_answer_is_left_after_its_time(server, monkeypatch):
    monkeypatch.setattr(ntfy, "ANSWER_WITHIN_S", 0.2)
    server.plan[:] = ["hang"]
    outcome = publish(server.url, TOPIC, BODY)
    assert outcome.result is Result.again and "does not answer" in outcome.why


def test_a_server_that_is_not_there_is_tried_again():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        outcome = publish(f"http://127.0.0.1:{taken.getsockname()[1]}", TOPIC, BODY)
    assert outcome.result is Result.again and "cannot be reached" in outcome.why


def test_an_address_that_is_none_is_not_tried_again():
    assert publish("http://[oops", TOPIC, BODY).result is Result.refused


def test_neither_topic_nor_password_is_in_what_is_said(server):
    server.plan[:] = ["echo-topic"]
    outcome = publish(server.url.replace("http://", "http://user:hunter2@"), TOPIC, BODY)
    assert outcome.result is Result.refused and "***" in outcome.why
    assert TOPIC not in outcome.why and "hunter2" not in outcome.why
    assert server.tries[0][2].startswith("Basic ")
