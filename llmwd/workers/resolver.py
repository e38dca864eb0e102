"""The resolver: knows who has which GPU, and grants, renews and revokes the lease. One evaluation, so one file.

A shell around core/claims.py (what jobs have) and core/lease.py (what follows): it feeds them what the detector,
Slurm, the driver and the operator say, and publishes what they decide, at once.
"""

import socket
import time
from collections.abc import Callable

import msgspec

from llmwd.adapters.rundir import read_fact
from llmwd.config import Loaded, Settings
from llmwd.core import lease as leases
from llmwd.core import release as releases
from llmwd.core.claims import Claims, JobView
from llmwd.core.gpumap import GpuLike, GpuMap
from llmwd.core.lease import Evidence, Occupant, Situation
from llmwd.core.lookahead import Outlook
from llmwd.messages import (
    Expected,
    Gpu,
    GpusFact,
    JobClaim,
    JobSeen,
    JobsFact,
    Lease,
    ReleaseOrder,
    Reply,
    ResumeOrder,
    Revocation,
    ServerFact,
    YieldOrder,
)
from llmwd.vocab import Holder, Reason, Source, Worker
from llmwd.workers.base import Boot, Shell, repeat_every_s
from llmwd.workers.drivers import Driver
from llmwd.workers.nodegpus import NodeGpus
from llmwd.workers.prologs import Prologs
from llmwd.workers.shortage import Memory
from llmwd.workers.proving import Proving
from llmwd.workers.slurmdesk import SlurmDesk
from llmwd.workers.standing import Standing
from llmwd.workers.usage import Usage

# Evidence older than this part of LEASE_TTL renews nothing.
EVIDENCE_PART = 0.8


