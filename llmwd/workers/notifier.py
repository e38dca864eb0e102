"""The notifier: tells people through ntfy what happens on this node. Nothing waits for it.

What is told is decided in core/notices.py. One notice at a time is sent in a thread beside the loop; a failed one is
tried again after a backoff of its own; what was told is kept, so that a restarted notifier does not repeat it.
"""

import random
import time
from pathlib import Path

import msgspec

from llmwd.adapters import ntfy
from llmwd.adapters.ntfy import Outcome, Result
from llmwd.adapters.rundir import read_fact, write_atomic
from llmwd.config import Loaded, Settings
from llmwd.core import notices
from llmwd.core.notices import Notice, Seen, Told
from llmwd.messages import GpusFact, NoticesFact, RootFact, ServerFact, TunnelFact
from llmwd.vocab import Phase, Worker
from llmwd.workers.base import Boot, Shell, repeat_every_s

OFF = "off: NTFY_TOPIC is not set"
SETTLE_S = 0.05  # what several workers say about one event arrives in any order: wait for all of it
STOP_MARGIN_S = 0.5  # of an ordered stop's time that is not spent on sending
SETTINGS = ("ntfy_topic", "ntfy_server", "ntfy_priority")


class Waiting(msgspec.Struct):
    """A notice that is still to be sent, at `due_s` at the earliest."""

    notice: Notice
    due_s: float


