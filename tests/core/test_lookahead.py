"""What Slurm plans: its answers as 22.05 printed them (and later versions' forms), and what follows from them."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmwd.core import lookahead
from llmwd.core.gpumap import build_map, simulated
from llmwd.core.lease import Decision, Evidence, Situation, decide
from llmwd.core.lookahead import (
    JOB_FIELDS,
    JOB_WAIT_S,
    LOAD_ASSUMED_S,
    Outlook,
    Plan,
    concerning,
    place,
    read_pending,
    read_reservations,
)
from llmwd.messages import Expected, Lease
from llmwd.vocab import Reason

RESERVATION = (
    "ReservationName=maint StartTime=2026-11-24T02:39:10 EndTime=2026-11-24T02:49:10 Duration=00:10:00 Nodes=n[1-3] NodeCnt=3"
    " CoreCnt=64 Features=(null) PartitionName=(null) Flags=MAINT,IGNORE_JOBS,SPEC_NODES TRES=cpu=64 Users=root Groups=(null)"
    " Accounts=(null) Licenses=(null) State=INACTIVE BurstBuffer=(null) Watts=n/a MaxStartDelay=(null)\n"
)
START_AT = datetime(2026, 11, 24, 2, 39, 10, tzinfo=UTC).timestamp()
NOW_S = 1000.0


def reservation(**changes: str) -> str:
    text = RESERVATION
    for name, value in changes.items():
        before = text.split(f" {name}=")[1].split(" ")[0]
        text = text.replace(f" {name}={before}", f" {name}={value}")
    return text


def pending(**changes: str) -> str:
    """A line of squeue: job 7 is planned on n2 and has asked for two GPUs there."""
    line = dict.fromkeys(JOB_FIELDS, "N/A") | {
        "JobID": "7", "Reason": "Resources", "StartTime": "2026-11-24T02:39:10", "SchedNodes": "n2", "ReqNodes": "",
        "tres-per-node": "gres:gpu:2", "OverSubscribe": "OK",
    }  # fmt: skip
    assert changes.keys() <= {name.replace("-", "_") for name in line}
    line |= {name: changes[name.replace("-", "_")] for name in line if name.replace("-", "_") in changes}
    return "|".join(line[name] for name in JOB_FIELDS) + "|\n"


def test_a_reservation_with_this_node_is_a_plan_for_the_whole_of_it() -> None:
    heard = read_reservations(RESERVATION, "n2")
    assert heard.plans == (Plan("reservation maint", START_AT, None, START_AT + 600),) and not heard.unclear


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ("No reservations in the system\n", "n2"),
        ("", "n2"),
        (RESERVATION, "n4"),
        (reservation(Nodes="(null)"), "n2"),
        (reservation(Flags="TIME_FLOAT,SPEC_NODES"), "n2"),
    ],
)
def test_what_is_no_reservation_of_this_node_is_no_plan(text: str, node: str) -> None:
    assert read_reservations(text, node) == lookahead.Heard()


@pytest.mark.parametrize(
    ("tres", "gpus"),
    [
        ("cpu=64", None),
        ("(null)", None),
        ("cpu=8,gres/gpu=2", 2),
        ("gres/gpu:a100=2,gres/gpu=2", 2),
        ("gres/gpu:a100=2,gres/gpu:v100=1", 3),
        ("gres/gpu=many", None),
        ("gres/shard=4", None),
    ],
)
def test_a_reservation_needs_the_gpus_it_names_and_any_if_it_names_none(tres: str, gpus: int | None) -> None:
    assert read_reservations(reservation(TRES=tres), "n2").plans[0].gpus == gpus


@pytest.mark.parametrize("text", ["something new\n", reservation(Nodes="n[1-"), reservation(StartTime="soon")])
def test_a_reservation_that_is_not_understood_is_never_nothing(text: str) -> None:
    heard = read_reservations(text, "n2")
    assert len(heard.plans) == len(heard.unclear) == 1
    assert heard.plans[0].gpus is None


def test_cores_of_nodes_within_a_reservation_are_read_over() -> None:
    more = reservation(Flags="OVERLAP   NodeName=n1 CoreIDs=0")
    assert read_reservations(more + RESERVATION, "n2").plans == read_reservations(RESERVATION * 2, "n2").plans


def test_a_pending_job_that_is_planned_here_is_a_plan() -> None:
    assert read_pending(pending(), "n2", alone=False).plans == (Plan("job 7", START_AT, 2, job="7"),)


@pytest.mark.parametrize(
    ("changes", "alone", "counts"),
    [
        ({"SchedNodes": "n[1-3]"}, False, True),
        ({"SchedNodes": "n1"}, True, False),
        ({"StartTime": "N/A"}, True, False),
        ({"SchedNodes": "(null)", "Reason": "BeginTime"}, False, False),
        ({"SchedNodes": "(null)", "Reason": "BeginTime"}, True, True),
        ({"SchedNodes": "(null)", "Reason": "BeginTime", "ReqNodes": "n[2,5]"}, False, True),
        ({"SchedNodes": "(null)", "Reason": "BeginTime", "ReqNodes": "n5"}, True, False),
        ({"SchedNodes": "(null)", "Reason": "JobHeldUser"}, True, False),
        ({"SchedNodes": "n[2"}, False, True),
    ],
)
def test_a_pending_job_counts_where_it_is_planned_or_asks_to_be_or_must_be(changes: dict, alone: bool, counts: bool) -> None:
    assert bool(read_pending(pending(**changes), "n2", alone).plans) is counts


@pytest.mark.parametrize(
    ("changes", "gpus"),
    [
        ({"tres_per_node": "N/A"}, 0),
        ({"tres_per_node": "gres:gpu"}, 1),
        ({"tres_per_node": "gres:gpu:a100:3"}, 3),
        ({"tres_per_node": "gres/gpu:a100:3"}, 3),
        ({"tres_per_node": "gres/gpu=3"}, 3),
        ({"tres_per_node": "gres/gpu:a100=3,gres/gpu:2080ti:1"}, 4),
        ({"tres_per_node": "gres:gpu:2080ti"}, 1),
        ({"tres_per_node": "gres:nic:2,gpu:1"}, 1),
        ({"tres_per_node": "gres:nic:2"}, 0),
        ({"tres_per_node": "gres:shard:2"}, None),
        ({"tres_per_node": "gpu*2"}, None),
        ({"tres_per_node": ""}, None),
        ({"tres_per_node": "N/A", "tres_per_job": "gres:gpu:4"}, 4),
        ({"tres_per_job": "gres:gpu:4"}, 2),
        ({"tres_per_node": "N/A", "tres_per_task": "gres:gpu:1"}, None),
        ({"tres_per_node": "N/A", "tres_per_socket": "gres:gpu:1"}, None),
        ({"tres_per_node": "N/A", "OverSubscribe": "NO"}, None),
    ],
)
def test_how_many_gpus_a_pending_job_can_get_here(changes: dict, gpus: int | None) -> None:
    assert read_pending(pending(**changes), "n2", alone=False).plans[0].gpus == gpus


@pytest.mark.parametrize(
    ("tasks", "gpus"),
    [
        ("N/A", 2),
        ("3", 2),
        ("0-3", 8),
        ("1,3,5", 6),
        ("1-9:4,20", 8),
        ("1-100%3", 6),
        ("1-2%8", 4),
        ("1-9,11,13,...", None),
        ("some", None),
    ],
)
def test_a_pending_array_needs_as_many_gpus_as_its_tasks_that_may_run_at_once(tasks: str, gpus: int | None) -> None:
    assert read_pending(pending(ArrayTaskID=tasks), "n2", alone=False).plans[0].gpus == gpus


def test_an_array_without_gpus_has_none_however_many_tasks_it_has() -> None:
    for tasks in ("1-100", "1,2,..."):
        assert read_pending(pending(ArrayTaskID=tasks, tres_per_node="N/A"), "n2", alone=False).plans[0].gpus == 0


@pytest.mark.parametrize("text", ["7|PD\n", pending().replace("02:39", "2:39 pm")])
def test_a_pending_job_that_is_not_understood_is_never_nothing(text: str) -> None:
    heard = read_pending(text, "n2", alone=False)
    assert len(heard.unclear) == 1 and heard.plans[0].start_at is None


@given(st.text(), st.booleans())
def test_no_answer_breaks_the_reader_and_what_says_something_never_counts_for_less(text: str, alone: bool) -> None:
    read_reservations(text, "n2")
    assert read_pending(text + "\n" + pending(), "n2", alone).plans[-1].who == "job 7"
    assert read_reservations(text + "\n" + RESERVATION, "n2").plans[-1].who == "reservation maint"


# --- what follows -------------------------------------------------------------------------------------


def expected(start_s: float | None, gpus: int | None = None, over_s: float | None = None, job: str | None = None) -> Expected:
    return Expected(who=f"job {job}", start_at=START_AT, start_s=start_s, over_s=over_s, gpus=gpus, job=job)


def who(*each: Expected, ours: int = 2, others: int = 0, jobs: tuple[str, ...] = ()) -> list[str | None]:
    return [one.job for one in concerning(each, ours, others, 8, jobs, NOW_S)]


def test_slurms_wall_time_becomes_monotonic_when_it_arrives() -> None:
    placed = place(Plan("job 7", START_AT, 2, job="7"), START_AT - 100, NOW_S)
    assert placed.start_s == NOW_S + 100 and placed.over_s == NOW_S + 100 + JOB_WAIT_S
    kept = place(Plan("reservation r", START_AT, None, START_AT + 600), START_AT - 100, NOW_S)
    assert kept.over_s == NOW_S + 700
    assert place(Plan("x", None, None), START_AT, NOW_S).start_s is None


def test_a_plan_concerns_us_if_it_does_not_fit_beside_what_is_used() -> None:
    assert who(expected(1100.0, 6, job="7")) == []
    assert who(expected(1100.0, 6, job="7"), others=1) == ["7"]
    assert who(expected(1100.0, 7, job="7")) == ["7"]
    assert who(expected(1100.0, None, job="7")) == ["7"]
    assert who(expected(1100.0, 0, job="7"), others=8) == []


def test_several_plans_count_together_where_their_times_meet() -> None:
    one, two, three = (expected(1000.0 + 100 * n, 3, 1150.0 + 100 * n, job=str(n)) for n in (1, 2, 3))
    assert who(three, one, two) == []
    assert who(three, one, two, ours=3) == ["2", "3"]
    assert who(one, three, ours=3) == []


def test_a_job_that_has_come_is_counted_once_and_one_that_never_came_no_longer() -> None:
    assert who(expected(990.0, 4, job="7"), others=4) == ["7"]
    assert who(expected(990.0, 4, job="7"), others=4, jobs=("7",)) == []
    assert who(expected(800.0, None, 999.0, job="7")) == []


GPUS = simulated(8)
MAP = build_map(GPUS, 8, 0, {}, sim=False)
LEASE = Lease(epoch=3, gpus=(6, 7), uuids=("SIM-6", "SIM-7"), granted_s=900.0, expires_s=1005.0)


def decided(*mine: Expected, lease: Lease | None = None, load_s: float | None = 20.0, now_s: float = NOW_S, **more: object) -> Decision:
    well = {
        "gpus": GPUS, "gpu_map": MAP, "occupants": {}, "free_since_s": dict.fromkeys(MAP.uuids, float("-inf")), "wanted": 2,
        "holding": frozenset(), "server_known": True, "pending": False, "lease": lease, "hold": None, "node_states": ("IDLE",),
        "evidence": Evidence(), "epoch": 3, "outlook": Outlook(mine, 60.0, load_s),
    }  # fmt: skip
    return decide(Situation(**(well | more)), now_s, 10.0, 10.0)


def test_the_lease_ends_in_good_time_before_and_not_sooner() -> None:
    kept = decided(expected(1060.5, job="7"), lease=LEASE)
    assert kept.revocation is None and kept.look_again_s == 1000.5
    gone = decided(expected(1060.5, job="7"), lease=LEASE, now_s=1000.5).revocation
    assert gone.reason is Reason.expected_job and gone.detail == "job 7 at 2026-11-24T02:39:10Z (the whole node)"


def test_nothing_is_begun_that_could_not_load_and_serve_as_long_before_it_has_to_leave() -> None:
    late = decided(expected(1099.0, 8, 1249.0, job="7"))
    assert late.lease is None and late.blocked is Reason.expected_job and late.look_again_s == 1249.0
    assert late.detail == "job 7 at 2026-11-24T02:39:10Z (8 GPUs), and the model has loaded within 20 s"
    assert decided(expected(1100.0, 8, 1250.0, job="7")).granted
    assert decided(expected(1060.0 + 2 * LOAD_ASSUMED_S, job="7"), load_s=None).granted
    unmeasured = decided(expected(1059.0 + 2 * LOAD_ASSUMED_S, job="7"), load_s=None)
    assert unmeasured.blocked is Reason.expected_job and "assumed to load within 300 s" in unmeasured.detail


def test_a_time_that_was_not_understood_ends_nothing_and_begins_nothing() -> None:
    assert decided(expected(None, job="7"), lease=LEASE).revocation is None
    assert decided(expected(None, job="7")).blocked is Reason.expected_job


def test_it_is_said_rather_than_that_evidence_is_missing_so_that_nobody_asks_for_more() -> None:
    assert decided(expected(1010.0, job="7"), evidence=Evidence(grant_why="old")).blocked is Reason.expected_job


@given(st.floats(0, 5000), st.floats(0, 300), st.one_of(st.none(), st.floats(0, 900)))
def test_what_is_begun_is_never_at_once_ended_for_the_same_plan(start_s: float, drain_s: float, load_s: float | None) -> None:
    outlook = Outlook((expected(start_s, job="7"),), drain_s, load_s)
    if not lookahead.begin(outlook, NOW_S).why:
        assert not lookahead.leave(outlook, NOW_S).why or not load_s


def test_a_profile_loads_as_long_as_the_longest_of_its_last_starts() -> None:
    times: lookahead.LoadTimes = {}
    for took_s in (90.0, 10.0, 20.0, 12.0, 11.0, 13.0):
        times = lookahead.measured(times, "big", took_s)
    assert times == {"big": (10.0, 20.0, 12.0, 11.0, 13.0)} and lookahead.load_s(times, "big") == 20.0
    assert lookahead.load_s(times, "other") is None and lookahead.load_s(times, None) is None
