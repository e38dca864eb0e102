"""Which GPUs Slurm's jobs have on this node, from everything that was seen and answered so far.

Theory of operation. A job is *present* while a source of detection sees it (or slurmctld lists it). A present job's
GPUs are asked for once; until the answer comes it is *pending*, and after RESOLVE_DEADLINE without one it is
*unknown*: it counts as having every GPU. A reading of the node (GresUsed) that began after a job was first
seen *covers* the job: whatever it has is among the GPUs that the node says are used, so one call answers for
any number of arrivals. Only a *quiet* reading does, one that says that nothing completes: a node drops a job's GPUs
when the job begins to complete. For the same reason a GPU counts as used from reading to reading until a quiet
one, and a job that is seen no more is *leaving*: it keeps its GPUs until a quiet reading that began later. Where a
reading cannot be decided (a node may tell only how many GPUs are used), it counts with the listing of the
node's jobs that follows it; what it counts beyond the GPUs of the jobs that are shown belongs to *hidden* ones
(PrivateData), which may have any. A reading that is *unreadable* does not even count: the listing shows what the others
have and not whether there are hidden ones, so it settles nothing and no lease is granted on it. It ends none either: it
is like a slurmctld that does not answer, no sign of anybody, and may stay so for as long as the site has that form.
Unknown is never taken for none.

Indices are Slurm's. No clock in here: every method is told the time.
"""

import msgspec

from llmwd.core.gres import Claim, Failure
from llmwd.core.gres_claim import OVER, WAITING
from llmwd.core.jobrun import LISTED, SIMULATED, JobRun, JobView, another_run, begin, stuck
from llmwd.messages import JobSeen

REASK_MAX_S = 15.0
HIDDEN = "hidden"  # stands for an id in the view of what nobody shows


class NodeReading(msgspec.Struct, frozen=True):
    """One answer about the node. started_s: when it was asked, so what came later is not in it."""

    started_s: float
    claim: Claim


