"""The state of llmwd along the journal's axis: phases, the lease, who has the GPUs. Pure; never fails on a line.

Between two lines the state is what the earlier one left. Where a supervisor ended without a word, what it did after
its last line is `unknown`, not what it did before.
"""

import msgspec

from llmwd.core.journaled import Line
from llmwd.core.pastyields import Release
from llmwd.vocab import Holder, NodePhase, Reason

UNKNOWN = "unknown"  # not recorded: before the first line, or after a supervisor's last one
PHASES = (*(str(phase) for phase in NodePhase), UNKNOWN)


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """A time in which nothing changed. gpus: on which a process of ours may have been; leased: we had a right to them;
    users: how many GPUs each holder had, empty where that is not told; parked: how many GPUs were not used because llmwd was
    held: as many as it had last, as far as they were free."""

    begin_at: float
    end_at: float
    phase: str
    reason: str
    gpus: tuple[int, ...] = ()
    leased: bool = False
    users: dict[str, int] = {}
    parked: int = 0

    @property
    def long_s(self) -> float:
        return self.end_at - self.begin_at


# Events that change nothing of this.
QUIET_EVENTS = frozenset(
    (
        "switched reset held resumed notice_failed tunnel_started tunnel_failed tunnel_died tunnel_up tunnel_down prolog_answered"
        " door_failed door_died door_full door_has_room"
    ).split()
)


class Walk:
    """Give it every line in order with take(), then end(); `spans` and `releases` are the result."""

    def __init__(self):
        self.at: float | None = None
        self.boot = -1
        self.up: bool | None = None  # None: not known
        self.phase, self.reason = UNKNOWN, ""
        self.lease: Release | None = None  # the right to GPUs
        self.held: Release | None = None  # a process may still be there
        self.had = 0  # GPUs of the last lease
        self.users: dict[str, int] = {}
        self.spans: list[Span] = []
        self.releases: list[Release] = []
        self.by_epoch: dict[int, Release] = {}
        self.lost: list[float] = []
        self.budget_s: float | None = None
        self.unknown_events = 0

    def take(self, line: Line) -> None:
        if self.boot not in (-1, line.boot):
            self._lose()
            self.by_epoch = {}
        self.boot = line.boot
        if line.event == "supervisor_started" and self.up:
            self._lose()
        self._until(line.at)
        step = getattr(self, f"_on_{line.event}", None) if line.event in EVENTS else None
        if step is not None:
            step(line)
        elif line.event not in QUIET_EVENTS:
            self.unknown_events += 1
        self.budget_s = line.number("budget_s") or self.budget_s

    def end(self, at: float, running: bool) -> None:
        if not running and self.up:
            self._lose()
        self._until(at)

    def _until(self, at: float) -> None:
        """The state held up to here."""
        if self.at is not None and at > self.at:
            held = self.held or self.lease
            span = Span(
                begin_at=self.at, end_at=at, phase=self.phase, reason=self.reason, gpus=held.gpus if held else (),
                leased=self.lease is not None, users=self.users, parked=self._parked(),
            )  # fmt: skip
            last = self.spans[-1] if self.spans else None
            if last is not None and msgspec.structs.replace(span, begin_at=last.begin_at) == msgspec.structs.replace(last, end_at=at):
                span = msgspec.structs.replace(span, begin_at=last.begin_at)
                self.spans.pop()
            self.spans.append(span)
        self.at = at

    def _parked(self) -> int:
        if self.phase != NodePhase.held:
            return 0
        return min(self.had, self.users.get(Holder.free, 0)) if self.users else self.had

    def _lose(self) -> None:
        """Nothing tells what happened from the last line on."""
        if self.up:
            self.lost.append(self.at)
        self.up, self.phase, self.reason, self.lease, self.held, self.users = None, UNKNOWN, "", None, None, {}

    def _is(self, phase: str, reason: str) -> None:
        self.up, self.phase, self.reason = True, phase, reason

    def _release(self, line: Line) -> Release:
        epoch = int(line.number("epoch") or 0)
        if epoch not in self.by_epoch:
            self.by_epoch[epoch] = Release(epoch=epoch)
            self.releases.append(self.by_epoch[epoch])
        return self.by_epoch[epoch]

    def _on_supervisor_started(self, line: Line) -> None:
        self.by_epoch = {}  # leases are counted anew
        self._is(NodePhase.waiting, Reason.starting)

    def _on_supervisor_stopped(self, line: Line) -> None:
        self.up, self.phase, self.reason = False, str(NodePhase.stopped), str(Reason.stopped)
        self.lease = self.held = None
        self.users = {}

    def _on_phase(self, line: Line) -> None:
        phase = line.text("phase")
        self._is(phase if phase in PHASES else UNKNOWN, line.text("reason"))
        if self.held is not None and phase in (NodePhase.serving, NodePhase.loading):
            self.held.while_phase = phase

    def _on_lease_granted(self, line: Line) -> None:
        # Workers write beside one another: what was done with the lease may stand before it.
        if self._release(line).begun:
            self.by_epoch.pop(int(line.number("epoch") or 0))
        self.lease = self.held = self._release(line)
        self.lease.gpus = line.gpus()
        self.had = len(self.lease.gpus)
        if self.phase == NodePhase.loading:
            self.lease.while_phase = self.phase
        self.up = True

    def _on_server_started(self, line: Line) -> None:
        release = self._release(line)
        # The end of a server before it on the same lease (a switch) is not the end of this one.
        release.started, release.released = True, None

    def _on_server_ready(self, line: Line) -> None:
        self.up = True

    def _on_server_died(self, line: Line) -> None:
        self.up = True

    def _on_lease_revoked(self, line: Line) -> None:
        release = self._release(line)
        release.revoked, release.while_phase = line, release.while_phase or self.phase
        if self.lease is None or self.lease.epoch <= release.epoch:
            self.lease = None

    def _on_job_seen(self, line: Line) -> None:
        release = self._release(line)
        # The later line tells more, unless its writer was born after the first sign.
        other = release.seen is None or line.text("job") != release.seen.text("job")
        if other or _seen_s(line) <= _seen_s(release.seen):
            release.seen = line

    def _on_released(self, line: Line) -> None:
        release = self._release(line)
        release.released, release.gpus = line, release.gpus or line.gpus()
        self._over(release)

    def _on_release_proved(self, line: Line) -> None:
        release = self._release(line)
        release.proved, release.gpus = line, release.gpus or line.gpus()
        self._over(release)

    def _over(self, release: Release) -> None:
        """Nothing of that lease is left: whoever was to say so next may be dead."""
        if self.held is None or self.held.epoch > release.epoch:
            return
        # A server that is ended for another one to be started keeps its lease.
        expired = release.released is not None and release.released.text("reason") == Reason.lease_expired
        if release.revoked is not None or release.proved is not None or expired:
            self.lease = self.held = None
        if self.phase in (NodePhase.serving, NodePhase.loading, NodePhase.yielding):
            self._is(NodePhase.waiting, self.reason)

    def _on_budget_broken(self, line: Line) -> None:
        self._release(line).broke = line

    def _on_gpus(self, line: Line) -> None:
        self.up = True
        self.users = {str(holder): len(gpus) for holder in Holder if (gpus := line.gpus(holder))}

    def _on_drill(self, line: Line) -> None:
        self._release(line).drilled = True


def _seen_s(line: Line) -> float:
    seen_s = line.number("seen_s")
    return float("inf") if seen_s is None else seen_s


EVENTS = frozenset(name.removeprefix("_on_") for name in vars(Walk) if name.startswith("_on_"))
