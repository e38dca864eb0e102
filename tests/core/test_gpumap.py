"""From Slurm's index to the GPU."""

from itertools import permutations

from msgspec.structs import replace
from hypothesis import given
from hypothesis import strategies as st

from llmwd.core.gpumap import SimGpu, build_map, pci_key, simulated, with_lost


def gpu(index: int, minor: int | None, bus: int, name: str = "H200", mig: tuple[str, ...] = ()) -> SimGpu:
    pci = f"00000000:{bus:02X}:00.0"
    return SimGpu(index=index, uuid=f"GPU-{index}", minor=minor, pci=pci, name=name, mig_uuids=mig)


def straight(count: int, name: str = "H200") -> list[SimGpu]:
    return [gpu(i, i, 0x10 + i, name) for i in range(count)]


def test_where_all_orders_agree_the_map_is_certain() -> None:
    found = build_map(straight(4), slurm_total=4, slurm_types=1, gpu_map={}, sim=False)
    assert found.certain
    assert found.by_index == {i: (f"GPU-{i}",) for i in range(4)}
    assert found.claimed([1, 3]) == {"GPU-1", "GPU-3"}
    assert found.likely == {f"GPU-{i}": i for i in range(4)}


def test_a_job_without_gpus_claims_none_and_one_that_is_not_known_claims_all() -> None:
    found = build_map(straight(2), 2, 0, {}, sim=False)
    assert found.claimed([]) == set()
    assert found.claimed(None) == {"GPU-0", "GPU-1"}


def test_an_index_outside_the_map_may_be_any_gpu() -> None:
    assert build_map(straight(2), 2, 0, {}, sim=False).claimed([2]) == {"GPU-0", "GPU-1"}


def test_where_index_minor_and_pci_order_all_differ_an_index_means_every_candidate() -> None:
    gpus = [gpu(0, 1, 0x12), gpu(1, 2, 0x10), gpu(2, 0, 0x11)]
    found = build_map(gpus, 3, 1, {}, sim=False)
    assert not found.certain
    assert "GPU_MAP" in found.why
    assert found.by_index == {
        0: ("GPU-0", "GPU-1", "GPU-2"),  # NVML, PCI, minor
        1: ("GPU-0", "GPU-1", "GPU-2"),
        2: ("GPU-0", "GPU-1", "GPU-2"),
    }
    part = build_map([gpu(0, 0, 0x10), gpu(1, 2, 0x11), gpu(2, 1, 0x12)], 3, 1, {}, sim=False)
    assert part.by_index == {0: ("GPU-0",), 1: ("GPU-1", "GPU-2"), 2: ("GPU-1", "GPU-2")}
    assert part.claimed([2]) == {"GPU-1", "GPU-2"}


def test_gpu_map_settles_it_by_uuid_or_by_nvml_index() -> None:
    gpus = [gpu(0, 1, 0x12), gpu(1, 2, 0x10), gpu(2, 0, 0x11)]
    found = build_map(gpus, 3, 1, {0: "GPU-2", 1: 0, 2: "GPU-1"}, sim=False)
    assert found.certain
    assert [found.claimed([i]) for i in range(3)] == [{"GPU-2"}, {"GPU-0"}, {"GPU-1"}]
    assert found.likely == {"GPU-2": 0, "GPU-0": 1, "GPU-1": 2}


def test_a_wrong_gpu_map_says_what_is_wrong_and_leaves_any_index_to_mean_any_gpu() -> None:
    found = build_map(straight(3), 3, 1, {0: "GPU-0", 1: 0, 2: "GPU-9", 7: 1}, sim=False)
    assert not found.certain
    for word in ("GPU_MAP gives 0 for more than one index", "GPU-9", "has index 7"):
        assert word in found.why
    assert found.claimed([0]) == {"GPU-0", "GPU-1", "GPU-2"}
    assert "leaves out index 1" in build_map(straight(2), 2, 1, {0: 0}, sim=False).why


