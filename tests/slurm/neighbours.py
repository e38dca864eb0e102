"""Two of Slurm's nodes on one machine, as where several slurmd run on a host (Debian's Slurm is built for it)."""

import contextlib
from pathlib import Path

from tests.ports import free_port
from tests.slurm.testbed import SlurmError, SlurmNode
from tests.waiting import wait_until


class TwoNodes(SlurmNode):
    """`node` and `other`, one slurmctld, a slurmd each; the partition `both` has both. cgroup v2."""

    def __init__(self, folder: Path, **wanted: object):
        super().__init__(folder, **wanted)  # type: ignore[arg-type]
        self.other = f"{self.node}b"
        self.spool = self.folder / f"spool-{self.node}"
        self._second = SlurmNode(folder, cgroup=self.cgroup, gpus=self.gpus, name=self.other)

    def _write_files(self) -> None:
        super()._write_files()
        conf, gres = self.folder / "slurm.conf", self.folder / "gres.conf"
        text = conf.read_text()
        for name in ("/spool", "/slurmd.pid", "/slurmd.log"):
            text = text.replace(f"{self.folder}{name}\n", f"{self.folder}{name}-%n\n")
        line = next(line for line in text.splitlines() if line.startswith("NodeName="))
        second = line.replace(f"NodeName={self.node} ", f"NodeName={self.other} Port={free_port()} ")
        conf.write_text(f"{text}{second}\nPartitionName=both Nodes={self.node},{self.other} MaxTime=INFINITE State=UP\n")
        gres.write_text(gres.read_text() + gres.read_text().replace(f"={self.node} ", f"={self.other} "))
        for node in (self.node, self.other):
            (self.folder / f"spool-{node}").mkdir(exist_ok=True)

    def start(self) -> None:
        super().start()
        self._second.start_slurmd()
        wait_until(lambda: self._client("sinfo", "-h", "-N", "-p", "both", "-o", "%T").split() == ["idle"] * 2, 60)

    def node_state(self) -> str:
        """Of the first one, in the partition that both tests and the base class use."""
        with contextlib.suppress(SlurmError):
            return self._client("sinfo", "-h", "-N", "-p", "main", "-o", "%T", within_s=5).strip()
        return ""

    def stop(self) -> None:
        if self._ctld is not None:
            with contextlib.suppress(SlurmError):  # a slurmctld that has not come up
                self._client("scancel", "--partition=both", within_s=10)
            self._second.kill_slurmd()
        super().stop()
        self._second._end_cgroup()
