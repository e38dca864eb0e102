"""Plots as SVG elements for one page: no script, no outside file, colours by the page's classes."""

import math
from collections.abc import Sequence
from datetime import datetime, timedelta
from xml.etree.ElementTree import Element

from llmwd.core.history import History
from llmwd.core.pastyields import Yield
from llmwd.core.telling import meaning, spell_s
from llmwd.core.timeline import Span
from llmwd.vocab import Holder

WIDTH, LEFT, RIGHT = 760, 84, 12
ROW, GAP, STRIP = 24, 18, 5  # of a day: its GPUs, the room below, and what llmwd did within that
BINS = 96  # of a day
MOST_DAYS = 31
STACK = (Holder.slurm, Holder.other, Holder.llmwd, Holder.unknown, Holder.free)  # from the bottom
EDGES_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def node(name: str, /, *inside: "Element | str", **attributes: object) -> Element:
    """An element with text and elements in it; class_ and such lose their underscore, others get hyphens."""
    made = Element(name, {key.rstrip("_").replace("_", "-"): _text(value) for key, value in attributes.items()})
    last: Element | None = None
    for each in inside:
        if isinstance(each, Element):
            made.append(each)
            last = each
        elif last is None:
            made.text = (made.text or "") + each
        else:
            last.tail = (last.tail or "") + each
    return made


