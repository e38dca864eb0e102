"""What is understood of Slurm's output: a corpus of collected forms, and the forms made by hand beside it."""

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from llmwd.core import gres
from llmwd.core.gres_detail import read_detail, read_totals, tres_has_gpu

CORPUS = [
    json.loads(line) for line in (Path(__file__).parent.parent / "data" / "gres_corpus.jsonl").read_text().splitlines()
]


def read(sample: dict, text: str) -> list[int] | None:
    job = sample.get("jobid")
    claim = gres.read(sample["form"], text, sample["node"], None if job is None else str(job))
    return None if claim.gpus is None else sorted(claim.gpus)


@pytest.mark.parametrize("sample", CORPUS, ids=lambda sample: sample["name"])
def test_corpus(sample: dict) -> None:
    text = sample["text"]
    assert read(sample, text) == sample["expect"]
    for end in range(len(text)):
        assert read(sample, text[:end]) in (None, sample["expect"]), f"cut after {text[:end][-30:]!r}"


def a_job(
    detail: str = "gpu:2(IDX:0-1)",
    *,
    state: str = "RUNNING",
    nodes: str = "n1",
    lines: str | None = None,
    total: str = "gpu:2",
    tres: str = "cpu=8,gres/gpu=2",
    head: str = "JobId=7 JobName=train",
    count: int = 1,
) -> str:
    lines = lines if lines is not None else f"     Nodes={nodes} CPU_IDs=0-7 Mem=1024 GRES={detail}\n"
    return (
        f"{head}\n   UserId=a(1) GroupId=a(1)\n   JobState={state} Reason=None Dependency=(null)\n"
        f"   ReqNodeList=n1 ExcNodeList=(null)\n   NodeList={nodes}\n   BatchHost=n1\n"
        f"   NumNodes={count} NumCPUs=8 NumTasks=1\n   ReqTRES=cpu=8,gres/gpu=9\n   AllocTRES={tres}\n"
        f"   JOB_GRES={total}\n{lines}   MinCPUsNode=8 MinTmpDiskNode=0\n   WorkDir=/home/a\n\n"
    )


@pytest.mark.parametrize(
    ("detail", "gpus"),
    [
        ("gpu:2(IDX:0-1)", {0, 1}),
        ("gpu:8:2(IDX:0,5)", {0, 5}),
        ("gpu:(null):3(IDX:0,2-3)", {0, 2, 3}),
        ("gpu:a.b-c_d+e:1(IDX:7)", {7}),
        ("gpu:a100:2(IDX:0-1)(S:0-1)", {0, 1}),
        ("gpu:a100:2(S:0-1)(IDX:0-1)", {0, 1}),
        ("nic:2(IDX:0-1),gpu:1(IDX:4)", {4}),
        ("gpu:1(IDX:0),shard:2(0/4,2/4)", {0, 1}),
        ("gpu:1(IDX:0),shard:a40:2(IDX:0,3)", {0, 3}),
        ("mps:a100:150(100/100,50/100)", {0, 1}),
        ("shard:0((null))", set()),
        ("shard:a40:0(0/4,0/4),shard:a30:0(0/4)", set()),
        ("gpu:0", set()),
        ("gpu:a100:0(IDX:N/A)", set()),
        ("lscratch:100G", set()),
        ("gpumem:4K,gpuutil:1(IDX:0),gpu_mem(CNT:80),nic:2(IDX:0-1),lamp:2(IDX:0-1)", set()),
        ("vgpu:2(IDX:0-1)", None),
        ("gpus:2(IDX:0-1)", None),
        ("gpu_h100:2(IDX:0-1)", None),
        ("mig:2(IDX:0-1)", None),
        ("nvidia:a100:1(0/4,1/4)", None),
        ("gpus:2", None),
        ("gpus:0(IDX:N/A),mig(CNT:4),mig:0", set()),
        ("gres:gpu:2(IDX:0-1)", {0, 1}),
        ("GRES/gpu:a100:2(IDX:0-1)", {0, 1}),
        ("gpu:1(IDX:0)(IDX:1)", None),
        ("shard:2(IDX:0)(0/4,2/4)", None),
        ("gpu:0(UUID:a,b)", None),
        ("", set()),
        ("(null)", set()),
        ("N/A", None),
        ("gpu:2", None),
        ("gpu", None),
        ("gpu:a100:4(S:0-1)", None),
        ("gpu:8(CNT:2)", None),
        ("gpu:2(IDX:0)", None),
        ("gpu:1(IDX:0-1)", None),
        ("gpu:2(IDX:)", None),
        ("gpu:2(IDX:N/A)", None),
        ("gpu:2(IDX:1,0)", None),
        ("gpu:2(IDX:0-1", None),
        ("gpu:2(IDX:0-1),", None),
        ("gpu:2(IDX:0-1)x", None),
        ("gpu:2(IDX:0-1),gpu:a", None),
        ("gpu:a:1(IDX:0),gpu:b:1(IDX:0)", None),
        ("shard:2", None),
        ("shard:2((null))", None),
        ("shard:3(1/4,1/4)", None),
        ("shard:3(12/4)", None),
        ("shard:a:1(1/4),shard:b:0(0/4)", None),
        ("shard:40(IDX:" + ",".join(map(str, range(0, 60, 2))) + ")", None),
        ("???", None),
    ],
)
def test_a_list_of_gres_items(detail: str, gpus: set[int] | None) -> None:
    found = read_detail(detail)
    assert found.gpus == gpus
    assert (found.gpus is None) == bool(found.why)


