"""The journal: JSON lines of what happened and who ordered it, and the logs beside it."""

import fcntl
import logging
import logging.handlers
import os
import sys
import time
from pathlib import Path
from typing import BinaryIO

import msgspec

from llmwd import redact

JOURNAL_MAX_BYTES = 10 << 20
JOURNAL_KEEP = 5
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Journal:
    """`<state>/journal.jsonl`. Several workers append; each line is one write, so lines never mix."""

    def __init__(self, state: Path, worker: str, log: logging.Logger):
        self._path = state / "journal.jsonl"
        self._worker = worker
        self._log = log
        self._named = False  # whether a line of ours has told the boot that mono_s is of

    def write(self, event: str, **details: object) -> None:
        """One event with its details. A full disk costs the line, never the caller, nor the line after it."""
        line = {"at": time.time(), "mono_s": time.monotonic(), "worker": self._worker, "event": event}
        line |= {name: redact.mask(value) if isinstance(value, str) else value for name, value in details.items()}
        try:
            if not self._named:
                line["boot_id"] = BOOT_ID.read_text().strip()
            data = msgspec.json.encode(line) + b"\n"
            fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                if _torn(fd):
                    data = b"\n" + data
                if os.write(fd, data) < len(data):
                    self._log.error("journal: %s could be written in part only", event)
                else:
                    self._named = True
                if os.fstat(fd).st_size > JOURNAL_MAX_BYTES:
                    self._rotate(fd)
            finally:
                os.close(fd)
        except OSError as error:
            self._log.error("journal: %s could not be written: %s", event, error.strerror)

    def _rotate(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # another worker rotates, and may have been stopped in it: nobody waits for that one
        # It may have done so before we had the lock.
        if os.fstat(fd).st_ino != os.stat(self._path).st_ino:
            return
        for number in range(JOURNAL_KEEP - 1, 0, -1):
            older = self._path.with_suffix(f".jsonl.{number}")
            if older.exists():
                os.replace(older, self._path.with_suffix(f".jsonl.{number + 1}"))
        os.replace(self._path, self._path.with_suffix(".jsonl.1"))


def _torn(fd: int) -> bool:
    """Whether the last line has no end, because the disk was full: nobody's next line may be lost with it."""
    size = os.fstat(fd).st_size
    return size > 0 and os.pread(fd, 1, size - 1) != b"\n"


def read_journal(state: Path) -> list[bytes]:
    """All lines that are kept, oldest first; none where there is no journal. Raises OSError where it cannot be read."""
    path = state / "journal.jsonl"
    files: dict[int, bytes] = {}
    # The newest first: a rotation meanwhile makes files older, so it can show one twice, but hide none.
    for each in (path, *(path.with_suffix(f".jsonl.{number}") for number in range(1, JOURNAL_KEEP + 1))):
        try:
            with each.open("rb") as file:
                files.setdefault(os.fstat(file.fileno()).st_ino, file.read())
        except FileNotFoundError:
            continue
    return [line for data in reversed(files.values()) for line in data.splitlines()]


class JournalTail:
    """Lines that are added from now on, over rotations."""

    def __init__(self, state: Path):
        self._path = state / "journal.jsonl"
        self._rest = b""
        self._file = self._open()
        if self._file is not None:
            self._file.seek(0, os.SEEK_END)

    def _open(self) -> BinaryIO | None:
        try:
            return self._path.open("rb")
        except OSError:
            return None

    def new(self) -> list[bytes]:
        """Whole lines since the last call; none where there is no journal."""
        self._file = self._file or self._open()
        if self._file is None:
            return []
        try:
            rotated = self._path.stat().st_ino != os.fstat(self._file.fileno()).st_ino
        except FileNotFoundError:
            rotated = False  # in the middle of it
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        if rotated:  # asked before reading: nothing is added to the old one any more
            self.close()
        return lines

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class _Quiet(logging.handlers.RotatingFileHandler):
    """A full or read-only disk must not fill the terminal with tracebacks from logging itself."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def _open(self):
        return os.fdopen(os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600), "a")


class _Masking(logging.Formatter):
    """Tracebacks, too: the last thing before a line is written."""

    def format(self, record: logging.LogRecord) -> str:
        return redact.mask(super().format(record))


def open_log(logs: Path, name: str, level: str, max_mb: float, keep: int) -> logging.Logger:
    """The logger of this process: standard error and `<logs>/<name>.log`, rotated by size."""
    logger = logging.getLogger("llmwd")
    logger.propagate = False
    for handler in list(logger.handlers):  # inherited from the root through the fork
        logger.removeHandler(handler)
    form = _Masking(f"%(asctime)s.%(msecs)03d {name:<8} %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    try:
        handlers.append(_Quiet(logs / f"{name}.log", maxBytes=int(max_mb * (1 << 20)), backupCount=keep, delay=False))
    except OSError as error:
        print(f"{logs / name}.log cannot be written ({error.strerror}): logging to standard error only", file=sys.stderr)
    for handler in handlers:
        handler.setFormatter(form)
        logger.addHandler(handler)
    logger.setLevel(level.upper())
    return logger
