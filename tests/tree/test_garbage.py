"""Garbage on the sockets of the runtime folder does no harm."""

import os
import random
import signal
import socket
from pathlib import Path

import msgspec
import zmq

from llmwd.messages import LONGEST_S, NotifyOrder, Order, ReleaseOrder, Reply, ResetOrder, ResumeOrder, SwitchOrder, YieldOrder
from tests.tree.conftest import Start
from tests.tree.supervised import Supervised
from tests.waiting import wait_until

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)  # of ZMTP 3.0, so that what follows is read as frames


def throw(path: Path, kind: int, data: bytes) -> None:
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.settimeout(1)  # Caddy waits for more of a request
        try:
            sock.connect(str(path))
            sock.sendall(data)
            sock.recv(100)
        except OSError:  # it may well hang up
            pass


def test_raw_bytes_on_every_socket_change_nothing(supervised: Start) -> None:
    """Caddy's own, which people reach and which we configure it by, among them."""
    tree = supervised(DOOR="true")
    tree.all_ready()
    tree.until(lambda status: status["door"]["reachable"], what="Caddy")  # it may take longer than the model
    before = tree.pids()
    dice = random.Random(1)
    paths = [path for path in tree.runtime.iterdir() if path.is_socket()]
    assert {path.name.split("-")[0] for path in paths} == {"bus", "desk", "holder", "door", "door.sock"} and len(paths) >= 12
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
    tree = supervised(DOOR="true")
    tree.all_ready()
    before = tree.pids()
    dice = random.Random(2)
    order = msgspec.msgpack.encode(ResumeOrder(by="x"))
    with zmq.Context() as context:
        for path in [path for path in tree.runtime.iterdir() if path.name.startswith(("bus-", "desk-"))]:
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
            assert desk.poll(30_000) and b"refused" in desk.recv()
    assert tree.answers() and tree.ctl("resume").returncode == 0
    assert tree.pids() == before


NAN, INF = float("nan"), float("inf")
LONG, ODD = "x" * 50_000, "\x1b[2J\0"
# The decoder takes none of them: it is not for a worker's arithmetic to meet them.
ABSURD = (
    *(YieldOrder(by="x", for_s=for_s) for for_s in (NAN, INF, -INF, -1e300, 1e300)), YieldOrder(by=LONG, for_s=1), YieldOrder(by=ODD, for_s=1),
    *(ReleaseOrder(job="7", gpus=(), within_s=within_s, by="x") for within_s in (NAN, INF, -INF, -1.0, 1e300)),
    ReleaseOrder(job="7", gpus=(-1,), within_s=1.0, by="x"), ReleaseOrder(job="7", gpus=(1 << 62,), within_s=1.0, by="x"),
    ReleaseOrder(job="7", gpus=(0,) * 100_000, within_s=1.0, by="x"), ReleaseOrder(job=LONG, gpus=(0,), within_s=1.0, by="x"),
    ReleaseOrder(job="../7", gpus=(0,), within_s=1.0, by="x"), ReleaseOrder(job="7", gpus=(0,), within_s=1.0, by=ODD),
    NotifyOrder(message=LONG, by="x"), NotifyOrder(message="", by=LONG), SwitchOrder(profile=LONG, by="x"), SwitchOrder(profile=ODD, by="x"),
    ResumeOrder(by=LONG), ResetOrder(by=ODD),
)  # fmt: skip
# These are within bounds, and mean nothing, or are for another desk.
STRANGE = (
    SwitchOrder(by="x", profile="../../../etc/passwd"), SwitchOrder(by="", profile=""), NotifyOrder(message="\0", by=""),
    ReleaseOrder(job="7", gpus=(), within_s=LONGEST_S, by=""), ReleaseOrder(job="7", gpus=(), within_s=0.0, by=""),
    ResumeOrder(by=""), ResetOrder(by=""),
)  # fmt: skip


FACTS = ("jobs", "gpus", "server", "door", "tunnel", "notices")  # one of each worker


def beats(tree: Supervised, count: int = 3) -> None:
    """Let every worker repeat its facts so often: what an order left behind in a timer shows by then."""
    for _ in range(count):
        then = tree.look().facts
        for name in FACTS:
            at_s = getattr(then, name).at_s
            wait_until(lambda name=name, at_s=at_s: getattr(tree.look().facts, name).at_s > at_s, 30, what=f"a beat: {name}")


def test_absurd_orders_are_refused_at_every_desk_and_crash_nobody_later_either(supervised: Start) -> None:
    tree = supervised(DOOR="true", LEASE_TTL=4)
    tree.all_ready()
    before = tree.pids()
    desks = sorted(tree.runtime.glob("desk-*"))
    assert {desk.name for desk in desks} == {"desk-resolver", "desk-vllm", "desk-door", "desk-tunnel", "desk-notifier"}
    with zmq.Context() as context:
        for path in desks:
            with context.socket(zmq.DEALER) as desk:
                desk.setsockopt(zmq.LINGER, 0)
                desk.connect(f"ipc://{path}")

                def told(order: Order, desk: zmq.Socket = desk) -> Reply:
                    desk.send_multipart([b"", msgspec.msgpack.encode(order)])
                    assert desk.poll(30_000), f"no answer to {str(order)[:200]}"
                    return msgspec.msgpack.decode(desk.recv_multipart()[-1], type=Reply)

                for order in ABSURD:
                    assert "not an order that this version understands" in told(order).problems[0], str(order)[:200]
                for order in STRANGE:
                    told(order)
    beats(tree)
    tree.all_ready()
    assert tree.pids() == before and tree.answers() and tree.journal("lease_revoked") == []


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
