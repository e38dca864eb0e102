"""One destination of notices: one send at a time, beside the loop, again after a backoff, or never again until told so.

And what is sent beside notices: that a dead man's notice is taken back."""

import hashlib
import random
from collections.abc import Callable

from llmwd.adapters import ntfy, otherservices
from llmwd.adapters.ntfy import Access, Outcome, Result
from llmwd.config import Settings
from llmwd.core import noticetext, outbox, takeback
from llmwd.core.outbox import Book, Deadman, Entry, State
from llmwd.messages import Done, NoticesFact, Refused, Reply
from llmwd.vocab import Phase
from llmwd.workers.base import Shell

NTFY = "ntfy"
OFF = "off: NTFY_TOPIC is not set"
KEPT_SENDS = 100
BACK_AGAIN_S = 0.5  # at the end, when a few seconds are left for it


class Lane:
    """`name` is shown and kept, so it holds no secret. deliver(entry) blocks, in a thread."""

    def __init__(self, shell: Shell, name: str, deliver: Callable[[Entry], Outcome]):
        self.shell = shell
        self.name = name
        self.deliver = deliver
        self.sending: Entry | None = None
        self.tries = 0
        self.quiet_until_at = 0.0
        self.refused = False
        self.trouble = ""
        self.sent = self.failed = 0
        self.last_sent_at: float | None = None
        self._sent_at: tuple[float, ...] = ()

    def forget(self) -> None:
        """Failures; the next try is at once."""
        self.tries, self.quiet_until_at, self.refused, self.trouble = 0, 0.0, False, ""

    def wakes_at(self, book: Book, now_at: float) -> float | None:
        """When there is something to do for it."""
        due_at = outbox.next_at(book, self.name)
        if due_at is None or self.sending is not None or self.refused:
            return None
        return max(due_at, self.quiet_until_at, outbox.paced_at(self._sent_at, now_at))

    def begin(self, book: Book, now_at: float, then: Callable[[Entry, Outcome], None]) -> None:
        """Send the oldest that is due."""
        entry = outbox.due(book, self.name, now_at)
        if entry is None:
            return
        self.sending = entry
        # Whatever went wrong with us, nobody has refused the notice.
        failed = Outcome(Result.again, "the notice could not be sent: see the traceback")
        self.shell.beside(lambda: self.deliver(entry), lambda outcome: then(entry, outcome or failed))

    def over(self, book: Book, entry: Entry, outcome: Outcome, now_at: float) -> Book:
        """What the book is after this outcome."""
        self.sending = None
        match outcome.result:
            case Result.sent:
                self.sent, self.tries, self.trouble, self.last_sent_at = self.sent + 1, 0, "", now_at
                self._sent_at = (*self._sent_at, now_at)[-KEPT_SENDS:]
                self.shell.log.info("told: %s", entry.title)
                return outbox.done(book, entry)
            case Result.bad:
                self.failed, self.tries = self.failed + 1, 0
                self._say(entry, outcome)
                return outbox.done(book, entry)
            case Result.refused:
                self.refused, self.failed, self.trouble = True, self.failed + 1, outcome.why
                self._say(entry, outcome)
                return book
        self.tries += 1
        if outcome.why != self.trouble:
            self.shell.log.warning("not told yet (%s): %s", entry.title, outcome.why)
        self.trouble = outcome.why
        self.quiet_until_at = now_at + noticetext.retry_after_s(self.tries, outcome.status, outcome.code, random.random(), now_at)
        return outbox.tried(book, entry)

    def _say(self, entry: Entry, outcome: Outcome) -> None:
        stopped = "; no notice is sent until `llmwd-ctl reset` or `reload`" if self.refused else ""
        self.shell.log.error("not told (%s): %s%s", entry.title, outcome.why, stopped)
        self.shell.journal.write("notice_failed", title=entry.title, why=outcome.why)


class Lanes(dict[str, Lane]):
    """All destinations that the settings name, by their names."""

    def open(self, shell: Shell, settings: Settings, now_at: Callable[[], float]) -> None:
        """One for each destination; those that stay keep what they know."""
        before = dict(self)
        self.clear()
        for name, deliver in ways(settings, now_at).items():
            self[name] = before.get(name) or Lane(shell, name, deliver)
            self[name].deliver = deliver

    def forget(self) -> None:
        for lane in self.values():
            lane.forget()

    @property
    def sending(self) -> frozenset[str]:
        """Sequence ids."""
        return frozenset(lane.sending.sid for lane in self.values() if lane.sending)

    def unfinished(self, book: Book) -> bool:
        """Whether anything is, or may still be, sent."""
        return any(lane.sending or (not lane.refused and outbox.next_at(book, lane.name)) for lane in self.values())

    def answer(self, book: Book, number: int, at_once: bool) -> Reply | None:
        """What has become of all notices up to this one; None: it is to be waited for."""
        waiting = [lane for lane in self.values() if any(it.dest == lane.name and it.id <= number for it in book.entries)]
        refused = [f"{lane.name}: {lane.trouble}" for lane in waiting if lane.refused]
        if refused:
            return Refused(problems=tuple(refused))
        if not waiting:
            return Done(detail="told")
        why = "; ".join(f"{lane.name}: {lane.trouble}" for lane in waiting if lane.trouble)
        return Done(detail=f"not told yet, and tried again{f' ({why})' if why else ''}") if at_once else None


