"""Simulated jobs: a file `job_42` in a folder stands for a job, its first line names the GPUs ("0-1,3", none: no GPUs).

A second line `for=30` ends the job by itself 30 s after the file was written.
"""

import errno
import os
import re
import stat
import time
from pathlib import Path

from llmwd.adapters import inotify
from llmwd.adapters.jobfolders import Gpus, JobFolders
from llmwd.adapters.rundir import DirError, make_ours
from llmwd.vocab import Source

FILE = re.compile(r"job_(?P<id>[0-9]+)")
MAX_BYTES = 4096
MAX_INDEX = 1023
_RANGE = re.compile(r"(?P<first>[0-9]{1,4})(-(?P<last>[0-9]{1,4}))?")
_FOR = re.compile(r"for=(?P<seconds>[0-9]{1,9}(\.[0-9]{1,6})?)")


def parse(text: str) -> tuple[Gpus, float | None]:
    """GPUs (None: not understood, so not known) and after how many seconds the job ends (None: not by itself)."""
    lines = [line.strip() for line in text.splitlines()]
    matches = [match for line in lines if (match := _FOR.fullmatch(line))]
    rest = [line for line in lines if line and not _FOR.fullmatch(line)]
    for_s = float(matches[0]["seconds"]) if matches else None
    return (_indices(rest[0] if rest else "") if len(rest) <= 1 else None), for_s


def _indices(text: str) -> Gpus:
    found: set[int] = set()
    for part in text.split(",") if text else ():
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            return None
        first, last = int(match["first"]), int(match["last"] or match["first"])
        if last < first or last > MAX_INDEX:
            return None
        found.update(range(first, last + 1))
    return tuple(sorted(found))


class SimJobs(JobFolders):
    """The files of one folder, which is made if it is missing."""

    name = Source.sim
    mask = inotify.WRITTEN  # a file counts once it is written, not while it is still empty

    def __init__(self, folder: str):
        super().__init__()
        self._folder = folder
        self._gpus: dict[str, Gpus] = {}
        self._ends_s: dict[str, tuple[int, float]] = {}  # name -> its mtime in ns, monotonic end

    def job_of(self, name: str) -> str | None:
        match = FILE.fullmatch(name)
        return match["id"] if match else None

    def gpus_of(self, job: str) -> Gpus:
        return self._gpus.get(job)

    def walk(self) -> None:
        try:
            make_ours(Path(self._folder), "simulation")
        except DirError as error:  # whoever can write there says when we yield
            raise PermissionError(errno.EACCES, str(error), self._folder) from error
        self.enter(self._folder, holds=True)

    def noticed(self, folder: str, name: str, present: bool) -> None:
        read = _read(f"{folder}/{name}") if present else None
        if read is None:
            self._gpus.pop(FILE.fullmatch(name)["id"], None)
            self._ends_s.pop(name, None)
            return
        text, mtime_ns = read
        self._gpus[FILE.fullmatch(name)["id"]], for_s = parse(text)
        if for_s is None:
            self._ends_s.pop(name, None)
        elif self._ends_s.get(name, (None,))[0] != mtime_ns:
            # The wall clock is asked once, for the age that the file has when it is first seen.
            age_s = min(max(time.time() - mtime_ns / 1e9, 0.0), for_s)
            self._ends_s[name] = mtime_ns, time.monotonic() + for_s - age_s

    def next_end_s(self) -> float | None:
        """When (monotonic) the next job ends by itself."""
        return min((end_s for _, end_s in self._ends_s.values()), default=None)

    def end_due(self, now_s: float) -> None:
        """Remove the files of jobs that are over."""
        for name, (_, end_s) in list(self._ends_s.items()):
            if end_s <= now_s:
                del self._ends_s[name]
                try:
                    os.unlink(f"{self._folder}/{name}")
                except FileNotFoundError:
                    continue


def _read(path: str) -> tuple[str, int] | None:
    """Text and mtime of a regular file; None: not one, or not readable (its GPUs are not known then)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            return None
        return os.read(fd, MAX_BYTES).decode(errors="replace"), status.st_mtime_ns
    finally:
        os.close(fd)
