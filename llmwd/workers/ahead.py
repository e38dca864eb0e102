"""Look-ahead: what Slurm has planned for this node, asked in one call a minute at most; at the start in two, one after the other.

Reservations and pending jobs in turn, each by a command of its own: both are small on a small cluster, and the list
of a big one's pending jobs is longer than anything else that is asked. The desk starts the calls, after all others.
"""

import time
from collections.abc import Callable, Collection, Sequence

from llmwd.adapters import slurm
from llmwd.adapters.slurm import Answer
from llmwd.core import gres, lookahead, turns
from llmwd.core.lookahead import Heard, Outlook
from llmwd.core.slurmnode import SlurmNode
from llmwd.core.turns import PENDING
from llmwd.messages import Plans
from llmwd.workers.base import Shell


class Ahead:
    """`say(kind, text)` logs what was not understood, once for each kind. All of it is silent while LOOKAHEAD is off."""

    def __init__(self, shell: Shell, say: Callable[[str, str], None]):
        self._shell = shell
        self._say = say
        self._plans = turns.unasked()
        self._asking = ("", 0.0)  # what was asked last, and when
        self._silent: set[str] = set()  # what it does not tell

    @property
    def on(self) -> bool:
        return self._shell.boot.settings.lookahead

    @property
    def plans(self) -> tuple[Plans, ...]:
        """What is known, for our next incarnation; while it is off, nothing."""
        if not self.on:
            self._plans = turns.unasked()
        return self._plans

    def adopt(self, plans: Sequence[Plans]) -> None:
        """What our last incarnation knew, and when it asked: its end is no reason to ask sooner, or to forget."""
        self._plans = turns.adopted(plans, time.monotonic())

    @property
    def due_s(self) -> float | None:
        """When the next question is due, None for never."""
        return turns.next_question(self.plans)[1] if self.on else None

    def grant_why(self) -> str:
        """Why nothing is to be begun yet; empty if it may be."""
        waits = turns.unanswered(self.plans) if self.on else ()
        return f"slurmctld is asked what is planned for this node ({' and '.join(waits)})" if waits else ""

    def question(self, now_s: float) -> list[str] | None:
        """The command to start now."""
        if not self.on:
            return None
        kind, due_s = turns.next_question(self.plans)
        if now_s < due_s:
            return None
        self._asking = (kind, now_s)
        return slurm.pending_jobs(lookahead.JOB_FIELDS) if kind == PENDING else slurm.reservations()

    def heard(self, answer: Answer, node: SlurmNode) -> None:
        """Take the answer in."""
        kind, asked_s = self._asking
        if answer.status != 0:
            if kind not in self._silent:
                why = gres.read_stderr(answer.stderr, node.name).why
                self._shell.log.warning("look-ahead: slurmctld does not tell the %s: %s; serving goes on", kind, why)
            self._silent.add(kind)
            self._plans = turns.with_answer(self._plans, kind, asked_s, None)
            return
        self._silent.discard(kind)
        heard = self._read(kind, answer.stdout, node)
        for text in heard.unclear:
            told = f"look-ahead: not understood, so it counts as one that needs this node: {text}"
            self._say(gres.form_of(told), told)
        now_at, now_s = time.time(), time.monotonic()
        expected = tuple(lookahead.place(plan, now_at, now_s) for plan in heard.plans)
        self._plans = turns.with_answer(self._plans, kind, asked_s, expected)

    def _read(self, kind: str, text: str, node: SlurmNode) -> Heard:
        if kind == PENDING:
            return lookahead.read_pending(text, node.name, alone=not node.others)
        return lookahead.read_reservations(text, node.name)

    def outlook(self, ours: int, others: int, total: int, jobs: Collection[str], load_s: float | None) -> Outlook:
        """What concerns `ours` GPUs of `total`, `others` of which somebody else has. jobs: those that are here."""
        if not self.on:
            return Outlook()
        expected = tuple(each for part in self._plans for each in part.expected)
        mine = lookahead.concerning(expected, ours, others, total, jobs, time.monotonic())
        return Outlook(mine, self._shell.boot.settings.lookahead_drain_s, load_s)
