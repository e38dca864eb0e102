"""Watching folders with the real kernel."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmwd.adapters.inotify import WRITTEN, Event, Folders
from tests.waiting import wait_until

QUEUE = Path("/proc/sys/fs/inotify/max_queued_events")


@pytest.fixture
def folders() -> Iterator[Folders]:
    made = Folders()
    made.open()
    yield made
    made.close()


def test_names_that_appear_and_disappear_are_told_in_order(folders: Folders, tmp_path: Path) -> None:
    folders.watch(str(tmp_path))
    (tmp_path / "a").mkdir()
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "b").rmdir()
    here = str(tmp_path)
    expected = [Event(here, "a", True), Event(here, "a", False), Event(here, "b", True), Event(here, "b", False)]
    assert folders.read() == (expected, False)


def test_reading_never_waits(folders: Folders, tmp_path: Path) -> None:
    folders.watch(str(tmp_path))
    assert folders.read() == ([], False)


def test_a_file_is_told_when_it_has_been_written_not_when_it_is_made(folders: Folders, tmp_path: Path) -> None:
    folders.watch(str(tmp_path), WRITTEN)
    with (tmp_path / "a").open("w") as file:
        assert folders.read() == ([], False)
        file.write("0")
    assert folders.read() == ([Event(str(tmp_path), "a", True)], False)


def test_watching_again_loses_no_event(folders: Folders, tmp_path: Path) -> None:
    folders.watch(str(tmp_path))
    (tmp_path / "a").mkdir()
    folders.watch(str(tmp_path))
    (tmp_path / "b").mkdir()
    assert [event.name for event in folders.read()[0]] == ["a", "b"]


def test_a_folder_made_again_is_watched_again(folders: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "scope"
    folder.mkdir()
    folders.watch(str(folder))
    folder.rmdir()
    assert folders.read() == ([], True)
    folder.mkdir()
    folders.watch(str(folder))
    (folder / "a").mkdir()
    assert folders.read() == ([Event(str(folder), "a", True)], False)


def test_a_folder_no_longer_wanted_is_silent(folders: Folders, tmp_path: Path) -> None:
    for name in ("kept", "dropped"):
        (tmp_path / name).mkdir()
        folders.watch(str(tmp_path / name))
    folders.keep_only({str(tmp_path / "kept")})
    for name in ("kept", "dropped"):
        (tmp_path / name / "x").mkdir()
    assert folders.read() == ([Event(str(tmp_path / "kept"), "x", True)], False)


def test_a_full_queue_means_that_everything_has_to_be_listed_again(folders: Folders, tmp_path: Path) -> None:
    folders.watch(str(tmp_path))
    for number in range(int(QUEUE.read_text()) // 2 + 1):
        name = tmp_path / str(number % 2)
        name.mkdir()
        name.rmdir()
    assert folders.read()[1]


def test_a_missing_folder_is_no_trouble(folders: Folders, tmp_path: Path) -> None:
    folders.watch(str(tmp_path / "none"))
    assert folders.trouble == ""


def test_the_descriptor_is_readable_when_something_happened(folders: Folders, tmp_path: Path) -> None:
    folders.watch(str(tmp_path))
    (tmp_path / "a").mkdir()
    wait_until(lambda: folders.read()[0], within_s=5)


LIMITED = """
import sys
from llmwd.adapters.inotify import Folders
folders = Folders()
folders.open()
for folder in sys.argv[1:]:
    folders.watch(folder)
print(folders.trouble)
"""


@pytest.mark.parametrize(("limit", "count"), [("max_inotify_instances", 0), ("max_inotify_watches", 1)])
def test_a_limit_of_the_kernel_is_told_in_words(limit: str, count: int, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    program = [sys.executable, "-c", LIMITED, str(tmp_path), str(tmp_path / "a")]
    shell = f'echo {count} > /proc/sys/user/{limit} && exec "$@"'  # a user namespace has limits of its own
    done = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", shell, "sh", *program],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert "limit" in done.stdout and limit.removeprefix("max_inotify") in done.stdout.replace("max_user", ""), done
