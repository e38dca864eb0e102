"""For every test."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run, or a test would fail by chance on a change that has nothing to do with it. New ones are
# looked for with `HYPOTHESIS_PROFILE=search`. None has a deadline: any may wait for a processor, and a second run of it that
# is quick counts as a failure, too.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", parent=settings.get_profile("same"), derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# A shell that starts a command in its background has it ignore Ctrl-C, and what that starts ignores it as well: the
# tests that press Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# The same of nohup and a hang-up. A handler, not the default: it is gone in what the tests start, and these go on.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out, on request only, the tests that need a browser."""
    if "browser" in os.environ.get("LLMWD_TEST_WITHOUT", "").replace(",", " ").split():
        left_out = [item for item in items if item.get_closest_marker("browser")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can enter, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="lc"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)
