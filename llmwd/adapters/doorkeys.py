"""The file of the front door's keys, in the state folder: read by its worker, changed by llmwd-ctl, one at a time."""

import contextlib
import fcntl
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import bcrypt

from llmwd.adapters.rundir import DirError, write_atomic

NAME = "door-keys.json"
LOCK = "door-keys.lock"
LARGEST_BYTES = 4 << 20
# Of bcrypt: the least. Secrets are random, so no list of passwords finds one whatever a hash costs; and whoever
# knows a name makes the node pay for every guess.
COST = 4
SECRET_BYTES = 24


def path_in(state: Path) -> Path:
    return state / NAME


def read_bytes(path: Path) -> bytes | None:
    """What the file holds, None where there is none. Raises DirError when it is not ours alone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DirError(f"the keys' file {path} cannot be read: {error.strerror}") from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise DirError(f"the keys' file {path} is not a file for us alone: `chmod 600 {path}`, if its keys are yours")
        data = bytearray()
        while len(data) <= LARGEST_BYTES and (chunk := os.read(fd, 1 << 16)):
            data += chunk
        return bytes(data)
    except OSError as error:
        raise DirError(f"the keys' file {path} cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)


def change(state: Path, by: Callable[[bytes | None], bytes]) -> None:
    """Replace what the file holds by what `by` makes of it, nobody else's change in between. Raises DirError, and what
    `by` raises."""
    path = path_in(state)
    with _locked(state):
        data = by(read_bytes(path))
        try:
            write_atomic(path, data, durable=True)
        except OSError as error:
            raise DirError(f"the keys' file {path} cannot be written: {error.strerror}; nothing has changed") from error


@contextlib.contextmanager
def _locked(state: Path) -> Iterator[None]:
    path = state / LOCK  # its own file: the keys' one is replaced as a whole
    with contextlib.ExitStack() as opened:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            opened.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:
            raise DirError(f"the keys cannot be changed: {path}: {error.strerror}") from error
        yield


def drawn() -> str:
    """Random characters for a secret."""
    return secrets.token_urlsafe(SECRET_BYTES)


def hashed(secret: str) -> str:
    """Its bcrypt."""
    return bcrypt.hashpw(secret.encode(), bcrypt.gensalt(COST)).decode()
