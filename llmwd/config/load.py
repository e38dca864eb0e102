"""Load the configuration: files and environment in, checked settings and profile out, all problems at once."""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from llmwd import redact
from llmwd.config import argv
from llmwd.config.bashfile import Variable
from llmwd.config.problems import ConfigError, Problem
from llmwd.config.profile import FOLDER, LINK, Profile, choose, profile_names
from llmwd.config.settings import BY_NAME, SETTINGS, Settings, SettingSpec
from llmwd.config.sources import CONFIG, Sources, environment, read_sources

_OF_A_PROFILE = ("MODEL_NAME", "VLLM_ARGS")
_NOT_EXPORTED = frozenset(BY_NAME) | {*_OF_A_PROFILE, "LLMWD_HOME", "LLMWD_EMBEDDED_DIR", "HOSTNAME_SHORT"}
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*", re.ASCII)


class Loaded(msgspec.Struct, frozen=True):
    """`settings` or `profile` is None when a problem concerns it; `warnings` never stop anything."""

    settings: Settings | None
    profile: Profile | None
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]


def load(
    home: Path, profile: str | None = None, host: str | None = None, environ: Mapping[str, str] | None = None
) -> Loaded:
    """Read etc/config.env, etc/nodes/<host>.env and models/<profile>.env under `home` (LLMWD_HOME).

    `profile` None: the one that active-model.env names. `host`: this node's short name, found out when None.
    `environ`: our process environment; known settings in it count where no file sets them. Takes some 10 ms, 5 s when
    a file hangs. Raises nothing for what an operator can get wrong.
    """
    home = Path(os.path.abspath(home))
    host = (os.uname().nodename if host is None else host).split(".")[0]
    known = environment(home, host, os.environ if environ is None else environ)
    node_files = [CONFIG, *([f"etc/nodes/{host}.env"] if _HOST.fullmatch(host) else [])]
    chosen, chosen_problem = None, None
    try:
        chosen = choose(home, profile)
    except ConfigError as error:
        chosen_problem = Problem(LINK if profile is None else FOLDER, None, None, str(error))
    names = [*node_files, *([f"{FOLDER}/{chosen}.env"] if chosen else [])]
    sources = read_sources(home, names, known)
    _learn_secrets(sources)
    check = _Check(sources, home, sum(file.name in node_files for file in sources.files))
    settings = check.settings()
    if sources.broken - {f"{FOLDER}/{chosen}.env"}:
        settings = None
    found = None
    if chosen and not _unread(sources, names[-1]):
        found = check.profile(chosen, names[-1])
    if not os.path.exists(home / CONFIG):
        check.warn(CONFIG, None, None, f"is missing, defaults are used; begin with: cp {CONFIG}.example {CONFIG}")
    for file in sources.files:
        if file.is_open and redact.holds_secret(file.text):
            check.warn(file.name, None, None, f"can be read by other users, and holds a secret: `chmod 600 {file.name}`")
    problems = [*sources.problems, *check.problems, *([chosen_problem] if chosen_problem else [])]
    warnings = [*sources.warnings, *check.warnings]
    found = None if sources.broken else found
    return Loaded(settings, found, _in_order(problems, names), _in_order(warnings, names))


def learn_profiles(home: Path) -> None:
    """Learn the secrets of all profiles, as they are now: a log may quote those of any that was served. Takes some 10 ms for
    each, 5 s for one that hangs."""
    for name in profile_names(home):
        load(home, name)


def _learn_secrets(sources: Sources) -> None:
    state = sources.state_after(len(sources.files))
    for name, variable in state.items():
        for value in variable.values:
            redact.learn_variables({name: value})
    for file in sources.files:
        redact.learn_file(file.text)
    args = state.get("VLLM_ARGS")
    if args is not None:
        redact.learn_arguments(word for value in args.values for word in value.split())


def _in_order(problems: list[Problem], names: list[str]) -> tuple[Problem, ...]:
    """Each once, as one meets them reading the files from the first line of the first on; secrets quoted in them
    are taken out."""
    problems = [msgspec.structs.replace(each, message=redact.mask(each.message)) for each in problems]
    order = {name: place for place, name in enumerate(names)}
    return tuple(sorted(dict.fromkeys(problems), key=lambda it: (order.get(it.file, len(names)), it.line or 0)))


def _unread(sources: Sources, name: str) -> bool:
    """Whether bash did not come to the end of the file `name`."""
    names = [file.name for file in sources.files]
    return name not in names or names.index(name) + 1 >= len(sources.readout.states)