def test_totals_count_by_name_and_only_what_takes_a_gpu() -> None:
    assert read_totals("gpu:a100:4(S:0-1),gpu:v100:2,shard:8,lscratch:no_consume:100G,gpumem:1") == {"gpu": 6, "shard": 8}
    assert read_totals("gpu") == {"gpu": 1}
    assert read_totals("gres:gpu:2,gres/shard:a40:4") == {"gpu": 2, "shard": 4}
    assert read_totals("gpus:2,gpu_mem:80") == {"gpus": 2}, "a name that nobody knows may stand for GPUs"
    assert read_totals("(null)") == {}
    assert read_totals("gpu:4(S:0") is None


def test_a_tres_list_grants_gpus_only_under_their_own_names() -> None:
    for text in ("gres/gpu=1", "cpu=1,gres/gpu:a100=2", "gres/gpu:2080ti=1", "gres/shard=3", "gres:gpu:2", "gres/mps=50", "gres/gpus=2"):
        assert tres_has_gpu([text])
    for text in ("", "cpu=8", "gres/gpumem=4", "gres/gpuutil=4", "gres/gpu=0", "gres/gpus=0", "gres/nic=1"):
        assert not tres_has_gpu([text])


JOBS = {
    "plain": (a_job(), "n1", "7", {0, 1}),
    "no job named, one record": (a_job(), "n1", None, {0, 1}),
    "another job's record": (a_job(), "n1", "70", None),
    "two records, none named": (a_job() + a_job(head="JobId=8"), "n1", None, None),
    "an array task by its array name": (a_job(head="JobId=9 ArrayJobId=5 ArrayTaskId=1"), "n1", "5_1", {0, 1}),
    "a het component by its leader": (a_job(head="JobId=9 HetJobId=8 HetJobOffset=1"), "n1", "8+1", {0, 1}),
    "a run's name, one record": (a_job(), "n1", "sEKNKTV3WPV500", {0, 1}),
    "a run's name, several records": (
        a_job("gpu:2(IDX:2-3)") + a_job(head="JobId=8 SLUID=sEKNKTV3WPV500"), "n1", "sEKNKTV3WPV500", {0, 1},
    ),
    "a run's name that no record has": (a_job() + a_job(head="JobId=8"), "n1", "sEKNKTV3WPV500", None),
    "a record given twice": (a_job() * 2, "n1", "7", {0, 1}),
    "two records of one job that differ": (a_job() + a_job("gpu:2(IDX:2-3)"), "n1", "7", None),
    "not on this node": (a_job(), "n2", "7", set()),
    "a node whose name begins like ours": (a_job(nodes="n11"), "n1", "7", set()),
    "a domain on Slurm's side": (a_job(nodes="n1.lab.edu"), "n1", "7", {0, 1}),
    "a domain on our side": (a_job(), "n1.lab.edu", "7", {0, 1}),
    "our exact name wins over a domain": (
        a_job(nodes="n1.lab,n1", count=2, lines="  Nodes=n1.lab CPU_IDs=0 Mem=0 GRES=gpu:2(IDX:0-1)\n"
              "  Nodes=n1 CPU_IDs=0 Mem=0 GRES=\n"), "n1", "7", set(),
    ),
    "several brackets": (a_job(nodes="r[1-2]n[01-10]", total="gpu:40", count=20), "r2n10", "7", {0, 1}),
    "no memory column": (a_job(lines="  Nodes=n1 CPU_IDs=0 GRES=gpu:2(IDX:0-1)\n"), "n1", "7", {0, 1}),
    "an unknown column": (a_job(lines="  Nodes=n1 CPU_IDs=0 Mem=0 X/Y=1 GRES=gpu:2(IDX:0-1)\n"), "n1", "7", {0, 1}),
    "carriage returns": (a_job().replace("\n", "\r\n"), "n1", "7", {0, 1}),
    "a state nobody knows, with its line": (a_job(state="NOVEL"), "n1", "7", {0, 1}),
    "a state nobody knows, without": (a_job("", state="NOVEL"), "n1", "7", None),
    "no state": (a_job().replace("JobState=", "Job="), "n1", "7", None),
    "stopped": (a_job(state="STOPPED"), "n1", "7", {0, 1}),
    "completing": (a_job("", state="COMPLETING"), "n1", "7", None),
    "completing, never had a GPU": (a_job("", state="COMPLETING", total="(null)", tres="cpu=8"), "n1", "7", set()),
    "completing elsewhere": (a_job("", state="COMPLETING", nodes="n2"), "n1", "7", set()),
    "cancelled": (a_job("", state="CANCELLED"), "n1", "7", set()),
    "over, yet a line has GPUs": (a_job(state="FAILED"), "n1", "7", {0, 1}),
    "requeued": (a_job(state="REQUEUED", nodes="(null)", lines=""), "n1", "7", set()),
    "requeued, with our node": (a_job("", state="REQUEUED"), "n1", "7", None),
    "pending, with our node": (a_job("", state="PENDING"), "n1", "7", None),
    "running without lines": (a_job(lines=""), "n1", "7", None),
    "running without lines or GPUs": (a_job(lines="", total="(null)", tres="cpu=8"), "n1", "7", set()),
    "running nowhere": (a_job(lines="", nodes="(null)"), "n1", "7", None),
    "GPUs in the TRES but not in the GRES": (a_job("", total="(null)"), "n1", "7", None),
    "without -d": (a_job(lines="").replace("   JOB_GRES=gpu:2\n", ""), "n1", "7", None),
    "the line has fewer than the total": (a_job(total="gpu:3"), "n1", "7", None),
    "the other node has them all": (
        a_job(nodes="n[1-2]", count=2, lines="  Nodes=n1 CPU_IDs=0 Mem=0 GRES=(null)\n"
              "  Nodes=n2 CPU_IDs=0 Mem=0 GRES=gpu:2(IDX:0-1)\n"), "n1", "7", set(),
    ),
    "the other node has not all": (
        a_job(nodes="n[1-2]", count=2, total="gpu:3", lines="  Nodes=n1 CPU_IDs=0 Mem=0 GRES=\n"
              "  Nodes=n2 CPU_IDs=0 Mem=0 GRES=gpu:2(IDX:0-1)\n"), "n1", "7", None,
    ),
    "a name that imitates a state": (a_job("", head="JobId=7 JobName=x JobState=COMPLETED"), "n1", "7", None),
    "a name that imitates an empty line": (
        a_job(head="JobId=7 JobName= Nodes=n1 CPU_IDs=0 Mem=0 GRES="), "n1", "7", {0, 1},
    ),
    "the long name, counted nowhere else": (a_job("gres:gpu:2(IDX:0-1)", total="gres:gpu:2", tres="cpu=8"), "n1", "7", {0, 1}),
    "GPUs under a site's own name": (a_job("gpus:2(IDX:0-1)", total="gpus:2", tres="cpu=8"), "n1", "7", None),
    "the same, completing": (a_job("", state="COMPLETING", total="gpus:2", tres="cpu=8"), "n1", "7", None),
    "what is only counted, under a name like a GPU's": (a_job("gpu_lic(CNT:2)", total="gpu_lic:2", tres="cpu=8"), "n1", "7", set()),
    "a line with less than the total, given twice": (
        a_job(lines="  Nodes=n1 CPU_IDs=0 Mem=0 GRES=gpu:1(IDX:0)\n" * 2), "n1", "7", None,
    ),
    "a node list that is none": (a_job("", nodes="n_}X1"), "n1", "7", None),
    "a node list without a name": (a_job("", nodes="-"), "n1", "7", None),
    "brackets of a new kind": (a_job(nodes="n[1-2/2]"), "n1", "7", None),
}


