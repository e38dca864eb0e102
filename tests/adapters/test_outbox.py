"""The outbox's file: damaged, locked, and where there are no locks."""

import sqlite3

import pytest

from llmwd.adapters import outbox
from llmwd.adapters.outbox import Outbox, OutboxError


def test_what_was_not_read_is_not_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(outbox, "BUSY_WITHIN_S", 0.1)
    first = Outbox(tmp_path)
    first.read()
    first.keep({"a": b"1"})
    first.close()
    second = Outbox(tmp_path)
    lock = sqlite3.connect(second.path, isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    with pytest.raises(OutboxError, match="locked"):
        second.read()
    lock.execute("ROLLBACK")
    lock.close()
    with pytest.raises(OutboxError, match="not been read"):
        second.keep({"b": b"2"})
    assert second.read() == ({"a": b"1"}, "")


def test_a_file_that_is_damaged_later_is_set_aside_and_nothing_is_lost(tmp_path):
    box = Outbox(tmp_path)
    box.read()
    assert box.keep({"a": b"1"}) == ""
    box.path.write_bytes(b"garbage" * 2000)
    assert "damaged" in box.keep({"a": b"1", "b": b"2"})
    assert (tmp_path / "outbox.damaged").exists() and Outbox(tmp_path).read() == ({"a": b"1", "b": b"2"}, "")


def test_where_the_file_system_knows_no_locks_it_is_kept_without(tmp_path, monkeypatch):
    """As SQLite says it on a Lustre that is mounted without flock."""
    real = sqlite3.connect

    def connect(name: str, **more: object) -> sqlite3.Connection:
        if "nolock=1" in name:
            return real(name, **more)
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR_LOCK
        raise error

    monkeypatch.setattr(sqlite3, "connect", connect)
    box = Outbox(tmp_path / "a#b?c")
    box.path.parent.mkdir()
    box.read()
    box.keep({"a": b"1"})
    assert Outbox(box.path.parent).read() == ({"a": b"1"}, "")
