"""Whether the model answers: real one-token requests, asked beside the loop.

Ready is a model that has answered one. Wedged is one that was ready and then neither answers nor generates a token for
anybody: /health alone is a flag that stays up while the engine is dead.
"""

import time
from collections.abc import Callable

from llmwd.adapters import http
from llmwd.workers.base import Shell

LOOK_EVERY_S = 0.25  # while loading: whether it answers yet
PROBE_WITHIN_S = 30.0  # at most; who wants to be asked more often than this wants to know as soon
WEDGED_AFTER = 2  # probes in a row without an answer and without a token generated


class Readiness:
    """Asks again and again between begin() and end(). on_ready() is called once, on_wedged() at most once."""

    def __init__(self, shell: Shell, on_ready: Callable[[], None], on_wedged: Callable[[], None]):
        self._shell = shell
        self._on_ready = on_ready
        self._on_wedged = on_wedged
        self._asked: object | None = None  # what is being asked about; an answer about anything else is late
        self._ready = False
        self._quiet = 0
        self._tokens: float | None = None

    @property
    def asks(self) -> bool:
        return self._asked is not None

    def begin(self, url: str, served_as: str, api_key: str | None, ready: bool = False) -> None:
        """ready: it has answered before, to an earlier incarnation of ours."""
        self._asked, self._ready, self._quiet, self._tokens = object(), ready, 0, None
        self._ask = lambda: http.probe(url, served_as, api_key, self._within_s())
        self._shell.at("probe", time.monotonic() + (0.0 if ready else LOOK_EVERY_S), self._probe)

    def end(self) -> None:
        self._asked = None
        self._shell.cancel("probe")

    def _within_s(self) -> float:
        return min(PROBE_WITHIN_S, self._shell.boot.settings.probe_interval_s) if self._ready else PROBE_WITHIN_S

    def _probe(self) -> None:
        token = self._asked
        self._shell.beside(self._ask, lambda answered: self._heard(token, answered))

    def _heard(self, token: object, answered: http.Answered | None) -> None:
        if token is not self._asked:
            return
        if answered is not None and answered.ok:
            self._quiet, self._tokens = 0, answered.tokens
            if not self._ready:
                self._ready = True
                self._on_ready()
        elif self._ready and self._is_wedged(answered):
            self._on_wedged()
            return
        waits_s = self._shell.boot.settings.probe_interval_s if self._ready else LOOK_EVERY_S
        self._shell.at("probe", time.monotonic() + waits_s, self._probe)

    def _is_wedged(self, answered: http.Answered | None) -> bool:
        # A long queue keeps our request waiting, too; then tokens are generated for others.
        moved = answered is not None and answered.tokens is not None and answered.tokens != self._tokens
        self._tokens = answered.tokens if answered is not None else None
        self._quiet = 0 if moved else self._quiet + 1
        self._shell.log.warning("the model did not answer a one-token request: %s", answered.why if answered else "")
        return self._quiet >= WEDGED_AFTER
