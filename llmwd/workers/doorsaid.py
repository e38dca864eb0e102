"""What Caddy reads for every request: files that say whether the model can be reached, where, and what is told if not.

Files, and no configuration of Caddy's: each load of one closes its clients' idle connections. They outlive this process, and
are true until the manager of vLLM is heard of, or is known to be silent; so the next incarnation leaves them alone until then.
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
from llmwd.core import doorwanted
from llmwd.core.doorpage import page
from llmwd.core.doorwords import DoorState, error_body, models_body, not_yet, state_of, without_a_way
from llmwd.messages import GpusFact, ServerFact
from llmwd.workers.base import Shell

# In this order: what is said of a closed door stands there before it closes, and where it leads before it opens.
FILES = (
    doorwanted.BODY, doorwanted.RETRY_AFTER, doorwanted.MODELS, doorwanted.PAGE, doorwanted.UPSTREAM_KEY, doorwanted.UPSTREAM,
    doorwanted.DIAL, doorwanted.STATE,
)  # fmt: skip
STRANGER = "Another program is where the model should answer."
NO_KEY = "The model answers, but the server has no key to ask it with."


class _Key(msgspec.Struct, frozen=True):
    """What Authorization says to vLLM, and the incarnation of it that this is for. text None: it could not be learned."""

    upstream: str
    text: str | None


class Said:
    """on_change(): requests may be let through now that could not before."""

    def __init__(self, shell: Shell, folder: Path, on_change: Callable[[], None]):
        self._shell = shell
        self._folder = folder
        self._on_change = on_change
        self._server: ServerFact | None = None
        self._gpus: GpusFact | None = None
        self._key: _Key | None = None
        self._learning = ""  # the incarnation whose key is being learned
        self._shut = False
        self._silent_until_s = 0.0  # an earlier incarnation's words hold until then
        self._strangers: set[int] = set()
        self._written: dict[str, bytes] = {}
        self.state: DoorState = state_of(None, time.time())
        self.problem = ""  # why what is said is not what is true

    @property
    def open(self) -> bool:
        """Requests are passed on."""
        return self._written.get(doorwanted.STATE) == doorwanted.OPEN.encode()

    @property
    def tls(self) -> bool | None:
        """Whether vLLM speaks https; None: not known, as long as none runs."""
        return self._server.url.startswith("https:") if self._server is not None and self._server.url is not None else None

    def begin(self, adopted: bool) -> None:
        """First thing. adopted: Caddy runs, and goes on with what it was told."""
        for name in FILES:
            with contextlib.suppress(OSError):
                self._written[name] = (self._folder / name).read_bytes()
        if doorwanted.UPSTREAM in self._written and doorwanted.UPSTREAM_KEY in self._written:
            kept = (self._written[name].decode(errors="replace") for name in (doorwanted.UPSTREAM, doorwanted.UPSTREAM_KEY))
            self._key = _Key(*kept)
        if adopted:
            self._silent_until_s = time.monotonic() + self._silence_s()
        self.say()

    def heard(self, server: ServerFact) -> None:
        self._server = server
        self._learn_key()
        self.say()

    def heard_of_gpus(self, gpus: GpusFact) -> None:
        self._gpus = gpus
        self.say()

    def repeat(self) -> None:
        """Of old: write again what has disappeared, and learn what could not be learned."""
        self._learn_key()
        self.say()

    def shut(self) -> None:
        self._shut = True
        self.say()

    def say(self) -> None:
        """Write what is true now."""
        settings, server = self._shell.boot.settings, self._server
        if server is None and time.monotonic() < self._silent_until_s and not self._shut:
            return
        if server is not None and time.monotonic() - server.at_s > self._silence_s():
            server = None  # without its manager vLLM has ended by now
        before, self.state = self.state, state_of(server, time.time(), settings.tunnel_hostname, self._gpus)
        reach = self._reach(server)
        hold = not reach and self.state.gap and settings.door_hold_s > 0 and not self._shut
        word = doorwanted.OPEN if reach else doorwanted.HOLDING if hold else doorwanted.CLOSED
        away = doorwanted.nobody if hold else doorwanted.closed
        dial = doorwanted.dial(server.url) if reach else away(str(self._folder))
        said = {
            doorwanted.BODY: error_body(self.state), doorwanted.RETRY_AFTER: str(self.state.retry_after_s).encode(),
            doorwanted.MODELS: models_body(self.state), doorwanted.PAGE: page(self.state),
            doorwanted.DIAL: dial.encode(), doorwanted.STATE: word.encode(),
        }  # fmt: skip
        if settings.door and self._key is not None and self._key.text is not None:
            # Never taken away: a request that read the dial just before it changed would meet vLLM without a key.
            said |= {doorwanted.UPSTREAM_KEY: self._key.text.encode(), doorwanted.UPSTREAM: self._key.upstream.encode()}
        self._write_all(said)
        if before.code != self.state.code:
            self._shell.log.info("the door says: %s", self.state.code)

    def _silence_s(self) -> float:
        return 2 * self._shell.boot.settings.lease_ttl_s

    def _write_all(self, said: dict[str, bytes]) -> None:
        problem = ""
        for name in FILES:
            if name in said and (self._written.get(name) != said[name] or not (self._folder / name).exists()):
                problem = self._write(name, said[name]) or problem
        problem = problem or self._no_key()
        if problem and problem != self.problem:
            self._shell.log.error("%s", problem)
        self.problem = problem

    def _write(self, name: str, data: bytes) -> str:
        """"" or why not. A word that cannot be replaced is taken away, which a full disk allows: without one the door
        is closed."""
        path = self._folder / name
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            write_atomic(path, data)
        except OSError as error:
            self._written.pop(name, None)
            if name == doorwanted.STATE:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            return f"what the front door says cannot be written to {path}: {error.strerror}"
        self._written[name] = data
        return ""

    def _reach(self, server: ServerFact | None) -> bool:
        if not self.state.reachable or self._shut or server is None or server.url is None:
            return False
        if self._key is None or self._key.upstream != _upstream(server):
            self.state = not_yet(self.state)
            return False
        if self._key.text is None:
            self.state = without_a_way(self.state, NO_KEY)
            return False
        strangers = listeners.owners(urlsplit(server.url).port or 0) - {os.getuid()}
        if strangers:
            if strangers != self._strangers:
                told = ", ".join(map(str, sorted(strangers)))
                self._shell.log.error("the door stays shut: the user with uid %s listens on the model's port", told)
            self.state = without_a_way(self.state, STRANGER)
        self._strangers = strangers
        return not strangers

    # --- vLLM's key ------------------------------------------------------------------------------------------

    def _learn_key(self) -> None:
        """Of each incarnation once, as early as can be: by the profile that its manager has just read. Later the profile may
        be another, or not valid, and vLLM still has the key that it was started with."""
        server = self._server
        if server is None or server.profile is None or server.pid is None or self._learning:
            return
        upstream = _upstream(server)
        if self._key is not None and self._key.upstream == upstream and self._key.text is not None:
            return
        self._learning = upstream

        def loaded(result: Loaded | None) -> None:
            self._learning = ""
            text = None
            if result is not None and result.profile is not None and result.settings is not None:
                key = api_key(result.profile, result.settings, self._shell.boot.api_key)
                text = f"Bearer {key}" if key else ""
            self._key = _Key(upstream, text)
            self.say()
            self._on_change()

        self._shell.load_config(server.profile, loaded)

    def _no_key(self) -> str:
        if self._key is None or self._key.text is not None or self._server is None or self._key.upstream != _upstream(self._server):
            return ""
        return (
            f"the key of the running model is not known, because its profile {self._server.profile} is not valid any more: correct it "
            "(llmwd-ctl check says what is wrong)"
        )


def _upstream(server: ServerFact) -> str:
    return f"{server.profile} {server.pid} {server.started_at}"
