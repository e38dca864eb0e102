"""The holder: starts one service, keeps its whole tree, and ends it. One file: it must work when all else fails.

    python -I -S holder.py ROOT_FD SERVICE < HolderSpec as JSON        (ROOT_FD: a number, or "-" for none)

(`llmwd.adapters.holding` imports it instead, which takes its compiled form from the cache: 10 ms less.)

It stands between a manager and its service so that the manager may die and come back while a model that
took minutes to load goes on serving, and so that nothing is left when nobody comes back. The tree ends

* on the order (`Release` on the socket), within the order's grace;
* when `expires_s` passes without a `Renew`, when the pipe ROOT_FD closes (the root is dead), when the
  service's first process ends by itself, on SIGTERM to the holder: within the grace of the spec.

`releasing` then says why: the order's reason, or lease_expired, root_gone, server_exited, holder_terminated.
Ending is the same in all cases: SIGTERM to every process of the tree, and to those forked meanwhile;
SIGKILL, until nobody is left, to what outlives the grace. The holder is the tree's subreaper, so orphans
become its children, and "nothing is left" is what the kernel says: no child to wait for. Should the holder itself be
killed, or hang, its guard (adapters/guard.py) kills what is left; should the guard be killed, there is soon another.

Messages are those of `llmwd.messages` from HolderSpec on, as JSON. Only the standard library, one loop, a
few megabytes: this is what must still work when everything else does not.
"""

import atexit
import contextlib
import json
import math
import os
import signal
import sys
import time

if __name__ == "__main__":  # run by path under -I -S: the package is found from here, after the standard library
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from llmwd.adapters import courtesy, procs
from llmwd.adapters.guard import Guard
from llmwd.adapters.holdersocket import HolderSocket, Loop
from llmwd.adapters.modelholders import ModelHolders
from llmwd.adapters.outlog import OutLog
from llmwd.adapters.starting import Service

REWALK_FIRST_S = 0.002  # how soon the tree is walked again after signals were sent,
REWALK_LAST_S = 0.5  # growing up to this
TIDY_WITHIN_S = 1.0
SURVIVOR_AFTER_S = 30.0  # a process that outlives SIGKILL by this long hangs in a driver: say so
FIRST_WORD_WITHIN_S = 2.0  # an end before the first connection waits this long for one
LAST_WORD_WITHIN_S = 1.0  # the last state counts as read if a reader closes in order within this time
SETTLE_WITHIN_S = 1.0  # on a busy machine, or a slow disk, its last words take their time
LOG_WITHIN_S = 1.0  # how long the log may take to be written after the end
RENEW_MOST_S = 300.0  # the longest LEASE_TTL; who asks for more has it wrong, and must not switch the dead man's switch off
SPARE = 4  # descriptors kept for the end, which needs some, and must not fail because there are none
SIGN_EVERY_S = 0.3  # how often it says, after SIGKILL, that it only waits for the kernel


