"""Who listens on a port of this node, and whether we could: on a shared node, anybody may.

Asked of the kernel by sock_diag(7), which looks at listeners alone. /proc/net/tcp walks the table of all connections, which on
a node with much memory takes it milliseconds even when there is none (6.6 ms here, for 262,144 buckets; this takes 0.03 ms).
"""

import socket
import struct
from pathlib import Path

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_DUMP = 0x1, 0x300
TCP_LISTEN = 10
HEADER = struct.Struct("=IHHII")  # nlmsghdr
REQUEST = struct.Struct("=BBBxI")  # inet_diag_req_v2 up to its inet_diag_sockid, which begins with the source port
SOCKID_BYTES = 48
UID_AT = HEADER.size + 4 + SOCKID_BYTES + 12  # inet_diag_msg: after expires, rqueue and wqueue
ANSWER_BYTES = 1 << 16
WITHIN_S = 1.0


def owners(port: int) -> set[int]:
    """The users (uids) who listen on it, at whatever address; empty: nobody, or the kernel does not tell."""
    try:
        return asked(port)
    except (OSError, struct.error):  # a kernel without tcp_diag, or a sandbox that lets nobody ask
        return read(port)


def is_free(port: int) -> bool:
    """Whether we could listen on it at 127.0.0.1, as Caddy would."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def asked(port: int) -> set[int]:
    """The same by sock_diag. Raises OSError, struct.error where it does not answer as it should."""
    found: set[int] = set()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG) as kernel:
        kernel.settimeout(WITHIN_S)
        for family in (socket.AF_INET, socket.AF_INET6):
            wanted = struct.pack("!H", port) + bytes(SOCKID_BYTES - 2)
            body = REQUEST.pack(family, socket.IPPROTO_TCP, 0, 1 << TCP_LISTEN) + wanted
            header = HEADER.pack(HEADER.size + len(body), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, family, 0)
            kernel.send(header + body)
            while _take(kernel.recv(ANSWER_BYTES), port, found):
                pass
    return found


def _take(answer: bytes, port: int, found: set[int]) -> bool:
    """Add the uids of one packet of the answer; whether more will come."""
    at = 0
    while at < len(answer):
        length, kind, *_ = HEADER.unpack_from(answer, at)
        if kind == NLMSG_DONE:
            return False
        if kind == NLMSG_ERROR or length < HEADER.size:
            raise OSError("sock_diag does not tell")
        if struct.unpack_from("!H", answer, at + HEADER.size + 4)[0] == port:
            found.add(struct.unpack_from("=I", answer, at + UID_AT)[0])
        at += (length + 3) & ~3
    return True


def read(port: int) -> set[int]:
    """The same by /proc/net/tcp and tcp6."""
    found = set()
    for name in ("tcp", "tcp6"):
        try:
            lines = Path("/proc/net", name).read_text().splitlines()[1:]
        except OSError:
            continue
        for words in map(str.split, lines):
            if len(words) > 7 and int(words[3], 16) == TCP_LISTEN and int(words[1].rpartition(":")[2], 16) == port:
                found.add(int(words[7]))
    return found
