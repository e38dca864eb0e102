"""The root: forks, reaps and restarts the workers. One loop over one table of children, so one file.

No thread, no ZeroMQ context, no network. It may import the workers' modules before it forks (shared pages, restarts
within milliseconds), but a ZeroMQ context that exists at a fork makes the child hang, and a second thread may hold any
lock: that there is one thread is asserted before every fork.
"""

import gc
import importlib
import logging
import os
import random
import selectors
import signal
import time
import traceback

import msgspec

from llmwd import __version__
from llmwd.adapters import procs
from llmwd.adapters.line import Line, line_pair
from llmwd.adapters.rundir import Lock, missing_files, retain_fact
from llmwd.config import Settings
from llmwd.core import lifecycle, restart
from llmwd.core.complaint import Complaint
from llmwd.core.lifecycle import Effect, Event, Life
from llmwd.messages import Beat, Envelope, Ready, Reload, RootFact, Stop, WorkerState
from llmwd.spec import ChildSpec
from llmwd.vocab import Phase
from llmwd.workers.base import Boot, hung_after_s, run_worker

# What stays after the workers (holders with their trees) gets this long, then it is killed; asked to end at once, none.
ORPHANS_WITHIN_S = 10.0
KILLED_WITHIN_S = 10.0  # only a process that hangs in a driver outlives SIGKILL by this long
FORK_AGAIN_S = 1.0  # where the kernel has no process, descriptor or memory for a worker
SHOWN_EVERY_S = 5.0  # repeated although nothing is new, so that a root which hangs is seen to
CRASH_EXIT = 70  # EX_SOFTWARE: a worker ended by an exception, its traceback is in its log


class Child:
    """One worker as the root sees it."""

    def __init__(self, spec: ChildSpec):
        self.spec = spec
        self.life = Life(spec.name)
        self.failures = restart.Failures()
        self.pid: int | None = None
        self.pidfd: int | None = None
        self.line: Line | None = None
        self.heard_s = 0.0
        self.spawned = 0
        self.since_at = time.time()
        self.stop_by_s: float | None = None
        self.retry_s: float | None = None
        self.detail = ""


