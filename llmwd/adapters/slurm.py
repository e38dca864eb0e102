"""Slurm's commands, the one door to them: started without a shell, never waited for, killed at their deadline.

`scontrol` exits 1 for everything and can hang for 20 s when its controller is away, so each call is a `Call`: a
process with a pidfd that a loop can watch, and a deadline that the loop keeps.
"""

import contextlib
import os
import resource
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence

import msgspec

# An operator's own habits for the commands, which would change what they answer.
BENDING = ("SQUEUE_", "SINFO_", "SCONTROL_", "SLURM_JOB_ID", "SLURM_TIME_FORMAT")
OUTPUT_BYTES = 1 << 20  # of one answer: five hundred records of an array's tasks
NODE_USE_WIDTH = 256 + 64
# A line of half a kilobyte for every node in every partition.
LISTING_BYTES = 64 << 20
ERROR_BYTES = 4096  # of what it says when it fails
# A process that SIGKILL does not end at once hangs in the kernel: its call stays open, nobody waits for it.
KILLED_WITHIN_S = 0.2


class Answer(msgspec.Struct, frozen=True):
    """What a command said. status None: killed at its deadline, or it could not be started (see stderr)."""

    status: int | None
    stdout: str
    stderr: str
    took_s: float


class Call:
    """One running command. Watch `fileno()`: it is readable once the command has ended."""

    def __init__(self, argv: Sequence[str], within_s: float, most_bytes: int = OUTPUT_BYTES):
        """OSError when it cannot be started."""
        self.argv = tuple(argv)
        self.started_s = time.monotonic()
        self.deadline_s = self.started_s + within_s
        self._most_bytes = most_bytes
        environment = {name: value for name, value in os.environ.items() if not name.startswith(BENDING)}
        environment |= {"LC_ALL": "C", "TZ": "UTC0"}  # all times of an answer are then UTC
        with contextlib.ExitStack() as opened:
            # Memory files, not pipes: nothing to drain, and a command that fills them never blocks.
            self._out = _memory_file(opened, "stdout")
            self._err = _memory_file(opened, "stderr")
            self._process = subprocess.Popen(
                self.argv, stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._err, env=environment,
                start_new_session=True, close_fds=True,
            )
            opened.callback(self._kill_group)
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
            self._pidfd = os.pidfd_open(self._process.pid)
            opened.pop_all()

    def fileno(self) -> int:
        return self._pidfd

    def answer(self) -> Answer:
        """Take the answer of a command that has ended; what it left in the background ends too."""
        self._kill_group()
        status = self._process.wait()
        took_s = time.monotonic() - self.started_s
        out, err = _read(self._out, self._most_bytes), _read(self._err, ERROR_BYTES)
        for fd in (self._out, self._err, self._pidfd):
            os.close(fd)
        if status == -signal.SIGXFSZ or len(out) >= self._most_bytes:
            return Answer(None, "", f"{self.argv[0]} printed more than {self._most_bytes >> 10} KiB", took_s)
        return Answer(status, out, err, took_s)

    def kill(self) -> Answer | None:
        """End a command that is past its deadline. None: it hangs in the kernel; call answer() once it is readable."""
        self._kill_group()
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if not poll.poll(KILLED_WITHIN_S * 1000):
            return None
        answer = self.answer()
        return Answer(None, "", self.overdue_text(answer.stderr), answer.took_s)

    def overdue_text(self, said: str = "") -> str:
        said = " ".join(said.split())
        took_s = time.monotonic() - self.started_s
        return f"{self.argv[0]} timed out after {took_s:.1f} s" + (f", having said: {said}" if said else "")

    def _kill_group(self) -> None:
        # Not reaped yet, so the group's number is still ours. A site's wrapper may have a child that does the work.
        os.killpg(self._process.pid, signal.SIGKILL)


def _memory_file(opened: contextlib.ExitStack, name: str) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    opened.callback(os.close, fd)
    return fd


def _read(fd: int, most_bytes: int) -> str:
    return os.pread(fd, min(most_bytes, os.fstat(fd).st_size), 0).decode(errors="replace")


def start(argv: Sequence[str], within_s: float, most_bytes: int = OUTPUT_BYTES) -> Call | Answer:
    """The running call, or at once an answer that says why it could not be started."""
    try:
        return Call(argv, within_s, most_bytes)
    except OSError as error:
        return Answer(None, "", f"{argv[0]}: {error.strerror}", 0.0)


def installed() -> bool:
    """Whether Slurm's client commands are here at all."""
    return shutil.which("scontrol") is not None and shutil.which("sinfo") is not None


def show_job(job: str) -> list[str]:
    """`--local` saves the question about federations: one call less on a controller that is away."""
    return ["scontrol", "--local", "show", "job", job, "-d"]


def node_use(node: str) -> list[str]:
    """The cheapest question there is about one node: which GPUs are allocated, and the node's state, in NODE_USE_WIDTH
    characters a line; behind them, because it costs nothing more, which GPUs it has."""
    return ["sinfo", "-a", "-h", "-N", "-n", node, "-O", "GresUsed:256,StateComplete:64,Gres:256"]


def node_gres() -> list[str]:
    """GPUs that every node has by name and host, for finding this node's name and its count."""
    return ["sinfo", "-a", "-h", "-N", "-O", "NodeList:128,NodeHost:128,Gres:256"]


def show_config() -> list[str]:
    return ["scontrol", "show", "config"]


def jobs_on(node: str) -> list[str]:
    """Ids of the jobs that have an allocation on the node."""
    return ["squeue", "-a", "-h", "-w", node, "-t", "running,suspended,completing,configuring,stopped", "-O", "JobID:32"]


def reservations() -> list[str]:
    return ["scontrol", "-a", "-o", "show", "reservations"]


def pending_jobs(fields: Sequence[str]) -> list[str]:
    """All pending jobs of the cluster: no command can ask for one node's. Each field ends with `|`, and is not cut."""
    return ["squeue", "-a", "-h", "--local", "--states=PD", "-O", ",".join(f"{field}:|" for field in fields)]
