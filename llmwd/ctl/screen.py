"""What goes to a person's screen as a table. rich does widths, wrapping, colours, NO_COLOR and pipes."""

from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmwd.core.shown import Status
from llmwd.core.statusrows import age_s, summary_rows
from llmwd.core.wording import spell_duration
from llmwd.vocab import Holder, NodePhase, Phase

GOOD, BUSY, BAD, OURS, THEIRS, QUIET = "green", "yellow", "bold red", "cyan", "magenta", "dim"
MIDDLE_WIDTH = 24
STYLES: dict[str, str] = {
    NodePhase.serving: GOOD,
    NodePhase.held: THEIRS,
    Phase.ready: GOOD,
    Holder.free: GOOD,
    Holder.llmwd: OURS,
    Holder.slurm: THEIRS,
    Holder.other: THEIRS,
    Holder.unknown: BAD,
    Phase.failed: BAD,
    Phase.stopped: QUIET,
}


def _word(value: str) -> Text:
    return Text(str(value), STYLES.get(value, BUSY))


def show_status(status: Status, now_at: float) -> None:
    """The whole table of `status`, made for 80 columns."""
    console = Console(highlight=False)
    told = Text.assemble(("● ", STYLES.get(status.phase, BUSY)), (status.phase, "bold"), "  ", status.node)
    age = age_s(status.since, now_at)
    if age is not None:
        told.append(f"  for {spell_duration(age)}", QUIET)
    console.print(told)
    for sentence in filter(None, (status.reason.meaning, status.detail)):
        console.print(indented(Text(sentence)))
    console.print()
    console.print(indented(_pairs(summary_rows(status, now_at))))
    console.print()
    both = Table.grid(padding=(0, 5))
    both.add_row(*filter(None, (_gpus(status), _workers(status))))
    console.print(indented(both))
    notes = _notes(status)
    if notes:
        console.print()
        console.print(indented(_pairs(notes)))


def indented(content) -> Padding:
    """Two columns to the right, as everything under a headline is."""
    return Padding(content, (0, 0, 0, 2), expand=False)


def _pairs(rows: list[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style=QUIET, no_wrap=True, min_width=9)
    grid.add_column(overflow="fold")
    for label, text in rows:
        grid.add_row(label, Text(text))
    return grid


def _columns(*names: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=QUIET, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right" if name in ("gpu", "pid") else "left", overflow="fold")
    return table


def _gpus(status: Status) -> Table | None:
    if not status.gpus:
        return None
    table = _columns("gpu", "holder", "job")
    for gpu in status.gpus:
        table.add_row(str(gpu.index), _word(gpu.holder), gpu.job or "")
    return table


def _workers(status: Status) -> Table | None:
    if not status.workers:
        return None
    table = _columns("worker", "pid", "phase", "restarts")
    for worker in status.workers:
        phase = _word(worker.phase)
        if worker.name in status.stale:
            phase.append(" (silent)", BAD)
        restarts = Text(str(worker.restarts), BUSY if worker.restarts else QUIET)
        table.add_row(worker.name, str(worker.pid or ""), phase, restarts)
    if status.root.pid:
        table.add_row("root", str(status.root.pid), "", "", style=QUIET)
    return table


def _notes(status: Status) -> list[tuple[str, str]]:
    """What explains the tables: why a GPU counts as it does, what a worker last said, who looks for jobs."""
    notes = [(f"gpu {gpu.index}", gpu.why) for gpu in status.gpus if gpu.why and gpu.holder != Holder.free]
    notes += [(each.name, each.detail) for each in status.workers if each.detail and each.phase != Phase.ready]
    works = ", ".join(source.name for source in status.sources if source.works)
    if status.sources:
        notes.append(("detection", works or "none: nothing tells about Slurm's jobs, so nothing is started"))
    label = "not here"
    for source in status.sources:
        if not source.works:
            notes.append((label, f"{source.name}: {source.why}" if source.why else source.name))
            label = ""
    return notes


def show_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]], title: str = "") -> None:
    """A plain table with a header; the first column is never wrapped."""
    console = Console(highlight=False)
    if title:
        console.print(Text(title, "bold"))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=QUIET, pad_edge=False)
    for number, name in enumerate(header):
        middle = 0 < number < len(header) - 1
        table.add_column(name, no_wrap=number == 0, overflow="fold", max_width=MIDDLE_WIDTH if middle else None)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    console.print()
