"""Properties of the readers: they never raise, find what was written, and no cut makes a GPU vanish."""

import json
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmwd.core import gres

TYPES = ["", "a100", "nvidia_a100_80gb_pcie_1g.10gb+me", "2080ti", "8"]
NODE = "g02"
OTHERS = ["g01", "g003", "g2", "x-[1-4]"]


def bits(numbers: set[int]) -> str:
    """Numbers as Slurm's bit_fmt writes them: 0-1,3."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def split_by_type(gpus: dict[int, str]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for index, kind in gpus.items():
        found.setdefault(kind, set()).add(index)
    return found


def detail(gpus: dict[int, str], extra: list[str]) -> str:
    """A job's detail on one node: GPU index -> type, and items that are no GPU."""
    items = [
        f"gpu{':' * bool(kind)}{kind}:{len(mine)}(IDX:{bits(mine)})" for kind, mine in split_by_type(gpus).items()
    ]
    return ",".join(items + extra)


def totals(nodes: dict[str, dict[int, str]], extra: list[str]) -> str:
    amounts: dict[str, int] = {}
    for name, gpus in nodes.items():
        for kind, mine in split_by_type(gpus).items():
            amounts[kind] = amounts.get(kind, 0) + len(mine) * (4 if "[" in name else 1)
    items = [f"gpu{':' * bool(kind)}{kind}:{amount}" for kind, amount in amounts.items()]
    return ",".join(items + [item.split("(")[0] + ":1" for item in extra]) or "(null)"


a_gpu_set = st.dictionaries(st.integers(0, 15), st.sampled_from(TYPES), max_size=6)
extras = st.lists(st.sampled_from(["lscratch(CNT:500)", "nic(CNT:1)", "gpumem(CNT:40000)"]), max_size=2, unique=True)


@st.composite
def jobs(draw: st.DrawFn) -> tuple[str, set[int], dict[str, dict[int, str]]]:
    """A running job's text, the GPUs it has on NODE, and all its nodes."""
    nodes = {name: draw(a_gpu_set) for name in draw(st.permutations([NODE, *draw(st.sets(st.sampled_from(OTHERS)))]))}
    extra = draw(extras)
    has_gpu = any(nodes.values())
    hosts = sum(4 if "[" in name else 1 for name in nodes)
    state = draw(st.sampled_from(["RUNNING", "SUSPENDED", "CONFIGURING", "RESIZING"]))
    fields = [
        "JobId=77 JobName=train",
        f"UserId=a(1) JobState={state} Reason=None",
        f"ReqNodeList=(null) ExcNodeList={NODE}",
        f"NodeList={','.join(nodes)}",
        f"NumNodes={hosts} NumCPUs=8",
        f"AllocTRES=cpu=8,node={hosts}{',gres/gpu=1' * has_gpu}",
        f"JOB_GRES={totals(nodes, extra)}",
    ]
    for name, gpus in nodes.items():
        fields.append(f"  Nodes={name} CPU_IDs=0-7 Mem=1024 GRES={detail(gpus, extra)}")
    if draw(st.booleans()):
        fields.append("MinCPUsNode=8 WorkDir=/home/a")
    end = draw(st.sampled_from(["\n", "\n\n"]))  # Slurm ends its text; one without an end counts as cut
    return draw(st.sampled_from(["\n   ", " "])).join(fields) + end, set(nodes[NODE]), nodes


def cuts(text: str) -> Iterator[str]:
    return (text[:at] for at in range(len(text)))


@given(jobs())
@settings(max_examples=50)
def test_a_jobs_gpus_are_read_back_and_no_cut_loses_one(job: tuple) -> None:
    text, gpus, _ = job
    assert gres.read_job(text, NODE, "77").gpus == gpus
    for cut in cuts(text):
        assert gres.read_job(cut, NODE, "77").gpus in (None, gpus)


@given(jobs(), jobs())
@settings(max_examples=25)
def test_of_two_records_each_keeps_its_own_gpus(one: tuple, other: tuple) -> None:
    text = one[0].rstrip() + "\n\n" + other[0].replace("JobId=77", "JobId=7")
    claims = gres.read_jobs(text, NODE)
    assert {job: claim.gpus for job, claim in claims.items()} == {"77": one[1], "7": other[1]}
    for cut in list(cuts(text))[::3]:
        assert all(claim.gpus in (None, claims[job].gpus) for job, claim in gres.read_jobs(cut, NODE).items())


