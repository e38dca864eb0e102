"""What the journal tells, in words: one event as a line, a whole history as a few sentences. Pure."""

from collections.abc import Callable, Sequence

from llmwd.core.history import History, Percentiles
from llmwd.core.journaled import Line, number, plain
from llmwd.core.pastyields import Yield
from llmwd.core.wording import name_gpus, spell_duration
from llmwd.vocab import NodePhase, Reason


def spell_s(seconds: float | None) -> str:
    """Seconds as people read short times: 8 ms, 0.43 s, 12.3 s, 3m 12s; nothing for None."""
    if seconds is None:
        return ""
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.00995 or seconds == 0 else f"{seconds * 1000:.1f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    return spell_duration(seconds)


def spell_share(part: float, whole: float) -> str:
    """A part of a whole in percent; never 100 % where something is missing."""
    if whole <= 0:
        return "0.0 %"
    percent = 100 * part / whole
    return f"{min(percent, 99.9) if part < whole else 100:.1f} %" if percent >= 0.1 or part == 0 else "< 0.1 %"


def count(number: int, word: str, many: str = "") -> str:
    """1 job, 2 jobs."""
    return f"{number} {word if number == 1 else many or word + 's'}"


def times(number: int) -> str:
    """once, 2 times."""
    return "once" if number == 1 else f"{number} times"


def meaning(reason: str) -> str:
    """What a reason means, or the word itself where it is not ours."""
    try:
        return Reason(reason).meaning  # type: ignore[call-arg]  # looked up, not made
    except ValueError:
        return reason


# --- one event ------------------------------------------------------------------------------------------


def event_text(line: Line) -> str:
    """What happened, in a line. An event without words of its own is told as it stands."""
    words = WORDS.get(line.event)
    return plain(words(line) if words is not None else f"{line.event.replace('_', ' ')}{_rest(line)}")


def _rest(line: Line) -> str:
    known = [
        f"{name}={value}" for name, value in line.details.items()
        if isinstance(value, bool) or number(value) is not None or (isinstance(value, str) and value)
    ]  # fmt: skip
    return f": {', '.join(known)}" if known else ""


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _because(line: Line) -> str:
    detail = line.text("detail")
    return f"{line.text('reason')} ({detail})" if detail else line.text("reason")


def _took(line: Line, begun: str, end: str) -> str:
    begun_s, end_s = line.number(begun), line.number(end)
    return spell_s(max(0.0, end_s - begun_s)) if begun_s is not None and end_s is not None else ""


def _released(line: Line) -> str:
    took = _took(line, "signalled_s", "gone_s")
    requests = line.number("requests")
    return _joined(
        f"{name_gpus(line.gpus())} left: {line.text('reason')}", f"{took} after the signal" if took else "",
        "killed after the grace" if line.number("killed_s") is not None else "",
        f"{count(int(requests), 'request')} cut" if requests else "",
    )  # fmt: skip


def _proved(line: Line) -> str:
    took_s, budget_s, gone = line.number("took_s"), line.number("budget_s"), _took(line, "gone_s", "proved_s")
    broken = line.details.get("within_budget") is False
    return _joined(
        f"{name_gpus(line.gpus())} proved free of us", f"{spell_s(took_s)} after the first sign" if took_s is not None else "",
        f"{gone} after the last process" if gone and gone != "0 ms" else "",
        f"the budget of {budget_s:g} s is BROKEN" if broken and budget_s else "",
    )  # fmt: skip


def _seen(line: Line) -> str:
    lags = line.details.get("lags")
    later = [f"{name} +{spell_s(number(lag))}" for name, lag in lags.items() if number(lag) is not None] if isinstance(lags, dict) else []
    return _joined(f"job {line.text('job')} was seen first by {line.text('first')}", *later)


def _held(line: Line) -> str:
    until_at = line.number("until_at")
    until = f"for {spell_duration(until_at - line.at)}" if until_at else "until `resume`"
    return f"held {until}, by {line.text('by')}" + (f": {line.text('detail')}" if line.text("detail") else "")


def _prolog(line: Line) -> str:
    answer = "nothing of us is there" if line.details.get("proved") is True else f"not free: {line.text('left')}"
    return f"the prolog of job {line.text('job')} was answered after {spell_s(line.number('took_s'))}: {answer}"


