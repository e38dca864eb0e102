#!/usr/bin/env python3
"""What the front door costs: the same requests to the model's own port and through the door, in turns, in one run.

    scripts/bench_door.py                    a server that only streams, as fast as it can: the door is the bottleneck
    scripts/bench_door.py --server vllm      real vLLM (the embedded one) on the CPU
    scripts/bench_door.py --quick            a few seconds, to see that it runs

A whole llmwd runs, with keys, as people meet it. Judged are
  the time to the first token, of one request at a time: the door may add 2 ms in the median
  64 streams at once, at 50 tokens/s each from the server that only streams, or as real vLLM sends them: at least 95 % of the
  model's own tokens must come through
  64 streams without any pause, where the door is the bottleneck: at least 20,000 tokens/s, which is 300 tokens/s for each
Not judged, but shown: the share of the model's own that comes through without any pause. The door shares the cores with
client and server there, and whoever takes a part of a core then takes a part of the tokens. Exit code 1: the door costs
more than it may.
"""

import argparse
import asyncio
import http.client
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import own_python

own_python.ensure()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msgspec  # noqa: E402

from tests.tree.supervised import Supervised, free_port  # noqa: E402
from tests.waiting import wait_until  # noqa: E402

CHECKOUT = Path(__file__).resolve().parents[1]
EMBEDDED = Path(
    os.environ.get("LLMWD_EMBEDDED_DIR")
    or Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "llmwd/embedded"
)
STREAMS = 64
MOST_ADDED_S = 0.002
LEAST_SHARE = 0.95
LEAST_CARRIED = 20_000.0  # tokens a second
TOKEN_EVERY_S = 0.02
FLOOD = f"{STREAMS} streams without a pause"
REQUEST_WITHIN_S = 300.0


class Plan(msgspec.Struct, frozen=True):
    """requests: for the first token, on each way; rounds: of 64 streams, on each way; tokens: of each stream."""

    requests: int
    rounds: int
    tokens: int


PLANS = {("fast", False): Plan(300, 5, 200), ("fast", True): Plan(20, 3, 50), ("vllm", False): Plan(200, 3, 40), ("vllm", True): Plan(4, 1, 4)}


class Way(msgspec.Struct, frozen=True):
    """One way to the model: a port or a unix socket, and the header that opens it."""

    name: str
    port: int | None
    socket: str | None
    authorization: str

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.socket:
            return await asyncio.open_unix_connection(self.socket, limit=1 << 20)
        return await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)

    def request(self, body: dict[str, object]) -> bytes:
        data = json.dumps(body).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            f"Authorization: {self.authorization}\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data


def chat(tokens: int, every_s: float = 0.0) -> dict[str, object]:
    message = {"role": "user", "content": "Tell me a long story."}
    return {"model": "fast", "messages": [message], "stream": True, "max_tokens": tokens, "ignore_eos": True, "token_every": every_s}


async def ask(way: Way, connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], body: dict[str, object]) -> tuple[float, int]:
    """(seconds to the first token, tokens)."""
    reader, writer = connection
    began_s = time.perf_counter()
    writer.write(way.request(body))
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n")[0]:
        raise SystemExit(f"{way.name}: {head.decode(errors='replace')}")
    first_s, got = 0.0, bytearray()
    while not got.endswith(b"\r\n0\r\n\r\n"):
        part = await reader.read(1 << 18)
        if not part:
            raise SystemExit(f"{way.name}: a stream ended before its end")
        got += part
        if not first_s and tokens_in(got):
            first_s = time.perf_counter() - began_s
    return first_s, tokens_in(got)


def tokens_in(got: bytearray) -> int:
    """Events with text; vLLM's first only names the role."""
    return got.count(b'"content":') - got.count(b'"content":""')


async def first_tokens(ways: list[Way], requests: int) -> dict[str, list[float]]:
    """One request at a time, the ways in turns, on connections that stay open as clients keep them."""
    open_ones = [(way, await way.connect()) for way in ways]
    took_s: dict[str, list[float]] = {way.name: [] for way in ways}
    for number in range(requests + 3):
        for way, connection in open_ones:
            first_s, _ = await ask(way, connection, chat(2))
            if number >= 3:  # before: the key's hash is compared for the first time, and so on
                took_s[way.name].append(first_s)
    for _, (_, writer) in open_ones:
        writer.close()
    return took_s


async def rate(way: Way, plan: Plan, every_s: float) -> float:
    """Tokens a second over all streams."""
    connections = [await way.connect() for _ in range(STREAMS)]
    began_s = time.perf_counter()
    found = await asyncio.gather(*(ask(way, connection, chat(plan.tokens, every_s)) for connection in connections))
    took_s = time.perf_counter() - began_s
    for _, writer in connections:
        writer.close()
    return sum(tokens for _, tokens in found) / took_s


async def rates(ways: list[Way], plan: Plan, every_s: float) -> dict[str, list[float]]:
    got: dict[str, list[float]] = {way.name: [] for way in ways}
    for number in range(plan.rounds):
        for way in ways if number % 2 == 0 else reversed(ways):
            got[way.name].append(await rate(way, plan, every_s))
    return got


