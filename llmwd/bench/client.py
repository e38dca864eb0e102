"""The client running: its output shown and kept, until it ends, or the server does."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

# When the server goes, the open requests fail and the rest is refused, so the client comes to its end and
# writes what it measured until then.
FINISH_WITHIN_S = 8.0
TERMINATE_WITHIN_S = 5.0


@dataclass(frozen=True)
class Ended:
    """How a run ended: the client's exit status, and whether the server ended before it."""

    returncode: int
    server_gone: bool


def run_client(command: Sequence[str], environ: Mapping[str, str], server_pid: int, console: Path) -> Ended:
    """Runs `command`, copying its output to standard error and, appended, to the file `console`.

    Watches the server by pidfd, which costs it nothing (asking llmwd-ctl again and again would disturb the
    measurement). Once the server is gone the client has FINISH_WITHIN_S to finish. Raises OSError when the
    command cannot be started.
    """
    try:
        server_fd = os.pidfd_open(server_pid)
    except ProcessLookupError:
        return Ended(returncode=1, server_gone=True)
    try:
        with console.open("ab") as kept:
            client = subprocess.Popen(
                list(command), env=dict(environ), stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            finished = False
            try:
                finished = _copy_until_end(client, server_fd, kept)
            finally:
                end(client, finish_within_s=TERMINATE_WITHIN_S if finished else 0)
                client.stdout.close()
            return Ended(returncode=client.returncode, server_gone=_ended(server_fd))
    finally:
        os.close(server_fd)


def _copy_until_end(client: subprocess.Popen[bytes], server_fd: int, kept: BinaryIO) -> bool:
    """Copies the client's output; True when the client closed it, False when it lingers after the server's end."""
    output = client.stdout.fileno()
    waiting_for = [output, server_fd]
    give_up_at: float | None = None
    while True:
        within_s = None if give_up_at is None else max(0.0, give_up_at - time.monotonic())
        ready, _, _ = select.select(waiting_for, [], [], within_s)
        if not ready or within_s == 0.0:
            return False
        if server_fd in ready:
            waiting_for.remove(server_fd)
            give_up_at = time.monotonic() + FINISH_WITHIN_S
        if output in ready:
            chunk = os.read(output, 65536)
            _show(chunk or b"\n", kept)
            if not chunk:
                return True


def _show(chunk: bytes, kept: BinaryIO) -> None:
    kept.write(chunk)
    sys.stderr.buffer.write(chunk)
    sys.stderr.buffer.flush()


def _ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 0)[0])


def end(client: subprocess.Popen[bytes], *, finish_within_s: float) -> None:
    """Waits for the client to end by itself, then SIGTERM, then, after TERMINATE_WITHIN_S, SIGKILL.

    It is our child and not yet waited for, so its number cannot be anybody else's.
    """
    for within_s, then in ((finish_within_s, client.terminate), (TERMINATE_WITHIN_S, client.kill)):
        try:
            client.wait(timeout=within_s)
            return
        except subprocess.TimeoutExpired:
            then()
    client.wait()
