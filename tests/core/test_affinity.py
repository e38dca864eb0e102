"""Which CPUs the model's processes run on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmwd.core.affinity import choose, cpu_list, fewest

ALL = frozenset(range(32))
NODE_0, NODE_1 = frozenset(range(16)), frozenset(range(16, 32))
SETS = st.frozensets(st.integers(0, 40))


@pytest.mark.parametrize(
    ("text", "cpus"), [("", ()), ("3", (3,)), ("0-3,8\n", (0, 1, 2, 3, 8)), ("0-1,16-17", (0, 1, 16, 17))]
)
def test_a_list_as_the_kernel_writes_it(text: str, cpus: tuple[int, ...]) -> None:
    assert cpu_list(text) == set(cpus)


@pytest.mark.parametrize("text", ["a", "1-", "0x3", "1-2-3"])
def test_what_is_no_list_is_refused_rather_than_guessed(text: str) -> None:
    with pytest.raises(ValueError):
        cpu_list(text)


def test_near_the_gpus_where_their_numa_node_is_told_and_anywhere_else() -> None:
    assert choose(ALL, {0: NODE_0}, {}, 2).cpus == NODE_0
    assert choose(ALL, {0: NODE_0, 1: NODE_1}, {}, 2).cpus == ALL
    assert choose(ALL, {}, {}, 2).cpus == ALL


def test_off_the_cores_of_jobs_and_the_words_name_them() -> None:
    choice = choose(ALL, {0: NODE_0}, {"7": [cpu_list("0-3"), cpu_list("4")], "8": [cpu_list("20-23")]}, 2)
    assert choice.cpus == cpu_list("5-15")
    assert choice.why == "NUMA node 0, off the cores of jobs 7, 8"


def test_a_process_that_may_run_everywhere_says_nothing_and_silences_nobody() -> None:
    assert choose(ALL, {0: NODE_0}, {"7": [frozenset(range(128))]}, 2).cpus == NODE_0
    assert choose(ALL, {0: NODE_0}, {"7": [ALL, cpu_list("0-3")]}, 2).cpus == cpu_list("4-15")


def test_off_the_jobs_cores_counts_more_than_near_the_gpus() -> None:
    choice = choose(ALL, {0: NODE_0}, {"7": [cpu_list("0-13")]}, 2)
    assert choice.cpus == cpu_list("14-31") and choice.why == "off the cores of job 7"


def test_where_too_few_would_be_left_the_jobs_cores_are_shared_after_all() -> None:
    choice = choose(ALL, {0: NODE_0}, {"7": [cpu_list("0-28")]}, 2)
    assert choice.cpus == NODE_0 and "too few" in choice.why
    assert choose(ALL, {0: cpu_list("0")}, {"7": [cpu_list("0-28")]}, 2).cpus == ALL
    assert choose(ALL, {0: cpu_list("0")}, {}, 2).cpus == ALL


def test_on_a_small_machine_half_of_it_is_enough() -> None:
    assert (fewest(64, 4), fewest(8, 4), fewest(2, 1), fewest(1, 1)) == (6, 4, 1, 1)
    assert choose(cpu_list("0-1"), {}, {"7": [cpu_list("1")]}, 2).cpus == {0}


@given(st.frozensets(st.integers(0, 31), min_size=1), st.dictionaries(st.integers(0, 3), SETS), st.dictionaries(st.text(), st.lists(SETS)), st.integers(1, 8))
def test_never_outside_what_we_may_use_and_never_too_few(allowed, nodes, jobs, gpus) -> None:
    cpus = choose(allowed, nodes, jobs, gpus).cpus
    assert cpus <= allowed and len(cpus) >= fewest(len(allowed), gpus)
