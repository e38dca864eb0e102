"""The tunnel manager: public access through cloudflared.

With the front door on, the tunnel follows the door and stays up through every yield. Without it, it follows the
server: it comes up once the model answers, and goes after the server is gone. It only listens on the bus, so no yield
waits for it. Only /ready of cloudflared's metrics server tells connected from merely running. What it is started
with is decided in core/tunnelconfig.py, what its words and its end mean in core/tunnelfaults.py; its process is the
holder's (workers/service.py).
"""

import random
import time
from collections.abc import Callable

import msgspec

from llmwd import redact
from llmwd.adapters.rundir import door_socket
from llmwd.config import Loaded, Settings
from llmwd.core import restart, tunnelconfig, tunnelfaults
from llmwd.core.tunnelconfig import NONE, QUICK
from llmwd.core.tunnelfaults import Kind
from llmwd.messages import Done, DoorFact, HolderState, Reply, ResetOrder, ServerFact, TunnelFact
from llmwd.vocab import Phase, Worker
from llmwd.workers.base import Boot, Shell, repeat_every_s
from llmwd.workers.service import Service
from llmwd.workers.tunnelplan import Plan, made_for, secret_file
from llmwd.workers.tunnelplanner import Planner
from llmwd.workers.tunnelwatch import Link, Watch

TERM_AGAIN_S = tunnelconfig.GRACE_S + 3.0  # it has not ended by then: name servers that do not answer, a stuck drain
RELEASE_GRACE_S = TERM_AGAIN_S + 2.0
STOP_MARGIN_S = 1.5  # of an ordered stop's time that is kept for SIGKILL and for saying so


