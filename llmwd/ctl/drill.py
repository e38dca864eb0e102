"""`drill`: a simulated job takes the GPUs of the model that really runs; what the release took, against YIELD_BUDGET."""

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click
import msgspec

from llmwd.adapters.journal import Journal, JournalTail
from llmwd.adapters.rundir import Dirs
from llmwd.core.journaled import Line, read
from llmwd.core.pastyields import PARTS, Release, Yield
from llmwd.core.release import within_budget
from llmwd.core.telling import spell_s
from llmwd.core.wording import name_gpus, spell_gpus
from llmwd.ctl.arguments import DURATION, GPUS, Gpus, as_json
from llmwd.ctl.place import Look, Running, find_place, look, require_running, watch
from llmwd.ctl.program import Refusal, examples
from llmwd.ctl.simulate import sim_folder, write_job, written_settings
from llmwd.messages import ReleaseProof
from llmwd.vocab import Exit, NodePhase, Source

LAST_LINES_WITHIN_S = 2.0  # the journal is written after the facts
OVER_AFTER_S = 5.0  # beyond --within a job that we could not remove ends by itself
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TOLD_BY = {"lease_revoked": "revoked", "released": "released", "release_proved": "proved", "budget_broken": "broke", "job_seen": "seen"}


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What `drill --json` prints. *_s are seconds; parts as in `report --json` (null: not told); back_s: from the
    simulated job's end until the model answered again, null where that was not waited for."""

    job: str
    gpus: tuple[int, ...]
    while_phase: str
    epoch: int
    passed: bool
    verdict: str
    took_s: float | None
    budget_s: float
    parts: dict[str, float | None]
    requests: int | None
    back_s: float | None = None


class AllOrGpus(Gpus):
    """`all`, or a list of GPUs."""

    def convert(self, value, param, ctx) -> tuple[int, ...] | None:
        return None if value is None or value == "all" else GPUS.convert(value, param, ctx)


@click.command(epilog=examples("llmwd-ctl drill", "llmwd-ctl drill --while loading --no-wait"))
@click.option("--while", "phase", type=click.Choice(["serving", "loading"]), default="serving", show_default=True, help="When to strike.")
@click.option("--gpus", type=AllOrGpus(), help="The simulated job's GPUs: 6-7, or all (the default).")
@click.option("--within", "within_s", type=DURATION, default=60.0, show_default=True, help="How long to wait for the release.")
@click.option("--wait/--no-wait", default=True, help="Whether to wait until the model answers again (the default).")
@click.option("--timeout", "back_within_s", type=DURATION, default=1800.0, show_default=True, help="How long to wait for that.")
@as_json()
@click.pass_context
def drill(ctx: click.Context, phase: str, gpus: tuple[int, ...] | None, within_s: float, wait: bool, back_within_s: float, as_json: bool) -> None:
    """Prove that GPUs are given back in time: a simulated job arrives while the model really runs.

    Everything but the job is real: the model leaves, requests under way are cut, and it is loaded again afterwards.
    With --while loading, a first job makes it load again, and a second one strikes then. Exit code 1 if the release
    took longer than YIELD_BUDGET or did not come.
    """
    for number in ENDINGS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, _end_once)
    dirs = find_place()
    stage = Stage(dirs, require_running(dirs), within_s)
    chosen = stage.choose(gpus)
    outcome = _while_loading(stage, chosen, back_within_s) if phase == NodePhase.loading else stage.strike(chosen, NodePhase.serving)
    if not as_json:
        _show(outcome)
    if wait and outcome.passed:
        outcome = msgspec.structs.replace(outcome, back_s=stage.until(NodePhase.serving, back_within_s))
        if not as_json:
            click.echo(f"the model answers again, {spell_s(outcome.back_s)} after the simulated job's end")
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(outcome)).decode())
    ctx.exit(Exit.done if outcome.passed else Exit.refused)


