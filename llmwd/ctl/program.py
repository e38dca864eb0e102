"""How every verb of llmwd-ctl behaves: exit codes, one sentence for an error, Ctrl-C, examples in the help."""

import contextlib
import errno
import io
import os
import sys

import click

from llmwd.adapters.rundir import DirError
from llmwd.config.problems import ConfigError
from llmwd.vocab import Exit

NAME = "llmwd-ctl"
INTERRUPTED = 130  # 128 + SIGINT, as shells say it
OUTPUT_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})  # and no file has a name then


class Refusal(click.ClickException):
    """A sentence for the user, and the exit code that goes with it."""

    def __init__(self, message: str, exit_code: int = Exit.refused):
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click has it in the class, and says to set it

    def show(self, file=None) -> None:
        click.echo(f"{NAME}: {self.format_message()}", file=file, err=file is None)


class Program(click.Group):
    """The group `main`. Its name is fixed, because completion is looked up by it (not by `python -m …`)."""

    def main(self, args=None, prog_name=None, **extra):  # type: ignore[override]  # click has overloads
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a terminal that is not UTF-8 gets a "?", not a traceback
                stream.reconfigure(errors="replace")
        try:
            return super().main(args=args, prog_name=NAME, **extra)
        except OSError as error:
            if error.filename is not None or error.errno not in OUTPUT_ERRORS:
                raise
            _output_failed(error)
            sys.exit(Exit.refused)

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo(err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None
        except (DirError, ConfigError) as error:
            raise Refusal(str(error)) from error


def _output_failed(error: OSError) -> None:
    """Say it, and let nothing be left that the interpreter would try to write once more at its end."""
    with contextlib.suppress(OSError):
        click.echo(f"{NAME}: the output could not be written: {error.strerror}", err=True)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2):
        os.dup2(nowhere, fd)


def examples(*lines: str) -> str:
    """An epilog for --help; \\b keeps click from wrapping it."""
    return "\b\n" + "\n".join(["Example:" if len(lines) == 1 else "Examples:", *(f"  {line}" for line in lines)])
