"""A real one-node Slurm in a folder of its own (root only); long because bringing it up and down is one story.

    with SlurmNode(folder, cgroup="v2", gpus=8) as slurm:
        job = slurm.sbatch("sleep 600", "--gres=gpu:2")
        slurm.wait_state(job, "RUNNING")

Nothing is shared with another Slurm: own ports, no munge (auth/none), own NodeName, and through the NodeName own
cgroup folders. Debian's packages are built for several slurmd's on a machine and put the NodeName into the cgroup
path; one that is not gets a sentence instead of a test bed.

The daemons run in the foreground (-D) as our children: their pids need no pid file and cannot be another's. On a
machine that does not mount cgroup2 at /sys/fs/cgroup, slurmd gets a private mount namespace where it is; the tree
is the same, so everybody else sees the jobs below the machine's own cgroup2 mount.
"""

import contextlib
import functools
import itertools
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
from pathlib import Path
from typing import Self

import psutil

from tests.ports import free_port
from tests.waiting import wait_until

CGROUP_ROOT = Path("/sys/fs/cgroup")
PRELOAD_SOURCE = Path(__file__).with_name("preload_cgroup.c")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "unshare", "cc")
NVIDIA_MAJOR = 195
START_ATTEMPTS = 3
UNIX_PATH_MAX = 107
USABLE = ("idle", "mixed", "allocated", "completing")

SLURM_CONF = """\
ClusterName={node}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state/{node}
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/cgroup
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
KillWait=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
{more}
NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=64000 {gres} State=UNKNOWN
PartitionName=main Nodes={node} Default=YES MaxTime=INFINITE State=UP
"""
CGROUP_CONF = """\
CgroupPlugin=cgroup/{cgroup}
IgnoreSystemd=yes
ConstrainCores=no
ConstrainDevices=no
ConstrainRAMSpace=no
ConstrainSwapSpace=no
"""

_counter = itertools.count(1)


class SlurmError(RuntimeError):
    """The test bed cannot start or a client failed; the text says why, at start with the daemons' last log lines."""


@functools.cache
def missing() -> str:
    """What this machine lacks for a test bed, as one sentence; empty when nothing is."""
    if os.geteuid() != 0:
        return "A Slurm node can only be started by root; run the tests as root or set LLMWD_TEST_WITHOUT=slurm."
    absent = [program for program in PROGRAMS if not shutil.which(program)]
    if absent:
        return (
            f"Not installed: {', '.join(absent)} (packages slurm-wlm, util-linux and gcc);"
            " install them or set LLMWD_TEST_WITHOUT=slurm."
        )
    return ""


def cgroup_mounts() -> dict[str, Path]:
    """Where cgroups are mounted here: "cgroup2", and v1 hierarchies by their controllers ("freezer")."""
    found: dict[str, Path] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split()[:3]
        point = Path(before.split()[4])
        if kind == "cgroup2":
            found.setdefault("cgroup2", point)
        elif kind == "cgroup":
            found.update({option: point for option in options.split(",")})
    return found


