"""A service: an external program that a worker runs through a holder. One file, so that vLLM, Caddy and cloudflared share it.

The holder keeps the program's tree; this is the worker's end of it: start, adopt after a restart of the worker, renew
the dead-man's switch, release, and clear up when the holder itself has died. What the phase is, and whether a death
is followed by a restart, is decided in core/lifecycle.py and core/restart.py.
"""

import contextlib
import errno
import math
import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from llmwd.adapters import holding, procs
from llmwd.adapters.holding import Tree
from llmwd.adapters.sweeping import Sweep
from llmwd.core import lifecycle, restart
from llmwd.core.hearing import Hearing
from llmwd.core.lifecycle import ALIVE, Event, Life
from llmwd.messages import Courtesy, HolderSpec, HolderState, Note, Release, Renew
from llmwd.vocab import Phase
from llmwd.workers.base import Shell, hung_after_s

CONNECT_EVERY_S = 0.005
CONNECT_WITHIN_S = 10.0
ADOPT_WITHIN_S = 1.0
SWEEP_EVERY_S = 0.01
LOST_MARKER = "unknown"  # nothing carries it: what a holder without a file has is found by descent, the rest by its guard


class Service:
    """One program and its tree.

    on_change(): something about it is new. on_gone(state, asked): nothing of the tree is left; state is the holder's
    last word (None: the holder was killed), asked says whether we wanted the end. retry_after_s(state): asked first at an
    end that we did not want: the wait until the next start if it is nobody's failure here, and so never too many; None
    if it counts.
    """

    def __init__(
        self, shell: Shell, name: str, log_name: str, policy: restart.Policy,
        on_change: Callable[[], None], on_gone: Callable[[HolderState | None, bool], None],
        retry_after_s: Callable[[HolderState | None], float | None] | None = None,
    ):
        self._shell = shell
        self.name = name
        self.policy = policy
        self.life = Life(name)
        self.failures = restart.Failures()
        self.state: HolderState | None = None
        self.deaths = 0
        self._log_path = shell.boot.logs / f"{log_name}.log"
        self._socket = str(shell.boot.runtime / f"holder-{name}.sock")
        self._tree_path = shell.boot.runtime / f"tree-{name}.json"
        self._on_change = on_change
        self._on_gone = on_gone
        self._retry_after_s = retry_after_s
        self._link: holding.HolderLink | None = None
        self._process: holding.HolderProcess | None = None
        self._connect_by_s = 0.0
        self._marker: str | None = None
        self._holder: tuple[int, int] | None = None
        self._pending_release: Release | None = None
        self.failed_why: str | None = None
        self._sweeping: Sweep | None = None
        self._renewed_s = 0.0  # the expiry that was sent last
        self._hearing = Hearing()

    # --- what a worker asks -------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """A tree of ours may exist."""
        return self._marker is not None

    @property
    def running(self) -> bool:
        """It was started, or taken over, and nothing has begun to end it. (What is only left to be cleared up does not run.)"""
        return self.alive and self.life.phase in (Phase.starting, Phase.ready)

    @property
    def releasing(self) -> bool:
        return self.life.phase in (Phase.draining, Phase.stopping)

    def adopt(self) -> HolderState | None:
        """Find the tree of our last incarnation: its state if it lives; else clear up what it left."""
        tree = holding.read_tree(self._tree_path)
        self._holder = (tree.pid, tree.start) if tree.pid else holding.find(self.name)
        self._marker = tree.marker or (self._holder and LOST_MARKER)
        if self._marker is None:
            return None
        link = holding.connect(self._socket, 0.0)
        if link is None:
            holding.last_words(self._socket)
            self._sweep()
            return None
        states = link.first_states(ADOPT_WITHIN_S)
        self._attach(link)
        for state in states:
            self.state = state
            self._marker, self._holder = state.marker, (state.pid, state.start)
        if self.state is not None and self.state.gone_s is not None:
            self._heard(self.state)
        return self.state if self.alive else None

    def adopted(self, ready: bool) -> None:
        """The tree that was found is the one we want: take it as starting, or as ready."""
        self._step(Event.start)
        if ready:
            self._step(Event.proved)

    def start(
        self, argv: Sequence[str], env: Mapping[str, str], expires_s: float, grace_s: float, root_fd: int,
        note: dict[str, str | int | float | None], courtesy: Courtesy | None = None,
    ) -> None:
        """Start the program; what comes of it arrives at on_change and on_gone."""
        marker = os.urandom(16).hex()
        spec = HolderSpec(
            service=self.name, argv=tuple(argv), env=dict(env), cwd=os.environ.get("HOME") or "/", socket=self._socket,
            log=str(self._log_path), log_max_bytes=self._shell.boot.settings.log_max_mb << 20,
            log_keep=self._shell.boot.settings.log_keep, expires_s=expires_s, grace_s=grace_s, marker=marker, note=note,
            courtesy=courtesy, umask=self._shell.boot.umask, site=holding.site_folder(),
            ttl_s=self._shell.boot.settings.lease_ttl_s, kin=os.getppid(),
        )
        self.state, self.failed_why, self._pending_release = None, None, None
        try:
            holding.keep_tree(self._tree_path, Tree(marker))
            process = holding.launch(spec, root_fd)
        except OSError as error:
            if error.errno == errno.EMFILE:  # only another incarnation of ours has file descriptors again
                raise
            self.cannot_start(f"its holder cannot be started: {error}")
            return
        self._holder = process.pid, procs.start_ticks(process.pid) or 0
        with contextlib.suppress(OSError):  # the marker, which matters most, is on disk already
            holding.keep_tree(self._tree_path, Tree(marker, *self._holder))
        self._step(Event.start)
        self._marker, self._process = marker, process
        self._connect_by_s = time.monotonic() + CONNECT_WITHIN_S
        # Bound to this process: the holder before it may not have been reaped yet.
        self._shell.watch(process, lambda: self._holder_ended(process))
        self._connect()

    def cannot_start(self, why: str) -> None:
        """Something is in the way of a start: counts as a death, so that it is tried again after a backoff."""
        self._step(Event.start)
        self.failed_why = why
        self._gone(None)

    def renew(self, expires_s: float) -> None:
        if self._link is None or self.releasing or expires_s == self._renewed_s:
            return
        if self._link.send(Renew(expires_s=expires_s, ttl_s=self._shell.boot.settings.lease_ttl_s)):
            self._renewed_s = expires_s
        self._watch_holder(self._hearing.renewed(time.monotonic()))

    def remember(self, note: dict[str, str | int | float | None]) -> None:
        """Have the holder keep this for our next incarnation."""
        if self._link is not None:
            self._link.send(Note(note=note))

    def proved(self) -> None:
        self._step(Event.proved)
        self._on_change()

    def terminate_again(self) -> None:
        """SIGTERM to the first process of a tree that is being released: some end at once on a second one."""
        if self.releasing and self.state is not None and self.state.server_pid and self.state.status is None:
            pid = self.state.server_pid
            found = procs.stat(pid)
            if found is not None and self._holder is not None and found.ppid == self._holder[0]:
                procs.signal_process(pid, found.start, signal.SIGTERM)

    def release(self, grace_s: float, reason: str) -> None:
        """End the tree; SIGKILL to what is left after grace_s. Again with a smaller grace shortens it."""
        if not self.alive:
            return
        order = Release(grace_s=grace_s, reason=reason)
        if self._link is not None:
            self._link.send(order)
        else:
            self._pending_release = order
            self._recall()
        self._step(Event.stop)
        self._watch_holder(self._hearing.released(time.monotonic(), grace_s))

    def _watch_holder(self, hearing: Hearing) -> None:
        """A holder that hangs (stopped, stuck) must not keep the GPUs, and is no dead man's switch: its tree ends without it."""
        self._hearing = hearing
        at_s = hearing.deaf_at_s(hung_after_s(self._shell.boot.settings))
        if self._link is None or at_s == math.inf:
            self._shell.cancel(f"deaf-{self.name}")
        elif at_s > time.monotonic():
            self._shell.at(f"deaf-{self.name}", at_s, lambda: self._watch_holder(self._hearing))
        else:
            self._lost("its holder hangs")

    def _lost(self, how: str) -> None:
        """The holder is dead, or as good as dead: its tree ends without it."""
        self._shell.log.error("%s: %s; killing what it has", self.name, how)
        if not self.releasing:
            self.failed_why = self.failed_why or how
        self._detach()
        self._sweep()

    def fail(self, why: str) -> None:
        """It does not do its work: kill it, and count that as a death of its own."""
        self.failed_why = why
        self.release(0.0, why)

    def give_up(self) -> None:
        """A restart cannot mend it."""
        self._step(Event.give_up)

    def reset(self) -> None:
        """The operator says: try again."""
        self.failures = restart.Failures()
        self._shell.cancel(f"backoff-{self.name}")
        self._step(Event.reset)

    # --- within -----------------------------------------------------------------------------------------

    def _step(self, event: Event) -> None:
        self.life, _ = lifecycle.step(self.life, event, time.monotonic())

    def _connect(self) -> None:
        link = holding.connect(self._socket, 0.0)
        if link is not None:
            self._attach(link)
            if self._pending_release is not None:
                link.send(self._pending_release)
                self._watch_holder(Hearing().released(time.monotonic(), self._pending_release.grace_s))
            return
        if time.monotonic() < self._connect_by_s:
            self._shell.at(f"connect-{self.name}", time.monotonic() + CONNECT_EVERY_S, self._connect)
            return
        self._shell.log.error("%s: its holder does not answer; killing it", self.name)
        self.failed_why = "its holder did not answer"
        if self._process is not None:
            signal.pidfd_send_signal(self._process.pidfd, signal.SIGKILL)  # its end leads to the sweep

    def _recall(self) -> None:
        """It does not listen yet, and would start the program first: SIGTERM ends it before that, or is a release to it."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process.pidfd, signal.SIGTERM)

    def _attach(self, link: holding.HolderLink) -> None:
        self._link = link
        self._shell.watch(link, self._readable)

    def _detach(self) -> None:
        if self._link is not None:
            self._shell.unwatch(self._link)
            self._link.close()
            self._link = None

    def _readable(self) -> None:
        if self._link is None:
            return
        states = self._link.receive()
        for state in states or ():
            self._heard(state)
        if states is None and self._link is not None:
            self._lost("its holder was killed")

    def _heard(self, state: HolderState) -> None:
        before, self.state = self.state, state
        if state.gone_s is not None:
            self._detach()
            self._gone(state)
            return
        self._watch_holder(self._hearing.heard(time.monotonic(), state.releasing is not None, state.killed_s is not None))
        if state.releasing is not None and not self.releasing and self.life.phase in ALIVE:
            # The holder ends the tree by itself: the server died, or the lease ran out.
            self.failed_why = self.failed_why or (state.releasing if state.status is None else None)
        # The answer to a renewal is nothing new: told, it would be followed by the next renewal.
        if before is None or msgspec.structs.replace(before, pids=state.pids, expires_s=state.expires_s) != state:
            self._on_change()

    def _holder_ended(self, process: holding.HolderProcess) -> None:
        self._shell.unwatch(process)
        process.reap()
        process.close()
        if process is not self._process:
            return
        self._process = None
        if self.alive and self._link is None:
            self._shell.cancel(f"connect-{self.name}")
            words = holding.last_words(self._socket)
            if words is not None and words.marker == self._marker:
                self.state = words
                self._gone(words)
            elif self._pending_release is not None:
                self._sweep()  # recalled before it had begun
            else:
                self._lost("its holder died")

    def _sweep(self) -> None:
        """Kill the holder and all of its tree, until nothing is left."""
        if self._marker is None:
            return
        begun, self._sweeping = self._sweeping, self._sweeping or Sweep(self._marker, self._holder)
        if self._sweeping.step(self._shell.log.warning):
            self._gone(None)
            return
        self._shell.at(f"sweep-{self.name}", time.monotonic() + SWEEP_EVERY_S, self._sweep)
        if begun is None:
            self._on_change()

    def _gone(self, state: HolderState | None) -> None:
        now_s = time.monotonic()
        self._marker = self._holder = self._sweeping = None
        self._hearing, self._renewed_s = Hearing(), 0.0
        for timer in ("deaf", "sweep"):
            self._shell.cancel(f"{timer}-{self.name}")
        self._tree_path.unlink(missing_ok=True)
        asked = self.failed_why is None and (self.releasing or self.life.phase is Phase.stopped)
        if asked:
            self._step(Event.gone)
        elif self.life.phase is not Phase.failed:
            self.deaths += 1
            if self.releasing:
                self.life = msgspec.structs.replace(self.life, phase=Phase.ready)  # killed because it failed
            delay_s = self._retry_after_s(state) if self._retry_after_s is not None else None
            if delay_s is None:
                self.failures, delay_s = restart.after_failure(self.failures, self.policy, now_s, random.random())
            if delay_s is None:
                self._step(Event.give_up)
            else:
                self._step(Event.gone)
                self._shell.at(f"backoff-{self.name}", now_s + delay_s, self._backoff_over)
        self._on_gone(state, asked)
        self._on_change()

    def _backoff_over(self) -> None:
        if self.life.phase is Phase.backoff:
            self._step(Event.reset)  # back to stopped: the worker starts it again if it is still wanted
            self._on_change()
