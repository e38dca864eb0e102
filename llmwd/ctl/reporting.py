"""What a report says: the history of some days with the node, the settings that matter, and what is not measured."""

from collections.abc import Mapping
from datetime import UTC, datetime

import msgspec

from llmwd.core.history import Drill, History, Percentiles, Sums
from llmwd.core.pastyields import PARTS, Yield
from llmwd.core.telling import count, spell_s, summary
from llmwd.core.timeline import Span
from llmwd.core.wording import spell_duration

# The settings that decide how quickly we leave and what we take.
SETTINGS_SHOWN = (
    "NUM_GPUS", "YIELD_BUDGET", "YIELD_GRACE", "LEASE_TTL", "RESOLVE_DEADLINE", "SCONTROL_TIMEOUT", "RECONCILE",
    "POLL_INTERVAL", "RESUME_AFTER", "DETECTION", "SIM_GPUS",
)  # fmt: skip


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The object of `llmwd-ctl report --json`; fields are only ever added.

    Times are ISO 8601 in UTC; *_s are seconds. words: the summary in sentences; sums: totals of the period, with
    sums.parts as percentiles (seconds) of each part of a release, and sums.simulated_parts of those for simulated jobs; yields: each release for somebody else, with its
    parts (null: not told); spans: what llmwd did when, on which GPUs, and how many GPUs each holder had; drill: the
    last one, also one before the period; settings: name to value; gaps: what is missing from this period's
    numbers; not_measured: what no such number says; broken_lines, unknown_events: what of the
    journal could not be read or understood.
    """

    node: str
    version: str
    written: str
    begin: str
    end: str
    days: float
    running: bool
    words: tuple[str, ...]
    sums: Sums
    drill: Drill | None
    budget_s: float | None
    settings: dict[str, str]
    gaps: tuple[str, ...]
    not_measured: tuple[str, ...]
    broken_lines: int
    unknown_events: int
    yields: tuple[Yield, ...]
    spans: tuple[Span, ...]


def report_of(history: History, node: str, version: str, days: float, running: bool, settings: dict[str, str]) -> Report:
    return Report(
        node=node, version=version, written=iso(history.end_at), begin=iso(history.begin_at), end=iso(history.end_at),
        days=days, running=running, words=tuple(summary(history)), sums=history.sums, drill=history.drill,
        budget_s=history.budget_s, settings=settings, gaps=gaps(history, settings), not_measured=NOT_MEASURED,
        broken_lines=history.broken_lines, unknown_events=history.unknown_events, yields=history.yields, spans=history.spans,
    )  # fmt: skip


def part_rows(parts: Mapping[str, Percentiles]) -> list[tuple[str, ...]]:
    """A table's rows: part, count, half within, 90 %, 99 %, longest."""
    return [
        (meant, str(rank.count), *map(spell_s, (rank.p50, rank.p90, rank.p99, rank.max)))
        for part, meant in PARTS.items() if (rank := parts.get(part)) is not None
    ]  # fmt: skip


def iso(at: float) -> str:
    """Seconds since the epoch as 2026-01-31T12:00:00.123Z."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def as_object(report: Report) -> object:
    """For JSON: `at`, `begin_at` and `end_at` become ISO times, the latter two as `begin` and `end`."""
    return _dated(msgspec.to_builtins(report))


def _dated(value: object) -> object:
    if isinstance(value, dict):
        dated: dict[str, object] = {}
        for name, each in value.items():
            if name in ("at", "begin_at", "end_at"):
                dated[name.removesuffix("_at")] = iso(each)
            else:
                dated[name] = _dated(each)
        return dated
    return [_dated(each) for each in value] if isinstance(value, list | tuple) else value


NOT_MEASURED = (
    "The clock starts with the first sign that llmwd got. The sign itself comes a little after the fact: about a "
    "millisecond by inotify, up to POLL_INTERVAL where a folder has to be polled.",
    "The overlap is an upper bound: it does not tell whether the job or llmwd was using the GPU at that time. For a "
    "process that is nobody's job there is no first sign, only the driver's next answer.",
    "What llmwd costs jobs beside it in memory bandwidth, network, disk or power is not measured.",
    "Requests that were cut are those that vLLM counted at the last look, a few seconds before.",
    "Who has the GPUs is recorded once a second at most; shorter changes may be missing from the bands.",
)


def gaps(history: History, settings: dict[str, str]) -> tuple[str, ...]:
    """What is missing from the numbers of this period."""
    sums, notes = history.sums, []
    if not settings.get("SIM_GPUS", "0").startswith("0"):
        notes.append(f"The {settings['SIM_GPUS']} of this node are simulated, and so is everything said about them.")
    by_tree = sum(one.proved_by == "tree" for one in history.yields)
    if by_tree:
        notes.append(f"For {count(by_tree, 'release')} there was no driver to ask: the end of the last process is the proof.")
    unproved = sum(not one.proved for one in history.yields)
    if unproved:
        notes.append(f"Of {count(unproved, 'release')} no proof is recorded; {'its' if unproved == 1 else 'their'} time ends with the last process.")
    if sums.recorded_s < sums.period_s - 1:
        notes.append(f"The journal tells of {spell_duration(sums.recorded_s)} of the {spell_duration(sums.period_s)}.")
    if sums.phases_s["unknown"] >= 1:
        notes.append(f"For {spell_duration(sums.phases_s['unknown'])} it is not known what llmwd did: it ended without a word, or the journal has a gap.")
    if history.broken_lines:
        notes.append(f"{count(history.broken_lines, 'line')} of the journal cannot be read.")
    if history.unknown_events:
        notes.append(f"{count(history.unknown_events, 'event')} in the journal this version does not know.")
    return tuple(notes)
