"""Facts in, notices out."""

import functools
import time
from pathlib import Path

import msgspec
import pytest

from llmwd.core import notices
from llmwd.core.notices import NO_YIELDS, Notice, Seen, Told, after, consider, heard, heard_of_tunnel
from llmwd.messages import GpusFact, Hold, JobClaim, Revocation, ServerFact, TunnelFact, WorkerState
from llmwd.vocab import Event, NodePhase, Phase, Reason, Worker
from tests.workers.harness import server_fact


def gpus_fact(revocation: Revocation | None = None, hold: Hold | None = None) -> GpusFact:
    return GpusFact(
        gpus=(), lease=None, revocation=revocation, claims=(), sources=(), hold=hold, blocked=None, detail="",
        node_states=(), epoch=7, at_s=0.0,
    )  # fmt: skip


def revoked(job: str | None = "42", seen_s: float | None = 100.0, reason: Reason = Reason.yielded_to_job) -> GpusFact:
    return gpus_fact(Revocation(
        epoch=7, reason=reason, detail="job 42 has GPUs 2-3", revoked_s=100.1, job=job, seen_s=seen_s
    ))  # fmt: skip


def tunnel_fact(phase: Phase, detail: str = "", at_s: float = 0.0, hostname: str | None = "llm.example.org", mode: str = "named") -> TunnelFact:
    return TunnelFact(phase=phase, detail=detail, hostname=hostname, since_at=0.0, at_s=at_s, mode=mode)


class Reader:
    """Feeds facts one by one and collects what is told."""

    def __init__(self, told: Told = Told()):
        self.told = told
        self.seen = Seen(node="node7")

    def hear(self, server: ServerFact | None = None, tunnel: TunnelFact | None = None, **facts: object) -> list[Notice]:
        self.seen = msgspec.structs.replace(self.seen, **facts)
        if tunnel is not None:
            self.seen = heard_of_tunnel(self.seen, tunnel)
        if server is not None:
            self.seen = heard(self.seen, server)
        due = consider(self.told, self.seen)
        for notice in due:
            self.told = after(self.told, notice)
        return list(due)

    def title(self, server: ServerFact | None = None, **facts: object) -> str:
        """The title of the one notice that is due."""
        (notice,) = self.hear(server, **facts)
        return notice.title


def test_a_served_model_is_told_once_with_its_gpus_and_address():
    reader = Reader()
    (notice,) = reader.hear(server_fact(NodePhase.serving))
    assert notice.title == "Serving tiny on node7"
    assert notice.message == "org/tiny answers on GPUs 2-3 at http://127.0.0.1:8123"
    assert reader.hear(server_fact(NodePhase.serving)) == []


@pytest.mark.parametrize(
    ("tunnel", "where"),
    [
        (tunnel_fact(Phase.ready), "at https://llm.example.org"),
        (tunnel_fact(Phase.backoff), "at http://127.0.0.1:8123, and will answer at https://llm.example.org once that is connected"),
        (tunnel_fact(Phase.failed), "at http://127.0.0.1:8123"),
        (tunnel_fact(Phase.stopped, mode="none"), "at http://127.0.0.1:8123"),
        (tunnel_fact(Phase.ready, hostname=None, mode="token"), "through the tunnel of node7"),
        (tunnel_fact(Phase.starting, hostname=None, mode="token"), "at http://127.0.0.1:8123, and will answer through the tunnel of node7 once that is connected"),
    ],
)  # fmt: skip
def test_the_public_address_is_told_as_one_that_answers_only_while_the_tunnel_is_connected(tunnel, where):
    (notice, *_) = Reader().hear(server_fact(NodePhase.serving), tunnel=tunnel)
    assert notice.message == f"org/tiny answers on GPUs 2-3 {where}"


def test_a_yield_tells_the_job_and_then_how_long_the_release_took():
    reader = Reader()
    reader.hear(server_fact(NodePhase.serving))
    reader.hear(gpus=revoked())
    (notice,) = reader.hear(server_fact(NodePhase.yielding, at_s=100.2))
    assert notice.title == "Yielding to Slurm job 42 on node7" and notice.hold_s > 0
    assert "GPUs 2-3 are being given back" in notice.message
    (notice,) = reader.hear(server_fact(NodePhase.waiting, at_s=100.43))
    assert notice.title == "Yielded to Slurm job 42 on node7" and notice.hold_s == 0
    assert "GPUs 2-3 were given back 0.43 s after the job was seen" in notice.message
    assert reader.hear(server_fact(NodePhase.waiting, at_s=130.0)) == []
    assert reader.title(server_fact(NodePhase.serving, ready_at=2000.0)) == "Resumed: tiny on node7"


