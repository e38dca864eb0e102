"""When Slurm is asked for its plans, and what of its answers survives."""

from llmwd.core import turns
from llmwd.core.turns import PENDING, RESERVATIONS
from llmwd.messages import Expected, Plans

NOW_S = 1000.0


def expected(start_s: float, gpus: int | None) -> Expected:
    return Expected(who="job 7", start_at=None, start_s=start_s, over_s=None, gpus=gpus, job="7")


def after(*answers: tuple[str, float, tuple[Expected, ...] | None]) -> tuple[Plans, ...]:
    plans = turns.unasked()
    for kind, asked_s, told in answers:
        plans = turns.with_answer(plans, kind, asked_s, told)
    return plans


def test_the_first_two_questions_follow_each_other_and_then_they_take_turns_a_minute_apart() -> None:
    plans, asked, now_s = turns.unasked(), [], NOW_S
    assert turns.unanswered(plans) == (PENDING, RESERVATIONS)
    for _ in range(5):
        kind, due_s = turns.next_question(plans)
        now_s = max(due_s, now_s + 1)
        asked.append((kind, now_s - NOW_S))
        plans = turns.with_answer(plans, kind, now_s, ())
    assert asked == [(PENDING, 1), (RESERVATIONS, 2), (PENDING, 62), (RESERVATIONS, 122), (PENDING, 182)]
    assert turns.unanswered(plans) == ()


def test_without_an_answer_what_was_heard_before_stands() -> None:
    plans = after((PENDING, 10.0, (expected(1100.0, 2),)), (RESERVATIONS, 11.0, ()), (PENDING, 70.0, None))
    assert plans[0] == Plans(kind=PENDING, asked_s=70.0, expected=(expected(1100.0, 2),))
    assert turns.unanswered(after((PENDING, 10.0, None), (RESERVATIONS, 11.0, None))) == ()


def test_plans_without_gpus_are_not_kept() -> None:
    assert after((PENDING, 10.0, (expected(1100.0, 0), expected(1100.0, None))))[0].expected == (expected(1100.0, None),)


def test_the_next_incarnation_knows_what_the_last_one_knew_and_asks_no_sooner() -> None:
    plans = after((PENDING, 900.0, (expected(1100.0, 2),)), (RESERVATIONS, 960.0, ()))
    assert turns.adopted(plans, 1000.0) == plans
    assert turns.next_question(turns.adopted(plans, 1000.0)) == (PENDING, 1020.0)


def test_what_is_too_old_to_be_an_answer_is_asked_anew_before_anything_is_begun_and_not_forgotten() -> None:
    plans = turns.adopted(after((PENDING, 900.0, (expected(1100.0, 2),)), (RESERVATIONS, 960.0, ())), 960.0 + turns.STALE_S)
    assert turns.unanswered(plans) == (PENDING,) and plans[0].expected == (expected(1100.0, 2),)
    assert turns.adopted((), 1000.0) == turns.unasked()
    # The clock of another boot.
    assert turns.adopted(after((PENDING, 5000.0, (expected(6000.0, 2),))), 1000.0) == turns.unasked()
