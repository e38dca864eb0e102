"""Which of Slurm's nodes this host is."""

import pytest

from llmwd.core.slurmnode import SlurmNode, find, is_listing


def test_the_node_is_found_by_its_host_in_whatever_partitions_it_is() -> None:
    listing = "g01 g01 gpu:a100:8(S:0-1)\ng01 g01 gpu:a100:8(S:0-1)\ng02 g02 (null)\n"
    assert find(listing, "g01", "") == (SlurmNode("g01", 8, 1), "")
    assert find(listing, "g02.cluster.example", "") == (SlurmNode("g02", 0, 0, others=True), "")


def test_a_nodes_name_may_differ_from_its_hosts() -> None:
    assert find("n1 box.example gpu:4\n", "box", "") == (SlurmNode("n1", 4, 0), "")


def test_several_nodes_on_one_host_have_to_be_told_apart_by_the_operator() -> None:
    listing = "n1 box gpu:4\nn2 box gpu:2\n"
    node, why = find(listing, "box", "")
    assert node is None and "n1, n2" in why and "SLURM_NODE" in why
    assert find(listing, "box", "n2") == (SlurmNode("n2", 2, 0, others=True), "")


def test_only_a_listing_proves_that_a_host_is_none_of_slurms() -> None:
    assert is_listing("n1 box gpu:4\n\nn2 box.lab (null)\n")
    for text in ("", "\n", "hello\n", "hello you there\n", "n1 box gpu:4\nslurm_load error: x\n", "n1 box\n", "\x00 \x01 :\n"):
        assert not is_listing(text)


@pytest.mark.parametrize(("name", "why"), [("n9", "no node n9"), ("", "no node on the host here")])
def test_a_host_that_is_none_of_slurms_is_told_so(name: str, why: str) -> None:
    node, told = find("n1 box gpu:4\nnonsense\n\n", "here", name)
    assert node is None and why in told


@pytest.mark.parametrize(
    ("gres", "gpus", "types"),
    [
        ("gpu:8", 8, 0),
        ("gpu:3090:2", 2, 1),
        ("gpu:a100:4(S:0-1),gpu:h100:4(S:2,3)", 8, 2),
        ("gpu:a100:4,gpu:2", 6, 2),
        ("shard:8,gpu:a100_1g.5gb:7,mps:100", 7, 1),
        ("mygpu:4,gpus:2", 0, 0),
    ],
)
def test_gpus_and_their_types_are_counted(gres: str, gpus: int, types: int) -> None:
    assert find(f"n1 n1 {gres}\n", "n1", "")[0] == SlurmNode("n1", gpus, types)
