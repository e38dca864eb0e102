"""A file of the operator's that holds one secret, readable by us alone."""

import os
import stat

from llmwd.adapters.rundir import DirError

LONGEST_BYTES = 4096


def read(setting: str, path: str) -> str:
    """The one line in the file that `setting` names. Raises DirError with a sentence for who set it."""
    text, known = content(setting, path)
    if known:
        raise DirError(known[0])
    lines = text.decode(errors="replace").strip().splitlines()
    if len(lines) != 1 or not lines[0].isprintable():
        raise DirError(f"{path} must hold one line, the secret that {setting} is for")
    return lines[0]


def content(setting: str, path: str) -> tuple[bytes, tuple[str, ...]]:
    """(the file's first LONGEST_BYTES, sentences: why others may know them). Raises DirError if it cannot be read.
    A pipe is refused without waiting for its writer."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise DirError(f"{path} cannot be read ({error.strerror}): set {setting}") from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise DirError(f"{path} is not a regular file: set {setting} to one")
        known = []
        if found.st_uid not in (os.getuid(), 0):
            known.append(f"{path} is another user's, so what {setting} needs is no secret: copy it to a file of your own")
        if found.st_mode & 0o077:
            known.append(f"{path} can be read or written by others, so what {setting} needs is no secret: `chmod 600 {path}`")
        return os.read(fd, LONGEST_BYTES), tuple(known)
    except OSError as error:
        raise DirError(f"{path} cannot be read ({error.strerror}): set {setting}") from error
    finally:
        os.close(fd)
