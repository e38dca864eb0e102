"""How often a child may fail: restart intensity, exponential backoff with jitter, quarantine.

As in Erlang/OTP's supervisor, more than `intensity` failures within `period_s` end the restarts; unlike there only
this child goes into quarantine, and what comes before is spread by a backoff. A child that has been quiet for
`period_s` starts again with a clean slate, because its failures have left the window.
"""

import msgspec


class Policy(msgspec.Struct, frozen=True):
    """`first_s`: the delay after a first failure (0: at once)."""

    intensity: int
    period_s: float
    first_s: float
    backoff_min_s: float
    backoff_max_s: float


class Failures(msgspec.Struct, frozen=True):
    """When a child failed, within the policy's window, oldest first."""

    at_s: tuple[float, ...] = ()


def after_failure(failures: Failures, policy: Policy, now_s: float, dice: float) -> tuple[Failures, float | None]:
    """(the new record, seconds to wait before the next start; None: quarantine). `dice` is in [0, 1)."""
    recent = (*(at for at in failures.at_s if now_s - at < policy.period_s), now_s)
    record = Failures(recent)
    if len(recent) > policy.intensity:
        return record, None
    if len(recent) == 1:
        return record, policy.first_s * (0.5 + dice)
    delay_s = min(policy.backoff_max_s, policy.backoff_min_s * 2 ** (len(recent) - 2))
    return record, delay_s * (0.5 + dice)
