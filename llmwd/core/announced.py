"""Jobs that the node's prolog has announced, and for how long its word counts. Pure.

Slurm's prolog knows a job and its GPUs before any other local sign of it. Its word makes the job one that is seen, by
the source `prolog`, with exactly these GPUs. Once another source sees the job as well, it goes when that source loses
it; a sign that is older than the word may be of the same job's last run (requeue), so nothing ends with that one.
A job that no other source ever saw (cancelled in its prolog, or a site on which nothing else works) goes when
slurmctld says that none of its GPUs is used, in a quiet reading that began after the word; without slurmctld's word
it goes after ANNOUNCED_FOR_S, which is long, because a chain of prologs may take minutes before the job's first
process; but never while slurmctld says that one of its GPUs is used.
"""

import msgspec

from llmwd.core.claims import NodeReading
from llmwd.messages import JobSeen
from llmwd.vocab import Source

ANNOUNCED_FOR_S = 600.0


class Word(msgspec.Struct, frozen=True):
    """What the prolog said of one job. met_s: the first sign of it by other sources, as they tell it; None: none yet.
    again: it had said something of the same id before, so older signs are of that run."""

    gpus: frozenset[int]
    said_s: float
    met_s: float | None = None
    again: bool = False


class Announced:
    """The memory of it. Indices are Slurm's; every method is told the time."""

    def __init__(self) -> None:
        self._words: dict[str, Word] = {}

    def __contains__(self, id: str) -> bool:
        return id in self._words

    def announce(self, id: str, gpus: frozenset[int], now_s: float) -> None:
        """The prolog's word, or its new one: the same id may run again (requeue). Without GPUs there is nothing to keep."""
        if gpus:
            self._words[id] = Word(gpus, now_s, again=id in self._words)
        else:
            self._words.pop(id, None)

    def expire(self, reading: NodeReading | None, used: frozenset[int], now_s: float) -> bool:
        """Forget those whose time is over; whether there were any. used: what slurmctld said last is used."""
        over = [id for id, word in self._words.items() if word.met_s is None and _over(word, reading, used, now_s)]
        for id in over:
            del self._words[id]
        return bool(over)

    def next_s(self, now_s: float) -> float | None:
        """When the next one expires, if slurmctld says nothing."""
        ends = [word.said_s + ANNOUNCED_FOR_S for word in self._words.values() if word.met_s is None]
        return min((end for end in ends if end > now_s), default=None)

    def among(self, jobs: tuple[JobSeen, ...]) -> tuple[JobSeen, ...]:
        """All jobs: those that the other sources see now, with the prolog's word added."""
        seen = {job.id: job for job in jobs}
        for id, word in list(self._words.items()):
            job = seen.get(id)
            if word.met_s is not None and (job is None or job.seen_s > word.met_s):
                del self._words[id]  # gone, or gone and back: another run, of which the prolog has said nothing
                continue
            if job is not None and word.met_s is None and job.seen_s >= word.said_s:
                self._words[id] = msgspec.structs.replace(word, met_s=job.seen_s)
            seen[id] = _with_word(id, word, job)
        return tuple(seen.values())


def _over(word: Word, reading: NodeReading | None, used: frozenset[int], now_s: float) -> bool:
    quiet = reading is not None and not reading.claim.completing and reading.claim.gpus is not None
    if quiet and reading.started_s > word.said_s:
        return not word.gpus & reading.claim.gpus
    return now_s >= word.said_s + ANNOUNCED_FOR_S and not word.gpus & used


def _with_word(id: str, word: Word, job: JobSeen | None) -> JobSeen:
    if job is None:
        return JobSeen(id=id, sources=(Source.prolog,), lags_s=(0.0,), seen_s=word.said_s, gpus=tuple(sorted(word.gpus)))
    last_run = word.again and job.seen_s < word.said_s
    first_s = word.said_s if last_run else min(word.said_s, job.seen_s)
    lags_s = [] if last_run else [job.seen_s + lag_s - first_s for lag_s in job.lags_s]
    signs = sorted([(word.said_s - first_s, Source.prolog), *zip(lags_s, job.sources, strict=True)]) if lags_s else None
    return msgspec.structs.replace(
        job, seen_s=first_s, empty=False, gpus=tuple(sorted(word.gpus | set(job.gpus or ()))),
        sources=tuple(name for _, name in signs) if signs else (Source.prolog, *job.sources),
        lags_s=tuple(lag_s for lag_s, _ in signs) if signs else (word.said_s - first_s,),
    )  # fmt: skip
