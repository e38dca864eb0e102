"""inotify on a few folders, through inotify_simple, which wraps the system calls and parses the events.

watchdog and pyinotify were considered: both add threads and walk into subfolders, which must never happen in a job's
cgroup. What is added here: paths instead of watch descriptors, watches on folders that were removed and made again,
and limits that are told instead of raised.
"""

import errno
from typing import NamedTuple

from inotify_simple import INotify, flags

LIMITS = {
    errno.ENOSPC: "the limit fs.inotify.max_user_watches is reached",
    errno.EMFILE: "the limit fs.inotify.max_user_instances or of open files is reached",
    errno.ENFILE: "the system's limit of open files is reached",
    errno.ENOMEM: "the kernel has no memory for a watch",
    errno.ENOSYS: "the kernel has no inotify",
}
NAMES = flags.CREATE | flags.DELETE | flags.MOVED_FROM | flags.MOVED_TO
WRITTEN = flags.CLOSE_WRITE | flags.DELETE | flags.MOVED_FROM | flags.MOVED_TO
_SELF = flags.DELETE_SELF | flags.MOVE_SELF
_GONE = flags.DELETE | flags.MOVED_FROM
_LOST = flags.Q_OVERFLOW | flags.IGNORED | flags.UNMOUNT | _SELF


class Event(NamedTuple):
    """A name appeared in a folder (or, with WRITTEN, was written), or disappeared from it."""

    folder: str
    name: str
    appeared: bool


class Folders:
    """A set of watched folders. `trouble` says why watching does not work (then they have to be polled).

    `overflowed`: at the last read the kernel had dropped events, of whichever names."""

    def __init__(self) -> None:
        self.trouble = ""
        self.overflowed = False
        self._inotify: INotify | None = None
        self._wd_of: dict[str, int] = {}
        self._folder_of: dict[int, str] = {}

    def fileno(self) -> int | None:
        return None if self._inotify is None else self._inotify.fileno()

    def open(self) -> None:
        """Forget the trouble and try (again) to have an inotify instance."""
        self.trouble = ""
        if self._inotify is None:
            try:
                self._inotify = INotify(nonblocking=True)
            except OSError as error:
                self._note(error)

    def watch(self, folder: str, mask: int = NAMES) -> None:
        """Watch what the path leads to now; list the folder after this, or what comes in between is lost.

        A folder that is gone or forbidden is left to the listing. To be repeated now and then: a cgroup folder that is
        removed tells nobody, and only a watch on the new folder gets a new descriptor, which shows that the old one
        is dead (the kernel keeps one watch for each inode, so this compares inodes).
        """
        if self._inotify is None:
            return
        try:
            wd = self._inotify.add_watch(folder, mask | _SELF | flags.ONLYDIR)
        except OSError as error:
            self._drop(folder)
            self._note(error)
            return
        if self._wd_of.get(folder, wd) != wd:
            self._drop(folder)
        self._wd_of[folder] = wd
        self._folder_of[wd] = folder

    def keep_only(self, folders: set[str]) -> None:
        for folder in self._wd_of.keys() - folders:
            self._drop(folder)

    def read(self) -> tuple[list[Event], bool]:
        """What has happened, in order, without waiting; True: something was lost, list everything again."""
        if self._inotify is None:
            return [], False
        events, lost, self.overflowed = [], False, False
        for wd, mask, _, name in self._inotify.read(timeout=0):
            folder = self._folder_of.get(wd)
            if mask & flags.Q_OVERFLOW:
                lost = self.overflowed = True
            elif folder is None:
                continue  # of a watch that was dropped: its folder is another one by now
            elif mask & _LOST:
                lost = True
                if mask & flags.IGNORED:
                    del self._folder_of[wd], self._wd_of[folder]
            else:
                events.append(Event(folder, name, not mask & _GONE))
        return events, lost

    def close(self) -> None:
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None
        self._wd_of.clear()
        self._folder_of.clear()

    def _drop(self, folder: str) -> None:
        wd = self._wd_of.pop(folder, None)
        if wd is None or self._folder_of.pop(wd, None) is None or self._inotify is None:
            return
        try:
            self._inotify.rm_watch(wd)
        except OSError as error:
            if error.errno != errno.EINVAL:  # the kernel has dropped it itself
                raise

    def _note(self, error: OSError) -> None:
        if error.errno in LIMITS:
            self.trouble = LIMITS[error.errno]
