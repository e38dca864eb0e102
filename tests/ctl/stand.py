"""A stage for llmwd-ctl: folders, a root that only holds the lock, retained facts, and real desks."""

import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from llmwd.adapters import procs, rundir
from llmwd.adapters.bus import DeskServer
from llmwd.messages import (
    Done,
    Envelope,
    Fact,
    Gpu,
    GpusFact,
    JobsFact,
    Lease,
    Order,
    Reply,
    RootFact,
    ServerFact,
    SourceState,
    TunnelFact,
    WorkerState,
)
from llmwd.vocab import Holder, NodePhase, Phase, Reason, Worker

CHECKOUT = Path(__file__).parents[2]
CTL = [sys.executable, "-I", "-m", "llmwd.ctl.main"]
# Root may read and write everything; without these rights it is kept out like everybody.
KEPT_OUT = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"] if os.getuid() == 0 else []


class Stand:
    """Everything under one folder. Use as a context manager."""

    def __init__(self, folder: Path, at: Path):
        """`at`: a folder with a short path for the sockets."""
        self.dirs = rundir.Dirs(folder / "home", at / "run", folder / "state")
        rundir.prepare(self.dirs)
        (self.dirs.home / "models").mkdir(parents=True)
        (self.dirs.home / "etc").mkdir()
        (self.dirs.home / "etc/config.env").write_text("NUM_GPUS=2\n")
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("LLMWD_", "_LLMWD"))} | {
            "LLMWD_HOME": str(self.dirs.home),
            "LLMWD_RUNTIME_DIR": str(self.dirs.runtime),
            "LLMWD_STATE_DIR": str(self.dirs.state),
            "COLUMNS": "80",
        }
        self.root: subprocess.Popen | None = None
        self.orders: list[Order] = []
        self._ending = threading.Event()
        self._desks: list[threading.Thread] = []

    def __enter__(self) -> "Stand":
        return self

    def __exit__(self, *_) -> None:
        self._ending.set()
        for desk in self._desks:
            desk.join()
        if self.root is not None:
            self.root.kill()
            self.root.wait()
            self.root.stdout.close()

    # --- what there is

    def profile(self, name: str, args: str = "--max-model-len 100") -> None:
        program = self.dirs.home / "venv/bin/vllm"
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        text = f'MODEL_NAME="org/{name}"\nVLLM_ARGS="{args}"\nLLM_VENV="{program.parents[1]}"\n'
        (self.dirs.home / f"models/{name}.env").write_text(text)

    def begin(self, *options: str) -> None:
        """A root, and facts of a node that serves on GPUs 2 and 3."""
        command = [sys.executable, "-m", "tests.ctl.rootstand", str(self.dirs.runtime), *options]
        self.root = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)
        assert self.root.stdout.readline() == "locked\n"
        for fact in (self.root_fact(), self.gpus(), self.server(), self.jobs(), self.tunnel()):
            self.say(fact)

    def say(self, fact: Fact) -> None:
        """Retain a fact as its worker would."""
        names = {RootFact: "root", GpusFact: "resolver", ServerFact: "vllm", JobsFact: "detector", TunnelFact: "tunnel"}
        name = names[type(fact)]
        envelope = Envelope(sender=name, pid=1, epoch=1, seq=1, fact=fact)
        rundir.retain_fact(self.dirs.runtime, name, msgspec.msgpack.encode(envelope))

    def desk(self, worker: Worker, answer: Callable[[Order], Reply | None]) -> None:
        """Answer orders to this worker; None: say nothing, like a worker that hangs."""
        context = zmq.Context()
        server = DeskServer(context, self.dirs.runtime, worker)

        def serve() -> None:
            while not self._ending.is_set():
                if select.select([server.socket.getsockopt(zmq.FD)], [], [], 0.05)[0] or server.socket.poll(0):
                    for back, order in server.receive():
                        self.orders.append(order)
                        reply = answer(order)
                        if reply is not None:
                            server.reply(back, reply)
            server.socket.close()
            context.term()

        self._desks.append(threading.Thread(target=serve))
        self._desks[-1].start()

    def obliging_desk(self, worker: Worker) -> None:
        self.desk(worker, lambda order: Done(detail=f"{worker} does it"))

    @property
    def signals(self) -> list[str]:
        path = self.dirs.runtime / "signals"
        return path.read_text().split() if path.exists() else []

    # --- facts

    def root_fact(self, *failed: str, stopping: bool = False) -> RootFact:
        workers = tuple(
            WorkerState(
                name=name, pid=None if name in failed else 4000 + n, phase=Phase.failed if name in failed else Phase.ready,
                restarts=5 if name in failed else 0, since_at=time.time() - 60,
            )
            for n, name in enumerate(Worker)
        )  # fmt: skip
        return RootFact(
            pid=self.root.pid, start=procs.start_ticks(self.root.pid), stopping=stopping, workers=workers,
            started_at=time.time() - 60, node="m001", home=str(self.dirs.home), version="1", at_s=time.monotonic(),
        )  # fmt: skip

    def server(self, **changes) -> ServerFact:
        fact = ServerFact(
            profile="glm", model_name="org/glm", served_as="glm", wanted_gpus=2, phase=Phase.ready,
            node_phase=NodePhase.serving, reason=Reason.ready, detail="", since_at=time.time() - 192, holding=(2, 3),
            pid=500, url="http://127.0.0.1:8000", ready_at=time.time() - 192, at_s=time.monotonic(),
        )  # fmt: skip
        return msgspec.structs.replace(fact, **changes)

    def gpus(self, **changes) -> GpusFact:
        now_s = time.monotonic()
        held = (Holder.slurm, Holder.free, Holder.llmwd, Holder.llmwd)
        fact = GpusFact(
            gpus=tuple(Gpu(index=n, uuid=f"GPU-{n}", minor=n, holder=holder) for n, holder in enumerate(held)),
            lease=Lease(epoch=3, gpus=(2, 3), uuids=("GPU-2", "GPU-3"), granted_s=now_s, expires_s=now_s + 300),
            revocation=None, claims=(), sources=(), hold=None, blocked=None, detail="", node_states=(), epoch=3, at_s=now_s,
        )  # fmt: skip
        return msgspec.structs.replace(fact, **changes)

    def jobs(self) -> JobsFact:
        sources = (SourceState(name="sim", works=True), SourceState(name="cgroup2", works=False, why="no Slurm here"))
        return JobsFact(jobs=(), sources=sources, scanned=True, at_s=time.monotonic())

    def tunnel(self) -> TunnelFact:
        return TunnelFact(phase=Phase.stopped, detail="off", since_at=0.0, at_s=time.monotonic())

    # --- running it

    def ctl(self, *words: str, text: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        """Run llmwd-ctl to its end."""
        return subprocess.run(
            [*CTL, *words], env=self.env | env, input=text if text is not None else "", capture_output=True, text=True,
            timeout=60, cwd=self.dirs.home,
        )  # fmt: skip

    def refused(self, *words: str) -> str:
        """Run it to its end, without root's right to every file: what it says when it refuses (exit code 1)."""
        done = subprocess.run([*KEPT_OUT, *CTL, *words], env=self.env, input="", capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and "Traceback" not in done.stderr, (done.returncode, done.stdout, done.stderr)
        return done.stderr

    def start_ctl(self, *words: str) -> subprocess.Popen[str]:
        """Begin llmwd-ctl; the caller ends it."""
        return subprocess.Popen(
            [*CTL, *words], env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
