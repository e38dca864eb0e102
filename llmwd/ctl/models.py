"""`models` and `check`: the profiles there are, and whether they and the settings are right."""

import os
import tempfile
from pathlib import Path

import click
import msgspec

from llmwd.config.settings import Settings
from llmwd.config.sources import CONFIG
from llmwd.ctl.arguments import PROFILE, as_json
from llmwd.ctl.place import find_place, look, profiles_in, served_home
from llmwd.ctl.program import Refusal, examples

CHECKED_ORIGIN = "http://127.0.0.1:8000"  # any will do: only the form of the configuration is checked


class Listed(msgspec.Struct, frozen=True):
    """One profile. `problems` are those of its own file."""

    name: str
    active: bool
    problems: tuple[str, ...]


def list_profiles(home: Path) -> list[Listed]:
    """Every profile of models/, checked one by one (some 10 ms each)."""
    from llmwd.config import active_profile, load

    active = active_profile(home)
    found = []
    for name in profiles_in(home):
        problems = tuple(str(each) for each in load(home, name).problems if each.file == f"models/{name}.env")
        found.append(Listed(name, name == active, problems))
    return found


@click.command(epilog=examples("llmwd-ctl models", "llmwd-ctl models --json"))
@click.option("--names", is_flag=True, help="Only the names and the active one; the files are not checked.")
@as_json("Print a JSON list instead.")
def models(names: bool, as_json: bool) -> None:
    """List the model profiles; the active one has a star."""
    from llmwd.config import active_profile

    dirs = find_place()
    home = served_home(dirs, look(dirs))
    if names:
        active = active_profile(home)
        listed = [Listed(name, name == active, ()) for name in profiles_in(home)]
    else:
        listed = list_profiles(home)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(listed)).decode())
        return
    if not listed:
        raise Refusal(f"there is no profile in {home / 'models'}: the README says how to add a model")
    for profile in listed:
        note = f"  (not valid: llmwd-ctl check {profile.name})" if profile.problems else ""
        click.echo(f"  {'*' if profile.active else ' '} {profile.name}{'  (active)' if profile.active else ''}{note}")


@click.command(epilog=examples("llmwd-ctl check", "llmwd-ctl check qwen3-coder-fp8"))
@click.argument("profile", type=PROFILE, required=False)
def check(profile: str | None) -> None:
    """Check the settings and a profile (the active one if none is named), that its vllm is there, the front door, the tunnel and notices.

    Prints every problem with file, line and variable; exit code 1 if there is one.
    """
    from llmwd.config import load

    dirs = find_place()
    loaded = load(served_home(dirs, look(dirs)), profile)
    # A start goes on without the program, and says so while it waits; here its absence is what is asked for.
    unfit = [warning for warning in loaded.warnings if warning.variable == "LLM_BIN"]
    for warning in loaded.warnings:
        if warning not in unfit:
            click.echo(f"warning: {warning}", err=True)
    problems = [str(problem) for problem in (*loaded.problems, *unfit)]
    problems += _tunnel_problems(loaded.settings) if loaded.settings is not None else []
    problems += _door_problems(loaded.settings) if loaded.settings is not None else []
    problems += _notice_problems(loaded.settings) if loaded.settings is not None else []
    if problems:
        raise Refusal("\n".join(problems))
    click.echo(f"no problem: {loaded.profile.name} serves {loaded.profile.model_name}")


def _door_problems(settings: Settings) -> list[str]:
    from llmwd.adapters import caddy

    why = caddy.survey(settings.caddy_bin)[1] if settings.door else ""
    return [f"{CONFIG}: CADDY_BIN: {why} (or DOOR=false, and there is no front door)"] if why else []


def _notice_problems(settings: Settings) -> list[str]:
    from llmwd.workers.noticeplan import survey

    return [f"{CONFIG}: {name}: {sentence}" for name, sentence in survey(settings)]


def _tunnel_problems(settings: Settings) -> list[str]:
    from llmwd.workers.tunnelplan import survey

    with tempfile.TemporaryDirectory() as folder:
        plan = survey(settings, CHECKED_ORIGIN, Path(folder) / "config.yml", os.environ)
    found = [*plan.problems, *([("TUNNEL_MODE", plan.passing)] if plan.passing else [])]
    return [f"{CONFIG}: {name}: {sentence}" for name, sentence in found]
