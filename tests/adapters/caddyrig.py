"""The real Caddy with the door's configuration, the test in the place of the door's worker, and of vLLM."""

import base64
import contextlib
import http.client
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from llmwd.adapters import caddy, doorkeys, listeners
from llmwd.core import doorconfig, doorwanted, doorwords
from llmwd.core.doorpage import page
from llmwd.vocab import NodePhase, Reason
from tests.ports import free_port
from tests.waiting import wait_until
from tests.workers.harness import server_fact

VLLM_KEY = "vllms-own-secret"
SECRETS = {"alice": "a1b2c3", "bob": "d4e5f6"}
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
Handler = Callable[[socket.socket, bytes], None]


def token(name: str, secret: str | None = None) -> str:
    return base64.b64encode(f"{name}:{secret or SECRETS[name]}".encode()).decode()


def says(answer: bytes) -> Handler:
    return lambda connection, head: connection.sendall(answer)


class Upstream:
    """Raw: what `handler` does with a connection once a request's head is there; then it is closed. `heads`: what came."""

    def __init__(self, handler: Handler = says(OK)):
        self.handler, self.heads = handler, []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._answer, args=(self._listener.accept()[0],), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        head = b""
        with connection, contextlib.suppress(OSError):
            while b"\r\n\r\n" not in head:
                part = connection.recv(1 << 16)
                if not part:
                    return
                head += part
            head, _, body = head.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            while len(body) < int(length[1] if length else 0):  # vLLM answers nothing before it has read it, either
                body += connection.recv(1 << 16)
            self.heads.append(head)
            self.handler(connection, head)

    def close(self) -> None:
        self._listener.close()


class Rig:
    """`port`: the door's. A file of the door's is written by says(), and can be damaged in `files`."""

    def __init__(self, folder: Path, **wanted: object):
        self.upstream, self.port = Upstream(), free_port()
        self.files, self.log = folder / "door", folder / "log"
        self.files.mkdir(parents=True)
        accounts = tuple(doorwanted.Account(name, doorkeys.hashed(secret)) for name, secret in SECRETS.items())
        self.wanted = doorwanted.Wanted(**{
            "folder": str(self.files), "socket": str(folder / "door.sock"), "admin": str(folder / "admin.sock"), "port": self.port,
            "tls": False, "accounts": accounts, "allow": ("/version",), "body_mb": 1, "most": 512, "hold_s": 0.0,
        } | wanted)  # fmt: skip
        self.config = folder / "config.json"
        self.config.write_bytes(doorconfig.make(self.wanted))
        self.says(doorwanted.OPEN)
        argv = [caddy.find(""), "run", "--config", str(self.config)]
        with self.log.open("wb") as log:
            env = {"PATH": os.defpath, "HOME": str(folder), "GOMAXPROCS": "4"}
            self.process = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=log)
        wait_until(lambda: caddy.answers(self.wanted.socket) and (not self.wanted.port or not listeners.is_free(self.port)), what="Caddy")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.upstream.close()

    def says(self, word: str, reason: Reason = Reason.ready, phase: NodePhase = NodePhase.serving, dial: str = "") -> None:
        """What the door's worker would write."""
        state = doorwords.state_of(msgspec.structs.replace(server_fact(phase), reason=reason), time.time())
        away = doorwanted.nobody if word == doorwanted.HOLDING else doorwanted.closed
        to = dial or (f"127.0.0.1:{self.upstream.port}" if word == doorwanted.OPEN else away(str(self.files)))
        for name, data in {
            doorwanted.BODY: doorwords.error_body(state), doorwanted.RETRY_AFTER: str(state.retry_after_s).encode(),
            doorwanted.MODELS: doorwords.models_body(state), doorwanted.PAGE: page(state),
            doorwanted.UPSTREAM_KEY: f"Bearer {VLLM_KEY}".encode(), doorwanted.DIAL: to.encode(), doorwanted.STATE: word.encode(),
        }.items():  # fmt: skip
            draft = self.files / f".{name}"
            draft.write_bytes(data)
            draft.rename(self.files / name)

    def raw(self, data: bytes, within_s: float = 20.0) -> bytes:
        """All that comes back until the end of the connection."""
        got = b""
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.settimeout(within_s)
            connection.sendall(data)
            with contextlib.suppress(ConnectionError):
                while part := connection.recv(1 << 16):
                    got += part
        return got

    def ask(self, line: str, *headers: str, name: str | None = "alice", body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
        """line: `GET /health`; name: whose key goes with it."""
        lines = [f"{line} HTTP/1.1", "Host: a", "Connection: close", *headers]
        lines += [f"Authorization: Bearer {token(name)}"] if name else []
        lines += [f"Content-Length: {len(body)}"] if body else []
        head, _, found = self.raw("\r\n".join([*lines, "", ""]).encode() + body).partition(b"\r\n\r\n")
        first, *rest = head.decode("latin-1").split("\r\n")
        fields = {key.lower(): value for key, _, value in (each.partition(": ") for each in rest)}
        return int(first.split()[1]), fields, found

    def stream(self) -> http.client.HTTPResponse:
        """A stream that has begun."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("POST", "/v1/completions", b"{}", {"Authorization": f"Bearer {token('alice')}"})
        response = connection.getresponse()
        assert response.read(5) == b"begun"
        return response

    def used_s(self) -> float:
        """Seconds of a CPU that Caddy has taken."""
        return sum(map(int, Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def rigged(folder: Path, **wanted: object) -> Iterator[Rig]:
    rig = Rig(folder, **wanted)
    try:
        yield rig
    finally:
        rig.close()
