"""How vLLM is started: its arguments, its environment and where it will answer. Pure: nothing is looked up.

Facts about vLLM's command line (0.32): `_` and `-` are the same in a long option's name, `--x=v` and `--x v` mean the
same, the last of several counts, unambiguous beginnings are accepted, and the command line wins over --config's YAML.
"""

import ipaddress
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llmwd.config.problems import ConfigError
from llmwd.config.profile import Profile
from llmwd.config.settings import Settings

TENSOR = ("--tensor-parallel-size", "-tp")
PIPELINE = ("--pipeline-parallel-size", "-pp")
DATA = ("--data-parallel-size", "-dp")
API_KEY = ("--api-key",)
HF_TOKEN = ("--hf-token",)
# Secrets that vLLM takes as arguments, which every user of the node can read: they go by these variables instead.
SECRETS = {API_KEY: "VLLM_API_KEY", HF_TOKEN: "HF_TOKEN"}

# What vLLM needs of the supervisor's environment: who and where we are, the operator's tokens, the way to the network,
# the libraries without which a cluster's module-provided Python does not start. Everything else stays out: SLURM_*
# (vLLM and torch would take it for a Slurm launch), PYTHON* (ours), TUNNEL_*, NTFY_*.
_KEPT = frozenset(
    "HOME USER LOGNAME SHELL PATH LANG LANGUAGE TZ TMPDIR LD_LIBRARY_PATH CUDA_HOME "
    "XDG_CACHE_HOME XDG_CONFIG_HOME XDG_DATA_HOME "
    "HF_TOKEN HF_TOKEN_PATH HUGGING_FACE_HUB_TOKEN HF_ENDPOINT HF_HUB_CACHE HF_HUB_OFFLINE "
    "HTTP_PROXY HTTPS_PROXY NO_PROXY ALL_PROXY http_proxy https_proxy no_proxy all_proxy "
    "SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE".split()
)


class Endpoint(NamedTuple):
    """Where a client on this node reaches the server: `host` is connectable (127.0.0.1 for 0.0.0.0)."""

    host: str
    port: int
    served_as: str


def serve_argv(profile: Profile, settings: Settings, gpus: int, port: int | None = None) -> list[str]:
    """`[llm_bin, "serve", model, ...]` for `gpus` leased GPUs, without secrets; `port` stands in for SERVER_PORT.

    ConfigError when the profile's pipeline and data parallelism do not fit that many GPUs.
    """
    args = _without(without_secrets(profile.vllm_args), TENSOR)
    argv = [profile.llm_bin, "serve", profile.model_name, *args]
    if option(args, "--host") is None:
        argv += ["--host", "127.0.0.1"]
    if option(args, "--port") is None:
        argv += ["--port", str(settings.server_port if port is None else port)]
    return [*argv, "--tensor-parallel-size", str(tensor_parallel(args, gpus))]


def without_secrets(args: Sequence[str]) -> list[str]:
    """`args` without those that go by the environment."""
    args = _without(args, API_KEY)
    return _without(args, HF_TOKEN) if option(args, *HF_TOKEN) else args  # --hf-token alone is no secret


def tensor_parallel(args: Sequence[str], gpus: int) -> int:
    """The tensor parallel size with which `args` use exactly `gpus` GPUs; ConfigError when there is none."""
    other = _size(args, PIPELINE) * _size(args, DATA)
    if gpus % other or gpus < other:
        raise ConfigError(
            f"pipeline and data parallelism of these arguments need a multiple of {other} GPUs, not {gpus}: "
            "change NUM_GPUS or the arguments"
        )
    return gpus // other


def serve_environment(
    profile: Profile, settings: Settings, gpu_uuids: Sequence[str], base: Mapping[str, str], made_key: str
) -> dict[str, str]:
    """vLLM's whole environment: what it needs of `base` (ours), the profile's exports, the secrets among its arguments,
    LLM_VENV as if activated, the CUDA overrides, and exactly the leased GPUs, which no export can change."""
    env = {name: value for name, value in base.items() if name in _KEPT or name.startswith("LC_")}
    env |= profile.exports
    if token := option(profile.vllm_args, *HF_TOKEN):
        env["HF_TOKEN"] = token
    env.pop("VLLM_API_KEY", None)
    if key := api_key(profile, settings, made_key):
        env["VLLM_API_KEY"] = key
    env.pop("PYTHONHOME", None)
    env["VIRTUAL_ENV"] = profile.llm_venv
    if profile.cuda_setup:
        toolkit = profile.cuda_home_override
        env["CUDA_HOME"] = toolkit
        env["PATH"] = _joined(f"{toolkit}/bin", env.get("PATH", ""))
        env["LD_LIBRARY_PATH"] = _joined(profile.cuda12_lib, f"{toolkit}/lib64", env.get("LD_LIBRARY_PATH", ""))
    env["PATH"] = _joined(f"{profile.llm_venv}/bin", env.get("PATH", "") or "/usr/local/bin:/usr/bin:/bin")
    if profile.hf_home:
        env["HF_HOME"] = profile.hf_home
    if "DO_NOT_TRACK" not in env:
        env.setdefault("VLLM_NO_USAGE_STATS", "1")
    env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    env["CUDA_VISIBLE_DEVICES"] = ",".join(gpu_uuids)
    return env


