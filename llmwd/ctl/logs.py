"""`logs`: the last lines of one of llmwd's logs, and what is added to it."""

import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import BinaryIO

import click
from click.shell_completion import CompletionItem

from llmwd.ctl.place import find_place
from llmwd.ctl.program import Refusal, examples
from llmwd.vocab import Worker

NAMES = ("root", *(str(worker) for worker in Worker), "server", "caddy", "cloudflared")
LOOK_EVERY_S = 0.1
BLOCK_BYTES = 1 << 16


class LogName(click.ParamType):
    """Whether there is such a log is said in the verb, with the list: it is no error of usage."""

    name = "name"

    def shell_complete(self, ctx, param, incomplete):
        return [CompletionItem(name) for name in NAMES if name.startswith(incomplete)]


@click.command(epilog=examples("llmwd-ctl logs server -f", "llmwd-ctl logs root -n 100"))
@click.argument("name", type=LogName())
@click.option("-f", "--follow", is_flag=True, help="Go on printing what is added, until Ctrl-C.")
@click.option("-n", "--lines", type=click.IntRange(0), default=40, show_default=True, help="How many last lines.")
def logs(name: str, follow: bool, lines: int) -> None:
    """Print the end of a log: root, a worker's, `server` (vLLM's own output), `caddy` (with the front door's access log) or `cloudflared`."""
    if name not in NAMES:
        raise Refusal(f"there is no log {name!r}; there are: {', '.join(NAMES)}")
    path = find_place().logs / f"{name}.log"
    at = _print_end(path, lines)
    if follow:
        _follow(path, *(at or (0, 0)))
    elif at is None:
        raise Refusal(f"{name} has not written a log yet ({path})")


def _print_end(path: Path, lines: int) -> tuple[int, int] | None:
    """Print the last lines, with the file before the last rotation if this one is short: (inode, offset) reached; None:
    there is no log yet."""
    end: deque[bytes] = deque(maxlen=min(lines, sys.maxsize))
    at = None
    for each in (Path(f"{path}.1"), path):
        file = _open(each)
        if file is not None:
            with file:
                end.extend(file)
                at = (os.fstat(file.fileno()).st_ino, file.tell())
    _print(b"".join(end))
    return at


def _follow(path: Path, inode: int, offset: int) -> None:
    """Print what is added. A rotation renames the file: the old one is read to its end, then the new one."""
    file = None
    try:
        while True:
            if file is None:
                file = _open(path)
                if file is not None:
                    file.seek(offset if os.fstat(file.fileno()).st_ino == inode else 0)
            if file is not None:
                rotated = _replaced(path, file)  # asked before reading: what came in between is read as well
                if os.fstat(file.fileno()).st_size < file.tell():
                    file.seek(0)
                while block := file.read(BLOCK_BYTES):
                    _print(block)
                if rotated:
                    file.close()
                    file, inode, offset = None, 0, 0
                    continue
            time.sleep(LOOK_EVERY_S)
    finally:
        if file is not None:
            file.close()


def _open(path: Path) -> BinaryIO | None:
    """None: there is no such file, or not yet. Refusal where there is one that cannot be read."""
    try:
        return path.open("rb")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Refusal(f"{path} cannot be read: {error.strerror}") from error


def _replaced(path: Path, file) -> bool:
    """Whether another file has this name now. No file at all is a rotation in its middle: wait."""
    try:
        return path.stat().st_ino != os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False


def _print(data: bytes) -> None:
    if data:
        click.echo(data, nl=False)
