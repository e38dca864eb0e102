"""The dead man's notices that servers hold and that shall not be told: each is taken back at its own server. Pure.

One is given up by an orderly end, when it is no longer wanted, when another server is told, and once it has been told
itself. Its sequence id stays on disk until the server has confirmed that it is gone, so the next incarnation goes on
where this one was interrupted.
"""

import msgspec

from llmwd.core.outbox import Deadman, State

LATEST_S = 3 * 86400.0  # ntfy schedules nothing for later
SHOWN_FOR_S = 12 * 3600.0  # so long an ntfy keeps what it has told


def give_up(state: State, now_at: float) -> State:
    """The present one is to be taken back."""
    old = state.deadman
    if old is None:
        return state
    fires_at = now_at + LATEST_S if old.fires_at is None else old.fires_at
    return msgspec.structs.replace(
        state, deadman=None, back=(*state.back, msgspec.structs.replace(old, fires_at=fires_at))
    )


def at_server(state: State, mark: str, wanted: bool, now_at: float) -> State:
    """What is known by the server with this mark; what another one has shown, or was given, does not count here."""
    if mark and state.server != mark:
        state = msgspec.structs.replace(state, server=mark, replaces=state.replaces and not state.server)
    old = state.deadman
    return give_up(state, now_at) if old is not None and not (wanted and old.server in ("", mark)) else state


def next_back(state: State, marks: frozenset[str]) -> Deadman | None:
    """The first that one of these servers may still have."""
    return next((one for one in state.back if one.server in marks), None)


def taken(state: State, sid: str, now_at: float) -> State:
    """Without this one, and those that nobody can see any more."""
    left = tuple(one for one in state.back if one.sid != sid and one.fires_at + SHOWN_FOR_S > now_at)
    return msgspec.structs.replace(state, back=left)
