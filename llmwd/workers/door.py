"""The front door's worker: runs Caddy, and tells it by files whether the model can be reached.

It stays up through every yield. It only listens on the bus, so no yield waits for it. Its configuration is made in
core/doorconfig.py; what it reads for every request is written in workers/doorsaid.py; its process is the holder's (workers/service.py).
"""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from llmwd import redact
from llmwd.adapters import caddy, listeners
from llmwd.adapters.rundir import door_socket, write_atomic
from llmwd.config import Loaded, Settings
from llmwd.core import doorconfig, restart
from llmwd.core.doorwanted import Account, Wanted, shuts_out
from llmwd.messages import Courtesy, Done, DoorFact, HolderState, Reply, ResetOrder, ServerFact
from llmwd.vocab import Phase, Worker
from llmwd.workers.base import Boot, Shell, repeat_every_s
from llmwd.workers.doorkeyring import Keyring
from llmwd.workers.doorsaid import Said
from llmwd.workers.service import Service

OFF = "off"
OPEN_WORD = "yes-i-mean-it"
GRACE_S = 1.0  # of its end: with us, the model ends as well
LOOK_FIRST_S, LOOK_EVERY_S = 0.05, 5.0
DEAF_AFTER = 3
LOAD_AGAIN_S = 5.0
FULL = "there is no room for more connections: who comes anew waits until others end"
THREADS, MEMORY = "4", "256MiB"  # Caddy would take all cores of a node; the memory is a wish to its collector


