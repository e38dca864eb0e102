"""The manager's side of a holder: start one, talk to one, learn how one ended, clear up after a dead one."""

import importlib.util
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from llmwd.adapters import procs
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

    def close(self) -> None:
        self.sock.close()


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
            [sys.executable, "-I", "-S", "-c", _PROGRAM, str(_HOME), "-" if root_fd is None else str(root_fd)],
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


def sweep(marker: str, log: Callable[[str], None], within_s: float = 1.0) -> list[int]:
    """SIGKILL what is left of a tree whose holder is dead, and wait for its end, at most `within_s`.

    Returns the pids that have not ended even so: call again; []: nothing is left. It waits here because a
    dying process loses its environment, and with it the marker, before the driver has freed its GPU.
    Only processes of our own user that carry the marker are signalled. Never call it while the holder lives.
    """
    end = time.monotonic() + within_s
    dying: dict[tuple[int, int], int] = {}  # (pid, start) -> pidfd
    try:
        while True:
            for pid, start in procs.find_marked(marker):
                if (pid, start) in dying or (fd := procs.open_process(pid, start)) is None:
                    continue
                dying[pid, start] = fd
                procs.send(fd, signal.SIGKILL)
                log(f"killed process {pid}, left over from the tree {marker}")
            left = [pid for pid, start in dying if procs.alive(pid, start)]
            if not left or time.monotonic() >= end:
                return left
            time.sleep(_RETRY_S)
    finally:
        for fd in dying.values():
            os.close(fd)
