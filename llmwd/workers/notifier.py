"""The notifier: tells people what happens here, through ntfy and others; long because all of that comes together.

Nothing waits for it. What is told is decided in core/notices.py, what waits and what is next in core/outbox.py. Whatever
may block (the disk, the network, apprise) is done in threads beside the loop. A notice is on disk before it is sent, and
leaves the disk after it was: a crash in between repeats it, under the same sequence id.
"""

import functools
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from llmwd import redact
from llmwd.adapters import logfile
from llmwd.adapters.ntfy import Outcome, Result
from llmwd.adapters.rundir import read_fact
from llmwd.config import Loaded, Settings, learn_profiles
from llmwd.core import notices, noticetext, outbox, takeback, untold
from llmwd.core.notices import Notice, Seen
from llmwd.core.outbox import Book, Deadman, Entry
from llmwd.messages import Done, GpusFact, NoticesFact, NotifyOrder, Refused, Reply, ResetOrder, RootFact, ServerFact, TunnelFact
from llmwd.vocab import Event, Worker
from llmwd.workers import deadman
from llmwd.workers.base import Boot, Shell, repeat_every_s
from llmwd.workers.keeping import Keeper
from llmwd.workers.sending import NTFY, OFF, Lane, Lanes, TakingBack, access, click_of, fact_of, mark_of

SETTLE_S = 0.05  # what several workers say about one event arrives in any order: wait for all of it
STOP_MARGIN_S = 0.5  # of an ordered stop's time that is not spent on sending
ANSWER_WITHIN_S = 4.0  # to who asked for a notice; the command waits a little longer
READ_WITHIN_S = 5.0  # so long the first notices wait for the disk
LOG_WITHIN_S = 2.0  # so long a notice waits for the log that belongs to it


