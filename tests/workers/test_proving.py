"""The journal's lines about who saw a job, and about a release: from the first sign to the last word."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from llmwd.adapters import rundir
from llmwd.core.release import LAST_LOOK_S, OnGpu
from llmwd.messages import Envelope, JobSeen, JobsFact, Lease, Revocation, ServerFact
from llmwd.vocab import NodePhase, Phase, Reason, Worker
from llmwd.workers.proving import Proving

RECONCILE_S = 3.0
BUDGET_S = 5.0
LEASE = Lease(epoch=4, gpus=(6, 7), uuids=("A", "B"), granted_s=1.0, expires_s=90.0)


class Shell:
    """Keeps the journal's lines and the timers; `fire` runs one."""

    def __init__(self, runtime: Path):
        self.boot = SimpleNamespace(runtime=runtime, settings=SimpleNamespace(reconcile_s=RECONCILE_S))
        self.log = logging.getLogger("llmwd-test")
        self.journal = self
        self.lines: list[dict[str, object]] = []
        self.timers: dict[str, tuple[float, Callable[[], None]]] = {}

    def write(self, event: str, **details: object) -> None:
        self.lines.append({"event": event, **details})

    def at(self, name: str, when_s: float, callback: Callable[[], None]) -> None:
        self.timers[name] = (when_s, callback)

    def fire(self, name: str) -> None:
        self.timers.pop(name)[1]()

    def seen(self) -> list[tuple[int, str, dict[str, float]]]:
        return [(line["epoch"], line["first"], line["lags"]) for line in self.lines if line["event"] == "job_seen"]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    (tmp_path / "facts").mkdir()
    return Shell(tmp_path)


def jobs(*seen: JobSeen) -> JobsFact:
    return JobsFact(jobs=seen, sources=(), scanned=True, at_s=time.monotonic())


def keep(shell: Shell, fact: JobsFact) -> None:
    envelope = Envelope(sender=Worker.detector, pid=1, epoch=1, seq=1, fact=fact)
    rundir.retain_fact(shell.boot.runtime, Worker.detector, msgspec.msgpack.encode(envelope))


def job(seen_s: float, *sources: str, lags_s: tuple[float, ...] = (), id: str = "77") -> JobSeen:
    return JobSeen(id=id, sources=sources, seen_s=seen_s, lags_s=lags_s or (0.0,) * len(sources))


def end(revoked_s: float, epoch: int = 4, **changes: object) -> Revocation:
    made = Revocation(epoch=epoch, reason=Reason.yielded_to_job, detail="", revoked_s=revoked_s, job="77", seen_s=revoked_s - 0.1)
    return msgspec.structs.replace(made, **changes)


def begun(shell: Shell, revoked_s: float | None = None, **changes: object) -> tuple[Proving, float]:
    revoked_s = time.monotonic() if revoked_s is None else revoked_s
    proving = Proving(shell)  # type: ignore[arg-type]
    proving.begin(LEASE, end(revoked_s, **changes))
    return proving, revoked_s


def test_the_first_witness_is_in_the_journal_at_once_and_the_slow_ones_when_the_job_is_over(shell: Shell) -> None:
    proving, revoked_s = begun(shell)
    assert proving.witnesses_at_s() <= time.monotonic()
    proving.tell_witnesses(jobs(job(revoked_s - 0.1, "stepd")))
    assert shell.seen() == [(4, "stepd", {})]
    keep(shell, jobs(job(revoked_s - 0.1, "stepd", "procfs", lags_s=(0.0, 0.5))))
    shell.fire("witnesses")
    assert len(shell.seen()) == 1  # others may see it yet
    keep(shell, jobs())
    shell.fire("witnesses")
    assert shell.seen()[1:] == [(4, "stepd", {"procfs": 0.5})] and "witnesses" not in shell.timers


