"""What is not as it should be never makes a GPU vanish: a damaged text gives all the GPUs there were, or "unknown"."""

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmwd.core import gres
from tests.core.test_gres_properties import NODE, a_gpu_set, detail, jobs, split_by_type

GPU_ITEM = re.compile(r"(?<![\w.+:-])gpu:")
JUNK = "x X_(),:=/ \n\t-.+*#[]{}\"'\x00\ufffdé"


@st.composite
def damaged(draw: st.DrawFn, text: str) -> str:
    """The text with one thing wrong. No digit is made another digit: that would be a lie, not damage."""
    at = draw(st.integers(0, len(text) - 1))
    words = text.split(" ")
    word = draw(st.integers(0, len(words) - 1))
    lines = text.splitlines(keepends=True)
    line = draw(st.integers(0, len(lines) - 1))
    kinds = ["insert", "replace", "drop word", "twice", "swap", "drop line", "drop part", "case", "repeat line", "NUL"]
    kind = draw(st.sampled_from(kinds))
    match kind:
        case "insert":
            return text[:at] + draw(st.text(JUNK, min_size=1, max_size=3)) + text[at:]
        case "replace":
            return text if text[at].isdigit() else text[:at] + draw(st.sampled_from(JUNK)) + text[at + 1 :]
        case "drop part":
            part = re.compile(r"[^0-9]{1,12}").match(text, at)
            return text[:at] + text[part.end() if part else at :]
        case "drop word":
            return " ".join(words[:word] + words[word + 1 :])
        case "twice":
            return " ".join(words[:word] + [words[word]] + words[word:])
        case "swap":
            other = draw(st.integers(0, len(words) - 1))
            assume(not words[word].startswith("GRES=") or not words[other].startswith("GRES="))  # another node's: a lie
            words[word], words[other] = words[other], words[word]
            return " ".join(words)
        case "drop line":
            return "".join(lines[:line] + lines[line + 1 :])
        case "repeat line":
            return "".join(lines[:line] + [lines[line]] + lines[line:])
        case "case":
            return text.swapcase()
    return text.replace("\n", "\x00")


LONG = st.sampled_from(["gpu", "gres:gpu", "gres/gpu", "GPU"])


@given(st.data(), jobs(), LONG)
@settings(max_examples=400)
def test_a_damaged_record_has_no_fewer_gpus_or_is_unknown(data: st.DataObject, job: tuple, name: str) -> None:
    text, gpus, _ = job
    found = gres.read_job(data.draw(damaged(GPU_ITEM.sub(f"{name}:", text))), NODE, "77").gpus
    assert found is None or found >= gpus


@given(st.data(), a_gpu_set.filter(bool), st.sampled_from(["mixed", "idle+completing", "allocated+drain"]))
@settings(max_examples=300)
def test_a_damaged_reading_of_the_node_has_no_fewer_gpus_or_is_unknown(data: st.DataObject, gpus: dict, state: str) -> None:
    line = f"{detail(gpus, []):<256}{state:<64}\n"
    text = data.draw(damaged(line))
    # One of several items under another GRES's name is a lie as well: the node has no totals to compare with.
    assume(len(split_by_type(gpus)) == 1 or len(GPU_ITEM.findall(text)) >= len(GPU_ITEM.findall(line)))
    found = gres.read_sinfo(text, NODE, 16).gpus
    assert found is None or found >= set(gpus)


@given(st.data(), a_gpu_set.filter(bool), st.sampled_from(["gpus", "vgpu", "gpu_h100", "mig", "nvidia.com-gpu", "shards"]))
@settings(max_examples=200)
def test_indices_under_a_sites_own_name_for_gpus_are_never_none(data: st.DataObject, gpus: dict, name: str) -> None:
    """Damaged or not: what they are indices of is not known."""
    one = {index: "" for index in gpus}
    text = a_record((NODE, detail(one, []).replace("gpu", name)), totals=f"{name}:{len(one)}").replace("gres/gpu", "gres/x")
    assert gres.read_job(text, NODE, "77").gpus is None
    found = gres.read_job(data.draw(damaged(text)), NODE, "77").gpus
    assert found is None or found


RECORD = (
    "JobId=77 JobName=train\n   UserId=a(1) GroupId=a(1)\n   JobState=RUNNING Reason=None\n   NodeList={nodes}\n"
    "   NumNodes={count} NumCPUs=8\n   AllocTRES=cpu=8,node={count},gres/gpu={gpus}\n   JOB_GRES={totals}\n{lines}"
    "   MinCPUsNode=8\n   TresPerJob=gres/gpu:{gpus}\n   TresPerNode=gres/gpu:{gpus}\n   TresPerSocket=gres/gpu:1\n"
    "   TresPerTask=cpu=1,gres/gpu=1\n\n"
)
MANY = ",".join(str(index) for index in range(0, 56, 2))
CUT = f"gpu:1g.5gb:45(IDX:{','.join(str(index) for index in range(0, 90, 2))})"


def a_record(*lines: tuple[str, str], nodes: str = NODE, totals: str = "gpu:2", count: int = 1, gpus: int = 2) -> str:
    told = "".join(f"     Nodes={at} CPU_IDs=0-7 Mem=1024 GRES={what}\n" for at, what in lines)
    return RECORD.format(nodes=nodes, totals=totals, count=count, gpus=gpus, lines=told)


