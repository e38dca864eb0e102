"""What start.sh ends with: it watches the start, then says what a newcomer can do next."""

import shlex
import time
from pathlib import Path
from urllib.parse import urlsplit

import click
import msgspec

from llmwd.adapters import procs
from llmwd.adapters.rundir import Dirs, read_fact
from llmwd.core.shown import Status
from llmwd.core.wording import name_gpus, spell_duration, spell_gpus
from llmwd.ctl.arguments import DURATION
from llmwd.ctl.key import key_of
from llmwd.ctl.place import LOOK_EVERY_S, Look, Running, find_place, watch
from llmwd.ctl.program import INTERRUPTED, Refusal, examples
from llmwd.messages import RootFact
from llmwd.vocab import Exit, NodePhase, Phase, Reason, Source

PASSING = frozenset({Reason.starting, Reason.resume_delay, Reason.switching, Reason.lease_expired, Reason.server_backoff})
SIMULATED = "SIM-"  # how core/gpumap.py begins the uuid of a GPU that is not there
PATIENCE_S = 30.0  # for a reason that may pass by itself while workers look around for the first time


@click.command(hidden=True, epilog=examples('llmwd-ctl welcome --attach "tmux attach -t llm_watchdog"'))
@click.option("--attach", default="", help="The command that shows the supervisor's screen.")
@click.option("--no-wait", is_flag=True, help="Only until the supervisor is there.")
@click.option("--timeout", "within_s", type=DURATION, default=3600.0, show_default=True)
@click.option("--ended", type=click.Path(path_type=Path), help="A file that appears when the supervisor has failed.")
@click.option("--begin", "begin_s", type=DURATION, default=15.0, show_default=True, help="For the supervisor to be there.")
def welcome(attach: str, no_wait: bool, within_s: float, ended: Path | None, begin_s: float) -> None:
    """Watch a start until it serves, or cannot for now; then print what to do next."""
    dirs = find_place()
    running = _wait_for_root(dirs, begin_s, ended)
    if no_wait:
        click.echo("\n".join(_always(attach)))
        return
    try:
        seen = _watch_start(dirs, running, within_s)
    except KeyboardInterrupt:
        click.echo("\nllmwd goes on without this terminal; `bin/llmwd-ctl status` shows how far it is", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    status = seen.status
    if status.phase == NodePhase.serving:
        click.echo("\n".join(["", *next_steps(dirs, seen, attach)]))
        return
    why = f"{status.reason.meaning}" + (f" ({status.detail})" if status.detail else "")
    if status.phase in (NodePhase.failed, NodePhase.stopped):
        raise Refusal(f"{status.phase}: {why}\nlook at: bin/llmwd-ctl logs server; bin/llmwd-ctl logs root")
    later = "`bin/llmwd-ctl resume` ends that" if status.phase == NodePhase.held else "it starts by itself when that is over"
    click.echo(f"\nllmwd is running and does not serve for now: {why}; {later}.")
    click.echo("\n".join(_always(attach)))


def _wait_for_root(dirs: Dirs, within_s: float, ended: Path | None) -> Running:
    """The root by its own first fact: asking its lock while it takes it could be in its way."""
    end_s = time.monotonic() + within_s
    while time.monotonic() < end_s:
        told = read_fact(dirs.runtime, "root")
        if told is not None and isinstance(told.fact, RootFact) and procs.alive(told.fact.pid, told.fact.start):
            return told.fact.pid, told.fact.start
        if ended is not None and ended.exists():
            raise Refusal("the supervisor could not start:", Exit.not_running)
        time.sleep(LOOK_EVERY_S)
    raise Refusal(f"the supervisor has not come up within {within_s:g} s", Exit.not_running)


def _watch_start(dirs: Dirs, running: Running, within_s: float) -> Look:
    """Tell each change of phase; return when nothing more will change by itself, or it serves."""
    last, since_s, begin_s = None, 0.0, time.monotonic()
    for seen in watch(dirs, running, within_s):
        status, now_s = seen.status, time.monotonic()
        if (status.phase, status.reason) != last:
            last, since_s = (status.phase, status.reason), now_s
            detail = f": {status.detail}" if status.detail else ""
            click.echo(f"  {spell_duration(now_s - begin_s):>7}  {status.phase}, {status.reason.meaning}{detail}")
        if status.phase in (NodePhase.serving, NodePhase.failed, NodePhase.held):
            return seen
        if status.phase == NodePhase.waiting and status.reason not in PASSING:
            # "No evidence yet" and the like pass within seconds; a job that is there is there.
            if status.jobs or now_s - since_s > PATIENCE_S:
                return seen
    return seen


def next_steps(dirs: Dirs, seen: Look, attach: str) -> list[str]:
    """The text for somebody who has never used it, with this node's own values."""
    status = seen.status
    # With only ours taken, the model would move to spare GPUs at once; real spare ones are not for a show.
    gpus, taken = status.lease.gpus if status.lease else (), "its GPUs"
    if _simulated(status):
        gpus, taken = tuple(gpu.index for gpu in status.gpus), "all GPUs"
    lines = [
        f"{status.model.profile} is being served on {status.node}, {name_gpus(status.lease.gpus if status.lease else ())}.",
        "",
        "Chat with it:",
        *(f"  {line}" for line in curl_lines(dirs, seen)),
        "",
    ]
    if status.door.phase == Phase.ready and not status.door.keys:
        lines += ["Let somebody outside in, who gets this key (it is shown once):", "  bin/llmwd-ctl key add NAME", ""]
    if any(source.name == Source.sim and source.works for source in status.sources):
        lines += [
            f"Let a simulated job take {taken}, and see the model leave and come back:",
            f"  bin/llmwd-ctl simulate job --gpus {spell_gpus(gpus)} --for 30s; bin/llmwd-ctl status",
            "Measure how quickly it leaves, against YIELD_BUDGET:",
            "  bin/llmwd-ctl drill",
            "",
        ]
    return lines + _always(attach)


def _simulated(status: Status) -> bool:
    return bool(status.gpus) and all(gpu.uuid.startswith(SIMULATED) for gpu in status.gpus)


def _always(attach: str) -> list[str]:
    lines = ["See what it does:", "  bin/llmwd-ctl status"]
    if attach:
        lines += ["See its screen:", f"  {attach}"]
    return [*lines, "Stop it:", "  bin/llmwd-ctl stop"]


def curl_lines(dirs: Dirs, seen: Look) -> list[str]:
    """A command that can be pasted: two lines, joined with a backslash."""
    # By a pipe: on curl's command line every user of the node could read the key.
    try:
        asks = bool(key_of(dirs, seen))
    except Refusal:  # the profile has been changed meanwhile: what is served may still be asked
        asks = True
    key, header = ("bin/llmwd-ctl key local --header | ", " -H @-") if asks else ("", "")
    url = seen.status.server.url or ""
    insecure = " -k" if urlsplit(url).scheme == "https" else ""
    body = {
        "model": seen.status.model.served_as,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 100,
        "temperature": 0,  # or a small model may well say Lyon
    }
    data = shlex.quote(msgspec.json.encode(body).decode())
    return [f"{key}curl -sS{insecure} {url}/v1/chat/completions -H 'Content-Type: application/json'{header} \\", f"  -d {data}"]
