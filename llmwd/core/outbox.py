"""What waits to be told, and what is done next about it. Pure.

Theory of operation. The `Book` is all that is known: one `Entry` for each notice and destination, in the order in
which they happened, and the `State` beside them. Every function gives a new book; the notifier keeps it on disk. An
entry is told once it is due (`due_at`: some notices wait a little, in case nothing has happened after all), oldest
first. It leaves the book when it was told (`done`), when its time is over (`expire`) or when the book is full; the
latter two are counted in one digest for each destination, so that nothing is lost in silence. Flapping is folded:
from the third departure of one kind within ten minutes on, one notice is kept that counts them, and is told
when it is calm again, after ten minutes at the latest. An entry that is changed while it is being sent stays,
and is sent again under its sequence id, which replaces the former on the screen.

All times are wall time, because they outlive the boot; the notifier counts on from its start by the monotonic clock.
"""

from collections import Counter

import msgspec

from llmwd.core.notices import About, Notice, Told, after
from llmwd.vocab import Event

MOST_ENTRIES = 400
EXPIRES_AFTER_S = 6 * 3600.0
ALARM_EXPIRES_AFTER_S = 72 * 3600.0
FOLD_WITHIN_S = 600.0
FOLD_FROM = 3  # departures of one kind within that time
FOLD_CALM_S = 120.0
LATEST_AHEAD_S = FOLD_WITHIN_S  # nothing is due later than this; a clock that was set back is seen by it
BURST = 30  # sends in a minute; ntfy takes 60 at once and then one each 5 s, from all behind one address
BURST_WITHIN_S = 60.0
PACE_S = 5.0

