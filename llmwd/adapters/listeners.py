"""Who listens on a port of this node, by /proc/net/tcp: on a shared node, anybody may."""

from pathlib import Path

LISTENING = "0A"


def owners(port: int) -> set[int]:
    """The users (uids) who listen on it, at whatever address; empty: nobody, or the kernel does not tell."""
    found = set()
    for name in ("tcp", "tcp6"):
        try:
            lines = Path("/proc/net", name).read_text().splitlines()[1:]
        except OSError:
            continue
        for words in map(str.split, lines):
            if len(words) > 7 and words[3] == LISTENING and int(words[1].rpartition(":")[2], 16) == port:
                found.add(int(words[7]))
    return found
