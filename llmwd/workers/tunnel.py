"""The tunnel manager: public access to the served model through cloudflared (with the two ways to look at it: long).

The tunnel follows the server: it comes up once the model answers, and goes after the server is gone. It only listens
on the bus, so no yield waits for it. Only /ready of cloudflared's metrics server tells connected from merely
running. What cloudflared's words mean is in core/tunnelconfig.py; its process is the holder's (workers/service.py).
"""

import http.client
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from llmwd import redact
from llmwd.adapters.rundir import write_atomic
from llmwd.config import Loaded, Settings
from llmwd.core import restart, tunnelconfig
from llmwd.core.tunnelconfig import Recipe
from llmwd.messages import Done, HolderState, Reply, ResetOrder, ServerFact, TunnelFact
from llmwd.vocab import Phase, Worker
from llmwd.workers.base import Boot, Shell, repeat_every_s
from llmwd.workers.service import Service

OFF = "off: TUNNEL_HOSTNAME is not set"
RELEASE_GRACE_S = tunnelconfig.GRACE_S + 1.0
STOP_MARGIN_S = 1.5  # of an ordered stop's time that is kept for SIGKILL and for saying so
LOOK_EVERY_S = 0.25  # until it is connected
LOOK_SLOWLY_AFTER_S = 30.0
LOOK_SLOWLY_EVERY_S = 2.0  # and the log says that it is not connected yet
LOOK_CONNECTED_EVERY_S = 5.0
READY_WITHIN_S = 5.0
METRICS_WITHIN_S = 75.0  # a name server that does not answer keeps it from listening for 40 s
RECONNECT_WITHIN_S = 120.0  # it waits up to 320 s between two tries by itself; a new one connects at once
LOOK_BYTES = 1 << 20
TAIL_BYTES = 16 << 10

class Look(msgspec.Struct, frozen=True):
    """What one look at cloudflared told. connections: its living ones, None if /ready gave no answer."""

    log: str
    offset: int
    address: str | None
    connections: int | None


