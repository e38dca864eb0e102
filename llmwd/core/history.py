"""What llmwd did over a period, from the journal's lines: phases, yields, sums. Pure; never fails on a line."""

from collections.abc import Iterable, Sequence

import msgspec

from llmwd.core.journaled import Journaled, Line
from llmwd.core.pastyields import PARTS, Yield
from llmwd.core.timeline import PHASES, UNKNOWN, Span, Walk
from llmwd.vocab import Holder, NodePhase, Reason

CONFLICTS = (Reason.yielded_to_job, Reason.unknown_job, Reason.gpu_in_use, Reason.gpu_unknown)


class Percentiles(msgspec.Struct, frozen=True):
    """Nearest rank: each is a measured value. count: of how many."""

    count: int
    p50: float
    p90: float
    p99: float
    max: float


class Drill(msgspec.Struct, frozen=True, kw_only=True):
    """The last `llmwd-ctl drill`, whether or not it was in the period."""

    at: float
    job: str
    while_phase: str
    gpus: tuple[int, ...]
    took_s: float | None
    budget_s: float | None
    passed: bool
    verdict: str


class Sums(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds and GPU-hours of the period. recorded_s: from the first line on; up_s: a supervisor ran in it.

    gpu_hours: harvested (a lease was held), serving, loading, parked (unused because llmwd was held, see `Span`), and for
    each holder what it had as far as that is told (`users`). conflicts: yields because a GPU was or may have been somebody
    else's. parts, overlap_s, worst_overlap_s (see `Yield`): without simulated jobs and drills, which have theirs in
    simulated_*. lost: supervisors that ended without a word.
    """

    period_s: float
    recorded_s: float
    up_s: float
    phases_s: dict[str, float]
    waiting_s: dict[str, float]
    parked_s: dict[str, float]
    gpu_hours: dict[str, float]
    users_gpu_hours: dict[str, float]
    yields: int
    simulated: int
    reasons: dict[str, int]
    conflicts: int
    parts: dict[str, Percentiles]
    overlap_s: float
    worst_overlap_s: float | None
    simulated_parts: dict[str, Percentiles]
    simulated_overlap_s: float
    simulated_worst_overlap_s: float | None
    budget_broken: int
    unfinished: int
    killed: int
    requests_cut: int
    requests_untold: int
    starts: int
    lost: int
    deaths: int


class History(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of one period, times on the axis. budget_s: what held last, None if not told."""

    begin_at: float
    end_at: float
    spans: tuple[Span, ...]
    yields: tuple[Yield, ...]
    sums: Sums
    drill: Drill | None
    budget_s: float | None
    broken_lines: int
    unknown_events: int


def tell(journaled: Journaled, begin_at: float, end_at: float, running: bool) -> History:
    """The history from begin_at to end_at (seconds since the epoch). running: a supervisor runs at end_at."""
    walk = Walk()
    for line in journaled.lines:
        walk.take(line)
    walk.end(max(end_at, walk.at or end_at), running)
    spans = tuple(clipped for span in walk.spans if (clipped := _clip(span, begin_at, end_at)) is not None)
    told = [release.told() for release in walk.releases]
    yields = tuple(sorted((each for each in told if each is not None and begin_at <= each.at <= end_at), key=lambda each: each.at))
    within = [line for line in journaled.lines if begin_at <= line.at <= end_at]
    lost = sum(begin_at <= at <= end_at for at in walk.lost)
    drills = [line for line in journaled.lines if line.event == "drill" and line.at <= end_at]
    return History(
        begin_at=begin_at, end_at=end_at, spans=spans, yields=yields, sums=_sums(spans, yields, within, lost, end_at - begin_at),
        drill=_drill(drills[-1]) if drills else None, budget_s=walk.budget_s, broken_lines=journaled.broken,
        unknown_events=walk.unknown_events,
    )  # fmt: skip


def _clip(span: Span, begin_at: float, end_at: float) -> Span | None:
    first_at, last_at = max(span.begin_at, begin_at), min(span.end_at, end_at)
    return msgspec.structs.replace(span, begin_at=first_at, end_at=last_at) if last_at > first_at else None


def _drill(line: Line) -> Drill:
    return Drill(
        at=line.at, job=line.text("job"), while_phase=line.text("while_phase"), gpus=line.gpus(), took_s=line.number("took_s"),
        budget_s=line.number("budget_s"), passed=line.details.get("passed") is True, verdict=line.text("verdict"),
    )  # fmt: skip


def _sums(spans: Sequence[Span], yields: Sequence[Yield], lines: Sequence[Line], lost: int, period_s: float) -> Sums:
    events = [line.event for line in lines]
    real, simulated = ([each for each in yields if each.simulated is kind] for kind in (False, True))
    overlaps, simulated_overlaps = _overlaps(real), _overlaps(simulated)
    ran = [each for each in yields if each.ran]
    return Sums(
        period_s=period_s,
        recorded_s=_total(spans),
        up_s=_total(span for span in spans if span.phase not in (NodePhase.stopped, UNKNOWN)),
        phases_s={phase: _total(span for span in spans if span.phase == phase) for phase in PHASES},
        waiting_s=_by_reason(spans, NodePhase.waiting),
        parked_s=_by_reason(spans, NodePhase.held),
        gpu_hours={
            "harvested": _gpu_hours(span for span in spans if span.leased),
            "serving": _gpu_hours(span for span in spans if span.phase == NodePhase.serving),
            "loading": _gpu_hours(span for span in spans if span.phase == NodePhase.loading),
            "parked": sum(span.parked * span.long_s for span in spans) / 3600,
        },
        users_gpu_hours={str(holder): sum(span.users.get(holder, 0) * span.long_s for span in spans) / 3600 for holder in Holder},
        yields=len(yields), simulated=len(simulated), reasons=_counts([each.reason for each in yields]),
        conflicts=sum(each.reason in CONFLICTS for each in yields),
        parts=_parts(real), overlap_s=sum(overlaps), worst_overlap_s=max(overlaps, default=None),
        simulated_parts=_parts(simulated), simulated_overlap_s=sum(simulated_overlaps),
        simulated_worst_overlap_s=max(simulated_overlaps, default=None),
        budget_broken=sum(each.broken for each in yields), unfinished=sum(not each.ended for each in yields),
        killed=sum(each.killed for each in yields),
        requests_cut=sum(each.requests or 0 for each in ran), requests_untold=sum(each.requests is None for each in ran),
        starts=events.count("supervisor_started"), lost=lost, deaths=events.count("server_died"),
    )  # fmt: skip


def _overlaps(yields: Sequence[Yield]) -> list[float]:
    return [each.overlap_s for each in yields if each.overlap_s is not None]


def _parts(yields: Sequence[Yield]) -> dict[str, Percentiles]:
    return {part: rank for part in PARTS if (rank := percentiles([getattr(each, part) for each in yields])) is not None}


def percentiles(values: Sequence[float | None]) -> Percentiles | None:
    """Of the values that are told; None where none is."""
    told = sorted(value for value in values if value is not None)
    if not told:
        return None

    def rank(percent: int) -> float:
        return told[-(-percent * len(told) // 100) - 1]

    return Percentiles(len(told), rank(50), rank(90), rank(99), told[-1])


def _total(spans: Iterable[Span]) -> float:
    return sum(span.long_s for span in spans)


def _gpu_hours(spans: Iterable[Span]) -> float:
    return sum(len(span.gpus) * span.long_s for span in spans) / 3600


def _by_reason(spans: Sequence[Span], phase: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for span in spans:
        if span.phase == phase:
            found[span.reason] = found.get(span.reason, 0.0) + span.long_s
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _counts(words: Sequence[str]) -> dict[str, int]:
    return dict(sorted(((word, words.count(word)) for word in set(words)), key=lambda item: (-item[1], item[0])))
