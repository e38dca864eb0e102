"""`report`: some days of llmwd on this node, for its operator and for the cluster's administrator."""

import stat
from pathlib import Path

import click
import msgspec

from llmwd import __version__
from llmwd.adapters.rundir import Dirs, short_host, write_atomic
from llmwd.ctl.arguments import as_json
from llmwd.ctl.past import read_past
from llmwd.ctl.place import find_place, look, served_home
from llmwd.ctl.program import Refusal, examples
from llmwd.ctl.reporting import SETTINGS_SHOWN, as_object, report_of

LONGEST_DAYS = 3650.0


class Days(click.ParamType):
    """A number of days; a part of one may be given."""

    name = "days"

    def convert(self, value, param, ctx) -> float:
        try:
            days = float(value)
        except ValueError:
            days = 0.0
        if not 0 < days <= LONGEST_DAYS:  # not a number is neither
            self.fail(f"{value!r} is not a number of days: write 7, or 0.5 for twelve hours, up to {LONGEST_DAYS:.0f}", param, ctx)
        return days


@click.command(epilog=examples("llmwd-ctl report", "llmwd-ctl report --days 30 --html report.html"))
@click.option("--days", type=Days(), default=7.0, show_default=True, help="How many days up to now.")
@as_json()
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write one HTML file instead, to be mailed.")
def report(days: float, as_json: bool, html: Path | None) -> None:
    """How GPUs were given back, how quickly, and what they were used for.

    Works without a running supervisor: everything is in the journal.
    """
    dirs = find_place()
    past = read_past(dirs)
    history = past.history(days)
    made = report_of(history, short_host(), __version__, days, past.running, _settings(dirs))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(as_object(made))).decode())
    if html is not None:
        from llmwd.ctl.page import page

        _write(html, page(made, history))
        click.echo(f"written to {html}", err=True)
    if as_json or html is not None:
        return
    if not past.journaled.lines:
        click.echo(f"nothing has been written to the journal in {dirs.state} yet, so there is nothing to report")
        return
    from llmwd.ctl.reportscreen import show_report

    show_report(made)


def _write(path: Path, text: str) -> None:
    try:
        if not path.is_symlink() and (not path.exists() or stat.S_ISREG(path.stat().st_mode)):
            write_atomic(path.absolute(), text.encode())
        else:  # a pipe, a device, a link: whoever reads there would be left without it, if it were replaced
            path.write_bytes(text.encode())
    except OSError as error:
        raise Refusal(f"{path} cannot be written: {error.strerror}") from error


def _settings(dirs: Dirs) -> dict[str, str]:
    """The settings that matter, as they are written in a settings file; none where they are not valid."""
    from llmwd.config import SETTINGS, load

    try:
        settings = load(served_home(dirs, look(dirs))).settings
    except Refusal:
        return {}
    if settings is None:
        return {}
    shown = [spec for spec in SETTINGS if spec.name in SETTINGS_SHOWN]
    return {spec.name: f"{_written(getattr(settings, spec.field))} {spec.unit}".strip() for spec in shown}


def _written(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
