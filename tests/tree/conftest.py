"""The fixture `supervised`: whole llmwds that are started, and ended with nothing left."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tree.supervised import Supervised

Start = Callable[..., Supervised]


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Start]:
    """supervised(profile={...}, start=True, **settings): an llmwd of the test's own. After the test none is left."""
    made: list[Supervised] = []

    def make(profile: dict[str, object] | None = None, start: bool = True, **settings: object) -> Supervised:
        tree = Supervised(tmp_path / str(len(made)), settings, profile)
        made.append(tree)
        return tree.start() if start else tree

    yield make
    for tree in made:
        tree.close()
