"""The front door's configuration in the real Caddy: what vLLM and people outside see of each other."""

import json
import resource
import signal
import socket
import statistics
import struct
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import msgspec
import pytest

from llmwd.adapters import caddy
from llmwd.core import doorconfig, doorwanted
from llmwd.vocab import NodePhase, Reason
from tests.adapters.caddyrig import OK, VLLM_KEY, Rig, rigged, says, token
from tests.waiting import wait_until

ALL = [f"{method} {path}" for path, methods in doorwanted.PATHS.items() for method in methods] + ["GET /version", "POST /version"]
WORK = "POST /v1/completions"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
AWAY = {
    "yielded_to_job": (Reason.yielded_to_job, NodePhase.waiting), "loading": (Reason.loading, NodePhase.loading),
    "held": (Reason.held, NodePhase.held), "waiting_for_gpus": (Reason.waiting_for_gpus, NodePhase.waiting),
    "failed": (Reason.server_failed, NodePhase.failed),
}  # fmt: skip


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with rigged(tmp_path) as made:
        yield made


def code(body: bytes) -> str:
    return json.loads(body)["error"]["code"]


def test_every_path_in_every_state_says_why_and_when_to_ask_again_at_once(rig: Rig) -> None:
    took_s, page_s = [], []
    for word, (reason, phase) in AWAY.items():
        rig.says(doorwanted.CLOSED, reason, phase)
        for line in ALL:
            began_s = time.monotonic()
            status, headers, body = rig.ask(line, body=b"{}" if line.startswith("POST") else b"")
            took_s.append(time.monotonic() - began_s)
            assert rig.ask("GET /", name=None)[0] == 200  # what Caddy has in a file, on the same busy machine
            page_s.append(time.monotonic() - began_s - took_s[-1])
            assert headers["content-type"] == "application/json", (line, word)
            if line.endswith("/v1/models"):
                assert status == 200 and (line.startswith("HEAD") or json.loads(body)["data"][0]["state"] == word)
            else:
                assert (status, int(headers["retry-after"]) > 0) == (503, True), (line, word)
                assert line.startswith("HEAD") or code(body) == word
    assert statistics.median(took_s) < statistics.median(page_s) + 0.05


def reset(connection: socket.socket, _: bytes) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("handler", [
    says(b""), reset, says(b"HTTP/1.1 2"), says(b"HTTP/1.1 200 OK\r\nContent-Le"), says(b"SSH-2.0-OpenSSH\r\n\r\n"), says(b"\0\0\0\4\0\0\0\0\0"),
    *(says(b"HTTP/1.1 %d X\r\nContent-Length: 2\r\n\r\nno" % status) for status in (401, 502, 503, 504, 520, 525, 530)),
], ids=["closed", "reset", "half a line", "half a head", "ssh", "h2", "401", "502", "503", "504", "520", "525", "530"])  # fmt: skip
@pytest.mark.parametrize("line", [WORK, "GET /health", "POST /version"])
def test_whatever_vllm_does_before_its_answer_becomes_our_503(rig: Rig, handler, line: str) -> None:
    rig.upstream.handler = handler
    status, headers, body = rig.ask(line, body=b"{}" if line.startswith("POST") else b"")
    assert (status, code(body)) == (503, "loading") and 0 < int(headers["retry-after"]) <= 5


def test_other_answers_of_vllm_pass_as_they_are(rig: Rig) -> None:
    for status in (200, 400, 404, 422, 429, 500):
        rig.upstream.handler = says(b"HTTP/1.1 %d X\r\nContent-Length: 2\r\n\r\nno" % status)
        assert rig.ask(WORK, body=b"{}")[::2] == (status, b"no")


def test_who_comes_while_the_model_goes_is_told_why_and_never_refused_for_our_key(rig: Rig) -> None:
    def checks(connection: socket.socket, head: bytes) -> None:
        connection.sendall(OK if VLLM_KEY.encode() in head else b"HTTP/1.1 401 X\r\nContent-Length: 0\r\n\r\n")

    rig.upstream.handler = checks
    with futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(lambda: {rig.ask(WORK, body=b"{}")[0] for _ in range(300)})
        while not asked.done():
            rig.says(doorwanted.CLOSED, *AWAY["yielded_to_job"])
            rig.says(doorwanted.OPEN)
        assert asked.result() <= {200, 503}


def test_vllm_gets_no_secret_of_a_client_and_nobody_gets_vllms(rig: Rig) -> None:
    rig.upstream.handler = lambda connection, head: connection.sendall(CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(head), head))
    secrets = ["Api-Key", "X-Goog-Api-Key", "Cookie", "Proxy-Authorization", "CF-Access-Client-Secret", "CF-Access-Client-Id"]
    headers = [f"{name}: s-e-c-{number}" for number, name in enumerate(secrets)]
    _, _, body = rig.ask(f"{WORK}?api_key=s-e-c-q", *headers, body=b"{}")
    assert b"s-e-c" not in body and token("alice").encode() not in body and f"Authorization: Bearer {VLLM_KEY}".encode() in body
    assert b"POST /v1/completions HTTP/1.1" in body
    _, _, body = rig.ask(WORK, f"X-Api-Key: {token('alice')}", name=None, body=b"{}")
    assert token("alice").encode() not in body
    rig.says(doorwanted.CLOSED, *AWAY["held"])
    for line in ALL:
        answer = rig.ask(line, body=b"{}" if line.startswith("POST") else b"")
        assert VLLM_KEY not in str(answer)
    assert VLLM_KEY not in rig.log.read_text() and "s-e-c" not in rig.log.read_text()


