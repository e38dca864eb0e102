"""The asking side of the desk: one order to one worker, one reply, a deadline."""

from pathlib import Path

import msgspec

from llmwd.messages import Order, Reply


def ask(runtime: Path, worker: str, order: Order, within_s: float) -> Reply | None:
    """The worker's reply, None if none came within `within_s` seconds."""
    import zmq  # 50 ms: only those who order pay for it

    from llmwd.adapters.bus import desk_endpoint

    with zmq.Context() as context, context.socket(zmq.REQ) as desk:
        desk.setsockopt(zmq.LINGER, 0)
        desk.connect(desk_endpoint(runtime, worker))
        desk.send(msgspec.msgpack.encode(order))
        if not desk.poll(int(within_s * 1000)):
            return None
        return msgspec.msgpack.decode(desk.recv(), type=Reply)