@pytest.mark.parametrize(("text", "node", "job", "gpus"), JOBS.values(), ids=JOBS)
def test_a_jobs_record(text: str, node: str, job: str | None, gpus: set[int] | None) -> None:
    claim = gres.read_job(text, node, job)
    assert claim.gpus == gpus
    assert (claim.gpus is None) == bool(claim.why)


def test_a_job_tells_its_state_and_whether_it_is_completing() -> None:
    assert gres.read_job(a_job(), "n1", "7").states == ("RUNNING",)
    assert not gres.read_job(a_job(), "n1", "7").completing
    assert gres.read_job(a_job("", state="COMPLETING"), "n1", "7").completing


def test_one_call_answers_for_many_jobs() -> None:
    text = a_job() + a_job("gpu:2(IDX:4-5)", head="JobId=8 ArrayJobId=5 ArrayTaskId=1") + a_job(head="JobId=9", nodes="n2")
    claims = gres.read_jobs(text, "n1")
    assert {job: claim.gpus for job, claim in claims.items()} == {"7": {0, 1}, "8": {4, 5}, "9": set()}


def test_a_job_that_is_cut_within_its_number_is_not_taken_for_another() -> None:
    assert gres.read_jobs("JobId=123"[:7], "n1") == {}
    assert gres.read_job("JobId=12", "n1", "12").gpus is None


