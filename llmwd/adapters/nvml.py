"""What the NVIDIA driver says, asked for without ever waiting for it.

The one door to NVML: a Probe keeps a disposable process (llmwd.adapters.nvml_probe) that makes the calls. The
caller asks, goes on with its work, receives the answer when `fileno()` is readable, and kills the probe when it
is overdue. A thread would not do instead: one that hangs in the driver can never be ended.

    failure = probe.ask("use", within_s=2.0, now_s=now)
    ... poll probe.fileno() ...
    answer = probe.receive()                    # None: not whole yet
    if answer is None and probe.overdue(now):
        answer = probe.kill()                   # a DriverFailure; the next ask starts a new process
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

Kind = Literal["inventory", "use"]

PROGRAM = Path(__file__).with_name("nvml_probe.py")
STUCK_MAX = 3  # probes that could not be killed; beyond, no further one is sent into a driver that hangs
LINE_MAX = 1 << 20
LIBRARY = "libnvidia-ml.so.1"
LIBRARY_FOLDERS = (
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/run/opengl-driver/lib",
    "/usr/lib/wsl/lib",
)


class GpuInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a GPU is. index: NVML's.

    uuid: "" when the driver does not tell; pci: 0000:1b:00.0; nvlink: the GPUs (NVML's indices) that NVLink joins it to;
    mig_uuids: of its slices; error: the first NVML_ERROR_* of this GPU.
    """

    index: int
    uuid: str
    minor: int | None = None
    pci: str = ""
    name: str = ""
    memory_bytes: int | None = None
    mig: bool = False
    mig_uuids: tuple[str, ...] = ()
    nvlink: tuple[int, ...] = ()
    numa: int | None = None
    error: str = ""


class GpuProcess(msgspec.Struct, frozen=True, kw_only=True):
    """A process on a GPU. kind: compute or graphics; used_bytes: None when the driver does not tell; jobs: Slurm's
    ids of the jobs that its cgroup belongs to."""

    pid: int
    kind: str
    used_bytes: int | None = None
    jobs: tuple[str, ...] = ()


class GpuUse(msgspec.Struct, frozen=True, kw_only=True):
    """Who uses a GPU. With an `error` (NVML_ERROR_*) the rest may be incomplete: the GPU is unknown. mig, mig_uuids: as
    in GpuInfo, for an administrator may cut a GPU at any time."""

    index: int
    uuid: str
    mig: bool = False
    mig_uuids: tuple[str, ...] = ()
    processes: tuple[GpuProcess, ...] = ()
    used_bytes: int | None = None
    error: str = ""


