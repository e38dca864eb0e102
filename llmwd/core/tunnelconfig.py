"""What cloudflared is started with, and what its words and its end mean. No file is read and no process started here.

Behaviours measured with cloudflared 2026.8: a wrong flag ends it with 0; 255 is a fault of what it was given; 1 is
anything else; refused credentials never end it; a stray TUNNEL_* variable wins over its configuration.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping

import msgspec

from llmwd.messages import ServerFact
from llmwd.vocab import NodePhase, Phase

GRACE_S = 5  # requests in flight may take this long after SIGTERM
SECRET_BYTES = 32
REFUSALS_TOLD = 3  # so many registrations refused as unauthorized are no accident
LONGEST_ERROR = 200

_METRICS = re.compile(r"Starting metrics server on (127\.0\.0\.1:\d{1,5})/metrics")
_LINE = re.compile(r"^\S+Z (?P<level>INF|WRN|ERR|FTL) (?P<text>.*)$")
# A clean stop logs these as errors as well: they explain nothing.
_NOT_A_CAUSE = ("Connection terminated", "no more connections active and exiting", "Initiating shutdown")


class Recipe(msgspec.Struct, frozen=True):
    """Everything that a running cloudflared depends on: if it changes, it has to be started anew."""

    argv: tuple[str, ...]
    config: str
    env: dict[str, str]


class Credentials(msgspec.Struct, frozen=True):
    """The credentials file as far as it can be judged here. problem: why it cannot work, "" if it may.
    warnings: sentences about what does not stand in the way, but is not right."""

    tunnel_id: str = ""
    secret: str = ""
    problem: str = ""
    warnings: tuple[str, ...] = ()


def check_credentials(path: str, text: bytes, mode: int, tunnel_id: str) -> Credentials:
    """Judge a credentials file by its content and its permissions (`mode` as stat gives it).

    tunnel_id: the UUID it has to be for, "" to take the file's own. cloudflared itself checks nothing: it starts with
    `{}` and is refused for ever.
    """
    if mode & 0o077:
        return Credentials(problem=f"{path} can be read by other users, who could then run the tunnel: `chmod 600 {path}`")
    try:
        found = json.loads(text)
    except ValueError:
        return Credentials(problem=f"{path} is not JSON: make it anew with `cloudflared tunnel token --cred-file`")
    names = ("AccountTag", "TunnelSecret", "TunnelID")
    missing = [name for name in names if not isinstance(found, dict) or not isinstance(found.get(name), str) or not found[name]]
    if missing:
        return Credentials(problem=f"{path} is no tunnel's credentials file: {', '.join(missing)} is missing in it")
    own = found["TunnelID"]
    if tunnel_id and own.lower() != tunnel_id.lower():
        return Credentials(problem=f"{path} is for the tunnel {own}, but TUNNEL_ID is {tunnel_id}: correct one of them")
    try:
        secret = base64.b64decode(found["TunnelSecret"], validate=True)
    except (binascii.Error, ValueError):
        return Credentials(problem=f"{path}: its TunnelSecret is damaged (not base64): make the file anew")
    warnings = []
    if len(secret) < SECRET_BYTES:
        warnings.append(f"{path}: its TunnelSecret is shorter than {SECRET_BYTES} bytes: Cloudflare will refuse it")
    return Credentials(own.lower(), found["TunnelSecret"], warnings=tuple(warnings))


def recipe(
    program: str, config_path: str, hostname: str, tunnel_id: str, credentials_path: str, url: str,
    environ: Mapping[str, str],
) -> Recipe:
    """How to run the tunnel `tunnel_id` from https://`hostname` to the server at `url`."""
    argv = (
        program, "tunnel", "--config", config_path, "--no-autoupdate", "--metrics", "127.0.0.1:0", "--loglevel", "info",
        "--grace-period", f"{GRACE_S}s", "--protocol", "http2", "run",
    )  # fmt: skip
    # Nothing else of our environment: TUNNEL_TOKEN would win over the configuration, proxies break the origin.
    env = {name: environ[name] for name in ("PATH", "HOME") if name in environ}
    return Recipe(argv, _config(hostname, tunnel_id, credentials_path, url), env)


def _config(hostname: str, tunnel_id: str, credentials_path: str, url: str) -> str:
    """config.yml. Every text is quoted as JSON does it, which YAML understands."""
    origin = "connectTimeout: 5s, noHappyEyeballs: true, keepAliveTimeout: 90s"
    if url.startswith("https:"):
        origin += ", noTLSVerify: true"  # our own server on the loopback: its certificate names another host
    return (
        "# Made by llmwd for every start of cloudflared; changes are lost.\n"
        f"tunnel: {json.dumps(tunnel_id)}\n"
        f"credentials-file: {json.dumps(credentials_path)}\n"
        f"originRequest: {{{origin}}}\n"
        "ingress:\n"
        f"  - hostname: {json.dumps(hostname)}\n"
        f"    service: {json.dumps(url)}\n"
        "  - service: http_status:404\n"
    )


def origin(server: ServerFact | None, running: bool, stale_after_s: float, now_s: float) -> str | None:
    """The address that the tunnel has to lead to, None: none is wanted. A tunnel that runs stays until the server is
    gone, so that it is never in the way of a yield. A fact that nobody repeats is of a server that has ended since."""
    if server is None or server.url is None or now_s - server.at_s > stale_after_s:
        return None
    wanted = server.node_phase is NodePhase.serving or (running and server.node_phase is NodePhase.yielding)
    return server.url if wanted else None


def metrics_address(log: str) -> str | None:
    """`127.0.0.1:PORT` of its metrics server, from what it logged since its start; the last one."""
    found = _METRICS.findall(log)
    return found[-1] if found else None


def last_error(log: str) -> str:
    """The last line of a log that says what went wrong, without its time; "" if none does."""
    for line in reversed(log.splitlines()):
        found = _LINE.match(line)
        text = found["text"] if found and found["level"] in ("ERR", "FTL") else line if "Incorrect Usage" in line else ""
        if text and not text.startswith(_NOT_A_CAUSE):
            return text if len(text) <= LONGEST_ERROR else text[: LONGEST_ERROR - 1] + "…"
    return ""


def refusals(log: str) -> int:
    """How many registrations the edge has refused for the credentials: cloudflared tries again for ever."""
    return sum("Register tunnel error" in line and "Unauthorized" in line for line in log.splitlines())


def death(status: int | None, error: str, log: str) -> tuple[bool, str]:
    """(a restart cannot mend it, what happened) of an end that nobody asked for. status: as in HolderState."""
    cause = last_error(log)
    tail = f": {cause}" if cause else ""
    if error:
        return True, error
    if status == 0:
        return True, f"cloudflared ended at once as if it had been asked to: this version does not know our arguments{tail}"
    if status == 255:
        return True, f"cloudflared does not accept what it was given (exit code 255){tail}"
    if status is None:
        return False, f"cloudflared ended without a word{tail}"
    how = f"killed by signal {-status}" if status < 0 else f"exit code {status}"
    return False, f"cloudflared ended by itself ({how}){tail}"


def shown_phase(phase: Phase, connected: bool) -> Phase:
    """What is told to the others: a tunnel that has lost its last connection does not work until it has one again."""
    return Phase.starting if phase is Phase.ready and not connected else phase
