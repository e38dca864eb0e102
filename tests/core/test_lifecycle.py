"""The lifecycle of everything with a pid."""

from hypothesis import given
from hypothesis import strategies as st

from llmwd.core.lifecycle import ALIVE, STORY_LENGTH, Effect, Event, Life, step, wish
from llmwd.vocab import Phase

events = st.lists(st.sampled_from(Event), max_size=60)


def after(*happened: Event, life: Life | None = None) -> Life:
    life = life or Life("child")
    for at_s, event in enumerate(happened):
        life, _ = step(life, event, float(at_s))
    return life


def test_an_exit_that_was_asked_for_is_no_failure() -> None:
    assert after(Event.start, Event.proved, Event.stop, Event.gone).phase is Phase.stopped
    assert after(Event.start, Event.proved, Event.stop, Event.kill, Event.gone).phase is Phase.stopped


def test_what_ends_by_itself_waits_and_starts_again() -> None:
    life = after(Event.start, Event.proved, Event.gone)
    assert life.phase is Phase.backoff
    life, effects = step(life, Event.retry, 5.0)
    assert life.phase is Phase.starting and effects == (Effect.spawn,)


def test_a_child_in_quarantine_starts_only_after_a_reset() -> None:
    life = after(Event.start, Event.gone, Event.give_up)
    assert life.phase is Phase.failed and wish(life, True, 1.0)[0].phase is Phase.failed
    assert after(Event.retry, life=life).phase is Phase.failed
    assert wish(after(Event.reset, life=life), True, 1.0)[0].phase is Phase.starting


def test_an_order_in_the_middle_of_an_end_is_carried_out_after_it() -> None:
    life, effects = wish(after(Event.start, Event.stop), True, 1.0)
    assert life.phase is Phase.draining and life.wanted and not effects
    life, effects = wish(after(Event.gone, life=life), True, 2.0)
    assert life.phase is Phase.starting and effects == (Effect.spawn,)


def test_a_wish_that_is_fulfilled_does_nothing_however_often_it_is_told() -> None:
    life = wish(after(Event.start, Event.proved), True, 5.0)[0]
    assert wish(life, True, 9.0) == (life, ())


def test_a_child_is_ready_only_by_its_own_proof() -> None:
    assert after(Event.start).ready_since_s is None
    assert after(Event.start, Event.proved).ready_since_s == 1.0
    assert after(Event.start, Event.proved, Event.stop).ready_since_s is None


@given(events)
def test_no_walk_leaves_two_processes_or_none_to_wait_for(walk: list[Event]) -> None:
    life, processes = Life("child"), 0
    for event in walk:
        if event in (Event.gone, Event.give_up) and life.phase in ALIVE:
            processes = 0
        life, effects = step(life, event, 0.0)
        processes += effects.count(Effect.spawn)
        assert processes == (1 if life.phase in ALIVE else 0)
        assert not (Effect.spawn in effects and life.phase is not Phase.starting)
        assert (life.ready_since_s is not None) == (life.phase is Phase.ready)
        assert (Effect.alarm in effects) == (Effect.alarm in effects and life.phase is Phase.failed)


@given(events)
def test_every_walk_can_be_ended_and_its_story_stays_short(walk: list[Event]) -> None:
    life = after(*walk)
    assert len(life.story) <= STORY_LENGTH
    assert not life.story or life.story[-1][2] == life.phase
    life = after(Event.stop, Event.kill, Event.gone, life=life)
    assert life.phase in (Phase.stopped, Phase.failed)
