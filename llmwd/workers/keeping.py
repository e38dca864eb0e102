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


class Keeper:
    """`settled`: what was last asked to be kept is on disk, or is not waited for. trouble: a sentence, "" while it works."""

    def __init__(self, shell: Shell, state: Path, changed: Callable[[], None]):
        self.shell = shell
        self.trouble = ""
        self._outbox = Outbox(state)
        self._changed = changed
        self._wanted: Book | None = None
        self._busy_since_s: float | None = None
        self._last: Book | None = None

    @property
    def settled(self) -> bool:
        return self._busy_since_s is None or time.monotonic() - self._busy_since_s > PATIENCE_S

    @property
    def idle(self) -> bool:
        return self._busy_since_s is None

    def read(self, then: Callable[[Book], None]) -> None:
        """What earlier incarnations kept; an empty book where nothing can be read."""
        self._begin()

        def work() -> tuple[Book, str]:
            try:
                rows, said = self._outbox.read()
            except OutboxError as error:
                return Book(), str(error)
            book, unread = _decode(rows)
            return book, said or (f"{unread} notices of the outbox cannot be understood, and are left out" if unread else "")

        def arrived(found: tuple[Book, str] | None) -> None:
            self._busy_since_s = None
            book, said = found or (Book(), "the outbox could not be read: see the traceback")
            if said:
                self.shell.log.error("%s", said)
            then(book)

        self.shell.beside(work, arrived)

    def keep(self, book: Book) -> None:
        """On disk as soon as possible; the latest book is all that counts."""
        if book == self._last:
            return
        self._last = self._wanted = book
        if self.idle and not self.trouble:
            self._write()

    def _begin(self) -> None:
        self._busy_since_s = time.monotonic()
        self.shell.at("disk", self._busy_since_s + PATIENCE_S + 0.1, self._changed)

    def _write(self) -> None:
        book, self._wanted = self._wanted, None
        self._begin()
        self.shell.beside(lambda: self._keep(book), lambda why: self._written(book, why))

    def _keep(self, book: Book) -> str:
        try:
            self._outbox.keep({STATE: msgspec.json.encode(book.state)} | {one.sid: msgspec.json.encode(one) for one in book.entries})
        except OutboxError as error:
            return str(error)
        return ""

    def _written(self, book: Book, why: str | None) -> None:
        self._busy_since_s = None
        trouble = "the outbox cannot be kept: see the traceback" if why is None else why
        if trouble and not self.trouble:
            self.shell.log.error("notices are kept in memory only until this works again: %s", trouble)
        elif self.trouble and not trouble:
            self.shell.log.info("notices are kept on disk again")
        self.trouble = trouble
        if trouble:
            self._wanted = self._wanted or book
            self.shell.at("keep-again", time.monotonic() + AGAIN_S, self._again)
        elif self._wanted is not None:
            self._write()
        self._changed()

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
