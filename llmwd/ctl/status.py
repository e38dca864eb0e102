"""`llmwd-ctl status`: what llmwd does on this node, for people and for programs."""

import time

import click
import msgspec

from llmwd.core.statusrows import briefed
from llmwd.ctl.arguments import as_json
from llmwd.ctl.place import find_place, look, not_running
from llmwd.ctl.program import examples
from llmwd.vocab import Exit


@click.command(epilog=examples("llmwd-ctl status", "llmwd-ctl status --json | jq -r .phase"))
@as_json()
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """Show what llmwd does on this node: model, GPUs, jobs, processes.

    Exit code 3 if no supervisor is running (with --json the object is printed all the same).
    """
    seen = look(find_place())
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(seen.status)).decode())
        ctx.exit(Exit.done if seen.running else Exit.not_running)
    if not seen.running:
        raise not_running()
    from llmwd.ctl.screen import show_status  # rich: 30 ms that a program's question does not pay

    show_status(briefed(seen.status), time.time())
