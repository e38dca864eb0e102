"""Prints the Slurm jobs that processes belong to: lines "<id> <node or ->". Run by jobprocs as a program of its own.

Reading /proc can hang in the kernel for ever; then only this process hangs. Standard library only, and no module that
takes long to load (re and signal take as long as reading 500 processes): it is started every few seconds.
"""

import os
import sys

SLUID_LETTERS = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ"
SCOPE = b"slurmstepd.scope"
TITLE = b"slurmstepd: ["
DELETED = b" (deleted)"  # only dead processes, not yet reaped, are left in such a cgroup


def read(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.read(fd, 65536)
    except OSError:
        return b""
    finally:
        os.close(fd)


def job_id(name: bytes) -> bytes | None:
    """The id in the name of a job's folder: job_N, or a SLUID."""
    if name.startswith(b"job_") and name[4:].isdigit():
        return name[4:]
    if len(name) == 14 and name[:1] == b"s" and not name[1:].strip(SLUID_LETTERS):
        return name
    return None


def places_in(text: bytes) -> list[tuple[bytes | None, bytes]]:
    """(job, node or "-") in a /proc/PID/cgroup, wherever it is below the scope of slurmstepd (v2) or slurm*/uid_U (v1).

    job None: below it, but in no job's folder (a slurmstepd that has not moved there yet waits in "system").
    """
    found = []
    for line in text.splitlines() if b"slurm" in text else ():
        if line.endswith(DELETED):
            continue
        parts = line.split(b"/")
        for above, name in zip(parts, parts[1:], strict=False):
            tree = parts[parts.index(above) - 1]
            if above == SCOPE or above.endswith(b"_" + SCOPE):
                found.append((job_id(name), above[: -len(SCOPE) - 1] or b"-"))
            elif above.startswith(b"uid_") and (tree == b"slurm" or tree.startswith(b"slurm_")):
                found.append((job_id(name), tree[len(b"slurm_") :] or b"-"))
    return found


def jobs_of(pid: str, proc: str) -> set[tuple[bytes, bytes]]:
    """The jobs that a process shows by its cgroups or, for a slurmstepd, by its title."""
    places = places_in(read(f"{proc}/{pid}/cgroup"))
    found = {(job, node) for job, node in places if job is not None}
    if read(f"{proc}/{pid}/comm").strip() == b"slurmstepd":  # others' command lines are not read: that can hang
        title = read(f"{proc}/{pid}/cmdline")
        job = title[len(TITLE) :].partition(b".")[0]
        if title.startswith(TITLE) and job.isdigit() and os.stat(f"{proc}/{pid}").st_uid == 0:
            found.add((job, places[0][1] if places else b"-"))
    return found


def main(proc: str) -> None:
    found = set()
    for pid in os.listdir(proc):
        if pid.isdigit():
            try:
                found |= jobs_of(pid, proc)
            except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
                continue
    lines = [b"%s %s\n" % pair for pair in sorted(found)]
    os.write(1, b"".join(lines) + b"whole\n")


if __name__ == "__main__":
    main(sys.argv[1])
