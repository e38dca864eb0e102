"""The worker's end of a holder, in a test's own loop."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmwd.core.restart import Policy
from llmwd.vocab import Phase
from llmwd.workers.service import Service
from tests.fakes.loop_shell import LoopShell

POLICY = Policy(intensity=3, period_s=60.0, first_s=0.1, backoff_min_s=0.1, backoff_max_s=1.0)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[LoopShell]:
    made = LoopShell(tmp_path)
    made.boot.logs.mkdir(parents=True)
    yield made
    made.close()


def test_what_is_released_before_its_holder_listens_is_never_started(shell: LoopShell, tmp_path: Path) -> None:
    """The job that it would meet is there already."""
    gone: list[tuple[object, bool]] = []
    service = Service(shell, "vllm", "vllm", POLICY, lambda: None, lambda *how: gone.append(how))  # type: ignore[arg-type]
    root_fd, root_end = os.pipe()
    begun = tmp_path / "begun"
    expires_s = time.monotonic() + 60
    service.start(("sh", "-c", f"touch {begun}; exec sleep 600"), dict(os.environ), expires_s, 20.0, root_fd, {})
    service.release(20.0, "yielded_to_job")
    shell.until(lambda: not service.alive)
    os.close(root_end)
    os.close(root_fd)
    assert gone == [(None, True)] and not begun.exists() and service.life.phase is Phase.stopped
    assert service.deaths == 0 and not list(shell.boot.runtime.glob("tree-*"))