@pytest.mark.parametrize("handler", [
    says(CHUNKED + b"5\r\nhello\r\n"), reset, says(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nabc"),
], ids=["a cut stream", "a reset", "a short answer"])  # fmt: skip
def test_no_log_holds_a_secret_of_a_request_that_failed(rig: Rig, handler) -> None:
    rig.upstream.handler = handler
    secrets = ("Api-Key: s-e-c-1", "CF-Access-Client-Secret: s-e-c-2", "Cookie: c=s-e-c-3", f"X-Api-Key: {token('alice')}")
    rig.raw("\r\n".join([
        f"{WORK}?api_key=s-e-c-4 HTTP/1.1", "Host: a", "Connection: close", "Content-Length: 2", *secrets, "", "{}",
    ]).encode())  # fmt: skip
    log = wait_until(lambda: rig.log.read_text() if '"status"' in rig.log.read_text() else None)
    assert '"/v1/completions"' in log and '"WARN"' in log.upper() or '"error"' in log
    assert "s-e-c" not in log and token("alice") not in log and VLLM_KEY not in log


def test_who_only_looks_is_answered_at_once_while_others_wait(tmp_path: Path) -> None:
    with rigged(tmp_path, hold_s=20.0) as rig, futures.ThreadPoolExecutor(1) as pool:
        rig.says(doorwanted.HOLDING, *AWAY["loading"])
        waiting = pool.submit(rig.ask, WORK, body=b"{}")
        began_s = time.monotonic()
        assert rig.ask("GET /v1/models")[0] == 200
        assert rig.ask("GET /health")[0] == 503
        rig.says(doorwanted.OPEN, dial=doorwanted.nobody(str(rig.files)))  # vLLM has ended, and nobody knows of it
        assert rig.ask("GET /health")[0] == 503 and rig.ask("GET /v1/models")[0] == 503
        assert time.monotonic() - began_s < 15 and not waiting.done()
        rig.says(doorwanted.OPEN)
        assert waiting.result(20)[0] == 200


def test_more_requests_than_it_takes_are_told_to_come_back_soon_and_looks_do_not_count(tmp_path: Path) -> None:
    free = threading.Event()

    def slow(connection: socket.socket, head: bytes) -> None:
        if head.startswith(b"POST"):
            free.wait(60)
        connection.sendall(OK)

    with rigged(tmp_path, most=2) as rig, futures.ThreadPoolExecutor(2) as pool:
        rig.upstream.handler = slow
        under_way = [pool.submit(rig.ask, WORK, body=b"{}") for _ in range(2)]
        wait_until(lambda: len(rig.upstream.heads) == 2)
        status, headers, body = rig.ask(WORK, body=b"{}")
        assert (status, code(body), json.loads(body)["error"]["type"]) == (429, "overloaded", "rate_limit_error")
        assert 0 < int(headers["retry-after"]) <= 5
        assert rig.ask("GET /health")[0] == 200 and rig.ask("GET /v1/models")[0] == 200
        free.set()
        assert [each.result(20)[0] for each in under_way] == [200, 200]
        assert rig.ask(WORK, body=b"{}")[0] == 200


def test_no_authorization_but_one_bearer_reaches_the_check_of_keys(rig: Rig) -> None:
    """Caddy compares an unknown name with a hash that takes it a second of a CPU: anybody could keep the node busy."""
    nobody, wrong, right = token("nobody", "x"), token("alice", "x"), token("alice")
    before_s = rig.used_s()
    for number in range(4):
        for headers in (
            (f"Authorization: Basic {token('nobody', str(number))}", f"Authorization: Basic {wrong}"),
            (f"Authorization: Basic {nobody}", f"Authorization: Bearer {wrong}"), (f"Authorization: Basic {right}",),
            (f"Authorization: Bearer {nobody}", f"Authorization: Bearer {right}"), (f"Authorization: Bearer {nobody},{right}",),
            (f"Authorization: Basic {right}", f"Authorization: Basic {right}"), (f"X-Api-Key: {nobody}", f"X-Api-Key: {wrong}"),
            (f"X-Api-Key: {wrong}", f"X-Api-Key: {nobody}"), (f"Authorization: Basic {nobody}", f"X-Api-Key: {wrong}"),
        ):  # fmt: skip
            status, _, body = rig.ask("GET /v1/models", *headers, name=None)
            assert (status, code(body)) == (401, "invalid_api_key"), headers
    assert rig.used_s() - before_s < 1.0
    assert rig.ask("GET /v1/models", f"Authorization: bearer  {right}", name=None)[0] == 200
    assert rig.ask("GET /v1/models", f"X-Api-Key: {right}", name=None)[0] == 200


def test_no_connection_becomes_something_else_than_http(rig: Rig) -> None:
    upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: 13")
    assert rig.ask("GET /health", *upgrade)[0] == 200 and rig.ask(WORK, *upgrade, body=b"{}")[0] == 200
    assert len(rig.upstream.heads) == 2 and not any(b"upgrade" in head.lower() for head in rig.upstream.heads)


@pytest.mark.parametrize("gone", [(name,) for name in (doorwanted.BODY, doorwanted.RETRY_AFTER, doorwanted.MODELS, doorwanted.STATE)] + [
    (doorwanted.BODY, doorwanted.RETRY_AFTER, doorwanted.MODELS, doorwanted.PAGE, doorwanted.DIAL, doorwanted.STATE),
])  # fmt: skip
def test_files_that_have_disappeared_leave_answers_that_clients_understand(rig: Rig, gone: tuple[str, ...]) -> None:
    rig.says(doorwanted.CLOSED, *AWAY["held"])
    for name in gone:
        (rig.files / name).unlink()
    status, headers, body = rig.ask(WORK, body=b"{}")
    assert status == 503 and int(headers["retry-after"]) > 0 and code(body) in ("held", "loading")
    status, headers, body = rig.ask("GET /v1/models")
    assert (status == 200 and json.loads(body)["data"]) or (status == 503 and code(body) and headers["retry-after"])
    assert rig.ask("GET /", name=None)[0] == 200 and rig.ask("GET /", name=None)[2]


@pytest.mark.parametrize("lack", [doorwanted.NONE_MADE, doorwanted.ALL_EXPIRED, doorwanted.DAMAGED])
def test_without_a_key_it_is_shut_and_says_why(tmp_path: Path, lack: str) -> None:
    with rigged(tmp_path, accounts=(), lack=lack) as rig:
        status, _, body = rig.ask(WORK, body=b"{}")
        words = {doorwanted.NONE_MADE: "has been made yet", doorwanted.ALL_EXPIRED: "expired", doorwanted.DAMAGED: "cannot be read"}
        assert (status, code(body)) == (403, "no_keys") and words[lack] in json.loads(body)["error"]["message"]


def test_a_caddy_without_room_for_more_works_and_one_that_hangs_does_not(rig: Rig) -> None:
    def streams(connection: socket.socket, _: bytes) -> None:
        connection.sendall(CHUNKED + b"5\r\nbegun\r\n")
        more.wait(60)
        connection.sendall(b"4\r\nover\r\n0\r\n\r\n")

    more, rig.upstream.handler = threading.Event(), streams
    admin = caddy.Admin(rig.wanted.admin)
    assert admin.answers()
    stream = rig.stream()
    resource.prlimit(rig.process.pid, resource.RLIMIT_NOFILE, (60, 60))
    held = [socket.create_connection(("127.0.0.1", rig.port)) for _ in range(120)]
    for connection in held:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    try:
        wait_until(lambda: not caddy.answers(rig.wanted.socket))
        assert admin.answers() and not caddy.Admin(rig.wanted.admin).answers()
        more.set()
        assert stream.read() == b"over"
        # The port's idle connections end by themselves, long before the ones of the tunnel would.
        wait_until(lambda: caddy.answers(rig.wanted.socket), 3 * doorconfig.PORT_IDLE_S)
        rig.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: not admin.answers(), what="Caddy stopped: its threads are one after the other")
    finally:
        for connection in held:
            connection.close()


