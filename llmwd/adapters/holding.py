"""The manager's side of a holder: start one, talk to one, learn how one ended, clear up after a dead one."""

import importlib.util
import os
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from llmwd.adapters import procs
from llmwd.adapters.rundir import write_atomic
from llmwd.messages import HolderSpec, HolderState, ToHolder

_HOME = Path(__file__).resolve().parent.parent.parent  # the folder that holds the package
_PROGRAM = "import sys; sys.path.append(sys.argv[1]); from llmwd.workers import holder; holder.main(sys.argv[2])"
_PACKET_BYTES = 1 << 18
_RETRY_S = 0.002

_encode = msgspec.json.Encoder().encode
_decode_state = msgspec.json.Decoder(HolderState).decode


class HolderLink:
    """One connection to a holder. The first packet on it is the state as it is."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._understood = True

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, message: ToHolder) -> bool:
        """Send an order, without waiting. False: it was not taken; the link is closed, or the holder hangs."""
        try:
            self.sock.send(_encode(message))
        except OSError:
            return False
        return True

    def receive(self) -> list[HolderState] | None:
        """All states that have arrived, oldest first, maybe none; None once the link is closed.

        A packet that cannot be understood (a holder of another version) counts as closed too: nobody
        renews then, and the dead-man's switch ends that tree. After a state with `gone_s`, close the link:
        the holder takes that as read.
        """
        states: list[HolderState] = []
        while self._understood:
            try:
                packet = self.sock.recv(_PACKET_BYTES)
                if packet:
                    states.append(_decode_state(packet))
                    continue
            except BlockingIOError:
                return states
            except OSError:  # reset
                pass
            except msgspec.DecodeError:
                self._understood = False
            break
        return states or None

    def first_states(self, within_s: float) -> list[HolderState]:
        """As receive(), on a new link; none: the holder hangs, for it speaks first, and at once."""
        end_s = time.monotonic() + within_s
        while time.monotonic() < end_s:
            states = self.receive()
            if states is None or states:
                return states or []
            os.sched_yield()
        return []

    def close(self) -> None:
        self.sock.close()


class Tree(msgspec.Struct):
    """Kept in the runtime folder while a tree may exist: what a next incarnation of the manager needs to clear up."""

    marker: str
    pid: int = 0  # the holder's, with its start time: 0 until it has been started
    start: int = 0


def keep_tree(path: Path, tree: Tree) -> None:
    """Raises OSError."""
    write_atomic(path, msgspec.json.encode(tree))


def read_tree(path: Path) -> Tree:
    """Without a marker if there is none; or its file was deleted, and a holder lives all the same: see `find`."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Tree)
    except (FileNotFoundError, NotADirectoryError, PermissionError, msgspec.DecodeError):
        return Tree("")


@dataclass
class HolderProcess:
    """A holder that this process started. `pidfd` is readable once it has ended."""

    pid: int
    pidfd: int
    _popen: subprocess.Popen

    def fileno(self) -> int:
        return self.pidfd

    def reap(self) -> int | None:
        """Its exit status once it has ended (>= 0 exit code, < 0 minus the signal), None before. Never waits."""
        return self._popen.poll()

    def close(self) -> None:
        """Forget it; it goes on if it still runs, and is the root's once we have ended."""
        os.close(self.pidfd)
        self._popen.returncode = self._popen.returncode or 0  # no ResourceWarning that it still runs


def launch(spec: HolderSpec, root_fd: int | None) -> HolderProcess:
    """Start a holder for `spec`. `root_fd`: read end of the pipe whose closing says that the root is dead.

    Returns at once; `connect` waits for it. What an earlier holder left at `<socket>.last` is removed.
    Raises OSError if no process can be started.
    """
    Path(f"{spec.socket}.last").unlink(missing_ok=True)
    words = os.memfd_create("llmwd-holder-spec")  # a pipe would have to be fed, and block beyond 64 KiB
    try:
        os.write(words, _encode(spec))
        os.lseek(words, 0, os.SEEK_SET)
        popen = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, str(_HOME), "-" if root_fd is None else str(root_fd), spec.service],
            stdin=words,
            stdout=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if name != procs.MARKER},
            pass_fds=() if root_fd is None else (root_fd,),
            start_new_session=True,
        )
    finally:
        os.close(words)
    return HolderProcess(popen.pid, os.pidfd_open(popen.pid), popen)


def site_folder() -> str | None:
    """The folder that holds setproctitle, for `HolderSpec.site`; None if it is not installed."""
    found = importlib.util.find_spec("setproctitle")
    return str(Path(found.origin).parent.parent) if found and found.origin else None


def connect(path: str, within_s: float) -> HolderLink | None:
    """A link to the holder that listens on `path`, tried again for `within_s` seconds (0: once).

    None: nobody listens, or somebody who is not our user.
    """
    end = time.monotonic() + within_s
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            sock.connect(path)
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            sock.close()
            if time.monotonic() >= end:
                return None
            time.sleep(_RETRY_S)
            continue
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != os.geteuid():
            sock.close()
            return None
        return HolderLink(sock)


def last_words(path: str) -> HolderState | None:
    """What the holder of the socket `path` left behind because nobody read its end; removes it.

    None: nothing there, not our user's, or not understood.
    """
    name = f"{path}.last"
    try:
        with open(name, "rb") as file:
            own = os.fstat(file.fileno()).st_uid == os.geteuid()
            text = file.read()
        os.unlink(name)
        return _decode_state(text) if own else None
    except (FileNotFoundError, PermissionError, msgspec.DecodeError):
        return None


def find(service: str) -> tuple[int, int] | None:
    """(pid, start) of a holder of this service whose manager has died: the root, a subreaper, has it for its child then."""
    for pid in procs.children(os.getppid()):
        found, words = procs.stat(pid), procs.cmdline(pid).rstrip(b"\0").split(b"\0")
        if found is None or found.dead:
            continue
        if words[0] == f"llmwd: holder {service}".encode() or (_PROGRAM.encode() in words and words[-1] == service.encode()):
            return pid, found.start
    return None
