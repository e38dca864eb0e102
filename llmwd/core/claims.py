"""Which GPUs Slurm's jobs have on this node, from everything that was seen and answered so far.

Theory of operation. A job is *present* while a source of detection sees it (or slurmctld lists it). A present job's
GPUs are asked for once; until the answer comes it is *pending*, and after RESOLVE_DEADLINE without one it is
*unknown*: it counts as having every GPU. A reading of the node (GresUsed) that began after a job was first
seen *covers* the job: whatever it has is among the GPUs that the node says are used, so one call answers for
any number of arrivals. A job that is seen no more is *leaving*: it keeps its GPUs until a reading that began
later says that nothing on the node completes. Unknown is never taken for none.

Indices are Slurm's. No clock in here: every method is told the time.
"""

import msgspec

from llmwd.core.gres import Claim, Failure
from llmwd.core.gres_claim import OVER, WAITING
from llmwd.messages import JobSeen

# A finished or waiting job whose folder is still here is asked again: the same id may run again (requeue).
REASK_FIRST_S = 1.0
REASK_MAX_S = 15.0


class NodeReading(msgspec.Struct, frozen=True):
    """One answer about the node. started_s: when it was asked, so what came later is not in it."""

    started_s: float
    claim: Claim


class JobView(msgspec.Struct, frozen=True):
    """What counts for one job now. gpus None with `blocks`: it may have any GPU."""

    id: str
    gpus: frozenset[int] | None
    sources: tuple[str, ...]
    pending: bool = False  # asked, and not yet too late: no new lease, no yield either
    leaving: bool = False
    covered: bool = False  # not known by itself, but within what the node says is used
    seen_s: float | None = None
    resolved_s: float | None = None
    why: str = ""


class _Job:
    """One run of a job on this node."""

    def __init__(self, seen: JobSeen):
        self.seen = seen
        self.known: frozenset[int] | None = seen.gpus if seen.gpus is None else frozenset(seen.gpus)
        self.resolved_s: float | None = seen.seen_s if seen.gpus is not None else None
        self.over = False
        self.covered_s: float | None = None
        self.within: frozenset[int] = frozenset()  # while covered: all it can have
        self.failure: Failure | None = None
        self.why = ""
        self.ask_at_s: float | None = None if self.sim else seen.seen_s
        self.reask_s = REASK_FIRST_S
        self.left_s: float | None = None

    @property
    def sim(self) -> bool:
        return self.seen.sources == ("sim",)


