"""Not at random: every process of ours, and the pairs that stand in for each other, killed and stopped in every phase.

A job on all GPUs comes in the same moment (where none is there yet). What was stopped goes on only after the lease's
time, so that nobody but the dead-man's switch can have freed the GPUs; then it has to serve again.
"""

import signal
import time
from dataclasses import dataclass

from tests.chaos.plan import PHASES, TARGETS
from tests.chaos.run import Play, Stuck
from tests.chaos.stage import GRACE_S, LASTING, RESOLVE_S, TTL_S
from tests.waiting import wait_until

PAIRS = ("root holder", "vllm holder", "root vllm", "detector resolver", "resolver vllm", "holder server", "door holder")
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
FREE_WITHIN_S = 2 * TTL_S + GRACE_S + RESOLVE_S + 5.0  # the observer judges by the narrow bounds; this only ends a wait
PHASE_WITHIN_S = 20.0


@dataclass(frozen=True)
class Cell:
    phase: str
    targets: str
    how: str

    def __str__(self) -> str:
        return f"{self.phase:9} {self.how} {self.targets}"


def cells() -> list[Cell]:
    return [Cell(phase, targets, how) for targets in (*TARGETS, *PAIRS) for phase in PHASES for how in SIGNALS]


def meet(play: Play, cell: Cell) -> str:
    """Bring the phase about, signal, let a job come, heal. What happened, in words; "missed" in it: the phase was over
    before the signal. Raises Stuck when it does not serve afterwards."""
    stage = play.stage
    play.calm(LASTING)
    _into(play, cell.phase)
    found = stage.pick(cell.targets, play.dice)
    phase = stage.tree.status()["phase"]
    play.tell("killed" if cell.how == "kill" else "fault", **({"roles": cell.targets.split()} if cell.how == "kill" else {"name": "stopped"}))
    for process in found:
        stage.send(process, SIGNALS[cell.how])
        if cell.how == "stop":
            stage.stopped[process.pid, process.start] = time.monotonic() + TTL_S + GRACE_S + 1.0
    began_s = time.monotonic()
    if not stage.jobs():
        stage.job("0-7")
    wait_until(lambda: play.tick() or not stage.roles().get("server"), FREE_WITHIN_S, what=f"free GPUs after {cell}")
    free_s = time.monotonic() - began_s
    play.go_on(max(0.3, 1.0 - free_s))  # nothing may start on them
    if cell.how == "stop":
        wait_until(lambda: play.tick() or not stage.stopped, FREE_WITHIN_S, what="that all goes on")
    served = play.calm(LASTING)
    names = " ".join(f"{each.role}:{each.pid}" for each in found) or "nobody there"
    met = phase == {"resuming": "loading"}.get(cell.phase, cell.phase)
    return f"{names}{'' if met else f' MISSED: {phase}'}, free after {free_s:.2f} s, {served}"


def _into(play: Play, phase: str) -> None:
    """The phase may be over soon: it is left to the caller to look."""
    stage = play.stage
    if phase == "loading":
        for order, then in (("yield", "held"), ("resume", "loading")):
            if stage.tree.ctl(order).returncode:
                raise Stuck(f"`{order}` is refused")
            play.reach(then, PHASE_WITHIN_S)
        _server_begins(play)
    elif phase != "serving":
        stage.job("0-7")
        play.reach("yielding" if phase == "yielding" else "waiting", PHASE_WITHIN_S)
        if phase == "resuming":
            for path in stage.jobs():
                path.unlink()
            play.reach("loading", PHASE_WITHIN_S)
            _server_begins(play)


def _server_begins(play: Play) -> None:
    """Loading is told before there is a process of the model."""
    wait_until(lambda: play.tick() or play.stage.roles().get("server"), PHASE_WITHIN_S, what="a server that loads")
