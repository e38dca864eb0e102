"""The journal's lines about who saw a job, and about a release: from the first sign to the last word."""

import logging
from types import SimpleNamespace

import msgspec
import pytest

from llmwd.core.release import OnGpu
from llmwd.core.witnesses import LAST_LOOK_S
from llmwd.messages import JobSeen, Lease, Revocation, ServerFact
from llmwd.vocab import NodePhase, Phase, Reason
from llmwd.workers.proving import Proving

RECONCILE_S = 3.0
ROUNDS_S = RECONCILE_S + LAST_LOOK_S
SEEN_S, REVOKED_S = 999.9, 1000.0
BUDGET_S = 5.0
LEASE = Lease(epoch=4, gpus=(6, 7), uuids=("A", "B"), granted_s=1.0, expires_s=90.0)


class Shell:
    """Keeps the journal's lines."""

    def __init__(self):
        self.boot = SimpleNamespace(settings=SimpleNamespace(reconcile_s=RECONCILE_S))
        self.log = logging.getLogger("llmwd-test")
        self.journal = self
        self.lines: list[dict[str, object]] = []

    def write(self, event: str, **details: object) -> None:
        self.lines.append({"event": event, **details})

    def seen(self) -> list[tuple[int, str, dict[str, float]]]:
        return [(line["epoch"], line["first"], line["lags"]) for line in self.lines if line["event"] == "job_seen"]


@pytest.fixture
def shell() -> Shell:
    return Shell()


def job(*sources: str, lags_s: tuple[float, ...] = (0.0,), id: str = "77") -> JobSeen:
    return JobSeen(id=id, sources=sources, seen_s=SEEN_S, lags_s=lags_s)


def end(epoch: int = 4, **changes: object) -> Revocation:
    made = Revocation(epoch=epoch, reason=Reason.yielded_to_job, detail="", revoked_s=REVOKED_S, job="77", seen_s=SEEN_S)
    return msgspec.structs.replace(made, **changes)


def begun(shell: Shell, **changes: object) -> Proving:
    proving = Proving(shell)  # type: ignore[arg-type]
    proving.begin(LEASE, end(**changes))
    return proving


def look(proving: Proving, at_s: float, *jobs: JobSeen, used: set[int] | None = None, on: dict[str, set[str]] | None = None) -> None:
    proving.look(jobs, used, (float("-inf"), {}) if on is None else (at_s, on), at_s)


def test_the_first_witness_is_in_the_journal_at_once_and_the_slow_ones_when_the_job_is_over(shell: Shell) -> None:
    proving = begun(shell)
    look(proving, REVOKED_S, job("stepd"))
    assert shell.seen() == [(4, "stepd", {})]
    look(proving, REVOKED_S + 0.5, job("stepd", "procfs", lags_s=(0.0, 0.5)))
    assert len(shell.seen()) == 1  # others may see it yet
    look(proving, REVOKED_S + 1)
    assert shell.seen()[1:] == [(4, "stepd", {"procfs": 0.5})]
    look(proving, REVOKED_S + 2, job("stepd", "cgroup2", lags_s=(0.0, 2.0)))
    assert len(shell.seen()) == 2  # it was over


def test_a_job_that_goes_on_has_its_last_line_once_all_sources_had_their_time(shell: Shell) -> None:
    proving = begun(shell)
    look(proving, REVOKED_S, job("stepd"), used=set(), on={})
    look(proving, REVOKED_S + 2, job("stepd"), used={6}, on={"A": {"77"}, "B": set()})
    look(proving, REVOKED_S + ROUNDS_S - 0.1, job("stepd"), used={6}, on={})
    assert len(shell.seen()) == 1
    look(proving, REVOKED_S + ROUNDS_S, job("stepd"), used={6}, on={})
    assert shell.seen()[1:] == [(4, "stepd", {"gresused": pytest.approx(2.1), "nvml": pytest.approx(2.1)})]
    look(proving, REVOKED_S + ROUNDS_S + 1, job("stepd", "procfs", lags_s=(0.0, 9.0)))
    assert len(shell.seen()) == 2


def test_while_other_prologs_keep_the_job_waiting_each_round_that_tells_more_has_its_line(shell: Shell) -> None:
    proving = begun(shell)
    look(proving, REVOKED_S, job("prolog"), used=set())
    look(proving, REVOKED_S + 1, job("prolog"), used={6})
    look(proving, REVOKED_S + ROUNDS_S, job("prolog"), used={6})
    look(proving, REVOKED_S + 3 * ROUNDS_S, job("prolog"), used={6})
    assert shell.seen() == [(4, "prolog", {}), (4, "prolog", {"gresused": pytest.approx(1.1)})]
    look(proving, REVOKED_S + 90, job("prolog", "stepd", lags_s=(0.0, 90.1)), used={6})
    assert shell.seen()[2:] == [(4, "prolog", {"gresused": pytest.approx(1.1), "stepd": pytest.approx(90.1)})]


def test_what_was_not_written_yet_when_the_next_release_begins_is_not_lost(shell: Shell) -> None:
    proving = begun(shell)
    look(proving, REVOKED_S, job("stepd"))
    look(proving, REVOKED_S + 1, job("stepd", "procfs", lags_s=(0.0, 0.5)))
    proving.begin(msgspec.structs.replace(LEASE, epoch=5), end(epoch=5, job="78"))
    assert len(shell.seen()) == 1  # nothing of this is in the way of a yield
    look(proving, REVOKED_S + 2, job("cgroup2", id="78"))
    assert shell.seen()[1:] == [(4, "stepd", {"procfs": 0.5}), (5, "cgroup2", {})]


def test_the_next_incarnation_goes_on_looking_once_the_detector_has_told_it_the_jobs(shell: Shell) -> None:
    second = Proving(shell)  # type: ignore[arg-type]
    second.adopt(begun(shell).proof, end())
    second.look(None, {6}, (REVOKED_S + 1, {"A": {"77"}}), REVOKED_S + 1)
    assert shell.seen() == []
    look(second, REVOKED_S + 2, job("stepd", "procfs", lags_s=(0.0, 0.5)), used={6}, on={"A": {"77"}})
    assert shell.seen() == [(4, "stepd", {"procfs": 0.5})]  # since when the others saw it, only that one knew
    third = Proving(shell)  # type: ignore[arg-type]
    third.adopt(None, None)
    look(third, REVOKED_S + 3, job("stepd"))
    fourth = Proving(shell)  # type: ignore[arg-type]
    fourth.adopt(begun(shell).proof, end(job=None, reason=Reason.held, seen_s=None))
    look(fourth, REVOKED_S + 4, job("stepd"))
    assert len(shell.seen()) == 1


def test_where_no_job_was_waiting_no_later_job_is_taken_for_it(shell: Shell) -> None:
    proving = begun(shell, reason=Reason.held, job=None, seen_s=None)
    look(proving, REVOKED_S, used={6}, on={})
    look(proving, REVOKED_S + 0.1, job("stepd"), used={6}, on={"A": {"77"}})
    assert shell.seen() == []


@pytest.mark.parametrize(("shown", "by"), [(None, "tree"), ({uuid: OnGpu(at_s=1e12, used_bytes=0) for uuid in ("A", "B")}, "driver")])
def test_a_proof_says_whose_word_it_is_and_one_that_only_the_driver_made_late_breaks_nothing(
    shell: Shell, shown: dict[str, OnGpu] | None, by: str
) -> None:
    proving, revoked_s = begun(shell), REVOKED_S
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
