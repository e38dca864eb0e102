"""Slurm's commands, the one door to them: started without a shell, never waited for, killed at their deadline.

`scontrol` exits 1 for everything and can hang for 20 s when its controller is away, so each call is a `Call`: a
process with a pidfd that a loop can watch, and a deadline that the loop keeps.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence

import msgspec

# An operator's own habits for the commands, which would change what they answer.
BENDING = ("SQUEUE_", "SINFO_", "SCONTROL_", "SLURM_JOB_ID", "SLURM_TIME_FORMAT")
OUTPUT_BYTES = 16 << 20  # of one answer; more than any single record, less than what would hurt us


class Answer(msgspec.Struct, frozen=True):
    """What a command said. status None: killed at its deadline, or it could not be started (see stderr)."""

    status: int | None
    stdout: str
    stderr: str
    took_s: float


class Call:
    """One running command. Watch `fileno()`: it is readable once the command has ended."""

    def __init__(self, argv: Sequence[str], within_s: float):
        self.argv = tuple(argv)
        self.started_s = time.monotonic()
        self.deadline_s = self.started_s + within_s
        # Memory files, not pipes: nothing to drain, and a command that fills them never blocks.
        self._out = os.memfd_create("stdout", os.MFD_CLOEXEC)
        self._err = os.memfd_create("stderr", os.MFD_CLOEXEC)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(BENDING)}
        environment |= {"LC_ALL": "C", "TZ": "UTC0"}  # all times of an answer are then UTC
        self._process = subprocess.Popen(
            self.argv, stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._err, env=environment,
            start_new_session=True, close_fds=True,
        )
        self._pidfd = os.pidfd_open(self._process.pid)

    def fileno(self) -> int:
        return self._pidfd

    def answer(self) -> Answer:
        """Take the answer of a command that has ended."""
        status = self._process.wait()
        return self._close(status)

    def kill(self) -> Answer:
        """End a command that is past its deadline."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self._process.wait()
        return self._close(None)

    def _close(self, status: int | None) -> Answer:
        out, err = (_read(fd) for fd in (self._out, self._err))
        os.close(self._pidfd)
        return Answer(status, out, err, time.monotonic() - self.started_s)


def _read(fd: int) -> str:
    data = os.pread(fd, OUTPUT_BYTES, 0)
    os.close(fd)
    return data.decode(errors="replace")


def start(argv: Sequence[str], within_s: float) -> Call | Answer:
    """The running call, or at once an answer that says why it could not be started."""
    try:
        return Call(argv, within_s)
    except OSError as error:
        return Answer(None, "", f"{argv[0]}: {error.strerror}", 0.0)


def installed() -> bool:
    """Whether Slurm's client commands are here at all."""
    return shutil.which("scontrol") is not None and shutil.which("sinfo") is not None


def show_job(job: str) -> list[str]:
    """`--local` saves the question about federations: one call less on a controller that is away."""
    return ["scontrol", "--local", "show", "job", job, "-d"]


def node_use(node: str) -> list[str]:
    """The cheapest question there is about one node: which GPUs are allocated, and the node's state."""
    return ["sinfo", "-a", "-h", "-N", "-n", node, "-O", "GresUsed:256,StateComplete:64"]


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
