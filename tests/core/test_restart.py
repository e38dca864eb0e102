"""How often a child may fail, and how long it waits."""

from hypothesis import given
from hypothesis import strategies as st

from llmwd.core.restart import Failures, Policy, after_failure

POLICY = Policy(intensity=5, period_s=300, first_s=0.0, backoff_min_s=0.5, backoff_max_s=3.0)
MIDDLE = 0.5  # of the dice: neither shorter nor longer


def delays(times: list[float], policy: Policy = POLICY, dice: float = MIDDLE) -> list[float | None]:
    failures, told = Failures(), []
    for at_s in times:
        failures, delay_s = after_failure(failures, policy, at_s, dice)
        told.append(delay_s)
    return told


def test_the_first_failure_is_mended_at_once_and_later_ones_ever_more_slowly() -> None:
    assert delays([0, 1, 2, 3, 4]) == [0.0, 0.5, 1.0, 2.0, 3.0]


def test_more_failures_than_the_intensity_within_the_period_end_in_quarantine() -> None:
    assert delays([0, 1, 2, 3, 4, 5])[-1] is None
    assert delays([0, 1, 2, 3, 4, 299.9])[-1] is None


def test_a_failure_is_forgotten_after_the_period() -> None:
    assert delays([0, 1, 2, 3, 4, 300])[-1] is not None
    assert delays([0, 1, 2, 3, 4, 1000])[-1] == 0.0


def test_failures_that_are_spread_out_never_end_in_quarantine() -> None:
    assert None not in delays([70.0 * at for at in range(100)])


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 1000), st.floats(0, 10))
def test_the_dice_spread_a_delay_by_half_and_the_longest_is_bounded(dice: float, intensity: int, first_s: float) -> None:
    policy = Policy(intensity=intensity, period_s=1e9, first_s=first_s, backoff_min_s=1.0, backoff_max_s=60.0)
    failures = Failures(tuple(float(at) for at in range(intensity - 1)))
    _, delay_s = after_failure(failures, policy, float(intensity), dice)
    _, middle_s = after_failure(failures, policy, float(intensity), MIDDLE)
    assert middle_s / 2 <= delay_s < middle_s * 1.5 + 1e-9 and delay_s <= max(first_s, 60.0) * 1.5
