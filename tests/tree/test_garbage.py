"""Garbage on the sockets of the runtime folder does no harm."""

import os
import random
import signal
import socket
from pathlib import Path

import msgspec
import zmq

from llmwd.messages import ResumeOrder
from tests.tree.conftest import Start
from tests.waiting import wait_until

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)  # of ZMTP 3.0, so that what follows is read as frames


def throw(path: Path, kind: int, data: bytes) -> None:
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.settimeout(5)
        try:
            sock.connect(str(path))
            sock.sendall(data)
            sock.recv(100)
        except OSError:  # it may well hang up
            pass


def test_raw_bytes_on_every_socket_change_nothing(supervised: Start) -> None:
    tree = supervised()
    tree.all_ready()
    before = tree.pids()
    dice = random.Random(1)
    paths = [path for path in tree.runtime.iterdir() if path.is_socket()]
    assert {path.name.split("-")[0] for path in paths} == {"bus", "desk", "holder"} and len(paths) >= 8
    for path in paths:
        kind = socket.SOCK_SEQPACKET if path.name.startswith("holder") else socket.SOCK_STREAM
        for data in (b"\x00", b"{}", b'{"type":"renew","expires_s":"never"}', b'{"type":"release"}', dice.randbytes(5000),
                     GREETING + b"\x02" + b"\xff" * 8 + dice.randbytes(100)):
            throw(path, kind, data)
    assert tree.answers()
    tree.job(1, "0")
    tree.until(lambda status: status["jobs"])
    assert tree.pids() == before


def test_well_formed_messages_full_of_garbage_change_nothing(supervised: Start) -> None:
    tree = supervised()
    tree.all_ready()
    before = tree.pids()
    dice = random.Random(2)
    order = msgspec.msgpack.encode(ResumeOrder(by="x"))
    with zmq.Context() as context:
        for path in [path for path in tree.runtime.iterdir() if path.is_socket() and "holder" not in path.name]:
            for kind in (zmq.DEALER, zmq.SUB if path.name.startswith("bus") else zmq.REQ, zmq.XSUB):
                with context.socket(kind) as sock:
                    sock.setsockopt(zmq.LINGER, 200)
                    sock.connect(f"ipc://{path}")
                    if kind == zmq.SUB:
                        sock.setsockopt(zmq.SUBSCRIBE, dice.randbytes(200))
                        continue
                    sock.send(dice.randbytes(300), zmq.NOBLOCK)
                    if kind != zmq.REQ:
                        sock.send_multipart([b"", b"", order[:-1]], zmq.NOBLOCK)
                        sock.send(b"", zmq.NOBLOCK)
        with context.socket(zmq.REQ) as desk:
            desk.setsockopt(zmq.LINGER, 0)
            desk.connect(f"ipc://{tree.runtime}/desk-resolver")
            desk.send(b"\xc1 not an order")
            assert desk.poll(5000) and b"refused" in desk.recv()
    assert tree.answers() and tree.ctl("resume").returncode == 0
    assert tree.pids() == before


def test_only_we_can_reach_the_sockets(supervised: Start) -> None:
    tree = supervised()
    tree.all_ready()
    for folder in (tree.runtime, tree.runtime / "facts", tree.state):
        assert os.stat(folder).st_mode & 0o077 == 0


def test_facts_that_cannot_be_read_are_taken_for_none(supervised: Start) -> None:
    """What a dying disk makes of the retained facts must neither stop `status` nor the next incarnation."""
    tree = supervised()
    tree.all_ready()
    pids = tree.pids()
    for path in (tree.runtime / "facts").glob("*.bin"):
        path.write_bytes(os.urandom(100))
    assert tree.ctl("status", "--json").returncode == 0
    tree.signal_pid(pids["resolver"], signal.SIGKILL)
    tree.signal_pid(pids["vllm"], signal.SIGKILL)
    tree.until(lambda status: {worker["restarts"] for worker in status["workers"] if worker["name"] in ("resolver", "vllm")} == {1})
    wait_until(tree.answers)  # the lease that nobody remembers has ended, and another one was granted
    tree.all_ready()
