"""Planning a start of the tunnel beside the loop, one plan at a time. What hangs, such as a file on a network file system
that does not answer, is told, and given up in the end."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from llmwd.config import Settings
from llmwd.workers.base import Shell
from llmwd.workers.tunnelplan import Plan, made_for, secret_file, stamp_of, survey

TOLD_AFTER_S = 5.0
GIVEN_UP_AFTER_S = 60.0  # longer than the deadlines of the programs that a survey runs


class Planner:
    """on_plan(plan): made, for what its made_for says; settings and address may be others by now. on_slow(): `slow`, a
    sentence, is there to be shown."""

    def __init__(self, shell: Shell, config_path: Path, on_plan: Callable[[Plan], None], on_slow: Callable[[], None]):
        self._shell, self._config_path = shell, config_path
        self._on_plan, self._on_slow = on_plan, on_slow
        self._token: object = None
        self._looking = False
        self._next_look: tuple[Settings, Callable[[], None]] | None = None
        self.slow = ""
        self.stamp = ""  # of the files that the last plan was made with

    @property
    def busy(self) -> bool:
        return self._token is not None

    def begin(self, settings: Settings, url: str) -> None:
        self._token = token = object()
        path, environ, wanted = self._config_path, dict(os.environ), made_for(settings, url)

        def ended(plan: Plan | None) -> None:
            if token is self._token:
                plan = plan or Plan(made_for=wanted, passing="cloudflared and its files could not be looked at")
                self._token, self.slow, self.stamp = None, "", plan.stamp
                self._shell.cancel("plan")
                self._on_plan(plan)

        def overdue() -> None:
            files = " and ".join(filter(None, (settings.cloudflared_bin, secret_file(settings)[1])))
            self.slow = f"looking at {files} takes long: does its file system answer?"
            given_up = Plan(made_for=wanted, passing=f"{self.slow} Not within {GIVEN_UP_AFTER_S:.0f} s")
            self._shell.at("plan", time.monotonic() + GIVEN_UP_AFTER_S - TOLD_AFTER_S, lambda: ended(given_up))
            self._on_slow()

        self._shell.at("plan", time.monotonic() + TOLD_AFTER_S, overdue)
        self._shell.beside(lambda: survey(settings, url, path, environ), ended)

    def look(self, settings: Settings, on_change: Callable[[], None]) -> None:
        """on_change(), later, if the files are not those any more that the last plan was made with. One look at a time, for it
        may hang; what is asked for meanwhile follows it, for the file may have changed after it was looked at."""
        before = self.stamp
        if not before:
            return
        if self._looking:
            self._next_look = settings, on_change
            return

        def looked(stamp: str | None) -> None:
            self._looking = False
            if stamp is not None and stamp != before == self.stamp:
                on_change()
            if self._next_look is not None and not self._looking:
                following, self._next_look = self._next_look, None
                self.look(*following)

        self._looking = True
        self._shell.beside(lambda: stamp_of(settings), looked)
