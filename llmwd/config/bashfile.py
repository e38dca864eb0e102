"""The door to bash: settings files mean what bash says they mean, because bash itself reads them.

Parsers of shell syntax in Python (shlex, python-dotenv, bashlex) each know a part of it: none has arrays,
`${X:-y}` across files and `export` together. A cluster without bash has no Slurm either, so bash is the library.

One process reads all files of a load in order and reports its variables after each, so that a later file sees
the earlier ones' variables and we see which file changed what. Its output goes to anonymous memory files, not
to pipes: nothing to drain, no way to block on a reader, and what a file leaves running cannot keep us waiting.
"""

import os
import re
import select
import signal
import string
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

OUTPUT_LIMIT_KIB = 1024  # of each: printed text, error text, report
READ_WITHIN_S = 5.0

# bash's own bookkeeping: it changes by itself and says nothing about the files.
_BOOKKEEPING = (
    "_ BASH* COMP_* DIRSTACK EPOCH* EUID FUNCNAME GROUPS HISTCMD HOSTNAME HOSTTYPE IFS LINENO MACHTYPE OLDPWD OPTARG "
    "OPTERR OPTIND OSTYPE PIPESTATUS PPID PS4 PWD RANDOM REPLY SECONDS SHELL SHELLOPTS SHLVL SRANDOM TERM UID __llmwd_*"
).split()

# Values travel NUL-separated, which no shell value can contain; of `declare -p` only the flags are read. The names
# come from ${!prefix@}, because compgen needs a bash built with programmable completion. Files are sourced at top
# level, never in a function: there `declare X=1` would be local and lost. `set +eu` undoes what a file left set;
# with it the next file, or this script, would end half-way.
_DRIVER = r"""
ulimit -c 0 -f LIMIT_KIB
__llmwd_fd=$1 __llmwd_files=("${@:2}")
set --
__llmwd_dump() {
  local - __llmwd_name __llmwd_all __llmwd_values
  set +euvxfT
  for __llmwd_name in NAMES; do
    case $__llmwd_name in BOOKKEEPING) continue ;; esac
    __llmwd_all="$__llmwd_name[@]"
    __llmwd_values=("${!__llmwd_all}")
    builtin printf '%s\0' var "$__llmwd_name" "${#__llmwd_values[@]}" "${__llmwd_values[@]}"
    builtin declare -p "$__llmwd_name"
    builtin printf '\0'
  done
  builtin printf '%s\0' end
} >&"$__llmwd_fd"
__llmwd_dump
trap 'builtin printf "%s\0" failed "$?" "$LINENO" "${BASH_SOURCE[0]}" >&"$__llmwd_fd"' ERR
for __llmwd_file in "${__llmwd_files[@]}"; do
  builtin source "$__llmwd_file"
  set +eu
  __llmwd_dump
done
"""
_DRIVER = (
    _DRIVER.replace("LIMIT_KIB", str(OUTPUT_LIMIT_KIB))
    .replace("NAMES", " ".join(f'"${{!{letter}@}}"' for letter in string.ascii_letters + "_"))
    .replace("BOOKKEEPING", "|".join(_BOOKKEEPING))
)
_MESSAGE = re.compile(r"^(?P<file>.+?): line (?P<line>\d+): (?P<text>.*)$")


class Variable(msgspec.Struct, frozen=True):
    """One shell variable; a string has exactly one value. Bytes that are not UTF-8 are kept as lone surrogates."""

    values: tuple[str, ...]
    is_array: bool = False
    exported: bool = False


class FailedCommand(msgspec.Struct, frozen=True):
    """A command that ended with a status other than 0 where bash would not expect it (not in `if`, `&&`, `||`)."""

    file: str
    line: int
    status: int


class Message(msgspec.Struct, frozen=True):
    """What bash itself said about a line of a file, such as a syntax error."""

    file: str
    line: int
    text: str


class Readout(msgspec.Struct, frozen=True):
    """What one bash made of the files.

    `states[0]` is before the first file and `states[i]` after the i-th; fewer than 1 + len(files) of them mean that
    bash ended inside file number len(states) (counted from 1); `ended_by` then says how.
    """

    states: tuple[dict[str, Variable], ...]
    failed: tuple[FailedCommand, ...]
    messages: tuple[Message, ...]
    printed: str
    errors: str
    ended_by: str | None


def read_files(
    files: Sequence[Path], environ: Mapping[str, str], cwd: Path, within_s: float = READ_WITHIN_S
) -> Readout:
    """Source `files` in order in one bash that knows `environ` and nothing else of our environment.

    Raises OSError when there is no bash on PATH. Never takes much longer than `within_s` seconds.
    """
    memory = [os.memfd_create(name, os.MFD_CLOEXEC) for name in ("printed", "errors", "report")]
    try:
        ended_by = _run(files, environ, cwd, within_s, *memory)
        printed, errors, report = (os.fsdecode(os.pread(fd, OUTPUT_LIMIT_KIB * 1024, 0)) for fd in memory)
    finally:
        for fd in memory:
            os.close(fd)
    states, failed = _parse(report)
    if ended_by is None and len(states) <= len(files):
        ended_by = "it ended bash before its last line was read (exit, exec, set -e, set -u or ${NAME:?}?)"
    matches = (_MESSAGE.match(line) for line in errors.splitlines())
    messages = tuple(Message(m["file"], int(m["line"]), m["text"]) for m in matches if m)
    return Readout(states, failed, messages, printed, errors, ended_by)


def _run(files, environ, cwd, within_s: float, printed_fd: int, errors_fd: int, report_fd: int) -> str | None:
    """Let bash run to its end or the deadline; the reason when it did not end by itself in order."""
    process = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-c", _DRIVER, "bash", str(report_fd), *map(str, files)],
        stdin=subprocess.DEVNULL,
        stdout=printed_fd,
        stderr=errors_fd,
        pass_fds=(report_fd,),
        env=dict(environ),
        cwd=cwd,
        start_new_session=True,
    )
    pidfd = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        in_time = bool(poll.poll(within_s * 1000))
    finally:
        os.close(pidfd)
        # Not reaped yet, so the group's number is still ours; this also ends what the files left in the background.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if not in_time:
        return f"it was not done after {within_s:g} s: does a command in it wait for something?"
    if process.returncode == -signal.SIGXFSZ:
        return f"it prints more than {OUTPUT_LIMIT_KIB} KiB"
    if process.returncode < 0:
        return f"bash was ended by {signal.Signals(-process.returncode).name}"
    return None


def _parse(report: str) -> tuple[tuple[dict[str, Variable], ...], tuple[FailedCommand, ...]]:
    """The report's records; a state that is cut short (bash was killed while writing it) is left out."""
    tokens = iter(report.split("\0")[:-1])
    states: list[dict[str, Variable]] = []
    failed: list[FailedCommand] = []
    state: dict[str, Variable] = {}
    try:
        for token in tokens:
            if token == "end":
                states.append(state)
                state = {}
            elif token == "var":
                name, count = next(tokens), int(next(tokens))
                values = tuple([next(tokens) for _ in range(count)])
                flags = next(tokens).split(" ", 2)[1]
                state[name] = Variable(values, "a" in flags or "A" in flags, "x" in flags)
            elif token == "failed":
                status, line, file = [next(tokens) for _ in range(3)]
                failed.append(FailedCommand(file, int(line), int(status)))
    except StopIteration:  # cut short: that state has no end and is not among the states
        pass
    return tuple(states), tuple(failed)
