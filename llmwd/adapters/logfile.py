"""A service's log as it grows: what is new in it, and its end."""

import os
from pathlib import Path

LOOK_BYTES = 1 << 20
TAIL_BYTES = 16 << 10


def size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def read(path: Path, offset: int) -> tuple[str, int]:
    """(the whole lines logged from `offset` on, the first LOOK_BYTES of them: it may be a flood; where these end)."""
    try:
        with path.open("rb") as file:
            begin = offset if offset <= os.fstat(file.fileno()).st_size else 0  # shorter than it was: rotated
            file.seek(begin)
            data = file.read(LOOK_BYTES)
    except OSError:
        return "", offset
    whole = data[: data.rfind(b"\n") + 1] or (data if len(data) == LOOK_BYTES else b"")
    return whole.decode(errors="replace"), begin + len(whole)


def tail(path: Path, offset: int = 0, most: int = TAIL_BYTES) -> str:
    """The last `most` bytes of what was logged from `offset` on, in whole lines but for the end: the last line
    is there too when it has no end yet, for it may be a program's last word."""
    end = size(path)
    first = offset if offset <= end else 0
    begin = max(first, end - most)
    try:
        with path.open("rb") as file:
            file.seek(begin)
            data = file.read(most)
    except OSError:
        return ""
    if begin > first:  # in the middle of a line, perhaps of a secret, which would not be known as one
        data = data[data.find(b"\n") + 1 :]
    return data.decode(errors="replace")