class Root:
    """The supervision loop. `boot` is what the next worker is born with."""

    def __init__(self, boot: Boot, children: tuple[ChildSpec, ...], lock: Lock, log: logging.Logger, reload):
        self.boot = boot
        self._mains = {spec.name: importlib.import_module(spec.module).main for spec in children}
        self.children = [Child(spec) for spec in children]
        self._lock = lock
        self._log = log
        self._reload = reload  # () -> Settings | None: reads the configuration again
        self._started_at = time.time()
        self._start = procs.start_ticks(os.getpid())
        self._selector = selectors.DefaultSelector()
        self._root_reader, self._root_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.boot = msgspec.structs.replace(boot, root_fd=self._root_reader)
        self._wake_reader, self._wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._signals: list[int] = []
        self._stopping = False
        self._at_once = False
        self.homeless = False  # the runtime folder was deleted under us: end, and begin again in a new one
        self._seq = 0
        self._shown: object = None
        self._shown_s = 0.0
        self._unretained = Complaint()

    # --- the loop -------------------------------------------------------------------------------------

    def run(self) -> None:
        """Supervise until a signal asks for the end and everything of ours is gone."""
        procs.set_subreaper()  # orphaned holders come to us, so that we see the last of them go
        self._selector.register(self._wake_reader, selectors.EVENT_READ, self._on_wake)
        signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD):
            signal.signal(number, lambda number, frame: self._signals.append(number))
        gc.collect()
        gc.freeze()  # what exists now stays shared with the children
        while True:
            self._reconcile(time.monotonic())
            self._show()
            if self._stopping and not any(child.pid for child in self.children):
                break
            for key, _ in self._selector.select(self._wait_s()):
                # Two workers that die together: what the first event does may have closed the second one's line.
                if self._selector.get_map().get(key.fd) is key:
                    key.data()
            # Only now: a root that slept too long must read what the workers sent before it judges them.
            self._check_deadlines(time.monotonic())
        self._wait_for_orphans()

    def _wait_s(self) -> float:
        deadlines = [child.retry_s for child in self.children if child.retry_s is not None]
        deadlines += [child.stop_by_s for child in self.children if child.stop_by_s is not None]
        deadlines += [
            child.heard_s + hung_after_s(self.boot.settings)
            for child in self.children
            if child.life.phase in (Phase.starting, Phase.ready)
        ]
        return max(0.0, min(deadlines, default=time.monotonic() + 60) - time.monotonic())

    def _reconcile(self, now_s: float) -> None:
        """Compare what is wanted with what is, for every child; while stopping, one after the other in reverse."""
        if not self._stopping:
            for child in self.children:
                self._apply(child, *lifecycle.wish(child.life, True, now_s))
            return
        for child in reversed(self.children):
            self._apply(child, *lifecycle.wish(child.life, False, now_s))
            if child.pid is not None and not self._at_once:
                return

    def _check_deadlines(self, now_s: float) -> None:
        for child in self.children:
            if child.retry_s is not None and now_s >= child.retry_s:
                child.retry_s = None
                self._apply(child, *lifecycle.step(child.life, Event.retry, now_s))
            if child.stop_by_s is not None and now_s >= child.stop_by_s:
                child.stop_by_s = None
                self._log.warning("%s did not end in time: killing it", child.spec.name)
                self._apply(child, *lifecycle.step(child.life, Event.kill, now_s))
            silent_s = now_s - child.heard_s
            if child.life.phase in (Phase.starting, Phase.ready) and silent_s >= hung_after_s(self.boot.settings):
                self._log.error("%s hangs: no heartbeat for %.1f s, killing it", child.spec.name, silent_s)
                child.detail = f"hung: no heartbeat for {silent_s:.1f} s"
                self._apply(child, *lifecycle.step(child.life, Event.kill, now_s))

    # --- effects --------------------------------------------------------------------------------------

    def _apply(self, child: Child, life: Life, effects: tuple[Effect, ...]) -> None:
        if life.phase is not child.life.phase:
            child.since_at = time.time()
        child.life = life
        for effect in effects:
            match effect:
                case Effect.spawn:
                    self._spawn(child)
                case Effect.terminate:
                    child.line.send(Stop(within_s=child.spec.stop_within_s))
                    child.stop_by_s = time.monotonic() + child.spec.stop_within_s
                case Effect.kill:
                    if child.pidfd is not None:
                        signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
                case Effect.alarm:
                    self._log.critical(
                        "%s failed %d times within %g s: in quarantine until `llmwd-ctl reset` (%s)",
                        child.spec.name, len(child.failures.at_s), self.boot.settings.restart_period_s, child.detail,
                    )
                case Effect.arm_backoff:
                    pass  # the delay was set where the failure was judged

    def _spawn(self, child: Child) -> None:
        try:
            child.pid, child.pidfd, child.line = self._fork(child)
        except OSError as error:  # the machine's failure, for now, and none of the worker's: it does not count
            child.detail = f"it cannot be forked: {error.strerror}"
            self._log.error("%s: %s", child.spec.name, child.detail)
            self._apply(child, *lifecycle.step(child.life, Event.gone, time.monotonic()))
            child.retry_s = time.monotonic() + FORK_AGAIN_S
            return
        child.heard_s = time.monotonic()
        child.spawned += 1
        child.stop_by_s = None
        self._selector.register(child.line, selectors.EVENT_READ, lambda: self._on_line(child))

    def _fork(self, child: Child) -> tuple[int, int, Line]:
        """Its pid, its pidfd, our end of its line. Raises OSError; then there is no process."""
        # Counted by the kernel: the threads of a ZeroMQ context are not Python's.
        assert len(os.listdir("/proc/self/task")) == 1, "the root has a second thread: a fork could copy a held lock"
        ours, theirs = line_pair()
        try:
            pid = os.fork()
            if pid == 0:
                ours.close()  # or this worker would never see the line end
                self._be_child(child, theirs)
            theirs.close()  # which leaves a descriptor for the pidfd
            return pid, os.pidfd_open(pid), ours
        except OSError:  # should there be a process all the same, it ends by the end of its line
            ours.close()
            theirs.close()
            raise

    def _be_child(self, child: Child, line: Line) -> None:
        """In the forked process: shed what is the root's, then live as the worker. Never returns."""
        status = CRASH_EXIT
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            self._selector.close()
            self._lock.close_in_child()
            for fd in (self._root_writer, self._wake_reader, self._wake_writer):
                os.close(fd)
            for other in self.children:
                if other.line is not None:
                    other.line.close()
                if other.pidfd is not None:
                    os.close(other.pidfd)
            boot = msgspec.structs.replace(self.boot, name=child.spec.name.value)
            run_worker(boot, line, self._mains[child.spec.name])
            status = 0
        except BaseException:  # the fork's outermost frame: nothing may run the root's code below it
            logging.getLogger("llmwd").critical("%s crashed:\n%s", child.spec.name, traceback.format_exc())
        finally:
            # Not sys.exit: the root's exit handlers and the ZeroMQ context's destructor are not this process's.
            os._exit(status)

    # --- what happens ---------------------------------------------------------------------------------

    def _on_line(self, child: Child) -> None:
        if child.line is None:
            return  # reaped earlier in this round
        now_s = time.monotonic()
        for message in child.line.receive():
            child.heard_s = now_s
            match message:
                case Ready():
                    child.detail = ""
                    self._apply(child, *lifecycle.step(child.life, Event.proved, now_s))
                case Beat():
                    pass
        if child.line.closed:
            self._selector.unregister(child.line)

    def _on_wake(self) -> None:
        while _read_some(self._wake_reader):
            pass
        while self._signals:
            match self._signals.pop(0):
                case signal.SIGCHLD:
                    self._reap()
                case signal.SIGTERM | signal.SIGINT:
                    self.homeless = False
                    self._stop()
                case signal.SIGHUP:
                    self._on_hangup()
                case signal.SIGUSR1:
                    self._reset()

    def _stop(self) -> None:
        now_s = time.monotonic()
        if self._stopping and not self._at_once:
            self._log.warning("asked to end for the second time: ending at once")
            self._at_once = True
            os.close(self._root_writer)  # the holders end their trees on this
            for child in self.children:
                self._apply(child, *lifecycle.step(child.life, Event.kill, now_s))
        elif not self._stopping:
            self._log.info("ending in order")
            self._stopping = True
            for child in self.children:
                child.retry_s = None

    def _on_hangup(self) -> None:
        try:
            settings: Settings | None = self._reload()
        except OSError as error:  # no descriptor or process for it: the old ones stay
            self._log.error("the settings cannot be read: %s", error.strerror)
            settings = None
        if settings is not None:
            self.boot = msgspec.structs.replace(self.boot, settings=settings)
        for child in self.children:
            if child.line is not None:
                child.line.send(Reload())

    def _reset(self) -> None:
        for child in self.children:
            if child.life.phase is Phase.failed:
                self._log.info("%s leaves quarantine: reset by the operator", child.spec.name)
                child.failures = restart.Failures()
                self._apply(child, *lifecycle.step(child.life, Event.reset, time.monotonic()))

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for child in self.children:
                if child.pid == pid:
                    self._gone(child, os.waitstatus_to_exitcode(status))

    def _gone(self, child: Child, code: int) -> None:
        now_s = time.monotonic()
        if not child.line.closed:
            self._selector.unregister(child.line)
        child.line.close()
        os.close(child.pidfd)
        asked = child.life.phase is Phase.draining or self._stopping
        child.pid = child.pidfd = child.line = child.stop_by_s = None
        if asked or child.life.phase is Phase.failed:
            self._apply(child, *lifecycle.step(child.life, Event.gone, now_s))
            return
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        if child.life.phase is not Phase.stopping:
            child.detail = how
        policy = restart_policy(self.boot.settings)
        child.failures, delay_s = restart.after_failure(child.failures, policy, now_s, random.random())
        self._log.error("%s ended by itself (%s)", child.spec.name, child.detail)
        if delay_s is None:
            self._apply(child, *lifecycle.step(child.life, Event.give_up, now_s))
            return
        if child.life.phase is Phase.stopping:
            # We killed it because it hung: that is a failure like any other, so it goes through backoff, too.
            child.life = msgspec.structs.replace(child.life, phase=Phase.ready)
        self._apply(child, *lifecycle.step(child.life, Event.gone, now_s))
        child.retry_s = now_s + delay_s

    def _wait_for_orphans(self) -> None:
        """Holders whose manager is gone belong to us now: they end their trees because the root's pipe closes."""
        if not self._at_once:
            os.close(self._root_writer)
        kill_s = time.monotonic() + (0.0 if self._at_once else ORPHANS_WITHIN_S)
        while (now_s := time.monotonic()) < kill_s + KILLED_WITHIN_S:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid != 0:
                continue
            if signal.SIGTERM in self._signals or signal.SIGINT in self._signals or now_s >= kill_s:
                kill_s = min(kill_s, now_s)
                # Orphans of a killed holder become our children, so that the next turn finds them.
                for pid, found in procs.walk(os.getpid()):
                    procs.signal_process(pid, found.start, signal.SIGKILL)
            self._selector.select(0.05)
            while _read_some(self._wake_reader):
                pass
        self._log.error("processes of ours outlive SIGKILL: %s", procs.descendants(os.getpid()))

    # --- what is shown --------------------------------------------------------------------------------

    def _show(self) -> None:
        """Keep the retained fact about ourselves up to date."""
        workers = tuple(
            WorkerState(
                name=child.spec.name, pid=child.pid, phase=child.life.phase, restarts=max(0, child.spawned - 1),
                since_at=child.since_at, detail=child.detail,
            )
            for child in self.children
        )
        now_s = time.monotonic()
        if (workers, self._stopping) == self._shown and now_s < self._shown_s + SHOWN_EVERY_S:
            return
        self._shown, self._shown_s = (workers, self._stopping), now_s
        self._look_for_home()
        self._seq += 1
        fact = RootFact(
            pid=os.getpid(), start=self._start, stopping=self._stopping, workers=workers,
            started_at=self._started_at, node=self.boot.node, home=str(self.boot.home), version=__version__,
            at_s=now_s,
        )
        envelope = Envelope(sender="root", pid=os.getpid(), epoch=1, seq=self._seq, fact=fact)
        try:
            retain_fact(self.boot.runtime, "root", msgspec.msgpack.encode(envelope))
        except OSError as error:
            if self._unretained.is_due(str(error.strerror), now_s):
                self._log.error("%s cannot be written: %s", self.boot.runtime, error.strerror)

    def _look_for_home(self) -> None:
        """Without its sockets nobody can order anything or find the holder again: no state to go on in."""
        ready = [child.spec.name for child in self.children if child.life.phase is Phase.ready]
        missing = missing_files(self.boot.runtime, ready)
        if not self._stopping and (missing or self._lock.lost()):
            self._log.critical(
                "%s was deleted under us (%s is missing): ending in order, to begin again in a new one",
                self.boot.runtime, missing or self._lock.path.name,
            )
            self.homeless = True
            self._stop()


def restart_policy(settings: Settings) -> restart.Policy:
    """A first death is followed by a new incarnation at once, the next ones are spread."""
    return restart.Policy(
        intensity=settings.restart_intensity, period_s=settings.restart_period_s, first_s=0.0,
        backoff_min_s=settings.backoff_min_s / 4, backoff_max_s=settings.backoff_max_s,
    )


def _read_some(fd: int) -> bytes:
    try:
        return os.read(fd, 4096)
    except BlockingIOError:
        return b""
