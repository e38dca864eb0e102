"""The detector: which Slurm jobs are on this node; long because each of its sources wakes us in its own way.

Each source of detection has an inotify descriptor (or is polled); what it tells goes into the pure picture of
core/presence, and every change is published at once. A new name is taken right out of the inotify event, before any
folder is listed. A slow scan of all sources repeats the whole truth.
"""

import os
import time
from collections.abc import Callable

import msgspec

from llmwd.adapters import cgroups, rundir, slurm, stepd
from llmwd.adapters.cgroups import CgroupV1, CgroupV2
from llmwd.adapters.jobfolders import JobFolders
from llmwd.adapters.jobprocs import JobProcesses
from llmwd.adapters.simjobs import SimJobs
from llmwd.adapters.stepd import StepdSockets
from llmwd.config import Loaded
from llmwd.core import presence
from llmwd.core.presence import Change, Look
from llmwd.messages import JobsFact
from llmwd.vocab import Source
from llmwd.workers.base import Boot, Shell, repeat_every_s

SCAN_EVERY_S = 10.0
PROCFS_EVERY_S = 30.0  # each look costs 10 to 15 ms of a core: most of what the detector uses
PROCFS_FASTEST_S = 1.0  # where nothing else sees jobs
# What a job's processes may run on is told by them alone: a look so long after its arrival, when it has begun. One such
# look for all that arrive meanwhile.
PROCFS_AFTER_ARRIVAL_S = 1.5
# A job that only /proc still shows has most likely just ended: look again soon, then less and less often.
PROCFS_AGAIN_S = 0.25
FIRST_LOOK_WITHIN_S = 2.0
SPOOL_ASK_EVERY_S = 300.0
REAP_AFTER_S = 0.5  # a look's process has said all and been killed: by then it is gone
LOCAL = (Source.stepd, Source.cgroup2, Source.cgroup1, Source.procfs, Source.sim)
OF_SLURM = (Source.stepd, Source.cgroup2, Source.cgroup1)


def chosen(detection: tuple[str, ...]) -> tuple[tuple[Source, ...], bool]:
    """The detector's sources among DETECTION's words, and whether they were named (auto: all that work)."""
    if "auto" in detection:
        return LOCAL, False
    return tuple(source for source in LOCAL if source in detection), True


def _look(source: JobFolders, jobs: dict[str, presence.Gpus] | None, began_s: float) -> Look:
    back = frozenset() if jobs is None else source.came_back()
    return Look(source=source.name, jobs=jobs, began_s=began_s, absent=source.absent, why=source.check().why, back=back)


