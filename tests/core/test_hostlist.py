"""Hostlists: membership, position and number of nodes, without expanding them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmwd.core import hostlist


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("a[001-003]", ["a001", "a002", "a003"]),
        ("dgx-[40,48]", ["dgx-40", "dgx-48"]),
        ("gpu[01-02],dgx1", ["gpu01", "gpu02", "dgx1"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[98-101]", ["n98", "n99", "n100", "n101"]),
        ("cn-[1-2].lab.edu", ["cn-1.lab.edu", "cn-2.lab.edu"]),
        ("74dc179a_n[1-2]", ["74dc179a_n1", "74dc179a_n2"]),
        ("x[1-2][3-4]", ["x13", "x14", "x23", "x24"]),
        ("(null)", []),
        ("", []),
    ],
)
def test_a_hostlist_names_its_nodes_in_slurms_order(text: str, names: list[str]) -> None:
    assert hostlist.expand(text) == names
    assert hostlist.count(text) == len(names)
    assert [hostlist.places(text, name) for name in names] == [[at] for at in range(len(names))]


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ("a[001-002]", "a1"),
        ("a[001-002]", "a003"),
        ("a[1-2]", "a01"),
        ("a", "a1"),
        ("a1", "a"),
        ("a[1-2]", "a"),
        ("a[1-2]", "a1x"),
        ("a[1-2]", "A1"),
        ("a.x", "a"),
    ],
)
def test_names_that_only_look_alike_are_different_nodes(text: str, node: str) -> None:
    assert not hostlist.contains(text, node)


@pytest.mark.parametrize(
    ("text", "node", "found"),
    [
        ("cn-001.cluster.edu", "cn-001", True),
        ("cn-[001-004].cluster.edu", "cn-003", True),
        ("cn-001", "cn-001.cluster.edu", True),
        ("cn-001.a", "cn-001.b", False),
        ("cn-0011.cluster.edu", "cn-001", False),
        ("cn-001", "cn-0011", False),
    ],
)
def test_a_domain_that_one_side_lacks_matters_only_when_asked_loosely(text: str, node: str, found: bool) -> None:
    assert hostlist.contains(text, node, loose=True) is found
    assert not hostlist.contains(text, node)


@pytest.mark.parametrize(
    "text",
    ["a[1-2", "a1-2]", "a[[1]]", "a[1-]", "a[x]", "a[2-1]", "a,,b", "a[]", "a b", "a[1-2],", "n[1" + "0" * 5000 + "]"],
)
def test_a_cut_or_strange_hostlist_is_an_error_not_an_empty_one(text: str) -> None:
    for ask in (hostlist.parse, hostlist.count, hostlist.expand, lambda text: hostlist.contains(text, "a1")):
        with pytest.raises(hostlist.HostlistError):
            ask(text)


def test_a_list_of_a_billion_nodes_is_not_expanded_to_answer() -> None:
    text = "n[0000000000-1000000000],x"
    assert hostlist.contains(text, "n0000000007")
    assert hostlist.places(text, "x") == [1_000_000_001]
    with pytest.raises(hostlist.HostlistError):
        hostlist.expand(text)


@pytest.mark.parametrize("text", ["98-10", "2,1", "1,1", "0-3,3", "0-999999999", "", "0-", "a", "0,,1", "-1"])
def test_a_bit_list_that_does_not_rise_or_is_cut_is_an_error(text: str) -> None:
    with pytest.raises(hostlist.HostlistError):
        hostlist.ascending(text)


@given(st.sets(st.integers(0, 300), min_size=1), st.integers(1, 5))
def test_every_number_put_into_a_bracket_is_found_and_no_other(numbers: set[int], width: int) -> None:
    text = f"n[{','.join(str(n).zfill(width) for n in sorted(numbers))}]"
    for n in range(302):
        assert hostlist.contains(text, f"n{str(n).zfill(width)}") is (n in numbers)


@given(st.text(alphabet="a1-[],.0(9", max_size=30), st.text(alphabet="a1-.0", max_size=6))
def test_any_text_is_answered_or_refused(text: str, node: str) -> None:
    try:
        found = hostlist.contains(text, node)
        names = hostlist.expand(text, limit=500)
    except hostlist.HostlistError:
        return
    assert found is (node in names)
