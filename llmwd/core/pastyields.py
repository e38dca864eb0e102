"""What the journal tells of each time that GPUs were given back, part by part. Pure.

One release is told by up to six lines with the same lease epoch (lease_granted, lease_revoked, job_seen, released,
release_proved, budget_broken), in this order or nearly so; any of them may be missing. What is not told is None.
"""

from collections.abc import Sequence

import msgspec

from llmwd.core.journaled import Line, number, plain
from llmwd.core.release import JUDGED
from llmwd.core.witnesses import BEFORE_THE_JOB
from llmwd.vocab import Reason, Source

# Sources that see the job itself on the node, and at once. Slurmctld and the prolog speak before there is a process of
# the job (witnesses.BEFORE_THE_JOB), and a slow look at /proc or at the driver may come long after it began.
AT_ONCE = frozenset({Source.stepd, Source.cgroup2, Source.cgroup1, Source.sim})
SLOW = frozenset({Source.procfs, Source.nvml})

# Each part of a release in order, and what it is in words. Field of `Yield` -> meaning.
PARTS = {
    "resolve_s": "GPUs learned after the first sign",
    "revoke_s": "the lease revoked, after that",
    "signal_s": "all processes signalled, after that",
    "model_s": "the model's processes gone, after that",
    "tree_s": "the last process gone, after that",
    "driver_s": "the driver's proof, after that",
    "total_s": "from the first sign to the proof",
}


class Yield(msgspec.Struct, frozen=True, kw_only=True):
    """GPUs given back to somebody: a job, a stranger, the operator, a node in need.

    at: when its first sign arrived, on the axis of core/journaled.py. *_s: seconds, each part from the end of the one
    before; total_s: from the first sign (the revocation, where the sign has no time) to the driver's proof, or to the
    last process's end where no proof is told. overlap_s: at most this long a process of the job and one of ours may
    have been on the node together: from the job's first sign on the node itself, or from the first sign of any kind
    where that came later or is not told, to the end of our last process, whether or not either was using the GPU at
    the time; None where there was no job; 0 where nothing of ours had been started. requests: running and waiting in
    vLLM at its last look before. proved_by: driver, or tree where there was none to ask (the end of the process tree
    is the proof then, and driver_s is not told); empty: not told. ran: a server had been started. ended: nothing of it is left, as far as is told.
    """

    at: float
    epoch: int
    reason: str
    detail: str = ""
    job: str | None = None
    gpus: tuple[int, ...] = ()
    while_phase: str = ""
    simulated: bool = False
    first: str = ""
    lags: dict[str, float] = {}
    resolve_s: float | None = None
    revoke_s: float | None = None
    signal_s: float | None = None
    model_s: float | None = None
    tree_s: float | None = None
    driver_s: float | None = None
    total_s: float | None = None
    overlap_s: float | None = None
    budget_s: float | None = None
    broken: bool = False
    proved: bool = False
    proved_by: str = ""
    killed: bool = False
    requests: int | None = None
    ran: bool = False
    ended: bool = False


