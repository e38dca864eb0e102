"""How many requests the model works on: vLLM's own count, asked beside the loop, so that a yield can say what it cut."""

import time

from llmwd.adapters import http
from llmwd.workers.base import Shell

LOOK_EVERY_S = 5.0
WITHIN_S = 5.0


class Load:
    """`requests`: running and waiting at the last look, None if not told; `looked_s`: when that was."""

    def __init__(self, shell: Shell):
        self._shell = shell
        self._url = ""
        self.requests: int | None = None
        self.looked_s: float | None = None

    def begin(self, url: str) -> None:
        self._url = url
        self._look()

    def end(self) -> None:
        self._url, self.requests, self.looked_s = "", None, None
        self._shell.cancel("load")

    def _look(self) -> None:
        url, began_s = self._url, time.monotonic()
        if url:
            self._shell.beside(lambda: http.requests_open(url, WITHIN_S), lambda count: self._heard(url, began_s, count))

    def _heard(self, url: str, began_s: float, count: int | None) -> None:
        if url == self._url:
            self.requests, self.looked_s = count, began_s
            self._shell.at("load", time.monotonic() + LOOK_EVERY_S, self._look)
