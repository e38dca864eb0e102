"""What there is to see: processes by a mark in their environment, and jobs: simulated ones by the files of a folder, real
ones by their processes in the cgroups below slurmstepd's scope, whose environment names their GPUs."""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

YOUNG_S = 1.0  # so long after its first sight a process is looked at anew each time: it may exec
LOOK_AGAIN_S = 0.5
_JOB = re.compile(r"job_(\d+)")
_TITLE = re.compile(r"(?:llmwd: )?((?:holder|guard of) [a-z]+)|llmwd: ([a-z]+)")
_SHORT = {"holder-vllm": "holder", "guard-vllm": "guard"}  # the others keep their service: holder-caddy


@dataclass
class Process:
    """One process of the watched llmwd. not_before_s: it was not there yet; gpus: those in CUDA_VISIBLE_DEVICES."""

    pid: int
    start: int
    ppid: int
    not_before_s: float
    first_s: float
    state: str = "R"
    role: str = "other"
    gpus: frozenset[int] = frozenset()
    tree: str = ""
    looked_s: float = 0.0


@dataclass
class Job:
    """Who or what comes before us on GPUs: a job, or what the driver says (driver.py).

    gpus: None, its text was not understood. since_s: when its file, with this text, was first seen. slow_s: it may take
    so much longer than a job to be noticed. starts_only: what is on these GPUs may stay there."""

    gpus: frozenset[int] | None
    since_s: float
    slow_s: float = 0.0
    starts_only: bool = False


@dataclass
class Sample:
    """Everything at about one time: seen between begun_s and done_s (monotonic)."""

    begun_s: float
    done_s: float
    processes: dict[tuple[int, int], Process]
    jobs: dict[str, Job]
    troubles: dict[str, Job] = field(default_factory=dict)  # what else is against our being on a GPU