class Door:
    """See the module's text."""

    def __init__(self, shell: Shell):
        self.shell = shell
        self.settings: Settings = shell.boot.settings
        runtime = shell.boot.runtime
        self.folder = runtime / "door"
        self.config_path, self.wanted_path = runtime / "config-caddy.json", runtime / "config-caddy-of.json"
        self.socket, self.admin_socket = str(door_socket(runtime)), str(runtime / "door-admin.sock")
        self.admin = caddy.Admin(self.admin_socket)
        self.said = Said(shell, self.folder, self.reconcile)
        self.ring = Keyring(shell, self.reconcile)
        self.stopping = False
        self.detail, self.given_up = "", False
        self.loaded: Wanted | None = None  # what the living Caddy has, None: not known
        self.refused: Wanted | None = None  # what it did not take; not tried again for a moment
        self.refusal, self.full = "", False
        self._busy: object = None
        self._deaf = 0
        self._since_at = time.time()
        self._published: DoorFact | None = None
        self.service = Service(shell, "caddy", "caddy", self._policy(), self.reconcile, self.on_gone)

    def _policy(self) -> restart.Policy:
        s = self.settings
        return restart.Policy(
            intensity=s.restart_intensity, period_s=s.restart_period_s, first_s=0.0,
            backoff_min_s=s.backoff_min_s, backoff_max_s=s.backoff_max_s,
        )  # fmt: skip

    # --- what happens ------------------------------------------------------------------------------------

    def begin(self) -> None:
        """First thing: the keys, the files, and the Caddy that an earlier incarnation may have left."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.ring.begin()
        state = self.service.adopt()
        adopted = state is not None and state.releasing is None
        if adopted:
            self.loaded = self._kept()
            self.service.adopted(ready=bool(state.note.get("answers")))
            self.shell.log.info("caddy (pid %s) taken over, %s", state.server_pid, self.service.life.phase)
            self._look()
        self.said.begin(adopted)
        self.on_beat()

    def _kept(self) -> Wanted | None:
        try:
            return msgspec.json.decode(self.wanted_path.read_bytes(), type=Wanted)
        except (OSError, msgspec.DecodeError):
            return None

    def on_server(self, fact: ServerFact) -> None:
        self.said.heard(fact)
        self.reconcile()

    def on_reload(self, boot: Boot, loaded: Loaded) -> None:
        self.settings = boot.settings
        self.service.policy = self._policy()
        self._forgive()
        self.said.say()
        self.reconcile()

    def on_reset(self, order: ResetOrder, reply: Callable[[Reply], None]) -> None:
        self.shell.journal.write("reset", by=order.by)
        self._forgive()
        reply(Done(detail="failures forgotten"))
        self.reconcile()

    def on_stop(self, within_s: float) -> None:
        self.stopping = True
        self.said.shut()
        self.service.release(GRACE_S, "stopping")
        self.reconcile()

    def on_beat(self) -> None:
        if self.service.running:
            self.service.renew(time.monotonic() + self.settings.lease_ttl_s)
        self.said.repeat()
        self.reconcile(repeat=True)
        self.shell.at("repeat", time.monotonic() + repeat_every_s(self.settings), self.on_beat)

    def _forgive(self) -> None:
        self.refused = None
        if self.service.life.phase in (Phase.failed, Phase.backoff):
            self.detail, self.given_up = "", False
            self.service.reset()

    # --- what follows ------------------------------------------------------------------------------------

    def _wanted(self) -> Wanted:
        s, tls = self.settings, self.said.tls
        accounts = tuple(Account(key.name, key.bcrypt) for key in self.ring.in_force())
        return Wanted(
            folder=str(self.folder), socket=self.socket, admin=self.admin_socket, port=self._port(),
            tls=self.loaded is not None and self.loaded.tls if tls is None else tls,
            accounts=None if s.door_open == OPEN_WORD else accounts, lack=self.ring.lack, allow=s.door_allow,
            body_mb=s.door_max_body_mb, most=s.door_max_requests, hold_s=s.door_hold_s,
        )  # fmt: skip

    def _port(self) -> int | None:
        """DOOR_PORT, if it is Caddy's already or could be: with a port that it cannot have, Caddy would take nothing new."""
        wish = self.settings.door_port
        has = self.service.alive and (self.loaded is None or self.loaded.port == wish)
        return wish if wish and (has or listeners.is_free(wish)) else None

    def reconcile(self, repeat: bool = False) -> None:
        """Compare what is wanted with what runs, take the next step, show it."""
        service = self.service
        wanted = self.settings.door and not self.stopping
        if service.running:
            if not wanted:
                service.release(GRACE_S, "not wanted any more")
            elif service.life.phase is Phase.ready and self._busy is None:
                to_load = self._wanted()
                if to_load != self.refused and (to_load != self.loaded or self.refusal):  # after a refusal nobody knows what it has
                    self._load(to_load)
        elif wanted and not service.alive and service.life.phase is Phase.stopped and self._busy is None:
            self._plan()
        self._publish(repeat)
        if self.stopping and not service.alive:
            self.shell.finish()

    def _load(self, wanted: Wanted) -> None:
        # Gone before, there again after: what stands there is what Caddy has, whenever this ends.
        self.wanted_path.unlink(missing_ok=True)
        self._busy = token = object()
        self.shell.beside(lambda: self.admin.load(doorconfig.make(wanted)), lambda problem: self._config_loaded(token, wanted, problem))

    def _config_loaded(self, token: object, wanted: Wanted, problem: str | None) -> None:
        if token is not self._busy:
            return
        self._busy = None
        if problem == "":
            self.loaded, self.refused, self.refusal = wanted, None, ""
            with contextlib.suppress(OSError):  # a full disk: our next incarnation loads it once more
                write_atomic(self.wanted_path, msgspec.json.encode(wanted))
            self.shell.log.info("caddy has its new configuration, keys: %d", len(self.ring.in_force()))
        elif self.service.alive:
            self.refused, self.refusal = wanted, f"caddy does not take its new configuration: {problem}"
            self.shell.log.error("%s", self.refusal)
            if shuts_out(self.loaded, wanted):  # it still lets in who must not: a new process has it, or does not answer
                self.service.fail(self.refusal)
            else:
                self.shell.at("load-again", time.monotonic() + LOAD_AGAIN_S, self._load_again)
        self.reconcile()

    def _load_again(self) -> None:
        self.refused = None
        self.reconcile()

    def _plan(self) -> None:
        self._busy = token = object()
        wish = self.settings.caddy_bin
        self.shell.beside(lambda: caddy.survey(wish), lambda found: self._planned(token, found))

    def _planned(self, token: object, found: tuple[str, str] | None) -> None:
        if token is not self._busy:
            return
        self._busy = None
        if self.service.alive or self.service.life.phase is not Phase.stopped or self.stopping or not self.settings.door:
            return
        program, problem = found or ("", "caddy could not be looked at")
        if problem:
            self._give_up(problem)
        else:
            self._start(program)

    def _start(self, program: str) -> None:
        wanted, s = self._wanted(), self.settings
        try:
            write_atomic(self.config_path, doorconfig.make(wanted))
            write_atomic(self.wanted_path, msgspec.json.encode(wanted))
        except OSError as error:
            self.service.cannot_start(f"{self.config_path} cannot be written: {error.strerror}")
            return
        self.loaded, self.detail, self._deaf = wanted, "", 0
        home = str(self.folder / "caddy")
        env = {
            "PATH": os.defpath, "HOME": home, "XDG_DATA_HOME": home, "XDG_CONFIG_HOME": home, "GOMAXPROCS": THREADS, "GOMEMLIMIT": MEMORY,
        }  # fmt: skip
        self.shell.log.info("starting caddy: %s", program)
        io_priority = None if s.io_priority == "off" else int(s.io_priority)
        courtesy = Courtesy(nice=s.nice, oom_score_adj=s.oom_score_adj, io_priority=io_priority)
        self.service.start(
            (program, "run", "--config", str(self.config_path)), env, time.monotonic() + s.lease_ttl_s, GRACE_S,
            self.shell.boot.root_fd, {"answers": 0}, courtesy,
        )  # fmt: skip
        self._look()

    def _give_up(self, why: str) -> None:
        """A fault that no restart mends: said once, and left until the settings are read again or a reset."""
        self.detail, self.given_up = why, True
        self.shell.log.error("the front door cannot work: %s", why)
        self.shell.journal.write("door_failed", why=why)
        self.service.give_up()
        self._publish(False)

    def on_gone(self, state: HolderState | None, asked: bool) -> None:
        """Nothing of Caddy is left."""
        self.shell.cancel("look")
        self.loaded, self.refused, self.refusal, self.full = None, None, "", False
        self._busy = None
        Path(self.socket).unlink(missing_ok=True)
        if asked or self.given_up:
            return
        how = self.service.failed_why or (state.error if state and state.error else "") or "it ended by itself"
        self.detail = f"caddy: {how}"
        self.shell.log.error("%s (llmwd-ctl logs caddy)", self.detail)
        self.shell.journal.write("door_died", how=how, status=state.status if state else None)

    # --- whether it answers -------------------------------------------------------------------------------

    def _look(self) -> None:
        self.shell.beside(lambda: (caddy.answers(self.socket), self.admin.answers()), self._looked)

    def _looked(self, found: tuple[bool, bool] | None) -> None:
        phase = self.service.life.phase
        if not self.service.running:
            return
        answers, works = found or (False, False)
        if answers and phase is Phase.starting:
            self._proved()
        self._deaf = 0 if answers or works or phase is Phase.starting else self._deaf + 1
        if self._deaf >= DEAF_AFTER:
            self.service.fail("it does not answer")
            return
        if answers or works:
            self._has_room(answers)
        wait_s = LOOK_EVERY_S if self.service.life.phase is Phase.ready else LOOK_FIRST_S
        self.shell.at("look", time.monotonic() + wait_s, self._look)

    def _proved(self) -> None:
        self.detail = ""
        if self.service.state is not None and self.service.state.server_pid is not None:
            caddy.bound(self.service.state.server_pid)
        self.service.remember({"answers": 1})
        self.service.proved()
        self.shell.log.info("the front door answers at %s", self.socket)

    def _has_room(self, room: bool) -> None:
        """A Caddy that works and answers nobody new is full: killing it would cut the streams, and help whoever fills it."""
        if self.full == room:
            self.full = not room
            self.shell.log.warning("%s", FULL if self.full else "there is room for connections again")
            self.shell.journal.write("door_full" if self.full else "door_has_room")
            self._publish(False)

    # --- what is shown -----------------------------------------------------------------------------------

    def _publish(self, repeat: bool) -> None:
        s, phase, now_s = self.settings, self.service.life.phase, time.monotonic()
        before = self._published
        if before is None or before.phase is not phase:
            self._since_at = time.time()
        state = self.service.state if self.service.alive else None
        running = self.service.running
        port = self.loaded.port if running and self.loaded is not None else None
        detail = OFF if not s.door and not self.service.alive else "; ".join(filter(None, self._problems()))
        fact = DoorFact(
            phase=phase, detail=redact.mask(detail), socket=self.socket if running else None, port=port,
            keys=len(self.ring.in_force()), reachable=running and self.said.open, code=self.said.state.code,
            pid=state.server_pid if state else None, since_at=self._since_at, at_s=now_s,
        )  # fmt: skip
        self._published = fact
        if repeat or before is None or msgspec.structs.replace(before, at_s=now_s) != fact:
            self.shell.publish(fact)

    def _problems(self) -> tuple[str, ...]:
        wish = self.settings.door_port
        taken = f"DOOR_PORT: another program has port {wish}, so the door is not there" if wish and self._port() is None else ""
        return self.detail, self.said.problem, self.ring.problem, self.refusal, FULL if self.full else "", taken


def main(shell: Shell) -> None:
    """Set the front door's worker up in its process."""
    door = Door(shell)
    shell.on_stop(door.on_stop)
    shell.on_reload(door.on_reload)
    shell.answer(ResetOrder, door.on_reset)
    door.begin()
    shell.subscribe(Worker.vllm, door.on_server)
    shell.subscribe(Worker.resolver, door.said.heard_of_gpus)
    shell.ready()
