"""What a dead or lost holder leaves is killed, and met until it has ended. Standard library only: the guard uses it, too."""

import signal
from collections.abc import Callable, Iterable

from llmwd.adapters import procs

QUIET = 2  # looks that find nobody: who was forking just then may be met the second time only


class Sweep:
    """The end of one tree. `dying`: what was killed and has not ended yet, remembered, because a dying process loses its
    environment, and with it the marker, long before a driver has freed its GPU."""

    def __init__(self, marker: str, holder: tuple[int, int] | None, known: Iterable[tuple[int, int]] = ()) -> None:
        """`holder`, `known`: (pid, start) of the holder and of what it had in its tree."""
        self._marker, self._holder, self._known = marker, holder, tuple(known)
        self.dying: dict[int, int] = {}
        self._quiet = 0

    def step(self, log: Callable[[str], None]) -> bool:
        """SIGKILL to what is there now; whether nothing is left. Call it until then."""
        quiet = not self.dying
        # Those found by their place in the tree come first: the others' environments may keep us waiting. A holder that
        # is stopped has its children still; some of them may have put away the marker.
        if self._holder is not None and procs.alive(*self._holder):
            for pid, found in procs.walk(self._holder[0]):
                if not found.dead:
                    self._kill(pid, found.start, log)
            self._kill(*self._holder, log)
        for pid, start in self._known:
            if procs.alive(pid, start):
                self._kill(pid, start, log)
        for pid, start in procs.find_marked(self._marker, self.dying):
            self._kill(pid, start, log)
        quiet = quiet and not self.dying
        self.dying = {pid: start for pid, start in self.dying.items() if procs.alive(pid, start)}
        self._quiet = self._quiet + 1 if quiet else 0
        return self._quiet >= QUIET

    def _kill(self, pid: int, start: int, log: Callable[[str], None]) -> None:
        if self.dying.get(pid) != start and procs.signal_process(pid, start, signal.SIGKILL):
            self.dying[pid] = start
            log(f"killed process {pid}, left over from the tree {self._marker}")
