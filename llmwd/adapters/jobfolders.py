"""A source of jobs that is a folder (or several) in which each name of a certain form stands for a job.

Every folder is watched before it is listed. Nothing below the names themselves is opened: in a job's cgroup a reader
would be in Slurm's way.
"""

import errno
import os
import re
from collections import Counter
from typing import NamedTuple

from llmwd.adapters import inotify
from llmwd.messages import SourceState
from llmwd.vocab import Source

Gpus = tuple[int, ...] | None

# Slurm 26.05 names a job's folder by its SLUID (src/common/sluid.c): "s" and 13 Crockford digits.
JOB_FOLDER = re.compile(r"job_(?P<id>[0-9]+)|(?P<sluid>s[0-9A-HJKMNP-TV-Z]{13})")
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ENODEV}


def job_folder(name: str) -> str | None:
    """The id that a job's cgroup folder tells; None for every other name (system, slurmd, cgroup.procs)."""
    match = JOB_FOLDER.fullmatch(name)
    return (match["id"] or match["sluid"]) if match else None


class Absent(Exception):
    """There is nothing to look at on this machine (now); the text says what is missing."""


class Place(NamedTuple):
    """A folder of the last walk. `holds`: its names may be jobs. `leads`: names that make a new walk needed."""

    holds: bool
    leads: re.Pattern[str] | None


class JobFolders:
    """Base of stepd, cgroup2, cgroup1 and sim: they say where to walk, and which name is which job."""

    name: Source
    mask = inotify.NAMES

    def __init__(self) -> None:
        self.absent = False
        self._works = False
        self._why = "has not looked yet"
        self._folders = inotify.Folders()
        self._places: dict[str, Place] = {}
        self._names: dict[str, dict[str, str]] = {}  # folder -> name in it -> id
        self._away: set[str] = set()  # ids that have had no name for a moment since came_back() was asked

    # --- what a kind of source says ---------------------------------------------------------------

    def walk(self) -> None:
        """Enter every folder that matters. Raises Absent, or OSError where it cannot look."""
        raise NotImplementedError

    def job_of(self, name: str) -> str | None:
        return job_folder(name)

    def gpus_of(self, job: str) -> Gpus:
        return None

    def noticed(self, folder: str, name: str, present: bool) -> None:
        """A name that is a job's was found, written or lost."""

    def enter(self, folder: str, holds: bool, leads: re.Pattern[str] | None = None) -> list[str]:
        """Watch, then list: the names in the folder, none when it is gone. OSError when it cannot be read."""
        self._places[folder] = Place(holds, leads)
        self._folders.watch(folder, self.mask)
        try:
            names = os.listdir(folder)
        except OSError as error:
            if error.errno in _GONE:
                return []
            raise
        if holds:
            self._names[folder] = {name: job for name in names if (job := self.job_of(name)) is not None}
            for name in self._names[folder]:
                self.noticed(folder, name, True)
        return names

    # --- what the detector uses ---------------------------------------------------------------------

    def check(self) -> SourceState:
        return SourceState(name=self.name, works=self._works, why=self._why)

    def fileno(self) -> int | None:
        """Readable when something may have changed."""
        return self._folders.fileno()

    @property
    def polled(self) -> bool:
        """inotify does not do here: only a scan finds news."""
        return self._works and bool(self._folders.trouble)

    def drain(self) -> bool:
        """Apply what inotify tells to the picture; True: that does not do, scan."""
        events, rescan = self._folders.read()
        ids = [job for names in self._names.values() for job in names.values()]
        if self._folders.overflowed:
            self._away.update(ids)  # of any of them the events may be among those that were dropped
        left = Counter(ids)
        for folder, name, appeared in events:
            place = self._places.get(folder)
            if place is None:
                continue
            if place.leads is not None and place.leads.fullmatch(name):
                rescan = True
            if place.holds and (job := self.job_of(name)) is not None:
                names = self._names.setdefault(folder, {})
                if appeared:
                    left[job] += name not in names
                    names[name] = job
                elif names.pop(name, None) is not None:
                    left[job] -= 1
                    if not left[job]:
                        self._away.add(job)
                self.noticed(folder, name, appeared)
        return rescan

    def jobs(self) -> dict[str, Gpus]:
        """The picture after the last drain or scan: ids, with their GPUs where the source itself tells them."""
        ids = {job for names in self._names.values() for job in names.values()}
        return {job: self.gpus_of(job) for job in ids}

    def came_back(self) -> frozenset[str]:
        """Ids of the picture that were away since the last call: gone and there again before anybody looked (requeue)."""
        away, self._away = self._away, set()
        return frozenset(job for names in self._names.values() for job in names.values() if job in away)

    def scan(self) -> dict[str, Gpus] | None:
        """All jobs that are there now. None: could not look; `check` and `absent` say why."""
        before = self._places, self._names
        self._places, self._names = {}, {}
        self._folders.open()
        self.absent = self._works = False
        try:
            self.walk()
        except Absent as missing:
            self.absent, self._why = True, str(missing)
            self._names = {}
        except OSError as error:
            self._why = f"cannot read {error.filename}: {error.strerror}"
            self._places, self._names = {**before[0], **self._places}, before[1]
        else:
            self._works, self._why = True, self._folders.trouble and f"polled, because {self._folders.trouble}"
        self._folders.keep_only(set(self._places))
        return self.jobs() if self._works else None

    def close(self) -> None:
        self._folders.close()
