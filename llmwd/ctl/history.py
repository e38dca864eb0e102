"""`history`: the last events of the journal, in readable lines."""

from datetime import UTC, datetime

import click
import msgspec

from llmwd.core.journaled import Line
from llmwd.core.telling import event_text
from llmwd.ctl.arguments import as_json
from llmwd.ctl.past import read_past
from llmwd.ctl.place import find_place
from llmwd.ctl.program import examples


class Told(msgspec.Struct, frozen=True):
    """One event as `history --json` prints it. at: ISO 8601 in UTC; text: the readable line."""

    at: str
    worker: str
    event: str
    text: str
    details: dict[str, object]


@click.command(epilog=examples("llmwd-ctl history", "llmwd-ctl history -n 100 --json | jq -r '.[].text'"))
@click.option("-n", "--lines", type=click.IntRange(1), default=20, show_default=True, help="How many last events.")
@as_json("Print a JSON list instead.")
def history(lines: int, as_json: bool) -> None:
    """What happened last: leases, models, yields with their times, orders and who gave them."""
    past = read_past(find_place())
    last = _without_repeats(past.journaled.lines)[-lines:]
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode([_told(line) for line in last])).decode())
        return
    if not last:
        click.echo("nothing has been written to the journal yet", err=True)
    day = ""
    for line in last:
        when = datetime.fromtimestamp(line.at)
        if f"{when:%Y-%m-%d}" != day:
            day = f"{when:%Y-%m-%d}"
            click.echo(day)
        click.echo(f"  {when:%H:%M:%S}.{when.microsecond // 1000:03d}  {event_text(line)}")
    if past.journaled.broken:
        click.echo(f"warning: {past.journaled.broken} lines of the journal cannot be read", err=True)


def _without_repeats(lines: tuple[Line, ...]) -> list[Line]:
    """Who has the GPUs is written again and again; only a change is an event."""
    kept, gpus = [], None
    for line in lines:
        if line.event == "gpus":
            if line.details == gpus:
                continue
            gpus = line.details
        kept.append(line)
    return kept


def _told(line: Line) -> Told:
    at = datetime.fromtimestamp(line.at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return Told(at, line.worker, line.event, event_text(line), dict(line.details))
