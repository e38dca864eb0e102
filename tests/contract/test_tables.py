"""The lifecycle's table is total and reachable, and every word has a meaning that `explain` prints."""

import json

import pytest
from click.testing import CliRunner

from llmwd import vocab
from llmwd.core.lifecycle import ALIVE, TABLE, Effect, Event, Life, rows, step
from llmwd.ctl.explain import explain
from llmwd.vocab import Phase, Told

ENUMS = [kind for kind in vars(vocab).values() if isinstance(kind, type) and issubclass(kind, Told) and kind is not Told]


def shown() -> dict[str, object]:
    result = CliRunner().invoke(explain, ["states", "--json"], catch_exceptions=False)
    return json.loads(result.stdout)


def test_the_table_says_what_follows_from_every_event_in_every_phase() -> None:
    assert set(TABLE) == {(phase, event) for phase in Phase for event in Event}


def test_every_phase_can_be_reached_and_left() -> None:
    reached, todo = {Phase.stopped}, [Phase.stopped]
    while todo:
        phase = todo.pop()
        for event in Event:
            target = TABLE[phase, event][0]
            if target not in reached:
                reached.add(target)
                todo.append(target)
    assert reached == set(Phase)
    assert all(any(TABLE[phase, event][0] is not phase for event in Event) for phase in Phase)


@pytest.mark.parametrize("effect", list(Effect))
def test_every_effect_is_asked_for_somewhere_and_only_where_it_makes_sense(effect: Effect) -> None:
    where = [(phase, target) for (phase, _), (target, effects) in TABLE.items() if effect in effects]
    assert where
    for phase, target in where:
        match effect:
            case Effect.spawn:
                assert phase not in ALIVE and target is Phase.starting
            case Effect.terminate:
                assert phase in ALIVE and target is Phase.draining
            case Effect.kill:
                assert target in (Phase.stopping, Phase.failed)
            case Effect.arm_backoff:
                assert target is Phase.backoff
            case Effect.alarm:
                assert target is Phase.failed


@pytest.mark.parametrize("phase", list(Phase))
def test_a_kill_of_what_lives_kills_and_an_end_leaves_nothing_alive(phase: Phase) -> None:
    if phase in ALIVE:
        assert Effect.kill in TABLE[phase, Event.kill][1]
    assert TABLE[phase, Event.gone][0] not in ALIVE


def test_the_printed_rows_are_all_that_changes_or_does_something() -> None:
    header, *lines = rows()
    assert len(header) == 4 and all(len(line) == 4 and all(isinstance(word, str) for word in line) for line in lines)
    told = {(line[0], line[1]): (line[2], line[3]) for line in lines}
    for (phase, event), (target, effects) in TABLE.items():
        quiet = target is phase and not effects
        assert ((phase.value, event.value) in told) is not quiet
        if not quiet:
            assert told[phase.value, event.value] == (target.value, ", ".join(effects))
            assert step(Life("child", phase=phase), event, 0.0)[0].phase is target


@pytest.mark.parametrize("kind", ENUMS, ids=lambda kind: kind.__name__)
def test_every_word_has_a_meaning_and_explain_tells_it(kind: type[Told]) -> None:
    meanings = {word.value: word.meaning for word in kind}
    assert all(word == word.lower() and len(meaning) > 10 for word, meaning in meanings.items())
    assert len(set(meanings.values())) == len(meanings)
    assert shown()[kind.__name__] == meanings


def test_explain_prints_the_table_itself() -> None:
    header, *lines = rows()
    assert shown()["lifecycle"] == [dict(zip(header, line, strict=True)) for line in lines]


def test_a_word_is_equal_to_its_text_wherever_it_comes_from() -> None:
    assert Phase("ready") is Phase.ready and Phase.ready == "ready" and f"{Phase.ready}" == "ready"