class Resolver:
    """See the module's text."""

    def __init__(self, shell: Shell):
        self.shell = shell
        self.settings = shell.boot.settings
        self.claims = Claims(self.settings.resolve_deadline_s)
        self.jobs: JobsFact | None = None
        self.seen: tuple[JobSeen, ...] | None = None  # the same with what prologs announced
        self.server: ServerFact | None = None
        self.manager_lost = False
        self.lease: Lease | None = None
        self.revocation: Revocation | None = None
        self.epoch = 0
        self.free_since: dict[str, float | None] = {}
        self.occupants: dict[str, Occupant] = {}
        self.memory = Memory()
        self.blocked: Reason | None = Reason.starting
        self.detail = ""
        self.proving = Proving(shell)
        self.expected: Expected | None = None
        self.prologs = Prologs(shell, self._unproved, self.evaluate)
        self.standing = Standing(shell, self.evaluate)
        self.usage = Usage(shell)
        self._published: GpusFact | None = None
        self._kept_s = float("-inf")
        self._told_until_s = 0.0  # the expiry of the lease as it was published last
        adopted = self._adopt()
        self._see()
        self._ask(adopted)

    # --- what it begins with -----------------------------------------------------------------------------

    def _adopt(self) -> GpusFact | None:
        """Take over the lease of our last incarnation, so that our death costs nobody the model; what that one knew."""
        envelope = read_fact(self.shell.boot.runtime, Worker.resolver)
        if envelope is None or not isinstance(envelope.fact, GpusFact):
            return None
        fact = envelope.fact
        self.epoch = fact.epoch
        self.revocation = fact.revocation
        self.proving.adopt(fact.proof, fact.revocation)
        self.memory.adopt(fact.memory)
        self.free_since = {gpu.uuid: gpu.free_since_s for gpu in fact.gpus}
        self.prologs.adopt(fact)
        if fact.lease is not None and fact.lease.expires_s > time.monotonic():
            self.lease = fact.lease
            self.shell.log.info("lease %d on GPUs %s taken over", self.epoch, list(self.lease.gpus))
        return fact if fact.gpus else None

    def _ask(self, adopted: GpusFact | None) -> None:
        """Begin to ask Slurm and the driver, by the settings as they are now."""
        self.desk = SlurmDesk(self.shell, self.claims, socket.gethostname(), self.evaluate)
        self.desk.ahead.adopt(adopted.plans if adopted is not None else ())
        self.driver = Driver(self.shell, self.evaluate)
        self.node = NodeGpus(self.shell, self.desk, self.driver, adopted)

    @property
    def map(self) -> GpuMap:
        return self.node.map

    # --- what happens ------------------------------------------------------------------------------------

    def on_jobs(self, fact: JobsFact) -> None:
        self.jobs = fact
        self._see()
        self.desk.pump()
        self.evaluate()

    def on_release(self, order: ReleaseOrder, reply: Callable[[Reply], None]) -> None:
        """A job that the prolog announces: seen like any other, and answered when its GPUs are free of us."""
        self.prologs.take(order, reply)
        self._see()
        self.evaluate()  # first the GPUs, then a question
        self.desk.pump()

    def _see(self) -> None:
        seen = self.prologs.announced.among(self.jobs.jobs if self.jobs else ())
        self.claims.see(seen, time.monotonic())
        self.seen = seen if self.jobs is not None else None

    def on_server(self, fact: ServerFact) -> None:
        self.server, self.manager_lost = fact, False
        self.driver.server_pid = fact.holder_pid
        self.evaluate()
        self.driver.learn()  # after it: nothing of this may keep a decision waiting

    def on_beat(self) -> None:
        self.driver.beat()
        self.memory.beat(self.settings, self._others(time.monotonic()))
        self._forget_a_lost_manager()
        self.evaluate(repeat=True)
        self.shell.at("repeat", time.monotonic() + repeat_every_s(self.settings), self.on_beat)

    def _others(self, now_s: float) -> bool:
        """Whether somebody besides us is on the node."""
        return bool(self.claims.views(now_s) or self.claims.used_by_node() or self._strangers())

    def _strangers(self) -> bool:
        return any(occupant.holder is Holder.other for occupant in self.driver.foreign(self.map.uuids).values())

    def _forget_a_lost_manager(self) -> None:
        """A manager in quarantine renews nothing: its tree has ended with the lease it knew, and needs none."""
        silent_s = time.monotonic() - self.server.at_s if self.server is not None else 0.0
        if silent_s > 2 * self.settings.lease_ttl_s + self.settings.yield_grace_s and self.server.wanted_gpus:
            self.server = msgspec.structs.replace(self.server, wanted_gpus=0, holding=())
            self.manager_lost = True

    def on_reload(self, boot: Boot, loaded: Loaded) -> None:
        before, self.settings = self.settings, boot.settings
        self.claims.resolve_deadline_s = boot.settings.resolve_deadline_s
        if _whom_to_ask(before) != _whom_to_ask(self.settings):
            self.desk.close()
            self.driver.close()
            self._ask(self._published if before.sim_gpus == self.settings.sim_gpus else None)
            self.driver.server_pid = self.server.holder_pid if self.server is not None else None
            self.driver.beat()
        else:
            self.desk.reload(boot.settings)
        self.evaluate()
        self.desk.pump()

    # --- what follows ------------------------------------------------------------------------------------

    def evaluate(self, repeat: bool = False) -> None:
        """Decide anew from all that is known, publish what changed."""
        now_s = time.monotonic()
        self.node.refresh(self.settings)
        if self.prologs.announced.expire(self.claims.reading, self.claims.used_by_node(), now_s):
            self._see()
        self.claims.trouble = self.desk.trouble(now_s)
        views = self.claims.views(now_s)
        holding = self.node.holding(self.server)
        if self.proving.follow(self.server, self.manager_lost, self.driver.shown(), now_s):
            self.driver.beat_soon()
        dirty = dict.fromkeys(holding, "processes of ours may still be there") | releases.dirty(self.proving.proof)
        ours = dirty.keys() | (self.lease.uuids if self.lease is not None else ())
        self.occupants = leases.occupy(self.map, views, self.claims.used_by_node(), self.driver.foreign(ours), dirty)
        self.free_since = leases.free_since(self.free_since, self.map.uuids, self.occupants, now_s)
        last = self.revocation = self.proving.name_job(self.occupants)
        situation = Situation(
            conflict_s=last.revoked_s if last is not None and last.reason in leases.CONFLICTS else float("-inf"), kept_s=self._kept_s,
            # A GPU cut into slices, or about to be, is left to whoever cut it; one without a name is lost.
            gpus=[gpu for gpu in self.node.gpus if gpu.uuid and not gpu.mig and not gpu.mig_uuids],
            gpu_map=self.map, occupants=self.occupants, free_since_s=self.free_since, gpus_why=self.driver.gpus_why(),
            wanted=self.server.wanted_gpus if self.server else 0, holding=holding,
            server_known=self.server is not None, revoked_s=self.server.revoked_s if self.server else None,
            server_epoch=self.server.released.epoch if self.server and self.server.released else 0, lease=self.lease,
            pending=any(view.pending for view in views) or self.claims.unsettled(),
            hold=self.standing.hold, node_states=self.desk.node_states(), evidence=self._evidence(now_s),
            epoch=self.epoch, memory_used={uuid: self.driver.used_bytes(uuid) for uuid in self.map.uuids},
            memory_short=self.memory.short, outlook=self._outlook(views),
        )
        self.expected = next(iter(situation.outlook.mine), None)
        leased = self.lease
        decision = leases.decide(situation, now_s, self.settings.lease_ttl_s, self.settings.resume_after_s)
        self.lease, self.blocked, self.detail = decision.lease, decision.blocked, decision.detail
        if decision.lease is not None:
            self._kept_s = now_s
        if decision.revocation is not None:
            self.revocation = decision.revocation
            self.proving.begin(leased, decision.revocation)
        if decision.granted:
            self.epoch = decision.lease.epoch
        self._publish(now_s, views, force=repeat or decision.granted or decision.revocation is not None)
        self._tell(decision)
        self.prologs.settle(now_s)
        self._arrange(now_s, decision)
        used = self.claims.used_by_node() if self.claims.reading is not None else None
        self.proving.look(self.seen, used, self.driver.jobs_on(), now_s)
        self._park_if_wrong(now_s, views)

    def _outlook(self, views: tuple[JobView, ...]) -> Outlook:
        """What is planned that can need the GPUs we have, or want."""
        ours = len(self.lease.gpus) if self.lease is not None else self.server.wanted_gpus if self.server is not None else 0
        others = sum(occupant.holder is not Holder.llmwd for occupant in self.occupants.values())
        load_s = self.server.load_s if self.server is not None else None
        return self.desk.ahead.outlook(ours, others, len(self.map.uuids), {view.id for view in views}, load_s)

    def _park_if_wrong(self, now_s: float, views: tuple[JobView, ...]) -> None:
        """Our own reasons to stay away until the operator has looked: last, because it decides anew."""
        wrong = self.node.contradicted(views)
        hold = self.standing.hold
        if wrong and (hold is None or hold.reason is not Reason.map_contradicted):
            self.standing.park(Reason.map_contradicted, wrong)
            return
        why, judge_at_s = self.proving.judge(self.driver.shown(), self.settings.yield_budget_s, now_s)
        if why:
            self.standing.park(Reason.budget_broken, why)
        elif judge_at_s is not None and judge_at_s > now_s:
            self.shell.at("budget", judge_at_s, self.evaluate)

    def _arrange(self, now_s: float, decision: leases.Decision) -> None:
        idle = self.lease is None and (self.server is None or self.server.wanted_gpus == 0)
        waits = self.lease is None and decision.blocked in (Reason.no_evidence, Reason.starting, Reason.resume_delay)
        if (idle, waits) != (self.desk.idle, self.desk.grant_waits):
            self.desk.idle, self.desk.grant_waits = idle, waits
            self.desk.pump()
        times = [self.claims.next_s(now_s), self.prologs.announced.next_s(now_s), decision.look_again_s]
        next_s = min((at for at in times if at is not None and at > now_s), default=None)
        if next_s is not None:
            self.shell.at("evaluate", next_s, self.evaluate)

    def _unproved(self, gpus: tuple[int, ...]) -> str:
        """Why it cannot be said that nothing of ours is on the GPUs that a job with these indices may have."""
        if gpus and (self.server is None or self.server.holding) and (unknown := self.node.unknown_why()):
            return unknown
        return releases.unproved(self.map.claimed(gpus), self.lease, self.proving.proof, self.server, self.node.holding(self.server))

    def _evidence(self, now_s: float) -> Evidence:
        renew_why = self._detector_why(now_s) or self.driver.renew_why()
        grant_why = self.desk.grant_why(now_s) or self.driver.grant_why(now_s)
        return Evidence(
            renew_why, grant_why, just_started=self.epoch == 0 and not self.desk.last_error,
            seen_s=self.jobs.at_s if self.jobs is not None else None,
        )

    def _detector_why(self, now_s: float) -> str:
        if self.jobs is None:
            return "the detector has not reported yet"
        age_s = now_s - self.jobs.at_s
        if age_s > self.settings.lease_ttl_s * EVIDENCE_PART:
            return f"the detector has been silent for {age_s:.0f} s"
        if not self.jobs.scanned:
            broken = [f"{state.name}: {state.why}" for state in self.jobs.sources if not state.works and state.why]
            return "detection is not complete: " + ("; ".join(broken) or "not every source has been read")
        return ""

    def _publish(self, now_s: float, views: tuple[JobView, ...], force: bool) -> None:
        sources = (self.desk.state, self.driver.state, *self.prologs.state)
        fact = GpusFact(
            gpus=tuple(self._gpu(gpu) for gpu in sorted(self.node.gpus, key=lambda gpu: self.map.likely.get(gpu.uuid, gpu.index))),
            lease=self.lease, revocation=self.revocation,
            claims=tuple(
                JobClaim(
                    id=view.id, gpus=None if view.gpus is None or view.covered or view.pending else tuple(sorted(view.gpus)),
                    sources=view.sources, leaving=view.leaving, user=view.user, ends_at=view.ends_at,
                )
                for view in views
            ),
            sources=sources, hold=self.standing.hold, blocked=self.blocked, detail=self.detail,
            node_states=self.desk.node_states(), epoch=self.epoch, proof=self.proving.proof, map_certain=self.map.certain,
            map_why=self.map.why, map_by_index=self.map.by_index, memory=self.memory.fact, expected=self.expected, plans=self.desk.ahead.plans, at_s=now_s,
        )
        before, self._published = self._published, fact
        if force or before is None or _quiet(before) != _quiet(fact) or self._renewed():
            self._told_until_s = self.lease.expires_s if self.lease is not None else 0.0
            self.shell.publish(fact)
        self.usage.note(fact.gpus)

    def _renewed(self) -> bool:
        """Renewed by as much as is worth telling before the next beat: a manager that hangs then has the longer for it."""
        return self.lease is not None and self.lease.expires_s - self._told_until_s > self.settings.lease_ttl_s / 8

    def _gpu(self, gpu: GpuLike) -> Gpu:
        occupant = self.occupants.get(gpu.uuid)
        ours = self.lease is not None and gpu.uuid in self.lease.uuids
        index = self.map.likely.get(gpu.uuid, gpu.index)
        free_since_s = self.free_since.get(gpu.uuid)
        if not gpu.uuid:
            holder, job, why = Holder.unknown, None, "the driver does not tell its name (lost?)"
        elif occupant is None or (ours and occupant.holder is Holder.llmwd):
            holder, job, why = (Holder.llmwd, None, "") if ours else (Holder.free, None, "")
        else:
            holder, job, why = occupant.holder, occupant.job.id if occupant.job else None, occupant.why
        return Gpu(index=index, uuid=gpu.uuid, minor=gpu.minor, numa=gpu.numa, holder=holder, job=job, why=why, free_since_s=free_since_s)

    def _tell(self, decision: leases.Decision) -> None:
        if decision.revocation is not None:
            gone = decision.revocation
            self.shell.log.warning("lease %d revoked: %s (%s)", gone.epoch, gone.reason, gone.detail)
            self.shell.journal.write("lease_revoked", **msgspec.to_builtins(gone))
        if decision.granted:
            self.shell.log.info("lease %d granted: GPUs %s", self.epoch, list(decision.lease.gpus))
            self.shell.journal.write("lease_granted", epoch=self.epoch, gpus=decision.lease.gpus)
        self.proving.tell(self.settings.yield_budget_s, time.monotonic())


def _whom_to_ask(settings: Settings) -> tuple[object, ...]:
    return settings.detection, settings.slurm_node, settings.sim_gpus


def _quiet(fact: GpusFact) -> GpusFact:
    """The fact without what changes all the time."""
    lease = fact.lease and msgspec.structs.replace(fact.lease, expires_s=0.0)
    return msgspec.structs.replace(fact, lease=lease, memory=None, at_s=0.0)


def main(shell: Shell) -> None:
    """Set the resolver up in its process."""
    resolver = Resolver(shell)
    shell.subscribe(Worker.detector, resolver.on_jobs)
    shell.subscribe(Worker.vllm, resolver.on_server)
    shell.answer(YieldOrder, resolver.standing.on_yield)
    shell.answer(ResumeOrder, resolver.standing.on_resume)
    shell.answer(ReleaseOrder, resolver.on_release)
    shell.on_reload(resolver.on_reload)
    resolver.desk.pump()
    resolver.on_beat()
    shell.ready()
