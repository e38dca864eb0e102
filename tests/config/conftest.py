"""Each test begins without the secrets that another one planted."""

import pytest

from llmwd import redact


@pytest.fixture(autouse=True)
def knowing_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redact, "_known", set())
