"""Prints the Slurm jobs that processes belong to: lines "<id> <node or -> <CPU lists joined by ; or ->". Run by jobprocs as a program of its own.

Reading /proc can hang in the kernel for ever; then only this process hangs. Standard library only, and no module that
takes long to load (re and signal take as long as reading 500 processes): it is started every few seconds.
"""

import os
import sys

SLUID_LETTERS = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ"
SCOPE = b"slurmstepd.scope"
TITLE = b"slurmstepd: ["
STATUS_MOST = 4096  # processes of jobs whose CPUs are read in one look
CPUS = b"\nCpus_allowed_list:"
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


def cpus_of(pid: str, proc: str) -> bytes:
    """What a process may run on, such as 0-3,8; empty where that is not told. (No lock is waited for, unlike cmdline.)"""
    text = read(f"{proc}/{pid}/status").partition(CPUS)[2].partition(b"\n")[0].strip()
    return text if not text.strip(b"0123456789,-") else b""


def jobs_of(pid: str, proc: str) -> tuple[set[tuple[bytes, bytes]], bool]:
    """The jobs that a process shows by its cgroups or, for a slurmstepd, by its title; whether it is the job's own."""
    places = places_in(read(f"{proc}/{pid}/cgroup"))
    found = {(job, node) for job, node in places if job is not None}
    if read(f"{proc}/{pid}/comm").strip() == b"slurmstepd":  # others' command lines are not read: that can hang
        title = read(f"{proc}/{pid}/cmdline")
        job = title[len(TITLE) :].partition(b".")[0]
        if title.startswith(TITLE) and job.isdigit() and os.stat(f"{proc}/{pid}").st_uid == 0:
            found.add((job, places[0][1] if places else b"-"))
        return found, False
    return found, bool(found)


def main(proc: str) -> None:
    found: dict[tuple[bytes, bytes], set[bytes]] = {}
    left = STATUS_MOST
    for pid in os.listdir(proc):
        if pid.isdigit():
            try:
                jobs, own = jobs_of(pid, proc)
            except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
                continue
            left -= own
            cpus = {cpus_of(pid, proc)} - {b""} if own and left >= 0 else set()
            for job in jobs:
                found[job] = found.get(job, set()) | cpus
    lines = [b"%s %s %s\n" % (*job, b";".join(sorted(found[job])) or b"-") for job in sorted(found)]
    os.write(1, b"".join(lines) + b"whole\n")


if __name__ == "__main__":
    main(sys.argv[1])
