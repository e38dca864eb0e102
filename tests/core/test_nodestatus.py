"""What `status` makes of the workers' facts."""

import json

import msgspec
import pytest

from llmwd.core import statusrows, wording
from llmwd.core.nodestatus import Facts, status_of, torn
from llmwd.core.statusrows import summary_rows
from llmwd.messages import (
    NoticesFact,
    Courtesy,
    Expected,
    Gpu,
    GpusFact,
    Hold,
    JobClaim,
    JobSeen,
    JobsFact,
    Lease,
    Revocation,
    MemoryPressure,
    RootFact,
    ServerFact,
    SourceState,
    TunnelFact,
    WorkerState,
)
from llmwd.vocab import Holder, NodePhase, Phase, Reason, Worker

NOW_S = 1000.0
ROOT = (77, 4242)


def root(**changes) -> RootFact:
    workers = tuple(
        WorkerState(name=name, pid=100 + number, phase=Phase.ready, restarts=0, since_at=0.0)
        for number, name in enumerate(Worker)
    )
    fact = RootFact(
        pid=ROOT[0], start=ROOT[1], stopping=False, workers=workers, started_at=0.0,
        node="m001", home="/h", version="1", at_s=NOW_S,
    )  # fmt: skip
    return msgspec.structs.replace(fact, **changes)


def server(**changes) -> ServerFact:
    fact = ServerFact(
        profile="glm", model_name="org/GLM", served_as="glm", wanted_gpus=2, phase=Phase.ready,
        node_phase=NodePhase.serving, reason=Reason.ready, detail="", since_at=60.0, holding=(2, 3),
        pid=500, url="http://127.0.0.1:8000", ready_at=60.0, at_s=NOW_S,
    )  # fmt: skip
    return msgspec.structs.replace(fact, **changes)


def gpus(**changes) -> GpusFact:
    held = (Holder.slurm, Holder.free, Holder.llmwd, Holder.llmwd)
    fact = GpusFact(
        gpus=tuple(
            Gpu(index=n, uuid=f"GPU-{n}", minor=n, holder=holder, job="9" if holder == Holder.slurm else None)
            for n, holder in enumerate(held)
        ),
        lease=Lease(epoch=3, gpus=(2, 3), uuids=("GPU-2", "GPU-3"), granted_s=1.0, expires_s=NOW_S + 5),
        revocation=None, claims=(JobClaim(id="9", gpus=(0,)), JobClaim(id="10", gpus=None)), sources=(), hold=None,
        blocked=None, detail="", node_states=(), epoch=3, at_s=NOW_S,
    )  # fmt: skip
    return msgspec.structs.replace(fact, **changes)


def quarantined(name: str) -> tuple[WorkerState, ...]:
    change = {"phase": Phase.failed, "pid": None, "detail": "ended 5 times in 300 s"}
    return tuple(msgspec.structs.replace(w, **change) if w.name == name else w for w in root().workers)


def shown(running=ROOT, now_s=NOW_S, **facts):
    return status_of("here", running, Facts(**({"root": root(), "server": server(), "gpus": gpus()} | facts)), now_s)


def test_the_json_object_holds_every_field_of_the_contract():
    told = json.loads(msgspec.json.encode(shown()))
    assert told["node"] == "m001" and told["phase"] == "serving" and told["reason"] == "ready"
    assert told["since"] == "1970-01-01T00:01:00Z"
    assert told["model"] == {"profile": "glm", "name": "org/GLM", "served_as": "glm"}
    assert told["lease"] == {"epoch": 3, "gpus": [2, 3]}
    assert told["gpus"][0] == {"index": 0, "minor": 0, "uuid": "GPU-0", "holder": "slurm", "job": "9", "why": ""}
    assert told["jobs"] == [{"id": "9", "gpus": [0]}, {"id": "10", "gpus": None}]
    assert {key: told["server"][key] for key in ("pid", "phase", "url", "ready_since")} == {
        "pid": 500, "phase": "ready", "url": "http://127.0.0.1:8000", "ready_since": "1970-01-01T00:01:00Z",
    }  # fmt: skip
    assert told["tunnel"]["phase"] == "stopped"
    assert [worker["name"] for worker in told["workers"]] == list(Worker)
    assert {"name", "pid", "phase", "restarts"} <= told["workers"][0].keys()
    assert told["root"]["pid"] == 77 and told["stale"] == []


