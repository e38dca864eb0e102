"""The front door's keys as they count now: the file is read anew all the time, so that a change holds within a second."""

import time
from collections.abc import Callable

from llmwd.adapters import doorkeys
from llmwd.adapters.rundir import DirError
from llmwd.core import doorwanted
from llmwd.core.doorkeys import Key, KeyFileError, in_force, next_end_at, parse
from llmwd.workers.base import Shell

READ_EVERY_S = 0.3
LONGEST_WAIT_S = 60.0  # until a key ends: the wall clock may be set meanwhile


class Keyring:
    """on_change(): other keys are in force. problem: why the file cannot be used, and so no key is; else ""."""

    def __init__(self, shell: Shell, on_change: Callable[[], None]):
        self._shell = shell
        self._on_change = on_change
        self._path = doorkeys.path_in(shell.boot.state)
        self._data: bytes | None = None  # that _keys were read from
        self._keys: tuple[Key, ...] = ()
        self.problem = ""

    def begin(self) -> None:
        self._took(*self._read())
        self._watch()

    def in_force(self) -> tuple[Key, ...]:
        return in_force(self._keys, time.time())

    @property
    def lack(self) -> str:
        """Why none is in force, where none is."""
        return doorwanted.DAMAGED if self.problem else doorwanted.ALL_EXPIRED if self._keys else doorwanted.NONE_MADE

    def _read(self) -> tuple[bytes | None, tuple[Key, ...], str]:
        """What the file holds, the keys in it, and the problem with it."""
        data = None
        try:
            data = doorkeys.read_bytes(self._path)
            if data is not None and data == self._data and not self.problem:
                return data, self._keys, ""  # it nearly always is, and a thousand keys take their time to parse
            return data, parse(str(self._path), data) if data is not None else (), ""
        except (DirError, KeyFileError) as error:
            return data, (), str(error)

    def _watch(self) -> None:
        # Beside the loop: state folders lie on network file systems, where a look can take its time.
        self._shell.beside(self._read, self._heard)

    def _heard(self, found: tuple[bytes | None, tuple[Key, ...], str] | None) -> None:
        if found is not None and (found[0] != self._data or found[2] != self.problem):
            self._took(*found)
            self._on_change()
        self._shell.at("keys", time.monotonic() + READ_EVERY_S, self._watch)

    def _took(self, data: bytes | None, keys: tuple[Key, ...], problem: str) -> None:
        if problem and problem != self.problem:
            self._shell.log.error("no key opens the door: %s", problem)
        self._data, self._keys, self.problem = data, keys, problem
        self._wait_for_an_end()

    def _wait_for_an_end(self) -> None:
        now_at = time.time()
        end_at = next_end_at(self._keys, now_at)
        if end_at is not None:
            self._shell.at("key-ends", time.monotonic() + min(end_at - now_at, LONGEST_WAIT_S), self._ended)

    def _ended(self) -> None:
        self._wait_for_an_end()
        self._on_change()
