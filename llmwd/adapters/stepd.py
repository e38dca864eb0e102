"""Jobs by the sockets of their slurmstepds in slurmd's spool folder: <node>_<jobid>.<stepid>[.<het component>].

The best local sign: an ordinary file system, always the numeric job id, there before the job's cgroup. The sockets
are only listed, never connected to.
"""

import glob
import os
import re
from collections.abc import Iterable, Mapping

from llmwd.adapters.jobfolders import Absent, JobFolders
from llmwd.vocab import Source

SOCKET = re.compile(r"(?P<node>.+)_(?P<id>[0-9]+)\.[0-9]+([.+][0-9]+)?")  # steps count from 4294967290 down, too
CONFIG_FILES = ("/etc/slurm/slurm.conf", "/run/slurm/conf/slurm.conf", "/etc/slurm-llnl/slurm.conf")
DEFAULT_SPOOL = "/var/spool/slurmd"
INCLUDES = 5
_PAIR = r"^[ \t]*{key}[ \t]*=[ \t]*\"?([^\s\"#]+)"
_INCLUDE = re.compile(r"^[ \t]*include[ \t]+(\S+)", re.IGNORECASE | re.MULTILINE)
_SPOOL = re.compile(_PAIR.format(key="SlurmdSpoolDir"), re.IGNORECASE | re.MULTILINE)


def spool_setting(text: str) -> str | None:
    """SlurmdSpoolDir, %n and %h unexpanded, in slurm.conf or in what `scontrol show config` prints."""
    match = _SPOOL.search(text)
    return match[1] if match else None


def configuration(environ: Mapping[str, str]) -> str | None:
    """The text of the slurm.conf that Slurm's own programs would read; None: there is none to read."""
    candidates = [environ["SLURM_CONF"]] if environ.get("SLURM_CONF") else CONFIG_FILES
    texts = (_config_text(path, INCLUDES) for path in candidates)
    return next((text for text in texts if text is not None), None)


def configured_spool(text: str) -> str:
    """SlurmdSpoolDir of a slurm.conf, or its default."""
    return spool_setting(text) or DEFAULT_SPOOL


def _config_text(path: str, includes: int) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read(1 << 20)
    except OSError:
        return None
    more = _INCLUDE.findall(text)[:includes]
    parts = [_config_text(os.path.join(os.path.dirname(path), name), includes - 1) or "" for name in more]
    return "\n".join([text, *parts])


def spool_folders(setting: str, node: str, host: str) -> list[str]:
    """The folders that a SlurmdSpoolDir stands for: without a known node name, that of every slurmd there is."""
    path = setting.replace("%h", host)
    if node or "%n" not in path:
        return [path.replace("%n", node)]
    return sorted(glob.glob(glob.escape(path).replace("%n", "*")))


class StepdSockets(JobFolders):
    """Sockets in the spool folders that `learn` was told about."""

    name = Source.stepd

    def __init__(self, node: str, host: str):
        """`node`: Slurm's name of this node, or "" when the operator gave none; `host`: the short host name."""
        super().__init__()
        self._node = node
        self._host = host
        self._settings: list[str] = []

    def learn(self, settings: Iterable[str]) -> None:
        """Values of SlurmdSpoolDir, from slurm.conf and from slurmctld; all count."""
        self._settings = list(dict.fromkeys([*self._settings, *settings]))

    def job_of(self, name: str) -> str | None:
        match = SOCKET.fullmatch(name)
        return match["id"] if match else None

    def walk(self) -> None:
        if not self._settings:
            raise Absent("neither a slurm.conf nor scontrol tells slurmd's spool folder")
        spools = [folder for setting in self._settings for folder in spool_folders(setting, self._node, self._host)]
        names = re.compile("|".join(re.escape(os.path.basename(spool)) for spool in spools))
        for parent in {os.path.dirname(spool) for spool in spools}:
            self._watch_parent(parent, names)
        found = [spool for spool in spools if _exists(spool)]
        if not found:
            raise Absent(f"slurmd's spool folder {' or '.join(self._settings)} does not exist")
        for spool in found:
            self.enter(spool, holds=True)

    def _watch_parent(self, parent: str, names: re.Pattern[str]) -> None:
        try:
            self.enter(parent, holds=False, leads=names)
        except PermissionError:  # then only the repeated scan finds a spool folder that was made again
            return


def _exists(folder: str) -> bool:
    try:
        os.stat(folder)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