@dataclass
class Sight:
    """mark: `NAME=VALUE` in the environment of all of ours; folder: in the command line of those without it; trouble:
    what the driver has against us (`DriverSight.look`)."""

    mark: str
    folder: str
    jobs_folder: Path
    scope: Path | None = None
    trouble: Callable[[float, set[int], frozenset[int]], dict[str, Job]] = lambda now_s, ours, served: {}
    ours: dict[int, Process] = field(default_factory=dict)
    strangers: dict[int, float] = field(default_factory=dict)  # pid -> first seen
    jobs: dict[str, Job] = field(default_factory=dict)
    before_s: float = field(default_factory=time.monotonic)

    def look(self) -> Sample:
        begun_s = time.monotonic()
        pids = {int(name) for name in os.listdir("/proc") if name.isdecimal()} - {os.getpid()}
        for gone in [pid for pid in self.strangers if pid not in pids]:
            del self.strangers[gone]
        for gone in [pid for pid in self.ours if pid not in pids]:
            del self.ours[gone]
        for pid in pids:
            first_s = self.strangers.get(pid)
            if pid in self.ours or first_s is None or begun_s - first_s < YOUNG_S:
                self._inspect(pid, begun_s)
        self._look_at_jobs()
        served = frozenset(gpu for each in self.ours.values() for gpu in each.gpus)
        troubles = dict(self.trouble(time.monotonic(), set(self.ours), served))
        processes = {(each.pid, each.start): each for each in self.ours.values()}
        sample = Sample(begun_s, time.monotonic(), processes, dict(self.jobs), troubles)
        self.before_s = begun_s
        return sample

    def _inspect(self, pid: int, now_s: float) -> None:
        try:
            text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except OSError:
            self.ours.pop(pid, None)
            return
        words = text[text.rindex(")") + 2 :].split()
        state, start, ppid = words[0], int(words[19]), int(words[1])
        known = self.ours.get(pid)
        if state in "ZX":
            self.ours.pop(pid, None)
            return
        if known is not None and known.start == start:
            known.state, known.ppid = state, ppid
            if now_s - known.first_s > YOUNG_S and now_s - known.looked_s < LOOK_AGAIN_S:
                return
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            return
        if self.mark not in environ and self.folder not in command:
            # Between exec and the first page its environment reads as empty: ours stays ours.
            if known is None or known.start != start:
                self.strangers.setdefault(pid, now_s)
            return
        self.strangers.pop(pid, None)
        if known is None or known.start != start:
            known = self.ours[pid] = Process(pid, start, ppid, self.before_s, now_s, state)
        self._describe(known, environ, command, now_s)

    def _describe(self, process: Process, environ: list[str], command: str, now_s: float) -> None:
        names = dict(entry.split("=", 1) for entry in environ if "=" in entry)
        gpus = frozenset(int(word) for word in re.findall(r"\d+", names.get("CUDA_VISIBLE_DEVICES", "")))
        if gpus and not process.gpus:  # it became a server just now: what forked earlier was none
            # An older one is not looked at each time: it may have become it any time since it was.
            process.not_before_s, process.first_s = process.looked_s or self.before_s, now_s
        process.looked_s, process.gpus, process.tree = now_s, gpus, names.get("LLMWD_TREE", "")
        title = _TITLE.match(command)
        if gpus:
            process.role = "server"
        elif title:
            role = title[2] or title[1].replace(" of", "").replace(" ", "-")
            process.role = _SHORT.get(role, role)
        elif "llmwd.ctl" in command:
            process.role = "ctl"
        elif "llmwd.supervisor" in command:
            process.role = "root"
        elif "holder.main" in command:  # no title yet; its guard neither
            role = f"holder-{command.split()[-1]}"
            process.role = _SHORT.get(role, role)

    def _look_at_jobs(self) -> None:
        now_s, found = time.monotonic(), {}
        try:
            names = os.listdir(self.jobs_folder)
        except OSError:
            names = []
        for name in names:
            match = _JOB.fullmatch(name)
            if match is None:
                continue
            try:
                gpus = parse((self.jobs_folder / name).read_text(errors="replace"))
            except OSError:
                continue
            known = self.jobs.get(match[1])
            found[match[1]] = known if known is not None and known.gpus == gpus else Job(gpus, now_s)
        if self.scope is not None:
            found |= self._real_jobs(now_s)
        self.jobs = found

    def _real_jobs(self, now_s: float) -> dict[str, Job]:
        """A real job counts from its first process that knows its GPUs: from then on it can be hurt."""
        found = {}
        for folder in self.scope.glob("job_*"):
            id = folder.name.removeprefix("job_")
            known = self.jobs.get(id)
            gpus = known.gpus if known is not None else _gpus_of(folder)
            if gpus is not None:
                found[id] = known or Job(gpus, now_s)
        return found

    def lingers(self) -> set[tuple[int, str]]:
        """(pid of ours, what of a job's cgroup it keeps open or lives in)."""
        found: set[tuple[int, str]] = set()
        for pid in self.ours if self.scope is not None else ():
            try:
                paths = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
                group = Path(f"/proc/{pid}/cgroup").read_text()
            except OSError:
                continue
            found |= {(pid, path) for path in paths if path.startswith(f"{self.scope}/job_")}
            found |= {(pid, line) for line in group.splitlines() if f"/{self.scope.name}/job_" in line}
        return found


def start_of(pid: int) -> int | None:
    """The start time of a living process in clock ticks; None: there is none, or a zombie."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] in "ZX" else int(words[19])


def _gpus_of(folder: Path) -> frozenset[int] | None:
    """The GPUs that a job's processes were told; None while there is none that knows."""
    try:
        pids = [int(pid) for path in folder.rglob("cgroup.procs") for pid in path.read_text().split()]
    except OSError:  # it ends just now
        return None
    for pid in pids:
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        for entry in environ:
            if entry.startswith("SLURM_JOB_GPUS="):
                return parse(entry.partition("=")[2])
    return None


def parse(text: str) -> frozenset[int] | None:
    """"0-2,5" in the first line; None: something else."""
    gpus: set[int] = set()
    for part in filter(None, (text.splitlines() or [""])[0].strip().split(",")):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            return None
        gpus.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(gpus)
