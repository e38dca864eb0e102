"""The resolver's questions to Slurm, when and what for, and what the answers mean; long because each answer may be bad.

Two slots, one for jobs and one for the node, so that a controller that hangs on one question never delays the other.
At most one call every CALL_EVERY_S on average (a burst of two), however many jobs arrive.
"""

import logging
import math
import random
import time
from collections.abc import Callable

import msgspec

from llmwd.adapters import slurm, slurmtraces
from llmwd.adapters.slurm import Answer, Call
from llmwd.config import Settings
from llmwd.core import gres, slurmnode
from llmwd.core.claims import Claims, NodeReading
from llmwd.core.gres import Failure
from llmwd.core.slurmnode import SlurmNode
from llmwd.messages import SourceState
from llmwd.vocab import Source
from llmwd.workers.ahead import Ahead
from llmwd.workers.base import Shell

CALL_EVERY_S = 0.1
BURST = 2
# How old a reading may be when a lease is granted on it.
FRESH_S = 6.0
# After a call that failed, the node is asked again no sooner than this.
FAILED_AGAIN_S = 5.0
IDLE_RECONCILE_S = 60.0
# Jobs that left, on a node whose GresUsed has no indices, are asked for one by one, this often.
LEAVING_EVERY_S = 1.0
# A line for each of the node's partitions; more is not sinfo's.
READING_CHARS = 1 << 16
# A call that takes longer is told to the operator as a slurmctld that does not answer.
SLOW_S = 1.0
NOT_INSTALLED = "scontrol and sinfo are not installed here"
# An outage that is over for less than this and comes back for the same reason is still the same one.
OUTAGE_GAP_S = 10.0