def test_a_yield_tells_whose_job_it_is_where_slurm_tells():
    reader = Reader()
    reader.hear(server_fact(NodePhase.serving))
    claims = (JobClaim(id="41", gpus=(0,), user="bob"), JobClaim(id="42", gpus=(2,), user="ann"))
    gpus = msgspec.structs.replace(revoked(), claims=claims)
    assert reader.title(server_fact(NodePhase.yielding, at_s=100.2), gpus=gpus) == "Yielding to Slurm job 42 of ann on node7"


def test_a_yield_so_quick_that_its_beginning_went_unseen_is_told_all_the_same():
    reader = Reader()
    reader.hear(server_fact(NodePhase.serving))
    (notice,) = reader.hear(server_fact(NodePhase.waiting, at_s=100.25), gpus=revoked())
    assert notice.title == "Yielded to Slurm job 42 on node7" and "0.25 s after" in notice.message


def test_a_yield_without_a_known_job_tells_the_reason():
    reader = Reader()
    (notice,) = reader.hear(
        server_fact(NodePhase.yielding, reason=Reason.gpu_in_use), gpus=revoked(None, None, Reason.gpu_in_use)
    )
    assert notice.title == "Yielding on node7"
    (notice,) = reader.hear(server_fact(NodePhase.waiting, at_s=100.6))
    assert "0.50 s after the decision" in notice.message


def test_a_start_beside_running_jobs_is_no_yield():
    assert Reader().hear(server_fact(NodePhase.waiting, reason=Reason.yielded_to_job)) == []


def test_another_profile_is_told_as_a_switch():
    reader = Reader()
    reader.hear(server_fact(NodePhase.serving))
    assert reader.hear(server_fact(NodePhase.yielding, reason=Reason.switching)) == []
    assert reader.hear(server_fact(NodePhase.loading)) == []
    (notice,) = reader.hear(server_fact(NodePhase.serving, profile="big", ready_at=2000.0))
    assert notice.title == "Switched to big on node7" and "before: tiny" in notice.message


def test_a_server_that_dies_again_and_again_is_told_once_and_when_it_is_back():
    reader = Reader()
    reader.hear(server_fact(NodePhase.serving))
    dead = server_fact(NodePhase.waiting, reason=Reason.server_backoff, detail="exit code 1: CUDA out of memory")
    (notice,) = reader.hear(dead)
    assert notice.alarm and "CUDA out of memory" in notice.message
    assert reader.hear(server_fact(NodePhase.loading)) == []
    assert reader.hear(msgspec.structs.replace(dead, deaths=2)) == []
    assert reader.title(server_fact(NodePhase.serving, ready_at=2000.0)) == "Resumed: tiny on node7"


def test_a_failure_is_an_alarm_with_reason_and_detail():
    (notice,) = Reader().hear(server_fact(NodePhase.failed, reason=Reason.server_failed, detail="exit code 2"))
    assert notice.alarm and Reason.server_failed.meaning[1:] in notice.message and "exit code 2" in notice.message


def test_a_hold_tells_by_whom():
    hold = Hold(since_at=0.0, by="ann")
    (notice,) = Reader().hear(server_fact(NodePhase.held, reason=Reason.held), gpus=gpus_fact(hold=hold))
    assert notice.title == "Held by ann on node7" and "llmwd-ctl resume" in notice.message


def test_what_was_told_before_a_restart_of_the_notifier_is_not_told_again():
    reader = Reader()
    reader.hear(server_fact(NodePhase.serving))
    assert Reader(reader.told).hear(server_fact(NodePhase.serving)) == []


def test_after_a_stop_everything_is_told_anew():
    reader = Reader()
    reader.hear(server_fact(NodePhase.serving))
    reader.hear(tunnel=tunnel_fact(Phase.ready))
    again = Reader(after(reader.told, notices.stopped("node7")))
    assert again.hear(server_fact(NodePhase.stopped)) == []
    assert again.title(server_fact(NodePhase.serving, ready_at=3000.0)) == "Serving tiny on node7"
    assert again.title(tunnel=tunnel_fact(Phase.ready)) == "Tunnel up: https://llm.example.org"


