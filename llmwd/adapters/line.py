"""The line between root and worker: a SOCK_SEQPACKET pair made before the fork.

Reliable, ordered, keeps packet boundaries, and its end of file tells a worker that the root died.
"""

import socket
from types import UnionType

import msgspec

from llmwd.messages import ToRoot, ToWorker

PACKET_BYTES = 4096


class Line:
    """One end. `incoming` is the union of messages that arrive here."""

    def __init__(self, end: socket.socket, incoming: UnionType):
        end.setblocking(False)
        self._end = end
        self._decoder: msgspec.msgpack.Decoder[ToRoot | ToWorker] = msgspec.msgpack.Decoder(incoming)
        self.closed = False

    def fileno(self) -> int:
        return self._end.fileno()

    def send(self, message: ToRoot | ToWorker) -> bool:
        """False if the other side is gone or does not read (a heartbeat that nobody reads is no loss)."""
        try:
            self._end.send(msgspec.msgpack.encode(message), socket.MSG_NOSIGNAL)
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            return False
        return True

    def receive(self) -> list[ToRoot | ToWorker]:
        """What has arrived; sets `closed` at the end of file."""
        messages: list[ToRoot | ToWorker] = []
        while True:
            try:
                packet = self._end.recv(PACKET_BYTES)
            except BlockingIOError:
                return messages
            except ConnectionResetError:
                packet = b""
            if not packet:
                self.closed = True
                return messages
            try:
                messages.append(self._decoder.decode(packet))
            except msgspec.DecodeError:
                continue  # the line carries nothing that is not repeated or answered otherwise

    def close(self) -> None:
        self._end.close()


def line_pair() -> tuple[Line, Line]:
    """(root's end, worker's end)."""
    root, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Line(root, ToRoot), Line(worker, ToWorker)
