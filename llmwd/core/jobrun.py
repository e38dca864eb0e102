"""One run of a job on this node, as the claims remember it, and what counts for it. Pure."""

import msgspec

from llmwd.core.gres import Failure
from llmwd.messages import JobSeen
from llmwd.vocab import Source

SIMULATED = (Source.sim,)
LISTED = (Source.gresused,)
# A finished or waiting job whose folder is still here is asked again: the same id may run again (requeue).
REASK_FIRST_S = 1.0


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
    user: str = ""
    ends_at: float | None = None


class JobRun:
    """One run of a job on this node. known: what it has, or (unresolved) what the run before it had."""

    def __init__(self, seen: JobSeen, heard_s: float):
        self.seen = seen
        self.heard_s = heard_s  # a resolver that has just been started hears late of what was seen long ago
        self.sign_s = seen.seen_s  # as its sources told it last: a later one means another run
        self.known: frozenset[int] | None = seen.gpus if seen.gpus is None else frozenset(seen.gpus)
        self.resolved_s: float | None = seen.seen_s if seen.gpus is not None else None
        self.off = False  # over, or not begun again, by Slurm's word
        self.covered_s: float | None = None
        self.within: frozenset[int] = frozenset()  # while covered: all it can have
        self.failure: Failure | None = None
        self.why = self.user = ""
        self.ends_at: float | None = None
        self.ask_at_s: float | None = None if self.sim else seen.seen_s
        self.reask_s = REASK_FIRST_S
        self.left_s: float | None = None

    @property
    def sim(self) -> bool:
        return self.seen.sources == SIMULATED

    @property
    def open(self) -> bool:
        """Nothing is known of it: neither what it has, nor within what."""
        return self.resolved_s is None and self.covered_s is None


def another_run(job: JobRun, seen: JobSeen) -> bool:
    """Whether it went and came back between two looks, or what was off or empty shows new signs."""
    if job.off and set(seen.sources) - set(job.seen.sources) or job.seen.empty and not seen.empty:
        return True
    return seen.seen_s > job.sign_s and LISTED not in (seen.sources, job.seen.sources)


def begin(seen: JobSeen, now_s: float, before: JobRun | None) -> JobRun:
    """A job that comes back under its id (requeue, another step) keeps what it had until it is asked again."""
    job = JobRun(seen, now_s)
    if before is not None and not job.sim and job.known is None:
        job.known = (before.known or frozenset()) | before.within
    return job


def stuck(job: JobRun) -> bool:
    """Asked for, and not answered."""
    return job.open and not job.sim and bool(job.failure or job.why)
