"""Fixtures with a real Slurm node, and the marker `slurm` for everything in this folder."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.company import company
from tests.slurm.testbed import SlurmNode, missing

HERE = Path(__file__).parent
LEFT_OUT = pytest.StashKey[int]()


def _without_slurm() -> bool:
    return "slurm" in os.environ.get("LLMWD_TEST_WITHOUT", "").replace(",", " ").split()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks this folder's tests; leaves out, on request only, all that need Slurm."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slurm)
    if not _without_slurm():
        return
    left_out = [item for item in items if item.get_closest_marker("slurm")]
    items[:] = [item for item in items if not item.get_closest_marker("slurm")]
    config.hook.pytest_deselected(items=left_out)
    config.stash[LEFT_OUT] = len(left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if count := config.stash.get(LEFT_OUT, 0):
        terminalreporter.section("left out")
        terminalreporter.line(f"{count} tests that need a real Slurm node (LLMWD_TEST_WITHOUT=slurm)")


@pytest.fixture(scope="session")
def running_nodes() -> list[SlurmNode]:
    """The session's nodes, which `quiet_nodes` empties after each test."""
    return []


def _session_node(cgroup: str, folder: Path, running: list[SlurmNode]) -> Iterator[SlurmNode]:
    if problem := missing():
        pytest.fail(problem, pytrace=False)
    with SlurmNode(folder, cgroup=cgroup) as node:
        running.append(node)
        yield node
        running.remove(node)


@pytest.fixture(scope="session")
def slurm_node(tmp_path_factory: pytest.TempPathFactory, running_nodes: list[SlurmNode]) -> Iterator[SlurmNode]:
    """One node with 8 GPUs and cgroup v2 for the whole session; each test finds it idle."""
    yield from _session_node("v2", tmp_path_factory.mktemp("s"), running_nodes)


@pytest.fixture(scope="session")
def slurm_node_v1(tmp_path_factory: pytest.TempPathFactory, running_nodes: list[SlurmNode]) -> Iterator[SlurmNode]:
    """The same with cgroup v1."""
    yield from _session_node("v1", tmp_path_factory.mktemp("s"), running_nodes)


@pytest.fixture
def make_slurm_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., SlurmNode]]:
    """Starts a node of the test's own, with SlurmNode's keyword arguments; all are stopped after the test."""
    with contextlib.ExitStack() as made:  # one that cannot be stopped keeps none of the others

        def make(**wanted: object) -> SlurmNode:
            if problem := missing():
                pytest.fail(problem, pytrace=False)
            node = SlurmNode(tmp_path_factory.mktemp("s"), **wanted)  # type: ignore[arg-type]
            made.callback(node.stop)
            node.start()
            return node

        yield make


@pytest.fixture(autouse=True)
def in_company(request: pytest.FixtureRequest) -> Iterator[None]:
    """Beside other tests, or without any where the test is marked `alone`."""
    with company(request.node.get_closest_marker("alone") is not None):
        yield


@pytest.fixture(autouse=True)
def quiet_nodes(in_company: None, running_nodes: list[SlurmNode]) -> Iterator[None]:
    """After each test: the session's nodes have both daemons, no job and no job folder, whatever the test did."""
    yield
    for node in running_nodes:
        node.cancel_all()