FORMS = {
    "--gpus-per-task and its like add lines that are no grant": (a_record((NODE, "gpu:2(IDX:4-5)")), {4, 5}),
    "a type for each": (a_record((NODE, "gpu:a100:1(IDX:0),gpu:h100:1(IDX:7)"), totals="gpu:a100:1,gpu:h100:1"), {0, 7}),
    "a type of digits": (a_record((NODE, "gpu:4090:2(IDX:0-1)"), totals="gpu:4090:2"), {0, 1}),
    "upper case": (a_record((NODE, "GPU:A100:2(IDX:0-1)"), totals="GPU:A100:2"), {0, 1}),
    "our node in the middle of a hostlist": (
        a_record(("g[00-03]", "gpu:2(IDX:6-7)"), nodes="g[00-03]", count=4, totals="gpu:8", gpus=8), {6, 7}),
    "a hostlist with gaps and our node in its second part": (
        a_record(("g[01,03-05]", "gpu:1(IDX:0)"), ("g[02,06]", "gpu:2(IDX:2-3)"), nodes="g[01-06]", count=6,
                 totals="gpu:8", gpus=8), {2, 3}),
    "several lines for our node": (a_record((NODE, "gpu:1(IDX:0)"), (NODE, "gpu:1(IDX:3)")), {0, 3}),
    "only counted": (a_record((NODE, "gpu(CNT:2)")), None),
    "only counted, with a type": (a_record((NODE, "gpu:a100(CNT:2)"), totals="gpu:a100:2"), None),
    "slices": (a_record((NODE, "gpu:a100_1g.5gb:2(IDX:7,13)"), totals="gpu:a100_1g.5gb:2"), {7, 13}),
    "many slices, within the buffer": (
        a_record((NODE, f"gpu:1g.5gb:28(IDX:{MANY})"), totals="gpu:1g.5gb:28", gpus=28), set(range(0, 56, 2))),
    "a list that Slurm's buffer cut": (a_record((NODE, CUT[:146] + ")"), totals="gpu:1g.5gb:45", gpus=45), None),
    "shares by place": (a_record((NODE, "shard:a40:3(0/4,3/4)"), totals="shard:3"), {1}),
    "shares by index": (a_record((NODE, "shard:3(IDX:2)"), totals="shard:3"), {2}),
    "MPS by place": (a_record((NODE, "mps:50(0/100,50/100)"), totals="mps:50"), {1}),
    "a GPU and shares of another": (a_record((NODE, "gpu:1(IDX:0),shard:2(0/4,2/4)"), totals="gpu:1,shard:2"), {0, 1}),
    "beside what is no GPU": (a_record((NODE, "lscratch(CNT:100),gpu:2(IDX:0-1),nic:1(IDX:3)"), totals="lscratch:100,gpu:2,nic:1"),
                              {0, 1}),
    "nothing where there should be something": (a_record((NODE, "(null)")), None),
    "N/A where there should be something": (a_record((NODE, "N/A")), None),
    "indices that are not available": (a_record((NODE, "gpu:2(IDX:N/A)")), None),
    "an amount in thousands": (a_record((NODE, "gpu:2K(IDX:0-1)")), None),
    "a parenthesis of a kind nobody has seen": (a_record((NODE, "gpu:2(UUID:abc,def)")), None),
    "an item of a kind nobody has seen": (a_record((NODE, "gpu@2[0-1]")), None),
    "the words of sinfo in a job": (a_record((NODE, "gpu:a100:2(IDX:0-1)(S:0-1)")), {0, 1}),
}  # fmt: skip


@pytest.mark.parametrize(("text", "gpus"), FORMS.values(), ids=FORMS)
def test_forms_that_other_versions_and_sites_print(text: str, gpus: set[int] | None) -> None:
    claim = gres.read_job(text, NODE, "77")
    assert claim.gpus == gpus
    assert (claim.gpus is None) == bool(claim.why)
    assert gres.read_job(" ".join(text.split()) + "\n", NODE, "77").gpus == gpus, "the same with -o"


def test_an_array_of_thousands_and_a_megabyte_of_anything_are_read_in_no_time_and_nothing_is_made_up() -> None:
    task = a_record((NODE, "gpu:2(IDX:0-1)"))
    assert gres.read_job(task.replace("JobId=77", "JobId=78") * 3000 + task, NODE, "77").gpus == {0, 1}
    for text in (task * 3000, "JobId=77 \n" * 100_000, "JobId=77 " + " Nodes=g02 CPU_IDs=0 GRES=gpu:2(IDX:0)\n" * 20_000):
        claim = gres.read_job(text, NODE, "77")
        assert claim.gpus is None and len(claim.why) < 300


def test_a_form_is_the_same_whatever_numbers_and_times_are_in_it() -> None:
    one, other = a_record((NODE, "gpu:2(UUID:1)")), a_record((NODE, "gpu:3(UUID:4-5,7)"), gpus=3)
    why = gres.read_job(one, NODE, "77").why
    assert gres.form_of(why, one) == gres.form_of(gres.read_job(other, NODE, "77").why, other)
    another = a_record((NODE, "gpu:2(SERIAL:1)"))
    assert gres.form_of(why, one) != gres.form_of(gres.read_job(another, NODE, "77").why, another)
