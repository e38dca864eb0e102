"""Processes: who descends from whom, who is marked as ours, and signals that cannot hit a stranger.

A process is named by (pid, start): `start` is its start time in clock ticks since boot (/proc/PID/stat,
field 22), because a pid alone is soon used again. Signals go through pidfds, which never do.
Standard library only, and light to import: the holder, a program of a few megabytes, uses it too.
"""

import errno
import os
import signal
from collections import namedtuple
from collections.abc import Callable, Container, Iterator

MARKER = "LLMWD_TREE"  # variable in the environment of every process of a tree that a holder started

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_PR_SET_CHILD_SUBREAPER = 36
# What /proc says of a process that is gone, or not ours to read. All else (no descriptor is free, no memory) says nothing
# about it: taken for "there is no such process", it would leave one on a GPU.
_GONE = frozenset((errno.ENOENT, errno.ESRCH, errno.EACCES, errno.EPERM))


class Stat(namedtuple("Stat", "state ppid threads start")):
    """What /proc/PID/stat tells. state: one letter, "Z": dead, but not yet reaped. (typing would cost 1 MB.)"""

    __slots__ = ()

    @property
    def dead(self) -> bool:
        """Nothing of it runs, its memory is freed. (A "Z" with threads has only lost its first one.)"""
        return self.state in "ZX" and self.threads <= 1


def _read(path: str) -> bytes | None:
    """A file of /proc as it is now; None if the process is gone or not ours to read. Raises OSError for all else."""
    parts = []
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while part := os.read(fd, 65536):
                parts.append(part)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in _GONE:
            raise
        return None
    return b"".join(parts)


def stat(pid: int) -> Stat | None:
    """State, parent and start time of a process (zombies too); None if there is none with this pid."""
    data = _read(f"/proc/{pid}/stat")
    if not data:
        return None
    fields = data[data.rindex(b")") + 2 :].split()  # the name before it may hold blanks and brackets
    return Stat(fields[0].decode(), int(fields[1]), int(fields[17]), int(fields[19]))


def start_ticks(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot, None if there is no such process."""
    found = stat(pid)
    return found.start if found else None


def alive(pid: int, start: int) -> bool:
    """Whether exactly this process still runs. A zombie does not: its memory and its GPUs are freed."""
    found = stat(pid)
    return found is not None and found.start == start and not found.dead


def cmdline(pid: int) -> bytes:
    """Arguments of a process separated by NUL; empty for a zombie or a kernel thread."""
    return _read(f"/proc/{pid}/cmdline") or b""


def open_process(pid: int, start: int) -> int | None:
    """A pidfd of exactly this process (readable once it has ended); None if it is gone.

    Raises OSError when no file descriptor is left.
    """
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    if start_ticks(pid) != start:  # checked after opening: from here on the pidfd names one process
        os.close(fd)
        return None
    return fd


def send(pidfd: int, sig: int) -> bool:
    """Send `sig` to the process of a pidfd. False if it is gone or not ours to signal."""
    try:
        signal.pidfd_send_signal(pidfd, sig)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def signal_process(pid: int, start: int, sig: int) -> bool:
    """Send `sig` to exactly this process. False if it is gone or not ours to signal."""
    fd = open_process(pid, start)
    if fd is None:
        return False
    try:
        return send(fd, sig)
    finally:
        os.close(fd)


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())


def _children_by_task(pid: int) -> list[int]:
    """Children of a process, which the kernel lists under the thread that made them."""
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError as error:
        if error.errno not in _GONE:
            raise
        return []
    return [int(child) for task in tasks for child in (_read(f"/proc/{pid}/task/{task}/children") or b"").split()]


def _children_by_scan() -> Callable[[int], list[int]]:
    """The same for kernels without CONFIG_PROC_CHILDREN: one pass over /proc, asked many times."""
    known: dict[int, list[int]] = {}
    for pid in _pids():
        if found := stat(pid):
            known.setdefault(found.ppid, []).append(pid)
    return lambda pid: known.get(pid, [])


def _lookup() -> Callable[[int], list[int]]:
    return _children_by_task if os.path.exists("/proc/thread-self/children") else _children_by_scan()


def children(pid: int) -> list[int]:
    """The children of a process, zombies too."""
    return _lookup()(pid)


def walk(pid: int) -> Iterator[tuple[int, Stat]]:
    """Every descendant of `pid`, parents first, zombies too, without `pid` itself.

    A process is yielded before its own children are looked up, so a caller that signals what it gets
    does not wait for the whole tree to be read. Processes forked meanwhile may be missed: walk again.
    """
    children_of = _lookup()
    todo, seen = children_of(pid), {pid}
    while todo:
        later: list[int] = []
        for child in todo:
            if child in seen:
                continue
            seen.add(child)
            if found := stat(child):
                yield child, found
                later += children_of(child)
        todo = later


def descendants(pid: int) -> list[int]:
    """Every living descendant of `pid`, parents first."""
    return [child for child, found in walk(pid) if not found.dead]


def find_marked(marker: str, known: Container[int] = ()) -> Iterator[tuple[int, int]]:
    """(pid, start) of every living process of our own user whose environment holds LLMWD_TREE=`marker`, as each is found.

    The environment is that of the last exec. setproctitle overwrites it unless SPT_NOENV is set,
    which is why the holder sets it for its service. Reading it waits for a process that hangs in a driver with its
    memory locked: signal what you get at once. The pids in `known`, asked anew each time, are not read.
    """
    wanted = f"\0{MARKER}={marker}\0".encode()
    for pid in _pids():
        if pid in known:
            continue
        try:
            own = os.stat(f"/proc/{pid}").st_uid == os.geteuid()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if own and wanted in b"\0" + (_read(f"/proc/{pid}/environ") or b"") + b"\0":
            found = stat(pid)
            if found and not found.dead:
                yield pid, found.start


def job_cgroup(text: str) -> str | None:
    """The first line of a /proc/PID/cgroup text that lies inside a Slurm job's cgroup, else None.

    cgroup v2: below `slurmstepd.scope` or `NODE_slurmstepd.scope`; v1: `…/slurm[_NODE]/uid_N/job_N`.
    """
    for line in text.splitlines():
        parts = line.split(":", 2)[-1].split("/")
        if any(part == "slurmstepd.scope" or part.endswith("_slurmstepd.scope") for part in parts):
            return line
        for above, uid, job in zip(parts, parts[1:], parts[2:]):
            if (above == "slurm" or above.startswith("slurm_")) and uid.startswith("uid_") and job.startswith("job_"):
                return line
    return None


def own_job_cgroup() -> str | None:
    """The line of /proc/self/cgroup which says that we are inside a Slurm job, None if we are not.

    llmwd refuses to start there: it would be killed with the job, and sees only the job's GPUs.
    """
    return job_cgroup((_read("/proc/self/cgroup") or b"").decode(errors="replace"))


def _prctl(option: int, value: int) -> None:
    import ctypes  # here: 2 ms that only the holder and the root need

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def set_subreaper(on: bool = True) -> None:
    """Orphans among our descendants become our children instead of init's. Raises OSError."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(on))


def set_pdeathsig(sig: int) -> None:
    """Get `sig` when the thread that forked us ends; survives exec. Raises OSError."""
    _prctl(_PR_SET_PDEATHSIG, sig)


def title(text: str) -> None:
    """Show `text` in ps and top, where setproctitle is installed."""
    try:
        from setproctitle import setproctitle
    except ImportError:
        return
    setproctitle(text)
