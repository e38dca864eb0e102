"""The vLLM manager: runs the model on the leased GPUs. One state and one reconcile of it, so one file.

It never decides whether a GPU is free.
It starts vLLM when the lease covers what the profile needs, and ends it when the lease is revoked, shrinks or
expires. What to do is decided in core/serving.py; the process tree is the holder's (workers/service.py).
"""

import hashlib
import os
import shutil
import socket
import time
from collections.abc import Callable
from typing import Any

import msgspec

from llmwd import redact
from llmwd.adapters import serverlog
from llmwd.adapters.rundir import SOCKET_PATH_BYTES, read_fact
from llmwd.config import (
    ConfigError,
    Loaded,
    Profile,
    Settings,
    api_key,
    base_url,
    endpoint,
    load,
    serve_argv,
    serve_environment,
    set_active,
)
from llmwd.core import restart
from llmwd.core.serving import Plan, Serving, plan, shown
from llmwd.messages import (
    Done,
    GpusFact,
    HolderState,
    Lease,
    Refused,
    Released,
    Reply,
    ResetOrder,
    ServerFact,
    SwitchOrder,
)
from llmwd.vocab import NodePhase, Phase, Reason, Worker
from llmwd.workers.base import Boot, Shell, repeat_every_s
from llmwd.workers.loadtimes import Loads
from llmwd.workers.neighbour import Neighbour
from llmwd.workers.load import Load
from llmwd.workers.readiness import Readiness
from llmwd.workers.service import Service

RPC_SOCKET_NAME = len("/01234567-89ab-cdef-0123-456789abcdef")
BAD_ARGUMENTS_EXIT = 2  # argparse: no restart mends it


class Model(msgspec.Struct, frozen=True):
    """What is told of a server, as its profile was when it was started."""

    profile: str
    model_name: str
    served_as: str
    bin: str


