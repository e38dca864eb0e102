"""`key`: the keys with which people come through the front door, and the one that the model asks for on this node."""

import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import click
import msgspec

from llmwd.adapters import keyfile
from llmwd.adapters.rundir import DirError, Dirs, make_private
from llmwd.core.doorkeys import Key, KeyFileError, added, dump, in_force, is_name, made_of, parse, removed
from llmwd.core.wording import spell_duration
from llmwd.ctl.arguments import DURATION, as_json
from llmwd.ctl.place import Look, find_place, look, served_home
from llmwd.ctl.program import Refusal, examples


def key_of(dirs: Dirs, seen: Look) -> str | None:
    """The key that the served (else the active) profile asks for; None: it asks for none. Refusal when that is unclear."""
    from llmwd.config import api_key, load

    served = seen.status.model.profile if seen.running and seen.status.model else None
    loaded = load(served_home(dirs, seen), served)
    if loaded.profile is None or loaded.settings is None:
        raise Refusal("\n".join(["the configuration is not valid:", *map(str, loaded.problems)]))
    try:
        return api_key(loaded.profile, loaded.settings, keyfile.read(dirs.state) or "")
    except DirError as error:
        raise Refusal(str(error)) from error


class KeyName(click.ParamType):
    """The name of a key."""

    name = "name"

    def convert(self, value, param, ctx) -> str:
        if not is_name(value):
            self.fail(f"{value!r} is not a name: letters, digits, `-`, `_` and `.`, at most 64, a letter or digit first", param, ctx)
        return value


@click.group(epilog=examples("llmwd-ctl key add alice --expires 30d", "llmwd-ctl key list", "llmwd-ctl key revoke alice"))
def key() -> None:
    """Keys: of the people outside, for the front door; and the model's own, for this node.

    Only a hash of a door's key is kept. Changes hold within a second; no stream is cut.
    """


@key.command(epilog=examples("llmwd-ctl key add alice --expires 30d", "llmwd-ctl key add alice | mail -s key alice"))
@click.argument("name", type=KeyName())
@click.option("--expires", "expires_s", type=DURATION, help="The key ends after this time; without: never.")
def add(name: str, expires_s: float | None) -> None:
    """Make a key and print it, this one time.

    Clients send it as `Authorization: Bearer KEY`, as OpenAI's do by themselves (OPENAI_API_KEY).
    """
    from llmwd.adapters import doorkeys

    dirs = find_place()
    while (found := made_of(name, doorkeys.drawn())) is None:
        pass
    made, secret = found
    now_at = time.time()
    expires_at = now_at + expires_s if expires_s else None
    new = Key(name=name, id=made[-6:], bcrypt=doorkeys.hashed(secret), created_at=now_at, expires_at=expires_at)
    make_private(dirs.state, "state")
    _change(dirs, lambda path, keys: added(path, keys, new))
    click.echo(made)
    end = f"until {_spell(expires_at)}" if expires_at else "until it is revoked"
    click.echo(f"This is the key of {name}, {end}; it is not shown again.", err=True)


@key.command("list", epilog=examples("llmwd-ctl key list", "llmwd-ctl key list --json"))
@as_json("Print a JSON list instead.")
def list_keys(as_json: bool) -> None:
    """Show whose keys there are, since and until when; never a key, of which only the end is known (`id`)."""
    from llmwd.adapters import doorkeys

    path = doorkeys.path_in(find_place().state)
    try:
        keys = _parsed(path, doorkeys.read_bytes(path))
    except KeyFileError as error:
        raise Refusal(str(error)) from error
    now_at = time.time()
    valid = in_force(keys, now_at)
    if as_json:
        told = [
            {"name": each.name, "id": each.id, "created_at": each.created_at, "expires_at": each.expires_at, "valid": each in valid}
            for each in keys
        ]
        click.echo(msgspec.json.format(msgspec.json.encode(told)).decode())
        return
    if not keys:
        click.echo("no keys: llmwd-ctl key add NAME makes one")
        return
    from llmwd.ctl.screen import show_table

    rows = [(each.name, f"…{each.id}", _spell(each.created_at), _spell_end(each, now_at)) for each in keys]
    show_table(("name", "ends in", "made", "holds"), rows, "Keys of the front door")


@key.command(epilog=examples("llmwd-ctl key revoke alice"))
@click.argument("name", type=KeyName())
def revoke(name: str) -> None:
    """Take a key's right away, within a second. Answers under way end as they would."""
    dirs = find_place()
    if not dirs.state.is_dir():
        raise Refusal(f"there is no key called {name!r}, nor any other")
    _change(dirs, lambda path, keys: removed(path, keys, name))
    click.echo(f"the key of {name} opens nothing any more")


@key.command(
    epilog=examples("OPENAI_API_KEY=$(bin/llmwd-ctl key local) python my_client.py", "llmwd-ctl key local --header | curl -H @- URL")
)
@click.option("--header", is_flag=True, help="Print it as the line of a request: Authorization: Bearer KEY")
def local(header: bool) -> None:
    """Print the API key that vLLM itself asks for, on this node.

    Hand it on by a pipe or a variable: on a command line every user of the node could read it.
    """
    dirs = find_place()
    found = key_of(dirs, look(dirs))
    if not found:
        raise Refusal("the server asks for no API key, or none has been made yet (the first start does)")
    click.echo(f"Authorization: Bearer {found}" if header else found)


def _parsed(path: Path, data: bytes | None) -> tuple[Key, ...]:
    return parse(str(path), data) if data is not None else ()


def _change(dirs: Dirs, by: Callable[[str, tuple[Key, ...]], tuple[Key, ...]]) -> None:
    from llmwd.adapters import doorkeys

    path = doorkeys.path_in(dirs.state)
    try:
        doorkeys.change(dirs.state, lambda data: dump(by(str(path), _parsed(path, data))))
    except KeyFileError as error:
        raise Refusal(str(error)) from error


def _spell(at: float) -> str:
    return datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M")


def _spell_end(each: Key, now_at: float) -> str:
    if each.expires_at is None:
        return "until revoked"
    if each.expires_at <= now_at:
        return f"not since {_spell(each.expires_at)}"
    return f"until {_spell(each.expires_at)} ({spell_duration(each.expires_at - now_at)})"
