"""The prologs that wait at the resolver's desk: each is answered when nothing of ours is on its job's GPUs any more."""

import time
from collections.abc import Callable

import msgspec

from llmwd.core.announced import Announced
from llmwd.core.wording import name_gpus
from llmwd.messages import Done, GpusFact, Refused, ReleaseOrder, Reply, SourceState
from llmwd.vocab import Source
from llmwd.workers.base import Shell


class Waiting(msgspec.Struct, frozen=True):
    """One order that is not answered yet."""

    order: ReleaseOrder
    reply: Callable[[Reply], None]
    came_s: float
    waited: bool = False

    @property
    def until_s(self) -> float:
        return self.came_s + self.order.within_s


class Prologs:
    """unproved(gpus) says why it is not so yet, or ""; look_again() is called when a prolog's time is over."""

    def __init__(self, shell: Shell, unproved: Callable[[tuple[int, ...]], str], look_again: Callable[[], None]):
        self._shell = shell
        self._unproved = unproved
        self._look_again = look_again
        self._waiting: list[Waiting] = []
        self.announced = Announced()
        self.state: tuple[SourceState, ...] = ()  # told once a prolog has been here

    def adopt(self, fact: GpusFact) -> None:
        """What was announced to our last incarnation, and nobody else knows of yet."""
        for claim in fact.claims:
            if claim.sources == (Source.prolog,) and claim.gpus and not claim.leaving:
                self.announced.announce(claim.id, frozenset(claim.gpus), fact.at_s)

    def take(self, order: ReleaseOrder, reply: Callable[[Reply], None]) -> None:
        """An order; settle() answers it."""
        self.announced.announce(order.job, frozenset(order.gpus), time.monotonic())
        self.state = (SourceState(name=Source.prolog, works=True),)
        self._waiting.append(Waiting(order, reply, time.monotonic()))

    def settle(self, now_s: float) -> None:
        """Answer those that are proved, and those whose time is over."""
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            why = self._unproved(each.order.gpus)
            if not why:
                gpus = each.order.gpus
                each.reply(Done(detail=f"no process of ours is on {name_gpus(gpus)}" if gpus else "the job has no GPU"))
            elif now_s >= each.until_s:
                problem = f"{name_gpus(each.order.gpus)} not proved free of us within {each.order.within_s:g} s: {why}"
                each.reply(Refused(problems=(problem,), timed_out=True))
            else:
                self._waiting.append(msgspec.structs.replace(each, waited=True))
                continue
            if each.waited or why:  # one that had nothing to wait for is no event: there is one for every job of the node
                self._write(each, now_s, why)
        if self._waiting:
            self._shell.at("prologs", min(each.until_s for each in self._waiting), self._look_again)

    def _write(self, each: Waiting, now_s: float, why: str) -> None:
        order, took_s = each.order, now_s - each.came_s
        self._shell.journal.write(
            "prolog_answered", job=order.job, gpus=order.gpus, by=order.by, took_s=took_s, proved=not why, left=why
        )
