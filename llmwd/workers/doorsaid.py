"""What Caddy reads for every request: files that say whether the model can be reached, where, and what is told if not.

Files, and no configuration of Caddy's: each load of one closes its clients' idle connections.
"""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from llmwd.adapters import listeners
from llmwd.adapters.rundir import write_atomic
from llmwd.config import Loaded, api_key
from llmwd.core import doorconfig
from llmwd.core.doorpage import page
from llmwd.core.doorwords import DoorState, error_body, models_body, state_of
from llmwd.messages import GpusFact, ServerFact
from llmwd.workers.base import Shell


class Said:
    """on_change(): requests may be let through now that could not before."""

    def __init__(self, shell: Shell, folder: Path, on_change: Callable[[], None]):
        self._shell = shell
        self._folder = folder
        self._on_change = on_change
        self._server: ServerFact | None = None
        self._gpus: GpusFact | None = None
        self._key: tuple[str, str] | None = None  # the profile it is for; what Authorization says to vLLM
        self._shut = False
        self._strangers: set[int] = set()
        self._written: dict[str, bytes] = {}
        self.state: DoorState = state_of(None, time.time())
        self.problem = ""  # why what is said is not what is true

    @property
    def open(self) -> bool:
        """Requests are passed on."""
        return self._written.get(doorconfig.STATE) == doorconfig.OPEN.encode()

    @property
    def tls(self) -> bool:
        return self._server is not None and (self._server.url or "").startswith("https:")

    def heard(self, server: ServerFact) -> None:
        self._server = server
        if server.profile is not None and (self._key is None or self._key[0] != server.profile):
            self._learn_key(server.profile)
        self.say()

    def heard_of_gpus(self, gpus: GpusFact) -> None:
        self._gpus = gpus
        self.say()

    def renew(self) -> None:
        """The settings are others."""
        if self._server is not None and self._server.profile is not None:
            self._learn_key(self._server.profile)
        self.say()

    def shut(self) -> None:
        self._shut = True
        self.say()

    def say(self) -> None:
        """Write what is true now. What is said of a closed door stands there before the door closes."""
        settings, server = self._shell.boot.settings, self._server
        if server is not None and time.monotonic() - server.at_s > 2 * settings.lease_ttl_s:
            server = None  # its manager is silent: without it vLLM has ended by now
        before, self.state = self.state, state_of(server, time.time(), settings.tunnel_hostname, self._gpus)
        reach = self._reach(server)
        hold = not reach and self.state.gap and settings.door_hold_s > 0 and not self._shut
        word = doorconfig.OPEN if reach else doorconfig.HOLDING if hold else doorconfig.CLOSED
        away = doorconfig.nobody if hold else doorconfig.closed
        dial = doorconfig.dial(server.url) if reach else away(str(self._folder))
        files = {
            doorconfig.BODY: error_body(self.state), doorconfig.RETRY_AFTER: str(self.state.retry_after_s).encode(),
            doorconfig.MODELS: models_body(self.state), doorconfig.PAGE: page(self.state),
            doorconfig.UPSTREAM_KEY: self._key[1].encode() if reach else b"",
            doorconfig.DIAL: dial.encode(), doorconfig.STATE: word.encode(),
        }  # fmt: skip
        problem = ""
        for name, data in files.items():
            if self._written.get(name) != data:
                problem = self._write(name, data) or problem
        if problem and problem != self.problem:
            self._shell.log.error("%s", problem)
        self.problem = problem
        if before.code != self.state.code:
            self._shell.log.info("the door says: %s", self.state.code)

    def _write(self, name: str, data: bytes) -> str:
        """"" or why not. A word that cannot be replaced is taken away, which a full disk allows: without one the door
        is closed."""
        path = self._folder / name
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            write_atomic(path, data)
        except OSError as error:
            self._written.pop(name, None)
            if name == doorconfig.STATE:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            return f"what the front door says cannot be written to {path}: {error.strerror}"
        self._written[name] = data
        return ""

    def _reach(self, server: ServerFact | None) -> bool:
        if not self.state.reachable or self._shut or server is None or server.url is None:
            return False
        if self._key is None or self._key[0] != server.profile:
            return False
        strangers = listeners.owners(urlsplit(server.url).port or 0) - {os.getuid()}
        if strangers:
            if strangers != self._strangers:
                told = ", ".join(map(str, sorted(strangers)))
                self._shell.log.error("the door stays shut: the user with uid %s listens on the model's port", told)
            self.state = msgspec.structs.replace(self.state, reachable=False, code="failed")
        self._strangers = strangers
        return not strangers

    def _learn_key(self, profile: str) -> None:
        def loaded(result: Loaded | None) -> None:
            if result is None or result.profile is None or result.settings is None:
                return
            key = api_key(result.profile, result.settings, self._shell.boot.api_key)
            self._key = profile, f"Bearer {key}" if key else ""
            self.say()
            self._on_change()

        self._shell.load_config(profile, loaded)
