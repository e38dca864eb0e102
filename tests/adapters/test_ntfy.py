"""Publishing to a real HTTP server that answers like ntfy, well and badly."""

import errno
import json
import os
import socket
import sys
import types

import pytest

from llmwd.adapters import ntfy, secretfile
from llmwd.adapters.ntfy import Access, Result, cancel, publish
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
        ("redirect", Result.refused, None), ("308", Result.refused, None), ("302", Result.again, None), ("307", Result.again, None),
        ("400", Result.bad, 40009), ("413", Result.bad, 41303), ("proxy-404", Result.again, None), ("405", Result.again, None),
        ("408", Result.again, None), ("425", Result.again, None), ("502", Result.again, None), ("204", Result.again, None),
    ],
)  # fmt: skip
def test_each_failure_is_tried_again_given_up_or_a_reason_to_stop(server, answer, result, code):
    server.plan[:] = [answer]
    outcome = publish(server.url, TOPIC, BODY)
    assert outcome.result is result and outcome.code == code and outcome.why
    assert len(server.tries) == 1


def test_a_server_that_says_created_has_it(server):
    server.plan[:] = ["201"]
    assert publish(server.url, TOPIC, BODY).result is Result.sent


def test_what_a_bundle_of_certificates_lacks_is_no_refusal(server, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/ca.pem")
    assert publish(server.url.replace("http:", "https:"), TOPIC, BODY).result is Result.again


def test_a_library_that_is_not_there_for_a_moment_is_no_refusal(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "requests", None)
    assert publish(server.url, TOPIC, BODY).result is Result.again


@pytest.mark.parametrize(("number", "result"), [
    (errno.ESTALE, Result.again), (errno.EIO, Result.again), (errno.ENOENT, Result.refused), (errno.EACCES, Result.refused),
])  # fmt: skip
def test_a_token_that_a_file_system_does_not_give_for_a_moment_is_read_again(server, monkeypatch, tmp_path, number, result):
    def fails(path: str, flags: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(secretfile, "os", types.SimpleNamespace(**vars(os) | {"open": fails}))
    outcome = publish(server.url, TOPIC, BODY, Access(token_file=str(tmp_path / "token")))
    assert outcome.result is result and "NTFY_TOKEN_FILE" in outcome.why and server.tries == []


def test_without_credentials_a_protected_topic_is_forbidden_and_another_is_not(server):
    server.users = {"Bearer tk_1234567890": {TOPIC}}
    assert publish(server.url, TOPIC, BODY).code == 40301
    assert publish(server.url, TOPIC, BODY.replace(TOPIC.encode(), b"open")).result is Result.sent
    assert cancel(server.url, TOPIC, "sid").code == 40301


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
