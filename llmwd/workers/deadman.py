"""The dead man's notice: the ntfy server holds a delayed one, which is renewed while we live and taken back at the end.

Only where the server has shown, by its answer to another notice, that it replaces by sequence id (from ntfy 2.16 on):
an older one would tell each renewal as a death.
"""

import random
from collections.abc import Callable

import msgspec

from llmwd.adapters import ntfy
from llmwd.adapters.ntfy import Access, Outcome, Result
from llmwd.config import Settings
from llmwd.core import noticetext
from llmwd.core.outbox import Deadman, State
from llmwd.workers.base import Shell

RENEWALS = 3  # in the time until it fires: one may be lost
WAITS = "waits for the first notice, to see that the server can (from ntfy 2.16 on)"


class Switch:
    """`trouble`: why there is none though it is wanted."""

    def __init__(self, shell: Shell, now_at: Callable[[], float], access: Callable[[Settings], Access]):
        self.shell = shell
        self.now_at = now_at
        self.access = access
        self.renew_at = 0.0
        self.tries = 0
        self.busy = False
        self.trouble = ""

    def wakes_at(self, settings: Settings, state: State, refused: bool) -> float | None:
        if not (settings.ntfy_topic and settings.ntfy_deadman):
            self.trouble = ""
            return None
        if refused or not state.replaces:
            self.trouble = "" if refused else WAITS
            return None
        return None if self.busy else self.renew_at

    def renew(self, settings: Settings, state: State, click: str, then: Callable[[Deadman | None], None]) -> None:
        """then(what the server has now); None: it has not taken it."""
        self.busy, sid = True, state.deadman.sid
        s, minutes = settings, settings.ntfy_deadman
        asked_at = self.now_at()
        body = noticetext.deadman(sid, self.shell.boot.node, s.ntfy_topic, minutes, s.ntfy_tags, click)
        access = self.access(s)

        def arrived(outcome: Outcome | None) -> None:
            self.busy = False
            outcome = outcome or Outcome(Result.bad, "see the traceback")
            if outcome.result is Result.sent:
                self.tries, self.trouble, self.renew_at = 0, "", asked_at + minutes * 60 / RENEWALS
                then(Deadman(sid, asked_at + minutes * 60))
                return
            self.tries += 1
            self.trouble = outcome.why
            delay_s = noticetext.retry_after_s(self.tries, outcome.status, outcome.code, random.random())
            self.renew_at = self.now_at() + min(delay_s, minutes * 60 / RENEWALS)
            then(None)

        self.shell.beside(lambda: ntfy.publish(s.ntfy_server, s.ntfy_topic, body, access), arrived)


def named(state: State, now_at: float) -> State:
    """With an id for the notice, to be kept before it is sent: an incarnation that does not know the id would leave the
    notice at the server, to tell of a death."""
    if state.deadman is not None:
        return state
    return msgspec.structs.replace(state, deadman=Deadman(f"{state.salt}-dead-{int(now_at)}", None))


def fired(state: State, now_at: float) -> bool:
    """Whether the server has told of our death."""
    return state.deadman is not None and state.deadman.fires_at is not None and state.deadman.fires_at < now_at
