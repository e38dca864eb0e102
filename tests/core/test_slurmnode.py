"""Which of Slurm's nodes this host is."""

import pytest

from llmwd.core.slurmnode import Search, SlurmNode, find, has_controller, is_listing, read_gres, split_reading


def test_the_node_is_found_by_its_host_in_whatever_partitions_it_is() -> None:
    listing = "g01 g01 gpu:a100:8(S:0-1)\ng01 g01 gpu:a100:8(S:0-1)\ng02 g02 (null)\n"
    assert find(listing, "g01", "") == Search(SlurmNode("g01", 8, 1, counts=(8,)))
    assert find(listing, "g02.cluster.example", "") == Search(SlurmNode("g02", 0, 0, others=True))


def test_a_nodes_name_may_differ_from_its_hosts() -> None:
    assert find("n1 box.example gpu:4\n", "box", "") == Search(SlurmNode("n1", 4, 0, counts=(4,)))


def test_several_nodes_on_one_host_have_to_be_told_apart_by_the_operator() -> None:
    listing = "n1 box gpu:4\nn2 box gpu:2\n"
    found = find(listing, "box", "")
    assert found.node is None and "n1, n2" in found.why and "SLURM_NODE" in found.why and not found.absent
    assert find(listing, "box", "n2") == Search(SlurmNode("n2", 2, 0, others=True, counts=(2,)))


def test_only_a_listing_proves_that_a_host_is_none_of_slurms() -> None:
    assert is_listing("n1 box gpu:4\n\nn2 box.lab (null)\n")
    for text in ("", "\n", "hello\n", "hello you there\n", "n1 box gpu:4\nslurm_load error: x\n", "n1 box\n", "\x00 \x01 :\n"):
        assert not is_listing(text)


@pytest.mark.parametrize(("name", "why"), [("n9", "no node n9"), ("", "no node on the host here")])
def test_a_host_that_is_none_of_slurms_is_told_so(name: str, why: str) -> None:
    found = find("n1 box gpu:4\nnonsense\n\n", "here", name)
    assert found.node is None and why in found.why and found.absent


@pytest.mark.parametrize(
    ("gres", "gpus", "types", "counts"),
    [
        ("gpu:8", 8, 0, (8,)),
        ("gpu:3090:2", 2, 1, (2,)),
        ("gpu:a100:4(S:0-1),gpu:h100:4(S:2,3)", 8, 2, (4, 4)),
        ("gpu:a100:4,gpu:2", 6, 2, (2, 4)),
        ("gpu:a100:1,gpu:h100:2,gpu:a100:3", 6, 2, (2, 4)),
        ("shard:8,gpu:a100_1g.5gb:7,mps:100", 7, 1, (7,)),
        ("mygpu:4,gpus:2", 0, 0, ()),
    ],
)
def test_gpus_and_their_types_are_counted(gres: str, gpus: int, types: int, counts: tuple[int, ...]) -> None:
    assert find(f"n1 n1 {gres}\n", "n1", "").node == SlurmNode("n1", gpus, types, counts=counts) == read_gres("n1", gres)


def test_a_client_that_knows_a_controller_is_one_of_a_cluster_although_it_gets_no_configuration() -> None:
    assert has_controller("sinfo: error: fetch_config: no config from slurmctld, connect failure")
    assert not has_controller("sinfo: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\nsinfo: error: fetch_config: DNS SRV lookup failed")


def test_a_reading_is_cut_at_its_width_and_what_is_behind_it_is_the_nodes_gres() -> None:
    text = f"{'gpu:a100:1(IDX:0)':20}{'mixed':10}{'gpu:a100:4':20}\n" * 2
    assert split_reading(text, 30) == (f"{'gpu:a100:1(IDX:0)':20}{'mixed':10}\n" * 2, "gpu:a100:4")
    assert split_reading("gpu:1 idle\n", 30) == ("gpu:1 idle\n", "")
    assert split_reading(text[:45], 30) == (text[:30], "")  # cut: its end is no end
