"""A worker run for real, in a process of its own, with a test in the place of the root and of the other workers.

As a program (`python -m tests.workers.harness`) it is that process: a pickled start on its standard input.
"""

import importlib
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import zmq

from llmwd.adapters import rundir
from llmwd.adapters.bus import Publisher
from llmwd.adapters.desk import ask
from llmwd.adapters.line import Line
from llmwd.config import load
from llmwd.messages import Beat, Fact, Order, Ready, Reload, Reply, ServerFact, Stop, ToRoot, ToWorker
from llmwd.vocab import NodePhase, Phase, Reason
from llmwd.workers.base import Boot, run_worker
from tests.waiting import wait_until

T = TypeVar("T")
CHECKOUT = Path(__file__).parents[2]


class WorkerProcess:
    """One incarnation of a worker. `pid`, and what came by its line."""

    def __init__(self, boot: Boot, module: str):
        root_end, worker_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.line = Line(root_end, ToRoot)
        self.heard: list[ToRoot] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.workers.harness"], cwd=CHECKOUT, stdin=subprocess.PIPE,
            stderr=(boot.state / "stderr").open("ab"), pass_fds=(worker_end.fileno(), boot.root_fd),
        )  # fmt: skip
        with self.process.stdin as stdin:
            pickle.dump((boot, module, worker_end.fileno()), stdin)
        worker_end.close()
        self.pid = self.process.pid

    def listen(self) -> None:
        self.heard += self.line.receive()

    @property
    def ready(self) -> bool:
        return any(isinstance(message, Ready) for message in self.heard)

    @property
    def beats(self) -> int:
        return sum(isinstance(message, Beat) for message in self.heard)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Stage:
    """Folders, settings, a pipe that stands for the root's life, and publishers for the other workers."""

    def __init__(self, folder: Path, name: str, **settings: object):
        self.name, self.module = name, f"llmwd.workers.{name}"
        dirs = rundir.Dirs(folder / "h", folder / "r", folder / "s")
        rundir.prepare(dirs)
        (dirs.home / "etc").mkdir(parents=True)
        self.config = dirs.home / "etc/config.env"
        self.write_config(**settings)
        self.dirs = dirs
        root_reader, self._root_writer = os.pipe()
        # Set afterwards for what a settings file does not allow.
        self.boot = Boot(
            name=name, settings=load(dirs.home).settings, home=dirs.home, runtime=dirs.runtime, state=dirs.state,
            node="node7", root_fd=root_reader,
        )  # fmt: skip
        assert self.boot.settings is not None, load(dirs.home).problems
        self._context = zmq.Context()
        self._others: dict[str, Publisher] = {}
        self.workers: list[WorkerProcess] = []

    def write_config(self, **settings: object) -> None:
        """As a whole: a reading that is under way meets the old ones or these, not a part."""
        rundir.write_atomic(self.config, "".join(f"{name}='{value}'\n" for name, value in settings.items()).encode())

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *exc: object) -> None:
        self.end_root()
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.line.close()
                try:
                    worker.process.wait(20)
                except subprocess.TimeoutExpired:
                    worker.kill()
            worker.line.close()
        os.close(self.boot.root_fd)
        self._context.destroy(linger=0)

    def end_root(self) -> None:
        """What holders see when the root dies."""
        if self._root_writer >= 0:
            os.close(self._root_writer)
            self._root_writer = -1

    @property
    def worker(self) -> WorkerProcess:
        return self.workers[-1]

    def start(self) -> WorkerProcess:
        """A (further) incarnation, ready."""
        self.workers.append(WorkerProcess(self.boot, self.module))
        self.until(lambda: self.worker.ready, what=f"{self.name} to be ready")
        return self.worker

    def publish(self, sender: str, fact: Fact) -> None:
        if sender not in self._others:
            self._others[sender] = Publisher(self._context, self.dirs.runtime, sender)
        assert self._others[sender].publish(fact) is None

    def until(self, condition: Callable[[], T], within_s: float = 30.0, what: str = "") -> T:
        """The condition's first true value; meanwhile the others answer new readers, and the line is read."""

        def turn() -> T:
            for publisher in self._others.values():
                publisher.on_readable()
            for worker in self.workers:
                worker.listen()
            return condition()

        return wait_until(turn, within_s, what=what or f"what was awaited (last fact: {self.fact})")

    @property
    def fact(self) -> Fact | None:
        """The worker's latest fact."""
        envelope = rundir.read_fact(self.dirs.runtime, self.name)
        return envelope.fact if envelope is not None else None

    def until_fact(self, within_s: float = 30.0, **fields: object) -> Fact:
        """The worker's latest fact once all these fields have these values (a function: holds for the value)."""

        def there() -> Fact | None:
            fact = self.fact
            if fact is None or not self.worker.ready:
                return None
            pairs = ((getattr(fact, name), value) for name, value in fields.items())
            return fact if all(want(got) if callable(want) else got == want for got, want in pairs) else None

        try:
            return self.until(there, within_s, what=f"a fact with {fields}")
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {self.fact}; {self.log()[-2000:]}") from None

    def order(self, order: Order) -> Reply | None:
        return ask(self.dirs.runtime, self.name, order, 20.0)

    def reload(self, **settings: object) -> None:
        self.write_config(**settings)
        self.hang_up()

    def hang_up(self) -> None:
        """What the root passes on of a SIGHUP: read the settings anew."""
        assert self.worker.line.send(Reload())

    def stop(self, within_s: float = 8.0) -> int:
        """An ordered stop; the exit status."""
        assert self.worker.line.send(Stop(within_s=within_s))
        self.until(lambda: self.worker.process.poll() is not None, within_s + 10, what="the end of the worker")
        return self.worker.process.returncode

    def log(self) -> str:
        path = self.dirs.logs / f"{self.name}.log"
        return path.read_text() if path.exists() else ""

    def modules(self) -> set[str]:
        """What the worker that has ended had imported."""
        return set((self.dirs.state / "modules").read_text().split())


def server_fact(node_phase: NodePhase, **fields: object) -> ServerFact:
    """A fact of the vLLM manager: by default of the profile `tiny` on GPUs 2 and 3 under lease 7."""
    served = node_phase in (NodePhase.serving, NodePhase.yielding)
    reasons = {NodePhase.serving: Reason.ready, NodePhase.yielding: Reason.yielded_to_job}
    return ServerFact(**{
        "profile": "tiny", "model_name": "org/tiny", "served_as": "tiny", "wanted_gpus": 2,
        "phase": Phase.ready if served else Phase.stopped, "node_phase": node_phase,
        "reason": reasons.get(node_phase, Reason.waiting_for_gpus), "detail": "", "since_at": time.time(),
        "holding": (2, 3) if served else (), "lease_epoch": 7 if served else None,
        "url": "http://127.0.0.1:8123" if served else None, "ready_at": 1000.0 if served else None,
        "at_s": time.monotonic(),
    } | fields)  # fmt: skip


def replaced(fact: ServerFact, **fields: object) -> ServerFact:
    return msgspec.structs.replace(fact, at_s=time.monotonic(), **fields)


def _program() -> None:
    boot, module, line_fd = pickle.load(sys.stdin.buffer)
    try:
        run_worker(boot, Line(socket.socket(fileno=line_fd), ToWorker), importlib.import_module(module).main)
    finally:
        (boot.state / "modules").write_text("\n".join(sys.modules))


if __name__ == "__main__":
    _program()
