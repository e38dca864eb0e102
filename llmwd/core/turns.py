"""Which of Slurm's plans to ask for next, and what is known of them. Pure.

Two questions, the pending jobs and the reservations, take turns, one a minute: no answer is older than two minutes, if
Slurm answers. What is known is kept in the resolver's fact, for its next incarnation.
"""

from collections.abc import Sequence

import msgspec

from llmwd.messages import Expected, Plans

EVERY_S = 60.0
STALE_S = 3 * EVERY_S
RESERVATIONS, PENDING = "reservations", "pending jobs"
NEVER_S = float("-inf")


def unasked() -> tuple[Plans, ...]:
    """What is known before the first answers. Jobs come first: they are planned every day, and later than reservations."""
    return tuple(Plans(kind=kind, asked_s=NEVER_S) for kind in (PENDING, RESERVATIONS))


def adopted(plans: Sequence[Plans], now_s: float) -> tuple[Plans, ...]:
    """What our last incarnation knew. Old answers are kept for what they are worth, and count as none."""
    known = {each.kind: each for each in plans if each.asked_s <= now_s}
    found = (known.get(each.kind, each) for each in unasked())
    return tuple(msgspec.structs.replace(each, asked_s=NEVER_S) if now_s - each.asked_s > STALE_S else each for each in found)


def with_answer(plans: Sequence[Plans], kind: str, asked_s: float, expected: Sequence[Expected] | None) -> tuple[Plans, ...]:
    """expected None: no answer came; what was heard before stands until its time is over."""

    def answered(before: Plans) -> Plans:
        # A plan without any GPU never concerns us, and a cluster may have many of them.
        kept = before.expected if expected is None else tuple(each for each in expected if each.gpus != 0)
        return Plans(kind=kind, asked_s=asked_s, expected=kept)

    return tuple(answered(each) if each.kind == kind else each for each in plans)


def unanswered(plans: Sequence[Plans]) -> tuple[str, ...]:
    """What has not been asked yet. Nothing is begun before: an answer, or the lack of one, takes milliseconds, a model minutes."""
    return tuple(each.kind for each in plans if each.asked_s == NEVER_S)


def next_question(plans: Sequence[Plans]) -> tuple[str, float]:
    """What to ask next, and when. The first two follow each other at once: a reservation that is heard of a minute after
    the pending jobs would find a model that was begun for nothing. From then on they are a minute apart."""
    due = min(plans, key=lambda each: each.asked_s)
    last_s = max(each.asked_s for each in plans)
    return due.kind, NEVER_S if due.asked_s == NEVER_S else last_s + EVERY_S