class Notifier:
    """See the module's text. `told`: sent, and on disk; `noticed`: that, and what waits to be sent."""

    def __init__(self, shell: Shell):
        self.shell = shell
        self.settings: Settings = shell.boot.settings
        self.seen = Seen(node=shell.boot.node)
        self.path = shell.boot.state / "notices.json"
        self.told = self.noticed = _read(self.path)
        self.queue: list[Waiting] = []  # at most one for each thing that is told about
        self.sending: Notice | None = None
        self.tries = 0
        self.quiet_until_s = 0.0  # ntfy is to be left alone until then
        self.sent = self.failed = 0
        self.trouble = ""
        self.refused = False
        self.listening = False
        self.stopping = False
        self._published: NoticesFact | None = None

    @property
    def on(self) -> bool:
        return bool(self.settings.ntfy_topic)

    # --- what happens ------------------------------------------------------------------------------------

    def begin(self) -> None:
        self._listen()
        self.on_beat()

    def _listen(self) -> None:
        if self.on and not self.listening:
            self.listening = True
            self.shell.subscribe(Worker.resolver, self.on_gpus)
            self.shell.subscribe(Worker.vllm, self.on_server)
            self.shell.subscribe(Worker.tunnel, self.on_tunnel)

    def on_gpus(self, fact: GpusFact) -> None:
        self.seen = msgspec.structs.replace(self.seen, gpus=fact)

    def on_server(self, fact: ServerFact) -> None:
        self.seen = notices.heard(self.seen, fact)
        self._settle()

    def on_tunnel(self, fact: TunnelFact) -> None:
        self.seen = msgspec.structs.replace(self.seen, tunnel=fact)
        self._settle()

    def _settle(self) -> None:
        self.shell.at("settle", time.monotonic() + SETTLE_S, self._consider)

    def on_reload(self, boot: Boot, loaded: Loaded) -> None:
        before, self.settings = self.settings, boot.settings
        self.refused, self.trouble = False, ""
        if any(getattr(before, name) != getattr(self.settings, name) for name in SETTINGS):
            self.tries, self.quiet_until_s = 0, 0.0
        if not self.on:
            self.queue.clear()
        self._listen()
        self._proceed()

    def on_stop(self, within_s: float) -> None:
        """Tell that it ends, if that can be told in time."""
        self.stopping = True
        if not self.on or self.refused:
            self.shell.finish()
            return
        self._put(notices.stopped(self.shell.boot.node))
        now_s = time.monotonic()
        self.tries, self.quiet_until_s = 0, 0.0
        for waiting in self.queue:
            waiting.due_s = now_s
        self.shell.at("give-up", now_s + max(0.0, within_s - STOP_MARGIN_S), self._give_up)
        self._proceed()

    def _give_up(self) -> None:
        if self.queue or self.sending:
            self.shell.log.error("ended before %d notices could be sent", len(self.queue) + (self.sending is not None))
        self.shell.finish()

    def on_beat(self) -> None:
        if self.on:
            self._look_at_the_workers()
        self._publish(repeat=True)
        self.shell.at("repeat", time.monotonic() + repeat_every_s(self.settings), self.on_beat)

    def _look_at_the_workers(self) -> None:
        """The root says who is in quarantine in a file only: it has no place on the bus."""
        envelope = read_fact(self.shell.boot.runtime, "root")
        if envelope is not None and isinstance(envelope.fact, RootFact) and envelope.fact.workers != self.seen.workers:
            self.seen = msgspec.structs.replace(self.seen, workers=envelope.fact.workers)
            self._settle()

    # --- what follows ------------------------------------------------------------------------------------

    def _consider(self) -> None:
        if not self.on or self.stopping:
            return
        for notice in notices.consider(self.noticed, self.seen):
            self._put(notice)
        self._proceed()

    def _put(self, notice: Notice) -> None:
        """Into the queue, in the place of what it supersedes."""
        self.noticed = notices.after(self.noticed, notice)
        self.queue = [waiting for waiting in self.queue if waiting.notice.about is not notice.about]
        # Down and up again before anybody heard of it: nothing has happened.
        if self.sending is None and getattr(self.told, notice.about) == notice.key:
            return
        self.queue.append(Waiting(notice, time.monotonic() + notice.hold_s))

    def _proceed(self) -> None:
        """Send what is due, unless something is being sent or ntfy is to be left alone."""
        now_s = time.monotonic()
        if self.queue and self.sending is None and not self.refused:
            due = min(self.queue, key=lambda waiting: waiting.due_s)
            at_s = max(due.due_s, self.quiet_until_s)
            if at_s <= now_s:
                self.queue.remove(due)
                self._send(due.notice)
            else:
                self.shell.at("due", at_s, self._proceed)
        self._publish()
        if self.stopping and not self.queue and self.sending is None:
            self.shell.finish()

    def _send(self, notice: Notice) -> None:
        self.sending = notice
        s, path = self.settings, self.path
        body = notices.body(notice, s.ntfy_topic, s.ntfy_priority)
        told = notices.after(self.told, notice)
        self.shell.beside(
            lambda: _deliver(s.ntfy_server, s.ntfy_topic, body, path, told), lambda result: self._sent(told, result)
        )

    def _sent(self, told: Told, result: tuple[Outcome, str] | None) -> None:
        notice, self.sending = self.sending, None
        outcome, keeping = result or (Outcome(Result.bad, "the notice could not be sent: see the traceback"), "")
        match outcome.result:
            case Result.sent:
                self.sent, self.tries, self.trouble, self.told = self.sent + 1, 0, "", told
                self.shell.log.info("told: %s", notice.title)
                if keeping:
                    self.shell.log.error("what was told cannot be kept: %s", keeping)
            case Result.again:
                self._again(notice, outcome)
            case Result.bad | Result.refused:
                self.failed, self.trouble = self.failed + 1, outcome.why
                self.refused = outcome.result is Result.refused
                self.shell.log.error("not told (%s): %s", notice.title, outcome.why)
                self.shell.journal.write("notice_failed", title=notice.title, why=outcome.why)
                if self.refused:
                    self._back(notice)  # for when the operator has corrected the settings
        if self.refused and self.stopping:
            self.shell.finish()
        self._proceed()

    def _again(self, notice: Notice, outcome: Outcome) -> None:
        self.tries += 1
        delay_s = notices.retry_after_s(self.tries, outcome.status, outcome.code, random.random())
        if outcome.why != self.trouble:
            self.shell.log.warning("not told yet (%s): %s", notice.title, outcome.why)
        self.trouble = outcome.why
        self.quiet_until_s = time.monotonic() + delay_s
        self._back(notice)

    def _back(self, notice: Notice) -> None:
        """Into the queue again, unless a newer one has superseded it."""
        if all(waiting.notice.about is not notice.about for waiting in self.queue):
            self.queue.insert(0, Waiting(notice, 0.0))

    # --- what is shown -----------------------------------------------------------------------------------

    def _publish(self, repeat: bool = False) -> None:
        waiting = len(self.queue) + (self.sending is not None)
        if not self.on:
            phase, detail = Phase.stopped, OFF
        elif self.refused:
            phase, detail = Phase.failed, self.trouble
        else:
            phase, detail = (Phase.backoff if self.tries else Phase.ready), self.trouble
        before, now_s = self._published, time.monotonic()
        fact = NoticesFact(
            phase=phase, detail=detail, sent=self.sent, failed=self.failed, waiting=waiting, at_s=now_s
        )
        self._published = fact
        if repeat or before is None or msgspec.structs.replace(before, at_s=now_s) != fact:
            self.shell.publish(fact)


def _read(path: Path) -> Told:
    """What earlier incarnations have told; a file that is not there or not ours to understand tells nothing."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Told)
    except (OSError, msgspec.DecodeError):
        return Told()


def _deliver(server: str, topic: str, body: bytes, path: Path, told: Told) -> tuple[Outcome, str]:
    """Blocks: beside the loop. (what became of it, why it could not be kept that it was told)."""
    outcome = ntfy.publish(server, topic, body)
    if outcome.result is Result.sent:
        try:
            write_atomic(path, msgspec.json.encode(told))
        except OSError as error:
            return outcome, f"{path}: {error.strerror}"
    return outcome, ""


def main(shell: Shell) -> None:
    """Set the notifier up in its process."""
    notifier = Notifier(shell)
    shell.on_stop(notifier.on_stop)
    shell.on_reload(notifier.on_reload)
    notifier.begin()
    shell.ready()