def test_the_tunnel_is_told_when_it_comes_up_fails_and_is_lost_but_not_when_it_follows_the_server():
    reader = Reader()
    reader.hear(server_fact(NodePhase.serving))
    assert reader.hear(tunnel=tunnel_fact(Phase.starting)) == []
    assert reader.title(tunnel=tunnel_fact(Phase.ready)) == "Tunnel up: https://llm.example.org"
    (notice,) = reader.hear(tunnel=tunnel_fact(Phase.starting, "the connection to Cloudflare is lost"))
    assert notice.title.startswith("Tunnel down") and notice.hold_s > 0 and "is lost" in notice.message
    assert reader.title(tunnel=tunnel_fact(Phase.ready)).startswith("Tunnel up")
    reader.hear(server_fact(NodePhase.yielding))
    assert reader.hear(tunnel=tunnel_fact(Phase.draining)) == []
    reader.hear(server_fact(NodePhase.waiting))
    assert reader.hear(tunnel=tunnel_fact(Phase.stopped)) == []
    assert reader.hear(tunnel=tunnel_fact(Phase.starting)) == []
    (notice,) = reader.hear(tunnel=tunnel_fact(Phase.failed, "credentials"))
    assert notice.alarm and notice.title.startswith("Tunnel failed")


@pytest.mark.parametrize(("gpus", "shown"), [((), "its GPUs"), ((3,), "GPU 3"), ((1, 0), "GPUs 0-1"), ((0, 2), "GPUs 0,2")])
def test_gpus_are_named_as_people_write_them(gpus, shown):
    (notice,) = Reader().hear(server_fact(NodePhase.serving, holding=gpus))
    assert f"answers on {shown} at" in notice.message


def test_the_story_of_a_yield_keeps_its_order_whatever_time_it_is():
    reader, start = Reader(), time.monotonic()
    phases = (NodePhase.serving, NodePhase.yielding, NodePhase.waiting, NodePhase.loading)
    told = [n.title.split()[0] for phase in phases for n in reader.hear(server_fact(phase, at_s=start), gpus=revoked())]
    assert told == ["Serving", "Yielding", "Yielded"]


def worker(name: Worker, phase: Phase = Phase.ready, detail: str = "") -> WorkerState:
    return WorkerState(name=name, pid=1, phase=phase, restarts=0, since_at=0.0, detail=detail)


def test_a_worker_in_quarantine_is_an_alarm_told_once_and_its_return_as_well():
    fine = (worker(Worker.detector), worker(Worker.vllm))
    assert consider(Told(), Seen(node="n1", workers=fine)) == ()
    broken = Seen(node="n1", workers=(worker(Worker.detector), worker(Worker.vllm, Phase.failed, "killed by signal 9")))
    (told,) = consider(Told(), broken)
    assert told.alarm and told.title == "In quarantine on n1: vllm"
    assert "killed by signal 9" in told.message and "llmwd-ctl reset" in told.message
    later = after(Told(server="serving:x:1", tunnel="up"), told)
    assert (later.server, later.tunnel) == ("serving:x:1", "up") and consider(later, broken) == ()
    (back,) = consider(later, Seen(node="n1", workers=fine))
    assert not back.alarm and consider(after(later, back), Seen(node="n1", workers=fine)) == ()


def test_a_broken_budget_is_an_alarm_and_no_holds_by_somebody():
    why = "giving back took 9 s"
    held = server_fact(NodePhase.held, reason=Reason.budget_broken, detail=why)
    reader = Reader()
    (notice,) = reader.hear(held)  # before the resolver is heard of, as after a restart of the notifier
    assert reader.hear(held, gpus=gpus_fact(hold=Hold(since_at=0.0, reason=Reason.budget_broken, detail=why))) == []
    assert notice.alarm and notice.event is Event.budget and notice.title == "Budget broken on node7"
    assert "took 9 s" in notice.message and "llmwd-ctl resume" in notice.message


def test_a_lost_tunnel_is_told_during_a_yield_where_the_front_door_answers():
    reader = Reader()
    reader.seen = msgspec.structs.replace(reader.seen, door=True)
    reader.hear(server_fact(NodePhase.serving))
    reader.hear(tunnel=tunnel_fact(Phase.ready))
    reader.hear(server_fact(NodePhase.waiting), gpus=revoked())
    assert reader.title(tunnel=tunnel_fact(Phase.starting)).startswith("Tunnel down")


def test_every_event_but_those_about_notices_comes_from_facts():
    told = {Event.digest, Event.test, Event.back}
    assert {event for event in Event if f"Event.{event.name}" in Path(notices.__file__).read_text()} == set(Event) - told


