"""Simulated jobs: files in a folder."""

import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmwd.adapters.simjobs import MAX_BYTES, SimJobs, parse


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "sim"


@pytest.fixture
def sim(folder: Path) -> Iterator[SimJobs]:
    made = SimJobs(str(folder))
    made.scan()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("text", "gpus", "for_s"),
    [
        ("0-1\n", (0, 1), None), ("0-1,3", (0, 1, 3), None), ("", (), None), ("\n", (), None), ("3, 1\n", (1, 3), None),
        ("0\nfor=30\n", (0,), 30.0), ("\nfor=0.5\n", (), 0.5), ("for=2\n", (), 2.0),
        ("x\n", None, None), ("1-0\n", None, None), ("0-99999\n", None, None), ("0\n1\n", None, None),
        ("0\nfor=ever\n", None, None), ("-1", None, None), ("٣", None, None), ("0,,1", None, None),
    ],
)
def test_a_file_tells_gpus_and_time(text: str, gpus: tuple[int, ...] | None, for_s: float | None) -> None:
    assert parse(text) == (gpus, for_s)


def test_the_folder_is_made_for_the_user_alone(sim: SimJobs, folder: Path) -> None:
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sim.check().works


def test_a_written_file_is_a_job_until_it_is_removed(sim: SimJobs, folder: Path) -> None:
    (folder / "job_42").write_text("0-1\n")
    assert sim.drain() is False and sim.jobs() == {"42": (0, 1)}
    (folder / "job_42").unlink()
    assert sim.drain() is False and sim.jobs() == {}


def test_a_file_moved_into_its_place_is_a_job(sim: SimJobs, folder: Path) -> None:
    (folder / ".tmp").write_text("2")
    (folder / ".tmp").rename(folder / "job_42")
    sim.drain()
    assert sim.jobs() == {"42": (2,)}


def test_a_rewritten_file_has_other_gpus(sim: SimJobs, folder: Path) -> None:
    for text, gpus in (("0", (0,)), ("", ()), ("nonsense", None)):
        (folder / "job_42").write_text(text)
        sim.drain()
        assert sim.jobs() == {"42": gpus}


def test_files_that_were_there_before_are_found(folder: Path) -> None:
    folder.mkdir()
    (folder / "job_1").write_text("5")
    (folder / "notes.txt").write_text("5")
    sim = SimJobs(str(folder))
    assert sim.scan() == {"1": (5,)}
    sim.close()


def test_what_cannot_be_read_is_a_job_with_unknown_gpus(sim: SimJobs, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("0")
    (folder / "job_1").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(folder / "job_2")
    (folder / "job_3").write_bytes(b"0" * (MAX_BYTES + 1))
    (folder / "job_4").mkdir()
    assert sim.scan() == {"1": None, "2": None, "3": None, "4": None}


def test_a_job_with_a_time_ends_by_itself(sim: SimJobs, folder: Path) -> None:
    before_s = time.monotonic()
    (folder / "job_1").write_text("0\nfor=30\n")
    (folder / "job_2").write_text("0\n")
    sim.drain()
    end_s = sim.next_end_s()
    assert end_s is not None and before_s + 29 < end_s < time.monotonic() + 30.1
    sim.end_due(end_s - 0.1)
    assert (folder / "job_1").exists()
    sim.end_due(end_s)
    sim.drain()
    assert set(sim.jobs()) == {"2"} and sim.next_end_s() is None


def test_the_time_counts_from_the_writing_of_the_file_even_after_a_restart(folder: Path) -> None:
    folder.mkdir()
    (folder / "job_1").write_text("0\nfor=30\n")
    os.utime(folder / "job_1", (time.time() - 20,) * 2)
    sim = SimJobs(str(folder))
    sim.scan()
    end_s = sim.next_end_s()
    assert end_s is not None and end_s < time.monotonic() + 15
    sim.scan()
    assert sim.next_end_s() == end_s, "looking again does not prolong it"
    sim.close()


def test_a_removed_folder_is_made_again(sim: SimJobs, folder: Path) -> None:
    folder.rmdir()
    assert sim.drain() is True
    assert sim.scan() == {}
    (folder / "job_1").write_text("")
    sim.drain()
    assert sim.jobs() == {"1": ()}


def test_where_the_folder_cannot_be_made_the_source_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    sim = SimJobs(str(tmp_path / "file" / "sim"))
    assert sim.scan() is None and "cannot be made" in sim.check().why
    sim.close()


@pytest.mark.parametrize("mode", [0o777, 0o722])
def test_a_folder_that_others_can_write_is_refused_because_they_would_say_when_we_yield(sim: SimJobs, folder: Path, mode: int) -> None:
    folder.chmod(mode)
    (folder / "job_1").write_text("0\n")
    assert sim.scan() is None and not sim.check().works and not sim.absent  # a failure: it is no excuse to serve
    assert "can be written by others" in sim.check().why
    folder.chmod(0o755)
    assert sim.scan() == {"1": (0,)}
