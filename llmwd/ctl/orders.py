"""`yield`, `resume`, `switch`, `reset`, `notify`: orders to the worker that can carry them out, acknowledged by it."""

import os
import pwd
import signal
import time
from collections.abc import Callable
from pathlib import Path

import click

from llmwd.adapters import procs
from llmwd.adapters.desk import ask
from llmwd.adapters.rundir import Dirs, short_host
from llmwd.ctl.arguments import DURATION, PROFILE
from llmwd.ctl.place import Look, Running, find_place, look, not_running, profiles_in, require_running, served_home, watch
from llmwd.ctl.program import Refusal, examples
from llmwd.messages import NotifyOrder, Order, Refused, ResetOrder, ResumeOrder, ServerFact, SwitchOrder, YieldOrder
from llmwd.vocab import Exit, NodePhase, Phase, Reason, Worker

ANSWER_WITHIN_S = 5.0
FUTILE = frozenset({Reason.no_gpus, Reason.held, Reason.config_error})  # waiting longer cannot bring the model up


def asker() -> str:
    """Who gives an order, for the journal."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def give(dirs: Dirs, worker: Worker, order: Order) -> str:
    """The worker's own words on what it does about the order; Refusal when it does not, or does not answer."""
    reply = ask(dirs.runtime, worker, order, ANSWER_WITHIN_S)
    if reply is None:
        raise Refusal(
            f"the {worker} worker did not answer within {ANSWER_WITHIN_S:g} s; `llmwd-ctl status` shows how it is",
            Exit.timed_out,
        )
    if isinstance(reply, Refused):
        raise Refusal("\n".join(reply.problems))
    return reply.detail


def wait_for(dirs: Dirs, running: Running, within_s: float, done: Callable[[Look], bool]) -> None:
    """Watch until `done`, telling each change of phase on standard error; Refusal (4) when time is over."""
    last = None
    for seen in watch(dirs, running, within_s):
        if done(seen):
            return
        status = seen.status
        if (status.phase, status.reason, status.detail) != last:
            last = (status.phase, status.reason, status.detail)
            click.echo(f"{status.phase}: {status.detail or status.reason.meaning}", err=True)
    raise Refusal(
        f"not there after {within_s:g} s: {status.phase}, {status.detail or status.reason.meaning}", Exit.timed_out
    )


def timeout(default_s: float):
    return click.option(
        "--timeout", "within_s", type=DURATION, default=default_s, show_default=True, help="How long --wait waits."
    )


@click.command("yield", epilog=examples("llmwd-ctl yield", "llmwd-ctl yield --for 2h --wait"))
@click.option("--for", "for_s", type=DURATION, help="Come back by itself after this time: 2h, 30m, 90s, 1h30m.")
@click.option("--wait", is_flag=True, help="Return only when no process of ours is on a GPU any more.")
@timeout(60)
def give_back(for_s: float | None, wait: bool, within_s: float) -> None:
    """Give all GPUs back now and stay away until `resume`, or for a time.

    The order is kept: restarts of llmwd, and of the node, do not end it.
    """
    dirs = find_place()
    running = require_running(dirs)
    click.echo(give(dirs, Worker.resolver, YieldOrder(for_s=for_s, by=asker())))
    if not wait:
        return
    ordered = False

    def gone(seen: Look) -> bool:
        nonlocal ordered
        held = seen.status.hold is not None
        if ordered and not held:
            raise Refusal("the hold was ended meanwhile, so llmwd may take GPUs again")
        ordered = ordered or held
        return ordered and _off_the_gpus(seen)

    wait_for(dirs, running, within_s, gone)
    click.echo("no process of ours is on a GPU")


def _off_the_gpus(seen: Look) -> bool:
    # `held` is said by the vLLM manager once it knows of the hold and nothing of its tree is left;
    # a manager that has failed says so instead, and holds nothing.
    server = seen.facts.server
    failed = seen.status.phase == NodePhase.failed and server is not None and not server.holding
    return seen.status.phase == NodePhase.held or failed


