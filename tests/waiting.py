"""The one helper that waits; a bare sleep in a test is a defect."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], within_s: float = 30.0, every_s: float = 0.01, what: str = "") -> T:
    """The condition's first true value; AssertionError once `within_s` seconds have passed without one."""
    end = time.monotonic() + within_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= end:
            name = what or getattr(condition, "__name__", "condition")
            raise AssertionError(f"{name} did not come true within {within_s:g} s (last value: {value!r})")
        time.sleep(every_s)
