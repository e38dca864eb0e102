"""What is being served, as `llmwd-ctl status --json` tells it, and what the serving process itself shows."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import requests

from llmwd.redact import mask_arguments

STATUS_WITHIN_S = 10.0
NO_SUPERVISOR_EXIT = 3


class Refused(Exception):
    """The benchmark cannot run or did not finish; the text is the sentence for the user."""


@dataclass(frozen=True)
class Served:
    """A model that answers: its names, its server process and the GPUs under it."""

    profile: str
    model: str  # what `vllm serve` was given: a Hugging Face name or a folder
    served_as: str
    url: str
    pid: int  # of the `vllm serve` process
    vllm_bin: str
    node: str
    gpus: tuple[object, ...]  # the lease's, as status gives them
    argv: tuple[str, ...] = ()  # secrets removed
    environ: dict[str, str] = field(default_factory=dict, repr=False)


def ask_status(ctl: str) -> dict | None:
    """`ctl status --json` decoded; None when no supervisor runs. Refused when it gives no usable answer."""
    try:
        done = subprocess.run(
            [ctl, "status", "--json"], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=STATUS_WITHIN_S,
        )  # fmt: skip
    except OSError as error:
        raise Refused(f"{ctl} cannot be run: {error.strerror}.") from error
    except subprocess.TimeoutExpired as error:
        raise Refused(f"{ctl} status did not answer within {STATUS_WITHIN_S:.0f} s.") from error
    if done.returncode == NO_SUPERVISOR_EXIT:
        return None
    try:
        status = json.loads(done.stdout)
    except json.JSONDecodeError as error:
        told = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise Refused(f"{ctl} status --json gave no answer that can be read: {told[0]}") from error
    if not isinstance(status, dict):
        raise Refused(f"{ctl} status --json did not give an object.")
    return status


def find_served(ctl: str) -> Served:
    """The model that is being served now; Refused with what to do when there is none."""
    status = ask_status(ctl)
    if status is None:
        raise Refused("vLLM server not running: llmwd is not running here. Start it with ./start.sh, then try again.")
    phase = status.get("phase", "unknown")
    if phase != "serving":
        reason = f" ({status['reason']})" if status.get("reason") else ""
        wait = "Wait until it serves" if phase in ("loading", "waiting", "yielding") else "See `bin/llmwd-ctl status`"
        raise Refused(f"vLLM server not running: llmwd is {phase}{reason}. {wait}, then try again.")
    server, model = status["server"], status["model"]
    pid = server["pid"]
    return Served(
        profile=model["profile"],
        model=model["name"],
        served_as=model["served_as"],
        url=server["url"].rstrip("/"),
        pid=pid,
        vllm_bin=server["bin"],
        node=status.get("node", ""),
        gpus=tuple((status.get("lease") or {}).get("gpus") or ()),
        argv=mask_arguments(_read_null_separated(pid, "cmdline")),
        environ=dict(item.split("=", 1) for item in _read_null_separated(pid, "environ") if "=" in item),
    )


def why_it_ended(status: dict | None, served: Served) -> str:
    """What happened to the server, for "llmwd <this> during the benchmark". Pure."""
    if status is None:
        return "was stopped"
    phase, reason = status.get("phase", "unknown"), status.get("reason", "")
    if phase == "held" and reason == "held":
        return "gave its GPUs back by the operator's order"
    jobs = jobs_on(served.gpus, status)
    if jobs:
        return f"yielded to Slurm job {', '.join(jobs)}"
    if phase in ("yielding", "waiting", "held"):  # held for another reason: after a yield that broke its budget, for one
        return f"yielded ({reason or phase})"
    return f"lost its server (now {phase}{f', {reason}' if reason else ''})"


def jobs_on(gpus: tuple[object, ...], status: dict) -> list[str]:
    """The Slurm jobs that `status` shows on any of `gpus` (indices or UUIDs), in order, without repeats. Pure."""
    taken = [
        str(gpu["job"])
        for gpu in status.get("gpus") or ()
        if gpu.get("job") is not None and (gpu.get("index") in gpus or gpu.get("uuid") in gpus)
    ]
    return list(dict.fromkeys(taken))


def server_version(served: Served) -> str:
    """vLLM's version as the server tells it (no key needed), or "unknown"."""
    try:
        return str(requests.get(f"{served.url}/version", timeout=5).json()["version"])
    except (requests.RequestException, KeyError, TypeError):
        return "unknown"


def serving_python(served: Served) -> str:
    """The serving environment's Python version, from its pyvenv.cfg (starting it costs seconds), or "unknown"."""
    try:
        lines = (Path(served.vllm_bin).parent.parent / "pyvenv.cfg").read_text().splitlines()
    except OSError:
        return "unknown"
    settings = dict(line.split(" = ", 1) for line in lines if " = " in line)
    return settings.get("version") or settings.get("version_info") or "unknown"


def api_key(served: Served) -> str | None:
    """The key that the server asks for: it always gets it by its environment. None: it asks for none."""
    return served.environ.get("VLLM_API_KEY")


def _read_null_separated(pid: int, name: str) -> list[str]:
    """/proc/PID/NAME as words; empty when the process has gone or belongs to somebody else."""
    try:
        raw = Path("/proc", str(pid), name).read_bytes()
    except OSError:
        return []
    return [os.fsdecode(word) for word in raw.split(b"\0") if word]
