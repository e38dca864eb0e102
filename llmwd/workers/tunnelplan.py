"""Everything that a tunnel needs, looked at before it is started, by the tunnel manager and by `llmwd-ctl check`.

Reads files and runs cloudflared's offline checks: some 150 ms, 30 s where its program hangs. Beside the loop.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec

from llmwd import redact
from llmwd.adapters import cloudflared, secretfile
from llmwd.adapters.rundir import DirError, write_atomic
from llmwd.config import Settings
from llmwd.core import tunnelconfig
from llmwd.core.tunnelconfig import NAMED, NONE, QUICK, TOKEN, Credentials, Recipe

NO_BINARY = "is not there or cannot be run: install cloudflared, or set CLOUDFLARED_BIN"


class Plan(msgspec.Struct, frozen=True):
    """recipe: None with problems, ((setting, sentence), ...), all there are. stamp: changes with the files looked at.
    made_for: the settings and the address that it is for. passing: a problem that is none of its configuration's, and may
    be over on the next try; "" for none."""

    recipe: Recipe | None = None
    problems: tuple[tuple[str, str], ...] = ()
    version: str = ""
    stamp: str = ""
    passing: str = ""
    made_for: str = ""

    @property
    def why(self) -> str:
        return "; ".join(sentence for _, sentence in self.problems)


def survey(settings: Settings, url: str, config_path: Path, environ: Mapping[str, str]) -> Plan:
    """How to run the tunnel to `url` with the configuration in config_path, which is written here, 0600."""
    if settings.tunnel_mode == NONE:
        return Plan()
    stamp = stamp_of(settings)  # before the look: what changes during it is seen
    plan = _survey(settings, url, config_path, environ)
    return msgspec.structs.replace(plan, stamp=stamp, made_for=made_for(settings, url))


def _survey(settings: Settings, url: str, config_path: Path, environ: Mapping[str, str]) -> Plan:
    mode, problems = settings.tunnel_mode, []
    if mode == NAMED and not settings.tunnel_hostname:
        problems.append(("TUNNEL_HOSTNAME", "TUNNEL_HOSTNAME is not set, and TUNNEL_MODE=named needs it"))
    name, path, found = _secret(settings)
    problems += [(name, problem) for problem in found.problems]
    redact.learn(list(found.secrets))
    program = shutil.which(settings.cloudflared_bin)
    if program is None:
        problems.append(("CLOUDFLARED_BIN", f"{settings.cloudflared_bin} {NO_BINARY}"))
        return Plan(problems=tuple(problems))
    recipe = tunnelconfig.recipe(
        os.path.abspath(program), str(config_path), mode, settings.tunnel_protocol, settings.tunnel_hostname,
        found.tunnel_id, path, url, environ,
    )  # fmt: skip
    version = ""
    try:
        version, why = cloudflared.version(program, recipe.env)
        if why:
            problems.append(("CLOUDFLARED_BIN", f"{program} {NO_BINARY} ({why})"))
            return Plan(problems=tuple(problems))
        write_atomic(config_path, recipe.config.encode())
        refused = cloudflared.validate(program, str(config_path), recipe.env)
    except TimeoutError as error:  # of a program on a network file system, for one
        return Plan(None, tuple(problems), version, passing=f"{program}: {error}")
    except OSError as error:
        return Plan(None, tuple(problems), version, passing=f"{config_path} cannot be written: {error.strerror}")
    if refused:
        problems.append(("TUNNEL_HOSTNAME", f"cloudflared {version} refuses its configuration {config_path}: {refused}"))
    return Plan(None if problems else recipe, tuple(problems), version)


def stamp_of(settings: Settings) -> str:
    """Another one when the program or the file with the secret is another one."""
    program = shutil.which(settings.cloudflared_bin) or settings.cloudflared_bin
    found = []
    for path in (program, secret_file(settings)[1]):
        try:
            it = os.stat(path)
            found.append(f"{it.st_ino} {it.st_size} {it.st_mtime_ns} {it.st_mode} {it.st_ctime_ns}")
        except OSError:
            found.append("-")
    return " ".join(found)


def made_for(settings: Settings, url: str) -> str:
    """Another one when a running cloudflared has to be started anew."""
    s = settings
    return " ".join((
        s.tunnel_mode, s.tunnel_hostname, s.tunnel_id, s.cloudflared_bin, s.cloudflared_creds, s.tunnel_token_file,
        s.tunnel_protocol, url,
    ))  # fmt: skip


def secret_file(settings: Settings) -> tuple[str, str]:
    """(the setting, the path)."""
    if settings.tunnel_mode == TOKEN:
        return "TUNNEL_TOKEN_FILE", settings.tunnel_token_file
    return "CLOUDFLARED_CREDS", settings.cloudflared_creds if settings.tunnel_mode == NAMED else ""


def _secret(settings: Settings) -> tuple[str, str, Credentials]:
    """(the setting, the path, what was found there)."""
    name, path = secret_file(settings)
    if settings.tunnel_mode == QUICK:
        return name, "", Credentials()
    if not path and settings.tunnel_mode == TOKEN:
        return name, path, Credentials(problems=("TUNNEL_TOKEN_FILE is not set, and TUNNEL_MODE=token needs it",))
    if not path:
        return "TUNNEL_ID", path, Credentials(problems=("TUNNEL_ID is not set (`cloudflared tunnel list` shows it)",))
    try:
        text, known = secretfile.content(name, path)
    except DirError as error:
        return name, path, Credentials(problems=(str(error),))
    if settings.tunnel_mode == TOKEN:
        found = tunnelconfig.check_token(path, text)
    else:
        found = tunnelconfig.check_credentials(path, text, settings.tunnel_id)
    return name, path, msgspec.structs.replace(found, problems=(*known, *found.problems))
