"""The settings files of one load: which there are, what bash made of them, and where each variable comes from."""

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

import msgspec

from llmwd import ownership
from llmwd.config.bashfile import Readout, Variable, read_files
from llmwd.config.problems import Problem
from llmwd.config.settings import BY_NAME

CONFIG = "etc/config.env"
FILE_LIMIT_BYTES = 1 << 20

# What bash only complains about, without a status, although the line did not do what it says.
_FATAL = re.compile(
    r"syntax error|unexpected (EOF|end of file|token|argument)|bad substitution|readonly variable|unbound variable"
    r"|cannot assign|invalid arithmetic|not a valid identifier|division by 0"
)
# What kind of mistake it is by bash's word. bash's own text is never shown: it quotes words of the file, and where quotes
# were forgotten these are what should have been in them, such as a key.
_KINDS = (
    (re.compile(r": (command not found|No such file or directory|Permission denied|Is a directory|Not a directory)$|annot execute"),
     "bash takes a word of this line for a command or a file: forgotten quotes?"),
    (re.compile(r"while looking for matching"), "a quote or bracket that is opened here or further down is not closed"),
    (re.compile(r"syntax error|unexpected"), "bash cannot read this line: forgotten quotes, or something that is not closed?"),
    (re.compile(r"bad substitution$"), "a ${...} in this line is not as bash writes it"),
    (re.compile(r"readonly variable$"), "sets a variable that is bash's own"),
    (re.compile(r"unbound variable$|parameter (null or )?not set$"), "uses a variable that is not set"),
    (re.compile(r"not a valid identifier$"), "what should be a variable's name in this line cannot be one: forgotten quotes?"),
)  # fmt: skip
_UNKNOWN_KIND = "bash cannot do what this line says"
_ASSIGNMENT = re.compile(r"^\s*(?:export\s+|declare\s+(?:-\w+\s+)*)?([A-Za-z_]\w*)(\s+=|=\s+\S|=)", re.ASCII)


class SettingsFile(msgspec.Struct, frozen=True):
    """One file: its name as shown, where it is, and its text (bytes that are not UTF-8 as lone surrogates)."""

    name: str
    path: Path
    text: str
    is_open: bool = False  # to other users' eyes

    def line_of(self, variable: str) -> int | None:
        """The line of the last assignment to `variable`, as a reader of the text sees it; comments do not count."""
        assignment = re.compile(rf"(?<![\w$]){re.escape(variable)}(?:\[[^\]\n]*\])?[+:]?=(?!=)")
        lines = enumerate(self.text.split("\n"), 1)
        found = [number for number, line in lines if (m := assignment.search(line)) and "#" not in line[: m.start()]]
        return found[-1] if found else None


class Sources(msgspec.Struct, frozen=True):
    """The files that were read, in order, and bash's readout of them. `broken`: names of files not read to their end
    or with a failing line; what they say is not relied on."""

    files: tuple[SettingsFile, ...]
    readout: Readout
    environ: Mapping[str, str]
    broken: frozenset[str]
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]

    def state_after(self, files: int) -> dict[str, Variable]:
        """The variables after the first `files` files, or as far as bash came."""
        return self.readout.states[min(files, len(self.readout.states) - 1)] if self.readout.states else {}

    def where(self, variable: str, files: int) -> tuple[str, int | None]:
        """(file, line) of the last assignment to `variable` within the first `files` files."""
        for place in range(files, 0, -1):
            line = self.files[place - 1].line_of(variable)
            before, after = self.state_after(place - 1), self.state_after(place)
            if line is not None or before.get(variable) != after.get(variable):
                return self.files[place - 1].name, line
        return ("environment" if variable in self.environ else CONFIG), None


def read_sources(home: Path, names: list[str], known: Mapping[str, str]) -> Sources:
    """Read the files `names` (relative to `home`; those that do not exist are left out) with `known` as environment."""
    problems: list[Problem] = []
    files: list[SettingsFile] = []
    for name in names:
        found = _read_text(home, name)
        if isinstance(found, SettingsFile):
            files.append(found)
        elif found is not None:
            problems.append(found)
    try:
        readout = read_files([file.path for file in files], known, home)
    except OSError as error:
        problems.append(Problem("bash", None, None, f"cannot be run ({error.strerror}): it has to be on PATH"))
        readout = Readout((), (), (), "", "", None)
    warnings: list[Problem] = []
    _judge(home, files, readout, problems, warnings)
    broken = frozenset(problem.file for problem in problems)
    return Sources(tuple(files), readout, known, broken, tuple(problems), tuple(warnings))


