"""The outbox on disk: a SQLite file in the state folder. Blocks, on a network file system for long: beside the loop.

No write-ahead log: its shared memory does not work on network file systems. persist-queue and litequeue were
considered: the one insists on that log and pickles, the other knows no time at which something is due.
"""

import os
import sqlite3
from pathlib import Path

BUSY_WITHIN_S = 5.0
NAME = "outbox.sqlite3"
_TABLE = "CREATE TABLE IF NOT EXISTS kept (name TEXT PRIMARY KEY, body BLOB NOT NULL)"


class OutboxError(Exception):
    """It cannot be kept or read; the text is a sentence."""


class Outbox:
    """Named rows of bytes. Not for two threads at a time."""

    def __init__(self, state: Path):
        self.path = state / NAME
        self._rows: dict[str, bytes] | None = None  # what is on disk, as far as we know
        self._connection: sqlite3.Connection | None = None

    def read(self) -> tuple[dict[str, bytes], str]:
        """(what is kept, what has to be said about it). A damaged file is set aside. Raises OutboxError."""
        try:
            return self._read(), ""
        except sqlite3.DatabaseError as error:
            self.close()
            # Full, locked and unreadable are no damage: the file may be good.
            if isinstance(error, sqlite3.OperationalError):
                raise OutboxError(f"{self.path} cannot be read: {error}") from error
            aside = self.path.with_suffix(".damaged")
            try:
                os.replace(self.path, aside)
                self.path.with_name(f"{NAME}-journal").unlink(missing_ok=True)
                return self._read(), f"the outbox was damaged ({error}) and is now {aside}; what it held is not told"
            except (OSError, sqlite3.Error) as again:
                self.close()
                raise OutboxError(f"{self.path} is damaged and cannot be set aside: {again}") from again
        except OSError as error:
            self.close()
            raise OutboxError(f"{self.path} cannot be read: {error.strerror}") from error

    def _read(self) -> dict[str, bytes]:
        self._open()
        self._rows = {name: bytes(body) for name, body in self._connection.execute("SELECT name, body FROM kept")}
        return dict(self._rows)

    def keep(self, rows: dict[str, bytes]) -> None:
        """From now on these rows and no others, in one transaction. Raises OutboxError."""
        try:
            if self._rows is None or self._connection is None or not self.path.exists():
                self.close()
                self._open()
                self._rows = {}
                self._connection.execute("DELETE FROM kept")
            changed = [(name, body) for name, body in rows.items() if self._rows.get(name) != body]
            gone = [(name,) for name in self._rows if name not in rows]
            if changed or gone or self._connection.in_transaction:
                self._connection.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?)", changed)
                self._connection.executemany("DELETE FROM kept WHERE name = ?", gone)
                self._connection.commit()
            self._rows = dict(rows)
        except (OSError, sqlite3.Error) as error:
            self.close()
            raise OutboxError(f"{self.path} cannot be written: {error}") from error

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = self._rows = None

    def _open(self) -> None:
        # Made before SQLite would, for us alone.
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        self._connection = sqlite3.connect(self.path, timeout=BUSY_WITHIN_S, check_same_thread=False)
        self._connection.execute("PRAGMA journal_mode=TRUNCATE")
        self._connection.execute("PRAGMA synchronous=FULL")
        self._connection.execute(_TABLE)
        self._connection.commit()
