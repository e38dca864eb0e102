"""Watching a running cloudflared: whether it is connected, where to, and whether it will get its connection back."""

import time
from collections.abc import Callable
from pathlib import Path

from llmwd.adapters import cloudflared, logfile
from llmwd.adapters.cloudflared import Look
from llmwd.core import tunnelfaults
from llmwd.workers.base import Shell

LOOK_EVERY_S = 0.25  # until it is connected
LOOK_SLOWLY_AFTER_S = 30.0
LOOK_SLOWLY_EVERY_S = 2.0  # and on_look is told, once, that it takes long
LOOK_CONNECTED_EVERY_S = 5.0
LOOK_SOON_EVERY_S = 1.0  # after a loss, and while connections are still being added


class Link:
    """What is known of one cloudflared. protocol: TUNNEL_PROTOCOL. faults: network faults in a row before it.
    connections: at its last answer."""

    def __init__(self, offset: int = 0, protocol: str = "", faults: int = 0):
        self.offset = self.offset_at_start = offset
        self.protocol, self.faults = protocol, faults
        self.down_since_s = self.answered_s = time.monotonic()
        self.address: str | None = None
        self.connections = 0
        self.silent = False  # at the last look
        self.locations: tuple[str, ...] = ()
        self.hostname = ""  # a quick tunnel's
        self.edges: tuple[str, ...] = ()
        self.was_connected = False
        self.settled = False  # as many connections as at the look before
        self.refusals = 0
        self.told_slow = False
        self.stuck = False  # killed, because it did not come back by itself

    @classmethod
    def of_note(cls, note: dict[str, str | int | float | None], protocol: str) -> "Link":
        """From what its holder keeps for us."""
        link = cls(int(note.get("offset") or 0), protocol, int(note.get("faults") or 0))
        link.address = str(note.get("address") or "") or None
        link.connections = int(note.get("connected") or 0)
        link.was_connected = bool(note.get("was_connected"))
        link.hostname = str(note.get("hostname") or "")
        link.edges = tuple(str(note.get("edges") or "").split())
        return link

    def as_note(self) -> dict[str, str | int | float | None]:
        return {
            "address": self.address, "offset": self.offset, "connected": self.connections, "hostname": self.hostname,
            "was_connected": int(self.was_connected), "edges": " ".join(self.edges), "faults": self.faults,
        }  # fmt: skip

    def take(self, look: Look) -> None:
        was = self.connections
        self.offset, self.address = look.offset, look.address
        self.edges = tunnelfaults.edges(look.log, self.edges, self.protocol)
        self.refusals += tunnelfaults.refusals(look.log)
        self.silent = look.connections is None and look.address is not None
        if self.silent:
            return  # a slow answer is no lost connection
        self.answered_s = time.monotonic()
        self.connections = look.connections or 0
        self.settled = was == self.connections
        self.locations = tunnelfaults.locations(look.metrics) if self.connections else ()
        self.hostname = look.hostname or self.hostname
        if self.connections:
            self.was_connected, self.faults, self.refusals, self.told_slow = True, 0, 0, False
        elif was:
            self.down_since_s = time.monotonic()


class Watch:
    """running(): it is to be watched. on_look(before, error): something was seen; connections before, and the last
    error logged since. on_slow(s): no connection for long. on_stuck(why): it has to be started anew."""

    def __init__(
        self, shell: Shell, log_path: Path, running: Callable[[], bool], on_look: Callable[[int, str], None],
        on_slow: Callable[[float], None], on_stuck: Callable[[str], None],
    ):
        self._shell, self._log_path, self._running = shell, log_path, running
        self._on_look, self._on_slow, self._on_stuck = on_look, on_slow, on_stuck
        self._token: object = None
        self.link = Link()

    def begin(self, link: Link, in_s: float = LOOK_EVERY_S) -> None:
        self.link = link
        self._arrange(in_s)

    def end(self) -> None:
        self._token = None
        self.link = Link(faults=self.link.faults)

    def last_words(self) -> str:
        """The end of what this cloudflared has logged."""
        return logfile.tail(self._log_path, self.link.offset_at_start)

    def size(self) -> int:
        return logfile.size(self._log_path)

    def _arrange(self, in_s: float) -> None:
        self._shell.at("look", time.monotonic() + in_s, self._look)

    def _look(self) -> None:
        if not self._running():
            return
        self._token = token = object()
        path, offset, address = self._log_path, self.link.offset, self.link.address
        edges, protocol = self.link.edges, self.link.protocol

        def work() -> Look:
            return cloudflared.look(
                path, offset, address, tunnelfaults.metrics_address,
                lambda log: tunnelfaults.edges(log, edges, protocol), tunnelfaults.EDGE_PORT,
            )  # fmt: skip

        self._shell.beside(work, lambda look: self._looked(token, look))

    def _looked(self, token: object, look: Look | None) -> None:
        if token is not self._token or not self._running():
            return
        link = self.link
        if look is not None:
            before = link.connections
            link.take(look)
            self._on_look(before, tunnelfaults.last_error(look.log))
        if not self._running():
            return
        now_s, answers = time.monotonic(), look is not None and look.edge_answers
        down_s, silent_s = 0.0 if link.connections else now_s - link.down_since_s, now_s - link.answered_s
        why = tunnelfaults.stuck(link.address is not None, link.was_connected, down_s, silent_s, answers, link.faults)
        if why:
            link.stuck = True
            self._on_stuck(why)
            return
        if link.connections:
            self._arrange(LOOK_CONNECTED_EVERY_S if link.settled else LOOK_SOON_EVERY_S)
            return
        slow = down_s > LOOK_SLOWLY_AFTER_S
        if slow and not link.told_slow:
            link.told_slow = True
            self._on_slow(down_s)
        self._arrange(LOOK_SLOWLY_EVERY_S if slow else LOOK_SOON_EVERY_S if link.was_connected else LOOK_EVERY_S)