def a_node(used: str | None, state: str = "MIXED", configured: str = "gpu:a100:4(S:0-1)", name: str = "n1") -> str:
    line = f"   GresUsed={used}\n" if used is not None else ""
    return (
        f"NodeName={name} Arch=x86_64\n   Gres={configured}\n   GresDrain=N/A\n{line}"
        f"   NodeAddr={name} NodeHostName={name}\n   State={state} ThreadsPerCore=1\n   Partitions=gpu\n\n"
    )


@pytest.mark.parametrize(
    ("text", "gpus", "completing", "states", "total"),
    [
        (a_node("gpu:a100:2(IDX:0-1)"), {0, 1}, False, ("MIXED",), 4),
        (a_node("gpu:2(IDX:0-1)", "IDLE*+COMPLETING"), {0, 1}, True, ("IDLE", "NOT_RESPONDING", "COMPLETING"), 4),
        (a_node("gpu:0(IDX:N/A)", "MIXED+DRAIN+PLANNED"), set(), False, ("MIXED", "DRAIN", "PLANNED"), 4),
        (a_node("gpu:2"), None, False, ("MIXED",), 4),
        (a_node("gpu:0"), set(), False, ("MIXED",), 4),
        (a_node(None), None, False, ("MIXED",), 4),
        (a_node("(null)"), None, False, ("MIXED",), 4),
        (a_node("N/A"), None, False, ("MIXED",), 4),
        (a_node("lscratch:0"), None, False, ("MIXED",), 4),
        (a_node("shard:0", configured="gpu:4,shard:16"), None, False, ("MIXED",), 4),
        (a_node("gpus:2", configured="gpus:4"), None, False, ("MIXED",), 0),
        (a_node("(null)", configured="gpus:4"), None, False, ("MIXED",), 0),
        (a_node(None, configured="(null)"), set(), False, ("MIXED",), 0),
        (a_node("(null)", configured="lscratch:10"), set(), False, ("MIXED",), 0),
        (a_node("gpu:1(IDX:3)", configured="gpu:a:2,gpu:b:2(S:0)"), {3}, False, ("MIXED",), 4),
        (a_node("gpu:0(IDX:N/A)", "????"), set(), True, (), 4),
        (a_node("gpu:1(IDX:0)", name="n11"), None, True, (), None),
        (a_node("gpu:1(IDX:0)", name="n1.lab"), {0}, False, ("MIXED",), 4),
        (a_node("gpu:1(IDX:0)", name="n1.lab") + a_node("gpu:0(IDX:N/A)"), set(), False, ("MIXED",), 4),
        (a_node("gpu:1(IDX:0)") * 2, None, True, (), None),
        (" ".join(a_node("gpu:1(IDX:0)").split()) + "\n", {0}, False, ("MIXED",), 4),
        ("Node n1 not found\n", None, True, (), None),
    ],
)
def test_a_nodes_record(text: str, gpus: set | None, completing: bool, states: tuple, total: int | None) -> None:
    claim = gres.read_node(text, "n1")
    assert (claim.gpus, claim.completing, claim.states, claim.total) == (gpus, completing, states, total)


