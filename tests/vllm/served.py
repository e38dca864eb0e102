"""What the tests with real vLLM look at: its processes, what is left of them, the journal's word on a release."""

import socket

from llmwd.adapters import procs
from tests.tree.supervised import Supervised
from tests.waiting import wait_until

LOADS_WITHIN_S = 400  # its imports alone take minutes where everybody has a tenth of a core
STREAM_ENDS_WITHIN_S = 10
RELEASED_WITHIN_S = 5
CAPITAL = "What is the capital of France?"

Process = tuple[int, int]  # pid, start ticks


def processes(tree: Supervised) -> list[Process]:
    """The holder and everything below it."""
    holder = tree.server_fact().holder_pid
    found = [(pid, procs.start_ticks(pid)) for pid in (holder, *procs.descendants(holder))]
    return [(pid, start) for pid, start in found if start is not None]


def titles(some: list[Process]) -> str:
    return " ".join(procs.cmdline(pid).decode(errors="replace") for pid, _ in some)


def all_gone(some: list[Process], within_s: float) -> None:
    def left() -> list[Process]:
        return [each for each in some if procs.alive(*each)]

    wait_until(lambda: not left(), within_s, what=f"the end of {left()}")


def refuses_connections(tree: Supervised) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", tree.port)) != 0


def release_of(tree: Supervised, job: int) -> dict:
    """The journal's entry for the yield to this job, with its times in order and soon enough."""
    release = tree.released_for(job)
    assert release["reason"] == "yielded_to_job"
    # Where slurmctld's reading of the node came before any sign of the job, that was the first.
    first = ("seen", "resolved") if release["seen_s"] is not None else ()
    steps = [release[f"{step}_s"] for step in (*first, "revoked", "signalled", "model_gone", "gone")]
    assert steps == sorted(steps), release
    assert steps[-1] - steps[0] < RELEASED_WITHIN_S
    return release


def of_the_door(tree: Supervised) -> set[int]:
    """Caddy, its holder and the holder's guard: they stay up through a yield."""
    titles = (b"llmwd: holder caddy", b"guard of caddy")
    return {tree.look().facts.door.pid} | {pid for pid, cmdline in tree.left() if cmdline.startswith(titles)}


def nothing_left_of_the_server(tree: Supervised, some: list[Process]) -> None:
    all_gone(some, 20)
    ours = {worker["pid"] for worker in tree.status()["workers"]} | {tree.process.pid} | of_the_door(tree)
    wait_until(lambda: {pid for pid, _ in tree.left()} <= ours, 20, what=f"only {ours} of {tree.left()}")
    assert refuses_connections(tree)
    # The manager clears up once it has heard of the end.
    wait_until(lambda: not (tree.runtime / "rpc").exists(), 20, what="the end of the folder of vLLM's sockets")
