"""The API key that llmwd makes for vLLM: one file in the state folder, readable by us alone, made once."""

import errno
import os
import secrets
import stat
from pathlib import Path

from llmwd.adapters.rundir import DirError, write_atomic

NAME = "api-key"
LONGEST_BYTES = 4096


def read_or_make(state: Path) -> str:
    """The key, made on the first start. Only for who holds the supervisor's lock. Raises DirError with a sentence."""
    key = read(state)
    if key is None:
        key = secrets.token_urlsafe(32)
        try:
            write_atomic(state / NAME, f"{key}\n".encode(), durable=True)
        except OSError as error:
            raise DirError(f"the API key cannot be written to {state / NAME}: {error.strerror}") from error
    return key


def read(state: Path) -> str | None:
    """The key in the file, None where there is none. Raises DirError when the file is not ours alone, or holds no key."""
    path, anew = state / NAME, "remove it, and the next start makes a new one"
    try:
        # Nothing that was planted under this name may lead elsewhere, or hang.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        why = "is a link" if error.errno == errno.ELOOP else f"cannot be read: {error.strerror}"
        raise DirError(f"the API key's file {path} {why}; {anew}") from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise DirError(f"the API key's file {path} is not a regular file: {anew}")
        if found.st_uid != os.getuid():
            raise DirError(f"the API key's file {path} belongs to uid {found.st_uid}, not to us: {anew}")
        if found.st_mode & 0o077:
            raise DirError(f"the API key's file {path} can be read or written by others, so its key is no secret: {anew}")
        key = os.read(fd, LONGEST_BYTES).strip()
    except OSError as error:  # of a network file system; the key may be good
        raise DirError(f"the API key's file {path} cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)
    if not key.isascii() or len(key.split()) != 1:
        raise DirError(f"the API key's file {path} holds no key: {anew}")
    return key.decode()
