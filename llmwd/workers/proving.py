"""The resolver's watch over a release: who saw the job first, when the GPUs are proved free of us, and the budget.

Decided in core/release.py. Nothing here is in the way of a yield: the journal is written after the facts are out.
"""

import time
from collections.abc import Mapping

import msgspec

from llmwd.adapters.rundir import read_fact
from llmwd.core import release
from llmwd.core.lease import Occupant, name_job
from llmwd.core.release import OnGpu, Witnesses
from llmwd.messages import JobsFact, Lease, ReleaseProof, Revocation, ServerFact
from llmwd.vocab import Worker
from llmwd.workers.base import Shell


class Proving:
    """`proof`: how the last release stands, None before the first."""

    def __init__(self, shell: Shell):
        self._shell = shell
        self.proof: ReleaseProof | None = None
        self._revocation: Revocation | None = None
        self._node_saw_s: dict[int, float] = {}
        self._told = True
        self._proved_by = ""
        self._seen: Witnesses | None = None  # who saw the job of this release
        self._written: Witnesses | None = None  # the same, as the journal has it
        self._seen_at_s = 0.0  # of the newest fact about jobs that is in it
        self._overdue: tuple[int, Witnesses] | None = None  # what the journal lacks of the release before: (epoch, who)

    def adopt(self, proof: ReleaseProof | None, revocation: Revocation | None) -> None:
        """Go on where our last incarnation was."""
        self.proof, self._revocation = proof, revocation
        self._told = proof is None or proof.proved_s is not None
        if proof is not None and revocation is not None:
            self._shell.at("witnesses", self.witnesses_at_s(), self._look)  # what that one knew died with it

    def node_uses(self, used: frozenset[int], now_s: float) -> None:
        """What slurmctld says is allocated on the node."""
        self._node_saw_s = {index: self._node_saw_s.get(index, now_s) for index in used}

    def begin(self, lease: Lease, revocation: Revocation) -> None:
        if self._seen != self._written:
            self._overdue = self.proof.epoch, self._seen
        self._seen = self._written = None
        self.proof, self._revocation, self._told = release.begin(lease, revocation), revocation, False

    def name_job(self, occupants: Mapping[str, Occupant]) -> Revocation | None:
        """The last revocation; while its release is not over, a job that was not known yet gets its name (lease.name_job)."""
        if self.proof is not None and self.proof.proved_s is None and self._revocation is not None:
            self._revocation = name_job(self._revocation, self.proof.uuids, occupants)
            self.proof = msgspec.structs.replace(self.proof, job=self._revocation.job)
        return self._revocation

    def follow(self, server: ServerFact | None, lost: bool, shown: Mapping[str, OnGpu] | None, now_s: float) -> bool:
        """Take in what the manager and the driver say; True: the driver is to be asked once more."""
        if self.proof is None or self.proof.proved_s is not None:
            return False
        if server is not None and self._revocation is not None:
            self.proof = release.server_says(self.proof, server, self._revocation.revoked_s, lost)
        self.proof = release.driver_says(self.proof, shown, now_s)
        self._proved_by = release.proved_by(shown)
        return self.proof.gone_s is not None and self.proof.proved_s is None

    def tell(self, budget_s: float, now_s: float) -> None:
        """The journal's line about a release that is newly proved."""
        proof = self.proof
        if proof is None or proof.proved_s is None or self._told:
            return
        self._told = True
        self._shell.journal.write(
            "release_proved", epoch=proof.epoch, gpus=proof.gpus, reason=proof.reason, job=proof.job,
            begun_s=proof.begun_s, gone_s=proof.gone_s, proved_s=proof.proved_s, proved_by=self._proved_by,
            took_s=release.took_s(proof, now_s), budget_s=budget_s, within_budget=release.within_budget(proof, budget_s),
        )  # fmt: skip

    def witnesses_at_s(self) -> float:
        """When a release that begins now is first looked at for its witnesses: at once, for a short job is soon gone."""
        return time.monotonic()

    def tell_witnesses(self, jobs: JobsFact | None) -> None:
        """The journal's lines about who saw the job when: one as soon as somebody is known, and, where more saw it later,
        one when it is gone or all have looked."""
        if self._overdue is not None:
            self._write_seen(*self._overdue)
            self._overdue = None
        gone = False
        # The bus is ahead of the file that a fact is kept in: an older one says nothing.
        if jobs is not None and jobs.at_s >= self._seen_at_s:
            self._seen_at_s = jobs.at_s
            now = release.witnesses(self.proof, self._revocation, jobs.jobs, self._node_saw_s)
            self._seen = release.both_looks(self._seen, now)
            gone = self._seen is not None and now is None
        again_s = release.look_again_s(self._revocation, self._shell.boot.settings.reconcile_s, time.monotonic())
        over = gone or again_s is None
        if self._seen != self._written and (over or self._written is None):
            self._write_seen(self.proof.epoch, self._seen)
            self._written = self._seen
        if not over:
            self._shell.at("witnesses", again_s, self._look)

    def _look(self) -> None:
        envelope = read_fact(self._shell.boot.runtime, Worker.detector)
        self.tell_witnesses(envelope.fact if envelope is not None and isinstance(envelope.fact, JobsFact) else None)

    def _write_seen(self, epoch: int, seen: Witnesses) -> None:
        self._shell.journal.write("job_seen", epoch=epoch, **msgspec.to_builtins(seen))

    def judge(self, shown: Mapping[str, OnGpu] | None, budget_s: float, now_s: float) -> tuple[str, float | None]:
        """(why the budget is broken, "" if it is not; when to look again)."""
        if self.proof is None:
            return "", None
        why = release.broken(self.proof, release.shows_leftovers(self.proof, shown), budget_s, now_s)
        if why:
            left = self.proof.left
            self.proof = msgspec.structs.replace(self.proof, judged=True)
            self._shell.journal.write(
                "budget_broken", epoch=self.proof.epoch, job=self.proof.job, left=left, budget_s=budget_s, detail=why
            )
        return why, release.judge_at_s(self.proof, budget_s)
