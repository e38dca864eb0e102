"""Holders for tests: started with a marker of their own, and nothing of them may be left after a test."""

import itertools
import json
import os
import select
import signal
import sys
import time
from pathlib import Path

import pytest

from llmwd.adapters import holding, procs
from llmwd.adapters.sweeping import Sweep
from llmwd.messages import HolderSpec, HolderState, Release, Renew
from tests.waiting import wait_until

SERVER = Path(__file__).resolve().parent.parent / "fakes" / "server.py"
_numbers = itertools.count()


class Held:
    """A holder, the link to it, and what was heard on it."""

    def __init__(self, spec: HolderSpec, root_fd: int | None = None) -> None:
        self.spec = spec
        self.heard: list[HolderState] = []
        self.process = holding.launch(spec, root_fd)
        self.link: holding.HolderLink | None = None

    def connect(self) -> "Held":
        self.link = holding.connect(self.spec.socket, 30)
        assert self.link, "the holder does not listen"
        return self

    def listen(self) -> HolderState | None:
        """Take in what has arrived; the newest state."""
        states = self.link.receive()
        assert states is not None or (self.heard and self.heard[-1].gone_s), f"the link broke: {self.output()}"
        self.heard += states or []
        return self.heard[-1] if self.heard else None

    def until(self, condition, within_s: float = 30.0) -> HolderState:
        """The newest state once it fulfils `condition`."""

        def found() -> HolderState | None:
            state = self.listen()
            return state if state and condition(state) else None

        return wait_until(found, within_s, what="the awaited state")

    def released(self, grace_s: float = 1.0, within_s: float = 30.0) -> HolderState:
        """The last state after a release."""
        assert self.link.send(Release(grace_s=grace_s, reason="test"))
        return self.until(lambda state: state.gone_s, within_s)

    def renew(self) -> HolderState:
        """The state that a renewal is answered with; it has looked at its tree for that."""
        self.listen()
        before = len(self.heard)
        self.link.send(Renew(expires_s=self.spec.expires_s))
        return self.until(lambda state: len(self.heard) > before)

    def report(self) -> dict:
        """What the fake server wrote about itself, once all of its tree is there."""
        path = Path(self.spec.env["FAKE_REPORT"])
        wait_until(path.exists, what="the fake server's report")
        return json.loads(path.read_text())

    def ended(self) -> int:
        """The holder's exit status, once it has ended."""
        wait_until(lambda: self.process.reap() is not None, what="the end of the holder")
        return self.process.reap()

    def output(self) -> str:
        path = Path(self.spec.log)
        return path.read_text() if path.exists() else ""


def running(pids) -> list[int]:
    """Those of `pids` that live."""
    return [pid for pid in pids if (found := procs.stat(pid)) and not found.dead]


@pytest.fixture
def hold(tmp_path):
    """hold(*argv, root_fd=None, connected=True, **fields of HolderSpec): a Held; argv of flags runs the fake server."""
    made: list[Held] = []

    def start(*argv: str, root_fd: int | None = None, connected: bool = True, env=None, **fields) -> Held:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        if not argv or argv[0].startswith("--"):
            argv = (sys.executable, str(SERVER), "serve", "m", "--host", "127.0.0.1", "--port", "0", *argv)
        spec = HolderSpec(**{
            "service": "vllm", "argv": argv, "cwd": str(folder), "socket": str(folder / "s"),
            "env": {"PATH": os.environ["PATH"], "FAKE_REPORT": str(folder / "report")} | (env or {}),
            "log": str(folder / "log"), "log_max_bytes": 1 << 20, "log_keep": 2, "grace_s": 1.0, "note": {},
            "expires_s": time.monotonic() + 300, "marker": f"{os.getpid()}-{next(_numbers)}",
        } | fields)  # fmt: skip
        made.append(Held(spec, root_fd))
        return made[-1].connect() if connected else made[-1]

    yield start
    for held in made:
        if held.link:
            held.link.close()
        if held.process.reap() is None:
            signal.pidfd_send_signal(held.process.pidfd, signal.SIGTERM)
            select.select([held.process.pidfd], [], [], 30)
        assert held.process.reap() is not None, "the holder goes on after the test"
        held.process.close()
        left = wait_left(held.spec.marker)
        assert not left, f"processes are left: {left}"


def wait_left(marker: str) -> list[int]:
    """What is left of a tree, after a moment for dying processes; it is killed then."""
    end = time.monotonic() + 5
    while (left := [pid for pid, _ in procs.find_marked(marker)]) and time.monotonic() < end:
        select.select([], [], [], 0.01)
    if left:
        sweep = Sweep(marker, None)
        wait_until(lambda: sweep.step(print))
    return left
