"""The claims and the lease walked at random beside a model of the truth; long because model, moves and invariants are one walk.

The model knows what nobody tells: which jobs have which GPUs, which of them complete, and what each reading and each
answer had seen when it was made. The core is fed only what would reach it, late and in parts, and every step is
followed by the resolver's own order of calls and by all invariants.
"""

import math

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmwd.core.claims import HIDDEN, Claims, JobView, NodeReading
from llmwd.core.gpumap import build_map, simulated
from llmwd.core.gres import Claim, Failure
from llmwd.core.lease import Decision, Evidence, Situation, decide, free_since, occupy
from llmwd.messages import Hold, JobSeen, Lease
from llmwd.vocab import Holder, Reason

GPUS = simulated(4)
MAP = build_map(GPUS, 4, 0, {}, sim=False)
DEADLINE_S, TTL_S, RESUME_S, FRESH_S, EVIDENCE_S = 2.0, 10.0, 10.0, 6.0, 8.0
RECONCILE_S = 15.0
# An answer may be this old when it arrives, a reading too: what ended a lease need not be true any more.
LATE_S = 60.0

gpu_sets = st.frozensets(st.integers(0, 3), max_size=3)
ids = st.sampled_from(("1", "2", "3", "4"))
pauses = st.sampled_from((0.01, 0.1, 0.5, 1.0, 2.0, 3.0, 8.0))


class Run:
    """One run of a job, as it is in truth."""

    def __init__(self, id: str, gpus: frozenset[int], hidden: bool, begun_s: float):
        self.id, self.gpus, self.hidden, self.begun_s = id, gpus, hidden, begun_s
        self.phase = "running"  # then completing (its processes may be there, GresUsed has dropped it), then over
        self.over_s = math.inf
        self.over_state = "COMPLETED"
        self.noticed = False  # from here on its GPUs must not be ours
        self.answered = False

    @property
    def here(self) -> bool:
        return self.phase != "over"


class Sign(msgspec.Struct):
    """What is to be seen of a job on the node."""

    seen_s: float
    sources: tuple[str, ...] = ("stepd", "cgroup2")
    empty: bool = False
    reported_s: float = math.inf
    run: Run | None = None  # the run that this sign can tell of: none for one that begins in an older one's folder


class Called(msgspec.Struct):
    """A question to Slurm that is under way. `truth`: what was the case when slurmctld looked."""

    asked_s: float
    truth: tuple | None = None


