"""Whether the node is short of memory while others are on it: then the model goes, and stays away until that is over.

Of the kernel's numbers `some avg10` decides: the part of the last ten seconds in which at least one process waited for
memory. `full`, in which all waited at once, is never more than `some` and comes when jobs already stand still; it is
shown, and decides nothing.
"""

import re

import msgspec

_LINE = re.compile(r"^(some|full) avg10=(\d+(?:\.\d+)?) ", re.MULTILINE)


class Reading(msgspec.Struct, frozen=True):
    """Percent of the last ten seconds."""

    some_percent: float
    full_percent: float


class Shortage(msgspec.Struct, frozen=True):
    """since it was found out until it is over. low_since_s: since when the pressure is below half of the limit."""

    short: bool = False
    low_since_s: float | None = None


def parse(text: str) -> Reading | None:
    """/proc/pressure/memory; None if it is no such text."""
    found = dict(_LINE.findall(text))
    return Reading(float(found["some"]), float(found["full"])) if {"some", "full"} <= set(found) else None


def step(
    before: Shortage, reading: Reading | None, limit_percent: float, others: bool, now_s: float, resume_after_s: float
) -> Shortage:
    """After a new reading. others: jobs or strangers' processes are on the node; alone we hurt nobody.

    Over only when the pressure has been below half of the limit for resume_after_s, or can no longer be told.
    """
    if reading is None or not limit_percent:
        return Shortage()
    if reading.some_percent >= limit_percent:
        return Shortage(short=before.short or others)
    if not before.short or reading.some_percent >= limit_percent / 2:
        return Shortage(short=before.short)
    low_since_s = now_s if before.low_since_s is None else before.low_since_s
    return Shortage() if now_s - low_since_s >= resume_after_s else Shortage(True, low_since_s)


def told(now: Shortage, reading: Reading | None, limit_percent: float) -> str:
    """Why no lease is given, one sentence; "" when memory is no reason."""
    if not now.short or reading is None:
        return ""
    return f"processes waited for memory in {reading.some_percent:g} % of the last 10 s (MEMORY_PRESSURE={limit_percent:g})"
