"""`stop` and `reload`: signals to the root, and only to it (by pidfd, checked against its start time)."""

import os
import select
import signal

import click

from llmwd.adapters import procs
from llmwd.ctl.arguments import DURATION
from llmwd.ctl.place import find_place, look, require_running, served_home
from llmwd.ctl.program import Refusal, examples
from llmwd.vocab import Exit


@click.command(epilog=examples("llmwd-ctl stop"))
@click.option("--timeout", "within_s", type=DURATION, default=60.0, show_default=True, help="How long to wait.")
def stop(within_s: float) -> None:
    """End llmwd on this node in order, and wait until nothing of it is left."""
    pid, start = require_running(find_place())
    root = procs.open_process(pid, start)
    if root is None:
        return  # it ended between the two looks
    try:
        if not procs.send(root, signal.SIGTERM):
            raise Refusal(f"the supervisor (pid {pid}) cannot be signalled: it is not yours")
        if not select.select([root], [], [], within_s)[0]:
            raise Refusal(f"the supervisor (pid {pid}) has not ended within {within_s:g} s", Exit.timed_out)
    finally:
        os.close(root)
    click.echo(f"stopped (pid {pid})")


@click.command(epilog=examples("llmwd-ctl reload"))
def reload() -> None:
    """Read the settings again. A serving model stays, unless its own settings changed.

    Settings with mistakes are refused here, and the old ones stay in force.
    """
    from llmwd.config import load

    dirs = find_place()
    running = require_running(dirs)
    problems = load(served_home(dirs, look(dirs, running))).problems
    if problems:
        raise Refusal("\n".join(["the settings are not valid, the old ones stay in force:", *map(str, problems)]))
    if not procs.signal_process(*running, signal.SIGHUP):
        raise Refusal("the supervisor has ended meanwhile", Exit.not_running)
    click.echo("the settings are being read again")