class Walk(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0
        self.claims = Claims(DEADLINE_S)
        self.runs: list[Run] = []
        self.signs: dict[str, Sign] = {}
        self.reported: dict[str, Sign] = {}
        self.jobs_at_s: float | None = None
        self.scanned = False
        self.node_call: Called | None = None
        self.job_call: tuple[str, Called] | None = None
        self.listing_due = False
        self.last_error = ""
        self.draining = False
        self.indices = True
        self.wanted = 2
        self.server_known = False
        self.tree: frozenset[str] = frozenset()
        self.holding: frozenset[str] = frozenset()
        self.hold: Hold | None = None
        self.lease: Lease | None = None
        self.epoch = 0
        self.free_since: dict[str, float | None] = {}
        self.decision: Decision | None = None
        self.left: dict[str, tuple[float, frozenset[int]]] = {}

    @initialize(indices=st.booleans())
    def begin(self, indices: bool) -> None:
        self.indices = indices  # whether the node's GresUsed tells which GPUs, or only how many
        self.server_known = True
        self.evaluate()
        self.all_goes_well_for_a_while(12)

    # --- the truth ---------------------------------------------------------------------------------------

    @rule(id=ids, gpus=gpu_sets, hidden=st.booleans(), signs=st.booleans())
    def a_job_begins(self, id: str, gpus: frozenset[int], hidden: bool, signs: bool) -> None:
        taken = {gpu for run in self.runs if run.here for gpu in run.gpus}
        if any(run.here and run.id == id for run in self.runs):
            return
        run = Run(id, gpus - taken, hidden, self.now_s)
        self.runs.append(run)
        if id in self.signs:  # in the folder that an earlier run left behind
            old = self.signs[id]
            self.signs[id] = Sign(old.seen_s, ("stepd", "cgroup2"))
        elif signs:
            self.signs[id] = Sign(self.now_s, run=run)

    @rule(id=ids, gpus=gpu_sets, hidden=st.booleans(), asked=st.booleans())
    def a_job_comes_and_is_seen_at_once(self, id: str, gpus: frozenset[int], hidden: bool, asked: bool) -> None:
        self.a_job_begins(id, gpus, hidden, True)
        self.the_detector_reports(1)
        if asked and self.job_call is None and (due := self.claims.due(self.now_s)):
            self._ask(due[0])

    @precondition(lambda self: any(run.phase == "running" and run.id not in self.signs for run in self.runs))
    @rule(data=st.data())
    def an_allocation_gets_its_first_step(self, data: st.DataObject) -> None:
        silent = [run for run in self.runs if run.phase == "running" and run.id not in self.signs]
        run = data.draw(st.sampled_from(silent))
        self.signs[run.id] = Sign(self.now_s, run=run)

    @precondition(lambda self: any(run.here for run in self.runs))
    @rule(data=st.data())
    def a_job_goes_on(self, data: st.DataObject) -> None:
        """Running, completing, over; its signs go before the epilog ends, or stay as a leftover folder."""
        run = data.draw(st.sampled_from([run for run in self.runs if run.here]))
        if run.phase == "running":
            run.phase = "completing"
            return
        if run.id in self.signs and not data.draw(st.integers(0, 3)):
            self.signs[run.id] = Sign(self.signs[run.id].seen_s, ("cgroup2",))
        else:
            self.signs.pop(run.id, None)
        self._end(run, data.draw(st.sampled_from(("COMPLETED", "PENDING", "purged", "elsewhere"))))

    def _end(self, run: Run, state: str) -> None:
        run.phase, run.over_s, run.over_state = "over", self.now_s, state

    @precondition(lambda self: any(run.here and not run.hidden and run.id in self.signs for run in self.runs))
    @rule(data=st.data())
    def the_signs_of_a_job_go(self, data: st.DataObject) -> None:
        """Its last step has ended: the allocation may go on, or it completes without a process of its own."""
        seen = [run for run in self.runs if run.here and not run.hidden and run.id in self.signs]
        del self.signs[data.draw(st.sampled_from(seen)).id]

    @precondition(lambda self: self._leftovers())
    @rule(data=st.data())
    def a_leftover_folder_goes_or_proves_empty(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(self._leftovers()))
        if data.draw(st.booleans()):
            del self.signs[id]
        else:
            self.signs[id].empty = True

    def _leftovers(self) -> list[str]:
        return sorted(id for id in self.signs if not any(run.here and run.id == id for run in self.runs))

    @rule(steps=st.sampled_from((1, 3, 10, 30)))
    def all_goes_well_for_a_while(self, steps: int) -> None:
        """Slurm answers at once and truthfully, and everything is asked as soon as the core wants it."""
        for _ in range(steps):
            self._one_quiet_step()
        if self.lease is not None and not self.tree:
            self.the_manager_acts()

    # --- what reaches the core ---------------------------------------------------------------------------

    @rule(pause_s=pauses)
    def time_passes(self, pause_s: float) -> None:
        self.now_s += pause_s
        self.evaluate()

    @rule(partial=st.integers(0, 9))
    def the_detector_reports(self, partial: int) -> None:
        self.scanned = partial != 0
        signs = {id: sign for id, sign in self.signs.items() if self.scanned or id != min(self.signs)}
        self._note_who_left(set(signs))
        for run in self.runs:
            run.answered = run.answered and run.id in signs  # who comes back is asked for anew
        for id, sign in signs.items():
            old = self.reported.get(id)
            known = old is not None and (old.seen_s, old.run) == (sign.seen_s, sign.run)
            sign.reported_s = old.reported_s if known else self.now_s
        self.reported = {id: msgspec.structs.replace(sign) for id, sign in signs.items()}
        self.jobs_at_s = self.now_s
        self.claims.see(
            tuple(JobSeen(id=id, sources=s.sources, seen_s=s.seen_s, empty=s.empty) for id, s in signs.items()), self.now_s
        )
        self.evaluate()

    @rule()
    def the_detector_is_restarted(self) -> None:
        for sign in self.signs.values():
            sign.seen_s = self.now_s
            sign.empty = False

    def _note_who_left(self, present: set[str]) -> None:
        for view in self.claims.views(self.now_s):
            if view.leaving or view.id in present or view.sources == ("gresused",):
                continue
            sure = view.resolved_s is not None and not view.covered
            self.left[view.id] = self.now_s, view.gpus if sure else frozenset()
        for id in present:
            self.left.pop(id, None)

    @precondition(lambda self: self.job_call is None and self.claims.due(self.now_s))
    @rule(data=st.data(), at_once=st.booleans())
    def a_job_is_asked_for(self, data: st.DataObject, at_once: bool) -> None:
        id = data.draw(st.sampled_from(self.claims.due(self.now_s)))
        self._ask(id)
        if at_once:
            self._look_at_job()

    def _ask(self, id: str) -> None:
        self.claims.asked(id)
        self.job_call = id, Called(self.now_s)

    def _look_at_job(self) -> None:
        id, call = self.job_call
        if call.truth is None:
            runs = [run for run in self.runs if run.id == id]
            call.truth = (runs[-1], runs[-1].phase) if runs else (None, "over")

    @precondition(lambda self: self.job_call is not None)
    @rule(how=st.sampled_from(("answered", "answered", "answered", "not understood", *Failure)))
    def slurm_answers_for_a_job(self, how: str) -> None:
        self._look_at_job()
        (id, call), self.job_call = self.job_call, None
        run, phase = call.truth
        hidden = run is None or run.hidden or run.over_state == "purged" and phase == "over"
        if isinstance(how, Failure) and how is not Failure.invalid_job:
            self.claims.fail(id, how, "no answer", self.now_s)
        elif hidden:
            if id in self.left and self.claims.reading is not None and not self.claims.reading.claim.completing:
                self._forget_left(self.claims.reading.started_s)
            self.claims.fail(id, Failure.invalid_job, "Slurm does not know it", self.now_s)
        elif how == "not understood":
            self.claims.answer(id, Claim(None, "the text is cut", states=("RUNNING",)), self.now_s)
        else:
            self._truthful_answer(id, run, phase)
        self.evaluate()

    def _truthful_answer(self, id: str, run: Run, phase: str) -> None:
        none = frozenset()
        match phase, run.over_state:
            case "running", _:
                claim = Claim(run.gpus, states=("RUNNING",))
                asked_for = self.claims._asked.get(id)
                known = asked_for in (self.claims._jobs.get(id), self.claims._leaving.get(id))
                if known and asked_for is not None:
                    run.answered = True
                    run.noticed = run.noticed or run.here
            case "completing", _:
                gpus, why = (None, "it completes") if run.gpus else (none, "")
                claim = Claim(gpus, why, completing=True, states=("COMPLETED", "COMPLETING"))
            case _, "PENDING":
                claim = Claim(none, states=("PENDING",))
            case _, "elsewhere":
                claim = Claim(none, states=("RUNNING",))
            case _:
                claim = Claim(none, states=("COMPLETED",))
                self.left.pop(id, None)
        self.claims.answer(id, claim, self.now_s)

    @precondition(lambda self: self.node_call is None and not self.listing_due)
    @rule(at_once=st.booleans())
    def the_node_is_asked(self, at_once: bool) -> None:
        self.node_call = Called(self.now_s)
        if at_once:
            self._look_at_node()

    def _look_at_node(self) -> None:
        if self.node_call.truth is None:
            running = [run for run in self.runs if run.phase == "running"]
            self.node_call.truth = running, any(run.phase == "completing" for run in self.runs), self.draining

    @precondition(lambda self: self.node_call is not None)
    @rule(how=st.sampled_from(("read", "read", "read", "not understood", "failed")))
    def slurm_answers_for_the_node(self, how: str) -> None:
        self._look_at_node()
        call, self.node_call = self.node_call, None
        running, completing, draining = call.truth
        if how == "failed":
            self.last_error = "slurmctld does not answer"
            self.evaluate()
            return
        self.last_error = ""
        states = ("MIXED", *(["COMPLETING"] * completing), *(["DRAIN"] * draining))
        if how == "not understood" or not self.indices:
            used = len(frozenset().union(*(run.gpus for run in running))) if how == "read" else None
            claim = Claim(None, "no indices", completing, states, used=used)
            self.listing_due = True
        else:
            claim = Claim(frozenset().union(*(run.gpus for run in running)), "", completing, states)
            for run in running:
                run.noticed = run.noticed or run.here
            if not completing:
                self._forget_left(call.asked_s)
        self.claims.read(NodeReading(call.asked_s, claim), self.now_s)
        self.evaluate()

    def _forget_left(self, began_s: float) -> None:
        self.left = {id: left for id, left in self.left.items() if left[0] >= began_s}

    @precondition(lambda self: self.listing_due and self.node_call is None)
    @rule(works=st.integers(0, 4))
    def the_jobs_of_the_node_are_listed(self, works: int) -> None:
        self.listing_due = False
        if works:
            listed = frozenset(run.id for run in self.runs if run.here and not run.hidden)
            if not self.claims.reading.claim.completing:
                self._forget_left(self.claims.reading.started_s)
            for id in listed:
                self.left.pop(id, None)
            self.claims.take_listing(listed, self.now_s)
        self.evaluate()

    @rule(hold=st.integers(0, 3))
    def the_operator_orders(self, hold: int) -> None:
        self.hold = Hold(since_at=0.0, by="me") if hold == 0 else None
        self.evaluate()

    @rule(draining=st.integers(0, 3))
    def the_administrator_orders(self, draining: int) -> None:
        self.draining = draining == 0

    @rule(wanted=st.sampled_from((0, 1, 2, 2, 2, 2, 4)))
    def another_profile_is_chosen(self, wanted: int) -> None:
        self.wanted, self.server_known = wanted, True
        self.evaluate()

    @rule()
    def the_manager_acts(self) -> None:
        """It starts on a lease that suits, ends what no lease covers, and says so."""
        self.server_known = True
        lease = self.lease if self.lease is not None and self.now_s < self.lease.expires_s else None
        if not self.tree and lease is not None and len(lease.gpus) == self.wanted:
            self.tree = frozenset(lease.uuids)
        elif self.tree and (lease is None or not self.tree <= set(lease.uuids)):
            self.tree = frozenset()
        self.holding = self.tree
        self.evaluate()

    # --- the resolver's own order of calls -----------------------------------------------------------------

    def _situation(self, views: tuple[JobView, ...]) -> Situation:
        reading = self.claims.reading
        grant_why = self.last_error
        if reading is None or self.now_s - reading.started_s > FRESH_S:
            grant_why = grant_why or "slurmctld is being asked"
        blind = self.jobs_at_s is None or self.now_s - self.jobs_at_s > EVIDENCE_S or not self.scanned
        occupants = occupy(MAP, views, self.claims.used_by_node(), {}, dict.fromkeys(self.holding, "ours"))
        self.free_since = free_since(self.free_since, MAP.uuids, occupants, self.now_s)
        return Situation(
            gpus=GPUS, gpu_map=MAP, occupants=occupants, free_since_s=self.free_since, wanted=self.wanted,
            holding=self.holding, server_known=self.server_known,
            pending=any(view.pending for view in views) or self.claims.unsettled(), lease=self.lease, hold=self.hold,
            node_states=reading.claim.states if reading else (),
            evidence=Evidence("the detector is silent" if blind else "", grant_why), epoch=self.epoch,
        )

    def evaluate(self) -> None:
        views = self.claims.views(self.now_s)
        now = self._situation(views)
        decision = decide(now, self.now_s, TTL_S, RESUME_S)
        assert decision == decide(now, self.now_s, TTL_S, RESUME_S) and views == self.claims.views(self.now_s)
        before, self.lease, self.decision = self.lease, decision.lease, decision
        self._check_lease(before, now)
        if decision.granted:
            self._check_grant(now, views)
        if decision.revocation is not None:
            self._check_revocation(before, now, views)

    # --- what must hold --------------------------------------------------------------------------------------

    def _check_lease(self, before: Lease | None, now: Situation) -> None:
        lease = self.lease
        if lease is None:
            return
        assert self.now_s < lease.expires_s <= self.now_s + TTL_S
        assert lease.expires_s <= self.jobs_at_s + EVIDENCE_S + TTL_S
        if before is None or lease.expires_s != before.expires_s:
            assert not now.evidence.renew_why and lease.expires_s == self.now_s + TTL_S
        assert before is None or before == msgspec.structs.replace(lease, expires_s=before.expires_s)
        assert self.hold is None and "DRAIN" not in now.node_states
        assert all(now.occupants.get(uuid) is None or now.occupants[uuid].holder is Holder.llmwd for uuid in lease.uuids)

    def _check_grant(self, now: Situation, views: tuple[JobView, ...]) -> None:
        assert self.lease.epoch > self.epoch
        self.epoch = self.lease.epoch
        assert len(self.lease.uuids) == len(set(self.lease.uuids)) == len(self.lease.gpus) == self.wanted > 0
        assert not self.holding and not now.evidence.grant_why and not now.pending
        assert self.now_s - self.claims.reading.started_s <= FRESH_S
        assert not any(view.pending or view.gpus is None for view in views)
        for run in self.runs:  # even before anything must be known of it
            if run.here and run.id in self.reported and self.reported[run.id].run is run:
                assert not run.gpus & set(self.lease.gpus), f"granted GPUs of job {run.id}, which is seen here"

    def _check_revocation(self, lease: Lease, now: Situation, views: tuple[JobView, ...]) -> None:
        gone = self.decision.revocation
        assert gone.epoch == lease.epoch and gone.reason is self.decision.blocked
        match gone.reason:
            case Reason.yielded_to_job:
                lately = [run for run in self.runs if run.over_s >= lease.granted_s - LATE_S]
                assert any(run.gpus & set(lease.gpus) for run in lately), "yielded, and no job wanted these GPUs"
            case Reason.unknown_job:
                view = next(view for view in views if view.id == gone.job and view.gpus is None)
                if gone.job == HIDDEN:
                    lately = [run for run in self.runs if run.over_s >= self.claims.reading.started_s]
                    shown = [each.gpus for each in views if each.gpus and each is not view]
                    assert any(run.gpus and run.gpus not in shown for run in lately), "nobody is hidden"
                    return
                run = [run for run in self.runs if run.id == view.id][-1]
                assert view.leaving or not run.answered or view.seen_s > run.begun_s
                assert self.now_s >= view.seen_s + DEADLINE_S
            case Reason.held:
                assert self.hold is not None
            case Reason.node_draining:
                assert "DRAIN" in now.node_states
            case Reason.lease_expired:
                assert self.now_s >= lease.expires_s
            case Reason.switching | Reason.not_wanted:
                assert self.wanted != len(lease.gpus)
            case reason:
                raise AssertionError(f"nothing here can lead to {reason}")

    @invariant()
    def no_job_that_has_been_noticed_finds_us_on_its_gpus(self) -> None:
        for run in self.runs:
            sign = self.reported.get(run.id)
            if run.here and sign is not None and sign.run is run and self.now_s >= sign.reported_s + DEADLINE_S:
                run.noticed = True
            if run.here and run.noticed and self.lease is not None:
                assert not run.gpus & set(self.lease.gpus), f"job {run.id} has GPUs {set(run.gpus)}"

    @invariant()
    def a_job_that_left_keeps_its_gpus_until_a_later_reading_is_quiet(self) -> None:
        views = {view.id: view for view in self.claims.views(self.now_s)}
        for id, (_, gpus) in self.left.items():
            assert id in views and (views[id].gpus is None or gpus <= views[id].gpus | self.claims.used_by_node())

    @invariant()
    def nobody_who_asks_in_vain_is_unseen(self) -> None:
        for view in self.claims.views(self.now_s):
            if view.gpus is None:
                assert self.lease is None and view.sources != ("sim",)

    # --- and in the end ----------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Everything becomes quiet: asked for only what the core asks for, it grants a lease, and keeps it."""
        for run in self.runs:
            if run.phase == "completing" or run.phase == "running" and (run.gpus or run.hidden and not self.indices):
                self.signs.pop(run.id, None)
                self._end(run, "COMPLETED")
        for id in self._leftovers():
            self.signs[id].empty = True
        self.wanted, self.server_known, self.hold, self.draining = 2, True, None, False
        self.tree = self.holding = frozenset()
        self.node_call = None  # it may bring back what the administrator took back
        self.the_detector_reports(1)
        if self.job_call is not None:  # it may still tell what a job had before it ended
            self.slurm_answers_for_a_job("answered")
        begun_s = self.now_s
        while self.lease is None or len(self.lease.gpus) != 2:
            assert self.now_s < begun_s + 60, f"everything is free, and no lease: {self.decision}"
            self._one_quiet_step()
        for _ in range(60):
            self._one_quiet_step()
            assert self.lease is not None, f"nothing happened, and the lease ended: {self.decision.revocation}"

    def _one_quiet_step(self) -> None:
        """What the desk would do next, and then the next time that anything asked to be woken at."""
        if self.jobs_at_s is None or self.now_s >= self.jobs_at_s + 2.5 or not self.scanned:
            self.the_detector_reports(1)
        if self.job_call is not None:
            self.slurm_answers_for_a_job("answered")
        elif due := self.claims.due(self.now_s):
            self._ask(due[0])
        if self.node_call is not None:
            self.slurm_answers_for_the_node("read")
        elif self.listing_due:
            self.the_jobs_of_the_node_are_listed(1)
        elif self.now_s >= self._reading_due_s():
            self.the_node_is_asked(True)
        busy = self.job_call or self.node_call or self.listing_due or self.claims.due(self.now_s)
        if not busy:
            wakes = [self.claims.next_s(self.now_s), self.decision.look_again_s, self.jobs_at_s + 2.5, self._reading_due_s()]
            self.now_s = max(self.now_s + 0.01, min(at for at in wakes if at is not None))
        else:
            self.now_s += 0.01
        self.evaluate()

    def _reading_due_s(self) -> float:
        started_s = self.claims.reading.started_s if self.claims.reading is not None else -math.inf
        if self.claims.reading_wanted():
            return started_s + 0.1
        if self.claims.completing():
            return started_s + 1.0
        if self.lease is None and self.decision.blocked in (Reason.no_evidence, Reason.starting, Reason.resume_delay):
            return started_s + FRESH_S / 2
        return started_s + RECONCILE_S


Walk.TestCase.settings = settings(
    max_examples=250, stateful_step_count=80, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
TestWalk = Walk.TestCase
