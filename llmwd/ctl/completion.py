"""`completion`: the script that lets a shell complete verbs, profiles, logs and job ids."""

import click
from click.shell_completion import get_completion_class

from llmwd.ctl.program import NAME, examples


@click.command(
    epilog=examples(
        'eval "$(bin/llmwd-ctl completion bash)"    # for ~/.bashrc, with the whole path',
        "bin/llmwd-ctl completion fish > ~/.config/fish/completions/llmwd-ctl.fish",
    )
)
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script for a shell."""
    variable = f"_{NAME}_COMPLETE".replace("-", "_").upper()
    click.echo(get_completion_class(shell)(ctx.find_root().command, {}, NAME, variable).source())