class Release(msgspec.Struct):
    """The lines of one release, as they come in. while_phase: what llmwd did last before it began."""

    epoch: int
    gpus: tuple[int, ...] = ()
    started: bool = False
    drilled: bool = False
    while_phase: str = ""
    revoked: Line | None = None
    seen: Line | None = None
    released: Line | None = None
    proved: Line | None = None
    broke: Line | None = None

    @property
    def begun(self) -> bool:
        return bool(self._lines())

    def told(self) -> Yield | None:
        """The yield that it was, None if it was none: nobody waited, or it has not begun."""
        line = self.revoked or self.released or self.proved
        if line is None:
            return None
        reason = line.text("reason")
        job = next((each.text("job") for each in self._lines() if each.text("job")), None)
        if reason == Reason.gpu_in_use and self.seen is not None:
            job = job or self.seen.text("job") or None  # the process on the GPU was a job's, by its cgroup
        if reason not in JUDGED and job is None:
            return None
        begun_s = self._first_s("seen_s", "begun_s", "revoked_s")
        parts = self._parts(begun_s)
        first, lags = self._witnesses()
        broken = self.broke is not None or (self.proved is not None and self.proved.details.get("within_budget") is False)
        requests = self.released.number("requests") if self.released is not None else None
        return Yield(
            at=line.at if begun_s is None else line.at - max(line.mono_s - begun_s, 0.0), epoch=self.epoch, reason=reason,
            detail=line.text("detail"), job=job, gpus=self.gpus, while_phase=self.while_phase,
            simulated=first == Source.sim or self.drilled, first=first, lags=lags, **parts,
            overlap_s=self._overlap_s(begun_s) if job is not None else None, budget_s=self._first_s("budget_s"),
            broken=broken, proved=self.proved is not None, proved_by=self._proved_by, ran=self._ran, ended=not self._ran or self._gone_s() is not None,
            killed=self._first_s("killed_s") is not None, requests=None if requests is None else int(requests),
        )  # fmt: skip

    @property
    def _proved_by(self) -> str:
        return self.proved.text("proved_by") if self.proved is not None else ""

    @property
    def _ran(self) -> bool:
        return self.started or self.released is not None

    def _lines(self) -> Sequence[Line]:
        return [line for line in (self.revoked, self.released, self.proved, self.broke) if line is not None]

    def _first_s(self, *names: str) -> float | None:
        """The first of these numbers that a line tells, the earlier name before the earlier line."""
        for name in names:
            for line in self._lines():
                value = line.number(name)
                if value is not None:
                    return value
        return None

    def _gone_s(self) -> float | None:
        return self._first_s("gone_s", "proved_s")

    def _parts(self, begun_s: float | None) -> dict[str, float | None]:
        seen_s, resolved_s, revoked_s = (self._first_s(name) for name in ("seen_s", "resolved_s", "revoked_s"))
        signalled_s, gone_s, proved_s = (self._first_s(name) for name in ("signalled_s", "gone_s", "proved_s"))
        model_gone_s = self._first_s("model_gone_s")
        return {
            "resolve_s": _between(seen_s, resolved_s),
            "revoke_s": _between(resolved_s, revoked_s),
            "signal_s": _between(revoked_s, signalled_s),
            "model_s": _between(signalled_s, model_gone_s),
            "tree_s": _between(signalled_s if model_gone_s is None else model_gone_s, gone_s),
            "driver_s": _between(gone_s, proved_s) if self._proved_by != "tree" else None,
            "total_s": _between(begun_s, gone_s if proved_s is None else proved_s),
        }

    def _witnesses(self) -> tuple[str, dict[str, float]]:
        if self.seen is None:
            return "", {}
        lags = self.seen.details.get("lags")
        names = lags if isinstance(lags, dict) else {}
        good = {plain(name): lag for name, told in names.items() if (lag := number(told)) is not None and lag >= 0}
        return self.seen.text("first"), good

    def _overlap_s(self, begun_s: float | None) -> float | None:
        if not self._ran:
            return 0.0
        seen_s = self.seen.number("seen_s") if self.seen is not None else None
        if seen_s is None:
            return _between(begun_s, self._gone_s())
        first, lags = self._witnesses()
        at_s = {first: seen_s} | {name: seen_s + lag_s for name, lag_s in lags.items()}
        sign_s = min((when_s for name, when_s in at_s.items() if name in AT_ONCE), default=seen_s)
        # Whoever looks slowly may have looked before the others did.
        sign_s = min([sign_s, *(when_s for name, when_s in at_s.items() if name in SLOW)])
        # What made us leave at once was a sign as well, unless that came before the job.
        if begun_s is not None and first not in BEFORE_THE_JOB:
            sign_s = min(sign_s, begun_s)
        return _between(sign_s, self._gone_s())


def _between(first_s: float | None, last_s: float | None) -> float | None:
    return None if first_s is None or last_s is None else max(0.0, last_s - first_s)
