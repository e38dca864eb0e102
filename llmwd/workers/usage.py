"""The journal's lines about who has the GPUs: on change and on a slow beat, never in the way of a yield."""

import time
from collections.abc import Sequence

from llmwd.messages import Gpu
from llmwd.workers.base import Shell

SOON_S = 1.0  # a storm of jobs costs one line a second
REPEAT_S = 600.0  # so that a supervisor that ends without a word leaves little time unexplained


class Usage:
    """Give it every new picture with `note`."""

    def __init__(self, shell: Shell):
        self._shell = shell
        self._now: dict[str, list[int]] = {}
        self._written: dict[str, list[int]] = {}
        self._due = False

    def note(self, gpus: Sequence[Gpu]) -> None:
        """The GPUs as they are published now. What lasts for less than SOON_S may go untold."""
        self._now = {}
        for gpu in gpus:
            self._now.setdefault(gpu.holder, []).append(gpu.index)
        if self._now != self._written and not self._due:
            self._due = True
            self._shell.at("usage", time.monotonic() + SOON_S, self._write)

    def _write(self) -> None:
        self._written, self._due = self._now, False
        self._shell.journal.write("gpus", **self._now)
        self._shell.at("usage", time.monotonic() + REPEAT_S, self._write)
