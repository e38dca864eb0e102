"""Which tests run beside each other, in whatever process of whatever run of the tests.

Where a job's processes tell no node (a site without job cgroups, a slurmstepd that has just begun), every llmwd of the
machine counts the job as one of its node's: that is how it has to be, and would fail the tests of others' nodes.
"""

import contextlib
import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path

TURN, COMPANY = (Path(tempfile.gettempdir()) / f"llmwd-tests.{name}" for name in ("turn", "company"))


@contextlib.contextmanager
def company(alone: bool) -> Iterator[None]:
    """With others that do not mind, or alone. Who wants to be alone is next once those that are there have gone."""
    with TURN.open("a") as turn, COMPANY.open("a") as here:
        fcntl.flock(turn, fcntl.LOCK_EX)
        fcntl.flock(here, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(turn, fcntl.LOCK_UN)
        yield
