"""The holder's end of its socket: any number listen, orders arrive. Standard library only.

SOCK_SEQPACKET: one packet is one message, and a closed connection is told apart from a dead reader:
a peer that ended with unread packets resets the connection, one that has read them all closes it in order.
"""

import os
import select
import socket
import struct
import sys
from collections.abc import Callable

from llmwd.adapters import procs

PACKET_BYTES = 1 << 16
CLIENTS_MOST = 8


class Loop:
    """poll(2) with a handler for each file descriptor."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[], None]] = {}

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        """Call `handler` whenever `fd` can be read, or has been closed at its other end."""
        self._handlers[fd] = handler
        self._poll.register(fd, select.POLLIN)

    def watch_writing(self, fd: int, wanted: bool) -> None:
        """Call the handler of `fd` when it can be written, too."""
        self._poll.modify(fd, select.POLLIN | (select.POLLOUT if wanted else 0))

    def unwatch(self, fd: int) -> None:
        """Forget `fd`; before it is closed."""
        if self._handlers.pop(fd, None):
            self._poll.unregister(fd)

    def turn(self, timeout_s: float | None) -> None:
        """Wait once, at most `timeout_s`, and call the handlers of what is ready."""
        for fd, _ in self._poll.poll(None if timeout_s is None else max(0.0, timeout_s * 1000)):
            if handler := self._handlers.get(fd):  # the handler before it may have removed it
                handler()


class HolderSocket:
    """Listens on `path` (0600). `state` gives the packet to send, `refresh` is called before a newcomer's,
    `obey(packet, newest)` gets what arrives and whether it came on the manager's newest connection.

    kin: the root's pid; its children are managers, all others are strangers, who neither push a manager's connection
    out nor count as a newer one. None: all are managers."""

    def __init__(
        self, path: str, loop: Loop, state: Callable[[], bytes], refresh: Callable[[], None],
        obey: Callable[[bytes, bool], None], kin: int | None = None,
    ) -> None:  # fmt: skip
        self.path, self._loop, self._kin = path, loop, kin
        self._state, self._refresh, self._obey = state, refresh, obey
        self.clients: list[socket.socket] = []
        self._strangers: list[socket.socket] = []  # of the clients
        self._behind: set[socket.socket] = set()  # could not take the last state at once
        self.met = False  # somebody ever connected
        self.final = False  # the state is the last one
        self.final_read = False  # and somebody has read it
        self._listener = self._listen()
        loop.watch(self._listener.fileno(), self._accept)

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        probe = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            probe.connect(self.path)
            sys.exit(f"llmwd holder: another holder answers on {self.path}; it must end first")
        except (FileNotFoundError, ConnectionRefusedError):
            pass
        finally:
            probe.close()
        if os.path.lexists(self.path):
            os.unlink(self.path)
        before = os.umask(0o177)
        listener.bind(self.path)
        os.umask(before)
        listener.listen(CLIENTS_MOST)
        return listener

    def stop_listening(self) -> None:
        """Before the last state is sent: whoever reads it may start the next holder on the same path."""
        if self._listener.fileno() >= 0:
            self._loop.unwatch(self._listener.fileno())
            if os.path.lexists(self.path):
                os.unlink(self.path)
            self._listener.close()

    def publish(self) -> None:
        """The whole state to everybody."""
        packet = self._state()
        for client in list(self.clients):
            self._send(client, packet)

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:  # it went away again
            return
        pid, uid, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        stranger = self._kin is not None and not self._is_child_of_root(pid)
        full = len(self.clients) >= CLIENTS_MOST
        if uid != os.geteuid() or (full and stranger and not self._strangers):
            client.close()
            return
        if full:
            self._drop((self._strangers or self.clients)[0])
        client.setblocking(False)
        self.clients.append(client)
        if stranger:
            self._strangers.append(client)
        self._loop.watch(client.fileno(), lambda: self._hear(client))
        self.met = True
        if self.final:
            self.stop_listening()
        self._refresh()
        self._send(client, self._state())

    def _is_child_of_root(self, pid: int) -> bool:
        try:
            found = procs.stat(pid)
        except OSError:  # no descriptor is free
            return False
        return found is not None and found.ppid == self._kin

    def _hear(self, client: socket.socket) -> None:
        if client in self._behind:
            self._behind.discard(client)
            self._loop.watch_writing(client.fileno(), False)
            self._send(client, self._state())
        try:
            packet = client.recv(PACKET_BYTES)
        except BlockingIOError:
            return
        except OSError:  # reset: it ended without having read all
            self._drop(client)
            return
        if not packet:
            self.final_read |= self.final and client not in self._behind
            self._drop(client)
        else:
            managers = [each for each in self.clients if each not in self._strangers]
            self._obey(packet, client is managers[-1] if managers else False)

    def _send(self, client: socket.socket, packet: bytes) -> None:
        try:
            client.send(packet)
        except BlockingIOError:  # it does not read: it gets the newest state once it does
            self._behind.add(client)
            self._loop.watch_writing(client.fileno(), True)
        except OSError:
            self._drop(client)

    def _drop(self, client: socket.socket) -> None:
        if client in self.clients:
            self._loop.unwatch(client.fileno())
            self.clients.remove(client)
            if client in self._strangers:
                self._strangers.remove(client)
            self._behind.discard(client)
            client.close()
