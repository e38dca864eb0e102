"""What cloudflared is started with, and where it leads to. No file is read and no process started here.

Behaviours measured with cloudflared 2026.8: a wrong flag ends it with 0; it takes `{}` as credentials or token and is
refused for ever; a stray TUNNEL_* variable wins over its configuration, proxies break its origin.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping

import msgspec

from llmwd.messages import ServerFact
from llmwd.vocab import NodePhase, Phase

NAMED, TOKEN, QUICK, NONE = "named", "token", "quick", "none"
GRACE_S = 5  # requests in flight may take this long after SIGTERM
SECRET_BYTES = 32
DOOR_AWAY_S = 15.0  # a door whose Caddy died is back in a second, after a look at its program that may take its time
PASSED_ON = ("PATH", "HOME", "SSL_CERT_FILE", "SSL_CERT_DIR")  # some sites have their certificates only there
NO_STREAMS = "a quick tunnel is for trying: answers arrive whole, not as a stream, and its name changes with every start"
SLOW = "cloudflared is slow to answer: this is what it said last"
OFF = "off: TUNNEL_HOSTNAME is not set"
OFF_BY_MODE = "off: TUNNEL_MODE=none"

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


class Recipe(msgspec.Struct, frozen=True):
    """Everything that a running cloudflared depends on: if it changes, it has to be started anew."""

    argv: tuple[str, ...]
    config: str
    env: dict[str, str]


class Credentials(msgspec.Struct, frozen=True):
    """Credentials, or a token, as far as they can be judged here. secrets: what nobody may read in a log.
    problems: sentences, why they cannot work; empty if they may."""

    tunnel_id: str = ""
    secrets: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def check_credentials(path: str, text: bytes, tunnel_id: str) -> Credentials:
    """Judge a credentials file by its content.

    tunnel_id: the UUID it has to be for, "" to take the file's own.
    """
    try:
        found = json.loads(text)
    except ValueError:
        made = "make it anew with `cloudflared tunnel token --cred-file`"
        return Credentials(problems=(f"{path} is not JSON: {made}",))
    names = ("AccountTag", "TunnelSecret", "TunnelID")
    judged = _judge(path, found, names, "no tunnel's credentials file")
    own = judged.tunnel_id
    if own and tunnel_id and own != tunnel_id.lower():
        other = f"{path} is for the tunnel {own}, but TUNNEL_ID is {tunnel_id}: correct one of them"
        return msgspec.structs.replace(judged, problems=(*judged.problems, other))
    return judged


def check_token(path: str, text: bytes) -> Credentials:
    """Judge a file with the token that Cloudflare's dashboard, or `cloudflared tunnel token`, shows."""
    token = text.strip()
    try:
        found = json.loads(base64.b64decode(token, validate=True))
    except ValueError:  # binascii's as well
        advice = "it has to hold what `cloudflared tunnel token` prints, and nothing else"
        return Credentials(problems=(f"{path} holds no tunnel's token: {advice}",))
    judged = _judge(path, found, ("a", "s", "t"), "no tunnel's token")
    return msgspec.structs.replace(judged, secrets=(*judged.secrets, token.decode()))


def _judge(path: str, found: object, names: tuple[str, str, str], kind: str) -> Credentials:
    """names: of the account, the secret and the tunnel's id."""
    problems = []
    held = found if isinstance(found, dict) else {}
    missing = [name for name in names if not isinstance(held.get(name), str) or not held[name]]
    if missing:
        return Credentials(problems=(f"{path} is {kind}: {', '.join(missing)} is missing in it",))
    own, text = held[names[2]], held[names[1]]
    if not _UUID.fullmatch(own):
        problems.append(f"{path}: its {names[2]} is no UUID: make the file anew")
    try:
        if len(base64.b64decode(text, validate=True)) < SECRET_BYTES:
            problems.append(f"{path}: its secret is shorter than {SECRET_BYTES} bytes, which Cloudflare refuses: make the file anew")
    except (binascii.Error, ValueError):
        problems.append(f"{path}: its secret is damaged (not base64): make the file anew")
    return Credentials(own.lower(), (text,), tuple(problems))


