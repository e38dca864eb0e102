"""Which of the free GPUs to take."""

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from llmwd.core.gpumap import SimGpu, simulated
from llmwd.core.placement import choose


def node(*groups: str, numa: str = "") -> list[SimGpu]:
    """GPUs of which those with the same letter in one of `groups` are joined by NVLink; numa: a digit for each."""
    gpus = []
    for gpu in simulated(max(len(groups[0]) if groups else 0, len(numa))):
        i = gpu.index
        peers = {j for group in groups for j, letter in enumerate(group) if letter == group[i] != "." and j != i}
        near = int(numa[i]) if numa else None
        gpus.append(replace(gpu, nvlink=tuple(sorted(peers)), numa=near))
    return gpus


def taken(gpus: list[SimGpu], n: int, rank: dict[str, int] | None = None) -> list[int] | None:
    chosen = choose(gpus, n, rank)
    return None if chosen is None else [gpu.index for gpu in chosen]


def test_the_highest_indices_are_taken_where_nothing_else_differs() -> None:
    assert taken(list(simulated(8)), 3) == [5, 6, 7]
    assert taken(node("aaaaaaaa", numa="00000000"), 3) == [5, 6, 7]


def test_too_few_free_gpus_give_nothing() -> None:
    assert choose(simulated(2), 3) is None
    assert choose(simulated(2), 0) is None
    assert taken(list(simulated(2)), 2) == [0, 1]


def test_a_set_with_nvlink_goes_before_higher_indices() -> None:
    assert taken(node("aabb.."), 2) == [2, 3]
    assert taken(node("aaaabb"), 4) == [0, 1, 2, 3]


def test_a_set_on_one_numa_node_goes_before_higher_indices() -> None:
    assert taken(node(numa="00001"), 2) == [2, 3]
    assert taken(node(numa="00011"), 2) == [3, 4]


def test_nvlink_goes_before_the_numa_node() -> None:
    assert taken(node("aa..", numa="0111"), 2) == [0, 1]


def test_among_gpus_that_are_all_joined_the_numa_node_decides() -> None:
    assert taken(node("aaaaaaaa", numa="00001111")[:7], 4) == [0, 1, 2, 3]


def test_slurms_index_decides_where_it_is_known() -> None:
    gpus = list(simulated(4))
    assert taken(gpus, 2, {"SIM-0": 3, "SIM-1": 2, "SIM-2": 1, "SIM-3": 0}) == [1, 0]


def test_eight_of_sixteen_take_whole_groups() -> None:
    assert taken(node("aaaabbbbccccdddd", numa="0" * 8 + "1" * 8), 8) == list(range(8, 16))
    assert taken(node("aaaaaaaa" + "bbbbcccc"), 8) == list(range(8))
    assert taken(node("a" * 16, numa="0101010101010101"), 8) == list(range(1, 16, 2))
    assert taken(node("aabbccddeeffgghh"), 8) == list(range(8, 16))


def score(chosen: tuple[SimGpu, ...]) -> tuple[int, int, list[int]]:
    pairs = list(combinations(chosen, 2))
    linked = sum(b.index in a.nvlink or a.index in b.nvlink for a, b in pairs)
    near = sum(a.numa is not None and a.numa == b.numa for a, b in pairs)
    return linked, near, sorted((gpu.index for gpu in chosen), reverse=True)


@given(st.data(), st.integers(1, 12), st.integers(1, 12))
def test_up_to_twelve_gpus_no_set_is_better(data: st.DataObject, count: int, n: int) -> None:
    numa = "".join(data.draw(st.lists(st.sampled_from("01"), min_size=count, max_size=count)))
    links = "".join(data.draw(st.lists(st.sampled_from("abc."), min_size=count, max_size=count)))
    more = "".join(data.draw(st.lists(st.sampled_from("xy..."), min_size=count, max_size=count)))
    gpus = node(links, more, numa=numa)
    chosen = choose(gpus, n)
    if n > count:
        assert chosen is None
        return
    assert chosen is not None
    assert score(chosen) == max(score(some) for some in combinations(gpus, n))
    assert choose(data.draw(st.permutations(gpus)), n) == chosen


@given(st.data())
def test_sixteen_gpus_in_equal_groups_give_the_best_set_too(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([1, 2, 4, 8, 16]))
    letters = data.draw(st.permutations([chr(ord("a") + i // size) for i in range(16)]))
    gpus = node("".join(letters), numa="0" * 8 + "1" * 8)
    chosen = choose(gpus, 8)
    assert chosen is not None
    pairs = size * (size - 1) // 2 * (8 // size) if size <= 8 else 28
    assert score(chosen)[0] == pairs
    assert choose(data.draw(st.permutations(gpus)), 8) == chosen
