"""Who saw the job that ended a lease: the first witness, and by how much the others lagged. Pure.

Three kinds of witnesses. The sources of detection tell their times with the job (JobSeen), and so does the prolog, whose
word core/announced.py joins to theirs. Two others are asked by the resolver, whatever job there is: slurmctld, which
names GPUs of the node and no job, and the driver, which names processes and by their cgroups the jobs. What these said
is kept from reading to reading, for either may have said it before there was a release. What was there at the first
reading of all has been there since nobody knows when, and is no witness.

Usually the revocation names the job. Where slurmctld's reading came first it is the job that appears then, and where the
driver's list did, the one whose process it showed on our GPUs.
"""

from collections.abc import Collection, Mapping, Sequence

import msgspec

from llmwd.core.announced import ANNOUNCED_FOR_S
from llmwd.messages import JobSeen, ReleaseProof, Revocation
from llmwd.vocab import Reason, Source

# These speak of a job that may have no process yet: with a chain of prologs, minutes before it has one.
BEFORE_THE_JOB = frozenset({Source.gresused, Source.prolog})
# Where slurmctld's reading came first it names no job: the one that appears within this time is it.
SAME_JOB_WITHIN_S = 30.0
# The slow sources look once in RECONCILE; so long may the look itself take.
LAST_LOOK_S = 5.0


class Sights(msgspec.Struct, frozen=True, kw_only=True):
    """What slurmctld and the driver say now, each part of it since when (None: since before the first reading).

    node: Slurm's indices of the GPUs that are allocated; driver: (UUID, job) where the driver lists a process of the job
    on that GPU. None: they have said nothing yet."""

    node: Mapping[int, float | None] | None = None
    driver: Mapping[tuple[str, str], float | None] | None = None


class Witnesses(msgspec.Struct, frozen=True):
    """Who saw the job. lags: source -> seconds after `first`, which saw it at `seen_s`."""

    job: str
    first: str
    seen_s: float
    lags: dict[str, float]


def look(before: Sights, used: Collection[int] | None, on: Mapping[str, Collection[str]] | None, now_s: float) -> Sights:
    """With what slurmctld says is allocated and with the jobs that the driver shows on each GPU (UUID). None: no reading."""
    pairs = None if on is None else [(uuid, job) for uuid, jobs in on.items() for job in jobs]
    return Sights(node=_since(before.node, used, now_s), driver=_since(before.driver, pairs, now_s))


def _since(before: Mapping | None, found: Collection | None, now_s: float) -> Mapping | None:
    if found is None:
        return before  # not seeing is no news
    first_s = None if before is None else now_s
    return {each: (before or {}).get(each, first_s) for each in found}


def witnesses(
    proof: ReleaseProof, revocation: Revocation, before: Witnesses | None, jobs: Sequence[JobSeen], sights: Sights
) -> Witnesses | None:
    """Who sees the job, and since when; None where it cannot be told which job it was, or nobody sees it any more.

    before: what earlier looks at the same release told.
    """
    job = revocation.job or (before.job if before is not None else _which(proof, revocation, jobs, sights))
    if job is None:
        return None
    seen = next((each for each in jobs if each.id == job), None)
    at_s = {} if seen is None else {source: seen.seen_s + lag_s for source, lag_s in zip(seen.sources, seen.lags_s, strict=False)}
    shown_s = [since_s for (_, id), since_s in (sights.driver or {}).items() if id == job and since_s is not None]
    if shown_s:
        at_s[Source.nvml.value] = min(shown_s)
    told_s = [since_s for index, since_s in (sights.node or {}).items() if index in proof.gpus and since_s is not None]
    if at_s and told_s:
        at_s[Source.gresused.value] = min(told_s)
    return _in_order(job, at_s) if at_s else None


def _which(proof: ReleaseProof, revocation: Revocation, jobs: Sequence[JobSeen], sights: Sights) -> str | None:
    """The job of a release that names none, if there is one and no other."""
    driver = {pair: since_s for pair, since_s in (sights.driver or {}).items() if pair[0] in proof.uuids and since_s is not None}
    if revocation.reason is Reason.yielded_to_job:
        found = {job.id for job in jobs if _with_it(job.seen_s, revocation)}
        found = found or {job for (_, job), since_s in driver.items() if _with_it(since_s, revocation)}
    elif revocation.reason is Reason.gpu_in_use:
        # What the driver showed when it was decided; a job that came to the GPUs afterwards is another's.
        found = {job for (_, job), since_s in driver.items() if since_s <= revocation.revoked_s}
    else:
        found = set()
    return found.pop() if len(found) == 1 else None


def _with_it(seen_s: float, revocation: Revocation) -> bool:
    return 0 <= seen_s - revocation.revoked_s < SAME_JOB_WITHIN_S


def _in_order(job: str, at_s: Mapping[str, float]) -> Witnesses:
    first = min(at_s, key=at_s.__getitem__)
    return Witnesses(job, first, at_s[first], {source: when_s - at_s[first] for source, when_s in at_s.items() if source != first})


def both_looks(before: Witnesses | None, now: Witnesses | None) -> Witnesses | None:
    """What two looks tell together: each source by its earlier sight, also one that has lost the job meanwhile. Another
    job is the one that the revocation has been found to be for."""
    if before is None or now is None or before.job != now.job:
        return now or before
    at_s = _sights(now)
    for source, when_s in _sights(before).items():
        at_s[source] = min(when_s, at_s.get(source, when_s))
    return _in_order(now.job, at_s)


def _sights(seen: Witnesses) -> dict[str, float]:
    return {seen.first: seen.seen_s} | {source: seen.seen_s + lag_s for source, lag_s in seen.lags.items()}


def rounds_s(reconcile_s: float) -> float:
    """How long it takes until every source has had its turn."""
    return reconcile_s + LAST_LOOK_S


def looked_until_s(revocation: Revocation, seen: Witnesses | None, reconcile_s: float) -> float:
    """Until when it is looked who else sees the job: from its first sign on the node on, each source has one turn."""
    if seen is None:
        waits = revocation.job is not None or revocation.reason is Reason.yielded_to_job
        return revocation.revoked_s + (rounds_s(reconcile_s) if waits else 0.0)
    here_s = [when_s for source, when_s in _sights(seen).items() if source not in BEFORE_THE_JOB]
    if not here_s:
        return revocation.revoked_s + ANNOUNCED_FOR_S
    return max(revocation.revoked_s, min(here_s)) + rounds_s(reconcile_s)
