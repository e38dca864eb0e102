"""`history`: the last events of the journal, in readable lines, and what is added to it."""

import time
from collections.abc import Mapping
from datetime import datetime

import click
import msgspec

from llmwd.adapters.journal import JournalTail
from llmwd.core.journaled import Line, read
from llmwd.core.telling import event_text
from llmwd.ctl.arguments import as_json
from llmwd.ctl.past import Past, read_past
from llmwd.ctl.place import find_place
from llmwd.ctl.program import examples
from llmwd.ctl.reporting import iso

LOOK_EVERY_S = 0.1


class Told(msgspec.Struct, frozen=True):
    """One event as `history --json` prints it. at: ISO 8601 in UTC; text: the readable line."""

    at: str
    worker: str
    event: str
    text: str
    details: dict[str, object]


@click.command(epilog=examples("llmwd-ctl history", "llmwd-ctl history -f", "llmwd-ctl history -n 100 --json | jq -r '.[].text'"))
@click.option("-n", "--lines", type=click.IntRange(0), default=20, show_default=True, help="How many last events.")
@click.option("-f", "--follow", is_flag=True, help="Go on printing what happens, until Ctrl-C.")
@as_json("Print a JSON list instead; with --follow one object on each line.")
def history(lines: int, follow: bool, as_json: bool) -> None:
    """What happened last: leases, models, yields with their times, orders and who gave them."""
    dirs = find_place()
    tail = JournalTail(dirs.state) if follow else None
    past = read_past(dirs)
    kept = _without_repeats(past.journaled.lines)
    last = kept[len(kept) - min(lines, len(kept)) :]
    if as_json and tail is None:
        click.echo(msgspec.json.format(msgspec.json.encode([told_of(line) for line in last])).decode())
        return
    printer = _Printer(as_json)
    printer.print(last)
    if not last and tail is None:
        click.echo("nothing has been written to the journal yet", err=True)
    if past.journaled.broken:
        click.echo(f"warning: {past.journaled.broken} lines of the journal cannot be read", err=True)
    if tail is not None:
        _follow(tail, past, printer, next((line.details for line in reversed(kept) if line.event == "gpus"), None))


def _follow(tail: JournalTail, past: Past, printer: "_Printer", gpus: Mapping[str, object] | None) -> None:
    """gpus: who had them, as told last."""
    seen = past.last  # what came between the opening of the tail and the reading is in both
    while True:
        rows = [row for row in tail.new() if row not in seen]
        added = read(rows, time.time(), time.monotonic()).lines
        printer.print(_without_repeats(added, gpus))
        gpus = next((line.details for line in reversed(added) if line.event == "gpus"), gpus)
        time.sleep(LOOK_EVERY_S)


class _Printer:
    """Lines under the day that they are of, or objects."""

    def __init__(self, as_json: bool):
        self._as_json = as_json
        self._day = ""

    def print(self, lines: list[Line]) -> None:
        for line in lines:
            if self._as_json:
                click.echo(msgspec.json.encode(told_of(line)).decode())
                continue
            when = datetime.fromtimestamp(line.at)
            if f"{when:%Y-%m-%d}" != self._day:
                self._day = f"{when:%Y-%m-%d}"
                click.echo(self._day)
            click.echo(f"  {when:%H:%M:%S}.{when.microsecond // 1000:03d}  {event_text(line)}")


def _without_repeats(lines: tuple[Line, ...], gpus: Mapping[str, object] | None = None) -> list[Line]:
    """Who has the GPUs is written again and again; only a change (of `gpus`) is an event."""
    kept = []
    for line in lines:
        if line.event == "gpus":
            if line.details == gpus:
                continue
            gpus = line.details
        kept.append(line)
    return kept


def told_of(line: Line) -> Told:
    return Told(iso(line.at), line.worker, line.event, event_text(line), dict(line.details))