class Detector:
    """Sources on one side, the shell's loop on the other, the picture in between."""

    def __init__(self, shell: Shell):
        self._shell = shell
        self._state = presence.begin(*chosen(shell.boot.settings.detection))
        self._folders: dict[Source, JobFolders] = {}
        self._procfs: JobProcesses | None = None
        self._procfs_again_s = PROCFS_AGAIN_S
        self._arrival_due = False  # a look at processes will follow a job's arrival
        self._only_procfs: frozenset[str] = frozenset()
        self._watched: dict[object, int] = {}
        self._published: JobsFact | None = None
        self._polling = False
        self._spool_call: slurm.Call | None = None

    # --- beginning -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Look everywhere once. The first fact waits for the slow looks, so that a restart says nothing half true."""
        now_s = time.monotonic()
        self._shell.at("first", now_s + FIRST_LOOK_WITHIN_S, self._publish)
        self._open()
        self._publish_first()
        self._shell.on_reload(self.reload)
        self._shell.on_stop(self.stop)
        self._shell.ready()

    def _open(self) -> None:
        settings, node = self._shell.boot.settings, self._shell.boot.settings.slurm_node
        sources = self._state.views
        made: dict[Source, Callable[[], JobFolders]] = {
            Source.stepd: lambda: StepdSockets(node, rundir.short_host()),
            Source.cgroup2: lambda: CgroupV2(node),
            Source.cgroup1: lambda: CgroupV1(node),
            Source.sim: lambda: SimJobs(settings.sim_dir or str(self._shell.boot.runtime / "sim")),
        }
        self._folders = {source: make() for source, make in made.items() if source in sources}
        self._procfs = JobProcesses(node) if Source.procfs in sources else None
        if sources.keys() & set(OF_SLURM):
            self._learn_config()
        self._look_at_processes()
        self._scan_all()

    def reload(self, boot: Boot, loaded: Loaded) -> None:
        """New settings: new sources, with what the old ones saw until they have looked."""
        self._close()
        self._state = presence.choose(self._state, *chosen(boot.settings.detection))
        self._open()
        self._publish_if_new()

    def stop(self, within_s: float) -> None:
        self._close()
        self._shell.finish()

    def _close(self) -> None:
        for key in list(self._watched):
            self._unwatch(key)
        for source in self._folders.values():
            source.close()
        if self._procfs is not None:
            self._procfs.close()
        if self._spool_call is not None:
            self._spool_call.kill()
            self._spool_call = None
        self._polling = self._arrival_due = False
        for name in ("scan", "poll", "procfs", "procfs-arrival", "procfs-overdue", "spool", "spool-overdue", "sim"):
            self._shell.cancel(name)

    # --- folders: inotify, the slow scan, polling ------------------------------------------------------

    def _on_events(self, source: JobFolders) -> None:
        now_s = time.monotonic()
        rescan = source.drain()
        if source.check().works:
            change = self._take(_look(source, source.jobs(), now_s), now_s)
            if change.arrived and self._published is None:
                self._publish()
        if rescan or not (source.check().works or source.absent):
            self._scan(source)
            self._arm_poll()
        self._arm_sim()

    def _scan(self, source: JobFolders) -> None:
        if source.name is Source.stepd and self._spool_call is not None and not self._state.slurm_here:
            return  # where to look is being asked
        began_s = time.monotonic()
        jobs = source.scan()
        self._watch(source, source.fileno(), lambda: self._on_events(source))
        self._take(_look(source, jobs, began_s), time.monotonic())

    def _scan_all(self) -> None:
        for source in self._folders.values():
            self._scan(source)
        self._arm_poll()
        self._arm_sim()
        self._shell.at("scan", time.monotonic() + SCAN_EVERY_S, self._scan_all)

    def _arm_poll(self) -> None:
        if not self._polling and any(source.polled for source in self._folders.values()):
            self._polling = True
            self._shell.at("poll", time.monotonic() + self._shell.boot.settings.poll_interval_s, self._poll)

    def _poll(self) -> None:
        self._polling = False
        for source in self._folders.values():
            if source.polled:
                self._scan(source)
        self._arm_poll()
        self._arm_sim()

    def _arm_sim(self) -> None:
        sim = self._folders.get(Source.sim)
        end_s = sim.next_end_s() if isinstance(sim, SimJobs) else None
        if end_s is None:
            self._shell.cancel("sim")
        else:
            self._shell.at("sim", end_s, self._end_sim_jobs)

    def _end_sim_jobs(self) -> None:
        sim = self._folders[Source.sim]
        if isinstance(sim, SimJobs):
            sim.end_due(time.monotonic())
        self._scan(sim)
        self._arm_sim()

    # --- processes -------------------------------------------------------------------------------------

    def _look_at_processes(self) -> None:
        if self._procfs is None or self._procfs in self._watched:
            return  # the look that is on its way arranges the next one
        if self._procfs.begin():
            self._watch(self._procfs, self._procfs.fileno(), self._on_processes)
            self._shell.at("procfs-overdue", self._procfs.deadline_s, self._on_processes)
        else:
            self._take_processes(None)

    def _on_processes(self) -> None:
        fd, now_s = self._procfs.fileno(), time.monotonic()
        if not self._procfs.collect(now_s):
            return
        if fd is not None:
            self._unwatch(self._procfs)
        self._shell.cancel("procfs-overdue")
        self._shell.at("procfs-reap", now_s + REAP_AFTER_S, self._procfs.reap)
        if self._procfs.again():
            self._look_at_processes()
        else:
            self._take_processes(self._procfs.jobs())

    def _take_processes(self, jobs: dict[str, presence.Gpus] | None) -> None:
        procfs, now_s = self._procfs, time.monotonic()
        why, absent = procfs.check().why, procfs.absent
        self._take(Look(source=Source.procfs, jobs=jobs, began_s=procfs.began_s, absent=absent, why=why), now_s)
        self._publish_first()
        self._shell.at("procfs", now_s + self._procfs_every_s(), self._look_at_processes)

    def _look_after_arrival(self) -> None:
        if self._procfs in self._watched:  # a look that began before
            self._shell.at("procfs-arrival", time.monotonic() + PROCFS_AGAIN_S, self._look_after_arrival)
            return
        self._arrival_due = False
        self._look_at_processes()

    def _procfs_every_s(self) -> float:
        others_work = bool(presence.seeing(self._state) - {Source.procfs})
        if others_work and self._only_procfs:
            self._procfs_again_s = min(PROCFS_EVERY_S, self._procfs_again_s * 2)
            return self._procfs_again_s
        if others_work or not (self._state.slurm_here or self._state.named):
            return PROCFS_EVERY_S
        return max(PROCFS_FASTEST_S, self._shell.boot.settings.poll_interval_s)

    # --- where slurmd's sockets are, and whether jobs have cgroups ----------------------------------------

    def _learn_config(self) -> None:
        """From slurm.conf at once; and from Slurm itself, once, for the file may not be the one that is used."""
        text = stepd.configuration(os.environ)
        if text is not None:
            self._config_is(text, stepd.configured_spool(text))
        call = slurm.start(slurm.show_config(), self._shell.boot.settings.scontrol_timeout_s)
        if isinstance(call, slurm.Call):
            self._spool_call = call
            self._watch("spool", call.fileno(), lambda: self._on_config(overdue=False))
            self._shell.at("spool-overdue", call.deadline_s, lambda: self._on_config(overdue=True))

    def _on_config(self, overdue: bool) -> None:
        answer = self._spool_call.kill() if overdue else self._spool_call.answer()
        if answer is None:
            return  # it hangs in the kernel: it stays watched
        self._spool_call = None
        self._unwatch("spool")
        self._shell.cancel("spool-overdue")
        spool = stepd.spool_setting(answer.stdout) if answer.status == 0 else None
        if spool is not None:
            self._config_is(answer.stdout, spool)
        elif not self._state.slurm_here:
            self._shell.at("spool", time.monotonic() + SPOOL_ASK_EVERY_S, self._learn_config)
        if Source.stepd in self._folders:
            self._scan(self._folders[Source.stepd])
        self._arm_poll()
        self._publish_first()
        if self._published is not None:
            self._publish_if_new()

    def _config_is(self, text: str, spool: str) -> None:
        self._state = presence.configured(self._state, cgroups.made_for_jobs(text))
        source = self._folders.get(Source.stepd)
        if isinstance(source, StepdSockets):
            source.learn([spool])

    # --- the picture and the bus -----------------------------------------------------------------------

    def _take(self, look: Look, now_s: float) -> Change:
        self._state, change = presence.take(self._state, look, now_s)
        only = presence.seen_only_by(self._state, Source.procfs)
        if only - self._only_procfs and look.source is not Source.procfs and self._procfs is not None:
            self._procfs_again_s = PROCFS_AGAIN_S
            self._shell.at("procfs", now_s + PROCFS_AGAIN_S, self._look_at_processes)
        self._only_procfs = only
        if change.arrived | change.back and look.source is not Source.procfs and self._procfs is not None and not self._arrival_due:
            self._arrival_due = True
            self._shell.at("procfs-arrival", now_s + PROCFS_AFTER_ARRIVAL_S, self._look_after_arrival)
        if self._published is not None:
            self._publish_if_new()
        self._tell(look, change)
        return change

    def _tell(self, look: Look, change: Change) -> None:
        for job in sorted(change.arrived):
            self._shell.log.info("job %s is here (%s)", job, look.source)
        for job in sorted(change.back):
            self._shell.log.info("job %s is here again (%s): another run of it, or another step", job, look.source)
        for job in sorted(change.gone):
            self._shell.log.info("job %s is gone (last seen by %s)", job, look.source)
        if change.working is not None:
            works = "works" if change.working else "does not work"
            self._shell.log.info("%s %s%s", look.source, works, f": {look.why}" if look.why else "")

    def _publish_first(self) -> None:
        if self._published is None and presence.all_looked(self._state):
            self._publish()

    def _publish_if_new(self) -> None:
        fact, old = presence.jobs_fact(self._state, time.monotonic()), self._published
        if old is None or (fact.jobs, fact.sources, fact.scanned) != (old.jobs, old.sources, old.scanned):
            self._send(fact)

    def _publish(self) -> None:
        self._send(presence.jobs_fact(self._state, time.monotonic()))

    def _send(self, fact: JobsFact) -> None:
        if self._procfs is not None:
            fact = msgspec.structs.replace(fact, cpus=self._procfs.cpus)
        self._published = fact
        self._shell.publish(fact)
        self._shell.cancel("first")
        self._shell.at("repeat", fact.at_s + repeat_every_s(self._shell.boot.settings), self._publish)

    # --- descriptors -----------------------------------------------------------------------------------

    def _watch(self, key: object, fd: int | None, callback: Callable[[], None]) -> None:
        if self._watched.get(key) == fd:
            return
        self._unwatch(key)
        if fd is not None:
            self._watched[key] = fd
            self._shell.watch(fd, callback)

    def _unwatch(self, key: object) -> None:
        fd = self._watched.pop(key, None)
        if fd is not None:
            self._shell.unwatch(fd)


def main(shell: Shell) -> None:
    """Set everything up; the caller runs the loop."""
    Detector(shell).start()
