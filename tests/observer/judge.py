"""The guarantees, asked of what was seen. Pure: samples and what the test tells come in, findings come out.

Times are the observer's own: a job counts from its first sight on, a process from the last look at which it was not
there. Looks that came late widen every bound by as much, because then llmwd did not run either.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.observer.sight import Job, Process, Sample, parse

LATE_S = 0.1  # a gap between two looks beyond this is a machine that was busy
SETTLED_S = 2.0  # after a kill; and nothing else may have happened so long before it
WORKERS = ("detector", "resolver", "vllm", "door", "tunnel", "notifier")
GUARDS_GPUS = frozenset({"root", "detector", "resolver", "vllm", "holder", "guard"})  # whose trouble may delay a release


@dataclass
class Bounds:
    """What the settings of the watched llmwd promise, in seconds."""

    ttl_s: float
    grace_s: float
    resolve_s: float
    kill_s: float = 2.0
    race_s: float = 1.0

    @property
    def release_s(self) -> float:
        return self.resolve_s + self.grace_s + self.kill_s

    @property
    def fault_s(self) -> float:
        """The bound while something of ours is broken."""
        return self.ttl_s + self.grace_s + self.kill_s


@dataclass
class Overlap:
    """One server tree on GPUs of one job."""

    job: Job
    since_s: float
    gpus: frozenset[int] = frozenset()
    told: bool = False


@dataclass
class Judge:
    bounds: Bounds
    report: Callable[[dict], None]
    overlaps: dict[tuple[str, str], Overlap] = field(default_factory=dict)
    releases: list[tuple[float, bool]] = field(default_factory=list)  # (seconds, in the middle of a fault)
    left: list[float] = field(default_factory=list)  # seconds until a server was off a GPU that the driver had something against
    violations: list[dict] = field(default_factory=list)
    open_faults: set[str] = field(default_factory=set)
    fault_s: float = float("-inf")
    happened_s: float = float("-inf")  # anything that may change pids rightly
    late: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=2000))  # looks that came late: when, by how much
    worst_late_s: float = 0.0
    before: Sample | None = None
    root_gone_s: float | None = None
    dying: dict[tuple[int, int], Process] = field(default_factory=dict)
    die_by_s: float = 0.0
    held_since_s: float | None = None
    killed: tuple[float, frozenset[str], dict[str, set[int]]] | None = None
    claimed_s: float = float("-inf")  # when a job was there last that has GPUs, or may have some
    told_s: float = float("-inf")
    double: int = 0
    counted: dict[str, int] = field(default_factory=dict)
    _started_on: set[tuple] = field(default_factory=set)

    # --- what the test tells

    def told(self, word: dict, now_s: float) -> None:
        """fault NAME (open: until healed; roles: of whom), healed NAME, killed ROLES, held, unheld (orders), happened,
        job GPUS (one comes, which may be over before the next look).

        Only what befalls those who guard the GPUs widens a bound."""
        kind = word["event"]
        if kind == "job":
            self.claimed_s = now_s if parse(word["gpus"]) != frozenset() else self.claimed_s
            return
        self.told_s = now_s
        matters = bool(GUARDS_GPUS & set(word.get("roles", GUARDS_GPUS)))
        self.counted[kind] = self.counted.get(kind, 0) + 1
        match kind:
            case "fault":
                self.fault_s = now_s if matters else self.fault_s
                if word.get("open") and matters:
                    self.open_faults.add(word["name"])
            case "healed":
                self.open_faults.discard(word["name"])
                self.fault_s = now_s
            case "killed":
                roles = frozenset(word["roles"])
                quiet = now_s - max(self.happened_s, self.fault_s) > SETTLED_S and not self.open_faults
                if self.before is not None:  # one that is stopped, a server above all, may be ended for that at any time
                    quiet &= not any(each.state in "Tt" for each in self.before.processes.values())
                self.killed = (now_s, roles, self._pids(self.before)) if quiet and self.before is not None else None
                self.fault_s, self.happened_s = now_s if matters else self.fault_s, now_s
                return
            case "held":
                self.held_since_s = now_s
            case "unheld":
                self.held_since_s = None
        self.happened_s, self.killed = now_s, None

    def faulty(self, now_s: float) -> bool:
        """Whether something of ours is broken, or was a short while ago."""
        return bool(self.open_faults) or self._stopped(self.before) or now_s - self.fault_s < 2 * self.bounds.ttl_s

    @staticmethod
    def _stopped(sample: Sample | None) -> bool:
        return sample is not None and any(each.state in "Tt" and each.role in GUARDS_GPUS for each in sample.processes.values())

    # --- what is seen

    def judge(self, sample: Sample) -> None:
        if self.before is not None:
            gap_s = sample.done_s - self.before.done_s
            self.worst_late_s = max(self.worst_late_s, gap_s)
            if gap_s > LATE_S:
                self.late.append((sample.done_s, gap_s - LATE_S))
            if self._stopped(self.before):
                self.fault_s = sample.begun_s
            if self.before.jobs != sample.jobs:
                self.happened_s, self.killed = sample.begun_s, None
        servers = [each for each in sample.processes.values() if each.gpus]
        if any(job.gpus is None or job.gpus for job in sample.jobs.values()):
            self.claimed_s = sample.done_s
        self._jobs_come_first(sample, servers)
        self._jobs_without_gpus_change_nothing(sample, servers)
        self._one_server_on_a_gpu(sample, servers)
        self._nothing_outlives_the_root(sample)
        self._a_death_is_local(sample)
        self._a_hold_is_kept(servers)
        self.before = sample

    def _jobs_come_first(self, sample: Sample, servers: list[Process]) -> None:
        now: set[tuple[str, str]] = set()
        claims = sample.jobs | sample.troubles
        for process in servers:
            for id, job in claims.items():
                shared = process.gpus if job.gpus is None else process.gpus & job.gpus
                if not shared:
                    continue
                key = (id, process.tree)
                now.add(key)
                if key not in self.overlaps:
                    since_s = max(job.since_s, process.first_s)
                    self.overlaps[key] = Overlap(job, since_s, shared)
                    self._started_on_a_job(process, id, job, servers)
                if not job.starts_only:
                    self._too_long(id, self.overlaps[key], sample)
        for key in [key for key in self.overlaps if key not in now]:
            overlap = self.overlaps.pop(key)
            if key[0] in sample.troubles and not overlap.job.starts_only:
                took_s = self.before.done_s - overlap.since_s
                self.left.append(took_s)
                self.report({"event": "left", "for": key[0], "took_s": round(took_s, 3)})
            if key[0] not in sample.jobs:
                continue  # the job left first, or it was none
            self._released(key[0], overlap.gpus, self.before.done_s - overlap.since_s, sample)
        self._too_quick_to_be_seen(sample, {process.tree for process in servers})

    def _too_quick_to_be_seen(self, sample: Sample, trees: set[str]) -> None:
        """A job that is new, and a server on its GPUs that was there at the last look."""
        new = {id: job for id, job in sample.jobs.items() if self.before is not None and id not in self.before.jobs}
        for id, job in new.items():
            gone = [each for each in self.before.processes.values() if each.gpus and each.tree not in trees]
            shared = {gpu for each in gone for gpu in each.gpus if job.gpus is None or gpu in job.gpus}
            if shared:
                self._released(id, frozenset(shared), 0.0, sample)

    def _released(self, job: str, gpus: frozenset[int], took_s: float, sample: Sample) -> None:
        faulty = self.faulty(sample.done_s - took_s) or self.faulty(sample.done_s)
        self.releases.append((took_s, faulty))
        self.report({"event": "release", "job": job, "gpus": sorted(gpus), "took_s": round(took_s, 3), "fault": faulty})

    def _jobs_without_gpus_change_nothing(self, sample: Sample, servers: list[Process]) -> None:
        if self.before is None or not sample.jobs or sample.begun_s - self.claimed_s < self.bounds.fault_s:
            return
        new = max(job.since_s for job in sample.jobs.values())
        lost = {each.tree for each in self.before.processes.values() if each.gpus} - {each.tree for each in servers}
        quiet = sample.begun_s - self.told_s > self.bounds.fault_s and not self.faulty(sample.begun_s)
        if lost and quiet and sample.begun_s - new < self.bounds.fault_s and any(each.role == "root" for each in sample.processes.values()):
            self._violation("G3", f"a server ended though the jobs {sorted(sample.jobs)} have no GPUs", sample.begun_s)

    def _started_on_a_job(self, process: Process, id: str, job: Job, servers: list[Process]) -> None:
        # The tree's first process counts: one that serves may fork at any time.
        began_s = min(each.not_before_s for each in servers if each.tree == process.tree)
        after_s = began_s - job.since_s
        allowed_s = self.bounds.race_s + job.slow_s + (self.bounds.ttl_s if self.faulty(began_s) else 0.0)
        if after_s > allowed_s + self._late_since(job.since_s) and (id, process.tree) not in self._started_on:
            self._started_on.add((id, process.tree))
            self._violation("G1", f"a server was started on GPUs of {_named(id)}, {after_s:.2f} s after it had come", began_s)

    def _late_since(self, since_s: float) -> float:
        return sum(late_s for at_s, late_s in self.late if at_s >= since_s)

    def _too_long(self, id: str, overlap: Overlap, sample: Sample) -> None:
        took_s = sample.begun_s - overlap.since_s
        faulty = self.faulty(overlap.since_s) or self.faulty(sample.begun_s)
        allowed_s = (self.bounds.fault_s if faulty else self.bounds.release_s) + overlap.job.slow_s
        if overlap.job.gpus is None:
            allowed_s += self.bounds.resolve_s
        if took_s > allowed_s + self._late_since(overlap.since_s) and not overlap.told:
            overlap.told = True
            self._violation("G1", f"{_named(id)} has shared GPUs {sorted(overlap.gpus)} with a server for {took_s:.2f} s", sample.begun_s)

    def _one_server_on_a_gpu(self, sample: Sample, servers: list[Process]) -> None:
        trees: dict[int, set[str]] = {}
        for process in servers:
            for gpu in process.gpus:
                trees.setdefault(gpu, set()).add(process.tree)
        # One look is no proof: the processes were read one after the other.
        self.double = self.double + 1 if any(len(each) > 1 for each in trees.values()) else 0
        if self.double == 3:
            self._violation("G1", f"two servers on one GPU: {({gpu: sorted(each) for gpu, each in trees.items() if len(each) > 1})}", sample.begun_s)

    def _nothing_outlives_the_root(self, sample: Sample) -> None:
        roots = [each for each in sample.processes.values() if each.role == "root"]
        had = self.before is not None and any(each.role == "root" for each in self.before.processes.values())
        if had and not roots:
            self.root_gone_s = sample.done_s
            self.dying = {key: each for key, each in sample.processes.items() if each.role != "ctl"}
            self.die_by_s = sample.done_s + self.bounds.fault_s
            self.happened_s, self.fault_s, self.killed = sample.done_s, sample.done_s, None
        if self.dying:  # what they fork is no better than they are
            pids, trees = {each.pid for each in self.dying.values()}, {each.tree for each in self.dying.values()} - {""}
            self.dying |= {key: each for key, each in sample.processes.items() if each.ppid in pids or each.tree in trees}
        self.dying = {key: each for key, each in self.dying.items() if key in sample.processes and each.role not in ("ctl", "root")}
        if self.dying and sample.begun_s > self.die_by_s + self._late_since(self.root_gone_s):
            left = ", ".join(f"{each.role} {each.pid} ({each.state})" for each in self.dying.values())
            self._violation("G5", f"still there {sample.begun_s - self.root_gone_s:.1f} s after the root's death: {left}", sample.begun_s)
            self.dying = {}

    @staticmethod
    def _pids(sample: Sample) -> dict[str, set[int]]:
        pids: dict[str, set[int]] = {}
        for each in sample.processes.values():
            if each.role in WORKERS or each.role in ("root", "holder", "server"):
                pids.setdefault(each.role, set()).add(each.pid)
        return pids

    def _a_death_is_local(self, sample: Sample) -> None:
        if self.killed is None or sample.begun_s < self.killed[0] + SETTLED_S:
            return
        at_s, roles, before = self.killed
        self.killed = None
        now = self._pids(sample)
        changed = {role for role in before if before[role] - now.get(role, set())}
        if roles & {"holder", "server"}:
            changed -= {"holder", "server"}
        self.report({"event": "killed", "roles": sorted(roles), "changed": sorted(changed)})
        if changed - roles:
            self._violation("G6", f"{sorted(changed - roles)} ended when {sorted(roles)} were killed", at_s)

    def _a_hold_is_kept(self, servers: list[Process]) -> None:
        if self.held_since_s is None:
            return
        for process in servers:
            key = ("held", process.tree)
            if process.not_before_s > self.held_since_s + self.bounds.race_s and key not in self._started_on:
                first_s = min(each.not_before_s for each in servers if each.tree == process.tree)
                if first_s > self.held_since_s + self.bounds.race_s:
                    self._started_on.add(key)
                    self._violation("G8", f"a server was started {first_s - self.held_since_s:.2f} s after an order to hold", first_s)

    # --- what is found

    def bystander_harmed(self, how: str, now_s: float) -> None:
        self._violation("G4", how, now_s)

    def cgroup_kept(self, how: str, now_s: float) -> None:
        self._violation("G7", how, now_s)

    def _violation(self, guarantee: str, text: str, at_s: float) -> None:
        found = {"event": "violation", "guarantee": guarantee, "text": text, "at_s": round(at_s, 3)}
        self.violations.append(found)
        self.report(found)

    def summary(self) -> dict:
        clean = [took_s for took_s, faulty in self.releases if not faulty]
        hurt = [took_s for took_s, faulty in self.releases if faulty]
        return {
            "event": "summary", "releases": len(self.releases), "worst_release_s": round(max(clean, default=0.0), 3),
            "worst_release_in_fault_s": round(max(hurt, default=0.0), 3), "left": len(self.left),
            "worst_left_s": round(max(self.left, default=0.0), 3), "looks_late_s": round(self._late_since(0.0), 2),
            "worst_look_s": round(self.worst_late_s, 3), "told": self.counted, "violations": self.violations,
        }  # fmt: skip


def _named(claim: str) -> str:
    return f"job {claim}" if claim.isdecimal() else claim
