"""How a process stands back behind others: nice, OOM score, I/O priority, CPUs. Set, read back, and changed later.

Standard library only: the holder sets it between fork and exec, and all that the service starts inherits it.
ioprio_set has no wrapper in glibc and none in Python. util-linux's ionice would be one more program between us and
the service, whose failures would be taken for the service's; psutil has it, but the holder must do without packages.
"""

import os
from collections.abc import Iterable

IOPRIO_SYSCALLS = {  # machine: ioprio_set, ioprio_get  (asm/unistd.h)
    "x86_64": (251, 252), "aarch64": (30, 31), "riscv64": (30, 31), "ppc64le": (273, 274), "s390x": (282, 283),
}  # fmt: skip
_WHO_PROCESS = 1
_CLASS_SHIFT = 13
_BEST_EFFORT, _IDLE = 2, 3


def stand_back(wish: dict) -> list[str]:
    """Set for this process what `wish` (messages.Courtesy) says, never less than it has inherited.

    What cannot be set is left: returns one sentence for each such thing, and raises nothing for it.
    """
    problems = []
    for what, setter in (("nice", _nice), ("oom_score_adj", _oom_score_adj), ("io_priority", _io_priority), ("cpus", _cpus)):
        try:
            setter(wish[what])
        except (OSError, ValueError) as problem:
            problems.append(f"{what} {wish[what]} could not be set: {getattr(problem, 'strerror', None) or problem}")
    return problems


def _nice(level: int) -> None:
    if level <= os.getpriority(os.PRIO_PROCESS, 0):
        return
    os.setpriority(os.PRIO_PROCESS, 0, level)
    try:  # where sessions are scheduled as groups, a nice level counts only within its own: the group gets it too
        with open("/proc/self/autogroup", "r+") as file:
            file.write(str(level))
    except OSError:  # not built in, or set too often: the level of the process is there all the same
        pass


def _oom_score_adj(score: int) -> None:
    with open("/proc/self/oom_score_adj", "r+") as file:
        if score > int(file.read()):
            file.seek(0)
            file.write(str(score))


def _io_priority(level: int | None) -> None:
    if level is None:
        return
    kind, inherited = _get_ioprio(0)
    if kind != _IDLE and not (kind == _BEST_EFFORT and inherited >= level):
        _ioprio(0, _WHO_PROCESS, 0, _BEST_EFFORT << _CLASS_SHIFT | level)


def _cpus(cpus: list[int]) -> None:
    if cpus:
        os.sched_setaffinity(0, cpus)


def _ioprio(which: int, *values: int) -> int:
    import ctypes

    numbers = IOPRIO_SYSCALLS.get(os.uname().machine)
    if numbers is None:
        raise ValueError(f"not known how on {os.uname().machine}")
    libc = ctypes.CDLL(None, use_errno=True)
    got = libc.syscall(ctypes.c_long(numbers[which]), *map(ctypes.c_int, values))
    if got < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return got


def _get_ioprio(pid: int) -> tuple[int, int]:
    value = _ioprio(1, _WHO_PROCESS, pid)
    return value >> _CLASS_SHIFT, value & (1 << _CLASS_SHIFT) - 1


def hurry(pids: Iterable[int]) -> bool:
    """Let these processes run like us again, as far as we may: they are to end, and dying takes CPU time. Whether the
    groups of their sessions do; if not, ask again: an ordinary user may write one of them in 100 ms.

    An ordinary user may always raise a session's group, the processes themselves only with RLIMIT_NICE. Measured
    with all cores busy: a process with 64 MB is gone 14 ms after SIGKILL, 110 ms with its group at nice 10.
    """
    level, own = os.getpriority(os.PRIO_PROCESS, 0), _group_level("self")
    done = True
    for pid in pids:
        try:
            if os.getpriority(os.PRIO_PROCESS, pid) > level:
                os.setpriority(os.PRIO_PROCESS, pid, level)
        except OSError:
            pass
        if own is not None and _group_level(pid) not in (own, None):
            try:
                with open(f"/proc/{pid}/autogroup", "r+") as file:
                    file.write(own)
            except FileNotFoundError:  # it has ended
                pass
            except OSError:
                done = False
    return done


def _group_level(pid: int | str) -> str | None:
    """The nice level of a process's session; None: it has ended, or the kernel does not schedule sessions as groups."""
    try:
        with open(f"/proc/{pid}/autogroup") as file:
            return file.read().split()[-1]
    except (OSError, IndexError):
        return None


def found(pid: int) -> dict | None:
    """What the kernel says of a process, as the fields of messages.Courtesy; None if there is no such process."""
    try:
        with open(f"/proc/{pid}/oom_score_adj") as file:
            score = int(file.read())
        told = {"nice": os.getpriority(os.PRIO_PROCESS, pid), "oom_score_adj": score, "cpus": sorted(os.sched_getaffinity(pid))}
    except OSError:
        return None
    try:
        kind, level = _get_ioprio(pid)
    except (OSError, ValueError):
        kind, level = 0, 0
    return told | {"io_priority": level if kind == _BEST_EFFORT else None}


def confine(pid: int, cpus: frozenset[int]) -> None:
    """Have every thread of a process run on `cpus` alone; what ends meanwhile or refuses is left."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return
    for thread in threads:
        try:
            os.sched_setaffinity(int(thread), cpus)
        except OSError:
            continue
