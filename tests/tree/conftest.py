"""The fixture `supervised`: whole llmwds that are started, and ended with nothing left."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tree.supervised import Supervised

Start = Callable[..., Supervised]


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Start]:
    """supervised(profile={...}, start=True, observed=True, **settings): an llmwd of the test's own. After the test none is left."""
    numbers = itertools.count()
    with contextlib.ExitStack() as made:

        def make(
            profile: dict[str, object] | None = None, start: bool = True, observed: bool = True, **settings: object
        ) -> Supervised:
            tree = Supervised(tmp_path / str(next(numbers)), settings, profile, observed=observed)
            made.callback(tree.close)
            return tree.start() if start else tree

        yield make
