"""The shell of a worker: one thread, one loop over the line, the bus, the desk, timers and file descriptors.

The heartbeat is sent by this loop itself, never by a helper thread: a worker that hangs stops beating, and the root
kills and restarts it.
"""

import collections
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import zmq

from llmwd.adapters import procs
from llmwd.adapters.bus import DeskServer, Publisher, Subscriber
from llmwd.adapters.journal import Journal, open_log
from llmwd.adapters.line import Line
from llmwd.config import Loaded, Settings, load
from llmwd.core.complaint import Complaint
from llmwd.messages import Beat, Drained, Fact, Hello, Order, Ready, Refused, Reload, Reply, Stop

T = TypeVar("T")
F = TypeVar("F", bound=Fact)
O = TypeVar("O", bound=Order)


class HasFileno(Protocol):
    def fileno(self) -> int: ...


Readable = int | HasFileno | zmq.Socket

# A worker whose root died ends by itself; nobody is left to wait for it.
ORPHAN_WITHIN_S = 8.0


class Boot(msgspec.Struct, frozen=True):
    """What a worker is born with."""

    name: str
    settings: Settings
    home: Path
    runtime: Path
    state: Path
    node: str
    root_fd: int  # read end of a pipe that only the root can write to: end of file means that the root died
    api_key: str = ""  # the key that llmwd made for this node
    umask: int = 0o077  # the operator's, for services; our own files are for us alone

    @property
    def logs(self) -> Path:
        return self.state / "logs"


def beat_every_s(settings: Settings) -> float:
    return settings.lease_ttl_s / 5


def hung_after_s(settings: Settings) -> float:
    """Silence after which a worker counts as hung: early enough that its next incarnation can renew the lease."""
    return settings.lease_ttl_s / 2


def repeat_every_s(settings: Settings) -> float:
    """The slow beat on which facts are repeated and leases renewed."""
    return settings.lease_ttl_s / 4


