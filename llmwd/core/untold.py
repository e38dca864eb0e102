"""What will not be told, or elsewhere: notices that are too old, too many, or for an address that is none any more. Pure.

Nothing is lost in silence: what is given up is counted in one digest for each destination. Notices for an address that
was taken out of the settings wait for it to come back, go to a new one as soon as there is one, and are counted like
others when their time is over. Nothing that is being sent at this moment is given up.
"""

from collections import Counter

import msgspec

from llmwd.core.notices import Notice
from llmwd.core.outbox import Book, Entry, add
from llmwd.vocab import Event

MOST_ENTRIES = 400
LEAST = (Event.resumed, Event.serving, Event.tunnel, Event.yielding)  # the least important first


def tidy(book: Book, dests: tuple[str, ...], sending: frozenset[str], node: str, now_at: float) -> tuple[Book, int]:
    """Without what is too old or too much, which is told in digests. sending: sequence ids. (book, how many)"""
    over = [one for one in book.entries if one.sid not in sending and one.expires_at is not None and one.expires_at <= now_at]
    book = Book(tuple(one for one in book.entries if one not in over), book.state)
    full = [one for dest in {one.dest for one in book.entries} for one in _too_many(book, dest, sending)]
    book = Book(tuple(one for one in book.entries if one not in full), book.state)
    for dest in sorted({one.dest for one in over + full}):
        gone = [one for one in over if one.dest == dest]
        dropped = [one for one in full if one.dest == dest]
        book = _digest(book, dest if dest in dests or not dests else dests[0], gone, dropped, node, now_at)
    return book, len(over) + len(full)


def addressed(book: Book, dests: tuple[str, ...]) -> tuple[Book, tuple[str, ...]]:
    """What waits for an address that is none any more goes to a new one: of the same service, else to any. (book, those
    that have notices left which wait for them to come back)"""
    if not dests:  # switched off, maybe for a moment
        return book, ()
    new = [dest for dest in dests if dest not in book.state.dests]
    lost = sorted({one.dest for one in book.entries} - set(dests))
    heirs = {dest: next((one for one in new if _service(one) == _service(dest)), new[0]) for dest in lost if new}

    def to_heir(one: Entry) -> Entry:
        # A digest waits for nobody: it has no end of its own, and is for people, not for an address.
        dest = heirs.get(one.dest) or (dests[0] if one.lost and one.dest in lost else one.dest)
        return one if dest == one.dest else msgspec.structs.replace(one, dest=dest)

    book = Book(tuple(map(to_heir, book.entries)), msgspec.structs.replace(book.state, dests=dests))
    return book, tuple(sorted({one.dest for one in book.entries} - set(dests)))


def _service(dest: str) -> str:
    return dest.partition("-")[0]


def _too_many(book: Book, dest: str, sending: frozenset[str]) -> list[Entry]:
    mine = [one for one in book.entries if one.dest == dest and not one.lost]
    surplus = len(mine) - MOST_ENTRIES
    if surplus <= 0:
        return []
    rank = {event: place for place, event in enumerate(LEAST)}
    least = sorted(mine, key=lambda one: (one.alarm, rank.get(one.event, len(LEAST)), one.id))
    return [one for one in least if one.sid not in sending][:surplus]


def _digest(book: Book, dest: str, gone: list[Entry], dropped: list[Entry], node: str, now_at: float) -> Book:
    """One notice of all that was never told."""
    before = next((one for one in book.entries if one.dest == dest and one.lost), None)
    lost = Counter(before.lost if before else {})
    for one in gone + dropped:
        lost[one.folds or one.event] += max(1, one.number - one.apart)
    too_many = (before.dropped if before else 0) + len(dropped)
    kinds = ", ".join(f"{number} {event}" for event, number in sorted(lost.items()))
    text = f"Not told in time: {kinds}."
    if too_many:
        text += f" {too_many} of them gave way to others, because too many were waiting."
    number = sum(lost.values())
    title = f"{number} notice{'s' if number != 1 else ''} of {node} {'were' if number != 1 else 'was'} never told"
    if before is None:
        book = add(book, Notice(None, "", title, text, "card_index_dividers", event=Event.digest), (dest,), "", now_at)
        before = book.entries[-1]
    counts = {str(event): number for event, number in lost.items()}
    new = msgspec.structs.replace(before, title=title, message=text, expires_at=None, lost=counts, dropped=too_many)
    return Book(tuple(new if one == before else one for one in book.entries), book.state)