@given(jobs(), st.booleans())
def test_the_same_job_as_json_gives_the_same_gpus(job: tuple, new: bool) -> None:
    _, gpus, nodes = job
    details = [detail(mine, []) for name, mine in nodes.items() for _ in range(4 if "[" in name else 1)]
    listed = ",".join(nodes)
    reply = {
        "jobs": [
            {
                "job_id": 77,
                "job_state": ["RUNNING"] if new else "RUNNING",
                "gres_detail": details if any(nodes.values()) else [],
                "tres_alloc_str": "cpu=8" + ",gres/gpu=1" * any(nodes.values()),
                "job_resources": {"nodes": {"list": listed, "allocation": []} if new else listed},
            }
        ]
    }
    text = json.dumps(reply)
    assert gres.read_json(text, NODE, "77").gpus == gpus
    assert all(gres.read_json(cut, NODE, "77").gpus is None for cut in cuts(text))


@given(a_gpu_set, st.sampled_from(["MIXED", "IDLE+COMPLETING", "ALLOCATED+DRAIN"]))
def test_a_nodes_used_gpus_are_read_back_and_no_cut_loses_one(gpus: dict[int, str], state: str) -> None:
    used = detail(gpus, []) or "gpu:a100:0(IDX:N/A)"
    text = (
        f"NodeName={NODE} Arch=x86_64\n   Gres=gpu:16(S:0-1)\n   GresDrain=N/A\n"
        f"   GresUsed={used}\n   State={state} ThreadsPerCore=1\n\n"
    )
    claim = gres.read_node(text, NODE)
    assert (claim.gpus, claim.total, claim.completing) == (set(gpus), 16, "COMPLETING" in state)
    line = f"{used:<256}{state.lower():<64}\n"
    assert gres.read_sinfo(line, NODE).gpus == set(gpus)
    for read, whole in ((gres.read_node, text), (gres.read_sinfo, line)):
        for cut in cuts(whole):
            told = read(cut, NODE)
            assert told.gpus in (None, set(gpus))
            assert told.completing or "COMPLETING" not in state, "a cut must not hide that the node is completing"


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.sampled_from(["shard", "mps"]))
def test_shares_take_the_gpus_they_lie_on(amounts: list[int], name: str) -> None:
    used = {index for index, amount in enumerate(amounts) if amount}
    text = f"{name}:a40:{sum(amounts)}({','.join(f'{amount}/4' for amount in amounts)})  mixed\n"
    assert gres.read_sinfo(text, NODE).gpus == used
    assert all(gres.read_sinfo(cut, NODE).gpus in (None, used) for cut in cuts(text))


@given(a_gpu_set.filter(bool))
def test_resources_are_read_back(gpus: dict[int, str]) -> None:
    text = f"Node=g01 AbstractCores=0 Memory=1\nNode={NODE} AbstractCores=0-7 Memory=32768\n"
    for kind, mine in split_by_type(gpus).items():
        text += f" Gres=gpu {f'Type={kind} ' * bool(kind)}Count={len(mine)} Index={bits(mine)}\n"
    assert gres.read_resources(text + " Gres=nic Count=1 Index=15\n", NODE).gpus == set(gpus)


PIECES = [
    *"JobId=7 |JobState=RUNNING |NodeList=g02 |NodeList=g[01-|JOB_GRES=gpu:2 |JOB_GRES=(null) ".split("|"),
    *" Nodes=g02 CPU_IDs=0 Mem=0 GRES=|gpu:2(IDX:0-1)|gpu:1(|(IDX:|N/A|)|,|\n|\n   |shard:1(0/4,1/4)".split("|"),
    *"NodeName=g02 |Gres=gpu:4 |GresUsed=|State=IDLE+COMPLETING |Node=g02 |\n Gres=gpu Count=1 Index=".split("|"),
    *'{"jobs":[|{"job_id":7,"gres_detail":["|"],|]}|{"nodes":|null|[[[[|AllocTRES=gres/gpu=9|((null))|²|\ud800'.split("|"),
]


@given(st.sampled_from(gres.FORMS), st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=12).map("".join)))
@settings(max_examples=300)
def test_no_text_makes_a_reader_raise_and_not_decidable_always_says_why(form: str, text: str) -> None:
    for job in ("7", None, "sEKNKTV3WPV500"):
        claim = gres.read(form, text, NODE, job)
        assert (claim.gpus is None) == bool(claim.why)
    gres.read_jobs(text, NODE)
    gres.read_config(text)


@pytest.mark.parametrize("form", gres.FORMS)
@pytest.mark.parametrize("text", ["", "\n", " ", "\x00", "{" * 100_000, "[" * 100_000, "(" * 100_000])
def test_nothing_and_nonsense_are_not_decidable(form: str, text: str) -> None:
    assert gres.read(form, text, NODE).gpus is None
