"""Every setting of a node: its name, default, unit and meaning. The README's table and `explain settings` print it."""

import msgspec

from llmwd.config import values
from llmwd.vocab import Event, Source


class SettingSpec(msgspec.Struct, frozen=True):
    """One setting. `default` is written as in a settings file; `parse` turns such text into the value or raises
    ValueError with what it must be; `by_profile`: a profile may set it for itself."""

    name: str
    parse: values.Parser
    default: str
    meaning: str
    unit: str = ""
    by_profile: bool = False

    @property
    def field(self) -> str:
        """Its name in `Settings`: lower case, times with `_s`."""
        return self.name.lower() + ("_s" if self.unit == "s" else "")

    @property
    def kind(self) -> str:
        """What a value must be, in words ("a whole number from 1 to 64")."""
        return self.parse.wanted


# What an operator may want to hear of; the other events say what happened to the notices themselves.
_EVENTS = tuple(event.value for event in Event if event not in (Event.back, Event.digest, Event.test))
_SOURCES = tuple(source.value for source in Source if source is not Source.prolog)

SETTINGS: tuple[SettingSpec, ...] = (
    SettingSpec("NUM_GPUS", values.integer(1, 64), "1", "How many GPUs to claim for vLLM.", "GPUs", True),
    SettingSpec("NTFY_TOPIC", values.topic(), "", "The ntfy topic that notices go to; empty: no notices."),
    SettingSpec("NTFY_SERVER", values.url(), "https://ntfy.sh", "The ntfy server."),
    SettingSpec(
        "NTFY_PRIORITY",
        values.choice("min", "low", "default", "high", "max", "urgent", "1", "2", "3", "4", "5"),
        "default",
        "The priority of an ordinary notice.",
    ),
    SettingSpec("NTFY_TOKEN_FILE", values.secret_file(), "", "The file (chmod 600) with an access token of the ntfy server."),
    SettingSpec("NTFY_USER", values.text(), "", "The user at the ntfy server, with NTFY_PASSWORD_FILE."),
    SettingSpec("NTFY_PASSWORD_FILE", values.secret_file(), "", "The file (chmod 600) with that user's password."),
    SettingSpec("NTFY_TAGS", values.tags(), "", "More tags for each notice, such as gpu,lab."),
    SettingSpec(
        "NTFY_CLICK", values.click(), "", "The address that a notice leads to; empty: https://TUNNEL_HOSTNAME/ where that is set."
    ),
    SettingSpec("NTFY_EVENTS", values.names("all", *_EVENTS), "all", "What is told, by ntfy and others."),
    SettingSpec(
        "NTFY_DEADMAN",
        values.integer(0, 4000),
        "0",
        "The ntfy server tells when nothing was heard from this node for so long; 0: never.",
        "minutes",
    ),
    SettingSpec("NOTIFY_URLS", values.urls(), "", "Other services that notices go to: apprise's addresses, with blanks between them."),
    SettingSpec(
        "CUDA_SETUP", values.flag(), "false", "Whether this node needs the two CUDA overrides below.", by_profile=True
    ),
    SettingSpec(
        "CUDA12_LIB",
        values.path(),
        "",
        "With CUDA_SETUP: the CUDA 12 library folder, put first in vLLM's LD_LIBRARY_PATH.",
        by_profile=True,
    ),
    SettingSpec(
        "CUDA_HOME_OVERRIDE",
        values.path(),
        "",
        "With CUDA_SETUP: the CUDA toolkit that becomes vLLM's CUDA_HOME.",
        by_profile=True,
    ),
    SettingSpec(
        "LLM_VENV", values.path(), "$LLMWD_HOME/.venv", "The virtual environment that vLLM is in.", by_profile=True
    ),
    SettingSpec(
        "LLM_BIN", values.path(), "$LLM_VENV/bin/vllm", "The vllm program, run as it is named here.", by_profile=True
    ),
    SettingSpec("SERVER_PORT", values.integer(1, 65535), "8000", "The port that vLLM answers on, on 127.0.0.1."),
    SettingSpec(
        "REQUIRE_API_KEY",
        values.flag(),
        "true",
        "Whether vLLM asks for an API key: the profile's own, or else the one that llmwd makes for this node.",
    ),
    SettingSpec("LOOPBACK_ONLY", values.flag(), "true", "Whether a profile whose --host other machines reach is refused."),
    SettingSpec(
        "HF_HOME", values.path(), "", "Hugging Face's folder for downloaded models; empty: its own default.", "", True
    ),
    SettingSpec("DOOR", values.flag(), "true", "Whether the front door (Caddy) stands between the tunnel and vLLM."),
    SettingSpec("DOOR_PORT", values.integer(0, 65535), "0", "The port of 127.0.0.1 that the front door answers on as well; 0: none."),
    SettingSpec("CADDY_BIN", values.text(), "", "The caddy program; empty: the one of llmwd's environment, or on PATH."),
    SettingSpec(
        "DOOR_OPEN", values.choice("no", "yes-i-mean-it"), "no", "yes-i-mean-it: the front door asks for no key, of anybody."
    ),
    SettingSpec("DOOR_ALLOW", values.paths(), "", "More paths that pass the front door, such as /v1/rerank,/tokenize."),
    SettingSpec("DOOR_MAX_BODY_MB", values.integer(1, 10000), "32", "The largest request that the front door takes.", "MB"),
    SettingSpec(
        "DOOR_MAX_REQUESTS", values.integer(1, 100000), "512", "The most requests that the front door has open at vLLM.", "requests"
    ),
    SettingSpec(
        "DOOR_HOLD",
        values.seconds(0, 3600),
        "0",
        "How long a request waits while the model is only restarting or loading; 0: it gets 503.",
        "s",
    ),
    SettingSpec("TUNNEL_HOSTNAME", values.hostname(), "", "The public name of the tunnel; empty: no tunnel."),
    SettingSpec(
        "TUNNEL_MODE",
        values.choice("named", "token", "quick", "none"),
        "",
        "The kind of tunnel: named, token, quick or none; empty: named with TUNNEL_HOSTNAME, else none.",
    ),
    SettingSpec("TUNNEL_ID", values.tunnel_id(), "", "The tunnel's UUID (`cloudflared tunnel list` shows it)."),
    SettingSpec("TUNNEL_NAME", values.text(), "", "The tunnel's name, only shown."),
    SettingSpec("CLOUDFLARED_BIN", values.text(), "cloudflared", "The cloudflared program: a name on PATH or a path."),
    SettingSpec(
        "CLOUDFLARED_CREDS", values.secret_file(), "$HOME/.cloudflared/$TUNNEL_ID.json", "The tunnel's credentials file."
    ),
    SettingSpec("TUNNEL_TOKEN_FILE", values.secret_file(), "", "With TUNNEL_MODE=token: the file that holds the tunnel's token."),
    SettingSpec(
        "TUNNEL_PROTOCOL",
        values.choice("http2", "auto", "quic"),
        "http2",
        "What the tunnel speaks to Cloudflare: http2 (TCP), quic (UDP), or auto.",
    ),
    SettingSpec(
        "POLL_INTERVAL", values.seconds(0.05, 60), "0.25", "How often to look for jobs where inotify does not work.", "s"
    ),
    SettingSpec(
        "DETECTION", values.names("auto", *_SOURCES), "auto", "Which sources of detection to use; auto: all that work."
    ),
    SettingSpec("SIM_GPUS", values.integer(0, 64), "0", "How many GPUs to simulate; 0: real ones.", "GPUs"),
    SettingSpec("SIM_DIR", values.path(), "", "The folder of simulated jobs; empty: sim in the runtime folder."),
    SettingSpec("SLURM_NODE", values.node(), "", "This node's name in Slurm; empty: found out."),
    SettingSpec(
        "GPU_MAP", values.gpu_map(), "", "Slurm's GPU index to NVML's index or UUID, such as 0=3,1=2; empty: found out."
    ),
    SettingSpec(
        "RESOLVE_DEADLINE",
        values.seconds(0.05, 60),
        "1.0",
        "A job whose GPUs are not known after this counts as one on ours.",
        "s",
    ),
    SettingSpec("SCONTROL_TIMEOUT", values.seconds(0.1, 120), "5", "The longest that one scontrol call may take.", "s"),
    SettingSpec("RECONCILE", values.seconds(0.1, 3600), "15", "How often everything is compared with Slurm anew.", "s"),
    SettingSpec(
        "RESUME_AFTER", values.seconds(0, 86400), "10", "How long enough GPUs must have been free before a start.", "s"
    ),
    SettingSpec(
        "LEASE_TTL", values.seconds(2, 300), "10", "vLLM ends by itself when its lease is not renewed for this long.", "s"
    ),
    SettingSpec(
        "YIELD_GRACE", values.seconds(0, 30), "1.0", "How long a serving vLLM has between SIGTERM and SIGKILL.", "s"
    ),
    SettingSpec(
        "YIELD_BUDGET",
        values.seconds(0.1, 600),
        "5",
        "Giving GPUs back may take this long; once it took longer, llmwd stays away until `llmwd-ctl resume`.",
        "s",
    ),
    SettingSpec(
        "START_TIMEOUT", values.seconds(1, 86400), "1800", "A model that is not ready by then is started again.", "s"
    ),
    SettingSpec(
        "PROBE_INTERVAL", values.seconds(0.1, 86400), "60", "How often an idle model has to answer a one-token request.", "s"
    ),
    SettingSpec(
        "RESTART_INTENSITY", values.integer(1, 1000), "5", "This many deaths within RESTART_PERIOD are too many.", "deaths"
    ),
    SettingSpec("RESTART_PERIOD", values.seconds(1, 86400), "300", "The period in which deaths are counted.", "s"),
    SettingSpec("BACKOFF_MIN", values.seconds(0.01, 3600), "1", "The first wait before a restart; it doubles.", "s"),
    SettingSpec("BACKOFF_MAX", values.seconds(0.01, 86400), "300", "The longest wait before a restart, give or take half of it.", "s"),
    SettingSpec("NICE", values.integer(0, 19), "10", "vLLM's nice level: the higher, the sooner jobs' processes run first."),
    SettingSpec(
        "OOM_SCORE_ADJ", values.integer(0, 1000), "800", "vLLM's oom_score_adj: the higher, the sooner the kernel takes us first."
    ),
    SettingSpec(
        "IO_PRIORITY", values.choice("off", *"01234567"), "7", "vLLM's best-effort I/O level, 7 comes last; off: as inherited."
    ),
    SettingSpec(
        "CPU_AFFINITY", values.choice("auto", "off"), "auto", "auto: vLLM runs near its GPUs and off the cores of jobs, where these can be told."
    ),
    SettingSpec(
        "MEMORY_PRESSURE",
        values.percent(),
        "10",
        "While others are on the node: yield when processes waited for memory for this part of 10 s; 0: never.",
        "%",
    ),
    SettingSpec("LOOKAHEAD", values.flag(), "off", "Whether to leave in time for reservations and planned jobs."),
    SettingSpec(
        "LOOKAHEAD_DRAIN", values.seconds(0, 86400), "60", "With LOOKAHEAD: how long before their start to leave.", "s"
    ),
    SettingSpec("LOG_LEVEL", values.choice("debug", "info", "warning", "error"), "info", "What the logs tell."),
    SettingSpec("LOG_MAX_MB", values.integer(1, 10000), "20", "The size at which a log is rotated.", "MB"),
    SettingSpec("LOG_KEEP", values.integer(0, 100), "5", "How many rotated logs are kept.", "files"),
)
BY_NAME: dict[str, SettingSpec] = {spec.name: spec for spec in SETTINGS}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The node's settings, checked. `*_s` are seconds; texts and paths are "" where nothing is set.

    `gpu_map` goes from Slurm's GPU index to NVML's index (digits) or UUID. `cuda_setup` to `llm_bin`, `num_gpus` and
    `hf_home` are what holds without a profile's own word: to serve, take them from the profile.
    """

    num_gpus: int
    ntfy_topic: str
    ntfy_server: str
    ntfy_priority: str
    ntfy_token_file: str
    ntfy_user: str
    ntfy_password_file: str
    ntfy_tags: tuple[str, ...]
    ntfy_click: str
    ntfy_events: tuple[str, ...]
    ntfy_deadman: int
    notify_urls: tuple[str, ...]
    cuda_setup: bool
    cuda12_lib: str
    cuda_home_override: str
    llm_venv: str
    llm_bin: str
    server_port: int
    require_api_key: bool
    loopback_only: bool
    hf_home: str
    door: bool
    door_port: int
    caddy_bin: str
    door_open: str
    door_allow: tuple[str, ...]
    door_max_body_mb: int
    door_max_requests: int
    door_hold_s: float
    tunnel_hostname: str
    tunnel_mode: str
    tunnel_id: str
    tunnel_name: str
    cloudflared_bin: str
    cloudflared_creds: str
    tunnel_token_file: str
    tunnel_protocol: str
    poll_interval_s: float
    detection: tuple[str, ...]
    sim_gpus: int
    sim_dir: str
    slurm_node: str
    gpu_map: dict[int, str]
    resolve_deadline_s: float
    scontrol_timeout_s: float
    reconcile_s: float
    resume_after_s: float
    lease_ttl_s: float
    yield_grace_s: float
    yield_budget_s: float
    start_timeout_s: float
    probe_interval_s: float
    restart_intensity: int
    restart_period_s: float
    backoff_min_s: float
    backoff_max_s: float
    nice: int
    oom_score_adj: int
    io_priority: str
    cpu_affinity: str
    memory_pressure: float
    lookahead: bool
    lookahead_drain_s: float
    log_level: str
    log_max_mb: int
    log_keep: int