def test_gpus_that_are_left_out_of_gres_conf_shift_the_numbers() -> None:
    for total in (3, 5):
        found = build_map(straight(4), total, 1, {}, sim=False)
        assert not found.certain
        assert sorted(found.by_index) == list(range(total))
        assert found.claimed([0]) == set(found.uuids)


def test_with_gpu_map_the_gpus_that_slurm_does_not_have_are_nobodys() -> None:
    found = build_map(straight(3), 2, 1, {0: 1, 1: 2}, sim=False)
    assert found.certain
    assert found.claimed([0, 1]) == {"GPU-1", "GPU-2"}
    assert found.likely == {"GPU-1": 0, "GPU-2": 1, "GPU-0": 2}


def test_what_slurm_or_the_driver_did_not_tell_is_not_guessed() -> None:
    lost = replace(gpu(1, 1, 0x11), uuid="")
    for gpus, total, types in (
        (straight(2), None, 1),
        (straight(2), 2, None),
        ([gpu(0, 0, 0x10), gpu(1, None, 0x11)], 2, 1),
        ([gpu(0, 0, 0x10), replace(gpu(1, 1, 0x11), pci="")], 2, 1),
        ([gpu(0, 0, 0x10), lost], 2, 1),
        ([gpu(0, 0, 0x10), gpu(0, 1, 0x11)], 2, 1),
        (straight(2), 2, 2),
    ):
        found = build_map(gpus, total, types, {}, sim=False)
        assert not found.certain
        assert found.claimed([0]) == set(found.uuids)


def test_a_single_gpu_is_certain_whatever_else_is_unknown() -> None:
    assert build_map([gpu(0, None, 0x10)], 1, None, {}, sim=False).certain


def test_with_two_types_an_index_means_the_candidates_of_both_groupings() -> None:
    gpus = [gpu(0, 0, 0x10, "A"), gpu(1, 1, 0x11, "B"), gpu(2, 2, 0x12, "A")]
    found = build_map(gpus, 3, 2, {}, sim=False)
    # by PCI and minor: 0 1 2; A before B: 0 2 1; B before A: 1 0 2
    assert found.by_index == {0: ("GPU-0", "GPU-1"), 1: ("GPU-0", "GPU-1", "GPU-2"), 2: ("GPU-1", "GPU-2")}


def test_with_mig_any_index_may_be_any_gpu_and_gpu_map_names_the_slices() -> None:
    gpus = [gpu(0, 0, 0x10), gpu(1, 1, 0x11, mig=("MIG-x", "MIG-y"))]
    assert build_map(gpus, 3, 2, {}, sim=False).claimed([0]) == {"GPU-0", "GPU-1"}
    found = build_map(gpus, 3, 2, {0: "GPU-0", 1: "MIG-x", 2: "MIG-y"}, sim=False)
    assert found.certain
    assert found.claimed([2]) == {"GPU-1"}
    assert found.likely == {"GPU-0": 0, "GPU-1": 1}


def test_simulated_gpus_are_slurms_first_ones_and_its_others_are_not_ours() -> None:
    found = build_map(simulated(2), slurm_total=8, slurm_types=1, gpu_map={}, sim=True)
    assert found.certain
    assert found.claimed([0, 5]) == {"SIM-0"}
    assert found.claimed([5, 6]) == set()
    assert found.claimed(None) == {"SIM-0", "SIM-1"}


def test_pci_addresses_sort_as_numbers() -> None:
    assert pci_key("00000000:9B:00.0") == pci_key("0000:9b:00.0")
    assert sorted(["0000:9b:00.0", "0000:1B:00.0", "0001:01:00.0"], key=pci_key)[0] == "0000:1B:00.0"
    assert pci_key("") is None and pci_key("0000:zz:00.0") is None and pci_key("1b:00.0") is None


@st.composite
def nodes(draw: st.DrawFn) -> list[SimGpu]:
    count = draw(st.integers(1, 6))
    shuffled = st.one_of(st.just(list(range(count))), st.permutations(range(count)))
    minors, buses = draw(shuffled), draw(shuffled)
    names = draw(st.lists(st.sampled_from("AB"), min_size=count, max_size=count))
    return [gpu(i, minors[i], 0x10 + buses[i], names[i]) for i in range(count)]