def test_no_fact_carries_the_servers_arguments_because_they_may_hold_a_secret():
    assert not {"argv", "args", "env"} & set(ServerFact.__struct_fields__)


def test_without_a_supervisor_every_field_is_there_and_empty_whatever_facts_a_dead_one_left():
    told = json.loads(msgspec.json.encode(shown(running=None)))
    assert (told["node"], told["phase"], told["reason"]) == ("here", "stopped", "stopped")
    assert told["model"] == {"profile": None, "name": None, "served_as": None}
    assert told["lease"] is None and told["root"]["pid"] is None and told["server"]["pid"] is None
    assert told["gpus"] == told["jobs"] == told["workers"] == []


def test_facts_of_another_supervisor_than_the_running_one_count_for_nothing():
    told = shown(running=(78, 1))
    assert (told.phase, told.reason, told.root.pid) == (NodePhase.waiting, Reason.starting, 78)
    assert told.lease is None and told.server.pid is None


def test_between_a_revocation_and_the_managers_word_the_node_yields():
    gone = Revocation(epoch=3, reason=Reason.yielded_to_job, detail="job 9 has GPUs 2-3", revoked_s=1.0, job="9")
    told = shown(server=server(lease_epoch=3), gpus=gpus(lease=None, revocation=gone))
    assert (told.phase, told.reason, told.detail) == (NodePhase.yielding, Reason.yielded_to_job, "job 9 has GPUs 2-3")
    assert shown(server=server(lease_epoch=4), gpus=gpus(revocation=gone)).phase == NodePhase.serving
    assert shown(server=server(lease_epoch=3, node_phase=NodePhase.waiting), gpus=gpus(lease=None, revocation=gone)).phase == NodePhase.waiting


def test_between_a_resume_and_the_managers_word_the_node_waits():
    held = server(node_phase=NodePhase.held, reason=Reason.held, heard_s=NOW_S - 1)
    told = shown(server=held, gpus=gpus(lease=None, blocked=Reason.resume_delay, detail="2 s more"))
    assert (told.phase, told.reason, told.detail) == (NodePhase.waiting, Reason.resume_delay, "2 s more")
    assert shown(server=held, gpus=gpus(lease=None, hold=Hold(since_at=0.0))).phase == NodePhase.held


def test_facts_are_torn_when_the_manager_answers_a_newer_one_of_the_resolver():
    assert torn(Facts(server=server(heard_s=NOW_S + 0.1), gpus=gpus()))
    assert not torn(Facts(server=server(heard_s=NOW_S), gpus=gpus()))
    assert not torn(Facts(server=server(heard_s=NOW_S))) and not torn(Facts(gpus=gpus()))


def test_a_node_whose_vllm_manager_has_said_nothing_yet_is_starting():
    told = shown(server=None)
    assert (told.phase, told.reason) == (NodePhase.waiting, Reason.starting)


def test_a_root_that_is_ending_is_stopped_whatever_the_manager_said_last():
    told = shown(root=root(stopping=True))
    assert (told.phase, told.reason) == (NodePhase.stopped, Reason.stopping)


def test_a_manager_in_quarantine_fails_the_node_and_says_which_worker():
    told = shown(root=root(workers=quarantined("vllm")))
    assert (told.phase, told.reason) == (NodePhase.failed, Reason.worker_failed)
    assert told.detail == "vllm: ended 5 times in 300 s"


@pytest.mark.parametrize("name", ["detector", "resolver"])
def test_a_blind_node_fails_only_once_nothing_is_served(name):
    workers = quarantined(name)
    assert shown(root=root(workers=workers)).phase == NodePhase.serving
    waiting = server(node_phase=NodePhase.waiting, reason=Reason.no_evidence)
    assert shown(root=root(workers=workers), server=waiting).reason == Reason.worker_failed


def test_a_broken_notifier_or_tunnel_does_not_change_what_the_node_does():
    assert shown(root=root(workers=quarantined("notifier"))).phase == NodePhase.serving


def test_a_silent_resolvers_gpus_are_unknown_and_its_lease_is_over():
    told = shown(now_s=NOW_S + 16)
    assert {gpu.holder for gpu in told.gpus} == {Holder.unknown}
    assert told.lease is None and "resolver" in told.stale


def test_with_a_silent_resolver_the_detectors_jobs_are_shown_but_not_its_leftovers():
    seen = tuple(JobSeen(id=i, sources=("cgroup2",), seen_s=1.0, empty=i == "7") for i in ("5", "7"))
    jobs = JobsFact(jobs=seen, sources=(), scanned=True, at_s=NOW_S)
    assert [(job.id, job.gpus) for job in shown(gpus=None, jobs=jobs).jobs] == [("5", None)]