class Claims:
    """The memory behind it all."""

    def __init__(self, resolve_deadline_s: float):
        self.resolve_deadline_s = resolve_deadline_s
        self.trouble = ""  # why slurmctld answers nobody, for those who have no answer of their own
        self.slurm = True  # whether slurmctld is asked at all on this node
        self.reading: NodeReading | None = None
        self._jobs: dict[str, JobRun] = {}
        self._leaving: dict[str, JobRun] = {}
        self._local: dict[str, JobSeen] = {}
        self._listed: dict[str, JobSeen] = {}
        self._asked: dict[str, JobRun] = {}
        self._used: frozenset[int] = frozenset()
        self._used_whole = False  # GPUs of jobs that began to complete before the first reading are not missing in it
        self._left_s = float("-inf")  # when a job left last
        self._hidden_s: float | None = None  # since when the node counts more GPUs than all shown jobs have
        self._listing_due = False  # the latest reading was not decidable, and no listing has come since

    # --- what happened ----------------------------------------------------------------------------------

    def see(self, jobs: tuple[JobSeen, ...], now_s: float) -> None:
        """The detector's latest list."""
        self._local = {job.id: job for job in jobs}
        self._update(now_s)
        self._look_for_hidden(now_s)

    def take_listing(self, ids: frozenset[str], now_s: float) -> None:
        """Jobs that slurmctld says have an allocation here; asked where GresUsed alone cannot decide."""
        self._listed = {id: self._listed.get(id) or JobSeen(id=id, sources=LISTED, seen_s=now_s) for id in ids}
        self._update(now_s)
        if self._listing_due:
            self._listing_due = False
            if not self.unreadable():
                self._used, self._used_whole = frozenset(), True
                self._let_go()
        self._look_for_hidden(now_s)

    def answer(self, id: str, claim: Claim, now_s: float) -> None:
        """What Slurm says of one job that was asked for."""
        job = self._answered(id)
        if job is None:
            return
        job.failure, job.why, job.user, job.ends_at = None, claim.why, claim.user, claim.ends_at
        over = claim.gpus is not None and not claim.completing and bool(OVER & set(claim.states))
        if over and self._leaving.get(id) is job:
            del self._leaving[id]
            return
        if claim.gpus is None:
            job.ask_at_s = self._again(job, now_s)
            return
        if over or WAITING & set(claim.states):
            # Over or not begun by Slurm's word, and still here: it keeps what it had, and is asked again.
            job.known = (job.known or frozenset()) | claim.gpus
            job.off = not claim.completing
            job.ask_at_s = self._again(job, now_s)
            if job.open:
                # Where it is not known to have had any, this proves nothing: the node's reading has to agree.
                job.why = f"Slurm calls it {'+'.join(claim.states)}, and it is still here"
            if not over or not job.known:
                return
        elif job.left_s is None or job.resolved_s is None:
            job.known = claim.gpus
            job.off = False
            # Nothing but an empty folder shows it: nothing will show its end either.
            job.ask_at_s = self._again(job, now_s) if job.seen.empty else None
        if job.resolved_s is None:
            job.resolved_s = now_s
        self._look_for_hidden(now_s)

    def fail(self, id: str, failure: Failure, why: str, now_s: float) -> None:
        """A job that was asked for could not be answered."""
        job = self._answered(id)
        if job is None:
            return
        hidden = failure is Failure.invalid_job
        if hidden and self._leaving.get(id) is job and self._quiet_since(job.left_s):
            del self._leaving[id]  # purged by slurmctld, and nothing completes on the node
            return
        job.failure, job.why = failure, why
        # A job that Slurm hides stays hidden: the node's readings cover it from now on.
        job.ask_at_s = None if hidden and job.covered_s is not None else self._again(job, now_s)

    def read(self, reading: NodeReading, now_s: float) -> None:
        """The node's latest reading."""
        self.reading = reading
        claim = reading.claim
        self._listing_due = claim.gpus is None
        if claim.gpus is not None:
            self._listed = {}  # of another time; this reading has what they have
            self._update(now_s)
        self._look_for_hidden(now_s)
        if claim.gpus is None:
            return
        self._used = claim.gpus | (self._used if claim.completing else frozenset())
        if claim.completing:
            return
        self._used_whole = True
        for job in [*self._jobs.values(), *self._leaving.values()]:
            self._cover(job, now_s)
        self._let_go()

    # --- what follows -----------------------------------------------------------------------------------

    def due(self, now_s: float) -> tuple[str, ...]:
        """Jobs to ask for now: those that nothing is known of first, and of these the ones that are still here."""
        due = [job for job in self._waiting() if job.ask_at_s is not None and job.ask_at_s <= now_s]
        due.sort(key=lambda job: (not job.open, job.left_s is not None, job.resolved_s is not None, job.seen.seen_s))
        return tuple(job.seen.id for job in due)

    def urgent(self) -> int:
        """How many jobs nothing is known of that a new reading may settle: they came, or left, after the last one."""
        started_s = self.reading.started_s if self.reading else float("-inf")
        open_jobs = (job for job in self._waiting() if job.open and not job.sim)
        return sum(1 for job in open_jobs if (job.seen.seen_s if job.left_s is None else job.left_s) >= started_s)

    def next_s(self, now_s: float) -> float | None:
        """When to look again although nothing happened."""
        times = [job.ask_at_s for job in self._waiting() if job.ask_at_s is not None]
        times += [job.heard_s + self.resolve_deadline_s for job in self._waiting() if job.open]
        times += [self._hidden_s + self.resolve_deadline_s] if self._hidden_s is not None else []
        return min((at for at in times if at > now_s), default=None)

    def asked(self, id: str) -> None:
        """This job is being asked for now."""
        job = self._jobs.get(id)
        if job is None or job.sim:
            job = self._leaving.get(id)
        if job is not None:
            job.ask_at_s = None
            self._asked[id] = job

    def unsettled(self) -> bool:
        """Whether the node's readings leave open who has its GPUs: no lease may be granted on them yet."""
        if self.reading is None:
            return False
        half = not self._used_whole and self.reading.claim.completing
        return self._listing_due or half or bool(self.unreadable())

    def unreadable(self) -> str:
        """Why the latest reading tells neither which GPUs are in use nor how many; empty if it does."""
        claim = self.reading.claim if self.reading is not None else None
        return claim.why if claim is not None and claim.gpus is None and claim.used is None else ""

    def reading_wanted(self) -> bool:
        """Whether a fresh reading would settle something: somebody left, is hidden, or nobody answers for a job."""
        started_s = self.reading.started_s if self.reading else float("-inf")
        waits = [job.left_s for job in self._leaving.values()]
        waits += [job.seen.seen_s for job in self._jobs.values() if stuck(job)]
        waits += [self._hidden_s] if self._hidden_s is not None else []
        return self.slurm and any(started_s <= at for at in waits)

    def completing(self) -> bool:
        """Whether somebody still waits for the node to say that nothing completes."""
        noisy = self.reading is not None and self.reading.claim.completing
        return bool(self._leaving) or noisy and any(stuck(job) for job in self._jobs.values())

    def unanswered_leaving(self) -> tuple[str, ...]:
        """Those who left, where the node's reading cannot tell: they have to be asked for one by one."""
        undecided = self.reading is not None and self.reading.claim.gpus is None
        return tuple(self._leaving) if undecided else ()

    def views(self, now_s: float) -> tuple[JobView, ...]:
        """Every job that counts, with what it has."""
        return tuple(
            [self._view(job, now_s) for job in self._jobs.values()]
            + [msgspec.structs.replace(self._view(job, now_s), leaving=True) for job in self._leaving.values()]
            + ([self._hidden_view(now_s)] if self._hidden_s is not None else [])
        )

    def used_by_node(self) -> frozenset[int]:
        """GPUs that slurmctld says are allocated here, or were when something began to complete, whoever has them."""
        return self._used

    # --- within -----------------------------------------------------------------------------------------

    def _view(self, job: JobRun, now_s: float) -> JobView:
        seen = job.seen
        view = JobView(seen.id, job.known, seen.sources, seen_s=seen.seen_s, resolved_s=job.resolved_s, why=job.why)
        view = msgspec.structs.replace(view, user=job.user, ends_at=job.ends_at)
        purged = job.failure is Failure.invalid_job and self._quiet_since(seen.seen_s)
        if seen.empty and (job.off or purged):
            return msgspec.structs.replace(view, gpus=frozenset())  # a leftover folder, by Slurm's word as well
        if job.resolved_s is not None:
            return view
        if job.covered_s is not None:
            return msgspec.structs.replace(view, gpus=job.within, covered=True, resolved_s=job.covered_s)
        if job.sim or now_s >= job.heard_s + self.resolve_deadline_s:
            return msgspec.structs.replace(view, gpus=None, why=job.why or self.trouble)
        return msgspec.structs.replace(view, gpus=job.known or frozenset(), pending=True)

    def _hidden_view(self, now_s: float) -> JobView:
        pending = now_s < self._hidden_s + self.resolve_deadline_s
        why = "Slurm counts more GPUs in use than the jobs that it shows have"
        return JobView(HIDDEN, frozenset() if pending else None, LISTED, pending=pending, seen_s=self._hidden_s, why=why)

    def _look_for_hidden(self, now_s: float) -> None:
        """Compare what the node counts with what the jobs have, once both are of one time and every job is known."""
        if self.reading is None or self.reading.started_s <= self._left_s or self.unreadable():
            return
        jobs = [job for job in self._jobs.values() if not job.sim and not job.off]
        shown = frozenset[int]().union(*(job.known or frozenset() for job in jobs))
        # A job that is being asked for has a deadline of its own.
        hidden = (self.reading.claim.used or 0) > len(shown) and not any(job.open for job in jobs)
        self._hidden_s = (self._hidden_s or now_s) if hidden else None

    def _waiting(self) -> tuple[JobRun, ...]:
        """Jobs that an answer of their own may settle."""
        return (*self._jobs.values(), *(job for job in self._leaving.values() if job.open))

    def _answered(self, id: str) -> JobRun | None:
        """The run that was asked for, unless another one has taken its place."""
        job = self._asked.pop(id, None)
        return job if job is not None and job in (self._jobs.get(id), self._leaving.get(id)) else None

    def _quiet_since(self, at_s: float) -> bool:
        return self.reading is not None and not self.reading.claim.completing and self.reading.started_s > at_s

    def _cover(self, job: JobRun, now_s: float) -> None:
        """With a reading that is decidable, quiet, and began after the first sign of the job."""
        if job.resolved_s is not None or job.sim or not self._quiet_since(job.seen.seen_s):
            return
        if self.reading.claim.gpus is not None:
            job.covered_s = job.covered_s or now_s
            job.known, job.within = None, self.reading.claim.gpus
            if job.failure is Failure.invalid_job:
                job.ask_at_s = None

    def _let_go(self) -> None:
        self._leaving = {id: job for id, job in self._leaving.items() if not self._quiet_since(job.left_s)}

    def _again(self, job: JobRun, now_s: float) -> float:
        at_s = now_s + job.reask_s
        job.reask_s = min(REASK_MAX_S, job.reask_s * 2)
        return at_s

    def _update(self, now_s: float) -> None:
        present = {**self._listed, **self._local}
        for id in [id for id in self._jobs if id not in present]:
            self._leave(id, now_s)
        if not self.slurm:
            self._leaving.clear()  # nobody could say that they are over
        for id, seen in present.items():
            self._take(id, seen, now_s)

    def _leave(self, id: str, now_s: float) -> None:
        job = self._jobs.pop(id)
        self._left_s = now_s
        if self.slurm and not job.sim:
            job.left_s = now_s
            self._leaving[id] = job

    def _take(self, id: str, seen: JobSeen, now_s: float) -> None:
        job = self._jobs.get(id)
        simulated = seen.sources == SIMULATED
        if job is not None and job.sim is not simulated:
            # A real and a simulated job under one id: neither answers for the other.
            self._leave(id, now_s)
            job, seen = None, msgspec.structs.replace(seen, seen_s=now_s)
        if job is None or another_run(job, seen):
            before = self._leaving.pop(id, None) if job is None and not simulated else job
            self._jobs[id] = begin(seen, now_s, before)
            self._cover(self._jobs[id], now_s)  # a reading may have been quicker than the news of the job
        else:
            if seen.gpus is not None:
                job.known = frozenset(seen.gpus)
                job.resolved_s = now_s if job.resolved_s is None else job.resolved_s
            if seen.empty and not job.seen.empty and job.ask_at_s is None:
                job.ask_at_s = now_s  # it may be over by now
            job.sign_s = seen.seen_s
            job.seen = msgspec.structs.replace(seen, seen_s=job.seen.seen_s)
