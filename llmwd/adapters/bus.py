"""ZeroMQ, the one door to it: the bus (facts, XPUB/SUB) and the desk's server side (orders, ROUTER).

Measured with pyzmq 27: what is sent just after a SUB connects is lost, and a slow SUB loses messages without
an error. Hence whole snapshots, repeated, and XPUB: it sees every new subscription and answers it with the
current snapshot, so a late or restarted reader is never blind.
"""

import errno
import itertools
import os
import time
from pathlib import Path

import msgspec
import zmq

from llmwd.adapters.rundir import retain_fact
from llmwd.messages import Envelope, Fact, Order, Refused, Reply

HIGH_WATER_MARK = 1000
LARGEST_BYTES = 4 << 20


def bus_endpoint(runtime: Path, worker: str) -> str:
    return f"ipc://{runtime}/bus-{worker}"


def desk_endpoint(runtime: Path, worker: str) -> str:
    return f"ipc://{runtime}/desk-{worker}"


def _has_arrived(socket: zmq.Socket) -> bool:
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)


def _socket(context: zmq.Context, kind: int) -> zmq.Socket:
    made = context.socket(kind)
    made.setsockopt(zmq.LINGER, 0)
    made.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    made.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    made.setsockopt(zmq.MAXMSGSIZE, LARGEST_BYTES)  # a length made of garbage must not be allocated
    return made


class Publisher:
    """A worker's own endpoint of the bus."""

    def __init__(self, context: zmq.Context, runtime: Path, worker: str):
        self._runtime = runtime
        self._worker = worker
        self._epoch = time.monotonic_ns()
        self._seq = itertools.count(1)
        self._last: bytes | None = None
        self.socket = _socket(context, zmq.XPUB)
        self.socket.setsockopt(zmq.XPUB_VERBOSE, 1)  # every new reader counts, not only the first of a topic
        self.socket.bind(bus_endpoint(runtime, worker))

    def publish(self, fact: Fact) -> str | None:
        """Send and retain; the error's text if it could not be retained (the bus has it all the same).

        Raises OSError without any file descriptor left: the worker's next incarnation has them again.
        """
        envelope = Envelope(sender=self._worker, pid=os.getpid(), epoch=self._epoch, seq=next(self._seq), fact=fact)
        self._last = msgspec.msgpack.encode(envelope)
        self._send()
        try:
            retain_fact(self._runtime, self._worker, self._last)
        except OSError as error:
            if error.errno == errno.EMFILE:
                raise
            return f"the latest fact could not be written to {self._runtime}: {error.strerror}"
        return None

    def on_readable(self) -> None:
        """Answer new subscriptions with the current snapshot."""
        asked = False
        while _has_arrived(self.socket):
            asked |= self.socket.recv(zmq.NOBLOCK)[:1] == b"\x01"
        if asked and self._last is not None:
            self._send()

    def _send(self) -> None:
        self.socket.send_multipart([self._worker.encode(), self._last], zmq.NOBLOCK)


class Subscriber:
    """One socket that listens to any number of workers; gives each fact once, in order."""

    def __init__(self, context: zmq.Context, runtime: Path):
        self._runtime = runtime
        self._decoder = msgspec.msgpack.Decoder(Envelope)
        self._newest: dict[str, tuple[int, int]] = {}
        self.socket = _socket(context, zmq.SUB)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)

    def listen_to(self, worker: str) -> None:
        self.socket.setsockopt(zmq.SUBSCRIBE, worker.encode())
        self.socket.connect(bus_endpoint(self._runtime, worker))

    def receive(self) -> list[Envelope]:
        """What has arrived: for each sender the newest only, since facts are whole snapshots."""
        newest: dict[str, Envelope] = {}
        while _has_arrived(self.socket):
            frames = self.socket.recv_multipart(zmq.NOBLOCK)
            try:
                envelope = self._decoder.decode(frames[-1])
            except msgspec.DecodeError:
                continue  # not of our making; the next snapshot repeats the truth
            place = (envelope.epoch, envelope.seq)
            if place > self._newest.get(envelope.sender, (0, 0)):
                self._newest[envelope.sender] = place
                newest[envelope.sender] = envelope
        return list(newest.values())


class DeskServer:
    """Takes orders from llmwd-ctl and sends each one's reply."""

    def __init__(self, context: zmq.Context, runtime: Path, worker: str):
        self._decoder = msgspec.msgpack.Decoder(Order)
        self.socket = _socket(context, zmq.ROUTER)
        self.socket.bind(desk_endpoint(runtime, worker))

    def receive(self) -> list[tuple[list[bytes], Order]]:
        """(where the reply goes, the order) for each well-formed request; the others are refused here."""
        orders = []
        while _has_arrived(self.socket):
            frames = self.socket.recv_multipart(zmq.NOBLOCK)
            back = frames[:-1]
            try:
                orders.append((back, self._decoder.decode(frames[-1])))
            except msgspec.DecodeError as error:
                self.reply(back, Refused(problems=(f"not an order that this version understands: {error}",)))
        return orders

    def reply(self, back: list[bytes], reply: Reply) -> None:
        self.socket.send_multipart([*back, msgspec.msgpack.encode(reply)], zmq.NOBLOCK)