def test_a_lease_that_has_run_out_is_none_even_if_nobody_said_so():
    lease = msgspec.structs.replace(gpus().lease, expires_s=NOW_S - 0.1)
    assert shown(gpus=gpus(lease=lease)).lease is None


def test_a_source_that_both_workers_know_works_only_if_it_works_for_both():
    jobs = JobsFact(jobs=(), sources=(SourceState(name="nvml", works=True),), scanned=True, at_s=NOW_S)
    told = shown(jobs=jobs, gpus=gpus(sources=(SourceState(name="nvml", works=False, why="no driver"),)))
    assert [(source.name, source.works, source.why) for source in told.sources] == [("nvml", False, "no driver")]


def test_the_resolvers_detail_explains_a_reason_that_the_manager_only_names():
    fact = gpus(blocked=Reason.yielded_to_job, detail="job 9 has GPUs 0-3", lease=None)
    waiting = server(node_phase=NodePhase.waiting, reason=Reason.yielded_to_job)
    assert shown(server=waiting, gpus=fact).detail == "job 9 has GPUs 0-3"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0 s"), (59.9, "59 s"), (60, "1m"), (192, "3m 12s"), (3600, "1h"), (7500, "2h 5m"), (90061, "1d 1h")],
)
def test_durations_are_spelled_with_their_two_biggest_units(seconds, text):
    assert wording.spell_duration(seconds) == text


@pytest.mark.parametrize(
    ("indices", "text"), [((), "none"), (None, "unknown"), ((5, 0, 2, 1), "0-2,5"), ((3,), "3"), ((0, 1), "0-1")]
)
def test_gpus_are_spelled_as_slurm_does(indices, text):
    assert wording.spell_gpus(indices) == text


def test_the_rows_say_what_is_served_where_and_who_is_here():
    rows = dict(statusrows.summary_rows(shown(), now_at=252.0))
    assert rows["model"] == "glm · org/GLM"
    assert rows["lease"] == "GPUs 2-3 · epoch 3"
    assert rows["server"] == "http://127.0.0.1:8000 · pid 500 · ready for 3m 12s"
    assert rows["jobs"] == "9 on GPU 0; 10 on GPUs nobody could tell"


def test_the_rows_say_how_long_a_hold_lasts_and_whose_it_is():
    forever = shown(gpus=gpus(hold=Hold(since_at=0.0, by="ada")))
    assert dict(statusrows.summary_rows(forever, 0.0))["held"] == "until `llmwd-ctl resume`, asked for by ada"
    limited = shown(gpus=gpus(hold=Hold(since_at=0.0, until_at=60.0)))
    assert dict(statusrows.summary_rows(limited, 0.0))["held"] == "until 1970-01-01T00:01:00Z"


def test_a_source_that_is_not_here_says_why_in_one_line_of_80_columns_cut_at_a_word():
    long = "sinfo: error: resolve_ctls_from_dns_srv: res_nsearch error:\n Unknown host sinfo: error: and more of it"
    sources = (
        SourceState(name="gresused", works=False, why=long),
        SourceState(name="nvml", works=False, why="no driver"),
        SourceState(name="cgroup1", works=False, why="no folder slurm in " + "/a" * 60),
        SourceState(name="sim", works=True),
    )
    whole = shown(gpus=gpus(sources=sources))
    told = {source.name: source for source in statusrows.briefed(whole).sources}
    assert told["gresused"].why == "sinfo: error: resolve_ctls_from_dns_srv: res_nsearch …"
    assert (told["nvml"].why, told["cgroup1"].why, told["sim"].works) == ("no driver", "no folder slurm in …", True)
    assert {source.why for source in whole.sources} >= {long}


def test_how_the_server_stands_back_is_a_row_of_its_own_and_none_without_a_server() -> None:
    found = Courtesy(nice=10, oom_score_adj=800, io_priority=7, cpus=(0, 1, 2, 8))
    facts = Facts(root=root(), server=server(courtesy=found, courtesy_detail="NUMA node 0"), gpus=gpus())
    rows = dict(statusrows.summary_rows(status_of("m001", ROOT, facts, NOW_S), 60.0))
    assert rows["neighbour"] == "nice 10 · oom_score_adj 800 · I/O best-effort 7 · CPUs 0-2,8 (NUMA node 0)"
    bare = status_of("m001", ROOT, Facts(root=root(), server=server(), gpus=gpus()), NOW_S)
    assert bare.neighbour is None and "neighbour" not in dict(statusrows.summary_rows(bare, 60.0))


