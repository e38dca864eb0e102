"""Real vLLM on the CPU: the marker `vllm` for this folder, and one llmwd with one Slurm node for each of its modules."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.ntfy import NtfyServer
from tests.slurm.testbed import SlurmNode, missing
from tests.tree.supervised import CHECKOUT, Supervised, free_port

HERE = Path(__file__).parent
LEFT_OUT = pytest.StashKey[int]()
EMBEDDED = Path(
    os.environ.get("LLMWD_EMBEDDED_DIR")
    or Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "llmwd/embedded"
)
LEASE_TTL_S = 8
TEST_WITHIN_S = 1200  # it loads up to three times, each in minutes on a busy machine
# float32, as in models/smollm2-135m.env: what it answers must not depend on the processor.
ARGS = '--served-model-name smollm2 --max-model-len 2048 --enforce-eager --dtype float32 --override-generation-config {"temperature":0.0}'


def _without(what: str) -> bool:
    return what in os.environ.get("LLMWD_TEST_WITHOUT", "").replace(",", " ").split()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks this folder's tests; leaves out, on request only, those that need what is not here."""
    ours = [item for item in items if HERE in item.path.parents]
    for item in ours:
        item.add_marker(pytest.mark.vllm)
        item.add_marker(pytest.mark.timeout(TEST_WITHIN_S))
    left_out = [item for item in ours if _without("vllm") or (_without("slurm") and item.get_closest_marker("slurm"))]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
    config.stash[LEFT_OUT] = len(left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if count := config.stash.get(LEFT_OUT, 0):
        terminalreporter.section("left out")
        asked = os.environ["LLMWD_TEST_WITHOUT"]
        terminalreporter.line(f"{count} tests with real vLLM (LLMWD_TEST_WITHOUT={asked})")


@pytest.fixture(scope="session")
def embedded() -> Path:
    """The folder with vLLM's CPU build and the small model."""
    if subprocess.run([CHECKOUT / "scripts/setup-embedded.sh", "--check"]).returncode:
        pytest.fail(
            f"The embedded vLLM in {EMBEDDED} is not complete: run scripts/setup-embedded.sh, or set LLMWD_TEST_WITHOUT=vllm.",
            pytrace=False,
        )
    return EMBEDDED


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmNode | None]:
    """A Slurm node with 8 GPUs; None where Slurm was left out on request."""
    if _without("slurm"):
        yield None
        return
    if problem := missing():
        pytest.fail(problem, pytrace=False)
    with SlurmNode(tmp_path_factory.mktemp("s")) as started:
        yield started


@pytest.fixture(scope="module")
def ntfy() -> Iterator[NtfyServer]:
    with NtfyServer() as server:
        yield server


@pytest.fixture(scope="module")
def started(embedded: Path, node: SlurmNode | None, ntfy: NtfyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervised]:
    settings = {
        # Not by processes: those of other tests' nodes without job cgroups would count as well.
        "DETECTION": "stepd,cgroup2,gresused,sim" if node else "sim", "SLURM_NODE": node.node if node else "", "LEASE_TTL": LEASE_TTL_S,
        "RECONCILE": 3, "RESUME_AFTER": 0.5, "LLM_VENV": embedded / "venv", "LLM_BIN": embedded / "venv/bin/vllm",
        "DOOR": "true", "DOOR_PORT": free_port(), "NTFY_SERVER": ntfy.url, "NTFY_TOPIC": "t",
    }
    tree = Supervised(tmp_path_factory.mktemp("v"), settings, environ=node.env if node else None, scope=node.scope if node else None)
    tree.write_profile("smollm2", MODEL_NAME=embedded / "smollm2-135m", NUM_GPUS=1, VLLM_ARGS=ARGS)
    with (tree.home / "models/smollm2.env").open("a") as profile:
        profile.write("export VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1\n")
    tree.activate("smollm2")
    yield tree
    tree.close()


@pytest.fixture
def tree(started: Supervised, node: SlurmNode | None) -> Iterator[Supervised]:
    """The module's llmwd, running: started again after a test that killed it, and without jobs after each."""
    if started.process is None or started.process.poll() is not None:
        started.start()
    yield started
    if node:
        node.cancel_all()
