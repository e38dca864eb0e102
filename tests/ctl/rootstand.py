"""Stands in for the root: holds the lock, writes each signal it gets to a file, ends on SIGTERM.

usage: python -m tests.ctl.rootstand RUNTIME [--deaf] [--node-phase PHASE REASON]

With --node-phase it retains the facts of a whole node in that phase as well, and its environment, like
the supervisor that start.sh starts.
"""

import os
import signal
import sys
import time
from pathlib import Path

import msgspec

from llmwd.adapters import procs, rundir
from llmwd.messages import Envelope, Fact, RootFact, ServerFact
from llmwd.vocab import NodePhase, Phase, Reason

WATCHED = {signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}


def retain(runtime: Path, name: str, fact: Fact) -> None:
    envelope = Envelope(sender=name, pid=os.getpid(), epoch=1, seq=1, fact=fact)
    rundir.retain_fact(runtime, name, msgspec.msgpack.encode(envelope))


def say_phase(runtime: Path, phase: NodePhase, reason: Reason) -> None:
    (runtime / "environ").write_bytes(Path("/proc/self/environ").read_bytes())
    now_at, now_s = time.time(), time.monotonic()
    server = ServerFact(
        profile="glm", model_name="org/glm", served_as="glm", wanted_gpus=2, phase=Phase.ready, node_phase=phase,
        reason=reason, detail="so it is", since_at=now_at, holding=(), pid=500, url="http://127.0.0.1:8000", at_s=now_s,
    )  # fmt: skip
    root = RootFact(
        pid=os.getpid(), start=procs.start_ticks(os.getpid()), stopping=False, workers=(), started_at=now_at,
        node="m001", home=os.environ["LLMWD_HOME"], version="1", at_s=now_s,
    )  # fmt: skip
    retain(runtime, "vllm", server)
    retain(runtime, "root", root)


def main(runtime: Path) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    if rundir.Lock(runtime).take() is not None:
        sys.exit("somebody else has the lock")
    if "--node-phase" in sys.argv:
        at = sys.argv.index("--node-phase")
        say_phase(runtime, NodePhase(sys.argv[at + 1]), Reason(sys.argv[at + 2]))
    print("locked", flush=True)
    while True:
        number = signal.sigwait(WATCHED)
        with (runtime / "signals").open("a") as file:
            file.write(signal.Signals(number).name + "\n")
        if number == signal.SIGTERM and "--deaf" not in sys.argv:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]))
