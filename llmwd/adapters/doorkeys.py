"""The file of the front door's keys, in the state folder."""

import os
import stat
from pathlib import Path

from llmwd.adapters.rundir import DirError

NAME = "door-keys.json"
LARGEST_BYTES = 4 << 20


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
