"""Jobs by their processes: a disposable child reads /proc (jobprocs_probe.py), for such a read may hang for ever.

psutil was considered: it would read in our own process, and more files than needed.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from llmwd.adapters.jobfolders import Gpus
from llmwd.messages import JobCpus, SourceState
from llmwd.vocab import Source

PROBE = Path(__file__).with_name("jobprocs_probe.py")
LOOK_WITHIN_S = 5.0
TRIES = 2
OUTPUT_BYTES = 1 << 20
INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO of the kernel
_HIDEPID = re.compile(r"hidepid=(1|2|4|noaccess|invisible|ptraceable)")
_GID = re.compile(r"\bgid=([0-9]+)")


def hidden(mountinfo: str, uid: int, gids: set[int], pid_namespace: str) -> str:
    """Why not all processes can be seen, one sentence; "" when they can."""
    if pid_namespace != INITIAL_PID_NAMESPACE:
        return "/proc shows only the processes of this container"
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[4:5] == ["/proc"] and after.startswith("proc ") and _HIDEPID.search(after):
            exempt = _GID.search(after)
            if uid != 0 and not (exempt and int(exempt[1]) in gids):
                return "/proc is mounted with hidepid: other users' processes are not shown"
    return ""


class JobProcesses:
    """One look at a time: begin(), then collect() once fileno() is readable or `deadline_s` is over."""

    name = Source.procfs

    def __init__(self, node: str = "", proc: str = "/proc", argv: tuple[str, ...] = ()):
        """`node`: processes of another node's slurmd do not count. `proc`, `argv`: for trying it out."""
        self._node = node
        self._argv = argv or (sys.executable, "-I", "-S", str(PROBE), proc)
        self._child: subprocess.Popen[bytes] | None = None
        self._ending: list[subprocess.Popen[bytes]] = []
        self._output = b""
        self._failures = 0
        self._works = False
        self._why = "has not looked yet"
        self.absent = False
        self.cpus: tuple[JobCpus, ...] = ()  # at the last whole look
        self.began_s = 0.0
        self.deadline_s = 0.0

    def check(self) -> SourceState:
        return SourceState(name=self.name, works=self._works, why=self._why)

    def fileno(self) -> int | None:
        return self._child.stdout.fileno() if self._child and self._child.stdout else None

    def begin(self) -> bool:
        """Start a look. False: there is none (`check` says why), because it is of no use or cannot be started."""
        mountinfo = Path("/proc/self/mountinfo").read_text(errors="replace")
        why = hidden(mountinfo, os.geteuid(), {os.getegid(), *os.getgroups()}, os.readlink("/proc/self/ns/pid"))
        self.absent = bool(why)
        if why:
            self._works, self._why = False, why
            return False
        self.reap()
        if len(self._ending) >= TRIES:
            self._works, self._why = False, "reading /proc hangs in the kernel"
            return False
        try:
            self._child = subprocess.Popen(
                self._argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
            )
        except OSError as error:
            self._works, self._why = False, f"cannot start {self._argv[0]}: {error.strerror}"
            return False
        os.set_blocking(self.fileno(), False)
        self._output = b""
        self.began_s = time.monotonic()
        self.deadline_s = self.began_s + LOOK_WITHIN_S
        return True

    def reap(self) -> None:
        """Wait for no one; but who has ended by now stays no zombie."""
        self._ending = [child for child in self._ending if child.poll() is None]

    def collect(self, now_s: float) -> bool:
        """Take what the child said, without waiting; True: the look is over, see `jobs`. Unwatch fileno() before."""
        if self._child is None:
            return True
        ended = self._read()
        if not ended and now_s < self.deadline_s:
            return False
        self._child.kill()  # no more than a formality for one that has closed its output
        self._child.stdout.close()
        self._ending.append(self._child)
        self._child = None
        self._failures = 0 if self._output.endswith(b"whole\n") else self._failures + 1
        return True

    def _read(self) -> bool:
        """True once the child has closed its output."""
        while len(self._output) < OUTPUT_BYTES:
            try:
                data = os.read(self.fileno(), 65536)
            except BlockingIOError:
                return False
            if not data:
                return True
            self._output += data
        return True

    def again(self) -> bool:
        """A first failure may be a busy machine's: look again before it counts."""
        return 0 < self._failures < TRIES

    def jobs(self) -> dict[str, Gpus] | None:
        """What the last look found; None: it failed."""
        self._works = not self._failures
        self._why = "" if self._works else f"reading /proc failed, or did not end within {LOOK_WITHIN_S:g} s"
        if not self._works:
            return None
        lines = [line.split(" ") for line in self._output.decode(errors="replace").splitlines()[:-1]]
        here = [(job, cpus) for job, node, cpus in lines if not self._node or node in ("-", self._node)]
        self.cpus = tuple(JobCpus(id=job, lists=tuple(cpus.split(";"))) for job, cpus in here if cpus != "-")
        return {job: None for job, _ in here}

    def close(self) -> None:
        """End a look that is under way."""
        if self._child is not None:
            self._child.kill()
            self._child.stdout.close()
            self._child = None