class _Check:
    """One pass over what bash read. `node_files`: how many of the files, from the first, speak for the node."""

    def __init__(self, sources: Sources, home: Path, node_files: int) -> None:
        self.sources = sources
        self.home = home
        self.node_files = node_files
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self._look_for_mistyped_names()

    def warn(self, file: str, line: int | None, variable: str | None, message: str) -> None:
        self.warnings.append(Problem(file, line, variable, message))

    def settings(self) -> Settings | None:
        """The node's settings; None when one of them is wrong."""
        begin = len(self.problems)
        got = self._values(SETTINGS, self.node_files)
        ok = len(self.problems) == begin
        for name in _OF_A_PROFILE:
            if name in self.sources.state_after(self.node_files):
                self.warn(*self.sources.where(name, self.node_files), name, "belongs into a profile in models/")
        self._not_above(got, "BACKOFF_MIN", "BACKOFF_MAX", self.node_files)
        self._fits_simulation(got, self.node_files)
        if len(self.sources.files) == self.node_files:  # with a profile, its own word is checked instead
            self._cuda(got, self.node_files)
        if got.get("TUNNEL_MODE") == "named" and not got.get("TUNNEL_ID") and not self._text("CLOUDFLARED_CREDS"):
            self.warn(
                *self.sources.where("TUNNEL_HOSTNAME", self.node_files),
                "TUNNEL_HOSTNAME",
                "needs TUNNEL_ID (`cloudflared tunnel list` shows it) or CLOUDFLARED_CREDS: there is no tunnel until then",
            )
        ok = ok and not any(problem.variable not in _CUDA for problem in self.problems[begin:])
        return Settings(**{spec.field: got[spec.name] for spec in SETTINGS}) if ok else None

    def profile(self, name: str, file: str) -> Profile | None:
        """The profile in the last of the files; None when something that it needs is wrong."""
        begin = len(self.problems)
        files = len(self.sources.files)
        got = self._values([spec for spec in SETTINGS if spec.by_profile], files)
        self._llm_bin(got, files)
        self._fits_simulation(got | self._quietly("SIM_GPUS"), files)
        self._cuda(got, files)
        self._overrides(file)
        model = self._required("MODEL_NAME", file, files)
        args = self._required("VLLM_ARGS", file, files)
        words = self._words(args, files) if args else ()
        exports = self._exports(files)
        if model is not None and (model.is_array or not model.values[0].strip()):
            self._refuse("MODEL_NAME", files, "must be a Hugging Face model id or the path of a local model")
        if args and "NUM_GPUS" in got:
            place = self.sources.where("VLLM_ARGS", files)
            alone = self._quietly("LOOPBACK_ONLY").get("LOOPBACK_ONLY", True)
            wrong = argv.problems_of(words, got["NUM_GPUS"], alone)
            self.problems += [Problem(*place, "VLLM_ARGS", m) for m in wrong]
            has_key = self._quietly("REQUIRE_API_KEY").get("REQUIRE_API_KEY", True) or exports.get("VLLM_API_KEY")
            keyless = not (has_key or argv.option(words, *argv.API_KEY))
            self.warnings += [Problem(*place, "VLLM_ARGS", m) for m in ([] if wrong else argv.warnings_of(words, keyless))]
            for option in redact.telling_arguments(argv.without_secrets(words)):
                what = f"what looks like a secret ({option})" if option else "what looks like a secret"
                message = f"{what} stays on vLLM's command line, which every user of this node can read: export it or put it in a file"
                self.warn(*place, "VLLM_ARGS", message)
        if len(self.problems) > begin or model is None or args is None:
            return None
        own = {spec.field: got[spec.name] for spec in SETTINGS if spec.by_profile}
        return Profile(name=name, file=file, model_name=model.values[0], vllm_args=words, exports=exports, **own)

    # --- values

    def _values(self, specs: Any, files: int) -> dict[str, Any]:
        """{name: value} of the settings that are right; the others are reported."""
        got: dict[str, Any] = {}
        state = self.sources.state_after(files)
        for spec in specs:
            variable = state.get(spec.name)
            text = variable.values[0] if variable and variable.values else ""
            if variable and variable.is_array:
                self._refuse(spec.name, files, "must be one value, not an array")
            elif self._is_utf8(spec.name, text, files):
                try:
                    got[spec.name] = spec.parse(text) if text else self._default(spec, got)
                except ValueError as error:
                    self._refuse(spec.name, files, str(error))
        return got

    def _default(self, spec: SettingSpec, got: dict[str, Any]) -> Any:
        """The default of a setting that is not set or empty; `got` has the settings before it in the table."""
        if spec.name == "LLM_VENV":
            return f"{self.home}/.venv"
        if spec.name == "LLM_BIN":
            return f"{got.get('LLM_VENV', '')}/bin/vllm"
        if spec.name == "TUNNEL_MODE":
            return "named" if got.get("TUNNEL_HOSTNAME") else "none"
        if spec.name == "CLOUDFLARED_CREDS":
            tunnel = got.get("TUNNEL_ID")
            return f"{self.sources.environ['HOME']}/.cloudflared/{tunnel}.json" if tunnel else ""
        return spec.parse(spec.default) if spec.default else spec.parse.read("")

    def _quietly(self, name: str) -> dict[str, Any]:
        """A node's setting as the profile's checks need it; what is wrong with it is reported with the settings."""
        try:
            return {name: BY_NAME[name].parse(self._text(name) or BY_NAME[name].default)}
        except ValueError:
            return {}

    def _text(self, name: str) -> str:
        variable = self.sources.state_after(self.node_files).get(name)
        return variable.values[0] if variable and variable.values else ""

    def _required(self, name: str, file: str, files: int) -> Variable | None:
        variable = self.sources.state_after(files).get(name)
        if variable is None or not (variable.values or variable.is_array):
            if file not in self.sources.broken:  # else it may stand after the line that bash stumbled over
                self.problems.append(Problem(file, None, name, "is missing: a profile needs it"))
            return None
        return variable if all(self._is_utf8(name, value, files) for value in variable.values) else None

    def _words(self, args: Variable, files: int) -> tuple[str, ...]:
        """An array's elements as they are; a string as bash splits an unquoted expansion: quotes are not removed."""
        if args.is_array:
            return args.values
        words = tuple(word for word in re.split(r"[ \t\n]+", args.values[0]) if word)
        for place, word in enumerate(words, 1):
            if len(word) > 1 and word[0] == "'" or word.count('"') % 2:
                message = f"its word {place} reaches vLLM with its quotes; for quoting, write an array: VLLM_ARGS=(...)"
                self.warn(*self.sources.where("VLLM_ARGS", files), "VLLM_ARGS", message)
                break
        return words

    def _exports(self, files: int) -> dict[str, str]:
        """What the files export: exported variables that they set anew or changed."""
        before, after = self.sources.state_after(0), self.sources.state_after(files)
        exports = {}
        for name, variable in after.items():
            if name in _NOT_EXPORTED or not variable.exported or variable.is_array or variable == before.get(name):
                continue
            if variable.values and self._is_utf8(name, variable.values[0], files):
                exports[name] = variable.values[0]
        for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
            if exports.pop(name, None) is not None:
                self.warn(*self.sources.where(name, files), name, "has no effect: the lease says which GPUs are used")
        return exports

    # --- checks

    def _refuse(self, name: str, files: int, message: str) -> None:
        self.problems.append(Problem(*self.sources.where(name, files), name, message))

    def _is_utf8(self, name: str, text: str, files: int) -> bool:
        try:
            text.encode()
        except UnicodeEncodeError:
            self._refuse(name, files, "holds bytes that are not UTF-8")
            return False
        return True

    def _not_above(self, got: dict[str, Any], low: str, high: str, files: int) -> None:
        if low in got and high in got and got[low] > got[high]:
            self._refuse(low, files, f"is {got[low]:g}, which is more than {high} ({got[high]:g})")

    def _fits_simulation(self, got: dict[str, Any], files: int) -> None:
        simulated = got.get("SIM_GPUS", 0)
        if simulated and got.get("NUM_GPUS", 0) > simulated:
            self._refuse("NUM_GPUS", files, f"is {got['NUM_GPUS']}, but SIM_GPUS simulates only {simulated} GPUs")

    def _cuda(self, got: dict[str, Any], files: int) -> None:
        for name in _CUDA[1:] if got.get("CUDA_SETUP") else ():
            if name not in got:
                continue
            if not got[name]:
                self._refuse("CUDA_SETUP", files, f"is true, so {name} has to be set as well")
            elif not os.path.isdir(got[name]):
                self._refuse(name, files, f"must be a folder that exists, and {got[name]} is none")

    def _llm_bin(self, got: dict[str, Any], files: int) -> None:
        """A profile with an LLM_VENV of its own gets that one's vllm, unless LLM_BIN is something else on purpose."""
        state, node = self.sources.state_after(files), self.sources.state_after(self.node_files)
        if "LLM_VENV" not in got or "LLM_BIN" not in got:
            return
        node_venv = self._text("LLM_VENV") or f"{self.home}/.venv"
        if state.get("LLM_BIN") == node.get("LLM_BIN") and got["LLM_BIN"] == f"{node_venv}/bin/vllm":
            got["LLM_BIN"] = f"{got['LLM_VENV']}/bin/vllm"
        if not os.access(got["LLM_BIN"], os.X_OK):
            message = f"{got['LLM_BIN']} is not a program: install vLLM into LLM_VENV, or set LLM_VENV to where it is"
            self.warn(*self.sources.where("LLM_BIN", files), "LLM_BIN", message)

    def _overrides(self, file: str) -> None:
        state, node = self.sources.state_after(len(self.sources.files)), self.sources.state_after(self.node_files)
        for spec in SETTINGS:
            if not spec.by_profile and state.get(spec.name) != node.get(spec.name):
                line = self.sources.files[-1].line_of(spec.name)
                self.warn(file, line, spec.name, f"has no effect in a profile: set it in {CONFIG}")

    def _look_for_mistyped_names(self) -> None:
        known = [*BY_NAME, *_OF_A_PROFILE]
        files = len(self.sources.files)
        new = self.sources.state_after(files).keys() - self.sources.state_after(0).keys() - set(known)
        for name in sorted(new):
            close = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.85)
            if close:
                self.warn(*self.sources.where(name, files), name, f"is not a setting; did you mean {close[0]}?")


_CUDA = ("CUDA_SETUP", "CUDA12_LIB", "CUDA_HOME_OVERRIDE")