def environment(home: Path, host: str, environ: Mapping[str, str]) -> dict[str, str]:
    """What the files can see of our environment: who we are, the settings it has, and three names of ours."""
    env = {name: environ[name] for name in ("PATH", "HOME", "USER", "LANG", *BY_NAME) if name in environ}
    env.setdefault("PATH", os.defpath)
    env.setdefault("HOME", os.path.expanduser("~"))
    data = environ.get("XDG_DATA_HOME") or f"{env['HOME']}/.local/share"
    env["LLMWD_EMBEDDED_DIR"] = environ.get("LLMWD_EMBEDDED_DIR") or f"{data}/llmwd/embedded"
    env["LLMWD_HOME"] = str(home)
    env["HOSTNAME_SHORT"] = host
    env["LC_MESSAGES"] = "C"  # bash's messages are read by us
    return env


def _read_text(home: Path, name: str) -> SettingsFile | Problem | None:
    path = home / name
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return Problem(name, None, None, "is not a regular file")
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            raw = file.read(FILE_LIMIT_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        return Problem(name, None, None, f"cannot be read: {error.strerror}")
    if ownership.others_may_write(found):
        return Problem(name, None, None, f"can be written by other users, and bash would run what they write: look through it, then `chmod go-w {name}`")
    if len(raw) > FILE_LIMIT_BYTES:
        return Problem(name, None, None, f"is larger than {FILE_LIMIT_BYTES >> 20} MiB: not a settings file")
    for sign, message in (
        (b"\0", "holds a NUL byte: this is not a text file"),
        (b"\r\n", f"has Windows line ends; mend it with: sed -i 's/\\r$//' {name}"),
    ):
        if sign in raw:
            return Problem(name, raw[: raw.index(sign)].count(b"\n") + 1, None, message)
    return SettingsFile(name, path, raw.decode("utf-8", "surrogateescape"), ownership.others_may_read(found))


def _judge(
    home: Path, files: list[SettingsFile], readout: Readout, problems: list[Problem], warnings: list[Problem]
) -> None:
    """Turn what bash said and which commands failed into problems, at most one for a line."""
    failed = {(command.file, command.line): command for command in reversed(readout.failed)}
    said: dict[tuple[str, int], str] = {}
    for message in readout.messages:
        said.setdefault((message.file, message.line), message.text)
    texts = {str(file.path): file.text for file in files}
    unfinished = files[len(readout.states) - 1] if readout.states and len(readout.states) <= len(files) else None
    for place in sorted(said.keys() | failed.keys(), key=lambda place: _order(place, list(texts))):
        path, line = place
        if not os.path.isabs(path):  # our own script
            continue
        name = os.path.relpath(path, home) if Path(path).is_relative_to(home) else path
        command, text = failed.get(place), said.get(place, "")
        sentence = next((kind for sign, kind in _KINDS if sign.search(text)), _UNKNOWN_KIND)
        if command and not text:
            sentence = f"a command in this line failed with status {command.status}; if it may, add `|| true`"
        variable, hint = _hint(texts.get(path, ""), line)
        is_error = command or _FATAL.search(text) or (unfinished and str(unfinished.path) == path)
        (problems if is_error else warnings).append(Problem(name, line, variable, hint or sentence))
    if readout.ended_by is not None:
        problems.append(Problem(unfinished.name if unfinished else CONFIG, None, None, readout.ended_by))
    if readout.printed.strip():
        names = ", ".join(file.name for file in files)
        warnings.append(Problem(names, None, None, "prints something: a settings file should only set variables"))


def _order(place: tuple[str, int], paths: list[str]) -> tuple[int, str, int]:
    path, line = place
    return (paths.index(path) if path in paths else len(paths)), path, line


def _hint(text: str, line: int) -> tuple[str | None, str]:
    """(the variable that the line sets, what to say instead of the mistake's kind where its form says it better)."""
    lines = text.split("\n")
    found = _ASSIGNMENT.match(lines[line - 1]) if 0 < line <= len(lines) else None
    if found is None:
        return None, ""
    return found[1], "" if found[2] == "=" else "bash allows no blanks around = in NAME=value"