class SlurmNode:
    """One slurmctld and one slurmd; a context manager. `folder` needs a short path: unix sockets live below it."""

    def __init__(
        self,
        folder: Path,
        cgroup: str = "v2",
        gpus: int = 8,
        extra_conf: str = "",
        prolog: Path | None = None,
        name: str | None = None,
    ):
        """`extra_conf` is text for slurm.conf, `prolog` slurmd's Prolog. Nothing is started or written yet."""
        if cgroup not in ("v1", "v2"):
            raise ValueError(f"cgroup is {cgroup!r}; it must be 'v1' or 'v2'")
        self.folder = folder.resolve()
        self.cgroup = cgroup
        self.gpus = gpus
        # Unique over processes, instances and killed earlier runs, whose folders then never look like ours.
        self.node = name or f"t{os.getpid()}x{next(_counter)}{secrets.token_hex(2)}"
        self.spool = self.folder / "spool"
        self.env = {"SLURM_CONF": str(self.folder / "slurm.conf")}  # on top of a client's own environment
        self._extra = extra_conf
        self._prolog = prolog
        self._ctld: subprocess.Popen[bytes] | None = None
        self._slurmd: subprocess.Popen[bytes] | None = None
        if len(f"{self.spool}/{self.node}_99999.4294967291") > UNIX_PATH_MAX:
            raise ValueError(f"the path {self.folder} is too long for slurmstepd's sockets; use a shorter one")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def scope(self) -> Path:
        """The folder in which job_N folders appear, as seen from outside slurmd's mount namespace."""
        mounts = cgroup_mounts()
        if self.cgroup == "v1":
            return mounts["freezer"] / f"slurm_{self.node}" / "uid_0"
        return mounts["cgroup2"] / "system.slice" / f"{self.node}_slurmstepd.scope"

    @property
    def _tree(self) -> Path:
        """The topmost cgroup folder that is this node's alone."""
        return self.scope.parent if self.cgroup == "v1" else self.scope

    # ---- up and down

    def start(self) -> None:
        """Returns when the node is idle (about 0.1 s). SlurmError when it does not become so."""
        if problem := missing():
            raise SlurmError(problem)
        wanted = "freezer" if self.cgroup == "v1" else "cgroup2"
        if wanted not in cgroup_mounts():
            raise SlurmError(f"This machine mounts no {wanted}, which a Slurm node with cgroup {self.cgroup} needs.")
        trouble = ""
        for _ in range(START_ATTEMPTS):
            # system.slice may be removed by another node's stop().
            try:
                self._write_files()
                self._ctld = self._spawn("slurmctld", ["slurmctld", "-D"])
                self.start_slurmd()
                wait_until(self._came_up, 20, every_s=0.05, what=f"Slurm node {self.node} idle")
                return
            except (AssertionError, SlurmError) as error:
                trouble = f"{error}\n{self._log_tails()}"
                self.stop()
        raise SlurmError(f"Slurm node {self.node} did not start in {START_ATTEMPTS} attempts: {trouble}")

    def stop(self) -> None:
        """Everything away: jobs, daemons, slurmstepds, cgroup folders. Harmless when repeated or never started."""
        if self._ctld is None:
            return
        self.cont_ctld()
        if _alive(self._ctld) and _alive(self._slurmd):
            with contextlib.suppress(AssertionError, SlurmError):
                self._client("scancel", "--partition=main", within_s=10)
                wait_until(self._has_no_jobs, 10, every_s=0.05)
        self.kill_slurmd(signal.SIGTERM)
        self.kill_ctld()
        self._end_cgroup()

    def heal(self) -> None:
        """Whatever a test did to the daemons: both run, and slurmctld answers and takes the node for usable."""
        self.cont_ctld()
        if not _alive(self._ctld):
            self.start_ctld()
        if not _alive(self._slurmd):
            self.start_slurmd()
        wait_until(lambda: self.node_state() in USABLE, 60, every_s=0.05, what=f"Slurm node {self.node} up")

    def cancel_all(self, within_s: float = 60) -> None:
        """Heals, cancels every job and waits until none is left, no job folder is left and the node is idle."""
        self.heal()
        if not self._is_idle():
            self._client("scancel", "--partition=main")
            wait_until(self._is_idle, within_s, every_s=0.05, what=f"Slurm node {self.node} without jobs")

    # ---- jobs

    def sbatch(self, script: str = "exec sleep 600", *args: str) -> int:
        """Submits; the job id. `args` are sbatch's, such as "--gres=gpu:2"; output goes to job-<id>.out in `folder`.

        With the `exec` the job's folder goes 30 ms after a scancel; a shell that waits for its child makes it 1 s."""
        output = f"--output={self.folder}/job-%j.out"
        return int(self._client("sbatch", "--parsable", output, *args, "--wrap", script).split(";")[0])

    def scancel(self, *jobs: int) -> None:
        self._client("scancel", *map(str, jobs))

    def state(self, job: int) -> str:
        """Slurm's long name of the job's state ("RUNNING"); "UNKNOWN" for a job slurmctld does not know."""
        try:
            lines = self._client("squeue", "-h", "-r", "-t", "all", "-j", str(job), "-o", "%A %T").splitlines()
        except SlurmError as error:
            if "Invalid job id" in str(error):
                return "UNKNOWN"
            raise
        return next((line.split()[1] for line in lines if line.split()[0] == str(job)), "UNKNOWN")

    def wait_state(self, job: int, state: str, within_s: float = 30) -> None:
        wait_until(lambda: self.state(job) == state, within_s, every_s=0.05, what=f"job {job} {state}")

    def gpus_of(self, job: int) -> set[int]:
        """The indices of the generic resource "gpu" Slurm gave to the job; empty for none and while completing."""
        text = self._client("scontrol", "--local", "-o", "-d", "show", "job", str(job))
        record = next((line for line in text.splitlines() if line.startswith(f"JobId={job} ")), "")
        found: set[int] = set()
        for indices in re.findall(r" GRES=gpu\S*?\(IDX:([\d,-]+)\)", record):
            for part in indices.split(","):
                first, _, last = part.partition("-")
                found.update(range(int(first), int(last or first) + 1))
        return found

    def job_dir(self, job: int) -> Path:
        """Where the job's folder is while it has one, as seen from outside slurmd's mount namespace."""
        return self.scope / f"job_{job}"

    def node_state(self) -> str:
        """sinfo's name of the node's state ("idle*": slurmd does not respond); empty when slurmctld does not answer."""
        with contextlib.suppress(SlurmError):
            return self._client("sinfo", "-h", "-N", "-o", "%T", within_s=5).strip()
        return ""

    # ---- the daemons

    def stop_ctld(self) -> None:
        """SIGSTOP: connections are accepted and never answered."""
        if self._ctld:
            self._ctld.send_signal(signal.SIGSTOP)

    def cont_ctld(self) -> None:
        if self._ctld:
            self._ctld.send_signal(signal.SIGCONT)

    def kill_ctld(self, sig: signal.Signals = signal.SIGTERM) -> None:
        """Returns when slurmctld is gone: connections are refused.

        SIGTERM lets it save its state. After SIGKILL the next one has forgotten what is younger than some seconds: it
        takes a running job for pending, or does not know it, while the job's processes and folder are still there."""
        _end(self._ctld, sig)

    def start_ctld(self) -> None:
        """Returns when slurmctld listens. Jobs are known again from its state folder."""
        self._ctld = self._spawn("slurmctld", ["slurmctld", "-D"])
        wait_until(lambda: self._listens(self._ctld), 20, what="slurmctld listening")

    def kill_slurmd(self, sig: signal.Signals = signal.SIGKILL) -> None:
        """Returns when slurmd is gone. Jobs go on: their slurmstepds are processes of their own."""
        _end(self._slurmd, sig)

    def start_slurmd(self) -> None:
        """Returns when slurmd listens."""
        command = ["slurmd", "-D", "-N", self.node]
        if self.cgroup == "v2":
            self.scope.parent.mkdir(exist_ok=True)  # gone with the last scope in it; slurmd makes no more than its own
            if "\n" in Path("/proc/self/cgroup").read_text().strip():  # v1 lines beside the one of v2
                command = ["env", f"LD_PRELOAD={self.folder}/preload_cgroup.so", *command]
            if cgroup_mounts()["cgroup2"] != CGROUP_ROOT:
                mount = f'mount -t cgroup2 none {CGROUP_ROOT} && exec "$@"'
                command = ["unshare", "-m", "--propagation", "private", "sh", "-c", mount, "sh", *command]
        self._slurmd = self._spawn("slurmd", command)
        wait_until(lambda: self._listens(self._slurmd), 20, what="slurmd listening")

    def restart_slurmd(self) -> None:
        """As an administrator does it: SIGTERM, then a new one."""
        self.kill_slurmd(signal.SIGTERM)
        self.start_slurmd()

    # ---- how

    def _write_files(self) -> None:
        # State per name: slurmctld refuses another cluster's, and the folder may be that of an earlier run.
        for name in (f"state/{self.node}", "spool", "dev"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for minor in range(self.gpus):
            device = self.folder / "dev" / f"nvidia{minor}"
            if not device.exists():
                os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(NVIDIA_MAJOR, minor))
        ctld_port, slurmd_port = free_port(), free_port()
        text = SLURM_CONF.format(
            node=self.node,
            host=socket.gethostname().partition(".")[0],
            ctld_port=ctld_port,
            slurmd_port=slurmd_port,
            folder=self.folder,
            gres=f"Gres=gpu:h200:{self.gpus}" if self.gpus else "",
            more=(f"Prolog={self._prolog}\n" if self._prolog else "") + self._extra,
        )
        devices = f"NodeName={self.node} Name=gpu Type=h200 File={self.folder}/dev/nvidia[0-{self.gpus - 1}]\n"
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text(devices if self.gpus else "")
        (self.folder / "cgroup.conf").write_text(CGROUP_CONF.format(cgroup=self.cgroup))
        if self.cgroup == "v2":
            library = self.folder / "preload_cgroup.so"
            build = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(PRELOAD_SOURCE), "-ldl"]
            subprocess.run(build, check=True)

    def _spawn(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.out").open("ab") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **self.env},
                cwd=self.folder,
                start_new_session=True,  # Ctrl-C at the terminal is for us, who then take it down in order
            )

    def _client(self, *command: str, within_s: float = 30) -> str:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=within_s,
                env={**os.environ, **self.env, "LC_ALL": "C"},
            )
        except subprocess.TimeoutExpired as error:
            raise SlurmError(f"{' '.join(command)} did not answer within {within_s:g} s") from error
        if done.returncode:
            raise SlurmError(f"{' '.join(command)} failed: {done.stderr.strip()}")
        return done.stdout

    def _listens(self, daemon: subprocess.Popen[bytes] | None) -> bool:
        if not daemon or not _alive(daemon):
            raise SlurmError(f"a daemon ended while starting\n{self._log_tails()}")
        try:
            connections = psutil.Process(daemon.pid).net_connections("tcp")
        except psutil.NoSuchProcess:
            return False
        return any(connection.status == psutil.CONN_LISTEN for connection in connections)

    def _came_up(self) -> bool:
        if not _alive(self._ctld) or not _alive(self._slurmd):
            raise SlurmError("a daemon ended while starting")
        if self.node_state() != "idle":
            return False
        if not self._tree.exists():
            raise SlurmError(
                f"{self._tree} does not appear: Slurm here is built without --enable-multiple-slurmd,"
                " as Debian's and Ubuntu's packages are, or runs in a container with a cgroup of its own"
            )
        return True

    def _has_no_jobs(self) -> bool:
        return not self._client("squeue", "-h", "-o", "%A", within_s=5).strip() and not list(self.scope.glob("job_*"))

    def _is_idle(self) -> bool:
        if self._client("squeue", "-h", "-o", "%A").strip() or self.node_state() != "idle":
            return False
        # A killed slurmstepd leaves its job's empty folder behind; one that is still ending removes it itself.
        return all(_remove_cgroup(folder) for folder in self.scope.glob("job_*"))

    def _end_cgroup(self) -> None:
        def emptied() -> bool:
            for pid in _pids_in(self._tree):
                _kill_if_in(pid, self.node)
            return _remove_cgroup(self._tree)

        wait_until(emptied, 20, what=f"removal of {self._tree}")
        if self.cgroup == "v2":
            with contextlib.suppress(OSError):  # in use: systemd's, or another test bed's
                self.scope.parent.rmdir()

    def _log_tails(self) -> str:
        logs = [path for name in ("slurmctld", "slurmd") for path in sorted(self.folder.glob(f"{name}.[lo]*"))]
        return "\n".join(f"--- {path.name}\n" + "\n".join(_tail(path)) for path in logs)