class Holder:
    """One service, its tree, the manager's connections, and the loop around them."""

    def __init__(self, spec: dict, root_fd: int | None, guard: Guard) -> None:
        self.spec, self.root_fd, self.guard = spec, root_fd, guard
        self.grace_s = float(spec["grace_s"])
        self.ttl_s = float(spec.get("ttl_s", RENEW_MOST_S))
        self.service: Service | None = None
        self.starting = False  # forked, and not yet heard whether exec worked
        self.living: dict[int, int] = {}  # pid -> start, at the last walk
        self.sent: dict[tuple[int, int], int] = {}  # (pid, start) -> last signal
        self.hurried: list[int] = []  # those of the tree that stand back no longer
        self.spare = [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in range(SPARE)]
        self.kill_at = self.rewalk_at = self.end_at = math.inf
        self.rewalk_s = REWALK_FIRST_S
        self.survivors_told = False
        self.signed_s = -math.inf
        self.state = {
            "type": "state", "service": spec["service"], "pid": os.getpid(), "start": procs.start_ticks(os.getpid()),
            "marker": spec["marker"], "server_pid": None, "status": None, "error": "", "pids": [],
            "started_s": time.monotonic(), "expires_s": float(spec["expires_s"]), "note": spec["note"],
            "releasing": None, "signalled_s": None, "killed_s": None, "model_gone_s": None, "gone_s": None,
        }  # fmt: skip
        self.loop = Loop()
        self.model = ModelHolders(self.loop)
        self.log = OutLog(spec["log"], spec["log_max_bytes"], spec["log_keep"])
        self.socket = HolderSocket(spec["socket"], self.loop, self._packet, self._refresh, self._obey, spec.get("kin"))
        self.loop.watch(guard.fileno(), self._guard_died)

    # --- the loop

    def run(self) -> None:
        """Start the service, and return when nothing of its tree is left and that has been told."""
        self._take_signals()
        self._start()
        self._tell_guard()
        self.log.start()  # a thread: after the fork
        atexit.register(self.log.close, LOG_WITHIN_S)  # after the traceback, should there be one
        if self.root_fd is not None:
            self.loop.watch(self.root_fd, self._root_spoke)
        try:
            while not self._told():
                due = min(self._deadlines())
                self.loop.turn(None if due == math.inf else due - time.monotonic())
                self._step(time.monotonic())
        finally:
            if self.state["gone_s"] is None:  # a fault of our own must not leave anything on a GPU
                self.state["killed_s"] = time.monotonic()
                with contextlib.suppress(OSError):  # the service has a death signal, the rest is the guard's
                    self._signal_tree()

    def _deadlines(self) -> tuple[float, ...]:
        if self.state["gone_s"] is not None:
            return (self.end_at,)
        if self.state["releasing"] is None:
            return (self.state["expires_s"],)
        return (self.kill_at if self.state["killed_s"] is None else math.inf, self.rewalk_at)

    def _step(self, now: float) -> None:
        state = self.state
        if state["gone_s"] is not None:
            return
        if state["releasing"] is None:
            if now >= state["expires_s"]:
                self._release("lease_expired", self.grace_s)
        elif state["killed_s"] is None and now >= self.kill_at:
            self._kill(now)
        elif now >= self.rewalk_at:
            self._signal_tree()
            self._hurry()
            if state["killed_s"] and now - self.signed_s > SIGN_EVERY_S:
                self.signed_s = now
                self.socket.publish()
            if state["killed_s"] and now - state["killed_s"] > SURVIVOR_AFTER_S and not self.survivors_told:
                self.survivors_told = True
                self.log.say(f"still there {SURVIVOR_AFTER_S:g} s after SIGKILL (in a driver?): {list(self.living)}")
        self._look_at_model()
        self._tell_guard()

    def _tell_guard(self) -> None:
        """By when the next of our words comes, or all is over."""
        state = self.state
        if state["gone_s"] is not None:
            by_s = math.inf
        elif state["killed_s"] is not None:
            by_s = min(self.rewalk_at, time.monotonic() + REWALK_LAST_S)  # and so on, until the kernel lets the last one go
        else:
            by_s = self.kill_at if state["releasing"] is not None else state["expires_s"] + self.grace_s
        self.guard.tell(by_s, self.living)

    def _guard_died(self) -> None:
        self.loop.unwatch(self.guard.fileno())
        self.guard.died()
        self._have_guard()

    def _have_guard(self) -> None:
        if self.guard.fileno() >= 0:
            return
        try:
            self.guard.stand()
        except OSError as problem:
            self.log.say(f"there is no guard, it cannot be forked: {problem.strerror}")
            return
        self.loop.watch(self.guard.fileno(), self._guard_died)
        self.log.say("the guard was killed: there is another")

    # --- start, signals, root

    def _start(self) -> None:
        argv = self.spec["argv"]
        if self.state["expires_s"] <= time.monotonic():
            self.state["error"] = f"{argv[0]} was not started: the lease had already ended"
            self._reap()
            return
        # setproctitle, which vLLM uses, overwrites the marker in /proc/PID/environ without SPT_NOENV.
        env = self.spec["env"] | {procs.MARKER: self.spec["marker"], "SPT_NOENV": "1"}
        self.service = Service(argv, env, self.spec["cwd"], self.log.service_end, self.spec.get("courtesy"), self.spec.get("umask"))
        self.state["server_pid"] = self.service.pid
        self.starting = True
        self.loop.watch(self.service.report, self._start_spoke)

    def _start_spoke(self) -> None:
        failure = self.service.failure()
        if failure is None:
            return
        self.starting = False
        self.loop.unwatch(self.service.report)
        os.close(self.service.report)
        self.state["started_s"] = time.monotonic()
        if failure:
            self.state["error"], self.state["server_pid"] = failure, None
            self.log.say(failure)
        self._publish()

    def _take_signals(self) -> None:
        wake, end = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(end, False)
        signal.set_wakeup_fd(end, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        self.loop.watch(wake, lambda: self._signals(os.read(wake, 65536)))

    def _signals(self, numbers: bytes) -> None:
        if signal.SIGTERM in numbers or signal.SIGINT in numbers:
            self._release("holder_terminated", self.grace_s)
        self._reap()

    def _root_spoke(self) -> None:
        try:
            if os.read(self.root_fd, 4096):
                return
        except OSError:  # it cannot be read: then nobody guards us, which is the same
            pass
        self.loop.unwatch(self.root_fd)
        self._release("root_gone", self.grace_s)

    def _reap(self) -> None:
        """Take the exit status of every dead child; without any child left the tree is gone."""
        if self.state["gone_s"] is not None:
            return
        if self.starting:
            self._start_spoke()
        ended = main_ended = False
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self._gone()
                return
            if pid == 0:
                break
            ended = True
            if pid == self.service.pid:
                main_ended = True
                self.state["status"] = None if self.state["error"] else os.waitstatus_to_exitcode(status)
        if main_ended or (ended and self.state["releasing"] is None):
            self._publish()
        if ended and self.state["releasing"] is not None:  # it may have left children that nobody has met yet
            self.rewalk_s = REWALK_FIRST_S
            self.rewalk_at = min(self.rewalk_at, time.monotonic() + self.rewalk_s)
        if main_ended:  # an engine without its server would stay on the GPUs for ever
            self._release("server_exited", self.grace_s)

    # --- the end of the tree

    def _release(self, reason: str, grace_s: float) -> None:
        """End the tree. A later call can only shorten the grace."""
        if self.state["gone_s"] is not None:
            return
        now = time.monotonic()
        self.kill_at = min(self.kill_at, now + grace_s)
        if self.state["releasing"] is None:
            self.state["releasing"] = reason
            if self.kill_at <= now:
                self.state["killed_s"] = now
            self._tell_guard()
            self._signal_tree()
            if not self.model and self.state["server_pid"]:
                self.model.take(self.state["server_pid"], self.state["server_pid"])
            self.state["signalled_s"] = time.monotonic()
            self._hurry()
            self.socket.publish()
            self.log.say(f"{reason}: {len(self.sent)} processes signalled, {len(self.living)} were alive after it")
        elif self.kill_at <= now and self.state["killed_s"] is None:
            self._kill(now)

    def _kill(self, now: float) -> None:
        self.state["killed_s"] = now
        self.rewalk_s = REWALK_FIRST_S
        self._signal_tree()
        self._hurry()
        self.socket.publish()
        self.log.say(f"SIGKILL to {len(self.living)} processes that had outlived the grace")

    def _signal_tree(self) -> None:
        """Signal all that has not had this signal yet, until a walk meets nobody new (or for a few walks)."""
        for _ in range(5):
            try:
                fresh = self._signal_new()
            except OSError:  # no descriptor is free: nothing that could be told of the tree now would be true
                if not self.spare:
                    raise
                while self.spare:
                    os.close(self.spare.pop())
                self.model.free_descriptors()
                fresh = self._signal_new()
            if not fresh:
                break
        self.rewalk_at = time.monotonic() + self.rewalk_s
        self.rewalk_s = min(self.rewalk_s * 1.6, REWALK_LAST_S)

    def _signal_new(self) -> bool:
        sig = signal.SIGTERM if self.state["killed_s"] is None else signal.SIGKILL
        fresh, living = False, {}
        for pid, found in procs.walk(os.getpid()):
            if found.dead:
                continue
            living[pid] = found.start
            if sig == signal.SIGKILL and self._tidies(pid, found.start):
                continue
            if self.sent.get((pid, found.start)) != sig:
                fresh |= self._signal(pid, found.start, sig)
                self.sent[pid, found.start] = sig
        self.living = living
        return fresh

    def _hurry(self) -> None:
        """Again after each walk, until it is so: some may have been met late, and the kernel may have refused."""
        living = list(self.living)
        if self.spec.get("courtesy") and self.hurried != living and courtesy.hurry(living):
            self.hurried = living

    def _tidies(self, pid: int, start: int) -> bool:
        return time.monotonic() - self.state["killed_s"] < TIDY_WITHIN_S and (pid, start) in self.model.tidies

    def _signal(self, pid: int, start: int, sig: int) -> bool:
        main = self.state["server_pid"]
        if self.state["model_gone_s"] is None:
            # The server's children before it can end them: it would seem to be alone.
            for each in procs.children(pid) if pid == main else (pid,):
                self.model.take(each, main)
        return procs.signal_process(pid, start, sig)

    def _look_at_model(self) -> None:
        if self.state["signalled_s"] is None or self.state["model_gone_s"] is not None:
            return
        if self.model.gone():
            self.state["model_gone_s"] = time.monotonic()
            self.socket.publish()

    def _gone(self) -> None:
        now = time.monotonic()
        self.state["gone_s"] = now
        if self.service and self.state["model_gone_s"] is None:
            self.state["model_gone_s"] = now
        self.living = {}
        self.end_at = now + (LAST_WORD_WITHIN_S if self.socket.met else FIRST_WORD_WITHIN_S)
        self.socket.final = True
        if self.socket.met:
            self.socket.stop_listening()
        self.log.say(f"nothing is left of {self.spec['service']}, exit status {self.state['status']}")
        if self.state["releasing"] == "server_exited":
            self.log.settle(SETTLE_WITHIN_S)  # its last words say why; nobody waits for these GPUs
        self.socket.publish()

    # --- what is told and heard

    def _packet(self) -> bytes:
        self.state["pids"] = list(self.living)
        return json.dumps(self.state).encode()

    def _refresh(self) -> None:
        """Walk the tree anew, while nothing is in a hurry."""
        if self.state["releasing"] is None and self.state["gone_s"] is None:
            self.living = {pid: found.start for pid, found in procs.walk(os.getpid()) if not found.dead}
            self.model.learn(self.living)
            self._tell_guard()  # first: who is told of these processes may rely on their end, whatever happens to us

    def _publish(self) -> None:
        self._refresh()
        self.socket.publish()

    def _obey(self, packet: bytes, newest: bool) -> None:
        try:
            order = json.loads(packet)
            kind = order["type"]
            if kind == "release":  # from anybody: a manager may have died right after it
                self._release(str(order["reason"]), max(0.0, _seconds(order["grace_s"])))
            elif not newest:
                self.log.say(f"{kind!r} on an older connection was ignored")
            elif kind == "renew":
                if order.get("ttl_s") is not None:  # it may have been set anew
                    self.ttl_s = min(RENEW_MOST_S, _seconds(order["ttl_s"]))
                self.state["expires_s"] = min(_seconds(order["expires_s"]), time.monotonic() + self.ttl_s)
                self._have_guard()
                self._publish()  # the manager learns by it that we do not hang
            elif kind == "note":
                self.state["note"] = dict(order["note"].items())
                self._publish()
            else:
                raise ValueError(f"there is no order {kind!r}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
            self.log.say(f"a packet was ignored: {type(problem).__name__}: {str(problem)[:200]}")

    def _told(self) -> bool:
        """Whether the tree is gone and its end has been read, or left in `<socket>.last` for who comes later."""
        if self.state["gone_s"] is None:
            return False
        socket = self.socket
        if not socket.final_read:
            if time.monotonic() < self.end_at and (socket.clients or not socket.met):
                return False
            new = f"{socket.path}.new"
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.write(fd, self._packet())
            os.close(fd)
            os.rename(new, f"{socket.path}.last")
        socket.stop_listening()
        return True


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a number of seconds")
    return float(value)


def _title(text: str, site: str | None) -> None:
    if not site:
        return
    sys.path.append(f"{site}/setproctitle")  # its C part alone: the package imports logging, 1 MB and 10 ms
    try:
        from _setproctitle import setproctitle
    except ImportError:
        return
    setproctitle(text)


def main(root: str) -> None:
    """Read the spec from standard input, hold the service, end with it."""
    spec = json.load(sys.stdin.buffer)
    root_fd = None if root == "-" else int(root)
    if root_fd is not None:
        os.set_inheritable(root_fd, False)
    if os.getsid(0) != os.getpid():
        os.setsid()
    guard = Guard(spec["marker"], lambda: _title(f"guard of {spec['service']}", spec.get("site")))
    guard.stand()
    _title(f"llmwd: holder {spec['service']}", spec.get("site"))
    holder = Holder(spec, root_fd, guard)
    holder.run()
    guard.dismiss()


if __name__ == "__main__":
    main(sys.argv[1])