class Inventory(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to "inventory": what the GPUs are. Began at `at_s`."""

    at_s: float
    driver: str
    gpus: tuple[GpuInfo, ...]


class Use(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to "use". The evidence is as old as `at_s` (monotonic), when the reading began."""

    at_s: float
    driver: str
    gpus: tuple[GpuUse, ...]


class DriverFailure(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """No answer. name: NVML_ERROR_*, or one of ours (DRIVER_HANGS, PROBE_DIED, ...); text: a sentence."""

    name: str
    text: str


Answer = Inventory | Use | DriverFailure

_decoder = msgspec.json.Decoder(Answer)


class Probe:
    """One question at a time to the driver, in a process that may be lost.

    env: the process's environment, None for ours (the tests put a stand-in library into its path).
    """

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        self._env = env
        self._child: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._stuck: list[subprocess.Popen[bytes]] = []
        self._buffer = b""
        self._asked: Kind | None = None
        self._due_s = 0.0

    @property
    def pid(self) -> int | None:
        """The probe process, if there is one."""
        return self._child.pid if self._child else None

    @property
    def busy(self) -> bool:
        """A question is out."""
        return self._asked is not None

    def fileno(self) -> int:
        """What to poll for reading; -1 while there is no process. It changes when a new one is started."""
        return self._child.stdout.fileno() if self._child and self._child.stdout else -1

    def ask(self, kind: Kind, within_s: float, now_s: float) -> DriverFailure | None:
        """Send a question that is overdue `within_s` after `now_s`; a failure if it cannot even be asked.

        The first question starts the process: allow it a second more. RuntimeError: the last one is still out.
        """
        if self._asked:
            raise RuntimeError(f"the driver is asked for {kind} while {self._asked} is still out")
        self._bury()
        for fresh in (False, True):  # an idle probe may have been killed: then once more with a new one
            if self._child is None or fresh:
                self.close()
                failure = self._start()
                if failure:
                    return failure
            if self._send(kind):
                self._asked, self._due_s = kind, now_s + within_s
                return None
        return DriverFailure(name="PROBE_DIED", text="the process that asks the NVIDIA driver ends at once")

    def receive(self) -> Answer | None:
        """The answer once it is whole, None before. Never waits."""
        if self._child is None or self._child.stdout is None or self._asked is None:
            return None
        while b"\n" not in self._buffer:
            try:
                data = os.read(self._child.stdout.fileno(), 65536)
            except BlockingIOError:
                return None
            if not data or len(self._buffer) > LINE_MAX:
                return self._died()
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        self._asked = None
        try:
            answer = _decoder.decode(line)
        except msgspec.DecodeError as error:
            answer = DriverFailure(name="PROBE_TALKS_NONSENSE", text=f"the driver's probe gave no answer: {error}")
        if isinstance(answer, DriverFailure):
            self.close()  # the library that failed stays loaded in it, and may be an outdated one
        return answer

    def overdue(self, now_s: float) -> bool:
        """The question that is out has had its time."""
        return self._asked is not None and now_s >= self._due_s

    def kill(self) -> DriverFailure:
        """End the process now (SIGKILL), and say so. One that hangs in the kernel is abandoned, not waited for."""
        asked = self._asked or "nothing"
        self.close()
        return DriverFailure(
            name="DRIVER_HANGS",
            text=f"the NVIDIA driver did not answer in time (asked for: {asked}): its GPUs count as used",
        )

    def close(self) -> None:
        """Let go of the process without waiting for it; it is reaped later."""
        child, self._child, self._asked, self._buffer = self._child, None, None, b""
        if child is None:
            return
        if child.poll() is None:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._stuck.append(child)
        os.close(self._pidfd)
        _close_pipes(child)
        self._bury()

    def _bury(self) -> None:
        """Reap those that have ended since they were killed."""
        self._stuck = [child for child in self._stuck if child.poll() is None]

    def _start(self) -> DriverFailure | None:
        if len(self._stuck) >= STUCK_MAX:
            pids = ", ".join(str(child.pid) for child in self._stuck)
            text = f"the NVIDIA driver hangs, and so do our processes {pids} in it: the node needs its administrator"
            return DriverFailure(name="DRIVER_HANGS", text=text)
        # -P: the program's own folder must not be searched, it has modules named like the standard library's.
        argv = [sys.executable, "-P", str(PROGRAM), str(os.getpid())]
        try:
            child = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self._env, cwd="/", bufsize=0
            )
        except OSError as error:
            return DriverFailure(name="PROBE_NOT_STARTED", text=f"the driver's probe cannot be started: {error}")
        try:
            self._pidfd = os.pidfd_open(child.pid)
        except OSError as error:  # no file descriptor left: it is ours and unreaped, so its pid is still its own
            child.kill()
            self._stuck.append(child)
            _close_pipes(child)
            return DriverFailure(name="PROBE_NOT_STARTED", text=f"the driver's probe cannot be held: {error}")
        if child.stdout:
            os.set_blocking(child.stdout.fileno(), False)
        self._child = child
        return None

    def _send(self, kind: Kind) -> bool:
        assert self._child and self._child.stdin
        try:
            self._child.stdin.write(msgspec.json.encode({"ask": kind}) + b"\n")  # far below a pipe's capacity
        except BrokenPipeError:
            return False
        return True

    def _died(self) -> DriverFailure:
        status = self._child.poll() if self._child else None
        self.close()
        how = "" if status is None else f" (signal {-status})" if status < 0 else f" (exit code {status})"
        text = f"the process that asks the NVIDIA driver ended without an answer{how}"
        return DriverFailure(name="PROBE_DIED", text=text)


def _close_pipes(child: subprocess.Popen[bytes]) -> None:
    for pipe in (child.stdin, child.stdout):
        if pipe:
            pipe.close()


def driver_present(proc: Path = Path("/proc/driver/nvidia"), env: Mapping[str, str] = os.environ) -> bool:
    """Whether an NVIDIA driver is on this machine, without loading anything: its kernel module or its library."""
    if (proc / "version").exists():
        return True
    folders = [*env.get("LD_LIBRARY_PATH", "").split(":"), *LIBRARY_FOLDERS]
    if any((Path(folder) / LIBRARY).exists() for folder in folders if folder):
        return True
    try:
        return LIBRARY.encode() in Path("/etc/ld.so.cache").read_bytes()
    except OSError:
        return False