def recipe(
    program: str, config_path: str, mode: str, protocol: str, hostname: str, tunnel_id: str, secret_path: str, url: str,
    environ: Mapping[str, str],
) -> Recipe:
    """How to run a tunnel of this mode to the origin `url`. secret_path: the credentials or the token file."""
    argv: tuple[str, ...] = (
        program, "tunnel", "--config", config_path, "--no-autoupdate", "--metrics", "127.0.0.1:0", "--loglevel", "info",
        "--grace-period", f"{GRACE_S}s", "--protocol", protocol,
    )  # fmt: skip
    if mode == QUICK:
        # The rule in the configuration is what counts: --url only says "quick", and cannot name a socket.
        argv += ("--url", url if url.startswith("http") else "http://localhost")
    else:
        argv += ("run", "--token-file", secret_path) if mode == TOKEN else ("run",)
    # Nothing else of our environment: TUNNEL_TOKEN would win over the configuration, proxies break the origin.
    env = {name: environ[name] for name in PASSED_ON if name in environ}
    named = (tunnel_id, secret_path) if mode == NAMED else None
    return Recipe(argv, _config("" if mode == QUICK else hostname, named, url), env)


def _config(hostname: str, named: tuple[str, str] | None, url: str) -> str:
    """config.yml. Every text is quoted as JSON does it, which YAML understands."""
    origin = "connectTimeout: 5s, noHappyEyeballs: true, keepAliveTimeout: 90s"
    if url.startswith("https:"):
        origin += ", noTLSVerify: true"  # our own server on the loopback: its certificate names another host
    text = "# Made by llmwd for every start of cloudflared; changes are lost.\n"
    if named is not None:
        text += f"tunnel: {json.dumps(named[0])}\ncredentials-file: {json.dumps(named[1])}\n"
    text += f"originRequest: {{{origin}}}\ningress:\n"
    if not hostname:
        return text + f"  - service: {json.dumps(url)}\n"
    return text + f"  - hostname: {json.dumps(hostname)}\n    service: {json.dumps(url)}\n  - service: http_status:404\n"


def origin(server: ServerFact | None, running: bool, stale_after_s: float, now_s: float) -> str | None:
    """Without a front door: the address that the tunnel has to lead to, None: none is wanted. A tunnel that runs stays
    until the server is gone, so that it is never in the way of a yield. A fact that nobody repeats is of a server that
    has ended since."""
    if server is None or server.url is None or now_s - server.at_s > stale_after_s:
        return None
    wanted = server.node_phase is NodePhase.serving or (running and server.node_phase is NodePhase.yielding)
    return server.url if wanted else None


def door_origin(
    socket: str, phase: Phase | None, since_s: float, at_s: float, running: bool, stale_after_s: float, now_s: float
) -> str | None:
    """With a front door: the tunnel comes once the door answers, and stays through yields and through a restart of the
    door, which listens at the same socket again; it goes with a door that has failed, that stays stopped for longer
    than a restart takes (every restart passes through `stopped`), or of which nobody speaks any more.

    since_s: since when the door's phase is this one. at_s: when it said so last."""
    if phase is None or now_s - at_s > stale_after_s:
        return None
    away = phase is Phase.failed or (phase is Phase.stopped and now_s - since_s >= DOOR_AWAY_S)
    return f"unix:{socket}" if phase is Phase.ready or (running and not away) else None


def why_stopped(mode: str, hostname: str, door: bool, slow: str) -> str:
    """What is told of a tunnel that does not run and has not failed. slow: what keeps its start waiting, "" for nothing."""
    if mode == NONE:
        return OFF_BY_MODE if hostname else OFF
    return slow or ("waiting for the front door" if door else "waiting for the model")


def shown_phase(phase: Phase, connected: bool) -> Phase:
    """What is told to the others: a tunnel that has lost its last connection does not work until it has one again."""
    return Phase.starting if phase is Phase.ready and not connected else phase