class Claims:
    """The memory behind it all."""

    def __init__(self, resolve_deadline_s: float):
        self.resolve_deadline_s = resolve_deadline_s
        self.slurm = True  # whether slurmctld is asked at all on this node
        self.reading: NodeReading | None = None
        self._jobs: dict[str, _Job] = {}
        self._leaving: dict[str, _Job] = {}
        self._local: dict[str, JobSeen] = {}
        self._listed: dict[str, JobSeen] = {}

    # --- what happened ----------------------------------------------------------------------------------

    def see(self, jobs: tuple[JobSeen, ...], now_s: float) -> None:
        """The detector's latest list."""
        self._local = {job.id: job for job in jobs}
        self._update(now_s)

    def list(self, ids: frozenset[str], now_s: float) -> None:
        """Jobs that slurmctld says have an allocation here; asked where GresUsed alone cannot decide."""
        self._listed = {
            id: self._listed.get(id) or JobSeen(id=id, sources=("gresused",), seen_s=now_s) for id in ids
        }
        self._update(now_s)

    def answer(self, id: str, claim: Claim, now_s: float) -> None:
        """What Slurm says of one job that was asked for."""
        job = self._jobs.get(id) or self._leaving.get(id)
        if job is None:
            return
        job.failure, job.why = None, claim.why
        finished = claim.gpus is not None and not claim.completing and bool(OVER & set(claim.states))
        if id in self._leaving:
            if finished:
                del self._leaving[id]
            return
        if claim.gpus is None:
            job.ask_at_s = self._again(job, now_s)
            return
        dormant = finished or bool(WAITING & set(claim.states))
        if dormant:
            # Over or not begun by Slurm's word, and still here: it keeps what it had, and is asked again.
            job.known = (job.known or frozenset()) | claim.gpus
            job.over = finished
            job.ask_at_s = self._again(job, now_s)
            if not finished:
                return
        else:
            job.known = claim.gpus
            job.over = False
            job.ask_at_s = None
        if job.resolved_s is None:
            job.resolved_s = now_s

    def fail(self, id: str, failure: Failure, why: str, now_s: float) -> None:
        """A job that was asked for could not be answered."""
        job = self._jobs.get(id)
        if job is None:
            if failure is Failure.invalid_job and self.slurm and id in self._leaving and self._settled():
                del self._leaving[id]  # purged by slurmctld, and nothing completes on the node
            return
        job.failure, job.why = failure, why
        job.ask_at_s = self._again(job, now_s)

    def read(self, reading: NodeReading, now_s: float) -> None:
        """The node's latest reading."""
        self.reading = reading
        if reading.claim.gpus is None:
            return
        for job in [*self._jobs.values(), *self._leaving.values()]:
            if reading.started_s >= job.seen.seen_s and job.resolved_s is None:
                # Kept from reading to reading: the node drops a job's GPUs when the job begins to complete.
                job.covered_s = job.covered_s or now_s
                job.within |= reading.claim.gpus - self._explained()
        if not reading.claim.completing:
            for id, job in list(self._leaving.items()):
                if reading.started_s >= job.left_s:
                    del self._leaving[id]

    # --- what follows -----------------------------------------------------------------------------------

    def due(self, now_s: float) -> tuple[str, ...]:
        """Jobs to ask for now, those that nothing is known of first."""
        due = [job for job in self._jobs.values() if job.ask_at_s is not None and job.ask_at_s <= now_s]
        due.sort(key=lambda job: (job.resolved_s is not None, job.covered_s is not None, job.seen.seen_s))
        return tuple(job.seen.id for job in due)

    def urgent(self) -> int:
        """How many jobs nothing at all is known of."""
        return sum(1 for job in self._jobs.values() if job.resolved_s is None and job.covered_s is None and not job.sim)

    def next_s(self, now_s: float) -> float | None:
        """When to look again although nothing happened."""
        times = [job.ask_at_s for job in self._jobs.values() if job.ask_at_s is not None]
        times += [
            job.seen.seen_s + self.resolve_deadline_s
            for job in [*self._jobs.values(), *self._leaving.values()]
            if job.resolved_s is None and job.covered_s is None
        ]
        return min((at for at in times if at > now_s), default=None)

    def asked(self, id: str) -> None:
        if id in self._jobs:
            self._jobs[id].ask_at_s = None

    def reading_wanted(self) -> bool:
        """Whether a fresh reading would settle something: somebody left, or nobody answers for a job."""
        started_s = self.reading.started_s if self.reading else float("-inf")
        waits = [job.left_s for job in self._leaving.values()]
        waits += [
            job.seen.seen_s for job in self._jobs.values() if job.resolved_s is None and (job.failure or job.why)
        ]
        return self.slurm and any(started_s < at for at in waits)

    def completing(self) -> bool:
        """Whether somebody who left still waits for the node to say that nothing completes."""
        return bool(self._leaving)

    def unanswered_leaving(self) -> tuple[str, ...]:
        """Those who left, where the node's reading cannot tell: they have to be asked for one by one."""
        undecided = self.reading is not None and self.reading.claim.gpus is None
        return tuple(self._leaving) if undecided else ()

    def views(self, now_s: float) -> tuple[JobView, ...]:
        """Every job that counts, with what it has."""
        return tuple(
            [self._view(job, now_s) for job in self._jobs.values()]
            + [msgspec.structs.replace(self._view(job, now_s), leaving=True) for job in self._leaving.values()]
        )

    def used_by_node(self) -> frozenset[int]:
        """GPUs that slurmctld says are allocated here, whoever has them."""
        return self._used() or frozenset()

    # --- within -----------------------------------------------------------------------------------------

    def _view(self, job: _Job, now_s: float) -> JobView:
        seen = job.seen
        view = JobView(seen.id, job.known, seen.sources, seen_s=seen.seen_s, resolved_s=job.resolved_s, why=job.why)
        if job.over and seen.empty:
            return msgspec.structs.replace(view, gpus=frozenset())  # a leftover folder, by Slurm's word as well
        if job.resolved_s is not None:
            return view
        if job.covered_s is not None:
            within = job.within | (job.known or frozenset())
            return msgspec.structs.replace(view, gpus=within, covered=True, resolved_s=job.covered_s)
        if job.sim or now_s - seen.seen_s >= self.resolve_deadline_s:
            return msgspec.structs.replace(view, gpus=None)
        return msgspec.structs.replace(view, gpus=job.known or frozenset(), pending=True)

    def _explained(self) -> frozenset[int]:
        """GPUs that jobs have of which it is known exactly what they have."""
        known = [job.known or frozenset() for job in self._jobs.values() if job.resolved_s is not None]
        return frozenset().union(*known)

    def _used(self) -> frozenset[int] | None:
        return self.reading.claim.gpus if self.reading else None

    def _settled(self) -> bool:
        return self.reading is not None and not self.reading.claim.completing

    def _again(self, job: _Job, now_s: float) -> float:
        at_s = now_s + job.reask_s
        job.reask_s = min(REASK_MAX_S, job.reask_s * 2)
        return at_s

    def _update(self, now_s: float) -> None:
        present = {**self._listed, **self._local}
        for id, seen in present.items():
            job = self._jobs.get(id)
            if job is None:
                self._jobs[id] = self._new(seen, self._leaving.pop(id, None))
            elif seen.seen_s > job.seen.seen_s and job.seen.sources != ("gresused",):
                self._jobs[id] = self._new(seen, job)  # it went and came back between two looks: another run
            else:
                if seen.gpus is not None:
                    job.known, job.resolved_s = frozenset(seen.gpus), seen.seen_s
                job.seen = msgspec.structs.replace(seen, seen_s=min(seen.seen_s, job.seen.seen_s))
        for id in [id for id in self._jobs if id not in present]:
            job = self._jobs.pop(id)
            if self.slurm and not job.sim:
                job.left_s = now_s
                self._leaving[id] = job

    def _new(self, seen: JobSeen, before: _Job | None) -> _Job:
        """A job that comes back under its id (requeue, another step) keeps what it had until it is asked again."""
        job = _Job(seen)
        if before is not None and job.known is None and not job.sim:
            job.known = before.known
        return job
