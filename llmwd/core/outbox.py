"""What waits to be told, and what is done next about it. Pure.

Theory of operation. The `Book` is all that is known: one `Entry` for each notice and destination, in the order in
which they happened, and the `State` beside them. Every function gives a new book; the notifier keeps it on disk. An
entry is told once it is due (`due_at`: some notices wait a little, in case nothing has happened after all), oldest
first. It leaves the book when it was told (`done`), or when it never will be (core/untold). Flapping is folded:
from the third departure of one kind within ten minutes on, one notice is kept that counts them, and is told
when it is calm again, after ten minutes at the latest; while the server is away it goes on counting. An entry that is
changed while it is being sent stays, and is sent again under its sequence id, which replaces the former on the screen.

All times are wall time, because they outlive the boot; the notifier counts on from its start by the monotonic clock.
"""

import msgspec

from llmwd.core.notices import About, Notice, Told, after
from llmwd.core.wording import spell_duration
from llmwd.vocab import Event

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


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One notice for one destination. before: the key that had been told before it; folds: the departure that it
    counts, `number` of them from since_at to until_at, `apart` of which have entries of their own; lost: what a digest
    counts, event to number; dropped: how many of these gave way to others."""

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
    number: int = 0
    apart: int = 0
    since_at: float = 0.0
    until_at: float = 0.0
    lost: dict[str, int] = {}
    dropped: int = 0
    tries: int = 0


class Deadman(msgspec.Struct, frozen=True):
    """The notice that the server tells unless it is renewed: under this sequence id, at this time. server: a mark of it
    and the topic, which tells neither; "" in what older versions kept."""

    sid: str
    fires_at: float | None  # None: the server may not have it yet
    server: str = ""


class State(msgspec.Struct, frozen=True, kw_only=True):
    """told: what was noticed so far; salt: makes sequence ids our own; departures: (event, wall time) of late;
    replaces: whether the server (by its mark) has shown that it knows sequence ids; back: dead man's notices that are to
    be taken back; dests: the last ones that there were."""

    told: Told = Told()
    salt: str = ""
    next_id: int = 1
    departures: tuple[tuple[Event, float], ...] = ()
    replaces: bool = False
    server: str = ""
    deadman: Deadman | None = None
    back: tuple[Deadman, ...] = ()
    dests: tuple[str, ...] = ()


class Book(msgspec.Struct, frozen=True):
    """All that is known, and all that is kept on disk."""

    entries: tuple[Entry, ...] = ()
    state: State = State()


def put(book: Book, notice: Notice, dests: tuple[str, ...], now_at: float, tell: bool = True) -> Book:
    """A notice for these destinations. tell False: it is only remembered."""
    state = book.state
    before = getattr(state.told, notice.about) if notice.about is not None else ""
    told = after(state.told, notice)
    waits = [one for one in book.entries if one.about is notice.about is not None and one.due_at > now_at and one.folds is None]
    first = waits[0].before if waits else before
    # Only news of the same kind says all that the former said. After any other the former is told as well, and first.
    held = [one for one in waits if one.event is notice.event or first == notice.key]
    entries = tuple(_hurried(one, now_at) if one in waits else one for one in book.entries if one not in held)
    before = held[0].before if held else before
    state = msgspec.structs.replace(state, told=told)
    book = Book(entries, state)
    # Down and up again before anybody heard of it: nothing has happened.
    if not tell or (held and before == notice.key):
        return book
    flap = FLAPS.get(notice.event) if not notice.alarm or notice.event is Event.crashed else None
    if flap is None:
        return add(book, notice, dests, before, now_at)
    counted, plural = flap
    recent = tuple((event, at) for event, at in state.departures if now_at - FOLD_WITHIN_S < at <= now_at)
    # A release that took its time is told when it begins and when it is over, and is one.
    again = (counted is Event.yielding and before.startswith("yielding:")) or (held and held[0].event is counted)
    if notice.event is counted and not again:
        recent += ((counted, now_at),)
    book = Book(entries, msgspec.structs.replace(state, departures=recent))
    times_at = tuple(at for event, at in recent if event is counted)
    if len(times_at) < FOLD_FROM:
        return add(book, notice, dests, before, now_at)
    return _fold(book, notice, counted, plural, times_at, dests, now_at)


def add(book: Book, notice: Notice, dests: tuple[str, ...], before: str, now_at: float) -> Book:
    """An entry for each destination, at the end."""
    state, entries = book.state, list(book.entries)
    for dest in dests:
        entries.append(
            Entry(
                id=state.next_id, dest=dest, sid=f"{state.salt}-{state.next_id}", event=notice.event, about=notice.about,
                before=before, title=notice.title, message=notice.message, tag=notice.tag, alarm=notice.alarm,
                created_at=now_at, due_at=now_at + notice.hold_s,
                expires_at=now_at + (ALARM_EXPIRES_AFTER_S if notice.alarm else EXPIRES_AFTER_S),
            )
        )  # fmt: skip
        state = msgspec.structs.replace(state, next_id=state.next_id + 1)
    return Book(tuple(entries), state)


def _fold(
    book: Book, notice: Notice, counted: Event, plural: str, times_at: tuple[float, ...], dests: tuple[str, ...], now_at: float
) -> Book:
    """Into the one that counts these, or a new one. times_at: of the departures of late."""
    message = f"The last: {notice.title}. {notice.message}"
    there = {one.dest for one in book.entries if one.folds is counted}
    new = tuple(dest for dest in dests if dest not in there)
    first_id = book.state.next_id
    book = add(book, msgspec.structs.replace(notice, message=message, hold_s=FOLD_CALM_S), new, "", now_at)

    def folded(one: Entry) -> Entry:
        if one.id >= first_id:
            one = msgspec.structs.replace(one, folds=counted)
        elif one.folds is not counted:
            return one
        more, since_at = sum(at > one.until_at for at in times_at), one.since_at or times_at[0]  # 0: of an older version
        number, over_s = one.number + more, now_at - since_at
        over = "10 minutes" if over_s <= FOLD_WITHIN_S else spell_duration(over_s)
        due_at = max(one.due_at if one.due_at <= now_at else 0.0, min(now_at + FOLD_CALM_S, one.created_at + FOLD_WITHIN_S))
        return msgspec.structs.replace(
            one, title=f"{number} {plural} in {over}: {_place(notice.title)}", message=message, due_at=due_at, number=number,
            since_at=since_at, apart=one.apart + max(0, more - 1), until_at=times_at[-1],
        )  # fmt: skip

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
    """Hold nothing back any more: llmwd is ending. That a tunnel is not there for a moment is no news any more."""
    entries = [one for one in book.entries if one.about is not About.tunnel or one.due_at <= now_at or one.folds]
    return Book(tuple(_hurried(one, now_at) for one in entries), book.state)


def _hurried(one: Entry, now_at: float) -> Entry:
    return msgspec.structs.replace(one, due_at=min(one.due_at, now_at))


def merged(found: Book, book: Book, begun: bool) -> Book:
    """What was read from disk, and after it what has happened before it was read. begun: notices were considered without it.
    A new book's ids are beyond all on disk, until it is known that these go on from there."""
    old, new = found.state, book.state
    goes_on = bool(old.salt) and not book.entries
    state = msgspec.structs.replace(
        old, salt=old.salt or new.salt, next_id=old.next_id if goes_on else max(old.next_id, new.next_id)
    )
    if begun:
        told = {name: getattr(new.told, name) or getattr(old.told, name) for name in Told.__struct_fields__}
        same = new.server in ("", old.server)
        state = msgspec.structs.replace(
            state, told=Told(**told), departures=old.departures + new.departures, next_id=max(old.next_id, new.next_id),
            replaces=old.replaces or new.replaces if same else new.replaces, server=new.server or old.server,
            deadman=old.deadman or new.deadman, back=old.back + new.back,
        )  # fmt: skip
    return Book(found.entries + book.entries, state)


def loaded(book: Book, now_at: float) -> Book:
    """As read from disk: after a clock was set back, nothing may wait for longer than it would have."""

    def near(one: Entry) -> Entry:
        late = now_at + ALARM_EXPIRES_AFTER_S
        return msgspec.structs.replace(
            one, created_at=min(one.created_at, now_at), due_at=min(one.due_at, now_at + LATEST_AHEAD_S),
            until_at=min(one.until_at, now_at),
            expires_at=None if one.expires_at is None else min(one.expires_at, late),
        )  # fmt: skip

    return Book(tuple(map(near, book.entries)), book.state)
