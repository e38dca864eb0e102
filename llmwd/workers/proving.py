"""The resolver's watch over a release: who saw the job first, when the GPUs are proved free of us, and the budget.

Decided in core/release.py and core/witnesses.py. Nothing here is in the way of a yield: the journal is written after the facts are out.
"""

from collections.abc import Collection, Mapping, Sequence

import msgspec

from llmwd.core import release, witnesses
from llmwd.core.lease import Occupant, name_job
from llmwd.core.release import OnGpu
from llmwd.core.witnesses import Sights, Witnesses
from llmwd.messages import JobSeen, Lease, ReleaseProof, Revocation, ServerFact
from llmwd.workers.base import Shell


class Proving:
    """`proof`: how the last release stands, None before the first."""

    def __init__(self, shell: Shell):
        self._shell = shell
        self.proof: ReleaseProof | None = None
        self._revocation: Revocation | None = None
        self._sights = Sights()
        self._told = True
        self._proved_by = ""
        self._seen: Witnesses | None = None  # who saw the job of this release
        self._written: Witnesses | None = None  # the same, as the journal has it
        self._written_s = float("-inf")
        self._looking = False  # others may see it yet
        self._overdue: tuple[int, Witnesses] | None = None  # what the journal lacks of the release before: (epoch, who)

    def adopt(self, proof: ReleaseProof | None, revocation: Revocation | None) -> None:
        """Go on where our last incarnation was."""
        self.proof, self._revocation = proof, revocation
        self._told = proof is None or proof.proved_s is not None
        self._looking = proof is not None and revocation is not None  # what that one knew died with it

    def begin(self, lease: Lease, revocation: Revocation) -> None:
        if self._seen != self._written:
            self._overdue = self.proof.epoch, self._seen
        self._seen = self._written = None
        self._looking, self._written_s = True, float("-inf")
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

    def look(
        self, jobs: Sequence[JobSeen] | None, used: Collection[int] | None, shown: tuple[float, Mapping[str, Collection[str]]],
        now_s: float,
    ) -> None:
        """Take in who sees which job. The journal has a line about the job of a release as soon as somebody is known, and,
        where more saw it later, others: at most one in each round of the sources, the last when it is gone or all have looked.

        jobs: by detection and the prolog, None: not told yet; used, shown: what slurmctld says is allocated, and Driver.jobs_on().
        """
        read_s, on = shown
        self._sights = witnesses.look(self._sights, used, on if read_s > float("-inf") else None, now_s)
        if self._overdue is not None:
            self._write_seen(*self._overdue)
            self._overdue = None
        if not self._looking or jobs is None:
            return
        reconcile_s = self._shell.boot.settings.reconcile_s
        now = witnesses.witnesses(self.proof, self._revocation, self._seen, jobs, self._sights)
        gone = self._seen is not None and now is None
        self._seen = witnesses.both_looks(self._seen, now)
        over = gone or now_s >= witnesses.looked_until_s(self._revocation, self._seen, reconcile_s)
        if self._seen != self._written and (over or now_s >= self._written_s + witnesses.rounds_s(reconcile_s)):
            self._write_seen(self.proof.epoch, self._seen)
            self._written, self._written_s = self._seen, now_s
        self._looking = not over

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
