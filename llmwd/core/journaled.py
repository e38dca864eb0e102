"""The journal's lines on one time axis, whatever the clocks did. Pure.

Each line has two clocks: `at`, the wall clock, which may be set back or forward, and `mono_s`, which runs evenly but
begins anew with each boot of the machine. The axis takes all distances from mono_s and only its place in the calendar
from the wall clock: lines of one boot are moved as a whole, by what the two clocks differed at the last of them, and no
boot ends after the next has begun. So nothing on the axis is ever negative, counted twice, or in the future.

Each process writes the kernel's `boot_id` in its first line. Lines without one are of the last boot that was named, unless
both their clocks deny it.
"""

import re
from collections.abc import Iterable, Mapping

import msgspec

LATEST_AT = 1e11
LONGEST_MONO_S = 1e10
LARGEST = 1e12  # no time, count or epoch of ours comes near it
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
SAME_CLOCK_S = 1.0  # the two clocks drift apart by less than this between two lines, unless one of them is set


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One event. at: seconds since the epoch on the axis; boot: lines with the same one may compare their mono_s."""

    at: float
    mono_s: float
    boot: int
    worker: str
    event: str
    details: Mapping[str, object]

    def number(self, name: str) -> float | None:
        """A detail that is a number, else None."""
        return number(self.details.get(name))

    def text(self, name: str) -> str:
        """A detail that is text, made plain, else nothing."""
        value = self.details.get(name)
        return plain(value) if isinstance(value, str) else ""

    def gpus(self, name: str = "gpus") -> tuple[int, ...]:
        """A detail that is a list of GPU indices."""
        value = self.details.get(name)
        whole = [each for each in value if isinstance(each, int) and 0 <= each < 1024] if isinstance(value, list) else []
        return tuple(sorted(set(whole)))


def number(value: object) -> float | None:
    """A number that can be one of ours, else None."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if -LARGEST <= value <= LARGEST else None


def plain(text: str) -> str:
    """Text that does nothing to a terminal, and that any file can hold: what does is spelled out."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


class Journaled(msgspec.Struct, frozen=True):
    """Lines in the order of the axis; broken: how many could not be read."""

    lines: tuple[Line, ...]
    broken: int


class _Raw(msgspec.Struct):
    at: float
    mono_s: float
    worker: str
    event: str
    details: dict[str, object]
    boot_id: str  # empty: not told


def read(rows: Iterable[bytes], now_at: float, now_mono_s: float | None = None) -> Journaled:
    """Lines as they stand in the files, oldest file first. now_mono_s: where the last of them are of a supervisor that
    still runs, the monotonic clock at now_at."""
    boots: list[list[_Raw]] = []
    broken, boot_id = 0, ""
    for row in rows:
        raw = _decode(row)
        if raw is None:
            broken += bool(row.strip())
            continue
        if boots and not _rebooted(boots[-1][-1], raw, boot_id):
            # One that was written late belongs where its writer was held up, not before what was already told.
            raw.mono_s = max(raw.mono_s, boots[-1][-1].mono_s)
            boots[-1].append(raw)
        else:
            boots.append([raw])
            boot_id = ""
        boot_id = raw.boot_id or boot_id
    return Journaled(tuple(_on_axis(boots, now_at, now_mono_s)), broken)


def _decode(row: bytes) -> _Raw | None:
    try:
        found = msgspec.json.decode(row, type=dict[str, object])
    except (msgspec.DecodeError, RecursionError):
        return None
    at, mono_s, event = found.pop("at", None), found.pop("mono_s", None), found.pop("event", None)
    worker, boot_id = found.pop("worker", ""), found.pop("boot_id", "")
    wall, mono = number(at), number(mono_s)
    if wall is None or mono is None or not 0 <= wall <= LATEST_AT or not 0 <= mono <= LONGEST_MONO_S:
        return None
    if not isinstance(event, str) or not isinstance(worker, str) or not isinstance(boot_id, str):
        return None
    return _Raw(wall, mono, worker, event, found, boot_id)


def _rebooted(last: _Raw, raw: _Raw, boot_id: str) -> bool:
    """boot_id: the boot of `last`, if any line before named it."""
    if raw.boot_id and boot_id:
        return raw.boot_id != boot_id
    moved_s = (raw.at - raw.mono_s) - (last.at - last.mono_s)
    return raw.mono_s < last.mono_s - SAME_CLOCK_S and abs(moved_s) > SAME_CLOCK_S


def _on_axis(boots: list[list[_Raw]], now_at: float, now_mono_s: float | None) -> list[Line]:
    latest_at, found = now_at, []
    for number in range(len(boots) - 1, -1, -1):
        boot = boots[number]
        last = boot[-1]
        shift_s = last.at - last.mono_s
        if number == len(boots) - 1 and now_mono_s is not None and last.mono_s <= now_mono_s:
            shift_s = now_at - now_mono_s
        shift_s = min(shift_s, latest_at - last.mono_s)
        latest_at = boot[0].mono_s + shift_s
        found += [
            Line(at=min(raw.mono_s + shift_s, now_at), mono_s=raw.mono_s, boot=number, worker=raw.worker, event=raw.event, details=raw.details)
            for raw in reversed(boot)
        ]
    return found[::-1]
