"""Slurm's commands as processes: real programs that behave badly."""

import os
import select
from pathlib import Path

import pytest

from llmwd.adapters import slurm
from tests.adapters.held import running
from tests.waiting import wait_until


def ended(call: slurm.Call) -> slurm.Answer:
    poll = select.poll()
    poll.register(call, select.POLLIN)
    assert poll.poll(30_000)
    return call.answer()


def script(folder: Path, text: str) -> list[str]:
    path = folder / "program"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return [str(path)]


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_an_answer_has_what_was_printed_and_how_it_ended(tmp_path: Path) -> None:
    answer = ended(slurm.start(script(tmp_path, "echo out $LC_ALL; echo err >&2; exit 3"), 30))
    assert (answer.status, answer.stdout, answer.stderr) == (3, "out C\n", "err\n")


def test_neither_a_program_that_is_not_there_nor_one_that_ends_leaves_a_file_open(tmp_path: Path) -> None:
    before = open_files()
    for _ in range(20):
        answer = slurm.start([str(tmp_path / "nothing")], 30)
        assert answer.status is None and "No such file" in answer.stderr
        ended(slurm.start(["true"], 30))
        assert slurm.start(["sleep", "600"], 30).kill().status is None
    assert open_files() == before


@pytest.mark.parametrize("end", ["overdue", "in time"])
def test_what_a_sites_wrapper_has_started_ends_with_it(tmp_path: Path, end: str) -> None:
    last = "wait" if end == "overdue" else "exit 0"
    call = slurm.start(script(tmp_path, f"trap '' TERM; sleep 600 & echo $! >{tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid; {last}"), 30)
    pid = int(wait_until((tmp_path / "pid").exists) and (tmp_path / "pid").read_text())
    answer = call.kill() if end == "overdue" else ended(call)
    assert (answer.status is None) == (end == "overdue")
    wait_until(lambda: not running([pid]), what="the end of the child")


def test_a_command_that_is_overdue_is_told_with_what_it_had_said(tmp_path: Path) -> None:
    call = slurm.start(script(tmp_path, f"echo 'connect  failure' >&2; touch {tmp_path}/said; exec sleep 600"), 0.1)
    wait_until((tmp_path / "said").exists)
    assert "timed out" in (said := call.kill().stderr) and "connect failure" in said


def test_output_without_end_is_an_answer_that_says_so_and_takes_no_memory() -> None:
    answer = ended(slurm.start(["yes"], 30, most_bytes=1 << 16))
    assert answer.status is None and answer.stdout == "" and answer.stderr == "yes printed more than 64 KiB"