def _end_once(number: int, frame: FrameType | None) -> None:
    """All of them end it like Ctrl-C. A second one changes nothing: it could come while the job is being removed."""
    for each in ENDINGS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def _while_loading(stage: "Stage", gpus: tuple[int, ...], back_within_s: float) -> Outcome:
    if stage.look().status.phase != NodePhase.loading:
        click.echo("a first simulated job makes the model load again", err=True)
        first = stage.strike(gpus, NodePhase.serving)
        if not first.passed:
            return first
        stage.until(NodePhase.loading, back_within_s, first.epoch)
    return stage.strike(gpus, NodePhase.loading)


def _show(outcome: Outcome) -> None:
    for part, meant in PARTS.items():
        if outcome.parts.get(part) is not None:
            click.echo(f"  {spell_s(outcome.parts[part]):>8}  {meant}")
    if outcome.requests:
        click.echo(f"  {outcome.requests:>8}  requests under way were cut")
    click.echo(outcome.verdict)


class Stage:
    """The running llmwd, and where simulated jobs are put. Refusal where a drill cannot be."""

    def __init__(self, dirs: Dirs, running: Running, within_s: float):
        self.dirs, self.running, self.within_s = dirs, running, within_s
        seen = self.look()
        if not any(source.name == Source.sim and source.works for source in seen.status.sources):
            why = [source.why for source in seen.status.sources if source.name == Source.sim and source.why]
            raise Refusal(f"nobody looks at simulated jobs here ({why[0] if why else 'DETECTION does not name sim'}), so there can be no drill")
        settings = written_settings(dirs, seen)
        self.folder, self._written_budget_s = sim_folder(dirs, settings), settings.yield_budget_s

    def look(self) -> Look:
        return look(self.dirs, self.running)

    def choose(self, gpus: tuple[int, ...] | None) -> tuple[int, ...]:
        known = tuple(gpu.index for gpu in self.look().status.gpus)
        if gpus is None:
            return known
        if not set(gpus) <= set(known):
            raise Refusal(f"this node has GPUs {spell_gpus(known)}, not {spell_gpus(gpus)}")
        return gpus

    def strike(self, gpus: tuple[int, ...], phase: NodePhase) -> Outcome:
        """One simulated job, from its arrival to the proved release. It is gone when this returns, however that is."""
        seen = self.look()
        status = seen.status
        if status.phase != phase or status.lease is None:
            raise Refusal(f"llmwd is {status.phase} ({status.detail or status.reason.meaning}), not {phase}: nothing was done")
        epoch, leased = status.lease.epoch, status.lease.gpus
        if not set(gpus) & set(leased):
            raise Refusal(f"the model is on {name_gpus(leased)}: a job on {name_gpus(gpus)} would take nothing from it")
        tail = JournalTail(self.dirs.state)
        struck_s = time.monotonic()
        try:
            with self._job(gpus, {job.id for job in status.jobs}) as job:
                proof = self._released(job, epoch)
            outcome = self._outcome(job, gpus, phase, epoch, proof, self._told(tail, epoch, proof is not None))
        finally:
            tail.close()
        self._journal(outcome, time.monotonic() - struck_s)
        return outcome

    @contextmanager
    def _job(self, gpus: tuple[int, ...], taken: set[str]) -> Iterator[str]:
        # An end that is asked for while the file is being made waits until it can be removed again. Where this
        # program is killed, the job ends by itself all the same.
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
        try:
            path = write_job(self.folder, f"{spell_gpus(gpus)}\nfor={self.within_s + OVER_AFTER_S:.3f}\n", taken)
            try:
                try:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)
                    yield path.name.removeprefix("job_")
                finally:  # an end asked for here is raised by this call at the latest, and there is no second one
                    signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
            finally:
                path.unlink(missing_ok=True)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)

    def _released(self, job: str, epoch: int) -> ReleaseProof | None:
        """The proof of the release, judged or proved; None: none came in time."""
        for seen in watch(self.dirs, self.running, self.within_s):
            fact = seen.facts.gpus
            proof = fact.proof if fact is not None else None
            if proof is None or proof.epoch < epoch:
                continue
            if proof.epoch == epoch and proof.job not in (job, None):
                raise Refusal(f"job {proof.job} came first, and the GPUs are being given back to it: no verdict")
            if proof.epoch != epoch or proof.job is None:
                raise Refusal(f"the GPUs were given back for another reason meanwhile ({proof.reason.meaning}): no verdict")
            if proof.proved_s is not None:
                return proof
        return None

    def _told(self, tail: JournalTail, epoch: int, proved: bool) -> Yield | None:
        """The journal's lines about the release; None where they cannot be read (a full disk costs lines)."""
        release, end_s = Release(epoch=epoch), time.monotonic() + LAST_LINES_WITHIN_S
        while True:
            for line in read(tail.new(), time.time()).lines:
                _take(release, line)
            if not proved or (release.released is not None and release.proved is not None) or time.monotonic() >= end_s:
                return release.told()
            time.sleep(0.02)

    def _outcome(self, job: str, gpus: tuple[int, ...], phase: str, epoch: int, proof: ReleaseProof | None, told: Yield | None) -> Outcome:
        # The supervisor's own budget where it told it: the file may have been edited since it was read.
        budget_s = told.budget_s if told is not None and told.budget_s is not None else self._written_budget_s
        passed, verdict = judged(proof, budget_s, self.within_s)
        return Outcome(
            job=job, gpus=gpus, while_phase=str(phase), epoch=epoch, passed=passed, verdict=verdict,
            took_s=proof.proved_s - proof.begun_s if proof is not None else None, budget_s=budget_s,
            parts={part: getattr(told, part) for part in PARTS} if told is not None else {},
            requests=told.requests if told is not None else None,
        )  # fmt: skip

    def _journal(self, outcome: Outcome, lasted_s: float) -> None:
        details = {name: value for name, value in msgspec.to_builtins(outcome).items() if name not in ("back_s", "parts")}
        Journal(self.dirs.state, "ctl", logging.getLogger("llmwd")).write("drill", **details, lasted_s=lasted_s)

    def until(self, phase: NodePhase, within_s: float, after_epoch: int = 0) -> float:
        """Seconds until the node is in this phase. Refusal (4) when it does not come to it, (1) when it has passed by
        with a lease after that one."""
        began_s = time.monotonic()
        for seen in watch(self.dirs, self.running, within_s):
            status = seen.status
            if status.phase == phase:
                return time.monotonic() - began_s
            if phase != NodePhase.serving and status.phase == NodePhase.serving and status.lease and status.lease.epoch > after_epoch:
                raise Refusal("the model was loaded again before the drill could strike: it loads too quickly for that")
            if status.phase in (NodePhase.held, NodePhase.failed, NodePhase.stopped):
                break
        raise Refusal(f"the drill's job is gone, but llmwd is {status.phase}: {status.detail or status.reason.meaning}", Exit.timed_out)


def judged(proof: ReleaseProof | None, budget_s: float, within_s: float) -> tuple[bool, str]:
    """(passed, the verdict in words), as the resolver judges it."""
    budget = f"the budget of {budget_s:g} s"
    if proof is None:
        return False, f"no release was proved within {within_s:g} s; {budget} is BROKEN"
    took = spell_s(proof.proved_s - proof.begun_s)
    if not within_budget(proof, budget_s):
        return False, f"proved after {took}: {budget} is BROKEN; llmwd stays away until `llmwd-ctl resume`"
    if proof.proved_s - proof.begun_s <= budget_s:
        return True, f"proved within {took} of {budget}"
    return True, f"gone within {spell_s(proof.gone_s - proof.begun_s)} of {budget}; the driver's proof came only after {took}"


def _take(release: Release, line: Line) -> None:
    field = TOLD_BY.get(line.event)
    if field is not None and line.number("epoch") == release.epoch:
        setattr(release, field, line)