def _text(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _svg(height: float, label: str, *inside: Element) -> Element:
    # viewBox is the one name with a capital in it that we need.
    made = node("svg", *inside, role="img", aria_label=label)
    made.set("viewBox", f"0 0 {WIDTH} {_text(float(height))}")
    return made


def _label(x: float, y: float, text: str, anchor: str = "start", class_: str = "label") -> Element:
    return node("text", text, x=x, y=y, text_anchor=anchor, class_=class_)


def _rect(x: float, y: float, width: float, height: float, class_: str, title: str = "") -> Element:
    return node("rect", *([node("title", title)] if title else []), x=x, y=y, width=width, height=height, class_=class_)


# --- who had the GPUs, day by day -----------------------------------------------------------------------


def midnights(begin_at: float, end_at: float) -> list[tuple[datetime, float, float]]:
    """(day, begin, end) of every day that the period touches, by the node's own time zone."""
    day = datetime.fromtimestamp(begin_at).replace(hour=0, minute=0, second=0, microsecond=0)
    found = []
    while day.timestamp() < end_at:
        found.append((day, day.timestamp(), (day + timedelta(days=1)).timestamp()))
        day += timedelta(days=1)
    return found


def days_plot(history: History) -> Element:
    """A band for each day: how many GPUs each holder had; below it what llmwd did; above it each yield."""
    days = midnights(history.begin_at, history.end_at)[-MOST_DAYS:]
    most = max((sum(span.users.values()) for span in history.spans), default=0)
    inside: list[Element] = []
    for row, (day, begin_at, end_at) in enumerate(days):
        top = 18 + row * (ROW + GAP)

        def x(at: float, begin_at: float = begin_at, end_at: float = end_at) -> float:
            part = min(max((at - begin_at) / (end_at - begin_at), 0.0), 1.0)
            return LEFT + part * (WIDTH - LEFT - RIGHT)

        spans = [span for span in history.spans if span.end_at > begin_at and span.begin_at < end_at]
        inside.append(_label(LEFT - 8, top + ROW * 0.7, f"{day:%a %d %b}", "end"))
        inside.append(_rect(LEFT, top, WIDTH - LEFT - RIGHT, ROW, "ground"))
        inside += _band(spans, begin_at, end_at, most, x, top)
        for span in spans:
            if x(span.end_at) - x(span.begin_at) > 0.05:
                inside.append(_rect(x(span.begin_at), top + ROW + 2, x(span.end_at) - x(span.begin_at), STRIP, f"is-{span.phase}"))
        for one in history.yields:
            if begin_at <= one.at < end_at:
                inside.append(_mark(x(one.at), top, one))
    hours = [_label(LEFT + part / 24 * (WIDTH - LEFT - RIGHT), 11, f"{part}:00", "end" if part == 24 else "middle") for part in range(0, 25, 4)]
    return _svg(18 + len(days) * (ROW + GAP), "Who had the GPUs, day by day", *hours, *inside)


def _band(spans: Sequence[Span], begin_at: float, end_at: float, most: int, x, top: float) -> list[Element]:
    """The stacked shares of each bin, equal neighbours as one."""
    if not most:
        return []
    step_s = (end_at - begin_at) / BINS
    bins = [dict.fromkeys(STACK, 0.0) for _ in range(BINS)]
    for span in spans:
        for place in range(max(0, int((span.begin_at - begin_at) // step_s)), BINS):
            first_at = begin_at + place * step_s
            both_s = min(span.end_at, first_at + step_s) - max(span.begin_at, first_at)
            if both_s <= 0:
                break
            for holder in STACK:
                bins[place][holder] += span.users.get(holder, 0) * both_s / step_s / most
    found, place = [], 0
    rounded = [tuple(round(shares[holder], 2) for holder in STACK) for shares in bins]
    while place < BINS:
        end = next((other for other in range(place, BINS) if rounded[other] != rounded[place]), BINS)
        left, right, bottom = x(begin_at + place * step_s), x(begin_at + end * step_s), top + ROW
        for holder, share in zip(STACK, rounded[place], strict=True):
            if share:
                bottom -= min(share, 1.0) * ROW
                found.append(_rect(left, bottom, right - left, share * ROW, f"of-{holder}"))
        place = end
    return found


def _mark(x: float, top: float, one: Yield) -> Element:
    title = node("title", f"{datetime.fromtimestamp(one.at):%H:%M:%S} {_who(one)}: {spell_s(one.total_s) or 'not told'}")
    points = f"{_text(x - 3.5)},{_text(top - 6)} {_text(x + 3.5)},{_text(top - 6)} {_text(x)},{_text(top)}"
    return node("polygon", title, points=points, class_="mark broken" if one.broken else "mark")


def _who(one: Yield) -> str:
    return f"job {one.job}" + (" (simulated)" if one.simulated else "") if one.job else meaning(one.reason)


# --- how long each release took -------------------------------------------------------------------------


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Powers of ten around all values."""
    good = [value for value in values if value > 0]
    low = math.floor(math.log10(min(good, default=0.01)))
    high = math.ceil(math.log10(max(good, default=1.0)))
    return max(low, -4), max(high, max(low, -4) + 1)


def points_plot(history: History) -> Element | None:
    """Every release as a point over the period, against the budget. None where none has a time."""
    told = [one for one in history.yields if one.total_s is not None]
    if not told:
        return None
    height, top, bottom = 240, 10, 30
    budget = [history.budget_s] if history.budget_s else []
    low, high = _decades([one.total_s for one in told] + budget)
    long_s = max(history.end_at - history.begin_at, 1.0)

    def x(at: float) -> float:
        return LEFT + (at - history.begin_at) / long_s * (WIDTH - LEFT - RIGHT)

    def y(value_s: float) -> float:
        part = (math.log10(max(value_s, 10.0**low)) - low) / (high - low)
        return height - bottom - part * (height - top - bottom)

    inside: list[Element] = []
    for power in range(low, high + 1):
        at_y = y(10.0**power)
        inside.append(node("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at_y, y2=at_y, class_="grid"))
        inside.append(_label(LEFT - 8, at_y + 4, f"{10.0**power:g} s" if power >= 0 else f"{10.0 ** (power + 3):g} ms", "end"))
    days = [(day, at) for day, at, _ in midnights(history.begin_at, history.end_at) if at >= history.begin_at]
    for day, at in days[:: max(1, len(days) // 8 + 1) if len(days) > 8 else 1]:
        inside.append(node("line", x1=x(at), x2=x(at), y1=height - bottom, y2=height - bottom + 4, class_="axis"))
        inside.append(_label(x(at), height - bottom + 17, f"{day:%d %b}", "middle"))
    for limit_s in budget:
        inside.append(node("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(limit_s), y2=y(limit_s), class_="budget"))
        inside.append(_label(WIDTH - RIGHT, y(limit_s) - 5, f"YIELD_BUDGET {limit_s:g} s", "end", "label strong"))
    for one in told:
        title = node("title", f"{datetime.fromtimestamp(one.at):%Y-%m-%d %H:%M:%S} {_who(one)}: {spell_s(one.total_s)}")
        kind = "point" + (" broken" if one.broken else "") + (" simulated" if one.simulated else "")
        inside.append(node("circle", title, cx=x(one.at), cy=y(one.total_s), r=4, class_=kind))
    return _svg(height, "How long each release took", *inside)


def histogram(yields: Sequence[Yield]) -> Element | None:
    """How many of these releases took how long. None where none has a time."""
    told = [one.total_s for one in yields if one.total_s is not None]
    if not told:
        return None
    edges = (0.0, *EDGES_S, math.inf)
    counts = [sum(low <= value < high for value in told) for low, high in zip(edges, edges[1:])]
    height, top, bottom = 170, 20, 30
    step = (WIDTH - LEFT - RIGHT) / len(counts)
    inside: list[Element] = [node("line", x1=LEFT, x2=WIDTH - RIGHT, y1=height - bottom, y2=height - bottom, class_="axis")]
    for place, number in enumerate(counts):
        tall = number / max(counts) * (height - top - bottom)
        x = LEFT + place * step
        if number:
            inside.append(_rect(x + 2, height - bottom - tall, step - 4, tall, "bar"))
            inside.append(_label(x + step / 2, height - bottom - tall - 5, str(number), "middle", "label strong"))
    for place, edge_s in enumerate(EDGES_S):
        inside.append(_label(LEFT + (place + 1) * step, height - bottom + 17, spell_edge(edge_s), "middle"))
    return _svg(height, "How many releases took how long", *inside)


def spell_edge(edge_s: float) -> str:
    return f"{edge_s * 1000:g} ms" if edge_s < 1 else f"{edge_s:g} s"


def bars(counts: dict[str, int], label: str) -> Element:
    """Horizontal bars, each with its number."""
    row, wide = 26, 210
    most = max(counts.values(), default=1)
    inside: list[Element] = []
    for place, (reason, number) in enumerate(counts.items()):
        long = number / most * (WIDTH - wide - 60)
        inside.append(_label(wide - 10, place * row + 17, reason.replace("_", " "), "end"))
        inside.append(_rect(wide, place * row + 4, long, row - 8, "bar", meaning(reason)))
        inside.append(_label(wide + long + 8, place * row + 17, str(number), class_="label strong"))
    return _svg(len(counts) * row, label, *inside)