@pytest.mark.parametrize(
    ("some", "limit", "short", "why", "row"),
    [
        (0.5, 10.0, False, "", "pressure 0.5 % · yields at 10 % beside others"),
        (42.0, 10.0, True, "", "pressure 42 % · yields at 10 % beside others · short"),
        (42.0, 0.0, False, "", "pressure 42 % · not watched (MEMORY_PRESSURE=0)"),
        (None, 10.0, False, "it is not there", "pressure not watched: it is not there"),
    ],
)
def test_memory_pressure_is_a_row_with_its_limit_or_with_why_it_is_not_known(some, limit, short, why, row) -> None:
    memory = MemoryPressure(some_percent=some, full_percent=some, limit_percent=limit, short=short, why=why)
    facts = Facts(root=root(), server=server(), gpus=gpus(memory=memory))
    assert dict(statusrows.summary_rows(status_of("m001", ROOT, facts, NOW_S), 60.0))["memory"] == row
    silent = Facts(root=root(), server=server(), gpus=gpus(memory=memory, at_s=NOW_S - 60))
    assert status_of("m001", ROOT, silent, NOW_S).memory is None


@pytest.mark.parametrize(
    ("start_at", "wanted", "row"),
    [
        (7200.0, None, "reservation maint at 1970-01-01T02:00:00Z, in 1h 59m (the whole node)"),
        (30.0, 1, "reservation maint at 1970-01-01T00:00:30Z, begun (1 GPU)"),
        (None, 4, "reservation maint at a time that was not understood (4 GPUs)"),
    ],
)
def test_what_is_expected_next_is_a_row_and_a_field(start_at: float | None, wanted: int | None, row: str) -> None:
    expected = Expected(who="reservation maint", start_at=start_at, start_s=None, over_s=None, gpus=wanted)
    status = status_of("m001", ROOT, Facts(root=root(), server=server(), gpus=gpus(expected=expected)), NOW_S)
    assert dict(statusrows.summary_rows(status, 60.0))["next"] == row
    shown = json.loads(msgspec.json.encode(status))["next"]
    assert (shown["who"], shown["gpus"]) == ("reservation maint", wanted) and (shown["start"] is None) is (start_at is None)
    silent = Facts(root=root(), server=server(), gpus=gpus(expected=expected, at_s=NOW_S - 60))
    assert status_of("m001", ROOT, silent, NOW_S).next is None


def test_the_tunnel_is_shown_with_its_connections_their_places_and_since_when():
    fact = TunnelFact(
        phase=Phase.ready, detail="", hostname="llm.example.org", pid=7, since_at=1000.0, at_s=NOW_S, mode="named", connections=4,
        locations=("ams01", "fra03"),
    )  # fmt: skip
    told = shown(tunnel=fact)
    assert (told.tunnel.mode, told.tunnel.connections, told.tunnel.locations) == ("named", 4, ("ams01", "fra03"))
    row = dict(summary_rows(told, 1180.0))["tunnel"]
    assert row == "ready for 3m (named, 4 connections: ams01, fra03) · https://llm.example.org"
    named = shown(tunnel=msgspec.structs.replace(fact, name="lab"))
    assert named.tunnel.name == "lab"
    assert dict(summary_rows(named, 1180.0))["tunnel"] == "ready for 3m (named lab, 4 connections: ams01, fra03) · https://llm.example.org"


def test_the_outbox_is_shown_with_what_waits_when_the_last_was_sent_and_an_alarm():
    fact = NoticesFact(phase=Phase.ready, detail="", waiting=0, sent=3, at_s=NOW_S, last_sent_at=1000.0, deadman_at=2980.0)
    assert dict(summary_rows(shown(notices=fact), 1180.0))["notices"] == "none waits · last sent 3m ago · dead man's notice in 30m"
    alarm = msgspec.structs.replace(fact, phase=Phase.failed, detail="ntfy answers 403", waiting=2, kept="no space", deadman_at=None)
    row = dict(summary_rows(shown(notices=alarm), 1180.0))["notices"]
    assert row == "ALARM: ntfy answers 403 · 2 wait · last sent 3m ago · in memory only (no space)"
    assert "notices" not in dict(summary_rows(shown(), 1180.0))