WORDS: dict[str, Callable[[Line], str]] = {
    "supervisor_started": lambda line: f"llmwd started (version {line.text('version')}, pid {line.number('pid') or 0:.0f})",
    "supervisor_stopped": lambda line: "llmwd ended in order",
    "lease_granted": lambda line: f"lease {line.number('epoch') or 0:.0f} granted: {name_gpus(line.gpus())}",
    "lease_revoked": lambda line: f"lease {line.number('epoch') or 0:.0f} revoked: {_because(line)}",
    "server_started": lambda line: f"{line.text('profile')} is being loaded on {name_gpus(line.gpus())}",
    "server_ready": lambda line: f"{line.text('profile')} answers, {spell_s(line.number('took_s'))} after its start",
    "server_died": lambda line: f"vLLM ended by itself: {line.text('how')}",
    "released": _released,
    "release_proved": _proved,
    "budget_broken": lambda line: f"YIELD_BUDGET broken: {line.text('detail')}",
    "job_seen": _seen,
    "phase": lambda line: f"{line.text('phase')}: {_because(line)}" if line.text("reason") != line.text("phase") else line.text("phase"),
    "held": _held,
    "resumed": lambda line: f"resumed by {line.text('by')}",
    "switched": lambda line: f"{line.text('profile')} was chosen by {line.text('by')}",
    "reset": lambda line: f"failures forgotten, asked for by {line.text('by')}",
    "prolog_answered": _prolog,
    "drill": lambda line: f"drill: {line.text('verdict')}",
    "gpus": lambda line: "GPUs: " + (_joined(*(f"{len(line.gpus(name))} {name}" for name in line.details)) or "none"),
}


# --- a history ------------------------------------------------------------------------------------------


def summary(history: History) -> list[str]:
    """The plain words at the top of a report: what was asked of llmwd, how it left, what it was there for."""
    sums = history.sums
    if not history.spans:
        return ["Nothing is recorded in this period."]
    return [*_how_it_left(history), _what_it_did(history), *_faults(history)] if sums.up_s else ["llmwd did not run in this period."]


def _how_it_left(history: History) -> list[str]:
    sums = history.sums
    if not history.yields:
        return ["Nobody needed a GPU that llmwd had, so it never had to leave."]
    for_jobs = sum(each.job is not None for each in history.yields)
    simulated = f"; {count(sums.simulated, 'of these was', 'of these were')} only simulated" if sums.simulated else ""
    told = f"llmwd had to give GPUs back {times(sums.yields)}, {times(for_jobs)} for a Slurm job{simulated}."
    totals = sums.parts.get("total_s"), sums.simulated_parts.get("total_s")
    if totals == (None, None):
        return [told, "How long that took is not recorded."]
    kinds = ("the real ones", "the simulated ones") if all(totals) else ("them", "them")
    sentences = [told]
    for only_simulated, total, kind in zip((False, True), totals, kinds, strict=True):
        sentences += _how_long(total, kind, [each for each in history.yields if each.simulated == only_simulated])
    if sums.budget_broken:
        sentences.append(f"It took longer than it may (YIELD_BUDGET) {times(sums.budget_broken)}; llmwd then stays away until told to resume.")
    elif history.budget_s is not None:
        sentences.append(f"It never took longer than it may (YIELD_BUDGET, {history.budget_s:g} s).")
    if sums.worst_overlap_s is not None:
        sentences.append(
            f"From a job's first sign on the node to the end of llmwd's last process it was at most {spell_s(sums.worst_overlap_s)}"
            f" ({spell_s(sums.overlap_s)} in all)."
        )
    if sums.simulated_worst_overlap_s is not None:
        sentences.append(
            f"From a simulated job's first sign to the end of llmwd's last process it was at most {spell_s(sums.simulated_worst_overlap_s)}."
        )
    if sums.unfinished:
        sentences.append(f"Of {count(sums.unfinished, 'release')} the end is not recorded.")
    return sentences


def _how_long(total: Percentiles | None, kind: str, yields: Sequence[Yield]) -> list[str]:
    if total is None:
        return []
    worst = max((each for each in yields if each.total_s is not None), key=lambda each: each.total_s)
    return [f"Half of {kind} were over within {spell_s(total.p50)}, the longest took {spell_s(total.max)} ({_which(worst)})."]


def _which(one: Yield) -> str:
    return f"job {one.job}" if one.job is not None else meaning(one.reason)


def _what_it_did(history: History) -> str:
    sums = history.sums
    hours = sums.gpu_hours
    return (
        f"It had {hours['harvested']:.1f} GPU-hours that would have been idle, and served on {hours['serving']:.1f} of them;"
        f" the model was there {spell_share(sums.phases_s[NodePhase.serving], sums.recorded_s)} of the recorded time."
    )


def _faults(history: History) -> list[str]:
    sums = history.sums
    told = []
    if sums.deaths:
        told.append(f"vLLM ended by itself {times(sums.deaths)}")
    if sums.lost:
        told.append(f"llmwd ended without a word {times(sums.lost)}")
    return [" and ".join(told) + "."] if told else []
