"""The front door's limits: bad clients, and too many of them, leave it serving."""

import contextlib
import resource
import socket
import time
from pathlib import Path

from llmwd.adapters import caddy
from llmwd.core import doorconfig
from llmwd.workers import door
from tests.tree.outside import Outside, hashes, outside, token  # noqa: F401
from tests.waiting import wait_until


def at_vllm(out: Outside) -> int:
    """Connections of Caddy's to the model's port."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[2].endswith(f":{out.tree.port:04X}") and row[3] == "01" for row in rows)


def test_bad_clients_leave_it_serving(outside):
    out = outside(DOOR_MAX_BODY_MB=1).served()
    body = b'{"model": "fake", "prompt": "' + b"x" * (2 << 20) + b'"}'
    assert out.status("POST", "/v1/completions", body=body) == 413
    key = b"Authorization: Bearer " + token("alice").encode()
    unread = b'{"model": "fake", "stream": true, "max_tokens": 100000, "prompt": "a"}'
    bad = [
        [b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-%d:" % number for number in range(200)],  # headers without an end
        [b""] * 100,
        [b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 900\r\n\r\n{"] * 20,  # a body that stalls, no key
        [b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n%s\r\nContent-Length: 900\r\n\r\n{" % key] * 20,
        [b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n%s\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{" % key] * 20,
        [b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n%s\r\nContent-Length: %d\r\n\r\n%s" % (key, len(unread), unread)] * 5,
    ]  # fmt: skip
    slow = [[socket.create_connection(("127.0.0.1", out.port)) for _ in kind] for kind in bad]
    try:
        for connections, requests in zip(slow, bad, strict=True):
            for connection, request in zip(connections, requests, strict=True):
                connection.sendall(request)
        wait_until(lambda: at_vllm(out) >= 25)  # (the stand-in ends chunked ones by itself)
        for garbage in (
            b"\x16\x03\x01\x02\x00", b"GET /\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 99, b"A" * 70_000 + b"\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n",
        ):  # fmt: skip
            with socket.create_connection(("127.0.0.1", out.port)) as connection:
                connection.settimeout(30)
                connection.sendall(garbage)
                try:
                    assert b" 200 " not in connection.recv(200), garbage
                except ConnectionError:
                    pass
        assert out.status("GET", "/health") == 200
        for connection in (slow[0][0], slow[1][0], slow[2][0]):
            connection.settimeout(2 * doorconfig.BODY_STALLS_S)  # Caddy ends them by itself after a minute
            assert b" 200 " not in connection.recv(200)  # it was answered, or closed
        wait_until(lambda: at_vllm(out) <= 5, 2 * doorconfig.BODY_STALLS_S, what="the end of the stalled requests at vLLM")
        assert [part.choices[0].delta.content for part in out.stream(2)] == [" ok"] * 2
    finally:
        for connection in sum(slow, []):
            connection.close()
    wait_until(lambda: at_vllm(out) == 0)


def test_more_connections_than_it_takes_are_told_of_and_cut_no_stream(outside):
    out = outside().served()
    pid, stream = out.caddy_pid, out.streaming()
    assert resource.prlimit(pid, resource.RLIMIT_NOFILE)[1] <= caddy.MOST_FILES
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (150, 150))
    silent = [socket.create_connection(("127.0.0.1", out.port)) for _ in range(220)]

    def hold() -> bool:
        """Nobody has a key; each asks for the page, and again before its connection would be closed."""
        for connection in silent:
            with contextlib.suppress(OSError):
                connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        next(stream)
        return time.monotonic() > until_s

    try:
        hold_s = door.DEAF_AFTER * (door.LOOK_EVERY_S + caddy.ANSWERS_WITHIN_S) + 8
        until_s = time.monotonic() + hold_s
        wait_until(hold, hold_s + 5, every_s=doorconfig.PORT_IDLE_S / 5)
        assert "no room" in out.tree.status()["door"]["detail"] and out.caddy_pid == pid
        wait_until(lambda: out.status("GET", "/health") == 200, 60, what="the end of the silent ones")
        wait_until(lambda: "no room" not in out.tree.status()["door"]["detail"])
        next(stream)
        assert out.caddy_pid == pid and out.tree.journal("door_full") and not out.tree.journal("door_died")
    finally:
        for connection in silent:
            connection.close()
