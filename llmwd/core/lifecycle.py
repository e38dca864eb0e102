"""One lifecycle for everything that has a pid: workers, the vLLM server, cloudflared.

Theory of operation. A child is in one of seven phases. What happens to it arrives as one of eight events, and
TABLE says for every pair what the next phase is and what has to be done. The table is total: an event that means
nothing in a phase leaves it as it is, on purpose and visibly. Three facts are kept apart: `wanted` (the wish),
`phase` (the fact) and `ready_since_s` (the quality). Whoever runs a child compares wish and fact again and
again (`wish`), so an order that comes in the middle of something else is never lost.

Exits that we asked for arrive in draining or stopping, where `gone` leads to stopped: they never count as
failures. Whether a failure may be followed by a restart is decided beside this table, by `restart.py`, and
arrives here as `gone` (restart after the backoff) or `give_up`.
"""

from enum import StrEnum

import msgspec

from llmwd.vocab import Phase

STORY_LENGTH = 20


class Event(StrEnum):
    start = "start"  # it is wanted and may start
    proved = "proved"  # it has shown that it works
    stop = "stop"  # it is not wanted any more
    kill = "kill"  # the grace is over, or it hangs
    gone = "gone"  # nothing of it is left
    give_up = "give_up"  # it failed too often, or permanently
    retry = "retry"  # the backoff is over
    reset = "reset"  # the operator says: try again


class Effect(StrEnum):
    spawn = "spawn"
    terminate = "terminate"
    kill = "kill"
    arm_backoff = "arm_backoff"
    alarm = "alarm"


_P, _E, _F = Phase, Event, Effect

TABLE: dict[tuple[Phase, Event], tuple[Phase, tuple[Effect, ...]]] = {
    (_P.stopped, _E.start): (_P.starting, (_F.spawn,)),
    (_P.stopped, _E.proved): (_P.stopped, ()),
    (_P.stopped, _E.stop): (_P.stopped, ()),
    (_P.stopped, _E.kill): (_P.stopped, ()),
    (_P.stopped, _E.gone): (_P.stopped, ()),
    (_P.stopped, _E.give_up): (_P.failed, (_F.alarm,)),
    (_P.stopped, _E.retry): (_P.stopped, ()),
    (_P.stopped, _E.reset): (_P.stopped, ()),
    (_P.starting, _E.start): (_P.starting, ()),
    (_P.starting, _E.proved): (_P.ready, ()),
    (_P.starting, _E.stop): (_P.draining, (_F.terminate,)),
    (_P.starting, _E.kill): (_P.stopping, (_F.kill,)),
    (_P.starting, _E.gone): (_P.backoff, (_F.arm_backoff,)),
    (_P.starting, _E.give_up): (_P.failed, (_F.kill, _F.alarm)),
    (_P.starting, _E.retry): (_P.starting, ()),
    (_P.starting, _E.reset): (_P.starting, ()),
    (_P.ready, _E.start): (_P.ready, ()),
    (_P.ready, _E.proved): (_P.ready, ()),
    (_P.ready, _E.stop): (_P.draining, (_F.terminate,)),
    (_P.ready, _E.kill): (_P.stopping, (_F.kill,)),
    (_P.ready, _E.gone): (_P.backoff, (_F.arm_backoff,)),
    (_P.ready, _E.give_up): (_P.failed, (_F.kill, _F.alarm)),
    (_P.ready, _E.retry): (_P.ready, ()),
    (_P.ready, _E.reset): (_P.ready, ()),
    (_P.draining, _E.start): (_P.draining, ()),
    (_P.draining, _E.proved): (_P.draining, ()),
    (_P.draining, _E.stop): (_P.draining, ()),
    (_P.draining, _E.kill): (_P.stopping, (_F.kill,)),
    (_P.draining, _E.gone): (_P.stopped, ()),
    (_P.draining, _E.give_up): (_P.failed, (_F.kill, _F.alarm)),
    (_P.draining, _E.retry): (_P.draining, ()),
    (_P.draining, _E.reset): (_P.draining, ()),
    (_P.stopping, _E.start): (_P.stopping, ()),
    (_P.stopping, _E.proved): (_P.stopping, ()),
    (_P.stopping, _E.stop): (_P.stopping, ()),
    (_P.stopping, _E.kill): (_P.stopping, (_F.kill,)),
    (_P.stopping, _E.gone): (_P.stopped, ()),
    (_P.stopping, _E.give_up): (_P.failed, (_F.kill, _F.alarm)),
    (_P.stopping, _E.retry): (_P.stopping, ()),
    (_P.stopping, _E.reset): (_P.stopping, ()),
    (_P.backoff, _E.start): (_P.backoff, ()),
    (_P.backoff, _E.proved): (_P.backoff, ()),
    (_P.backoff, _E.stop): (_P.stopped, ()),
    (_P.backoff, _E.kill): (_P.backoff, ()),
    (_P.backoff, _E.gone): (_P.backoff, ()),
    (_P.backoff, _E.give_up): (_P.failed, (_F.alarm,)),
    (_P.backoff, _E.retry): (_P.starting, (_F.spawn,)),
    (_P.backoff, _E.reset): (_P.stopped, ()),
    (_P.failed, _E.start): (_P.failed, ()),
    (_P.failed, _E.proved): (_P.failed, ()),
    (_P.failed, _E.stop): (_P.failed, ()),
    (_P.failed, _E.kill): (_P.failed, (_F.kill,)),
    (_P.failed, _E.gone): (_P.failed, ()),
    (_P.failed, _E.give_up): (_P.failed, ()),
    (_P.failed, _E.retry): (_P.failed, ()),
    (_P.failed, _E.reset): (_P.stopped, ()),
}

ALIVE = frozenset({Phase.starting, Phase.ready, Phase.draining, Phase.stopping})


class Life(msgspec.Struct, frozen=True):
    """Where one child stands, and how it got there. `story`: its last transitions, newest last."""

    name: str
    wanted: bool = False
    phase: Phase = Phase.stopped
    since_s: float = 0.0
    ready_since_s: float | None = None
    story: tuple[tuple[float, str, str], ...] = ()


def step(life: Life, event: Event, now_s: float) -> tuple[Life, tuple[Effect, ...]]:
    """What becomes of the child, and what has to be done for it."""
    phase, effects = TABLE[life.phase, event]
    if phase is life.phase:
        return life, effects
    story = (*life.story[-STORY_LENGTH + 1 :], (now_s, event.value, phase.value))
    ready_since_s = now_s if phase is Phase.ready else None
    return msgspec.structs.replace(
        life, phase=phase, since_s=now_s, ready_since_s=ready_since_s, story=story
    ), effects


def wish(life: Life, wanted: bool, now_s: float) -> tuple[Life, tuple[Effect, ...]]:
    """Level-triggered: compare wish and fact, take the step that brings them nearer. Call it as often as you like."""
    life = msgspec.structs.replace(life, wanted=wanted)
    return step(life, Event.start if wanted else Event.stop, now_s)


def rows() -> list[tuple[str, ...]]:
    """The table for people: header, then a line for each transition that changes or does something."""
    shown: list[tuple[str, ...]] = [("phase", "event", "next phase", "done")]
    for (phase, event), (target, effects) in TABLE.items():
        if target is not phase or effects:
            shown.append((phase.value, event.value, target.value, ", ".join(effect.value for effect in effects)))
    return shown