def rules(gpus: list[SimGpu], types: int) -> list[list[str]]:
    """Every order that slurmd may number the GPUs in, as its sources have it."""
    truths = []
    for key in (lambda g: g.pci, lambda g: g.minor, lambda g: g.index):
        ordered = sorted(gpus, key=key)
        truths.append(ordered)
        if types > 1:
            for names in permutations({g.name for g in gpus}):
                truths.append(sorted(ordered, key=lambda g: names.index(g.name)))
    return [[g.uuid for g in truth] for truth in truths]


@given(nodes(), st.booleans())
def test_whatever_rule_slurmd_follows_the_gpu_it_means_is_among_those_claimed(gpus: list[SimGpu], typed: bool) -> None:
    types = len({g.name for g in gpus}) if typed else 1
    found = build_map(gpus, len(gpus), types, {}, sim=False)
    truths = rules(gpus, types)
    for truth in truths:
        for index, uuid in enumerate(truth):
            assert uuid in found.claimed([index])
    assert found.certain == all(truth == truths[0] for truth in truths)


@given(nodes(), st.integers(0, 8), st.integers(0, 3))
def test_a_certain_map_is_a_bijection_and_likely_indices_are_all_different(
    gpus: list[SimGpu], total: int, types: int
) -> None:
    found = build_map(gpus, total, types, {}, sim=False)
    assert len(set(found.likely.values())) == len(found.likely) == len(gpus)
    if found.certain:
        assert sorted(found.by_index.values()) == sorted((g.uuid,) for g in gpus)
        assert sorted(found.by_index) == list(range(len(gpus)))


@given(nodes(), st.data())
def test_a_right_gpu_map_is_followed_to_the_letter(gpus: list[SimGpu], data: st.DataObject) -> None:
    order = data.draw(st.permutations([g.uuid for g in gpus]))
    found = build_map(gpus, len(gpus), None, dict(enumerate(order)), sim=False)
    assert found.certain
    assert [found.claimed([i]) for i in range(len(order))] == [{uuid} for uuid in order]


def test_a_gpu_that_is_lost_is_still_the_one_at_its_place_as_long_as_the_others_are_at_theirs() -> None:
    before, lost = straight(3), [gpu(0, 0, 0x10), replace(gpu(1, None, 0x11), uuid="", pci=""), gpu(2, 2, 0x12)]
    assert with_lost(before, lost) == tuple(before)
    moved = [gpu(0, 0, 0x10), replace(gpu(2, 2, 0x12), index=1)]
    assert with_lost(before, moved) == tuple(moved)  # it is not listed any more, and the next has its number
    other = [replace(gpu(0, 0, 0x10), uuid="GPU-9"), *lost[1:]]
    assert with_lost(before, other) == tuple(other)


def test_a_gpu_in_mig_mode_without_slices_is_no_whole_gpu_either() -> None:
    found = build_map([gpu(0, 0, 0x10), replace(gpu(1, 1, 0x11), mig=True)], 2, 1, {}, sim=False)
    assert not found.certain and "MIG" in found.why and found.claimed([0]) == {"GPU-0", "GPU-1"}


def test_types_that_slurm_counts_otherwise_than_the_driver_are_not_the_drivers_names() -> None:
    gpus = [gpu(0, 0, 0x10, "A"), gpu(1, 1, 0x11, "A"), gpu(2, 2, 0x12, "A"), gpu(3, 3, 0x13, "B")]
    found = build_map(gpus, 4, 2, {}, sim=False, type_counts=(2, 2))
    assert not found.certain and "2+2 and 3+1" in found.why and found.claimed([0]) == {g.uuid for g in gpus}
    assert len(build_map(gpus, 4, 2, {}, sim=False, type_counts=(1, 3)).claimed([0])) < 4