def _tail(path: Path, lines: int = 12) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-lines:]


def _alive(daemon: subprocess.Popen[bytes] | None) -> bool:
    return daemon is not None and daemon.poll() is None


def _end(daemon: subprocess.Popen[bytes] | None, sig: signal.Signals, within_s: float = 30) -> None:
    """Signals our own child, waits, and kills what does not listen."""
    if not daemon or not _alive(daemon):
        return
    daemon.send_signal(signal.SIGCONT)
    daemon.send_signal(sig)
    try:
        daemon.wait(within_s)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _pids_in(tree: Path) -> list[int]:
    pids: list[int] = []
    for folder, _, _ in os.walk(tree):
        with contextlib.suppress(OSError):  # gone, or going
            pids += map(int, (Path(folder) / "cgroup.procs").read_text().split())
    return pids


def _kill_if_in(pid: int, node: str) -> None:
    """Kills the process if it still belongs to this node's cgroup once a pidfd pins it."""
    name = re.escape(node)
    ours = re.compile(rf"/(slurm_{name}|{name}_slurmstepd\.scope)(/|$)", re.MULTILINE)
    with contextlib.suppress(OSError):
        pidfd = os.pidfd_open(pid)
        try:
            if ours.search(Path(f"/proc/{pid}/cgroup").read_text()):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)


def _remove_cgroup(tree: Path) -> bool:
    """Removes the cgroup folders, deepest first, as far as they are empty; whether the whole tree is gone."""
    for folder, _, _ in os.walk(tree, topdown=False):
        with contextlib.suppress(OSError):  # in use, or removed by slurmstepd meanwhile
            os.rmdir(folder)
    return not tree.exists()
