"""`explain`: what llmwd's words, messages and settings mean, and what it understands from Slurm's output.

All of it is generated from what the program itself uses, so it cannot say anything else.
"""

import inspect
import sys
import typing

import click
import msgspec

from llmwd import messages as wire
from llmwd import vocab
from llmwd.core.wording import name_gpus
from llmwd.ctl.arguments import as_json
from llmwd.ctl.program import examples

WORDS = (vocab.NodePhase, vocab.Reason, vocab.Holder, vocab.Phase, vocab.Worker, vocab.Source, vocab.Event)
CHANNELS = (
    ("facts on the bus, worker to workers", wire.Fact),
    ("orders on the desk, llmwd-ctl to a worker", wire.Order),
    ("replies on the desk", wire.Reply),
    ("the line, worker to root", wire.ToRoot),
    ("the line, root to worker", wire.ToWorker),
    ("the holder's socket, manager to holder", wire.ToHolder),
    ("the holder's socket, holder to manager", wire.FromHolder),
)


def _dump(told: object) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(told)).decode())


@click.group(epilog=examples("llmwd-ctl explain states", "scontrol show job 42 -d | llmwd-ctl explain gres --form job --node n1"))
def explain() -> None:
    """Explain llmwd's words, messages, settings, and its reading of Slurm's output."""


def _meanings(words: type[vocab.Told]) -> list[tuple[str, str]]:
    return [(word.value, word.meaning) for word in words]


@explain.command(epilog=examples("llmwd-ctl explain states"))
@as_json()
def states(as_json: bool) -> None:
    """The phases and reasons that `status` shows, and how a process gets from one to the next."""
    from llmwd.core import lifecycle

    header, *rows = lifecycle.rows()
    if as_json:
        told: dict[str, object] = {words.__name__: dict(_meanings(words)) for words in WORDS}
        _dump(told | {"lifecycle": [dict(zip(header, row)) for row in rows]})
        return
    from llmwd.ctl.screen import show_table

    for words in WORDS:
        show_table((words.__name__, "meaning"), _meanings(words), " ".join(inspect.getdoc(words).split("\n\n")[0].split()))
    show_table(header, rows, "The lifecycle of everything with a pid (what is not here changes nothing).")


class ShownField(msgspec.Struct, frozen=True):
    name: str
    type: str
    default: str | None  # None: required


class ShownMessage(msgspec.Struct, frozen=True):
    name: str
    tag: str | int | None
    channel: str
    meaning: str
    fields: tuple[ShownField, ...]


def _members(union: object) -> tuple[type, ...]:
    return typing.get_args(union) or (union,)


def _all_messages() -> list[ShownMessage]:
    """Every message by channel, then the parts that messages are made of."""
    found = [_message(kind, channel) for channel, union in CHANNELS for kind in _members(union)]
    parts = [kind for kind in vars(wire).values() if inspect.isclass(kind) and issubclass(kind, wire.Part)]
    return found + [_message(kind, "part of messages") for kind in parts if kind is not wire.Part]


def _message(kind: type[msgspec.Struct], channel: str) -> ShownMessage:
    tag = kind.__struct_config__.tag
    fields = tuple(ShownField(each.name, _type_name(each.type), _default(each)) for each in msgspec.structs.fields(kind))
    return ShownMessage(kind.__name__, tag, channel, inspect.getdoc(kind) or "", fields)


def _type_name(annotation: object) -> str:
    name = annotation.__name__ if inspect.isclass(annotation) and not typing.get_args(annotation) else str(annotation)
    return name.replace("llmwd.messages.", "").replace("llmwd.vocab.", "")


def _default(field: msgspec.structs.FieldInfo) -> str | None:
    return None if field.required else repr(field.default)


@explain.command(epilog=examples("llmwd-ctl explain messages"))
@as_json("Print a JSON list instead.")
def messages(as_json: bool) -> None:
    """Every message between llmwd's processes, with its fields."""
    told = _all_messages()
    if as_json:
        _dump(told)
        return
    channel = None
    for each in told:
        if each.channel != channel:
            channel = each.channel
            click.secho(f"\n== {channel}", bold=True)
        click.secho(f"\n{each.name}" + (f"  (tag {each.tag})" if each.tag else ""), bold=True)
        click.echo(click.formatting.wrap_text(each.meaning, 78, "  ", "  "))
        for field in each.fields:
            line = f"{field.name}: {field.type}" + (f" = {field.default}" if field.default else "")
            click.echo(click.wrap_text(line, 80, "    ", "        "))


@explain.command(epilog=examples("llmwd-ctl explain settings"))
@as_json("Print a JSON list instead.")
def settings(as_json: bool) -> None:
    """Every setting of etc/config.env: its default, what it may be, and its meaning."""
    from llmwd.config import SETTINGS

    if as_json:
        keys = ("name", "default", "kind", "unit", "meaning", "by_profile")
        _dump([{key: getattr(spec, key) for key in keys} for spec in SETTINGS])
        return
    from llmwd.ctl.screen import show_table

    rows = [
        (spec.name, f"{spec.default} {spec.unit}".strip(), spec.meaning + (" A profile may set it." if spec.by_profile else ""))
        for spec in SETTINGS
    ]
    show_table(("setting", "default", "meaning"), rows)


@explain.command(
    epilog=examples(
        "scontrol show job 42 -d | llmwd-ctl explain gres --form job --node n1 --job 42",
        "sinfo -a -h -N -n n1 -O GresUsed:256,StateComplete:64 | llmwd-ctl explain gres --form sinfo --node n1 --json",
    )
)
@click.option(
    "--form", type=click.Choice(("job", "node", "sinfo", "json", "resources", "stderr")), required=True,
    help="Which command's output it is.",
)  # fmt: skip
@click.option("--node", required=True, help="The node's name in Slurm.")
@click.option("--job", help="Only this job's record counts.")
@as_json('Print {"gpus": [0, 1], "why": ""}: [] for none, null for not decidable.')
@click.argument("file", type=click.File("rb"), default="-")
def gres(form: str, node: str, job: str | None, as_json: bool, file: typing.BinaryIO) -> None:
    """What llmwd understands from a piece of Slurm's output in FILE (default: standard input).

    It is the same code that decides about a yield.
    """
    from llmwd.core import gres as reader

    if file is sys.stdin.buffer and sys.stdin.isatty():
        click.echo("reading from the terminal; Ctrl-D ends it", err=True)
    claim = reader.read(form, file.read().decode(errors="replace"), node, job)
    gpus = None if claim.gpus is None else tuple(sorted(claim.gpus))
    if as_json:
        click.echo(msgspec.json.encode({"gpus": gpus, "why": claim.why}).decode())
    elif gpus is None:
        click.echo(f"not decidable, so it counts as a conflict: {claim.why}")
    else:
        click.echo(f"{name_gpus(gpus)} of {node}" + (f" ({claim.why})" if claim.why else ""))
