"""Look-ahead: what Slurm has planned for this node, asked in one call a minute at most.

Reservations and pending jobs in turn, each by a command of its own: both are small on a small cluster, and the list
of a big one's pending jobs is longer than anything else that is asked. The desk starts the calls, after all others.
"""

import time
from collections.abc import Callable, Collection

from llmwd.adapters import slurm
from llmwd.adapters.slurm import Answer
from llmwd.core import gres, lookahead
from llmwd.core.lookahead import Heard, Outlook
from llmwd.core.slurmnode import SlurmNode
from llmwd.messages import Expected
from llmwd.workers.base import Shell

EVERY_S = 60.0
RESERVATIONS, PENDING = "reservations", "pending jobs"


class Ahead:
    """`say(text)` logs what was not understood, once. All of it is silent while LOOKAHEAD is off."""

    def __init__(self, shell: Shell, say: Callable[[str], None]):
        self._shell = shell
        self._say = say
        self._asked_s = float("-inf")
        self._turn = RESERVATIONS  # whose turn it was last
        self._expected: dict[str, tuple[Expected, ...]] = {}
        self._answered = False
        self._silent = False

    @property
    def on(self) -> bool:
        return self._shell.boot.settings.lookahead

    @property
    def due_s(self) -> float | None:
        """When the next question is due, None for never."""
        return self._asked_s + EVERY_S if self.on else None

    def grant_why(self) -> str:
        """Nothing is begun before the first answer, or the lack of one: it takes milliseconds, a model minutes."""
        return "slurmctld is asked what is planned for this node" if self.on and not self._answered else ""

    def question(self, now_s: float) -> list[str] | None:
        """The command to start now. Jobs come first: they are planned every day, and later than reservations."""
        if not self.on or now_s < self._asked_s + EVERY_S:
            return None
        self._turn = RESERVATIONS if self._turn == PENDING else PENDING
        self._asked_s = now_s
        return slurm.reservations() if self._turn == RESERVATIONS else slurm.pending_jobs(lookahead.JOB_FIELDS)

    def heard(self, answer: Answer, node: SlurmNode) -> None:
        """Take the answer in. Without one, what was heard before stands until its time is over."""
        self._answered = True
        if answer.status != 0:
            if not self._silent:
                why = gres.read_stderr(answer.stderr, node.name).why
                self._shell.log.warning("look-ahead: slurmctld does not tell the %s: %s; serving goes on", self._turn, why)
            self._silent = True
            return
        self._silent = False
        heard = self._read(answer.stdout, node)
        for text in heard.unclear:
            self._say(f"look-ahead: not understood, so it counts as one that needs this node: {text}")
        now_at, now_s = time.time(), time.monotonic()
        self._expected[self._turn] = tuple(lookahead.place(plan, now_at, now_s) for plan in heard.plans)

    def _read(self, text: str, node: SlurmNode) -> Heard:
        if self._turn == RESERVATIONS:
            return lookahead.read_reservations(text, node.name)
        return lookahead.read_pending(text, node.name, alone=not node.others)

    def outlook(self, ours: int, others: int, total: int, jobs: Collection[str], load_s: float | None) -> Outlook:
        """What concerns `ours` GPUs of `total`, `others` of which somebody else has. jobs: those that are here."""
        if not self.on:
            return Outlook()
        expected = tuple(each for part in self._expected.values() for each in part)
        mine = lookahead.concerning(expected, ours, others, total, jobs, time.monotonic())
        return Outlook(mine, self._shell.boot.settings.lookahead_drain_s, load_s)
