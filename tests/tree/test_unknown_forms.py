"""Slurm says something in a form that nobody has seen: it counts as a conflict, and is logged with its text, once."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmwd.adapters.rundir import write_atomic
from llmwd.core.claims import Claims
from llmwd.messages import JobSeen
from llmwd.vocab import Source
from llmwd.workers.slurmdesk import SlurmDesk
from tests.fakes.loop_shell import LoopShell

RECORD = (
    "JobId={job} JobName=x\n   JobState=RUNNING Reason=None\n   NodeList=n1\n   NumNodes=1 NumCPUs=1\n   AllocTRES=cpu=1\n"
    "   JOB_GRES=gpu:2\n     Nodes=n1 CPU_IDs=0 Mem=0 GRES={form}\n   WorkDir=/\n\n"
)
DEADLINE_S = 0.5


class Node:
    """Slurm's programs print what files say, and the desk asks them four times a second or more."""

    def __init__(self, folder: Path):
        self.folder = folder / "slurm"
        self.folder.mkdir()
        self._program("squeue", "cat listing")
        self._program("scontrol", 'cat "job_$4"')
        self._program("sinfo", 'case "$*" in *GresUsed*) echo x >> asked; cat used;; *) echo "n1 here gpu:8";; esac')
        self.says(listing="", used="gpu:0(IDX:N/A)  mixed\n")
        self.shell, self.claims = LoopShell(folder, reconcile_s=0.2), Claims(DEADLINE_S)
        self.desk = SlurmDesk(self.shell, self.claims, "here", lambda: None)  # type: ignore[arg-type]

    def _program(self, name: str, what: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\ncd {self.folder}\n{what}\n")
        path.chmod(0o755)

    def says(self, **texts: str) -> None:
        for name, text in texts.items():
            write_atomic(self.folder / name, text.encode())  # a program may print it just now

    def asked(self, times: int) -> None:
        """The node has been asked so many times from now on, and answered all but the last."""
        path = self.folder / "asked"
        wanted = times + (path.read_text().count("x") if path.exists() else 0)
        self.desk.pump()
        self.shell.until(lambda: path.exists() and path.read_text().count("x") >= wanted, 20)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Node]:
    monkeypatch.setenv("PATH", f"{tmp_path}/slurm:/usr/bin:/bin")
    caplog.set_level(logging.INFO, "llmwd-test")
    made = Node(tmp_path)
    yield made
    made.desk.close()
    made.shell.close()


def told(caplog: pytest.LogCaptureFixture, text: str) -> int:
    """How many warnings have this text in them."""
    return sum(record.levelno == logging.WARNING and text in record.getMessage() for record in caplog.records)


def test_a_form_of_the_node_is_logged_with_its_text_exactly_once_and_gives_no_lease(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    node.says(used="gpu:a100:2(IDX:0-1),weird[3]  mixed\n")
    node.asked(4)
    assert told(caplog, "gpu:a100:2(IDX:0-1),weird[3]") == 1
    assert node.claims.unsettled() and "weird[3]" in node.claims.unreadable(), "jobs may be hidden"
    node.says(used="gpu:a100:1(IDX:0),weird[4]  mixed\n")
    node.asked(3)
    assert told(caplog, "weird[") == 1, "other numbers are no other form"
    node.says(used="gpu:a100:2(IDX:0-1)!  mixed\n")
    node.asked(3)
    assert told(caplog, "gpu:a100:2(IDX:0-1)!") == 1 and told(caplog, "weird[") == 1
    node.says(used="gpu:a100:2(IDX:0-1)  mixed\n")
    node.asked(2)
    assert not node.claims.unsettled() and node.claims.used_by_node() == {0, 1}


def test_a_form_of_a_job_is_logged_with_its_text_exactly_once_and_counts_as_every_gpu(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    node.says(used="gpu:2  mixed\n", job_7=RECORD.format(job=7, form="gpu@2[0-1]"), job_8=RECORD.format(job=8, form="gpu@2[4-5]"))
    node.asked(1)
    seen_s = time.monotonic()
    node.claims.see(tuple(JobSeen(id=id, sources=(Source.stepd,), seen_s=seen_s) for id in ("7", "8")), seen_s)
    node.desk.pump()
    node.shell.until(lambda: time.monotonic() > seen_s + 1.5 and node.claims.due(time.monotonic()) == (), 20)  # asked twice each
    assert [view.gpus for view in node.claims.views(time.monotonic())] == [None, None]
    assert told(caplog, "GRES=gpu@2[0-1]") + told(caplog, "GRES=gpu@2[4-5]") == 1
    node.says(job_8=RECORD.format(job=8, form="gpu:2(IDX:4-5)"))
    node.shell.until(lambda: {view.id: view.gpus for view in node.claims.views(time.monotonic())} == {"7": None, "8": {4, 5}}, 20)
