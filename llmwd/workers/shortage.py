"""The resolver's view of the node's memory: whether it is so short beside others that the model has to go."""

import time

from llmwd.adapters.pressure import memory_pressure
from llmwd.config import Settings
from llmwd.core import pressure
from llmwd.messages import MemoryPressure


class Memory:
    """`fact` is published; `short` says in words why no lease is given, "" while memory is no reason."""

    def __init__(self) -> None:
        self.fact: MemoryPressure | None = None
        self.short = ""
        self._shortage = pressure.Shortage()

    def adopt(self, fact: MemoryPressure | None) -> None:
        """What our last incarnation had found out."""
        self._shortage = pressure.Shortage(short=fact is not None and fact.short)

    def beat(self, settings: Settings, others: bool) -> None:
        """Read it anew. others: jobs or strangers' processes are on the node."""
        limit = settings.memory_pressure
        text, why = memory_pressure()
        reading = pressure.parse(text)
        if reading is None and not why:
            why = "the kernel's words about it were not understood"
        self._shortage = pressure.step(self._shortage, reading, limit, others, time.monotonic(), settings.resume_after_s)
        self.short = pressure.told(self._shortage, reading, limit)
        some, full = (reading.some_percent, reading.full_percent) if reading else (None, None)
        self.fact = MemoryPressure(
            some_percent=some, full_percent=full, limit_percent=limit, short=self._shortage.short, why=why,
        )