@pytest.mark.parametrize(
    ("text", "gpus", "completing", "states"),
    [
        ("gpu:2(IDX:0-1)    mixed   \n", {0, 1}, False, ("MIXED",)),
        ("gpu:0(IDX:N/A)    idle+completing \n", set(), True, ("IDLE", "COMPLETING")),
        ("gpu:0(IDX:N/A)    comp\n", set(), True, ("COMPLETING",)),
        ("gpu:0(IDX:N/A)    mixed-\n", set(), False, ("MIXED", "PLANNED")),
        ("gpu:0(IDX:N/A)    draining*\n", set(), False, ("DRAIN", "NOT_RESPONDING")),
        ("GRES_USED    STATECOMPLETE\ngpu:1(IDX:2)   mixed\n", {2}, False, ("MIXED",)),
        ("n1  gpu:1(IDX:2)   mixed\n", {2}, False, ("MIXED",)),
        ("gpu:1(IDX:2)   mixed\ngpu:2   mixed\n", None, False, ("MIXED",)),
        ("gpu:1(IDX:2)   mixed\ngpu:1(IDX:3)   idle+completing\n", {2, 3}, True, ("MIXED", "IDLE", "COMPLETING")),
        ("gpu:1(IDX:2)\n", {2}, True, ()),
        ("gpu:1(IDX:2)   mix", {2}, True, ()),
        ("(null)   idle\n", set(), False, ("IDLE",)),
        ("N/A   idle\n", None, False, ("IDLE",)),
        ("gpu:a100:2(IDX:0-1)mixed\n", None, True, ()),
        ("gpu:a100:2(IDX:0-1),\n", None, True, ()),
        ("          idle\n", None, True, ()),
        ("n2  gpu:1(IDX:2)   mixed\n", None, True, ()),
        ("", None, True, ()),
        ("slurm_load_partitions: Unable to contact slurm controller (connect failure)\n", None, True, ()),
    ],
)
def test_sinfos_lines(text: str, gpus: set | None, completing: bool, states: tuple) -> None:
    claim = gres.read_sinfo(text, "n1")
    assert (claim.gpus, claim.completing, claim.states) == (gpus, completing, states)
    assert (claim.gpus is None) == bool(claim.why)


def a_reply(**changes: object) -> str:
    job = {
        "job_id": 7,
        "job_state": ["RUNNING"],
        "nodes": "n[1-2]",
        "gres_detail": ["gpu:2(IDX:0-1)", ""],
        "tres_alloc_str": "cpu=8,gres/gpu=2",
        "job_resources": {"nodes": {"list": "n[1-2]", "allocation": [{"name": "n1"}, {"name": "n2"}]}},
    }
    return json.dumps({"jobs": [job | changes], "errors": []})


