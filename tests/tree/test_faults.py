"""Faults of our own that the random ones (test_chaos.py) do not reach on purpose, each judged by what must be true."""

import signal

import pytest

from llmwd.adapters import procs
from tests.tree.conftest import Start
from tests.tree.supervised import WORKERS, Supervised
from tests.waiting import wait_until

STUBBORN = {"FAKE_ENGINE": 1, "FAKE_FORK_GRANDCHILD": 1, "FAKE_CHILDREN": 11, "FAKE_IGNORE_TERM": 1}


def servers(tree: Supervised) -> set[int]:
    return {pid for pid, cmd in tree.left() if b"server.py" in cmd}


def at_one_blow(tree: Supervised, *names: str) -> None:
    """SIGKILL to all of these in the same instant: stopped first, so that none sees another die."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        tree.signal(" ".join(names), number)


@pytest.mark.parametrize("killed", [("holder", "vllm", "root"), ("holder", *WORKERS, "root")], ids=["the three", "all"])
def test_nothing_is_left_when_all_who_would_clear_up_die_in_the_same_instant(supervised: Start, killed: tuple[str, ...]) -> None:
    """`pkill -9 -f llmwd`: an engine without its server would stay on the GPUs for ever."""
    tree = supervised(STUBBORN, LEASE_TTL=60)
    tree.all_ready()
    assert len(servers(tree)) >= 14
    at_one_blow(tree, *killed)
    wait_until(lambda: not tree.left(), 15, every_s=0.05, what=f"the end of {tree.left()}")
