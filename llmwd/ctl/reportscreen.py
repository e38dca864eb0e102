"""A report on a person's screen, made for 80 columns."""

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmwd.core.pastyields import PARTS
from llmwd.core.telling import spell_s, spell_share
from llmwd.core.timeline import PHASES
from llmwd.core.wording import spell_duration
from llmwd.ctl.reporting import Report
from llmwd.ctl.screen import BAD, QUIET

WIDEST = 80


def show_report(report: Report) -> None:
    """The summary in sentences, then tables: how long releases took, why they were, where the time and the GPUs went."""
    console = Console(highlight=False)
    console.width = min(console.width, WIDEST)
    console.print(Text.assemble((f"llmwd on {report.node}", "bold"), (f"  {report.days:g} days up to {report.end[:16].replace('T', ' ')} UTC", QUIET)))
    console.print()
    for words in report.words:
        console.print(_indented(Text(words)))
    sums = report.sums
    parts = [(meant.replace(", after that", ""), sums.parts[part]) for part, meant in PARTS.items() if part in sums.parts]
    if parts:
        _show(console, ("giving GPUs back", "count", "p50", "p90", "p99", "max"), [
            (meant, str(rank.count), *(spell_s(value) for value in (rank.p50, rank.p90, rank.p99, rank.max))) for meant, rank in parts
        ])  # fmt: skip
    if sums.reasons:
        _show(console, ("why", "times"), [(reason, str(number)) for reason, number in sums.reasons.items()])
    times = [(phase, sums.phases_s[phase]) for phase in PHASES if sums.phases_s[phase]]
    for kind, reasons in (("waiting", sums.waiting_s), ("held", sums.parked_s)):
        times += [(f"{kind}: {reason}", long_s) for reason, long_s in reasons.items()]
    if times:
        _show(console, ("time", "", "share"), [(name, spell_duration(long_s), spell_share(long_s, sums.recorded_s)) for name, long_s in times])
    hours = {**sums.gpu_hours, **{f"all of {holder}": value for holder, value in sums.users_gpu_hours.items() if value}}
    _show(console, ("GPU-hours", ""), [(name, f"{value:.2f}") for name, value in hours.items()])
    if report.drill is not None:
        console.print()
        console.print(_indented(Text.assemble("last drill: ", (report.drill.verdict, "" if report.drill.passed else BAD))))
    if report.gaps:
        console.print()
        console.print(_indented(Text("\n".join(report.gaps), QUIET)))


def _indented(content) -> Padding:
    return Padding(content, (0, 0, 0, 2), expand=False)


def _show(console: Console, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=QUIET, pad_edge=False)
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place else "left", overflow="fold", no_wrap=bool(place))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print()
    console.print(_indented(table))