class Tunnel:
    """See the module's text."""

    def __init__(self, shell: Shell):
        self.shell = shell
        self.settings: Settings = shell.boot.settings
        self.server: ServerFact | None = None
        self.door: DoorFact | None = None
        self.door_since_s = 0.0  # its phase is this one
        self.heard = False  # of whom the tunnel follows, since this incarnation began
        self.stopping = False
        self.made_for: str | None = None  # the settings and the address that the living cloudflared was started for
        self.given_up = False
        self.note: dict[str, str | int | float | None] = {}  # the last one that its holder keeps for us
        self.detail = ""
        self.log_path = shell.boot.logs / "cloudflared.log"
        self.config_path = shell.boot.runtime / "config-cloudflared.yml"
        self._since_at = time.time()
        self._published: TunnelFact | None = None
        self.service = Service(
            shell, "cloudflared", "cloudflared", self._policy(), self.reconcile, self.on_gone, self._retry_after_s
        )
        self.planner = Planner(shell, self.config_path, self._planned, self.reconcile)
        self.watch = Watch(shell, self.log_path, self._runs, self._on_look, self._on_slow, self.service.fail)

    def _policy(self) -> restart.Policy:
        s = self.settings
        return restart.Policy(
            intensity=s.restart_intensity, period_s=s.restart_period_s, first_s=s.backoff_min_s,
            backoff_min_s=s.backoff_min_s, backoff_max_s=s.backoff_max_s,
        )  # fmt: skip

    def _runs(self) -> bool:
        return self.service.running

    # --- what happens ------------------------------------------------------------------------------------

    def begin(self) -> None:
        """First thing: the cloudflared that an earlier incarnation may have left."""
        state = self.service.adopt()
        if state is not None and state.releasing is None:
            self.made_for, self.planner.stamp = str(state.note.get("made_for") or "") or None, str(state.note.get("stamp") or "")
            link = Link.of_note(state.note, self.settings.tunnel_protocol)
            self.service.adopted(ready=link.connections > 0)
            self.shell.log.info("cloudflared (pid %s) taken over, %s", state.server_pid, self.service.life.phase)
            self.watch.begin(link, 0.0)
        self.on_beat()

    def on_server(self, fact: ServerFact) -> None:
        self.server, self.heard = fact, self.heard or not self.settings.door
        self.reconcile()

    def on_door(self, fact: DoorFact) -> None:
        if self.door is None or self.door.phase is not fact.phase:
            self.door_since_s = time.monotonic()
            self.shell.at("door", self.door_since_s + tunnelconfig.DOOR_AWAY_S, self.reconcile)
        self.door, self.heard = fact, self.heard or self.settings.door
        self.reconcile()

    def on_reload(self, boot: Boot, loaded: Loaded) -> None:
        self.settings = boot.settings
        self.service.policy = self._policy()
        self._forgive()  # whatever was wrong may be mended now, in the files that the settings name as well
        self.reconcile()
        self.planner.look(self.settings, self._files_changed)

    def on_reset(self, order: ResetOrder, reply: Callable[[Reply], None]) -> None:
        self.shell.journal.write("reset", by=order.by)
        self._forgive()
        reply(Done(detail="failures forgotten"))
        self.reconcile()

    def on_stop(self, within_s: float) -> None:
        self.stopping = True
        self._release(max(0.0, min(RELEASE_GRACE_S, within_s - STOP_MARGIN_S)), "stopping")
        self.reconcile()

    def on_beat(self) -> None:
        if self.service.running:
            self.service.renew(time.monotonic() + self.settings.lease_ttl_s)
        elif self.given_up:
            self.planner.look(self.settings, self._files_changed)
        self.reconcile(repeat=True)
        self.shell.at("repeat", time.monotonic() + repeat_every_s(self.settings), self.on_beat)

    def _files_changed(self) -> None:
        why = "cloudflared or the file with its secret has changed"
        if self.given_up:
            self.shell.log.info("%s: the tunnel is tried again", why)
            self._forgive()
            self.reconcile()
        elif self._runs():
            self._take_down(why)

    def _forgive(self) -> None:
        if self.service.life.phase in (Phase.failed, Phase.backoff):
            self.detail, self.given_up, self.watch.link.faults = "", False, 0
            self.service.reset()

    # --- what follows ------------------------------------------------------------------------------------

    def reconcile(self, repeat: bool = False) -> None:
        """Compare what is wanted with what runs, take the next step, show it."""
        service = self.service
        url = self._origin()
        if service.running:
            why = self._why_end(url)
            if why:
                self._take_down(why)
        elif url is not None and not service.alive and service.life.phase is Phase.stopped and not self.planner.busy:
            self.planner.begin(self.settings, url)
        self._publish(repeat)
        if self.stopping and not service.alive:
            self.shell.finish()

    def _take_down(self, why: str) -> None:
        self.shell.log.info("taking the tunnel down: %s", why)
        self._release(RELEASE_GRACE_S, why)

    def _release(self, grace_s: float, why: str) -> None:
        first = not self.service.releasing  # a second release moves nothing to later
        self.service.release(grace_s, why)
        if first and grace_s > TERM_AGAIN_S:
            self.shell.at("term", time.monotonic() + TERM_AGAIN_S, self.service.terminate_again)

    def _origin(self) -> str | None:
        if self.stopping or self.settings.tunnel_mode == NONE:
            return None
        if self.settings.door:
            phase, at_s = (self.door.phase, self.door.at_s) if self.door else (None, 0.0)
            socket = str(door_socket(self.shell.boot.runtime))
            return tunnelconfig.door_origin(
                socket, phase, self.door_since_s, at_s, self.service.alive, 2 * self.settings.lease_ttl_s, time.monotonic()
            )
        # Without its lease renewed, vLLM has ended after one LEASE_TTL, and its worker's death grows no younger fact.
        return tunnelconfig.origin(self.server, self.service.alive, 2 * self.settings.lease_ttl_s, time.monotonic())

    def _why_end(self, url: str | None) -> str:
        if url is None:
            # Just restarted, we have not heard of the server yet: leave what runs.
            waiting = not self.heard and not self.stopping and self.settings.tunnel_mode != NONE
            return "" if waiting else "the front door is gone" if self.settings.door else "the model is not served any more"
        return "" if self.made_for == made_for(self.settings, url) else "its settings have changed"

    def _planned(self, plan: Plan) -> None:
        if self.service.alive or self.service.life.phase is not Phase.stopped:
            return
        url = self._origin()
        if url is None or plan.made_for != made_for(self.settings, url):  # another one is wanted by now, or none
            self.reconcile()
            return
        if plan.problems:
            self._give_up(plan.why)
        elif plan.recipe is None:
            self.detail = plan.passing
            self.service.cannot_start(plan.passing)
        else:
            self._start(url, plan)

    def _start(self, url: str, plan: Plan) -> None:
        now_s = time.monotonic()
        self.made_for, self.given_up, self.detail = plan.made_for, False, "connecting to Cloudflare"
        self.watch.begin(Link(self.watch.size(), self.settings.tunnel_protocol, self.watch.link.faults))
        self.note = self._note()
        self.shell.log.info(
            "starting the tunnel (%s, cloudflared %s) from %s to %s", self.settings.tunnel_mode, plan.version,
            self.settings.tunnel_hostname or "Cloudflare", url,
        )  # fmt: skip
        # If the root dies, all has to be gone within LEASE_TTL.
        grace_s = min(RELEASE_GRACE_S, self.settings.lease_ttl_s / 2)
        self.service.start(
            plan.recipe.argv, plan.recipe.env, now_s + self.settings.lease_ttl_s, grace_s, self.shell.boot.root_fd,
            {**self.note, "offset": self.watch.link.offset},
        )
        self.shell.journal.write("tunnel_started", hostname=self.settings.tunnel_hostname, url=url)
        self._publish(False)

    def _give_up(self, why: str) -> None:
        """A fault that no restart mends: said once, and left until something changes or the operator resets it."""
        self.detail, self.given_up = why, True
        self.shell.log.error("the tunnel cannot work: %s", why)
        self.shell.journal.write("tunnel_failed", why=why)
        self.service.give_up()
        self.service.release(0.0, why)
        self._publish(False)

    # --- its end -----------------------------------------------------------------------------------------

    def _judged(self, state: HolderState | None) -> tunnelfaults.Death:
        if self.service.failed_why:  # we killed it, or its holder did: then its exit status tells nothing
            return tunnelfaults.Death(Kind.network if self.watch.link.stuck else Kind.own, self.service.failed_why)
        words = self.watch.last_words()
        listened = self.watch.link.address is not None or tunnelfaults.metrics_address(words) is not None
        return tunnelfaults.death(state.status if state else None, state.error if state else "", words, listened)

    def _retry_after_s(self, state: HolderState | None) -> float | None:
        if self._judged(state).kind is not Kind.network:
            return None
        link, s = self.watch.link, self.settings
        link.faults += 1
        if link.stuck and link.faults == 1:
            return 0.0  # the edge answers again: that was the wait
        return tunnelfaults.retry_after_s(link.faults, s.backoff_min_s, s.backoff_max_s, random.random())

    def on_gone(self, state: HolderState | None, asked: bool) -> None:
        """Nothing of cloudflared is left."""
        self.shell.cancel("term")
        death = None if asked or self.given_up else self._judged(state)
        self.made_for = None
        self.watch.end()
        if asked:
            self.detail = ""
            self.shell.log.info("the tunnel is down")
        elif death is not None and death.kind is Kind.permanent:
            self._give_up(death.how)
        elif death is not None:
            self.shell.log.error("%s (llmwd-ctl logs cloudflared)", death.how)
            self.shell.journal.write("tunnel_died", how=death.how, status=state.status if state else None)
            self.detail = death.how

    # --- whether it is connected ---------------------------------------------------------------------------

    def _on_look(self, before: int, error: str) -> None:
        link = self.watch.link
        if link.connections:
            self.detail = tunnelconfig.SLOW if link.silent else tunnelconfig.NO_STREAMS if self.settings.tunnel_mode == QUICK else ""
            if not before:
                hostname = self._hostname()
                what = f"https://{hostname}" if hostname else "the tunnel"  # the token's routes are the dashboard's
                self.shell.log.info("%s is connected (%s)", what, ", ".join(link.locations) or "somewhere")
                self.shell.journal.write("tunnel_up", hostname=hostname or "")
        elif before:
            self.detail = f"the connection to Cloudflare is lost: {error}" if error else "the connection to Cloudflare is lost"
            self.shell.log.warning("%s", self.detail)
            self.shell.journal.write("tunnel_down", why=self.detail)
        elif error:
            self.detail = f"not connected to Cloudflare: {error}"
        if self.note != self._note():
            self.note = self._note()
            self.service.remember({**self.note, "offset": link.offset})
        if link.refusals >= tunnelfaults.REFUSALS_TOLD and not link.connections:
            self._give_up(f"Cloudflare refuses the credentials {secret_file(self.settings)[1]}: {error}")
        elif link.connections and self.service.life.phase is Phase.starting:
            self.service.proved()
        self.reconcile()

    def _on_slow(self, down_s: float) -> None:
        self.shell.log.warning("the tunnel is still not connected after %.0f s: %s", down_s, self.detail)

    def _note(self) -> dict[str, str | int | float | None]:
        """What our next incarnation needs; without `offset`, which every look changes."""
        note = {"made_for": self.made_for, "stamp": self.planner.stamp, **self.watch.link.as_note()}
        del note["offset"]
        return note

    # --- what is shown -----------------------------------------------------------------------------------

    def _hostname(self) -> str | None:
        return (self.watch.link.hostname if self.settings.tunnel_mode == QUICK else self.settings.tunnel_hostname) or None

    def _publish(self, repeat: bool) -> None:
        s, link = self.settings, self.watch.link
        phase = tunnelconfig.shown_phase(self.service.life.phase, link.connections > 0)
        detail = self.detail
        if phase is Phase.stopped:
            detail = tunnelconfig.why_stopped(s.tunnel_mode, s.tunnel_hostname, s.door, self.planner.slow)
        state = self.service.state if self.service.alive else None
        before, now_s = self._published, time.monotonic()
        if before is None or before.phase is not phase:
            self._since_at = time.time()
        fact = TunnelFact(
            phase=phase, detail=redact.mask(detail), hostname=self._hostname(), pid=state.server_pid if state else None,
            since_at=self._since_at, at_s=now_s, mode=s.tunnel_mode, connections=link.connections, locations=link.locations,
            name=s.tunnel_name,
        )  # fmt: skip
        self._published = fact
        if repeat or before is None or msgspec.structs.replace(before, at_s=now_s) != fact:
            self.shell.publish(fact)


def main(shell: Shell) -> None:
    """Set the tunnel manager up in its process."""
    tunnel = Tunnel(shell)
    shell.on_stop(tunnel.on_stop)
    shell.on_reload(tunnel.on_reload)
    shell.answer(ResetOrder, tunnel.on_reset)
    tunnel.begin()
    shell.subscribe(Worker.vllm, tunnel.on_server)
    shell.subscribe(Worker.door, tunnel.on_door)
    shell.ready()
