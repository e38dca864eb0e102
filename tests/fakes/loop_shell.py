"""A stand-in for the worker's shell: the same loop over descriptors and timers, facts kept in a list, no other process."""

import logging
import selectors
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from llmwd.config import Settings, load
from llmwd.messages import Fact
from llmwd.workers.base import Boot


def settings(home: Path, **changes: object) -> Settings:
    """The default settings, with changes by field name."""
    (home / "etc").mkdir(parents=True, exist_ok=True)
    loaded = load(home).settings
    assert loaded is not None
    return msgspec.structs.replace(loaded, **changes)


class LoopShell:
    """`facts` holds (monotonic seconds, fact) of every publish."""

    def __init__(self, folder: Path, **changes: object):
        self.boot = Boot(
            name="detector", settings=settings(folder / "home", **changes), home=folder / "home",
            runtime=folder / "run", state=folder / "state", node="here", root_fd=-1,
        )
        self.boot.runtime.mkdir(mode=0o700, exist_ok=True)
        self.log = logging.getLogger("llmwd-test")
        self.facts: list[tuple[float, Fact]] = []
        self.is_ready = self.finished = False
        self._selector = selectors.DefaultSelector()
        self._timers: dict[str, tuple[float, Callable[[], None]]] = {}
        self.stop: Callable[[float], None] = lambda within_s: None
        self._reload: Callable[..., None] = lambda boot, loaded: None

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, callback)

    def unwatch(self, fd: int) -> None:
        self._selector.unregister(fd)

    def at(self, name: str, when_s: float, callback: Callable[[], None]) -> None:
        self._timers[name] = (when_s, callback)

    def cancel(self, name: str) -> None:
        self._timers.pop(name, None)

    def publish(self, fact: Fact) -> None:
        self.facts.append((time.monotonic(), fact))

    def ready(self) -> None:
        self.is_ready = True

    def finish(self) -> None:
        self.finished = True

    def on_stop(self, callback: Callable[[float], None]) -> None:
        self.stop = callback

    def on_reload(self, callback: Callable[..., None]) -> None:
        self._reload = callback

    def reload(self, **changes: object) -> None:
        self.boot = msgspec.structs.replace(
            self.boot, settings=msgspec.structs.replace(self.boot.settings, **changes)
        )
        self._reload(self.boot, None)

    @property
    def timers(self) -> dict[str, float]:
        return {name: when_s for name, (when_s, _) in self._timers.items()}

    def fire(self, name: str) -> None:
        """Run a timer's callback now, whenever it was due."""
        self._timers.pop(name)[1]()

    def turn(self, wait_s: float = 0.02) -> None:
        """One turn of the loop."""
        next_s = min((when_s for when_s, _ in self._timers.values()), default=time.monotonic() + wait_s)
        for key, _ in self._selector.select(max(0.0, min(wait_s, next_s - time.monotonic()))):
            key.data()
        for name, (when_s, _) in list(self._timers.items()):
            if when_s <= time.monotonic() and name in self._timers:
                self.fire(name)

    def until(self, condition: Callable[[], object], within_s: float = 30.0) -> None:
        """Run the loop until the condition holds; AssertionError once the time is over."""
        end_s = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < end_s, f"not within {within_s:g} s; last fact: {self.facts[-1:]}"
            self.turn()

    def close(self) -> None:
        self.stop(1.0)
        self._selector.close()
