"""The holder's guard: a process beside it that waits for its death, or its silence, and then kills what it left.

Whoever else would clear up after a holder may have died in the same instant (somebody kills by name, the kernel is short of
memory), or be stopped. The service itself dies with its holder, but not its children: an engine without its server would
stay on the GPUs for ever. The guard does not carry our name, holds nothing, and knows what the holder writes on a board
that both have in memory (a pipe would fill while the guard is stopped): by when it will have written anew or have ended
its tree, and who is in that tree. Standard library only.
"""

import math
import mmap
import os
import select
import signal
import struct
import time
from collections.abc import Callable

from llmwd.adapters import procs
from llmwd.adapters.sweeping import Sweep

LATE_S = 1.25  # so long after its own word a holder counts as lost; its manager, who can tell of it, is a little sooner
KILLS_EVERY_S = 0.02
KILLS_WITHIN_S = 60.0  # only a process that hangs in a driver outlives SIGKILL by this long
_BOARD_BYTES = 4096
_HEAD, _ENTRY = struct.Struct("dQ"), struct.Struct("QQ")  # by_s, how many; pid, start
_MOST = (_BOARD_BYTES - _HEAD.size) // _ENTRY.size  # of a larger tree the rest is found by the marker
_OVER, _LOOK = b".", b"!"


class Guard:
    """The holder's end of its guard."""

    def __init__(self, marker: str, called: Callable[[], None]) -> None:
        """`called` gives the guard its title."""
        self._marker, self._called = marker, called
        self._board = mmap.mmap(-1, _BOARD_BYTES)
        self._holder = os.getpid(), procs.start_ticks(os.getpid()) or 0
        self._writer = -1
        self._by_s = math.inf
        self.tell(math.inf, {})

    def stand(self) -> None:
        """Fork it; again if it was killed. Not a child of the holder, which waits for all of its children. Raises OSError.

        (A fork beside the holder's threads: the child takes no lock of theirs.)"""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        procs.set_subreaper(False)
        try:
            between = os.fork()
            if between == 0:
                self._be_guard(reader)
            os.waitpid(between, 0)
        except OSError:
            os.close(writer)
            raise
        finally:
            procs.set_subreaper()
            os.close(reader)
        self._writer = writer

    def fileno(self) -> int:
        """Tells by an error that the guard is dead."""
        return self._writer

    def died(self) -> None:
        os.close(self._writer)
        self._writer = -1

    def tell(self, by_s: float, tree: dict[int, int]) -> None:
        """By when the next word comes at the latest; pid -> start of those in the tree."""
        entries = list(tree.items())[:_MOST]
        for number, entry in enumerate(entries):
            _ENTRY.pack_into(self._board, _HEAD.size + number * _ENTRY.size, *entry)
        _HEAD.pack_into(self._board, 0, by_s, len(entries))
        sooner, self._by_s = by_s < self._by_s, by_s
        if sooner:
            self._say(_LOOK)

    def dismiss(self) -> None:
        """Nothing is left: it may go without looking."""
        self._say(_OVER)

    def _say(self, word: bytes) -> None:
        try:
            os.write(self._writer, word)
        except OSError:  # it is stopped and has been told often enough, or dead
            pass

    def _be_guard(self, reader: int) -> None:
        try:
            if os.fork() == 0:
                self._called()
                os.dup2(reader, 0)
                os.closerange(3, max(map(int, os.listdir("/proc/self/fd"))) + 1)  # the holder's socket must end with it
                self._watch()
        finally:
            os._exit(0)

    def _watch(self) -> None:
        os.setsid()
        # Its parent is the root by now: if that dies while this is stopped, it runs again and sees the holder's end.
        procs.set_pdeathsig(signal.SIGCONT)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # it ends with the holder, not before
            signal.signal(number, signal.SIG_IGN)
        poll = select.poll()
        poll.register(0, select.POLLIN)
        while (left_s := _HEAD.unpack_from(self._board)[0] + LATE_S - time.monotonic()) > 0:
            if poll.poll(None if left_s == math.inf else left_s * 1000):
                words = os.read(0, 4096)
                if _OVER in words:
                    return
                if not words:
                    break
        _, count = _HEAD.unpack_from(self._board)
        known = [_ENTRY.unpack_from(self._board, _HEAD.size + number * _ENTRY.size) for number in range(count)]
        sweep = Sweep(self._marker, self._holder, known)
        end_s = time.monotonic() + KILLS_WITHIN_S
        while not sweep.step(lambda text: None) and time.monotonic() < end_s:
            time.sleep(KILLS_EVERY_S)