class Shell:
    """What a worker's code talks to. Callbacks run in the loop, one after the other, and must not block."""

    def __init__(self, boot: Boot, line: Line):
        self.boot = boot
        self.log = open_log(
            boot.logs, boot.name, boot.settings.log_level, boot.settings.log_max_mb, boot.settings.log_keep
        )
        self.journal = Journal(boot.state, boot.name, self.log)
        self._line = line
        self._poller = zmq.Poller()
        self._callbacks: dict[object, Callable[[], None]] = {}
        self._timers: dict[str, tuple[float, Callable[[], None]]] = {}
        self._readers: dict[str, Callable[[Any], None]] = {}
        self._answers: dict[type, Callable[[Any, Callable[[Reply], None]], None]] = {}
        self._on_stop: Callable[[float], None] = lambda within_s: self.finish()
        self._on_reload: Callable[[Boot, Loaded], None] = lambda boot, loaded: None
        self._stopping = self._orphan = False
        self._finished = False
        self._context = zmq.Context()
        self._publisher = Publisher(self._context, boot.runtime, boot.name)
        self._subscriber: Subscriber | None = None
        self._desk: DeskServer | None = None
        self._unretained = Complaint()
        self._readings: collections.deque[tuple[str | None, Callable[[Loaded | None], None]]] = collections.deque()
        self.watch(line, self._on_line)
        self.watch(self._publisher.socket, self._publisher.on_readable)
        line.send(Hello(pid=os.getpid()))
        self._beat()

    # --- what workers use ---------------------------------------------------------------------------

    def watch(self, source: Readable, callback: Callable[[], None]) -> None:
        """Call back whenever the file descriptor (or ZeroMQ socket, or object with fileno()) is readable."""
        key = source if isinstance(source, (int, zmq.Socket)) else source.fileno()
        self._poller.register(key, zmq.POLLIN)
        self._callbacks[key] = callback

    def unwatch(self, source: Readable) -> None:
        key = source if isinstance(source, (int, zmq.Socket)) else source.fileno()
        if self._callbacks.pop(key, None) is not None:
            self._poller.unregister(key)

    def at(self, name: str, when_s: float, callback: Callable[[], None]) -> None:
        """A named one-shot timer; naming it again replaces it."""
        self._timers[name] = (when_s, callback)

    def cancel(self, name: str) -> None:
        self._timers.pop(name, None)

    def publish(self, fact: Fact) -> None:
        """Put the fact on the bus and keep it for readers beside the bus."""
        error = self._publisher.publish(fact)
        if self._unretained.is_due(error or "", time.monotonic()):
            self.log.error("%s; `status` shows old facts until it can", error)

    def subscribe(self, worker: str, callback: Callable[[F], None]) -> None:
        if self._subscriber is None:
            self._subscriber = Subscriber(self._context, self.boot.runtime)
            self.watch(self._subscriber.socket, self._on_bus)
        self._readers[worker] = callback
        self._subscriber.listen_to(worker)

    def answer(self, order: type[O], callback: Callable[[O, Callable[[Reply], None]], None]) -> None:
        """callback(order, reply) carries the order out and calls reply once, at once or later."""
        if self._desk is None:
            self._desk = DeskServer(self._context, self.boot.runtime, self.boot.name)
            self.watch(self._desk.socket, self._on_desk)
        self._answers[order] = callback

    def ready(self) -> None:
        self._line.send(Ready())

    def on_stop(self, callback: Callable[[float], None]) -> None:
        """callback(within_s) begins an orderly end, which calls finish()."""
        self._on_stop = callback

    def on_reload(self, callback: Callable[[Boot, Loaded], None]) -> None:
        self._on_reload = callback

    def finish(self) -> None:
        self._finished = True

    def beside(self, work: Callable[[], T], then: Callable[[T | None], None]) -> None:
        """Do what may block in a thread of its own; then(result) is called in the loop, None if it failed."""
        reader, writer = os.pipe()
        result: list[T] = []

        def run() -> None:
            try:
                result.append(work())
            finally:
                os.close(writer)

        def arrived() -> None:
            self.unwatch(reader)
            os.close(reader)
            then(result[0] if result else None)

        self.watch(reader, arrived)
        threading.Thread(target=run, name="beside", daemon=True).start()

    def load_config(self, profile: str | None, then: Callable[[Loaded | None], None]) -> None:
        """Read the configuration beside the loop: the files are bash, and may take their time.

        One reading after the other: of two at once the older might end last, and its settings would stay.
        """
        self._readings.append((profile, then))
        if len(self._readings) == 1:
            self._read_config()

    def _read_config(self) -> None:
        profile = self._readings[0][0]
        self.beside(lambda: load(self.boot.home, profile), self._config_read)

    def _config_read(self, loaded: Loaded | None) -> None:
        _, then = self._readings.popleft()
        if self._readings:
            self._read_config()
        then(loaded)

    # --- the loop -------------------------------------------------------------------------------------

    def run(self) -> None:
        while not self._finished:
            for callback, key in [(self._callbacks.get(key), key) for key, _ in self._poller.poll(self._wait_ms())]:
                # A callback before this one may have closed this file, and its number may be another's by now.
                if callback is not None and self._callbacks.get(key) is callback:
                    callback()
            now_s = time.monotonic()
            for name in [name for name, (when_s, _) in self._timers.items() if when_s <= now_s]:
                timer = self._timers.pop(name, None)
                if timer is not None:
                    timer[1]()
        self._line.send(Drained())

    def _wait_ms(self) -> int:
        next_s = min(when_s for when_s, _ in self._timers.values())
        return max(0, int((next_s - time.monotonic()) * 1000) + 1)

    def _beat(self) -> None:
        self._line.send(Beat())
        if not self._orphan:
            # By the kernel: a root that is dead, or hangs as well, ends no worker that hangs. (Seen: Thread.start() waits
            # for ever for a thread that had no memory to begin.)
            signal.setitimer(signal.ITIMER_REAL, self.boot.settings.lease_ttl_s)
        self.at("beat", time.monotonic() + beat_every_s(self.boot.settings), self._beat)

    def _on_line(self) -> None:
        for message in self._line.receive():
            match message:
                case Stop(within_s=within_s):
                    self._stop(within_s)
                case Reload():
                    self.load_config(None, self._reloaded)
        if self._line.closed:
            self.unwatch(self._line)
            self.log.error("the root is gone: ending")
            self._orphan, within_s = True, min(ORPHAN_WITHIN_S, 0.8 * self.boot.settings.lease_ttl_s)
            signal.setitimer(signal.ITIMER_REAL, within_s + 0.1 * self.boot.settings.lease_ttl_s)
            self._stop(within_s)

    def _stop(self, within_s: float) -> None:
        if not self._stopping:
            self._stopping = True
            self.at("stop-overdue", time.monotonic() + within_s, self.finish)
            self._on_stop(within_s)

    def _reloaded(self, loaded: Loaded | None) -> None:
        if loaded is None:
            return
        if loaded.settings is not None:
            self.boot = msgspec.structs.replace(self.boot, settings=loaded.settings)
            self.log.setLevel(loaded.settings.log_level.upper())
        self._on_reload(self.boot, loaded)

    def _on_bus(self) -> None:
        for envelope in self._subscriber.receive():
            self._readers[envelope.sender](envelope.fact)

    def _on_desk(self) -> None:
        for back, order in self._desk.receive():
            callback = self._answers.get(type(order))
            if callback is None:
                self._desk.reply(back, _not_mine(self.boot.name, order))
            else:
                callback(order, functools.partial(self._desk.reply, back))


def _not_mine(name: str, order: Order) -> Reply:
    return Refused(problems=(f"{name} takes no order of the kind {type(order).__name__}",))


def run_worker(boot: Boot, line: Line, main: Callable[[Shell], None]) -> None:
    """The life of a worker process, from just after the fork to its end."""
    procs.title(f"llmwd: {boot.name}")
    # If the root dies while we are stopped (SIGSTOP), this makes us run again and see the line's end.
    procs.set_pdeathsig(signal.SIGCONT)
    # Orders come by the line, and a terminal's signals are for the root. A handler that does nothing, not SIG_IGN:
    # ignored signals would stay ignored in scontrol, cloudflared and vLLM, handlers end at exec.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: None)
    logging.raiseExceptions = False
    shell = Shell(boot, line)
    main(shell)
    shell.run()
