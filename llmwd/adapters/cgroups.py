"""Jobs by the folders that slurmstepd makes for them in cgroup v2 and v1.

v2: <mount>/[container…/]<slice>/[<node>_]slurmstepd.scope/job_N (or a SLUID); the prefix where Slurm is built for
several slurmds on a machine, as Debian's is. v1: <mount>/slurm[_<node>]/uid_U/job_N in each controller that Slurm's
configuration uses. Found through /proc/self/mountinfo, for containers mount it elsewhere.

Only folders above the jobs' own are watched and listed, and nothing is ever locked: slurmstepd locks the scope to
make and remove steps. The kernel says nothing when a watched cgroup folder itself is removed, hence the watches on
the folders above and the repeated scan.
"""

import os
import re
from collections.abc import Callable
from typing import NamedTuple

from llmwd.adapters.jobfolders import Absent, JobFolders
from llmwd.vocab import Source

MOUNTINFO = "/proc/self/mountinfo"
SCOPE = re.compile(r"(?:(?P<node>.+)_)?slurmstepd\.scope")
SLURM_V1 = re.compile(r"slurm(?:_(?P<node>.+))?")
UID = re.compile(r"uid_[0-9]+")
CONTROLLERS_V1 = frozenset({"freezer", "cpuset", "memory", "devices", "cpuacct", "name=systemd"})
# Where a scope can be: in slices, and in the folders that container runtimes make around a slurmd of theirs.
ABOVE = re.compile(
    r".*\.slice|(kubepods|docker|containerd|crio|cri-|libpod|podman|lxc|machine).*|pod[0-9a-f_-]{8,}|[0-9a-f]{32,}"
)
# Worth a new walk at once; containers come and go too often for that, and wait for the next one.
LEADS_V2 = re.compile(rf".*\.slice|{SCOPE.pattern}")
# Any of them with a plugin "…/cgroup" makes folders for jobs. The first one's default is such a plugin.
_MAKERS = re.compile(r"^[ \t]*(ProctrackType|TaskPlugin|JobAcctGatherType)[ \t]*=[ \t]*(\S+)", re.IGNORECASE | re.MULTILINE)
DEPTH = 8
FOLDERS = 256


def made_for_jobs(config: str) -> bool:
    """Whether jobs get folders at all, by a slurm.conf or by what `scontrol show config` prints.

    Where they get none (proctrack/linuxproc), slurmd makes its scope all the same, and it stays empty.
    """
    plugins = {found[1].lower(): found[2].lower() for found in _MAKERS.finditer(config)}
    return any("/cgroup" in plugin for plugin in {"proctracktype": "proctrack/cgroup", **plugins}.values())


class Mount(NamedTuple):
    """A mounted cgroup hierarchy; `controllers` are v1's."""

    point: str
    version: int
    controllers: frozenset[str]


def mounts(text: str) -> list[Mount]:
    """The cgroup hierarchies in a mountinfo text (proc(5)), each once."""
    found: dict[tuple[str, str], Mount] = {}
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        mount, filesystem = before.split(), after.split()
        if len(mount) < 5 or len(filesystem) < 3 or filesystem[0] not in ("cgroup", "cgroup2"):
            continue
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), mount[4])
        version = 2 if filesystem[0] == "cgroup2" else 1
        controllers = frozenset() if version == 2 else frozenset(filesystem[2].split(","))
        found.setdefault((mount[2], mount[3]), Mount(point, version, controllers))
    return list(found.values())


def read_mounts() -> list[Mount]:
    with open(MOUNTINFO, encoding="utf-8", errors="surrogateescape") as file:
        return mounts(file.read())


class _Cgroups(JobFolders):
    """What both versions share: the mounts, and which of several nodes' folders count."""

    def __init__(self, node: str = "", find_mounts: Callable[[], list[Mount]] = read_mounts):
        """`node`: Slurm's name of this node, where the operator gave it; "" takes every slurmd's folders."""
        super().__init__()
        self._node = node
        self._find_mounts = find_mounts

    def _ours(self, folders: list[str], pattern: re.Pattern[str]) -> list[str]:
        """The named node's folders and those that name none; all of them where the named node has none at all."""
        node_of = {folder: pattern.fullmatch(os.path.basename(folder))["node"] for folder in folders}
        ours = [folder for folder, node in node_of.items() if node in (None, self._node)]
        return ours if self._node and ours else folders


class CgroupV2(_Cgroups):
    """Job folders in every scope of slurmstepd."""

    name = Source.cgroup2

    def walk(self) -> None:
        points = [mount.point for mount in self._find_mounts() if mount.version == 2]
        if not points:
            raise Absent("no cgroup v2 hierarchy is mounted here")
        scopes = self._find_scopes(points)
        if not scopes:
            raise Absent(f"no slurmstepd.scope below {' or '.join(points)}")
        for scope in self._ours(scopes, SCOPE):
            self.enter(scope, holds=True)

    def _find_scopes(self, points: list[str]) -> list[str]:
        """Breadth first, bounded in depth and number: a node may run hundreds of containers."""
        scopes: list[str] = []
        level, visited = points, 0
        for _ in range(DEPTH):
            below: list[str] = []
            for folder in level[: FOLDERS - visited]:
                visited += 1
                for name in self._list(folder):
                    if SCOPE.fullmatch(name):
                        scopes.append(f"{folder}/{name}")
                    elif ABOVE.fullmatch(name):
                        below.append(f"{folder}/{name}")
            level = below
        return scopes

    def _list(self, folder: str) -> list[str]:
        try:
            return self.enter(folder, holds=False, leads=LEADS_V2)
        except PermissionError:  # a container's private folder: a scope in there is not for our eyes
            return []


class CgroupV1(_Cgroups):
    """Job folders of all users, in every controller that has them."""

    name = Source.cgroup1

    def walk(self) -> None:
        points = [mount.point for mount in self._find_mounts() if mount.controllers & CONTROLLERS_V1]
        if not points:
            raise Absent("no cgroup v1 hierarchy that Slurm uses is mounted here")
        trees = [
            f"{point}/{name}"
            for point in points
            for name in self.enter(point, holds=False, leads=SLURM_V1)
            if SLURM_V1.fullmatch(name)
        ]
        if not trees:
            raise Absent(f"no folder slurm or slurm_NODE in {' or '.join(points)}")
        for tree in self._ours(trees, SLURM_V1):
            for name in self.enter(tree, holds=False, leads=UID):
                if UID.fullmatch(name):
                    self.enter(f"{tree}/{name}", holds=True)
