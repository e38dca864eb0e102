"""The holder's guard: a process beside it that only waits for its death, and then kills what it left.

Whoever else would clear up after a holder may have died in the same instant (somebody kills by name, the kernel is short of
memory). The service itself dies with its holder, but not its children: an engine without its server would stay on the
GPUs for ever. The guard does not carry our name, holds nothing and knows one thing: the marker in the environment of
all of the tree. Standard library only; forked from the holder before that has a thread.
"""

import os
import signal
import time
from collections.abc import Callable

from llmwd.adapters import procs

KILLS_EVERY_S = 0.02
KILLS_WITHIN_S = 60.0  # only a process that hangs in a driver outlives SIGKILL by this long


def stand(marker: str, called: Callable[[], None]) -> int:
    """Fork the guard of the calling process; `called` gives it its title. Returns the descriptor for `dismiss`.

    Call it before becoming a subreaper: the guard is to be nobody's child whom a holder waits for.
    """
    reader, writer = os.pipe()
    between = os.fork()
    if between == 0:
        try:
            if os.fork() == 0:
                called()
                os.dup2(reader, 0)
                os.closerange(3, max(map(int, os.listdir("/proc/self/fd"))) + 1)  # the holder's socket must end with it
                _watch(0, marker)
        finally:
            os._exit(0)
    os.close(reader)
    os.waitpid(between, 0)
    return writer


def dismiss(writer: int) -> None:
    """Nothing is left: the guard may go without looking."""
    os.write(writer, b".")
    os.close(writer)


def _watch(reader: int, marker: str) -> None:
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # it ends with the holder, not before
        signal.signal(number, signal.SIG_IGN)
    if os.read(reader, 1):
        return
    end_s = time.monotonic() + KILLS_WITHIN_S
    quiet = 0
    while quiet < 2 and time.monotonic() < end_s:  # twice: one that was forking may be met the second time only
        left = procs.find_marked(marker)
        for pid, start in left:
            procs.signal_process(pid, start, signal.SIGKILL)
        quiet = 0 if left else quiet + 1
        time.sleep(KILLS_EVERY_S)
