"""Not at random: every process of ours, and the pairs that stand in for each other, killed and stopped in every phase;
and everything that goes wrong with the stand-in driver, while the model loads and while it serves.

A job on all GPUs comes in the same moment (where none is there yet). What was stopped goes on only after the GPUs are
free, which they have to be within the observer's bound: nothing can have healed by itself. Then it has to serve again.
"""

import itertools
import signal
import time
from dataclasses import dataclass

from tests.chaos.plan import DRIVER_LEAVES, DRIVER_STAYS, PHASES, TARGETS
from tests.chaos.run import Play, Stuck
from tests.chaos.stage import GRACE_S, LASTING, RESOLVE_S, TTL_S
from tests.observer.judge import LATE_S
from tests.waiting import wait_until

PAIRS = (
    "root holder", "vllm holder", "root vllm", "detector resolver", "resolver vllm", "holder server", "door holder",
    "guard holder", "holder-caddy holder-cloudflared",
)  # fmt: skip
GUARDS_GPUS = ("root", "holder", "vllm", "resolver", "detector", "guard")
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
DRIVER = "driver"
LEFT_WITHIN_S = 40.0  # this only ends a wait
STAYS_S = 3.0  # the driver is asked each second
FREE_WITHIN_S = 2 * TTL_S + GRACE_S + RESOLVE_S + 25.0  # this only ends a wait
BUSY_S = 0.5  # for the looks and the steps of this program
PHASE_WITHIN_S = 20.0


@dataclass(frozen=True)
class Cell:
    """how: what is done to each of the targets in turn, "+" between them; one word is for all. Or DRIVER: the target is
    what goes wrong with it."""

    phase: str
    targets: str
    how: str

    def __str__(self) -> str:
        return f"{self.phase} {self.how} {self.targets}"

    def signals(self) -> dict[str, str]:
        names, hows = self.targets.split(), self.how.split("+")
        return dict(zip(names, hows if len(hows) == len(names) else hows * len(names)))


def cells() -> list[Cell]:
    return [Cell(phase, targets, how) for targets in (*TARGETS, *PAIRS) for phase in PHASES for how in SIGNALS]


def pairs() -> list[Cell]:
    """Every two of those who free the GPUs, killed and stopped in all four ways."""
    hows = ["+".join(each) for each in itertools.product(SIGNALS, SIGNALS)]
    both = [" ".join(each) for each in itertools.combinations(GUARDS_GPUS, 2)]
    return [Cell(phase, targets, how) for targets in both for phase in PHASES for how in hows]


def of_driver() -> list[Cell]:
    return [Cell(phase, what, DRIVER) for what in (*DRIVER_LEAVES, *DRIVER_STAYS) for phase in ("loading", "serving", "yielding")]


def named(text: str) -> Cell:
    """As a cell is printed. Raises ValueError."""
    phase, how, targets = text.split(maxsplit=2)
    cell = Cell(phase, targets, how)
    if cell in of_driver():
        return cell
    if phase not in PHASES or not set(targets.split()) <= set(TARGETS) or not set(cell.signals().values()) <= set(SIGNALS):
        raise ValueError(f"there is no cell {text!r}")
    return cell


def meet(play: Play, cell: Cell) -> str:
    """Bring the phase about, signal, let a job come, heal. What happened, in words; "missed" in it: the phase was over
    before the signal. Raises Stuck when it does not serve afterwards."""
    stage = play.stage
    play.calm(LASTING)
    if cell.how == DRIVER:
        return _with_driver(play, cell)
    _into(play, cell.phase)
    roles, signals = stage.roles(), cell.signals()
    found = [(name, (roles[name] if name != "server" else play.dice.sample(roles[name], 1))[0]) for name in signals if name in roles]
    phase = stage.tree.status()["phase"]
    # Only one that is killed alone is judged by what it takes with it.
    play.tell("killed" if set(signals.values()) == {"kill"} else "fault", name=cell.how, roles=list(signals))
    for name, process in found:
        if signals[name] == "kill":
            stage.send(process, signal.SIGKILL)
        else:
            stage.stop([process], None)
    began_s = time.monotonic()
    if not stage.jobs():
        stage.job("0-7")
    looked_s, late_s = began_s, 0.0

    def free() -> bool:
        nonlocal looked_s, late_s
        play.tick()
        before_s, looked_s = looked_s, time.monotonic()
        late_s += max(0.0, looked_s - before_s - LATE_S)  # as the observer has it: llmwd did not run either
        return not stage.roles().get("server")

    wait_until(free, FREE_WITHIN_S, what=f"free GPUs after {cell}")
    free_s = time.monotonic() - began_s
    if free_s > stage.bounds.fault_s + BUSY_S + late_s:
        raise Stuck(f"{cell}: the GPUs were free only after {free_s:.2f} s")
    play.go_on(max(0.3, 1.0 - free_s))  # nothing may start on them
    served = play.calm(LASTING)
    names = " ".join(f"{name}:{each.pid}" for name, each in found) or "nobody there"
    met = phase == {"resuming": "loading"}.get(cell.phase, cell.phase)
    return f"{names}{'' if met else f' MISSED: {phase}'}, free after {free_s:.2f} s, {served}"


def _with_driver(play: Play, cell: Cell) -> str:
    """It goes wrong; then, while it still does, a job comes, for whom no bound is wider because of it. Yielding: both at
    once."""
    stage = play.stage
    at_once = cell.phase == "yielding"
    if not at_once:
        _into(play, cell.phase)
    status = stage.tree.status()
    phase, leased = status["phase"], status["lease"]["gpus"]
    wait_until(lambda: play.tick() or stage.faults.on(leased[0]), PHASE_WITHIN_S, what="a process on the GPU")
    play.tell("happened")
    began_s = time.monotonic()
    done, heal = stage.faults.spoil(cell.targets, leased[0], leased)
    if not done:
        raise Stuck(f"{cell}: there was nobody whom it could befall")

    def there() -> set[int]:
        return {each.pid for each in stage.roles().get("server", ()) if leased[0] in each.gpus}

    before, said = there(), "at once"
    if at_once:
        pass
    elif cell.targets in DRIVER_LEAVES:
        wait_until(lambda: play.tick() or not there(), LEFT_WITHIN_S, what=f"the end of the server after {cell}")
        said = f"left after {time.monotonic() - began_s:.2f} s"
    else:
        play.go_on(STAYS_S)
        if not before or not before <= there():
            raise Stuck(f"{cell}: the server did not stay: {stage.tree.status()}")
        said = "stayed"
    stage.job("0-7")
    came_s = time.monotonic()
    wait_until(lambda: play.tick() or not stage.roles().get("server"), FREE_WITHIN_S, what=f"free GPUs after {cell}")
    said += f", free after {time.monotonic() - came_s:.2f} s"
    play.go_on(1.0)
    play.tell("happened")
    heal()
    met = at_once or phase == cell.phase
    return f"{done}: {'' if met else f'MISSED: {phase}, '}{said}, {play.calm(LASTING)}"


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
