"""How long the driver may take for an answer."""

from llmwd.core import patience
from llmwd.core.patience import FIRST_S, LEAST_S, Patience


def test_only_the_first_inventory_of_a_process_may_initialise_the_gpus():
    first = Patience()
    assert (first.inventory_s, first.use_s) == (FIRST_S, LEAST_S)
    quick = patience.answered(first, True, 0.1)
    assert (quick.inventory_s, quick.use_s) == (LEAST_S, LEAST_S)
    assert patience.failed() == first


def test_a_slow_driver_is_given_twice_the_time_that_it_took_and_never_more_than_the_first():
    slow = patience.answered(Patience(), True, 4.0)
    assert slow == Patience(8.0, 8.0)
    assert patience.answered(slow, False, 0.1) == Patience(8.0, LEAST_S), "an inventory is no quicker for a quick look"
    assert patience.answered(slow, False, 60.0) == Patience(8.0, FIRST_S)
    assert patience.answered(slow, True, 60.0) == Patience(FIRST_S, FIRST_S)
