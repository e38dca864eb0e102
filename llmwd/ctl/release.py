"""`release`: the node's prolog says that a job has got GPUs, and waits until nothing of ours is on them."""

import time

import click
import msgspec

from llmwd.adapters.desk import ask
from llmwd.core.wording import name_gpus
from llmwd.ctl.arguments import DURATION, GPUS, JOB, as_json
from llmwd.ctl.orders import asker
from llmwd.ctl.place import find_place, require_running
from llmwd.ctl.program import Refusal, examples
from llmwd.messages import Refused, ReleaseOrder
from llmwd.vocab import Exit, Worker

# How much later than the resolver's own refusal we stop waiting for it.
REFUSAL_WITHIN_S = 0.3


class Outcome(msgspec.Struct, frozen=True):
    """What --json prints."""

    job: str
    gpus: tuple[int, ...]
    released: bool
    detail: str
    took_s: float


@click.command(epilog=examples("llmwd-ctl release --job 42 --gpus 0-1 --within 10s", "llmwd-ctl release --job 42 --gpus none"))
@click.option("--job", type=JOB, required=True, help="The job's id.")
@click.option("--gpus", type=GPUS, required=True, help="Its GPUs on this node, by Slurm's indices: 0-1, 0,2,5-7, or none.")
@click.option("--within", "within_s", type=DURATION, default=10, show_default=True, help="How long to wait at most.")
@as_json()
def release(job: str, gpus: tuple[int, ...], within_s: float, as_json: bool) -> None:
    """A Slurm job gets these GPUs: return when no process of ours is on them any more.

    This is for the node's prolog (etc/slurm/prolog-llmwd.sh). The job counts as one that was seen: it need not be
    ended here. If none of its GPUs is ours, nothing is given back, and this returns at once.
    """
    began_s = time.monotonic()
    dirs = find_place()
    require_running(dirs)
    order = ReleaseOrder(job=job, gpus=gpus, within_s=within_s, by=asker())
    reply = ask(dirs.runtime, Worker.resolver, order, within_s + REFUSAL_WITHIN_S)
    code, detail = Exit.done, ""
    if reply is None:
        code, detail = Exit.timed_out, f"the resolver did not answer within {within_s:g} s: {name_gpus(gpus)} may still be in use"
    elif isinstance(reply, Refused):
        code, detail = Exit.timed_out if reply.timed_out else Exit.refused, "\n".join(reply.problems)
    else:
        detail = reply.detail
    if as_json:
        outcome = Outcome(job, gpus, code == Exit.done, detail, round(time.monotonic() - began_s, 3))
        click.echo(msgspec.json.encode(outcome).decode())
        raise click.exceptions.Exit(code)
    if code != Exit.done:
        raise Refusal(detail, code)
    click.echo(detail)