class SlurmDesk:
    """Keeps `claims` fed. `changed()` is called after every answer."""

    def __init__(self, shell: Shell, claims: Claims, host: str, changed: Callable[[], None]):
        self._shell = shell
        self._claims = claims
        self._host = host
        self._changed = changed
        self.node: SlurmNode | None = None
        self.idle = False  # nothing is leased and nothing wanted: ask less often
        self.grant_waits = False  # a lease could be granted, were there a fresh reading
        self.last_error = ""
        self._said: set[str] = set()
        self.ahead = Ahead(shell, self._say_once)
        self._outage = ("", float("-inf"))  # its kind, and when it was last met
        self._outage_told = False
        self._calls: dict[str, tuple[Call, str, float]] = {}  # slot -> (call, what, when asked)
        self._tokens = float(BURST)
        self._tokens_s = time.monotonic()
        self._node_due_s = 0.0  # not before
        self._node_asked_s = float("-inf")
        self._jitter = 1.0
        self._leaving_due_s = 0.0
        self._read_ok_s: float | None = None
        self._listing_due = False
        named = Source.gresused.value in shell.boot.settings.detection
        self._wanted = named or "auto" in shell.boot.settings.detection
        self.state = SourceState(name=Source.gresused, works=False, why="" if self._wanted else "not in DETECTION")
        # Without a trace of Slurm the first answer decides; without its commands there is none to come.
        self.applies = self._wanted and (named or slurm.installed() or bool(self._trace()))
        if self._wanted and not self.applies:
            self.state = SourceState(name=Source.gresused, works=False, why=NOT_INSTALLED)
        claims.slurm = self.applies

    # --- what the resolver asks -----------------------------------------------------------------------

    def grant_why(self, now_s: float) -> str:
        """Why no lease may be granted on what Slurm has said, empty if one may."""
        if not self.applies:
            return ""
        if self._read_ok_s is None:
            return self.last_error or "slurmctld has not answered yet"
        started_s = self._claims.reading.started_s
        if now_s - started_s > FRESH_S:
            return self.last_error or "slurmctld is being asked once more"
        return self.last_error or self._claims.unreadable() or self.ahead.grant_why()

    def trouble(self, now_s: float) -> str:
        """Why a question about a job may be without an answer; empty: no reason is known."""
        waits_s = max((now_s - asked_s for _, _, asked_s in self._calls.values()), default=0.0)
        return self.last_error or (f"slurmctld does not answer: asked {waits_s:.1f} s ago" if waits_s > SLOW_S else "")

    def node_states(self) -> tuple[str, ...]:
        return self._claims.reading.claim.states if self._claims.reading else ()

    def pump(self) -> None:
        """Start what should be asked now; arrange to be called again when something becomes due."""
        if not self._wanted:
            return
        now_s = time.monotonic()
        while (question := self._next(now_s)) is not None and self._take_token(now_s):
            self._start(*question, now_s)
        if self._may_look_ahead(now_s) and (argv := self.ahead.question(now_s)) is not None:
            self._start("ahead", "ahead", argv, now_s)
        wake_s = self._wake_s(now_s)
        if question is not None:  # it waits for nothing but its turn, and nothing else would wake us for it
            wake_s = min(wake_s, now_s + (1 - self._tokens) * CALL_EVERY_S)
        self._shell.at("slurm", wake_s, self.pump)

    def reload(self, settings: Settings) -> None:
        self._node_due_s = 0.0

    def close(self) -> None:
        for call, _, _ in self._calls.values():
            call.kill()

    # --- what to ask ----------------------------------------------------------------------------------

    def _next(self, now_s: float) -> tuple[str, str, list[str]] | None:
        """(slot, what, command) of the most urgent question whose slot is free."""
        node_free, job_free = "node" not in self._calls, "job" not in self._calls
        if self.node is None:
            return ("node", "identity", slurm.node_gres()) if node_free and now_s >= self._identity_due_s() else None
        due, urgent = self._claims.due(now_s), self._claims.urgent()
        reading = "node", "reading", slurm.node_use(self.node.name)
        if node_free and (urgent > 1 and self._reading_is_older_than_jobs(now_s) or urgent and now_s >= self._instead_s()):
            return reading
        if job_free and due and urgent:
            return "job", due[0], slurm.show_job(due[0])
        # One reading settles all who left; asking for them one by one first would keep it waiting.
        if node_free and now_s >= self._reading_due_s():
            return reading
        if job_free and due:
            return "job", due[0], slurm.show_job(due[0])
        if node_free and self._listing_due:
            return "node", "listing", slurm.jobs_on(self.node.name)
        leaving = self._claims.unanswered_leaving()
        if job_free and leaving and now_s >= self._leaving_due_s:
            pick = leaving[int(now_s) % len(leaving)]
            return "job", pick, slurm.show_job(pick)
        return None

    def _instead_s(self) -> float:
        """When the node is asked because the question about a job has had no answer for so long: a reading settles it in time."""
        if "job" not in self._calls or self.last_error:
            return math.inf
        return self._calls["job"][2] + self._claims.resolve_deadline_s / 2

    def _may_look_ahead(self, now_s: float) -> bool:
        """Only while nothing else is asked or waits to be; it has no part in the other calls' rate."""
        waits = self._calls or self.last_error or self._claims.reading is None
        return not waits and not self._claims.urgent() and not self._claims.due(now_s)

    def _identity_due_s(self) -> float:
        """A host that Slurm does not know is asked about again: slowly, but soon where a job has come nevertheless."""
        if not self.applies and not slurm.installed():
            return time.monotonic() + IDLE_RECONCILE_S
        return min(self._node_due_s, self._node_asked_s + FAILED_AGAIN_S) if self._claims.urgent() else self._node_due_s

    def _reading_is_older_than_jobs(self, now_s: float) -> bool:
        reading = self._claims.reading
        return reading is None or now_s - reading.started_s > CALL_EVERY_S

    def _reading_due_s(self) -> float:
        reading = self._claims.reading
        if self.last_error or reading is None:
            return self._node_due_s
        asked_s = reading.started_s
        if self._claims.reading_wanted():
            return asked_s + CALL_EVERY_S
        if self._claims.completing():
            return asked_s + min(1.0, self._shell.boot.settings.reconcile_s)
        if self.grant_waits:
            return asked_s + FRESH_S / 2
        period_s = IDLE_RECONCILE_S if self.idle else self._shell.boot.settings.reconcile_s
        return max(self._node_due_s, self._node_asked_s + period_s * self._jitter)

    def _wake_s(self, now_s: float) -> float:
        times = [now_s + IDLE_RECONCILE_S]
        if "node" not in self._calls:
            times.append(self._identity_due_s() if self.node is None else self._reading_due_s())
            times += [self._instead_s()] if self._claims.urgent() else []
        claims_s = self._claims.next_s(now_s)
        if claims_s is not None:
            times.append(claims_s)
        if self._claims.unanswered_leaving():
            times.append(self._leaving_due_s)
        if self.ahead.due_s is not None:
            times.append(max(self.ahead.due_s, now_s + 1.0))
        return max(min(times), now_s + CALL_EVERY_S / 4)

    def _take_token(self, now_s: float) -> bool:
        self._tokens = min(BURST, self._tokens + (now_s - self._tokens_s) / CALL_EVERY_S)
        self._tokens_s = now_s
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    # --- asking and hearing -----------------------------------------------------------------------------

    def _start(self, slot: str, what: str, argv: list[str], now_s: float) -> None:
        if slot == "job":
            if what in self._claims.unanswered_leaving():
                self._leaving_due_s = now_s + LEAVING_EVERY_S
            self._claims.asked(what)
        elif slot == "node":
            self._node_asked_s, self._jitter = now_s, random.uniform(0.85, 1.15)
        self._log.debug("asking Slurm: %s", " ".join(argv))
        most_bytes = slurm.LISTING_BYTES if what in ("identity", "listing", "ahead") else slurm.OUTPUT_BYTES
        started = slurm.start(argv, self._shell.boot.settings.scontrol_timeout_s, most_bytes)
        if isinstance(started, Answer):
            self._heard(what, started, now_s)
            return
        self._calls[slot] = (started, what, now_s)
        self._shell.watch(started, lambda: self._ended(slot))
        self._shell.at(f"slurm-{slot}", started.deadline_s, lambda: self._overdue(slot))

    def _ended(self, slot: str) -> None:
        call, what, asked_s = self._calls.pop(slot)
        self._shell.unwatch(call)
        self._shell.cancel(f"slurm-{slot}")
        answer = call.answer()
        if what:
            self._heard(what, answer, asked_s)
        else:
            self.pump()  # it was given up long ago, and has its slot free only now

    def _overdue(self, slot: str) -> None:
        call, what, asked_s = self._calls[slot]
        answer = call.kill()
        if answer is None:
            self._calls[slot] = (call, "", asked_s)
            answer = Answer(None, "", call.overdue_text("it cannot even be killed"), time.monotonic() - asked_s)
        else:
            del self._calls[slot]
            self._shell.unwatch(call)
        self._heard(what, answer, asked_s)

    def _heard(self, what: str, answer: Answer, asked_s: float) -> None:
        now_s = time.monotonic()
        match what:
            case "identity":
                self._heard_identity(answer, now_s)
            case "reading":
                self._heard_reading(answer, asked_s, now_s)
            case "listing":
                self._heard_listing(answer, now_s)
            case "ahead":
                self.ahead.heard(answer, self.node)
            case job:
                self._heard_job(job, answer, now_s)
        self._changed()
        self.pump()

    def _heard_identity(self, answer: Answer, now_s: float) -> None:
        settings = self._shell.boot.settings
        if answer.status == 0 and slurmnode.is_listing(answer.stdout):
            found = slurmnode.find(answer.stdout, self._host, settings.slurm_node)
            if found.node is not None:
                self.node = found.node
                self._log.info("this host is Slurm's node %s with %d GPUs", self.node.name, self.node.gpus)
                self._node_due_s = 0.0
                self.applies = self._claims.slurm = True
                return
            self._not_found(found.why, slurmtraces.daemon() if found.absent else found.why)
            return
        text = gres.read_stderr(answer.stderr or answer.stdout[:500], "").why
        if answer.status is None and not slurm.installed():
            self._not_found(NOT_INSTALLED, self._trace())
        elif answer.status is not None and gres.classify_failure(answer.stderr) is Failure.no_config:
            if slurmnode.has_controller(answer.stderr):
                self._failed(text, now_s)
            else:
                self._not_found(text, self._trace() or "its commands are here")
        else:
            self._failed(text, now_s)
        if self.last_error:
            self.applies = self._claims.slurm = True

    def _trace(self) -> str:
        return slurmtraces.daemon() or slurmtraces.configuration()

    def _not_found(self, why: str, trace: str) -> None:
        """This host is no node of Slurm's, as far as can be seen; it may become one (a node that has just booted).

        trace: what speaks against that. Unless nothing does, it is unknown what Slurm's jobs have here, and so no lease.
        """
        settings = self._shell.boot.settings
        self._node_due_s = time.monotonic() + IDLE_RECONCILE_S
        # Or the operator says that Slurm is here: a mistyped name must not end in a node without Slurm.
        named = settings.slurm_node or Source.gresused.value in settings.detection
        if named or (trace and not settings.sim_gpus):  # simulated GPUs are none of Slurm's
            if not named and trace != why:
                why = f"{why}, and yet {trace}: name this node with SLURM_NODE, or leave gresused out of DETECTION if it is none"
            self.state = SourceState(name=Source.gresused, works=False, why=why)
            self.last_error = why
            self._say_once(why, f"this host is not found in Slurm: {why}; no lease until it is")
            return
        self.state = SourceState(name=Source.gresused, works=False, why=why)
        self.last_error = ""
        self.applies = self._claims.slurm = False
        self._log.log(logging.DEBUG if why in self._said else logging.INFO, "slurmctld is not asked: %s", why)
        self._said.add(why)

    def _heard_listing(self, answer: Answer, now_s: float) -> None:
        self._listing_due = False
        words = answer.stdout.split()
        if answer.status == 0 and all(word.isdigit() for word in words):
            self._claims.take_listing(frozenset(words), now_s)
        else:
            self._say_once("listing", f"squeue does not list the jobs of this node: {_shown(answer)}")

    def _heard_reading(self, answer: Answer, asked_s: float, now_s: float) -> None:
        if answer.status != 0:
            self._failed(gres.read_stderr(answer.stderr, self.node.name).why, now_s)
            return
        short, told = slurmnode.split_reading(answer.stdout[:READING_CHARS], slurm.NODE_USE_WIDTH)
        if told:
            self._take_gres(told)
        claim = gres.read_sinfo(short, self.node.name, self.node.gpus)
        if not claim.states:
            # Without the node's state it is no answer to what was asked; what it names as used counts all the same.
            self._failed(f"sinfo's answer is not understood ({_shown(answer, 200)})", now_s)
            if claim.gpus:
                self._claims.read(NodeReading(asked_s, claim), now_s)
            return
        if self._outage_told:
            self._log.info("slurmctld answers again")
        self._outage_told, self.last_error = False, ""
        self._read_ok_s = now_s
        self.state = SourceState(name=Source.gresused, works=True)
        if claim.gpus is None:
            text = f"GresUsed of this node was not understood ({claim.why}): {_shown(answer)}"
            self._say_once(gres.form_of(claim.why, short), text)
        self._listing_due = claim.gpus is None
        self._claims.read(NodeReading(asked_s, claim), now_s)

    def _take_gres(self, told: str) -> None:
        """The node's GPUs may be others than when it was found: gres.conf was edited, or a slurmd found fewer."""
        now = slurmnode.read_gres(self.node.name, told)
        if (now.gpus, now.types, now.counts) != (self.node.gpus, self.node.types, self.node.counts):
            self._log.warning("Slurm's node %s has %d GPUs now, and had %d", now.name, now.gpus, self.node.gpus)
            self.node = msgspec.structs.replace(now, others=self.node.others)

    def _failed(self, why: str, now_s: float) -> None:
        kind, (last_kind, last_s) = gres.form_of(why), self._outage
        if not self._outage_told and (kind != last_kind or now_s > last_s + OUTAGE_GAP_S):
            self._log.warning("slurmctld does not answer: %s; no new lease until it does", why)
            self._outage_told = True
        self._outage = (kind, now_s)
        self.last_error = f"slurmctld does not answer: {why}"
        self.state = SourceState(name=Source.gresused, works=False, why=why)
        self._node_due_s = now_s + FAILED_AGAIN_S

    def _heard_job(self, job: str, answer: Answer, now_s: float) -> None:
        claim = gres.read_job(answer.stdout, self.node.name, job) if answer.status == 0 else None
        if claim is None or (claim.gpus is None and not answer.stdout.strip()):
            failure = gres.classify_failure(answer.stderr)
            why = gres.read_stderr(answer.stderr, self.node.name).why
            if failure is not Failure.invalid_job:
                self._say_once(f"scontrol: {failure}", f"scontrol tells nothing about job {job}: {why}")
            self._claims.fail(job, failure, why, now_s)
            return
        self._said -= {f"scontrol: {failure}" for failure in Failure}
        if claim.gpus is None and not claim.completing:
            text = f"job {job}: its GPUs were not understood ({claim.why}): {_shown(answer)}"
            self._say_once(gres.form_of(claim.why, answer.stdout[:READING_CHARS]), text)
        self._claims.answer(job, claim, now_s)

    def _say_once(self, kind: str, text: str) -> None:
        """Warn, unless something of this kind has been told."""
        if kind not in self._said and len(self._said) < 1000:
            self._said.add(kind)
            self._log.warning("%s", text)

    @property
    def _log(self) -> logging.Logger:
        return self._shell.log


def _shown(answer: Answer, most: int = 4000) -> str:
    said = answer.stdout.strip() or answer.stderr.strip()
    return repr(said[:most]) + (f" and {len(said) - most} characters more" if len(said) > most else "")

