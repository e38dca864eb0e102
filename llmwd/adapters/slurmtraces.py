"""Whether Slurm is on this host, whatever its commands say: its daemons in /proc, their cgroups, its configuration.

Only names are read (a process's `comm`, folders): nothing that can hang, or be in a job's way.
"""

import os
from collections.abc import Iterable
from pathlib import Path

DAEMONS = frozenset({"slurmd", "slurmstepd"})
# As systemd and slurmd make them; below the mount of cgroup v2, and of each controller of v1.
CGROUPS = ("system.slice/slurmd.service", "system.slice/*slurmstepd.scope", "*/system.slice/slurmd.service")
CONFIGURATIONS = ("/etc/slurm/slurm.conf", "/etc/slurm-llnl/slurm.conf", "/run/slurm/conf/slurm.conf")


def daemon(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> str:
    """What shows that this host is a node of Slurm's, "" if nothing does."""
    for pid in sorted(int(name) for name in os.listdir(proc) if name.isdecimal()):
        try:
            name = (proc / str(pid) / "comm").read_text(errors="replace").strip()
        except OSError:  # it has just ended, or is hidden
            continue
        if name in DAEMONS:
            return f"{name} runs here (process {pid})"
    return next((f"there is {path}" for pattern in CGROUPS for path in cgroups.glob(pattern)), "")


def configuration(paths: Iterable[str] = CONFIGURATIONS) -> str:
    """The same of its configuration, which hosts have that only submit jobs, too."""
    named = os.environ.get("SLURM_CONF", "")
    return next((f"there is {path}" for path in (named, *paths) if path and Path(path).exists()), "")