class Tunnel:
    """See the module's text."""

    def __init__(self, shell: Shell):
        self.shell = shell
        self.settings: Settings = shell.boot.settings
        self.server: ServerFact | None = None
        self.heard = False  # of the server, since this incarnation began
        self.stopping = False
        self.made_for: str | None = None  # the settings and the address that the living cloudflared was started for
        self.given_up = False
        self.told_slow = False
        self.address: str | None = None
        self.offset = 0
        self.refusals = 0
        self.connected = False
        self.down_since_s = 0.0
        self.detail = ""
        self.warning = ""
        self.log_path = shell.boot.logs / "cloudflared.log"
        self.config_path = shell.boot.runtime / "config-cloudflared.yml"
        self._look_of: object = None
        self._since_at = time.time()
        self._published: TunnelFact | None = None
        self.service = Service(shell, "cloudflared", "cloudflared", self._policy(), self.reconcile, self.on_gone)

    def _policy(self) -> restart.Policy:
        s = self.settings
        return restart.Policy(
            intensity=s.restart_intensity, period_s=s.restart_period_s, first_s=s.backoff_min_s,
            backoff_min_s=s.backoff_min_s, backoff_max_s=s.backoff_max_s,
        )  # fmt: skip

    # --- what happens ------------------------------------------------------------------------------------

    def begin(self) -> None:
        """First thing: the cloudflared that an earlier incarnation may have left."""
        state = self.service.adopt()
        if state is not None and state.releasing is None:
            note = state.note
            self.made_for, self.address = note.get("made_for"), note.get("address")
            self.offset, self.connected = int(note.get("offset") or 0), bool(note.get("connected"))
            self.down_since_s = time.monotonic()
            self.service.adopted(ready=self.connected)
            self.shell.log.info("cloudflared (pid %s) taken over, %s", state.server_pid, self.service.life.phase)
            self._arrange_look(0.0)
        self.on_beat()

    def on_server(self, fact: ServerFact) -> None:
        self.server, self.heard = fact, True
        self.reconcile()

    def on_reload(self, boot: Boot, loaded: Loaded) -> None:
        self.settings = boot.settings
        self.service.policy = self._policy()
        self._forgive()  # whatever was wrong may be mended now, in the files that the settings name as well
        self.reconcile()

    def on_reset(self, order: ResetOrder, reply: Callable[[Reply], None]) -> None:
        self.shell.journal.write("reset", by=order.by)
        self._forgive()
        reply(Done(detail="failures forgotten"))
        self.reconcile()

    def on_stop(self, within_s: float) -> None:
        self.stopping = True
        self.service.release(max(0.0, min(RELEASE_GRACE_S, within_s - STOP_MARGIN_S)), "stopping")
        self.reconcile()

    def on_beat(self) -> None:
        if self.service.life.phase in (Phase.starting, Phase.ready):
            self.service.renew(time.monotonic() + self.settings.lease_ttl_s)
        self.reconcile(repeat=True)
        self.shell.at("repeat", time.monotonic() + repeat_every_s(self.settings), self.on_beat)

    def _forgive(self) -> None:
        if self.service.life.phase in (Phase.failed, Phase.backoff):
            self.detail, self.given_up = "", False
            self.service.reset()

    # --- what follows ------------------------------------------------------------------------------------

    def reconcile(self, repeat: bool = False) -> None:
        """Compare what is wanted with what runs, take the next step, show it."""
        service = self.service
        url = self._origin()
        if service.alive and service.life.phase in (Phase.starting, Phase.ready):
            why = self._why_end(url)
            if why:
                self.shell.log.info("taking the tunnel down: %s", why)
                service.release(RELEASE_GRACE_S, why)
        elif url is not None and not service.alive and service.life.phase is Phase.stopped:
            self._start(url)
        self._publish(repeat)
        if self.stopping and not service.alive:
            self.shell.finish()

    def _origin(self) -> str | None:
        if self.stopping or not self.settings.tunnel_hostname:
            return None
        # Without its lease renewed, vLLM has ended after one LEASE_TTL, and its worker's death grows no younger fact.
        return tunnelconfig.origin(self.server, self.service.alive, 2 * self.settings.lease_ttl_s, time.monotonic())

    def _why_end(self, url: str | None) -> str:
        if url is None:
            # Just restarted, we have not heard of the server yet: leave what runs.
            waiting = not self.heard and not self.stopping and self.settings.tunnel_hostname
            return "" if waiting else "the model is not served any more"
        return "" if self.made_for == self._made_for(url) else "its settings have changed"

    def _made_for(self, url: str) -> str:
        s = self.settings
        return " ".join((s.tunnel_hostname, s.tunnel_id, s.cloudflared_bin, s.cloudflared_creds, url))

    def _recipe(self, url: str) -> Recipe | None:
        """How to run it; None, with the reason in `detail`, if something stands in the way."""
        s = self.settings
        program = shutil.which(s.cloudflared_bin)
        if program is None:
            self.detail = f"{s.cloudflared_bin} is not there or cannot be run: install cloudflared, or set CLOUDFLARED_BIN"
            return None
        if not s.cloudflared_creds:
            self.detail = "TUNNEL_ID is not set (`cloudflared tunnel list` shows it)"
            return None
        path = Path(s.cloudflared_creds)
        try:
            text, mode = path.read_bytes(), path.stat().st_mode
        except OSError as error:
            self.detail = f"the credentials file {path} cannot be read ({error.strerror}): set CLOUDFLARED_CREDS"
            return None
        found = tunnelconfig.check_credentials(str(path), text, mode, s.tunnel_id)
        if found.problem:
            self.detail = found.problem
            return None
        redact.learn([found.secret])
        self.warning = "; ".join(found.warnings)
        return tunnelconfig.recipe(
            os.path.abspath(program), str(self.config_path), s.tunnel_hostname, found.tunnel_id, str(path), url, os.environ
        )

    def _start(self, url: str) -> None:
        recipe = self._recipe(url)
        if recipe is None:
            self._give_up(self.detail)
            return
        if self.warning:
            self.shell.log.warning("%s", self.warning)
        try:
            write_atomic(self.config_path, recipe.config.encode())
        except OSError as error:
            self.detail = f"{self.config_path} cannot be written: {error.strerror}"
            self.service.cannot_start(self.detail)
            return
        now_s = time.monotonic()
        self.made_for, self.address, self.connected, self.refusals = self._made_for(url), None, False, 0
        self.given_up = self.told_slow = False
        self.offset, self.down_since_s, self.detail = _size(self.log_path), now_s, "connecting to Cloudflare"
        self.shell.log.info("starting the tunnel from %s to %s", self.settings.tunnel_hostname, url)
        # If the root dies, all has to be gone within LEASE_TTL.
        grace_s = min(RELEASE_GRACE_S, self.settings.lease_ttl_s / 2)
        self.service.start(
            recipe.argv, recipe.env, now_s + self.settings.lease_ttl_s, grace_s, self.shell.boot.root_fd, self._note()
        )
        self.shell.journal.write("tunnel_started", hostname=self.settings.tunnel_hostname, url=url)
        self._arrange_look(LOOK_EVERY_S)

    def _give_up(self, why: str) -> None:
        """A fault that no restart mends: said once, and left until the settings change or the operator resets it."""
        self.detail, self.given_up = why, True
        self.shell.log.error("the tunnel cannot work: %s", why)
        self.shell.journal.write("tunnel_failed", why=why)
        self.service.give_up()
        self.service.release(0.0, why)

    def on_gone(self, state: HolderState | None, asked: bool) -> None:
        """Nothing of cloudflared is left."""
        self._look_of = self.made_for = self.address = None
        self.connected = False
        if asked:
            self.detail = ""
            self.shell.log.info("the tunnel is down")
            return
        if not self.given_up:
            self._died(state)

    def _died(self, state: HolderState | None) -> None:
        log, _ = _read(self.log_path, max(self.offset, _size(self.log_path) - TAIL_BYTES))
        permanent, how = tunnelconfig.death(state.status if state else None, state.error if state else "", log)
        why = self.service.failed_why  # we killed it, or its holder did: then its exit status tells nothing
        if permanent and not why:
            self._give_up(how)
            return
        self.detail = why or how
        self.shell.log.error("%s (llmwd-ctl logs cloudflared)", self.detail)
        self.shell.journal.write("tunnel_died", how=self.detail, status=state.status if state else None)

    # --- whether it is connected ---------------------------------------------------------------------------

    def _arrange_look(self, in_s: float) -> None:
        self.shell.at("look", time.monotonic() + in_s, self._look)

    def _look(self) -> None:
        if self.service.life.phase not in (Phase.starting, Phase.ready):
            return
        self._look_of = token = object()
        path, offset, address = self.log_path, self.offset, self.address
        self.shell.beside(lambda: _look(path, offset, address), lambda look: self._looked(token, look))

    def _looked(self, token: object, look: Look | None) -> None:
        if token is not self._look_of or self.service.life.phase not in (Phase.starting, Phase.ready):
            return
        now_s = time.monotonic()
        if look is not None:
            self._take(look, now_s)
        down_s = 0.0 if self.connected else now_s - self.down_since_s
        if self.service.life.phase not in (Phase.starting, Phase.ready):
            return
        if self.connected:
            self._arrange_look(LOOK_CONNECTED_EVERY_S)
        elif self.address is None and down_s > METRICS_WITHIN_S:
            self.service.fail(f"cloudflared said nothing of its metrics server for {METRICS_WITHIN_S:.0f} s")
        elif self.service.life.phase is Phase.ready and down_s > RECONNECT_WITHIN_S:
            self.service.fail(f"without a connection to Cloudflare for {RECONNECT_WITHIN_S:.0f} s")
        else:
            slow = down_s > LOOK_SLOWLY_AFTER_S
            if slow and not self.told_slow:
                self.told_slow = True
                self.shell.log.warning("the tunnel is still not connected after %.0f s: %s", down_s, self.detail)
            self._arrange_look(LOOK_SLOWLY_EVERY_S if slow else LOOK_EVERY_S)

    def _take(self, look: Look, now_s: float) -> None:
        learned = look.address != self.address
        self.offset, self.address = look.offset, look.address
        was, self.connected = self.connected, bool(look.connections)
        error = tunnelconfig.last_error(look.log)
        if self.connected:
            self.detail, self.refusals = self.warning, 0
            if not was:
                self.shell.log.info("https://%s is connected", self.settings.tunnel_hostname)
                self.shell.journal.write("tunnel_up", hostname=self.settings.tunnel_hostname)
        elif was:
            self.down_since_s = now_s
            self.detail = f"the connection to Cloudflare is lost: {error}" if error else "the connection to Cloudflare is lost"
            self.shell.log.warning("%s", self.detail)
            self.shell.journal.write("tunnel_down", why=self.detail)
        elif error:
            self.detail = f"not connected to Cloudflare: {error}"
        self.refusals += tunnelconfig.refusals(look.log)
        if learned or was != self.connected:
            self.service.remember(self._note())
        if self.refusals >= tunnelconfig.REFUSALS_TOLD and not self.connected:
            self._give_up(f"Cloudflare refuses the credentials {self.settings.cloudflared_creds}: {error}")
        elif self.connected and self.service.life.phase is Phase.starting:
            self.service.proved()
        self.reconcile()

    def _note(self) -> dict[str, str | int | float | None]:
        return {"made_for": self.made_for, "address": self.address, "offset": self.offset, "connected": int(self.connected)}

    # --- what is shown -----------------------------------------------------------------------------------

    def _publish(self, repeat: bool) -> None:
        configured = bool(self.settings.tunnel_hostname)
        phase = tunnelconfig.shown_phase(self.service.life.phase, self.connected)
        detail = self.detail
        if phase is Phase.stopped:
            detail = "waiting for the model" if configured else OFF
        state = self.service.state if self.service.alive else None
        before, now_s = self._published, time.monotonic()
        if before is None or before.phase is not phase:
            self._since_at = time.time()
        fact = TunnelFact(
            phase=phase, detail=redact.mask(detail), hostname=self.settings.tunnel_hostname or None,
            pid=state.server_pid if state else None, since_at=self._since_at, at_s=now_s,
        )  # fmt: skip
        self._published = fact
        if repeat or before is None or msgspec.structs.replace(before, at_s=now_s) != fact:
            self.shell.publish(fact)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read(path: Path, offset: int) -> tuple[str, int]:
    """(what was logged from `offset` on, the first LOOK_BYTES of it; where it ends now)."""
    try:
        with path.open("rb") as file:
            end = os.fstat(file.fileno()).st_size
            file.seek(offset if offset <= end else 0)  # shorter than it was: rotated
            return file.read(LOOK_BYTES).decode(errors="replace"), end
    except OSError:
        return "", offset


def _look(path: Path, offset: int, address: str | None) -> Look:
    """Blocks: beside the loop."""
    log, end = _read(path, offset)
    address = address or tunnelconfig.metrics_address(log)
    return Look(log, end, address, _connections(address) if address else None)


def _connections(address: str) -> int | None:
    connection = http.client.HTTPConnection(address, timeout=READY_WITHIN_S)
    try:
        connection.request("GET", "/ready")
        response = connection.getresponse()
        found = json.loads(response.read(4096))
        ready = found.get("readyConnections") if isinstance(found, dict) else None
        return ready if response.status == 200 and isinstance(ready, int) else 0
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()


def main(shell: Shell) -> None:
    """Set the tunnel manager up in its process."""
    tunnel = Tunnel(shell)
    shell.on_stop(tunnel.on_stop)
    shell.on_reload(tunnel.on_reload)
    shell.answer(ResetOrder, tunnel.on_reset)
    tunnel.begin()
    shell.subscribe(Worker.vllm, tunnel.on_server)
    shell.ready()
