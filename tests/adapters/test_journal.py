"""The journal: whole lines by several writers, over rotations and full disks; and who reads it meanwhile."""

import fcntl
import json
import logging
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmwd.adapters import journal as adapter
from llmwd.adapters.journal import BOOT_ID, Journal, JournalTail, read_journal

LOG = logging.getLogger("llmwd-test")


def journal(state: Path, worker: str = "vllm") -> Journal:
    return Journal(state, worker, LOG)


def events(rows: list[bytes]) -> list[str]:
    found = []
    for row in rows:
        try:
            found.append(json.loads(row)["event"])
        except ValueError:
            found.append("?" if row else "")
    return found


@contextmanager
def room_for(more: int, path: Path) -> Iterator[None]:
    """The file can grow by so many bytes, as on a full disk: a write ends short, the next one fails."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_line_has_both_clocks_and_each_process_names_the_boot_once(tmp_path: Path) -> None:
    first, second = journal(tmp_path), journal(tmp_path, "resolver")
    first.write("one", epoch=1, detail="fine")
    first.write("two")
    second.write("three")
    one, two, three = map(json.loads, read_journal(tmp_path))
    assert one["epoch"] == 1 and one["worker"] == "vllm" and one["at"] > 1e9 and two["mono_s"] >= one["mono_s"] > 0
    assert one["boot_id"] == three["boot_id"] == BOOT_ID.read_text().strip() and "boot_id" not in two


def test_a_line_that_a_full_disk_cut_costs_nobody_the_next_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours, others = journal(tmp_path), journal(tmp_path, "resolver")
    ours.write("one")
    with room_for(30, tmp_path / "journal.jsonl"):
        ours.write("cut")
        ours.write("lost")
    assert "cut could be written in part only" in caplog.text and "lost could not be written" in caplog.text
    others.write("two")
    ours.write("three")
    assert events(read_journal(tmp_path)) == ["one", "?", "two", "three"]


def test_the_boot_is_named_again_where_the_first_line_was_cut(tmp_path: Path) -> None:
    journal(tmp_path).write("one")
    ours = journal(tmp_path, "resolver")
    with room_for(30, tmp_path / "journal.jsonl"):
        ours.write("cut")
    ours.write("two")
    assert json.loads(read_journal(tmp_path)[-1])["boot_id"]


def test_a_rotation_keeps_so_many_files_and_loses_no_line_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "JOURNAL_MAX_BYTES", 1000)
    ours, others = journal(tmp_path), journal(tmp_path, "resolver")
    for number in range(200):
        (ours if number % 2 else others).write(f"event_{number}")
    kept = events(read_journal(tmp_path))
    assert kept == [f"event_{number}" for number in range(200 - len(kept), 200)] and 30 < len(kept) < 100
    assert {path.name for path in tmp_path.iterdir()} - {"journal.jsonl"} == {f"journal.jsonl.{number}" for number in range(1, 6)}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in tmp_path.iterdir())


def test_a_writer_that_had_opened_the_file_before_another_rotated_it_rotates_nothing(tmp_path: Path) -> None:
    ours = journal(tmp_path)
    ours.write("one")
    fd = os.open(tmp_path / "journal.jsonl", os.O_RDWR | os.O_APPEND)
    try:
        os.rename(tmp_path / "journal.jsonl", tmp_path / "journal.jsonl.1")
        ours.write("two")
        ours._rotate(fd)
    finally:
        os.close(fd)
    assert events(read_journal(tmp_path)) == ["one", "two"] and not (tmp_path / "journal.jsonl.2").exists()


def test_nobody_waits_for_a_writer_that_was_stopped_in_the_middle_of_a_rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "JOURNAL_MAX_BYTES", 10)
    journal(tmp_path).write("zero")
    (tmp_path / "journal.jsonl.1").rename(tmp_path / "journal.jsonl")
    with (tmp_path / "journal.jsonl").open() as stopped:
        fcntl.flock(stopped, fcntl.LOCK_EX)
        for event in ("one", "two"):
            journal(tmp_path, "resolver").write(event)
    assert events(read_journal(tmp_path)) == ["zero", "one", "two"] and len(list(tmp_path.iterdir())) == 1


def test_following_tells_whole_lines_only_each_once_over_a_rotation(tmp_path: Path) -> None:
    tail = JournalTail(tmp_path)
    assert tail.new() == []  # there is none yet
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"event": "one"}\n{"event": "tw')
    assert events(tail.new()) == ["one"]
    with path.open("ab") as file:
        file.write(b'o"}\n')
    assert events(tail.new()) == ["two"]
    path.rename(tmp_path / "journal.jsonl.1")
    assert tail.new() == []
    path.write_bytes(b'{"event": "three"}\n')
    assert events(tail.new() + tail.new()) == ["three"]  # the old one to its end, then the new one from its beginning
    with path.open("ab") as file:
        file.write(b'{"event": "four"}\n')
    assert events(tail.new()) == ["four"]
    tail.close()


def test_a_journal_that_is_a_link_is_not_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "journal.jsonl").symlink_to(tmp_path / "elsewhere")
    journal(tmp_path).write("one")
    assert "one could not be written" in caplog.text and not (tmp_path / "elsewhere").exists()


def test_where_there_is_no_journal_there_are_no_lines_and_one_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    assert read_journal(tmp_path) == []
    (tmp_path / "journal.jsonl").mkdir()
    with pytest.raises(OSError):
        read_journal(tmp_path)