@pytest.mark.parametrize(
    ("text", "node", "gpus"),
    [
        (a_reply(), "n1", {0, 1}),
        (a_reply(), "n2", set()),
        (a_reply(), "n3", set()),
        (a_reply(job_state="RUNNING"), "n1", {0, 1}),
        (a_reply(job_id={"set": True, "infinite": False, "number": 7}), "n1", {0, 1}),
        ("warning: old parser\n" + a_reply(), "n1", {0, 1}),
        (a_reply(job_resources={"nodes": {"allocation": [{"name": "n2"}, {"name": "n1"}]}}), "n2", {0, 1}),
        (a_reply(job_resources={"allocated_nodes": [{"nodename": "n2"}, {"nodename": "n1"}]}), "n2", {0, 1}),
        (a_reply(job_resources=None), "n1", {0, 1}),
        (a_reply(job_resources=None, nodes=None), "n1", None),
        (a_reply(gres_detail=["gpu:2(IDX:0-1)"]), "n1", None),
        (a_reply(gres_detail=["gpu:2(IDX:0-1)"]), "n9", set()),
        (a_reply(gres_detail=[]), "n1", None),
        (a_reply(gres_detail=["", ""]), "n1", None),
        (a_reply(gres_detail=None), "n1", None),
        (a_reply(gres_detail=[], tres_alloc_str="cpu=8"), "n1", set()),
        (a_reply(gres_detail=[], tres_alloc_str="cpu=8", job_state=["COMPLETED", "COMPLETING"]), "n1", None),
        (a_reply(gres_detail=["lscratch(CNT:5)", ""], tres_alloc_str="cpu=8"), "n1", set()),
        (a_reply(tres_alloc_str="cpu=8"), "n1", {0, 1}),
        (a_reply(gres_total="gpu:3"), "n2", None),
        (a_reply(gres_detail=[], job_state=["COMPLETED"]), "n1", set()),
        (a_reply(gres_detail=[], job_state=["COMPLETED", "COMPLETING"]), "n1", None),
        (a_reply(gres_detail=[], job_state=["PENDING"], nodes="", job_resources=None), "n1", set()),
        (a_reply(gres_detail=[], job_state=["RUNNING", "CONFIGURING"]), "n1", None),
        (a_reply(job_state=[]), "n1", None),
        (a_reply(job_id=8), "n1", None),
        (a_reply(gres_detail="gpu:2(IDX:0-1)"), "n1", None),
        ('{"jobs": [], "errors": [{"error": "Invalid job id specified"}]}', "n1", None),
        ('{"errors": []}', "n1", None),
        ("[]", "n1", None),
        ('{"nodes": [{"name": "n1", "gres_used": "gpu:1(IDX:3)", "gres": "gpu:4", "state": ["MIXED"]}]}', "n1", {3}),
        ('{"nodes": [{"name": "n11", "gres_used": "gpu:1(IDX:3)", "state": ["MIXED"]}]}', "n1", None),
    ],
)
def test_a_json_reply(text: str, node: str, gpus: set | None) -> None:
    claim = gres.read_json(text, node, "7")
    assert claim.gpus == gpus
    assert (claim.gpus is None) == bool(claim.why)


def test_a_json_reply_to_a_runs_name_needs_one_record_or_that_name() -> None:
    assert gres.read_json(a_reply(), "n1", "sEKNKTV3WPV500").gpus == {0, 1}
    two = json.loads(a_reply())["jobs"] + json.loads(a_reply(job_id=8, sluid="sEKNKTV3WPV500", gres_detail=["", "gpu:1(IDX:5)"]))["jobs"]
    assert gres.read_json(json.dumps({"jobs": two}), "n2", "sEKNKTV3WPV500").gpus == {5}
    assert gres.read_json(json.dumps({"jobs": two}), "n2", "sEKNKTV3WPV501").gpus is None


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("Node=n1 AbstractCores=0\n Gres=gpu Count=2 Index=0-1\nNode=n2 Memory=1\n", {0, 1}),
        ("Node=n1 AbstractCores=0\n Gres=nic Count=1 Index=0\nNode=n2 Memory=1\n", set()),
        ("Node=n1 AbstractCores=0\n Gres=gpu Type=a Count=1 Index=0\n Gres=gpu Type=b Count=1 Index=3\n", {0, 3}),
        ("Node=n1 AbstractCores=0\n Gres=gpu Count=2 Index=0\n", None),
        ("Node=n1 AbstractCores=0\n Gres=gpu Count=2\n", None),
        ("Node=n1 AbstractCores=0\n Gres=gpus Count=2 Index=0-1\nNode=n2 Memory=1\n", None),
        ("Node=n1 AbstractCores=0\n Gres=gpu Count=1 Index=1", None),
        ("Node=n1 AbstractCores=0\n", None),
        ("Node=n11 AbstractCores=0\n Gres=gpu Count=1 Index=1\n", None),
        ("Access/permission denied\n", None),
    ],
)
def test_the_resources_of_a_job(text: str, gpus: set | None) -> None:
    assert gres.read_resources(text, "n1").gpus == gpus