# What may flap: the departure that is counted, what belongs to it, and its name in the plural.
FLAPS = {
    Event.yielding: (Event.yielding, "yields"),
    Event.resumed: (Event.yielding, "yields"),
    Event.crashed: (Event.crashed, "crashes of vLLM"),
    Event.tunnel: (Event.tunnel, "changes of the tunnel"),
    Event.held: (Event.held, "holds"),
}
LEAST = (Event.resumed, Event.serving, Event.tunnel, Event.yielding)  # the least important first


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One notice for one destination. before: the key that had been told before it; folds: the departure that it
    counts; lost: what a digest counts, event to number."""

    id: int
    dest: str
    sid: str
    event: Event
    about: About | None
    before: str
    title: str
    message: str
    tag: str
    alarm: bool
    created_at: float
    due_at: float
    expires_at: float | None
    folds: Event | None = None
    lost: dict[str, int] = {}
    dropped: int = 0
    tries: int = 0


class Deadman(msgspec.Struct, frozen=True):
    """The notice that the server tells unless it is renewed: under this sequence id, at this time."""

    sid: str
    fires_at: float | None  # None: the server may not have it yet


class State(msgspec.Struct, frozen=True, kw_only=True):
    """told: what was noticed so far; salt: makes sequence ids our own; departures: (event, wall time) of late;
    replaces: whether the server has shown that it knows sequence ids."""

    told: Told = Told()
    salt: str = ""
    next_id: int = 1
    departures: tuple[tuple[Event, float], ...] = ()
    replaces: bool = False
    deadman: Deadman | None = None


class Book(msgspec.Struct, frozen=True):
    """All that is known, and all that is kept on disk."""

    entries: tuple[Entry, ...] = ()
    state: State = State()


def put(book: Book, notice: Notice, dests: tuple[str, ...], now_at: float, tell: bool = True) -> Book:
    """A notice for these destinations. tell False: it is only remembered."""
    state = book.state
    before = getattr(state.told, notice.about) if notice.about is not None else ""
    told = after(state.told, notice)
    held = [one for one in book.entries if one.about is notice.about is not None and one.due_at > now_at and one.folds is None]
    entries = tuple(one for one in book.entries if one not in held)
    before = held[0].before if held else before
    state = msgspec.structs.replace(state, told=told)
    book = Book(entries, state)
    # Down and up again before anybody heard of it: nothing has happened.
    if not tell or (held and before == notice.key):
        return book
    flap = FLAPS.get(notice.event) if not notice.alarm or notice.event is Event.crashed else None
    if flap is None:
        return _add(book, notice, dests, before, now_at)
    counted, plural = flap
    recent = tuple((event, at) for event, at in state.departures if now_at - FOLD_WITHIN_S < at <= now_at)
    # A release that took its time is told when it begins and when it is over, and is one.
    again = before.startswith("yielding:") or (held and held[0].event is counted)
    if notice.event is counted and not again:
        recent += ((counted, now_at),)
    book = Book(entries, msgspec.structs.replace(state, departures=recent))
    many = sum(event is counted for event, _ in recent)
    if many < FOLD_FROM:
        return _add(book, notice, dests, before, now_at)
    return _fold(book, notice, counted, f"{many} {plural} in 10 minutes", dests, now_at)


def _add(book: Book, notice: Notice, dests: tuple[str, ...], before: str, now_at: float, folds: Event | None = None) -> Book:
    state, entries = book.state, list(book.entries)
    for dest in dests:
        entries.append(
            Entry(
                id=state.next_id, dest=dest, sid=f"{state.salt}-{state.next_id}", event=notice.event, about=notice.about,
                before=before, title=notice.title, message=notice.message, tag=notice.tag, alarm=notice.alarm,
                created_at=now_at, due_at=now_at + notice.hold_s, folds=folds,
                expires_at=now_at + (ALARM_EXPIRES_AFTER_S if notice.alarm else EXPIRES_AFTER_S),
            )
        )  # fmt: skip
        state = msgspec.structs.replace(state, next_id=state.next_id + 1)
    return Book(tuple(entries), state)


def _fold(book: Book, notice: Notice, counted: Event, title: str, dests: tuple[str, ...], now_at: float) -> Book:
    """Into the one that counts these, or a new one."""
    message = f"The last: {notice.title}. {notice.message}"
    there = {one.dest: one for one in book.entries if one.folds is counted}
    shown = msgspec.structs.replace(notice, title=f"{title}: {_place(notice.title)}", message=message, hold_s=FOLD_CALM_S)
    book = _add(book, shown, tuple(dest for dest in dests if dest not in there), "", now_at, counted)

    def folded(one: Entry) -> Entry:
        if one.dest not in there or one.folds is not counted or one.created_at == now_at:
            return one
        due_at = max(one.due_at if one.due_at <= now_at else 0.0, min(now_at + FOLD_CALM_S, one.created_at + FOLD_WITHIN_S))
        return msgspec.structs.replace(one, title=shown.title, message=message, due_at=due_at)

    return Book(tuple(map(folded, book.entries)), book.state)


def _place(title: str) -> str:
    """The node at the end of a title."""
    return title.rpartition(" on ")[2] if " on " in title else title.rpartition(": ")[2]


# --- what is next ------------------------------------------------------------------------------------------


def due(book: Book, dest: str, now_at: float) -> Entry | None:
    """The oldest that may be told now."""
    return next((one for one in book.entries if one.dest == dest and one.due_at <= now_at), None)


def next_at(book: Book, dest: str) -> float | None:
    """When something is due for this destination, None with nothing waiting."""
    return min((one.due_at for one in book.entries if one.dest == dest), default=None)


def paced_at(sent_at: tuple[float, ...], now_at: float) -> float:
    """When the next may be sent after those."""
    late = [at for at in sent_at if now_at - BURST_WITHIN_S < at <= now_at]
    return now_at if len(late) < BURST else late[-1] + PACE_S


def done(book: Book, sent: Entry) -> Book:
    """It was told, or will never be; what has changed meanwhile stays."""
    return Book(tuple(one for one in book.entries if one != sent), book.state)


def tried(book: Book, entry: Entry) -> Book:
    more = msgspec.structs.replace(entry, tries=entry.tries + 1)
    return Book(tuple(more if one == entry else one for one in book.entries), book.state)


def hurry(book: Book, now_at: float) -> Book:
    """Hold nothing back any more: llmwd is ending."""
    entries = tuple(msgspec.structs.replace(one, due_at=min(one.due_at, now_at)) for one in book.entries)
    return Book(entries, book.state)


# --- what will not be told -----------------------------------------------------------------------------------


def tidy(book: Book, dests: tuple[str, ...], node: str, now_at: float) -> tuple[Book, int]:
    """Without what is too old, too much, or for a destination that is none any more; told in digests. (book, how many)"""
    wanted = [one for one in book.entries if one.dest in dests]
    over = [one for one in wanted if one.expires_at is not None and one.expires_at <= now_at]
    book = Book(tuple(one for one in wanted if one not in over), book.state)
    full = [one for dest in dests for one in _too_many(book, dest)]
    book = Book(tuple(one for one in book.entries if one not in full), book.state)
    for dest in dests:
        gone = [one for one in over if one.dest == dest]
        dropped = [one for one in full if one.dest == dest]
        if gone or dropped:
            book = _digest(book, dest, gone, dropped, node, now_at)
    return book, len(over) + len(full)


def _too_many(book: Book, dest: str) -> list[Entry]:
    mine = [one for one in book.entries if one.dest == dest and not one.lost]
    surplus = len(mine) - MOST_ENTRIES
    if surplus <= 0:
        return []
    rank = {event: place for place, event in enumerate(LEAST)}
    return sorted(mine, key=lambda one: (one.alarm, rank.get(one.event, len(LEAST)), one.id))[:surplus]


def _digest(book: Book, dest: str, gone: list[Entry], dropped: list[Entry], node: str, now_at: float) -> Book:
    """One notice of all that this destination was never told."""
    before = next((one for one in book.entries if one.dest == dest and one.lost), None)
    lost = Counter(before.lost if before else {}) + Counter(one.event.value for one in gone + dropped)
    too_many = (before.dropped if before else 0) + len(dropped)
    kinds = ", ".join(f"{number} {event}" for event, number in sorted(lost.items()))
    text = f"Not told in time: {kinds}."
    if too_many:
        text += f" {too_many} of them gave way to others, because too many were waiting."
    number = sum(lost.values())
    title = f"{number} notice{'s' if number != 1 else ''} of {node} {'were' if number != 1 else 'was'} never told"
    if before is not None:
        new = msgspec.structs.replace(before, title=title, message=text, lost=dict(lost), dropped=too_many)
        return Book(tuple(new if one == before else one for one in book.entries), book.state)
    notice = Notice(None, "", title, text, "card_index_dividers", event=Event.digest)
    book = _add(book, notice, (dest,), "", now_at)
    new = msgspec.structs.replace(book.entries[-1], expires_at=None, lost=dict(lost), dropped=too_many)
    return Book((*book.entries[:-1], new), book.state)


def loaded(book: Book, now_at: float) -> Book:
    """As read from disk: after a clock was set back, nothing may wait for longer than it would have."""

    def near(one: Entry) -> Entry:
        late = now_at + ALARM_EXPIRES_AFTER_S
        return msgspec.structs.replace(
            one, created_at=min(one.created_at, now_at), due_at=min(one.due_at, now_at + LATEST_AHEAD_S),
            expires_at=None if one.expires_at is None else min(one.expires_at, late),
        )  # fmt: skip

    return Book(tuple(map(near, book.entries)), book.state)
