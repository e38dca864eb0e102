"""A report as one HTML file that can be mailed: its style within, plots as SVG, nothing fetched, no script."""

from collections.abc import Iterable
from datetime import datetime
from xml.etree.ElementTree import Element, tostring

from llmwd.core.history import History
from llmwd.core.telling import meaning, spell_s, spell_share
from llmwd.core.timeline import PHASES, UNKNOWN
from llmwd.core.wording import spell_duration, spell_gpus
from llmwd.ctl import plots
from llmwd.ctl.pagestyle import STYLE
from llmwd.ctl.plots import node
from llmwd.ctl.reporting import Report, part_rows
from llmwd.vocab import Holder, NodePhase

MOST_YIELDS = 100
HOLDERS = {Holder.slurm: "Slurm jobs", Holder.other: "other processes", Holder.llmwd: "llmwd", Holder.unknown: "not known", Holder.free: "free"}
SHOWN_PHASES = (NodePhase.serving, NodePhase.loading, NodePhase.yielding, NodePhase.waiting, NodePhase.held, NodePhase.failed, UNKNOWN)


def page(report: Report, history: History) -> str:
    """The whole file."""
    title = f"llmwd on {report.node}: {_day(history.begin_at)} to {_day(history.end_at)}"
    head = node(
        "head", node("meta", charset="utf-8"), node("meta", name="viewport", content="width=device-width, initial-scale=1"),
        node("title", title), node("style", STYLE),
    )  # fmt: skip
    body = node("body", *_top(report, history), *_gpus(history), *_releases(report, history), *_time(report), *_end(report))
    # Text of <style> stays as it is in HTML, and all other text is escaped.
    return "<!DOCTYPE html>\n" + tostring(node("html", head, body, lang="en"), encoding="unicode", method="html") + "\n"


def _day(at: float) -> str:
    return f"{datetime.fromtimestamp(at):%d %B %Y}"


def _moment(at: float) -> str:
    return f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}"


def _section(title: str, *inside: Element) -> Element:
    return node("section", node("h2", title), *inside)


def _figure(drawn: Element, caption: str) -> Element:
    return node("figure", drawn, node("figcaption", caption))


def _table(header: Iterable[str], rows: Iterable[Iterable[str]], numbers: frozenset[int] = frozenset()) -> Element:
    def row(cells: Iterable[str], name: str) -> Element:
        return node("tr", *(node(name, cell, class_="number" if place in numbers else "word" if place else "time") for place, cell in enumerate(cells)))

    return node("div", node("table", node("thead", row(header, "th")), node("tbody", *(row(cells, "td") for cells in rows))), class_="scroll")


def _top(report: Report, history: History) -> list[Element]:
    sums = report.sums
    zone = datetime.fromtimestamp(history.end_at).astimezone().tzname()
    total, longest = sums.parts.get("total_s"), "longest release"
    if total is None and sums.simulated_parts:
        total, longest = sums.simulated_parts.get("total_s"), "longest release, all simulated"
    tiles = [
        (str(sums.yields), "times GPUs were given back"),
        (spell_s(total.max) if total else "none", longest + (f" (budget {report.budget_s:g} s)" if report.budget_s else "")),
        (str(sums.budget_broken), "releases over the budget"),
        (f"{sums.gpu_hours['harvested']:.1f} h", "GPU-hours harvested"),
        (f"{sums.gpu_hours['serving']:.1f} h", "of these serving"),
        (f"{sums.gpu_hours['parked']:.1f} h", "GPU-hours parked: unused because llmwd was held"),
        (spell_share(sums.phases_s[NodePhase.serving], sums.recorded_s), "of the time serving"),
    ]
    return [
        node("h1", f"llmwd on {report.node}"),
        node("p", f"{_moment(history.begin_at)} to {_moment(history.end_at)} {zone} · llmwd {report.version}", class_="quiet"),
        node("p", "llmwd runs a language model on this node's idle GPUs as an ordinary user, outside Slurm, and leaves them when a "
             "Slurm job is given one. This page says what that meant for the jobs.", class_="quiet"),
        node("div", *(node("p", words) for words in report.words), class_="summary broken" if sums.budget_broken else "summary"),
        node("div", *(node("div", node("b", value), node("span", label), class_="tile") for value, label in tiles), class_="tiles"),
    ]  # fmt: skip


def _legend(entries: dict[str, str]) -> Element:
    return node("div", *(node("span", node("i", class_=kind), text) for kind, text in entries.items()), class_="legend")


