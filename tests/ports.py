"""Ports for servers that are started a while after the port was chosen."""

import collections
import random
import socket

# Below the range that the kernel takes ports from (ip_local_port_range): it gives none of these to anybody meanwhile.
FIRST, LAST = 12_000, 32_000
_claims: collections.deque[socket.socket] = collections.deque(maxlen=64)


def free_port() -> int:
    """Free on 127.0.0.1, and given to no other test beside this one, in whatever process, until 64 more were asked for."""
    while True:
        port = random.randrange(FIRST, LAST)
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0llmwd-test-port-{port}")  # an abstract name: one process has it, and it goes with its owner
            with socket.socket() as trial:
                trial.bind(("127.0.0.1", port))
        except OSError:
            claim.close()
            continue
        if len(_claims) == _claims.maxlen:
            _claims.popleft().close()
        _claims.append(claim)
        return port