@click.command(epilog=examples("llmwd-ctl resume"))
def resume() -> None:
    """End a `yield`: llmwd takes GPUs again as soon as enough are free."""
    dirs = find_place()
    require_running(dirs)
    click.echo(give(dirs, Worker.resolver, ResumeOrder(by=asker())))


@click.command(epilog=examples("llmwd-ctl switch qwen3-coder-fp8", "llmwd-ctl switch glm-4.7-flash --wait"))
@click.argument("profile", type=PROFILE)
@click.option("--wait", is_flag=True, help="Return only when the new model answers (exit code 1 if it cannot).")
@timeout(600)
def switch(profile: str, wait: bool, within_s: float) -> None:
    """Serve another model: PROFILE is a file in models/, without .env.

    The profile is checked first; one with mistakes changes nothing. The choice is kept. If no
    supervisor is running, it takes effect at the next start.
    """
    dirs = find_place()
    seen = look(dirs)
    check_profile(served_home(dirs, seen), profile)
    if seen.running is None:
        from llmwd.config import set_active

        try:
            set_active(dirs.home, profile)
        except OSError as error:
            raise Refusal(f"the choice cannot be kept in {dirs.home}: {error.strerror}") from error
        click.echo(f"{profile} is the active profile; no supervisor is running on {short_host()}, the next start serves it")
        if wait:
            raise not_running()
        return
    before = seen.facts.server
    click.echo(give(dirs, Worker.vllm, SwitchOrder(profile=profile, by=asker())))
    if wait:
        ordered_s = time.monotonic()
        wait_for(dirs, seen.running, within_s, lambda now: _serves(now, profile, before, ordered_s))
        click.echo(f"{profile} is being served")


def check_profile(home: Path, profile: str) -> None:
    """Refusal with all problems of this profile and the settings, or with the list if there is no such profile."""
    from llmwd.config import load

    names = profiles_in(home)
    if profile not in names:
        listed = "\n".join(f"  {name}" for name in names) or f"  (none yet in {home / 'models'})"
        raise Refusal(f"there is no profile {profile}; there are:\n{listed}")
    loaded = load(home, profile)
    for warning in loaded.warnings:
        click.echo(f"warning: {warning}", err=True)
    if loaded.problems:
        raise Refusal("\n".join([f"{profile} is not valid, nothing was changed:", *map(str, loaded.problems)]))


def _serves(seen: Look, profile: str, before: ServerFact | None, ordered_s: float) -> bool:
    """Whether the new model answers. Refusal when it cannot come up by waiting."""
    server, status = seen.facts.server, seen.status
    if server is None or server.profile != profile:
        return False
    if server.at_s < ordered_s and before is not None and server.since_at == before.since_at:
        return False  # what the manager said before it got the order
    if status.phase == NodePhase.serving:
        return True
    if status.phase in (NodePhase.failed, NodePhase.stopped) or status.reason in FUTILE:
        raise Refusal(f"{profile} does not come up: {status.detail or status.reason.meaning} ({status.reason})")
    return False


@click.command(epilog=examples("llmwd-ctl reset"))
def reset() -> None:
    """Forget failures: start again what ended too often and is in quarantine."""
    dirs = find_place()
    running = require_running(dirs)
    root = look(dirs, running).facts.root
    failed = {each.name for each in root.workers if each.phase == Phase.failed} if root else set()
    # The root first: a worker in quarantine has no process, and begins without a memory of failures.
    if not procs.signal_process(*running, signal.SIGUSR1):
        raise Refusal("the supervisor has ended meanwhile", Exit.not_running)
    for name in sorted(failed):
        click.echo(f"{name}: started again")
    for worker in (Worker.vllm, Worker.door, Worker.tunnel, Worker.notifier):
        if worker not in failed:
            click.echo(f"{worker}: {give(dirs, worker, ResetOrder(by=asker()))}")


@click.command(epilog=examples("llmwd-ctl notify", "llmwd-ctl notify --message 'maintenance on Friday'"))
@click.option("--message", default="", help="What the notice says.")
def notify(message: str) -> None:
    """Send a notice, to try whether notices arrive (exit code 1 if they are refused)."""
    dirs = find_place()
    require_running(dirs)
    click.echo(give(dirs, Worker.notifier, NotifyOrder(message=message, by=asker())))