def _gpus(history: History) -> list[Element]:
    legend = {f"of-{holder}": text for holder, text in HOLDERS.items()}
    phases = {f"is-{phase}": str(phase) for phase in SHOWN_PHASES if history.sums.phases_s.get(phase)}
    told = any(span.users for span in history.spans)
    caption = "Height: the share of the node's GPUs. Triangles: GPUs given back. Thin strip: what llmwd did."
    if not told:
        caption = "The journal of this period does not tell who had the GPUs: only what llmwd did (thin strip) is shown."
    shown = plots.midnights(history.begin_at, history.end_at)
    if len(shown) > plots.MOST_DAYS:
        caption += f" Only the last {plots.MOST_DAYS} days are drawn."
    return [_section("Who had the GPUs", *([_legend(legend)] if told else []), _figure(plots.days_plot(history), caption), _legend(phases))]


def _releases(report: Report, history: History) -> list[Element]:
    points = plots.points_plot(history)
    if points is None:
        return [_section("Giving GPUs back", node("p", "Nothing to show: no release with its time is recorded in this period."))]
    counts, parts = [], []
    for simulated, (of, told) in enumerate((("", report.sums.parts), (" for simulated jobs", report.sums.simulated_parts))):
        drawn = plots.histogram([one for one in history.yields if one.simulated == simulated])
        if drawn is not None:
            counts.append(_figure(drawn, f"How many releases{of} took how long."))
            header = ("part", "count", "half within", "90 % within", "99 % within", "longest")
            parts.append(_section(f"Its parts{of}", _table(header, part_rows(told), frozenset(range(1, 6)))))
    return [
        _section(
            "Giving GPUs back",
            _figure(points, "Each release, from the first sign to the proof that nothing of llmwd is left; hollow: a simulated job. Logarithmic."),
            *counts,
        ),
        *parts,
        _section("Why", _figure(plots.bars(report.sums.reasons, "Releases by reason"), "Reasons: " + "; ".join(
            f"{reason.replace('_', ' ')}: {meaning(reason)}" for reason in report.sums.reasons) + ".")),
        _section("Each release", *_each(history)),
    ]  # fmt: skip


def _each(history: History) -> list[Element]:
    rows = [
        (
            _moment(one.at), _who(one.job, one.simulated, one.reason), spell_gpus(one.gpus), one.while_phase, one.first or "",
            spell_s(one.total_s) + (" BROKEN" if one.broken else ""), spell_s(one.overlap_s), "" if one.requests is None else str(one.requests),
        )
        for one in reversed(history.yields[-MOST_YIELDS:])
    ]  # fmt: skip
    header = ("when", "for whom", "GPUs", "while", "seen first by", "took", "overlap at most", "requests cut")
    note = f"The last {MOST_YIELDS} of {len(history.yields)}." if len(history.yields) > MOST_YIELDS else ""
    return [_table(header, rows, frozenset({5, 6, 7})), *([node("p", note, class_="quiet")] if note else [])]


def _who(job: str | None, simulated: bool, reason: str) -> str:
    return f"job {job}" + (" (simulated)" if simulated else "") if job is not None else meaning(reason)


def _time(report: Report) -> list[Element]:
    sums = report.sums
    rows = [(phase, spell_duration(sums.phases_s[phase]), spell_share(sums.phases_s[phase], sums.recorded_s)) for phase in PHASES if sums.phases_s[phase]]
    why = [
        (f"{kind}: {meaning(reason)}", spell_duration(long_s), spell_share(long_s, sums.recorded_s))
        for kind, reasons in (("waiting", sums.waiting_s), ("held", sums.parked_s)) for reason, long_s in reasons.items()
    ]  # fmt: skip
    gpus = [(HOLDERS[Holder[name]], f"{hours:.1f}", "") for name, hours in sums.users_gpu_hours.items() if hours]
    sections = [_section("Time", _table(("", "time", "share"), [*rows, *why], frozenset({1, 2})))]
    if gpus:
        sections.append(_section("GPU-hours of the node, as far as they are recorded", _table(("who", "GPU-hours", ""), gpus, frozenset({1}))))
    return sections


def _end(report: Report) -> list[Element]:
    drill = report.drill
    told = f"{drill.verdict} ({_moment(drill.at)}, while {drill.while_phase})" if drill else "There has been none: llmwd-ctl drill"
    settings = list(report.settings.items())
    return [
        _section("The last drill", node("p", told, **({} if drill is None or drill.passed else {"class_": "bad"}))),
        *([_section("Settings that matter", _table(("setting", "value"), settings))] if settings else []),
        _section("What is missing, and what is not measured", node("ul", *(node("li", note) for note in (*report.gaps, *report.not_measured)))),
    ]