class Manager:
    """See the module's text."""

    def __init__(self, shell: Shell):
        self.shell = shell
        self.settings = shell.boot.settings
        self.profile: Profile | None = None
        self.config_detail = ""
        self.gpus: GpusFact | None = None
        self.stopping = False
        self.failure_detail = ""
        self.rpc_folder = shell.boot.runtime / "rpc"
        self.model: Model | None = None
        self.tree_lease: Lease | None = None
        self.tree_gpus: tuple[int, ...] | None = None
        self.recipe: str | None = None
        self.url: str | None = None
        self.started_at: float | None = None
        self.ready_at: float | None = None
        self.releasing: Reason | None = None
        self.readiness = Readiness(shell, self._ready, self._wedged)
        self.load = Load(shell)
        self.neighbour = Neighbour(shell)
        self.loads = Loads(shell)
        self.released: Released | None = None
        self.revoked_s: float | None = None
        self._shown: tuple[NodePhase, Reason] | None = None
        self._since_at = time.time()
        self._published: ServerFact | None = None
        self.service = Service(shell, "vllm", "server", self._policy(), self.reconcile, self.on_gone)

    def _policy(self) -> restart.Policy:
        s = self.settings
        return restart.Policy(
            intensity=s.restart_intensity, period_s=s.restart_period_s, first_s=s.backoff_min_s,
            backoff_min_s=s.backoff_min_s, backoff_max_s=s.backoff_max_s,
        )

    # --- what happens ------------------------------------------------------------------------------------

    def begin(self, loaded: Loaded) -> None:
        """First thing: the profile, and the tree that an earlier incarnation may have left."""
        self._take(loaded)
        kept = read_fact(self.shell.boot.runtime, Worker.vllm)
        if kept is not None and isinstance(kept.fact, ServerFact) and kept.fact.at_s <= time.monotonic():  # of this boot
            self.revoked_s = kept.fact.revoked_s
        state = self.service.adopt()
        if state is not None and state.releasing is None:
            self._remember_tree(state)
            self.service.adopted(ready=self.ready_at is not None)
            self.shell.log.info("vLLM (pid %s) taken over, %s", state.server_pid, self.service.life.phase)
            if self.ready_at is not None:
                self.load.begin(self.url)
            else:
                self._limit_start(state.started_s)
        self.reconcile()

    def on_gpus(self, fact: GpusFact) -> None:
        self.gpus = fact
        if fact.revocation is not None:
            self.revoked_s = max(fact.revocation.revoked_s, self.revoked_s or 0.0)
        self.reconcile()

    def on_reload(self, boot: Boot, loaded: Loaded) -> None:
        self.settings = boot.settings
        self.service.policy = self._policy()
        self._take(loaded)
        self.reconcile()

    def on_switch(self, order: SwitchOrder, reply: Callable[[Reply], None]) -> None:
        def loaded(result: Loaded | None) -> None:
            if result is None or result.profile is None or result.settings is None:
                problems = tuple(str(problem) for problem in result.problems) if result else ("it could not be read",)
                reply(Refused(problems=problems))
                return
            program = result.profile.llm_bin
            if not os.access(program, os.X_OK):
                # The configuration only warns of it, because it may be installed later; a running model is worth more.
                reply(Refused(problems=(f"{order.profile}: {program} is not a program: install vLLM there, or set LLM_VENV",)))
                return
            try:
                set_active(self.shell.boot.home, order.profile)
            except (OSError, ConfigError) as error:
                reply(Refused(problems=(f"active-model.env cannot be set: {error}",)))
                return
            self.shell.journal.write("switched", profile=order.profile, by=order.by)
            self.shell.log.info("switched to %s by %s", order.profile, order.by)
            self._take(result)
            self._forgive()
            reply(Done(detail=f"{order.profile} is the active profile now"))
            self.reconcile()

        self.shell.load_config(order.profile, loaded)

    def on_reset(self, order: ResetOrder, reply: Callable[[Reply], None]) -> None:
        self.shell.journal.write("reset", by=order.by)

        def loaded(result: Loaded | None) -> None:
            if result is not None:
                self._take(result)
            self._forgive()
            reply(Done(detail="failures forgotten"))
            self.reconcile()

        self.shell.load_config(None, loaded)

    def on_stop(self, within_s: float) -> None:
        self.stopping = True
        self.reconcile()

    def on_beat(self) -> None:
        if self.service.alive and not self.service.releasing and self.service.state is not None and self.tree_gpus:
            self.neighbour.beat(self.settings, self.gpus, self.tree_gpus, self.service.state.pid)
        self.reconcile(repeat=True)
        self.shell.at("repeat", time.monotonic() + repeat_every_s(self.settings), self.on_beat)

    def _take(self, loaded: Loaded) -> None:
        """The profile from now on; one that is not valid leaves the last valid one in force."""
        if loaded.profile is not None and loaded.settings is not None:
            self.profile, self.config_detail = loaded.profile, ""
            return
        self.config_detail = "; ".join(str(problem) for problem in loaded.problems)
        for problem in loaded.problems:
            self.shell.log.error("%s", problem)

    def _forgive(self) -> None:
        self.failure_detail = ""
        if self.service.life.phase in (Phase.failed, Phase.backoff):
            self.service.reset()

    # --- what follows ------------------------------------------------------------------------------------

    def reconcile(self, repeat: bool = False) -> None:
        """Compare what may run with what runs, take the next step, show it."""
        now_s = time.monotonic()
        planned = plan(self._serving(), now_s)
        if planned.end is not None and not self.service.releasing:
            self._release(planned.end)
        elif self.service.alive and planned.end is None and self.gpus is not None and self.gpus.lease is not None:
            self.service.renew(self.gpus.lease.expires_s)
        elif planned.run is not None and not self.service.alive and self.service.life.phase is Phase.stopped:
            self._start(planned.run)
        if self.service.running and planned.end is None and not self.readiness.asks:
            self._ask_whether_it_answers()
        if self.gpus is not None and self.gpus.lease is not None and self.gpus.lease.expires_s > now_s:
            self.shell.at("lease", self.gpus.lease.expires_s, self.reconcile)
        self._publish(planned, now_s, repeat)
        if self.stopping and not self.service.alive:
            self.shell.finish()

    def _release(self, reason: Reason) -> None:
        # vLLM swallows one SIGTERM while it loads, and nobody waits for an answer then.
        grace_s = self.settings.yield_grace_s if self.service.life.phase is Phase.ready else 0.0
        self.releasing = reason
        self.readiness.end()
        self.service.release(grace_s, reason)
        self.shell.log.warning("giving GPUs %s back: %s", list(self.tree_gpus or ()), reason)

    def _start(self, lease: Lease) -> None:
        profile, settings = self.profile, self.settings
        try:
            argv = serve_argv(profile, settings, len(lease.gpus))
        except ConfigError as error:
            self._cannot(str(error))
            return
        where = endpoint(profile, settings)
        if _port_taken(where.host, where.port):
            self.service.cannot_start(f"port {where.port} is in use by another program: free it, or set SERVER_PORT")
            return
        self.model = _model(profile, settings)
        self.tree_lease, self.tree_gpus = lease, lease.gpus
        self.recipe, self.url = self._recipe_of(profile), base_url(profile, settings)
        self.started_at, self.ready_at, self.releasing = time.time(), None, None
        env = serve_environment(profile, settings, lease.uuids, os.environ, self.shell.boot.api_key)
        self._make_rpc_folder(env)
        self.shell.log.info("starting %s on GPUs %s: %s", profile.name, list(lease.gpus), argv[0])
        courtesy = self.neighbour.wish(settings, self.gpus, lease.gpus)
        root_fd = self.shell.boot.root_fd
        self.service.start(argv, env, lease.expires_s, settings.yield_grace_s, root_fd, self._note(), courtesy)
        if not self.service.alive:
            return  # told as a death already
        self.shell.journal.write("server_started", profile=profile.name, gpus=lease.gpus, epoch=lease.epoch)
        self._limit_start(time.monotonic())

    def _limit_start(self, started_s: float) -> None:
        self.shell.at("start-timeout", started_s + self.settings.start_timeout_s, lambda: self._took_too_long(started_s))

    def _make_rpc_folder(self, env: dict[str, str]) -> None:
        """vLLM leaves seven sockets behind at each end, in TMPDIR unless it is told another folder: one that we remove."""
        shutil.rmtree(self.rpc_folder, ignore_errors=True)
        fits = len(os.fsencode(self.rpc_folder)) + RPC_SOCKET_NAME <= SOCKET_PATH_BYTES
        if fits and "VLLM_RPC_BASE_PATH" not in env:
            self.rpc_folder.mkdir(mode=0o700, exist_ok=True)
            env["VLLM_RPC_BASE_PATH"] = str(self.rpc_folder)

    def _took_too_long(self, started_s: float) -> None:
        if self.service.alive and self.service.life.phase is Phase.starting:
            self.service.fail(f"not ready {time.monotonic() - started_s:.0f} s after its start (START_TIMEOUT)")

    def _cannot(self, why: str) -> None:
        self.failure_detail = why
        self.shell.log.error("%s", why)
        self.service.give_up()

    def on_gone(self, state: HolderState | None, asked: bool) -> None:
        """Nothing of the tree is left."""
        if self.tree_lease is not None:
            gone_s = state.gone_s if state is not None and state.gone_s is not None else time.monotonic()
            self.released = Released(epoch=self.tree_lease.epoch, gone_s=gone_s)
        self._journal_release(state, asked)
        shutil.rmtree(self.rpc_folder, ignore_errors=True)
        self.load.end()
        self.readiness.end()
        self.neighbour.gone()
        self.tree_lease = self.tree_gpus = self.recipe = self.url = self.started_at = self.ready_at = None
        self.releasing = None
        if asked:
            return
        status = state.status if state is not None else None
        lines = serverlog.cause(self.shell.boot.logs / "server.log")
        how = state.error if state is not None and state.error else self.service.failed_why or _how(status)
        self.failure_detail = f"{how}: {lines}" if lines and status is not None else how
        self.shell.log.error("vLLM ended by itself: %s (llmwd-ctl logs server)", self.failure_detail)
        self.shell.journal.write("server_died", how=self.failure_detail, status=status)
        if (state is not None and state.error) or status == BAD_ARGUMENTS_EXIT:
            self.service.give_up()

    def _journal_release(self, state: HolderState | None, asked: bool) -> None:
        if not asked:
            return
        lease_epoch = self.tree_lease.epoch if self.tree_lease else None
        revocation = self.gpus.revocation if self.gpus is not None else None
        parts: dict[str, Any] = {}
        if revocation is not None and revocation.epoch == lease_epoch:
            parts = {name: getattr(revocation, name) for name in ("job", "seen_s", "resolved_s", "revoked_s", "detail")}
        if state is not None:
            parts |= {name: getattr(state, name) for name in ("signalled_s", "model_gone_s", "gone_s", "killed_s")}
        else:  # the holder was lost, and what it left was killed
            now_s = time.monotonic()
            parts |= {"signalled_s": None, "model_gone_s": now_s, "gone_s": now_s, "killed_s": now_s}
        cut = {"requests": self.load.requests, "requests_looked_s": self.load.looked_s}  # as of the last look
        self.shell.journal.write("released", reason=self.releasing, epoch=lease_epoch, gpus=self.tree_gpus, **parts, **cut)
        took_s = parts["gone_s"] - (parts["signalled_s"] or parts["gone_s"])
        self.shell.log.info("GPUs %s are given back, %.3f s after the signal", list(self.tree_gpus or ()), took_s)

    # --- whether it answers ------------------------------------------------------------------------------

    def _ask_whether_it_answers(self) -> None:
        """With its profile's key. One that has become invalid since a former incarnation of ours started the server takes
        nothing down: it is asked once the profile is valid again."""
        profile = self.profile
        if profile is not None and profile.name == self.model.profile:
            key = api_key(profile, self.settings, self.shell.boot.api_key)
            self.readiness.begin(self.url, self.model.served_as, key, ready=self.ready_at is not None)

    def _wedged(self) -> None:
        self.service.fail("it says that it is healthy and answers nothing")

    def _ready(self) -> None:
        self.ready_at = time.time()
        self.failure_detail = ""
        took_s = self.ready_at - (self.started_at or self.ready_at)
        self.shell.log.info("%s answers at %s, %.1f s after its start", self.model.profile, self.url, took_s)
        self.shell.journal.write("server_ready", profile=self.model.profile, took_s=took_s, url=self.url)
        if self.service.state is not None:
            self.loads.measured(self.model.profile, time.monotonic() - self.service.state.started_s)
        self.service.remember(self._note())
        self.service.proved()
        self.load.begin(self.url)

    # --- what a next incarnation needs to know -------------------------------------------------------------

    def _note(self) -> dict[str, str | int | float | None]:
        return {
            **msgspec.structs.asdict(self.model), "recipe": self.recipe, "url": self.url,
            "gpus": ",".join(map(str, self.tree_gpus)), "epoch": self.tree_lease.epoch,
            "started_at": self.started_at, "ready_at": self.ready_at,
        }

    def _remember_tree(self, state: HolderState) -> None:
        note = state.note
        self.model = Model(*(str(note.get(name) or "") for name in Model.__struct_fields__))
        self.recipe, self.url = str(note["recipe"]), str(note["url"])
        self.tree_gpus = tuple(int(word) for word in str(note["gpus"]).split(",") if word)
        self.tree_lease = Lease(epoch=int(note["epoch"]), gpus=self.tree_gpus, uuids=(), granted_s=0.0, expires_s=0.0)
        self.started_at, self.ready_at = _number(note["started_at"]), _number(note["ready_at"])

    def _recipe_of(self, profile: Profile) -> str:
        """What the server would be started with, but for the GPUs: if this changes, it has to be started anew."""
        argv = serve_argv(profile, self.settings, profile.num_gpus)
        env = serve_environment(profile, self.settings, (), os.environ, self.shell.boot.api_key)
        return hashlib.sha256(msgspec.json.encode([argv, sorted(env.items())])).hexdigest()

    # --- what is shown -----------------------------------------------------------------------------------

    def _serving(self) -> Serving:
        return Serving(
            gpus=self.gpus, phase=self.service.life.phase, alive=self.service.alive, tree_gpus=self.tree_gpus,
            recipe=self.recipe, wanted_recipe=self._wanted_recipe(),
            profile_gpus=self.profile.num_gpus if self.profile else 0, config_detail=self.config_detail,
            failure_detail=self.failure_detail, releasing_reason=self._releasing_reason(), stopping=self.stopping,
            revoked_s=self.revoked_s, lease_ttl_s=self.settings.lease_ttl_s,
        )

    def _releasing_reason(self) -> Reason | None:
        state = self.service.state
        if self.releasing is None and self.service.alive and state is not None and state.releasing is not None:
            return Reason.lease_expired if state.releasing == Reason.lease_expired else Reason.server_backoff
        return self.releasing if self.service.alive else None

    def _wanted_recipe(self) -> str | None:
        if self.profile is None:
            return None
        if self._recipe_key is not self.profile or self._recipe_settings is not self.settings:
            try:
                self._recipe_value = self._recipe_of(self.profile)
            except ConfigError as error:
                self._recipe_value, self.config_detail = None, str(error)
            self._recipe_key, self._recipe_settings = self.profile, self.settings
        return self._recipe_value

    _recipe_key: Profile | None = None
    _recipe_settings: object = None
    _recipe_value: str | None = None

    def _publish(self, planned: Plan, now_s: float, repeat: bool) -> None:
        node_phase, reason, detail = shown(self._serving())
        if self._shown != (node_phase, reason):
            self.shell.journal.write("phase", phase=node_phase, reason=reason, detail=detail)
            if self._shown is None or self._shown[0] is not node_phase:
                self._since_at = time.time()
            self._shown = (node_phase, reason)
        state = self.service.state if self.service.alive else None
        model = self.model if self.service.alive else _model(self.profile, self.settings)
        self.neighbour.read(state.server_pid if state else None, self.service.life.phase)
        fact = ServerFact(
            profile=model.profile if model else None, model_name=model.model_name if model else None,
            served_as=model.served_as if model else None, wanted_gpus=planned.wanted_gpus,
            phase=self.service.life.phase, node_phase=node_phase, reason=reason, detail=redact.mask(detail), since_at=self._since_at,
            holding=self.tree_gpus if self.service.alive and self.tree_gpus else (),
            lease_epoch=self.tree_lease.epoch if self.tree_lease else None,
            pid=state.server_pid if state else None, holder_pid=state.pid if state else None, url=self.url,
            bin=model.bin if model else None,
            ready_at=self.ready_at, started_at=self.started_at,
            load_s=self.loads.expected_s(self.profile.name if self.profile else None), deaths=self.service.deaths,
            released=self.released, revoked_s=self.revoked_s, heard_s=self.gpus.at_s if self.gpus else 0.0, at_s=now_s,
            courtesy=self.neighbour.found, courtesy_detail=self.neighbour.detail if self.neighbour.found else "",
        )
        before, self._published = self._published, fact
        if repeat or before is None or msgspec.structs.replace(before, at_s=now_s) != fact:
            self.shell.publish(fact)


def _model(profile: Profile | None, settings: Settings) -> Model | None:
    if profile is None:
        return None
    return Model(profile.name, profile.model_name, endpoint(profile, settings).served_as, profile.llm_bin)


def _how(status: int | None) -> str:
    if status is None:
        return "it ended without a word"
    return f"killed by signal {-status}" if status < 0 else f"exit code {status}"


def _port_taken(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError:
            return True
    return False


def _number(value: str | float | None) -> float | None:
    return float(value) if value is not None else None


def main(shell: Shell) -> None:
    """Set the manager up in its process."""
    manager = Manager(shell)
    shell.on_stop(manager.on_stop)
    shell.on_reload(manager.on_reload)
    shell.answer(SwitchOrder, manager.on_switch)
    shell.answer(ResetOrder, manager.on_reset)
    manager.begin(load(shell.boot.home))
    shell.subscribe(Worker.resolver, manager.on_gpus)
    shell.subscribe(Worker.detector, manager.neighbour.on_jobs)
    manager.on_beat()
    shell.ready()
