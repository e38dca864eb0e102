"""A report on a person's screen, made for 80 columns."""

from datetime import datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmwd.core.telling import spell_share
from llmwd.core.timeline import PHASES
from llmwd.core.wording import spell_duration
from llmwd.ctl.reporting import Report, part_rows
from llmwd.ctl.screen import BAD, QUIET, indented

WIDEST = 80


def show_report(report: Report) -> None:
    """The summary in sentences, then tables: how long releases took, why they were, where the time and the GPUs went."""
    console = Console(highlight=False)
    console.width = min(console.width, WIDEST)
    console.print(Text.assemble((f"llmwd on {report.node}", "bold"), (f"  {report.days:g} days up to {report.end[:16].replace('T', ' ')} UTC", QUIET)))
    console.print()
    for words in report.words:
        console.print(indented(Text(words)))
    sums = report.sums
    for title, parts in (("giving GPUs back", sums.parts), ("giving GPUs back to simulated jobs", sums.simulated_parts)):
        if rows := [(meant.replace(", after that", ""), *rest) for meant, *rest in part_rows(parts)]:
            _show(console, (title, "count", "p50", "p90", "p99", "max"), rows)
    if sums.reasons:
        _show(console, ("why", "times"), [(reason, str(number)) for reason, number in sums.reasons.items()])
    times = [(phase, sums.phases_s[phase]) for phase in PHASES if sums.phases_s[phase]]
    for kind, reasons in (("waiting", sums.waiting_s), ("held", sums.parked_s)):
        times += [(f"{kind}: {reason}", long_s) for reason, long_s in reasons.items()]
    if times:
        _show(console, ("time", "", "share"), [(name, spell_duration(long_s), spell_share(long_s, sums.recorded_s)) for name, long_s in times])
    hours = {**sums.gpu_hours, **{f"all of {holder}": value for holder, value in sums.users_gpu_hours.items() if value}}
    _show(console, ("GPU-hours", ""), [(name, f"{value:.2f}") for name, value in hours.items()])
    console.print()
    console.print(indented(_last_drill(report)))
    if report.gaps:
        console.print()
        console.print(indented(Text("\n".join(report.gaps), QUIET)))


def _last_drill(report: Report) -> Text:
    drill = report.drill
    if drill is None:
        return Text("last drill: none yet (llmwd-ctl drill)", QUIET)
    when = f"{datetime.fromtimestamp(drill.at):%Y-%m-%d %H:%M}"
    return Text.assemble(f"last drill ({when}, while {drill.while_phase}): ", (drill.verdict, "" if drill.passed else BAD))


def _show(console: Console, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=QUIET, pad_edge=False)
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place else "left", overflow="fold", no_wrap=bool(place))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print()
    console.print(indented(table))
