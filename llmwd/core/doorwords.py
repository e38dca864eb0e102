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
_UNKNOWN_GPUS = "It cannot be told at present which GPUs are free; the model waits until it can."
_BY_REASON = {  # where the words of the code would not be true
    Reason.starting: "The server is just starting.",
    Reason.switching: "Another model is about to be loaded.",
    Reason.server_backoff: "The model has ended unexpectedly and is about to be loaded again.",
    Reason.unknown_job: "A Slurm job may need the GPUs; the model comes back when it is over.",
    Reason.expected_job: "A Slurm job or a reservation needs the GPUs soon; the model comes back when it is over.",
    Reason.gpu_in_use: "Somebody else's program is on the GPUs; the model waits until they are free.",
    Reason.gpu_unknown: _UNKNOWN_GPUS,
    Reason.no_evidence: _UNKNOWN_GPUS,
    Reason.resume_delay: "Enough GPUs are free again; the model is about to be loaded.",
    Reason.node_draining: "The node is being drained, reserved or in maintenance; the model comes back when that is over.",
    Reason.no_gpus: "The node has fewer GPUs than the model needs.",
    Reason.memory_pressure: "The node is short of memory; the model comes back when there is enough.",
    Reason.budget_broken: "The model stays down until its operator has looked at a fault.",
    Reason.map_contradicted: "The model stays down until its operator has looked at a fault.",
    Reason.not_wanted: "No model is to be served at present.",
    Reason.stopping: "The server is being stopped.",
    Reason.stopped: "The server is being stopped.",
}
_SILENT = "The state of the model is not known at this moment."
_BY_LIMITS = {Reason.yielded_to_job, Reason.waiting_for_gpus}  # what the ends of jobs end
_JOBS = {Reason.yielded_to_job, Reason.unknown_job, Reason.expected_job}
_GAPS = {Reason.switching, Reason.server_backoff, Reason.starting, Reason.loading}
_HELD = {Reason.held, Reason.budget_broken, Reason.map_contradicted, Reason.not_wanted, Reason.stopping, Reason.stopped}
_FAILED = {Reason.server_failed, Reason.worker_failed, Reason.config_error}


class DoorState(msgspec.Struct, frozen=True, kw_only=True):
    """reachable: requests may reach the model; code says why not, told says it to people. expected_at: when it may be back,
    by all that is known; by_limits: that is when jobs' time limits end. gap: it will be there soon, without anybody's leave."""

    reachable: bool
    code: str
    told: str
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
        return DoorState(
            reachable=False, code="loading", told=_SILENT, retry_after_s=SOON_S, model=None, since_at=now_at, hostname=hostname, gap=True,
        )  # fmt: skip
    code = _code(server)
    expected_at, by_limits = _expected(code, server, gpus, now_at)
    # Of an open door: for the moment after a sudden end.
    wait_s = math.ceil(expected_at - now_at) if expected_at else SOON_S if code == "open" or server.reason in _GAPS else RETRY_S
    return DoorState(
        reachable=code == "open", code=code, told=TOLD[code] if code == "open" else _BY_REASON.get(server.reason, TOLD[code]),
        retry_after_s=min(max(SOON_S, wait_s), LATEST_S), model=server.served_as, since_at=server.since_at,
        expected_at=expected_at, by_limits=by_limits, hostname=hostname, gap=server.reason in _GAPS,
    )  # fmt: skip


def not_yet(state: DoorState) -> DoorState:
    """The model serves, and in a moment requests may be passed on to it."""
    return msgspec.structs.replace(state, reachable=False, code="loading", told="The model is about to answer.", gap=True)


def without_a_way(state: DoorState, why: str) -> DoorState:
    """The model serves, and no request may be passed on to it."""
    return msgspec.structs.replace(state, reachable=False, code="failed", told=why, retry_after_s=RETRY_S)


def _code(server: ServerFact) -> str:
    if server.node_phase is NodePhase.serving:
        return "open"
    if server.node_phase is NodePhase.failed or server.reason in _FAILED:
        return "failed"
    if server.reason in _HELD:
        return "held"
    if server.node_phase is NodePhase.loading or server.reason in _GAPS:
        return "loading"
    if server.reason in _JOBS:
        return "yielded_to_job"
    return "waiting_for_gpus"


def _expected(code: str, server: ServerFact, gpus: GpusFact | None, now_at: float) -> tuple[float | None, bool]:
    """(when it may be back, whether only if jobs take all their time). None where anything that counts is not known, the
    time that loading takes included, or should have happened by now."""
    begin_at, by_limits = None, False
    if code == "loading" and server.node_phase is NodePhase.loading:
        begin_at = server.started_at
    elif server.reason in _BY_LIMITS and gpus is not None:
        free = free_at(gpus, server.wanted_gpus)
        begin_at, by_limits = (free, True) if free else (None, False)  # enough are free: it waits for something else
    elif server.reason is Reason.held and gpus is not None and gpus.hold is not None and gpus.hold.until_at is not None:
        free = free_at(gpus, server.wanted_gpus)
        begin_at = max(gpus.hold.until_at, free) if free is not None else None
        by_limits = free is not None and free > gpus.hold.until_at
    if begin_at is None or server.load_s is None:
        return None, False
    expected_at = begin_at + server.load_s
    return (expected_at, by_limits) if now_at < expected_at < now_at + FARTHEST_S else (None, False)


def free_at(gpus: GpusFact, wanted: int) -> float | None:
    """When the jobs' time limits will have left `wanted` GPUs free; 0: they are free; None: never, or it cannot be told."""
    ends_at: dict[int, float] = {}
    for claim in gpus.claims:
        if claim.gpus is None:
            return None
        for index in claim.gpus:
            ends_at[index] = max(ends_at.get(index, 0.0), math.inf if claim.ends_at is None else claim.ends_at)
    free = sum(gpu.holder in (Holder.free, Holder.llmwd) and gpu.index not in ends_at for gpu in gpus.gpus)
    missing = wanted - free
    if missing <= 0:
        return 0.0
    found = sorted(ends_at.values())[missing - 1] if missing <= len(ends_at) else math.inf
    return found if found < math.inf else None


def error_body(state: DoorState) -> bytes:
    """An error object as OpenAI's clients know it. Of an open door: what holds for the moment after a sudden end."""
    code = "loading" if state.reachable else state.code
    when = f" It is expected at {iso(state.expected_at)}{provided(state)}." if state.expected_at is not None else ""
    message = f"{state.told}{when} Ask again later." if not state.reachable else "The model has just gone away. Ask again."
    return json.dumps({"error": {"message": message, "type": "service_unavailable", "param": None, "code": code}}).encode()


def provided(state: DoorState) -> str:
    """On what the time depends at which the model is expected."""
    return " if the jobs before it take all their time" if state.by_limits else ""


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