def test_the_kept_connection_outlives_new_configurations(rig: Rig) -> None:
    admin = caddy.Admin(rig.wanted.admin)
    for most in (1, 2, 3):
        assert admin.load(doorconfig.make(msgspec.structs.replace(rig.wanted, most=most))) == "" and admin.answers()
    bad = json.loads(doorconfig.make(rig.wanted))
    bad["apps"]["nonesuch"] = {}
    assert "unknown" in admin.load(json.dumps(bad).encode()) and admin.answers()
    assert rig.ask("GET /health")[0] == 200


@pytest.mark.parametrize("told, problem", [
    ("v2.11.7 h1:x", ""), ("2.12.0-beta.1", ""), ("v3.0.0", ""), ("v2.11.6 h1:x", "2.11.7 or newer"), ("2.6.2", "2.11.7 or newer"), ("hello", "no Caddy"),
])  # fmt: skip
def test_a_caddy_that_cannot_limit_slow_clients_is_refused(tmp_path: Path, told: str, problem: str) -> None:
    program = tmp_path / "caddy"
    program.write_text(f"#!/bin/sh\necho '{told}'\n")
    program.chmod(0o755)
    found = caddy.survey(str(program))[1]
    assert problem in found and bool(found) == bool(problem) and "Debian" not in found