class Notifier:
    """See the module's text."""

    def __init__(self, shell: Shell):
        self.shell = shell
        self.settings: Settings = shell.boot.settings
        self.seen = Seen(node=shell.boot.node, door=self.settings.door)
        self._start = time.time() - time.monotonic()
        # Ids beyond those on disk: what happens before that was read comes after it, there as well.
        self.book = Book(state=outbox.State(salt=f"llmwd-{secrets.token_hex(6)}", next_id=int(self.now_at())))
        self.keeper = Keeper(shell, shell.boot.state, self._proceed)
        self.lanes = Lanes()
        self.switch = deadman.Switch(shell, self.now_at, access)
        self.taking_back = TakingBack(shell)
        self.lost = 0
        self.read = self.listening = self.stopping = False
        self.looking: tuple[Notice, ...] | None = None  # what waits for logs to be read
        self._left: tuple[str, ...] = ()
        self._published: NoticesFact | None = None

    def now_at(self) -> float:
        """Wall time as it was at the start, and even from then on."""
        return self._start + time.monotonic()

    @property
    def on(self) -> bool:
        return bool(self.lanes)

    # --- what happens ------------------------------------------------------------------------------------

    def begin(self) -> None:
        self._use_settings()
        self.shell.answer(ResetOrder, self.on_reset)
        self.shell.answer(NotifyOrder, self.on_notify)
        self.on_beat()
        self.keeper.read(self._have_read)
        self.shell.at("read", time.monotonic() + READ_WITHIN_S, self._listen)

    def _have_read(self, found: Book) -> None:
        """If that took too long, what happened meanwhile comes after it."""
        self.book = outbox.merged(outbox.loaded(found, self.now_at()), self.book, self.read)
        self._hear_again()
        self._settle_server()
        self._listen()

    def _hear_again(self) -> None:
        """A dead man's notice that has fired meanwhile is not left standing."""
        if deadman.fired(self.book.state, self.now_at()):
            self._state(takeback.give_up(self.book.state, self.now_at()))
            text = "The dead man's notice before this one is over."
            self._put(Notice(None, "", f"Heard again: llmwd on {self.shell.boot.node}", text, "sunny", Event.back), (NTFY,))

    def _listen(self) -> None:
        self.read = True
        if self.on and not self.listening:
            self.listening = True
            self.shell.subscribe(Worker.resolver, self.on_gpus)
            self.shell.subscribe(Worker.vllm, self.on_server)
            self.shell.subscribe(Worker.tunnel, self.on_tunnel)
        self._settle()  # what was heard of before
        self._proceed()

    def on_gpus(self, fact: GpusFact) -> None:
        self.seen = msgspec.structs.replace(self.seen, gpus=fact)
        if self.book.state.told.server == notices.HELD_UNNAMED:  # else the manager's answer to it is waited for
            self._settle()

    def on_server(self, fact: ServerFact) -> None:
        self.seen = notices.heard(self.seen, fact)
        self._settle()

    def on_tunnel(self, fact: TunnelFact) -> None:
        self.seen = notices.heard_of_tunnel(self.seen, fact)
        self._settle()

    def _settle(self) -> None:
        self.shell.at("settle", time.monotonic() + SETTLE_S, self._consider)

    def on_reload(self, boot: Boot, loaded: Loaded) -> None:
        self.settings = boot.settings
        self.seen = msgspec.structs.replace(self.seen, door=self.settings.door)
        self._use_settings()
        self.switch.renew_at = 0.0
        if self.read:
            self._settle_server()
            self._listen()

    def _use_settings(self) -> None:
        """Whatever was refused may be mended."""
        self.lanes.open(self.shell, self.settings, self.now_at)
        self.lanes.forget()
        self.taking_back.know(self.settings)

    def _settle_server(self) -> None:
        """What was kept of one ntfy server is not true of another."""
        wanted, mark = bool(self.settings.ntfy_deadman), mark_of(self.settings)
        self._state(takeback.at_server(self.book.state, mark, wanted, self.now_at()))

    def _state(self, state: outbox.State) -> None:
        self.book = Book(self.book.entries, state)

    def on_reset(self, order: ResetOrder, reply: Callable[[Reply], None]) -> None:
        self._use_settings()
        reply(Done(detail="what could not be sent is tried again" if self.on else OFF))
        self._proceed()

    def on_notify(self, order: NotifyOrder, reply: Callable[[Reply], None]) -> None:
        """Answered when it was told, refused or has waited long enough."""
        if not self.on:
            reply(Refused(problems=("no notice goes anywhere: NTFY_TOPIC and NOTIFY_URLS are not set",)))
            return
        text = f"{order.message or 'This is a notice to try it.'}\n(Asked for by {order.by}.)"
        self._put(Notice(None, "", f"Test from llmwd on {self.shell.boot.node}", text, "test_tube", Event.test))
        until_s, number = time.monotonic() + ANSWER_WITHIN_S, self.book.state.next_id - 1

        def look() -> None:
            answer = self.lanes.answer(self.book, number, time.monotonic() >= until_s)
            if answer is not None:
                reply(answer)
            else:
                self.shell.at(f"notify {number}", time.monotonic() + 0.1, look)

        self._proceed()
        look()

    def on_stop(self, within_s: float) -> None:
        """Tell that it ends, if that can be told in time; what cannot waits on disk for the next start."""
        if self.looking is not None:
            self._looked(self.looking, [])
        self.stopping = True
        if self.on:
            self._put(notices.stopped(self.shell.boot.node))
        self.book = outbox.hurry(self.book, self.now_at())
        # Beside the notices, which may take all the time that there is; kept until it is done, for the next start.
        self._state(takeback.give_up(self.book.state, self.now_at()))
        if not self.on and not self.book.state.back:
            self.shell.finish()
            return
        self.taking_back.hurry()
        for lane in self.lanes.values():
            lane.quiet_until_at = 0.0
        self.shell.at("give-up", time.monotonic() + max(0.0, within_s - STOP_MARGIN_S), self._give_up)
        self._proceed()

    def _give_up(self) -> None:
        if self.book.entries:
            self.shell.log.error("ended before %d notices could be sent; the next start sends them", len(self.book.entries))
        self.shell.finish()

    def on_beat(self) -> None:
        if self.on:
            self._look_at_the_workers()
        self._publish(repeat=True)
        self.shell.at("repeat", time.monotonic() + repeat_every_s(self.settings), self.on_beat)

    def _look_at_the_workers(self) -> None:
        """The root says who is in quarantine in a file only: it has no place on the bus."""
        envelope = read_fact(self.shell.boot.runtime, "root")
        if envelope is not None and isinstance(envelope.fact, RootFact) and envelope.fact.workers != self.seen.workers:
            self.seen = msgspec.structs.replace(self.seen, workers=envelope.fact.workers)
            self._settle()

    # --- what follows ------------------------------------------------------------------------------------

    def _consider(self) -> None:
        if not self.on or self.stopping or self.looking is not None or not self.read:
            return
        due = notices.consider(self.book.state.told, self.seen)
        logs = [self.shell.boot.logs / notice.log for notice in due if notice.log]
        if logs:
            self.looking = due
            self.shell.beside(lambda: self._read(logs), lambda tails: self._looked(due, tails or []))
            self.shell.at("log", time.monotonic() + LOG_WITHIN_S, lambda: self._looked(due, []))
            return
        self._put_all(due)

    def _read(self, logs: list[Path]) -> list[str]:
        learn_profiles(self.shell.boot.home)  # any profile's server may have written them
        return [redact.mask(logfile.tail(path)) for path in logs]

    def _looked(self, due: tuple[Notice, ...], tails: list[str]) -> None:
        """With the ends of the logs, or without, if these do not come in time."""
        if self.looking is not due:
            return
        self.looking = None
        left = iter(tails)
        self._put_all(tuple(
            msgspec.structs.replace(notice, message=noticetext.with_log(notice.message, next(left, ""))) if notice.log else notice
            for notice in due
        ))  # fmt: skip
        self._settle()

    def _put_all(self, due: tuple[Notice, ...]) -> None:
        if not self.stopping:
            for notice in due:
                self._put(notice)
            self._proceed()

    def _put(self, notice: Notice, dests: tuple[str, ...] | None = None) -> None:
        tell = notice.event in (Event.back, Event.test) or self.settings.ntfy_events == ("all",) or notice.event in self.settings.ntfy_events
        notice = msgspec.structs.replace(notice, title=redact.mask(notice.title), message=redact.mask(notice.message))
        self.book = outbox.put(self.book, notice, tuple(self.lanes) if dests is None else dests, self.now_at(), tell)

    def _proceed(self) -> None:
        """Keep the book; send what is due once it is kept, or the disk has had its time."""
        if not self.read:
            return
        now_at = self.now_at()
        self.book, lost = untold.tidy(self.book, tuple(self.lanes), self.lanes.sending, self.shell.boot.node, now_at)
        if lost:
            self.lost += lost
            self.shell.log.error("%d notices were too old or too many, and are told in one", lost)
        self.book, left = untold.addressed(self.book, tuple(self.lanes))
        if left and left != self._left:
            self.shell.log.warning("notices wait for %s, which the settings do not name any more", ", ".join(left))
        self._left = left
        self.keeper.keep(self.book)
        wakes = []
        for lane in self.lanes.values():
            at = lane.wakes_at(self.book, now_at)
            if at is not None and at <= now_at and self.keeper.settled:
                to = mark_of(self.settings)
                lane.begin(self.book, now_at, functools.partial(self._over, lane, to))
            elif at is not None and at > now_at:
                wakes.append(at)
        wakes += self._renew(now_at)
        if not self.switch.busy:  # a renewal that is under way would put it back
            wakes += self.taking_back.proceed(self.book.state, self.now_at, self._taken_back)
        if self.book.entries or wakes:
            # Once an hour at least: something may have become too old.
            at = min([now_at + 3600, *wakes, *(one.expires_at for one in self.book.entries if one.expires_at)])
            self.shell.at("due", max(at, now_at + 0.01) - self._start, self._proceed)
        self._publish()
        if self.stopping:
            self._end()

    def _over(self, lane: Lane, mark: str, entry: Entry, outcome: Outcome) -> None:
        self.book = lane.over(self.book, entry, outcome, self.now_at())
        if lane.name == NTFY and outcome.result is Result.sent and mark == mark_of(self.settings):
            self._state(msgspec.structs.replace(self.book.state, replaces=outcome.replaces, server=mark))
        self._proceed()

    def _renew(self, now_at: float) -> list[float]:
        """The dead man's notice. When it has to be seen to again."""
        lane = self.lanes.get(NTFY)
        if lane is None or self.stopping:
            return []
        at = self.switch.wakes_at(self.settings, self.book.state, lane.refused)
        if at is None or at > now_at:
            return [] if at is None else [at]
        self._hear_again()
        state = deadman.named(self.book.state, now_at)
        self._state(msgspec.structs.replace(state, deadman=msgspec.structs.replace(state.deadman, server=mark_of(self.settings))))
        self.keeper.keep(self.book)
        # Never before its id is on disk: a notice that the next incarnation does not know would tell of a death.
        if self.keeper.has(self.book.state.deadman.sid):
            self.switch.renew(self.settings, self.book.state, click_of(self.settings), self._renewed)
        elif self.keeper.trouble:
            self.switch.trouble = "waits for the disk"
        return []

    def _renewed(self, made: Deadman | None) -> None:
        """One that was given up meanwhile is taken back now, whatever the server made of this."""
        now = self.book.state.deadman
        if made is not None and now is not None and made.sid == now.sid:
            self._state(msgspec.structs.replace(self.book.state, deadman=msgspec.structs.replace(now, fires_at=made.fires_at)))
        self._proceed()

    def _taken_back(self, sid: str) -> None:
        self._state(takeback.taken(self.book.state, sid, self.now_at()))
        self._proceed()

    def _end(self) -> None:
        """When all is told or refused, the dead man's notice is taken back, and the disk has it all."""
        busy = self.switch.busy or self.taking_back.next(self.book.state) is not None
        if not busy and not self.lanes.unfinished(self.book) and (self.keeper.idle or self.keeper.trouble):
            self.shell.finish()

    # --- what is shown -----------------------------------------------------------------------------------

    def _publish(self, repeat: bool = False) -> None:
        before, now_s = self._published, time.monotonic()
        fact = fact_of(self.lanes, self.book, self.keeper.trouble, self.switch.trouble, self.lost, now_s)
        self._published = fact
        if repeat or before is None or msgspec.structs.replace(before, at_s=now_s) != fact:
            self.shell.publish(fact)


def main(shell: Shell) -> None:
    """Set the notifier up in its process."""
    notifier = Notifier(shell)
    shell.on_stop(notifier.on_stop)
    shell.on_reload(notifier.on_reload)
    notifier.begin()
    shell.ready()