def started(folder: Path, server: str) -> Supervised:
    tree = Supervised(folder, {"DOOR": "true", "DOOR_PORT": free_port(), "LOG_LEVEL": "info", "LLM_BIN": CHECKOUT / "tests/fakes/fast.py"}, observed=False)
    if server == "vllm":
        tree.write_settings(LLM_VENV=EMBEDDED / "venv", LLM_BIN=EMBEDDED / "venv/bin/vllm")
        tree.write_profile(
            "fake", MODEL_NAME=EMBEDDED / "smollm2-135m", NUM_GPUS=1,
            VLLM_ARGS="--served-model-name fast --max-model-len 2048 --enforce-eager",
        )  # fmt: skip
        with (tree.home / "models/fake.env").open("a") as file:
            file.write("export VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1\n")
    return tree


def key_for(tree: Supervised) -> str:
    """Made before the door opens: a change of the keys closes connections that are idle."""
    made = tree.ctl("key", "add", "bench")
    if made.returncode:
        raise SystemExit(made.stderr)
    return f"Bearer {made.stdout.strip()}"


def ways_to(tree: Supervised, key: str) -> list[Way]:
    wait_until(lambda: tree.status()["door"]["reachable"], what="the front door")
    wait_until(lambda: lets_in(int(tree.settings["DOOR_PORT"]), key), what="a key that opens the door")
    return [
        Way("direct", tree.port, None, tree.authorized().get("Authorization", "")),
        Way("door", int(tree.settings["DOOR_PORT"]), None, key),
        Way("door's socket", None, tree.status()["door"]["socket"], key),
    ]


def lets_in(port: int, key: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/health", headers={"Authorization": key})
        return connection.getresponse().status == 200
    finally:
        connection.close()


def judged(found: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """Of the worse way through the door: seconds added to the first token, the share of paced streams, tokens/s without a pause."""
    # Of each turn, not of the medians: real vLLM's own time differs by more than the door adds.
    by_turns = lambda ways, by: [statistics.median(map(by, ways[name], ways["direct"])) for name in ways if name != "direct"]
    values = {"added_s": max(by_turns(found["first token"], lambda a, b: a - b))}
    for what, ways in found.items():
        if what == FLOOD:
            values["carried"] = min(by_turns(ways, lambda a, _: a))
        elif what != "first token":
            values["share"] = min(by_turns(ways, lambda a, b: a / b))
    return values


def report(found: dict[str, dict[str, list[float]]]) -> bool:
    """Print it all; whether the door costs no more than it may."""
    first = {name: statistics.median(values) for name, values in found["first token"].items()}
    print(f"{'':32}" + "".join(f"{name:>16}" for name in first))
    print(f"{'time to first token, median':32}" + "".join(f"{value * 1e3:13.2f} ms" for value in first.values()))
    for what, ways in found.items():
        if what != "first token":
            print(f"{what:32}" + "".join(f"{statistics.median(values):14.0f}/s" for values in ways.values()))
            shares = [statistics.median(a / b for a, b in zip(values, ways["direct"])) for values in ways.values()]
            print(f"{'  of the direct':32}" + "".join(f"{share:15.1%} " for share in shares))
    values = judged(found)
    verdicts = [
        (values["added_s"] <= MOST_ADDED_S, f"added to the time to first token: {values['added_s'] * 1e3:.2f} ms, at most {MOST_ADDED_S * 1e3:.0f} ms"),
        (values["share"] >= LEAST_SHARE, f"tokens that come through: {values['share']:.1%} of the direct, at least {LEAST_SHARE:.0%}"),
    ]
    if "carried" in values:
        verdicts.append((values["carried"] >= LEAST_CARRIED, f"carried without a pause: {values['carried']:.0f}/s, at least {LEAST_CARRIED:.0f}/s"))
    for good, words in verdicts:
        print(f"{'good' if good else 'BAD ':5}{words}")
    good = all(good for good, _ in verdicts)
    print("the door costs no more than it may" if good else "the door COSTS MORE THAN IT MAY")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", choices=("fast", "vllm"), default="fast")
    parser.add_argument("--quick", action="store_true", help="too short to judge by")
    parser.add_argument("--json", type=Path, help="write every single value to this file as well")
    asked = parser.parse_args()
    plan = PLANS[asked.server, asked.quick]
    paced = f"{STREAMS} streams at {1 / TOKEN_EVERY_S:.0f} tokens/s"
    kinds = {paced: TOKEN_EVERY_S, FLOOD: 0.0} if asked.server == "fast" else {f"{STREAMS} streams": 0.0}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        tree = started(Path(folder), asked.server)
        key = key_for(tree)
        tree.start()
        try:
            tree.serving(within_s=300)
            ways = ways_to(tree, key)
            found = {"first token": asyncio.run(asyncio.wait_for(first_tokens(ways, plan.requests), REQUEST_WITHIN_S))}
            for what, every_s in kinds.items():
                found[what] = asyncio.run(asyncio.wait_for(rates(ways, plan, every_s), REQUEST_WITHIN_S))
        finally:
            tree.close()
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1))
    return 0 if report(found) or asked.quick else 1


if __name__ == "__main__":
    sys.exit(main())