def test_a_job_that_goes_on_has_its_last_line_once_all_sources_had_their_time(shell: Shell) -> None:
    proving, revoked_s = begun(shell, time.monotonic() - RECONCILE_S - LAST_LOOK_S + 0.5)
    proving.tell_witnesses(jobs(job(revoked_s - 0.1, "stepd")))
    proving.node_uses(frozenset({6}), revoked_s + 2)
    shell.fire("witnesses")  # nothing new is kept: it waits
    assert "witnesses" in shell.timers
    proving, revoked_s = begun(shell, time.monotonic() - RECONCILE_S - LAST_LOOK_S)
    proving.node_uses(frozenset({6}), revoked_s + 2)
    shell.timers.clear()
    proving.tell_witnesses(jobs(job(revoked_s - 0.1, "stepd")))
    assert shell.seen()[-1] == (4, "stepd", {"gresused": pytest.approx(2.1)}) and not shell.timers


def test_a_fact_that_was_kept_before_the_one_that_the_bus_told_says_nothing(shell: Shell) -> None:
    proving, revoked_s = begun(shell)
    keep(shell, jobs())
    proving.tell_witnesses(jobs(job(revoked_s - 0.1, "stepd")))
    shell.fire("witnesses")
    assert "witnesses" in shell.timers  # it does not count as gone
    keep(shell, jobs(job(revoked_s - 0.1, "stepd", "cgroup2", lags_s=(0.0, 0.2))))
    shell.fire("witnesses")
    keep(shell, jobs())
    shell.fire("witnesses")
    assert shell.seen()[-1] == (4, "stepd", {"cgroup2": pytest.approx(0.2)})


def test_what_was_not_written_yet_when_the_next_release_begins_is_not_lost(shell: Shell) -> None:
    proving, revoked_s = begun(shell)
    proving.tell_witnesses(jobs(job(revoked_s - 0.1, "stepd")))
    keep(shell, jobs(job(revoked_s - 0.1, "stepd", "procfs", lags_s=(0.0, 0.5))))
    shell.fire("witnesses")
    proving.begin(msgspec.structs.replace(LEASE, epoch=5), end(revoked_s, epoch=5, job="78"))
    assert len(shell.seen()) == 1  # nothing of this is in the way of a yield
    proving.tell_witnesses(jobs(job(revoked_s - 0.1, "cgroup2", id="78")))
    assert shell.seen()[1:] == [(4, "stepd", {"procfs": 0.5}), (5, "cgroup2", {})]


def test_the_next_incarnation_goes_on_looking(shell: Shell) -> None:
    first, revoked_s = begun(shell)
    keep(shell, jobs(job(revoked_s - 0.1, "stepd", "procfs", lags_s=(0.0, 0.5))))
    second = Proving(shell)  # type: ignore[arg-type]
    second.adopt(first.proof, end(revoked_s))
    shell.fire("witnesses")
    assert shell.seen() == [(4, "stepd", {"procfs": 0.5})]
    Proving(shell).adopt(None, None)  # type: ignore[arg-type]


def test_where_no_job_was_waiting_no_later_job_is_taken_for_it(shell: Shell) -> None:
    proving, revoked_s = begun(shell, reason=Reason.held, job=None, seen_s=None)
    proving.tell_witnesses(jobs(job(revoked_s + 0.1, "stepd")))
    assert shell.seen() == [] and "witnesses" not in shell.timers


@pytest.mark.parametrize(("shown", "by"), [(None, "tree"), ({uuid: OnGpu(at_s=1e12, used_bytes=0) for uuid in ("A", "B")}, "driver")])
def test_a_proof_says_whose_word_it_is_and_one_that_only_the_driver_made_late_breaks_nothing(
    shell: Shell, shown: dict[str, OnGpu] | None, by: str
) -> None:
    proving, revoked_s = begun(shell, time.monotonic() - 60)
    fact = ServerFact(
        profile="glm", model_name="org/GLM", served_as="glm", wanted_gpus=2, phase=Phase.stopped, node_phase=NodePhase.waiting,
        reason=Reason.yielded_to_job, detail="", since_at=60.0, holding=(), heard_s=revoked_s + 1, at_s=revoked_s + 1,
    )  # fmt: skip
    proving.follow(fact, False, {}, revoked_s + 50)
    assert proving.judge({}, BUDGET_S, revoked_s + 50)[0] == ""
    proving.follow(fact, False, shown, revoked_s + 58)
    proving.tell(BUDGET_S, revoked_s + 58)
    line, = shell.lines
    assert (line["event"], line["proved_by"], line["within_budget"]) == ("release_proved", by, True)
    assert proving.judge(shown, BUDGET_S, revoked_s + 58)[0] == ""
