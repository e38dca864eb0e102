"""`key`: the API key that the served model asks for, for those who may read our files."""

import click

from llmwd.adapters import keyfile
from llmwd.adapters.rundir import DirError, Dirs
from llmwd.ctl.place import Look, find_place, look, served_home
from llmwd.ctl.program import Refusal, examples


def key_of(dirs: Dirs, seen: Look) -> str | None:
    """The key that the served (else the active) profile asks for; None: it asks for none. Refusal when that is unclear."""
    from llmwd.config import api_key, load

    served = seen.status.model.profile if seen.running and seen.status.model else None
    loaded = load(served_home(dirs, seen), served)
    if loaded.profile is None or loaded.settings is None:
        raise Refusal("the configuration is not valid: see llmwd-ctl check")
    try:
        return api_key(loaded.profile, loaded.settings, keyfile.read(dirs.state) or "")
    except DirError as error:
        raise Refusal(str(error)) from error


@click.command(
    epilog=examples("OPENAI_API_KEY=$(bin/llmwd-ctl key) python my_client.py", "llmwd-ctl key --header | curl -H @- URL")
)
@click.option("--header", is_flag=True, help="Print it as the line of a request: Authorization: Bearer KEY")
def key(header: bool) -> None:
    """Print the API key that the server asks for.

    Hand it on by a pipe or a variable: on a command line every user of the node could read it.
    """
    dirs = find_place()
    found = key_of(dirs, look(dirs))
    if not found:
        raise Refusal("the server asks for no API key, or none has been made yet (the first start does)")
    click.echo(f"Authorization: Bearer {found}" if header else found)
