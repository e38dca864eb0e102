"""The outbox on disk: a SQLite file in the state folder. Blocks, on a network file system for long: beside the loop.

No write-ahead log: its shared memory does not work on network file systems. persist-queue and litequeue were
considered: the one insists on that log and pickles, the other knows no time at which something is due.
"""

import os
import sqlite3
from pathlib import Path

BUSY_WITHIN_S = 5.0
NAME = "outbox.sqlite3"
# What SQLite says where the file system knows no locks (ENOSYS, EOPNOTSUPP). Locked by somebody is another.
NO_LOCKS = frozenset(
    {sqlite3.SQLITE_IOERR_LOCK, sqlite3.SQLITE_IOERR_RDLOCK, sqlite3.SQLITE_IOERR_UNLOCK, sqlite3.SQLITE_IOERR_CHECKRESERVEDLOCK}
)  # fmt: skip
_TABLE = "CREATE TABLE IF NOT EXISTS kept (name TEXT PRIMARY KEY, body BLOB NOT NULL)"


class OutboxError(Exception):
    """It cannot be kept or read; the text is a sentence."""


class Outbox:
    """Named rows of bytes. Not for two threads at a time."""

    def __init__(self, state: Path):
        self.path = state / NAME
        self._rows: dict[str, bytes] | None = None  # what is on disk, as far as we know
        self._connection: sqlite3.Connection | None = None
        self._was_read = self._without_locks = False

    def read(self) -> tuple[dict[str, bytes], str]:
        """(what is kept, what has to be said about it). A damaged file is set aside. Raises OutboxError."""
        try:
            return self._read(), ""
        except sqlite3.DatabaseError as error:
            said = self._set_aside(error, "read")
        except OSError as error:
            self.close()
            raise OutboxError(f"{self.path} cannot be read: {error.strerror}") from error
        try:
            return self._read(), f"{said}; what it held is not told"
        except (OSError, sqlite3.Error) as again:
            self.close()
            raise OutboxError(f"{self.path} cannot be made anew: {again}") from again

    def _read(self) -> dict[str, bytes]:
        self._open()
        self._rows = {name: bytes(body) for name, body in self._connection.execute("SELECT name, body FROM kept")}
        self._was_read = True
        return dict(self._rows)

    def keep(self, rows: dict[str, bytes]) -> str:
        """From now on these rows and no others, in one transaction: only after read(), because it deletes. A damaged file
        is set aside. What has to be said about it. Raises OutboxError."""
        if not self._was_read:
            raise OutboxError(f"{self.path} has not been read yet")
        said = ""
        try:
            try:
                self._keep(rows)
            except sqlite3.DatabaseError as error:
                said = self._set_aside(error, "written")
                self._keep(rows)
        except (OSError, sqlite3.Error) as error:
            self.close()
            raise OutboxError(f"{self.path} cannot be written: {error}") from error
        return said

    def _keep(self, rows: dict[str, bytes]) -> None:
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

    def _set_aside(self, error: sqlite3.DatabaseError, doing: str) -> str:
        """What was done about a damaged file. Raises OutboxError for what is no damage, and if it cannot be set aside."""
        self.close()
        # Full, locked and unreadable are no damage: the file may be good.
        if isinstance(error, sqlite3.OperationalError):
            raise OutboxError(f"{self.path} cannot be {doing}: {error}") from error
        aside = self.path.with_suffix(".damaged")
        try:
            os.replace(self.path, aside)
            self.path.with_name(f"{NAME}-journal").unlink(missing_ok=True)
        except OSError as again:
            raise OutboxError(f"{self.path} is damaged and cannot be set aside: {again}") from again
        return f"the outbox was damaged ({error}) and is now {aside}"

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = self._rows = None

    def _open(self) -> None:
        # Made before SQLite would, for us alone.
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        try:
            self._connect()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode not in NO_LOCKS:
                raise
            # Lustre mounted without flock. One supervisor per node holds a lock elsewhere, and the folder is the node's.
            self.close()
            self._without_locks = True
            self._connect()

    def _connect(self) -> None:
        self._connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}{'?nolock=1' if self._without_locks else ''}", timeout=BUSY_WITHIN_S,
            check_same_thread=False, uri=True,
        )  # fmt: skip
        self._connection.execute("PRAGMA journal_mode=TRUNCATE")
        self._connection.execute("PRAGMA synchronous=FULL")
        self._connection.execute(_TABLE)
        self._connection.commit()