class TakingBack:
    """Takes back the dead man's notices that were given up, one at a time, again and again until the server has done it."""

    def __init__(self, shell: Shell):
        self.shell = shell
        self.busy = self.hurried = False
        self._tries, self._quiet_until_at = 0, 0.0
        self._reached: dict[str, Settings] = {}  # by the server's mark; also those before a reload
        self._refused: set[str] = set()

    def know(self, settings: Settings) -> None:
        """These are the settings now. Those that an older version kept have no mark, and were made by what is set."""
        self._tries, self._quiet_until_at, self._refused = 0, 0.0, set()
        if settings.ntfy_topic:
            self._reached[mark_of(settings)] = self._reached[""] = settings

    def hurry(self) -> None:
        """Little time is left."""
        self.hurried, self._tries, self._quiet_until_at = True, 0, 0.0

    def next(self, state: State) -> Deadman | None:
        """What there is to do."""
        return takeback.next_back(state, frozenset(self._reached) - self._refused)

    def proceed(self, state: State, now_at: Callable[[], float], then: Callable[[str], None]) -> list[float]:
        """Begin, if it is time; else when that is. then(sid): the server has it no longer; "": it may have it still."""
        one = self.next(state)
        if one is None or self.busy:
            return []
        if now_at() < self._quiet_until_at:
            return [self._quiet_until_at]
        s = self._reached[one.server]
        self.busy = True

        def arrived(outcome: Outcome | None) -> None:
            self.busy = False
            then(one.sid if self._done(one, outcome or Outcome(Result.again, "see the traceback"), now_at()) else "")

        self.shell.beside(lambda: ntfy.cancel(s.ntfy_server, s.ntfy_topic, one.sid, access(s)), arrived)
        return []

    def _done(self, one: Deadman, outcome: Outcome, now_at: float) -> bool:
        if outcome.result is Result.sent:
            self._tries = 0
            return True
        if not self._tries:
            self.shell.log.warning("the dead man's notice could not be taken back: %s", outcome.why)
        if outcome.result is Result.refused:
            self._refused.add(one.server)
        self._tries += 1
        delay_s = noticetext.retry_after_s(self._tries, outcome.status, outcome.code, random.random(), now_at)
        self._quiet_until_at = now_at + (min(delay_s, BACK_AGAIN_S) if self.hurried else delay_s)
        return outcome.result is Result.bad


def mark_of(settings: Settings) -> str:
    """Names the server and the topic, and tells neither; "" without a topic."""
    both = f"{settings.ntfy_server} {settings.ntfy_topic}"
    return hashlib.sha256(both.encode()).hexdigest()[:16] if settings.ntfy_topic else ""


def ways(settings: Settings, now_at: Callable[[], float]) -> dict[str, Callable[[Entry], Outcome]]:
    """Where notices go by these settings: the destination's name, and what delivers to it."""
    found: dict[str, Callable[[Entry], Outcome]] = {}
    s = settings
    if s.ntfy_topic:

        def by_ntfy(entry: Entry) -> Outcome:
            data = noticetext.body(entry, s.ntfy_topic, s.ntfy_priority, s.ntfy_tags, click_of(s), now_at())
            return ntfy.publish(s.ntfy_server, s.ntfy_topic, data, access(s))

        found[NTFY] = by_ntfy

    def by_other(url: str) -> Callable[[Entry], Outcome]:
        return lambda entry: otherservices.send(url, entry.title, noticetext.text(entry, now_at()), entry.alarm)

    return found | {name_of(url): by_other(url) for url in s.notify_urls}


def access(settings: Settings) -> Access:
    return Access(settings.ntfy_token_file, settings.ntfy_user, settings.ntfy_password_file)


def click_of(settings: Settings) -> str:
    return settings.ntfy_click or (f"https://{settings.tunnel_hostname}/" if settings.tunnel_hostname else "")


def name_of(url: str) -> str:
    """A name for a service that tells nothing of what its address holds but the service."""
    return f"{url.partition('://')[0].lower()}-{hashlib.sha256(url.encode()).hexdigest()[:6]}"


def fact_of(lanes: dict[str, Lane], book: Book, kept: str, deadman: str, lost: int, now_s: float) -> NoticesFact:
    """What is shown of all this. kept, deadman: what is wrong with them."""
    every = lanes.values()
    detail = "; ".join(lane.trouble if lane.name == NTFY else f"{lane.name}: {lane.trouble}" for lane in every if lane.trouble)
    if not lanes:
        phase, detail = Phase.stopped, OFF
    elif any(lane.refused for lane in every):
        phase = Phase.failed
    else:
        phase = Phase.backoff if any(lane.tries for lane in every) else Phase.ready
    dead = book.state.deadman
    return NoticesFact(
        phase=phase, detail=detail, sent=sum(lane.sent for lane in every), failed=sum(lane.failed for lane in every),
        waiting=len(book.entries), at_s=now_s, lost=lost, kept=kept, deadman=deadman,
        last_sent_at=max((lane.last_sent_at for lane in every if lane.last_sent_at), default=None),
        deadman_at=dead.fires_at if dead else None,
    )  # fmt: skip
