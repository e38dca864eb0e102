"""What the front door tells while the model is away: to programs, and (core/doorpage.py) to people. Pure.

Nothing of it names a job or its user: who asks the model need not know who else computes here.
"""

import json
import math
from datetime import UTC, datetime

import msgspec

from llmwd.messages import GpusFact, ServerFact
from llmwd.vocab import Holder, NodePhase, Reason

RETRY_S = 30
SOON_S = 5
FARTHEST_S = 366 * 86400.0  # what is farther off is nobody's plan
LATEST_S = 600  # jobs often end before their time limits, and switches are made
TOLD = {  # code: what people read
    "open": "The model answers.",
    "yielded_to_job": "The GPUs are needed by a Slurm job; the model comes back when it is over.",
    "waiting_for_gpus": "The model waits for free GPUs.",
    "loading": "The model is being loaded.",
    "held": "The operator has taken the model down for a while.",
    "failed": "The model cannot be served at present.",
}
_BY_LIMITS = ("yielded_to_job", "waiting_for_gpus")
_JOBS = {Reason.yielded_to_job, Reason.unknown_job, Reason.expected_job}
_GAPS = {Reason.switching, Reason.server_backoff, Reason.starting, Reason.loading}


class DoorState(msgspec.Struct, frozen=True, kw_only=True):
    """reachable: requests may reach the model; code says why not. expected_at: when it may be back, by all that is known;
    by_limits: that is when jobs' time limits end. gap: it will be there soon, without anybody's leave."""

    reachable: bool
    code: str
    retry_after_s: int
    model: str | None
    since_at: float
    expected_at: float | None = None
    by_limits: bool = False
    hostname: str = ""
    gap: bool = False


def state_of(server: ServerFact | None, now_at: float, hostname: str = "", gpus: GpusFact | None = None) -> DoorState:
    """server None: its manager says nothing (any more)."""
    if server is None:
        return DoorState(reachable=False, code="loading", retry_after_s=SOON_S, model=None, since_at=now_at, hostname=hostname, gap=True)
    code = _code(server)
    expected_at = _expected_at(code, server, gpus, now_at)
    wait_s = math.ceil(expected_at - now_at) if expected_at else SOON_S if server.reason in _GAPS else RETRY_S
    return DoorState(
        reachable=code == "open", code=code, retry_after_s=min(max(SOON_S, wait_s), LATEST_S), model=server.served_as,
        since_at=server.since_at, expected_at=expected_at, by_limits=code in _BY_LIMITS, hostname=hostname,
        gap=server.reason in _GAPS,
    )  # fmt: skip


def _code(server: ServerFact) -> str:
    if server.node_phase is NodePhase.serving:
        return "open"
    if server.node_phase is NodePhase.failed:
        return "failed"
    if server.reason in (Reason.held, Reason.budget_broken, Reason.map_contradicted):
        return "held"
    if server.node_phase is NodePhase.loading or server.reason in _GAPS:
        return "loading"
    if server.reason in _JOBS:
        return "yielded_to_job"
    return "waiting_for_gpus"


def _expected_at(code: str, server: ServerFact, gpus: GpusFact | None, now_at: float) -> float | None:
    """None where anything that counts is not known, or should have happened by now."""
    load_s = server.load_s
    if code == "loading" and server.node_phase is NodePhase.loading and server.started_at is not None and load_s is not None:
        begin_at: float | None = server.started_at
    elif code in _BY_LIMITS:
        begin_at = free_at(gpus, server.wanted_gpus) if gpus is not None else None
    elif code == "held" and gpus is not None and gpus.hold is not None:
        begin_at = gpus.hold.until_at
    else:
        return None
    if begin_at is None:
        return None
    expected_at = begin_at + (load_s or 0.0)
    return expected_at if now_at < expected_at < now_at + FARTHEST_S else None


def free_at(gpus: GpusFact, wanted: int) -> float | None:
    """When the jobs' time limits will have left `wanted` GPUs free; None: never, now, or it cannot be told."""
    ends_at: dict[int, float] = {}
    for claim in gpus.claims:
        if claim.gpus is None:
            return None
        for index in claim.gpus:
            ends_at[index] = max(ends_at.get(index, 0.0), math.inf if claim.ends_at is None else claim.ends_at)
    free = sum(gpu.holder in (Holder.free, Holder.llmwd) and gpu.index not in ends_at for gpu in gpus.gpus)
    missing = wanted - free
    if not 0 < missing <= len(ends_at):
        return None
    found = sorted(ends_at.values())[missing - 1]
    return found if found < math.inf else None


def error_body(state: DoorState) -> bytes:
    """An error object as OpenAI's clients know it. Of an open door: what holds for the moment after a sudden end."""
    code = "loading" if state.reachable else state.code
    when = f" It is expected at {iso(state.expected_at)}." if state.expected_at is not None else ""
    message = f"{TOLD[code]}{when} Ask again later." if not state.reachable else "The model has just gone away. Ask again."
    return json.dumps({"error": {"message": message, "type": "service_unavailable", "param": None, "code": code}}).encode()


def models_body(state: DoorState) -> bytes:
    """/v1/models with the state of the model."""
    model = {
        "id": state.model, "object": "model", "created": int(state.since_at), "owned_by": "llmwd", "state": state.code,
        "expected_at": iso(state.expected_at) if state.expected_at is not None else None,
    }  # fmt: skip
    return json.dumps({"object": "list", "data": [model] if state.model else []}).encode()


def iso(at: float) -> str:
    """2026-11-24T10:00:00Z"""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
