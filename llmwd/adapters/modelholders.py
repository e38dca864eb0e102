"""Who of a service's tree holds the model, so that the holder can say when the last of them has ended. Standard library only.

Everything may hold it but multiprocessing's bookkeeper, which ends by itself once it has removed the dead's shared memory,
and but the server unless it is alone. Who is a bookkeeper is read from its command line, while nothing is in a hurry and
in a thread: the read waits, maybe for ever, for a process that hangs in a driver with its memory locked.
"""

import _thread
import os

from llmwd.adapters import procs
from llmwd.adapters.holdersocket import Loop

WATCHED_MOST = 128  # pidfds held at once; further processes are looked at on every turn
LOOKS = 2  # at a process: between fork and exec it still has its parent's command line
READ_WITHIN_S = 0.05


class ModelHolders:
    """`tidies`: (pid, start) of the bookkeepers."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._held: dict[int, tuple[int, int | None]] = {}  # pid -> start and pidfd
        self._looks: dict[tuple[int, int], int] = {}
        self._reads = _thread.allocate_lock()
        self.tidies: frozenset[tuple[int, int]] = frozenset()

    def __bool__(self) -> bool:
        return bool(self._held)

    def learn(self, living: dict[int, int]) -> None:
        """Look at who is new among pid -> start. Not again while a look hangs."""
        self._looks = {each: looks for each, looks in self._looks.items() if living.get(each[0]) == each[1]}
        new = [each for each in living.items() if self._looks.get(each, 0) < LOOKS]
        if new and self._reads.acquire(False):
            try:
                _thread.start_new_thread(self._read, (new,))
            except RuntimeError:  # no memory for a thread
                self._reads.release()
            else:
                if self._reads.acquire(timeout=READ_WITHIN_S):
                    self._reads.release()

    def _read(self, new: list[tuple[int, int]]) -> None:
        try:
            for pid, start in new:
                self._looks[pid, start] = self._looks.get((pid, start), 0) + 1
                if b"multiprocessing.resource_tracker" in procs.cmdline(pid) and procs.alive(pid, start):
                    self.tidies |= {(pid, start)}
        except OSError:  # no descriptor is free: then nobody is one
            pass
        finally:
            self._reads.release()

    def take(self, pid: int, main: int | None) -> None:
        """This process is about to be signalled. main: the server's pid."""
        found = procs.stat(pid)
        if pid in self._held or found is None or found.dead or (pid, found.start) in self.tidies:
            return
        fd = None
        if len(self._held) < WATCHED_MOST:
            try:
                fd = procs.open_process(pid, found.start)
            except OSError:  # none is free: signals need them more
                pass
        if fd is not None:
            self._loop.watch(fd, lambda: None)  # wakes the loop, which then looks at all of them
        self._held[pid] = found.start, fd
        if pid != main and main in self._held:
            self._let_go(main)

    def _let_go(self, pid: int) -> None:
        self._close(self._held.pop(pid)[1])

    def _close(self, fd: int | None) -> None:
        if fd is not None:
            self._loop.unwatch(fd)
            os.close(fd)

    def free_descriptors(self) -> None:
        """All are looked at on every turn from now on."""
        for pid, (start, fd) in self._held.items():
            self._close(fd)
            self._held[pid] = start, None

    def gone(self) -> bool:
        """Whether none of them lives any more."""
        for pid in [pid for pid, (start, _) in self._held.items() if not procs.alive(pid, start)]:
            self._let_go(pid)
        return not self._held