@pytest.mark.parametrize(
    ("stderr", "failure"),
    [
        ("slurm_load_jobs error: Invalid job id specified", "invalid_job"),
        ("Job 77_3 not found", "invalid_job"),
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", "unreachable"),
        ("sinfo: error: slurm_load_partitions: Unable to contact slurm controller (connect failure)", "unreachable"),
        ("slurm_load_node error: Zero Bytes were transmitted or received", "unreachable"),
        ("slurm_load_jobs error: Socket timed out on send/recv operation", "timed_out"),
        ("slurm_load_node error: Access/permission denied", "no_permission"),
        ("error: resources: Protocol authentication error", "no_permission"),
        ("scontrol: error: s_p_parse_file: cannot stat file /etc/slurm/slurm.conf: No such file", "no_config"),
        ("scontrol: fatal: Could not establish a configuration source", "no_config"),
        ("Illegal instruction", "unknown"),
        ("", "unknown"),
    ],
)
def test_a_failure_is_classified_by_its_text(stderr: str, failure: str) -> None:
    assert gres.classify_failure(stderr) == failure
    claim = gres.read_stderr(stderr, "n1")
    assert claim.gpus is None and claim.why


def test_a_missing_job_says_what_slurm_said() -> None:
    assert "Job 77_3 not found" in gres.read_job("Job 77_3 not found\n", "n1", "77_3").why


def test_an_unknown_form_is_the_callers_error() -> None:
    with pytest.raises(ValueError, match="unknown form 'xml'"):
        gres.read("xml", "", "n1")


def test_the_configuration_is_read_and_its_first_section_counts() -> None:
    text = (
        "Configuration data as of 2026-01-01T00:00:00\nClusterName             = lab\n"
        "SlurmdSpoolDir          = /var/spool/slurmd/%n\nEpilog                  = (null)\nSlurmctldHost[0]        = h\n"
        "LaunchParameters        = a=b,c\nPrologFlags             =\n\nCgroup Support Configuration:\nClusterName = other\n"
        "\nSlurmctld(primary) at h is UP\n"
    )
    config = gres.read_config(text)
    assert config["SlurmdSpoolDir"] == "/var/spool/slurmd/%n"
    assert config["ClusterName"] == "lab"
    assert config["Epilog"] == "(null)"
    assert config["LaunchParameters"] == "a=b,c"
    assert config["PrologFlags"] == ""
    assert config["SlurmctldHost[0]"] == "h"


def test_a_name_of_a_run_is_told_from_a_job_id() -> None:
    assert gres.is_sluid("sEKNKTV3WPV500")
    assert not any(map(gres.is_sluid, ("7", "5_1", "sEKNKTV3WPV50", "sEKNKTV3WPV50I", "xEKNKTV3WPV500", None)))


@pytest.fixture
def in_auckland() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "Pacific/Auckland")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize("ends, expected", [
    ("2026-11-24T12:00:00", datetime(2026, 11, 24, 12, tzinfo=UTC).timestamp()), ("Unknown", None), ("2026-13-24T12:00:00", None), ("9999-12-31T23:59:59", ...),
])  # fmt: skip
def test_the_end_of_a_jobs_time_limit_is_told_and_changes_nothing_else(
    ends: str, expected: float | None, in_auckland: None
) -> None:
    """As scontrol prints it: a line of its own, in UTC, because it is told so: whatever the node's own zone is."""
    line = f"   StartTime=2026-11-24T11:00:00 EndTime={ends} Deadline=N/A\n   NodeList="
    claim = gres.read("job", a_job().replace("   NodeList=", line), "n1", "7")
    assert claim.gpus == {0, 1}
    assert expected is ... or claim.ends_at == expected
    imitated = gres.read("job", a_job(head="JobId=7 JobName=StartTime=x EndTime=2026-11-24T12:00:00 Deadline=N/A"), "n1", "7")
    assert imitated.ends_at is None


def test_whose_job_it_is_comes_from_its_own_line_and_never_from_a_name() -> None:
    for head, user in (("JobId=7 JobName=train", "a"), ("JobId=7 JobName=x UserId=root(0)", "a")):
        assert gres.read("job", a_job(head=head), "n1", "7").user == user
    assert gres.read("job", a_job().replace("UserId=a(1)", "UserId="), "n1", "7").user == ""
