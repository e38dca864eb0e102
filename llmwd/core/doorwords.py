"""What the front door tells while the model is away: to programs, and to people on a page. Pure."""

import html
import json
from datetime import UTC, datetime

import msgspec

from llmwd.messages import ServerFact
from llmwd.vocab import NodePhase, Reason

RETRY_S = 30
SOON_S = 5
TOLD = {  # code: what people read
    "open": "The model answers.",
    "yielded_to_job": "The GPUs are needed by a Slurm job; the model comes back when it is over.",
    "waiting_for_gpus": "The model waits for free GPUs.",
    "loading": "The model is being loaded.",
    "held": "The operator has taken the model down for a while.",
    "failed": "The model cannot be served at present.",
}
_JOBS = {Reason.yielded_to_job, Reason.unknown_job, Reason.expected_job}
_GAPS = {Reason.switching, Reason.server_backoff, Reason.starting, Reason.loading}


class DoorState(msgspec.Struct, frozen=True, kw_only=True):
    """reachable: requests may reach the model; code says why not. gap: it will be there soon, without anybody's leave."""

    reachable: bool
    code: str
    retry_after_s: int
    model: str | None
    since_at: float
    expected_at: float | None = None
    hostname: str = ""
    gap: bool = False


def state_of(server: ServerFact | None, now_at: float, hostname: str = "") -> DoorState:
    """server None: its manager says nothing (any more)."""
    if server is None:
        return DoorState(reachable=False, code="loading", retry_after_s=SOON_S, model=None, since_at=now_at, hostname=hostname, gap=True)
    code = _code(server)
    expected_at = _expected_at(server, now_at)
    wait_s = max(SOON_S, int(expected_at - now_at)) if expected_at else SOON_S if server.reason in _GAPS else RETRY_S
    return DoorState(
        reachable=code == "open", code=code, retry_after_s=wait_s, model=server.served_as, since_at=server.since_at,
        expected_at=expected_at, hostname=hostname, gap=server.reason in _GAPS,
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


def _expected_at(server: ServerFact, now_at: float) -> float | None:
    if server.node_phase is not NodePhase.loading or server.started_at is None or server.load_s is None:
        return None
    expected_at = server.started_at + server.load_s
    return expected_at if expected_at > now_at else None


def error_body(state: DoorState) -> bytes:
    """An error object as OpenAI's clients know it. Of an open door: what holds for the moment after a sudden end."""
    code = "loading" if state.reachable else state.code
    message = f"{TOLD[code]} Ask again later." if not state.reachable else "The model has just gone away. Ask again."
    return json.dumps({"error": {"message": message, "type": "service_unavailable", "param": None, "code": code}}).encode()


def models_body(state: DoorState) -> bytes:
    """/v1/models with the state of the model."""
    model = {"id": state.model, "object": "model", "created": int(state.since_at), "owned_by": "llmwd", "state": state.code}
    return json.dumps({"object": "list", "data": [model] if state.model else []}).encode()


def page(state: DoorState) -> bytes:
    """For people: state, since when, what is expected."""
    rows = [("Model", state.model or "none"), ("State", TOLD[state.code]), ("Since", _when(state.since_at))]
    if state.expected_at is not None and not state.reachable:
        rows.append(("Expected", _when(state.expected_at)))
    cells = "".join(f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in rows)
    style = "body{font:1.1em sans-serif;margin:3em auto;max-width:40em}th{text-align:left;padding-right:1em}"
    title = html.escape(state.hostname or "llmwd")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="30"><title>{title}</title>'
        f"<style>{style}</style><h1>{title}</h1><table>{cells}</table></html>\n"
    ).encode()


def _when(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")
