"""TCP ports for programs that are started later: free now, and nobody else's until this process ends."""

import contextlib
import functools
import random
import socket
from pathlib import Path

FIRST = 11_000  # browsers refuse 10080
_held: list[socket.socket] = []


@functools.cache
def _last() -> int:
    """Below those that the kernel gives away by itself, to clients and to whoever asks for any port, if these leave enough."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    return (first if first > 2 * FIRST else 3 * FIRST) - 1


def free_port() -> int:
    """A port that looked free a moment ago may be taken before the program that it is for binds it, or between two
    starts of it. So it is none that the kernel chooses from, and other tests that choose here see that it is ours:
    by the name of a socket, which ends with this process however that ends."""
    while True:
        port = random.randint(FIRST, _last())
        with contextlib.ExitStack() as opened:
            mark = opened.enter_context(socket.socket(socket.AF_UNIX))
            try:
                mark.bind(f"\0llmwd-test-port-{port}")
                with socket.socket() as trial:
                    trial.bind(("", port))
            except OSError:
                continue
            opened.pop_all()
            _held.append(mark)
            return port