def endpoint(profile: Profile, settings: Settings) -> Endpoint:
    """(host, port, name of the model), as the arguments say. Its values were checked when the profile was loaded."""
    args = profile.vllm_args
    host = option(args, "--host") or "127.0.0.1"
    port = int(option(args, "--port") or settings.server_port)
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return Endpoint(local, port, option(args, "--served-model-name") or profile.model_name)


def base_url(profile: Profile, settings: Settings) -> str:
    """`http://127.0.0.1:8000`, or https where the arguments bring a certificate. No slash at the end, no /v1."""
    host, port, _ = endpoint(profile, settings)
    scheme = "https" if option(profile.vllm_args, "--ssl-certfile") else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def api_key(profile: Profile, settings: Settings, made_key: str) -> str | None:
    """The key that the server asks for; None: it asks for none. The profile's own (its arguments win over its exports),
    else `made_key`, which llmwd made for this node, unless REQUIRE_API_KEY is off."""
    own = option(profile.vllm_args, *API_KEY) or profile.exports.get("VLLM_API_KEY")
    return own or (made_key if settings.require_api_key else None)


def is_loopback(host: str) -> bool:
    """Whether a server on `host` is out of other machines' reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def option(args: Sequence[str], *names: str) -> str | None:
    """The (first) value of the last occurrence of an option; "" where it has none, None where it is absent."""
    found = None
    for place, arg in enumerate(args):
        spelled, equals, value = arg.partition("=")
        if _named(spelled, names):
            found = value if equals else _value_at(args, place + 1) or ""
    return found


def problems_of(args: Sequence[str], gpus: int, loopback_only: bool) -> list[str]:
    """What llmwd cannot or must not serve with these arguments, one sentence each."""
    found = []
    host = option(args, "--host")
    if loopback_only and host is not None and not is_loopback(host):
        shown = host or "''"
        found.append(
            f"--host {shown} would let other machines reach the server: leave it out (the tunnel needs only the loopback), "
            "or set LOOPBACK_ONLY=false in etc/config.env if that is what you want"
        )
    if _values(args, API_KEY) > 1:
        found.append("more than one key for --api-key: several could be given to vLLM on its command line only, where every user reads them")
    if option(args, "--uds") is not None:
        found.append("--uds is not supported: llmwd and the tunnel reach the server by --host and --port")
    port = option(args, "--port")
    if port is not None and not (port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 65536):
        found.append(f"--port must be a whole number from 1 to 65535, not {port!r}")
    bad = [names for names in (PIPELINE, DATA) if not _is_size(option(args, *names))]
    found += [f"{names[0]} must be a whole number from 1 on, not {option(args, *names)!r}" for names in bad]
    if not bad:
        try:
            tensor_parallel(args, gpus)
        except ConfigError as error:
            found.append(str(error))
    return found


def warnings_of(args: Sequence[str], keyless: bool) -> list[str]:
    """What the operator may do but should know. keyless: the server will ask for no API key."""
    host = option(args, "--host")
    if host is not None and not is_loopback(host):
        return [f"--host {host} lets other machines use the server{', and it asks for no API key' if keyless else ''}"]
    return ["every user of this node can use the server: REQUIRE_API_KEY is off"] if keyless else []


def _named(spelled: str, names: Sequence[str]) -> bool:
    if not spelled.startswith("--"):
        return spelled in names
    spelled = spelled.replace("_", "-")
    # argparse takes unambiguous beginnings; of the options read here, these are worth the trouble.
    shortest = {TENSOR: "--tensor", API_KEY: "--api-k", HF_TOKEN: "--hf-t"}.get(tuple(names))
    return spelled in names or (shortest is not None and len(spelled) >= len(shortest) and names[0].startswith(spelled))


def _value_at(args: Sequence[str], place: int) -> str | None:
    return args[place] if place < len(args) and not args[place].startswith("-") else None


def _values(args: Sequence[str], names: Sequence[str]) -> int:
    """How many values the last occurrence of an option that takes several has, 0 where it is absent."""
    count = 0
    for place, arg in enumerate(args):
        spelled, equals, _ = arg.partition("=")
        if _named(spelled, names):
            count = int(bool(equals))
            while not equals and _value_at(args, place + 1 + count) is not None:
                count += 1
    return count


def _without(args: Sequence[str], names: Sequence[str]) -> list[str]:
    kept: list[str] = []
    place = 0
    while place < len(args):
        spelled, equals, _ = args[place].partition("=")
        if not _named(spelled, names):
            kept.append(args[place])
        elif not equals and _value_at(args, place + 1) is not None:
            place += 1
        place += 1
    return kept


def _is_size(text: str | None) -> bool:
    return text is None or (text.isascii() and text.isdigit() and len(text) < 6 and int(text) > 0)


def _size(args: Sequence[str], names: Sequence[str]) -> int:
    text = option(args, *names)
    return int(text) if text and _is_size(text) else 1


def _joined(*parts: str) -> str:
    """Folders joined by colons; an empty one would mean the current folder."""
    return ":".join(folder for part in parts for folder in part.split(":") if folder)
