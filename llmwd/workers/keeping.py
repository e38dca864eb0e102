"""The notifier's outbox on disk, always beside the loop: a disk that hangs or is full delays and stops nothing."""

import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from llmwd.adapters.outbox import Outbox, OutboxError
from llmwd.core.outbox import Book, Entry, State
from llmwd.workers.base import Shell

STATE = "state"
PATIENCE_S = 5.0  # so long a send waits for the disk; after that, it may be repeated after a crash
AGAIN_S = 30.0
READ_AGAIN_S = 5.0  # more often: nothing of what earlier incarnations kept is told meanwhile


class Keeper:
    """`settled`: what was last asked to be kept is on disk, or is not waited for. on_disk: what surely is there. trouble: a
    sentence, "" while it works. Nothing is written before what is there was read, because it would be deleted."""

    def __init__(self, shell: Shell, state: Path, changed: Callable[[], None]):
        self.shell = shell
        self.trouble = ""
        self._outbox = Outbox(state)
        self._changed = changed
        self._wanted: Book | None = None
        self._busy_since_s: float | None = None
        self._last: Book | None = None
        self.on_disk: Book | None = None

    @property
    def settled(self) -> bool:
        return self._busy_since_s is None or time.monotonic() - self._busy_since_s > PATIENCE_S

    @property
    def idle(self) -> bool:
        return self._busy_since_s is None

    def has(self, deadman_sid: str) -> bool:
        """Whether the dead man's notice with this id is surely on disk."""
        kept = self.on_disk.state.deadman if self.on_disk is not None else None
        return kept is not None and kept.sid == deadman_sid

    def read(self, then: Callable[[Book], None]) -> None:
        """What earlier incarnations kept. Where it cannot be read: first an empty book, and what was kept once it can be."""
        self._begin()

        def work() -> tuple[Book | None, str]:
            try:
                rows, said = self._outbox.read()
            except OutboxError as error:
                return None, str(error)
            book, unread = _decode(rows)
            return book, said or (f"{unread} notices of the outbox cannot be understood, and are left out" if unread else "")

        def arrived(found: tuple[Book | None, str] | None) -> None:
            self._busy_since_s = None
            book, said = found or (None, "the outbox could not be read: see the traceback")
            if book is None:
                first = not self.trouble
                self._in_trouble(said, lambda: self.read(then))
                if first:
                    then(Book())
                return
            self.on_disk, self._last = book, None
            if said:
                self.shell.log.error("%s", said)
            self._in_trouble("")
            then(book)

        self.shell.beside(work, arrived)

    def keep(self, book: Book) -> None:
        """On disk as soon as possible; the latest book is all that counts."""
        if book == self._last:
            return
        self._last = self._wanted = book
        if self.idle and not self.trouble and self.on_disk is not None:
            self._write()

    def _begin(self) -> None:
        self._busy_since_s = time.monotonic()
        self.shell.at("disk", self._busy_since_s + PATIENCE_S + 0.1, self._changed)

    def _write(self) -> None:
        book, self._wanted = self._wanted, None
        self._begin()
        self.shell.beside(lambda: self._keep(book), lambda why: self._written(book, why))

    def _keep(self, book: Book) -> tuple[bool, str]:
        """(whether it is on disk, what has to be said)"""
        rows = {STATE: msgspec.json.encode(book.state)} | {one.sid: msgspec.json.encode(one) for one in book.entries}
        try:
            return True, self._outbox.keep(rows)
        except OutboxError as error:
            return False, str(error)

    def _written(self, book: Book, outcome: tuple[bool, str] | None) -> None:
        self._busy_since_s = None
        kept, said = outcome or (False, "the outbox cannot be kept: see the traceback")
        if not kept:
            self._wanted = self._wanted or book
            self._in_trouble(said, self._again)
        else:
            self.on_disk = book
            if said:
                self.shell.log.error("%s", said)
            self._in_trouble("")
            if self._wanted is not None:
                self._write()
        self._changed()

    def _in_trouble(self, why: str, again: Callable[[], None] | None = None) -> None:
        """Or out of it; said once."""
        if why and not self.trouble:
            self.shell.log.error("notices are kept in memory only until this works again: %s", why)
        elif self.trouble and not why:
            self.shell.log.info("notices are kept on disk again")
        self.trouble = why
        if again is not None:
            self.shell.at("keep-again", time.monotonic() + (AGAIN_S if self.on_disk is not None else READ_AGAIN_S), again)

    def _again(self) -> None:
        if self.idle and self._wanted is not None:
            self._write()


def _decode(rows: dict[str, bytes]) -> tuple[Book, int]:
    """(the book, how many of its rows another version wrote)"""
    entries, unread, state = [], 0, State()
    for name, body in rows.items():
        try:
            if name == STATE:
                state = msgspec.json.decode(body, type=State)
            else:
                entries.append(msgspec.json.decode(body, type=Entry))
        except msgspec.DecodeError:
            unread += 1
    entries.sort(key=lambda one: one.id)
    # An id is never used twice, even where the state is lost.
    next_id = max([state.next_id, *(one.id + 1 for one in entries)])
    return Book(tuple(entries), msgspec.structs.replace(state, next_id=next_id)), unread