@pytest.mark.parametrize("reason", sorted(set(Reason) - NO_YIELDS))
def test_whatever_takes_the_gpus_is_told_and_the_return_is_one(reason):
    reader = Reader()
    reader.hear(server_fact(NodePhase.serving))
    told = [reader.title(server_fact(NodePhase.yielding, reason=reason), gpus=revoked(None, None, reason))]
    told.append(reader.title(server_fact(NodePhase.waiting, reason=reason, at_s=101.0)))
    told.append(reader.title(server_fact(NodePhase.serving, ready_at=2000.0)))
    assert [title.split()[0].rstrip(":") for title in told] == ["Yielding", "Yielded", "Resumed"]


def test_a_wish_of_the_operator_and_a_failure_of_its_own_are_no_yields():
    """The list is made by hand; a reason that is new counts as a yield."""
    assert {Reason.memory_pressure, Reason.no_gpus, Reason.map_contradicted, Reason.yielded_to_job}.isdisjoint(NO_YIELDS)
    for reason in (Reason.switching, Reason.stopping, Reason.config_error, Reason.held, Reason.server_failed):
        assert Reader(Told(server="serving:tiny:1.000")).hear(server_fact(NodePhase.yielding, reason=reason)) == []


@pytest.mark.parametrize("mode", ["token", "quick"])
def test_a_tunnel_without_a_hostname_is_told_of_as_well(mode):
    reader = Reader()
    reader.seen = msgspec.structs.replace(reader.seen, door=True)
    fact = functools.partial(tunnel_fact, hostname=None, mode=mode)
    assert reader.title(tunnel=fact(Phase.ready)) == "Tunnel up: the tunnel of node7"
    assert reader.title(tunnel=fact(Phase.backoff)) == "Tunnel down: the tunnel of node7"
    assert reader.title(tunnel=fact(Phase.failed, "credentials")) == "Tunnel failed: the tunnel of node7"


@pytest.mark.parametrize("told", [Told(), Told(server=notices.STOPPED), Told(tunnel="failed")])
def test_a_tunnel_that_does_not_come_up_is_told_after_two_minutes_with_its_last_error(told):
    reader = Reader(told)
    assert reader.hear(tunnel=tunnel_fact(Phase.starting, "connecting", 100.0)) == []
    assert reader.hear(tunnel=tunnel_fact(Phase.backoff, "no srv records", 219.0)) == []
    (notice,) = reader.hear(tunnel=tunnel_fact(Phase.starting, "port 7844 is closed", 221.0))
    assert notice.title == "Tunnel not connected: https://llm.example.org" and "port 7844 is closed" in notice.message
    assert reader.hear(tunnel=tunnel_fact(Phase.backoff, "another", 999.0)) == []
    assert reader.title(tunnel=tunnel_fact(Phase.ready, at_s=1000.0)) == "Tunnel up: https://llm.example.org"


def test_a_tunnel_that_waits_for_the_model_or_is_not_meant_to_be_is_not_missed():
    reader = Reader()
    for at_s in (0.0, 200.0, 400.0):
        assert reader.hear(tunnel=tunnel_fact(Phase.stopped, "waiting for the model", at_s)) == []
        assert reader.hear(tunnel=tunnel_fact(Phase.stopped, "off", at_s, mode="none")) == []
    reader.hear(tunnel=tunnel_fact(Phase.starting, "", 500.0))  # it is counted from here
    assert reader.hear(tunnel=tunnel_fact(Phase.starting, "", 600.0)) == []


def test_a_tunnel_that_a_failed_door_has_stopped_is_down():
    reader = Reader(Told(tunnel="up"))
    reader.seen = msgspec.structs.replace(reader.seen, door=True)
    (notice,) = reader.hear(tunnel=tunnel_fact(Phase.stopped, "waiting for the front door"))
    assert notice.title.startswith("Tunnel down") and "front door" in notice.message and notice.hold_s > 0


def test_a_hold_heard_of_before_the_resolver_waits_for_the_name_and_is_told_once():
    held, hold = server_fact(NodePhase.held, reason=Reason.held), gpus_fact(hold=Hold(since_at=0.0, by="ann"))
    reader = Reader()
    (unnamed,) = reader.hear(held)
    assert unnamed.title == "Held on node7" and unnamed.hold_s > 0
    (named,) = reader.hear(held, gpus=hold)
    assert named.title == "Held by ann on node7" and named.hold_s == 0
    # As after a restart of the notifier: it is known that it was told.
    reader.seen = msgspec.structs.replace(reader.seen, gpus=None)
    assert reader.hear(held) == []
