"""How long each profile took to load here: measured at each start, kept in `<state>/load_times.json`."""

import msgspec

from llmwd.adapters.rundir import write_atomic
from llmwd.core import lookahead
from llmwd.core.lookahead import LoadTimes
from llmwd.workers.base import Shell


class Loads:
    """A file that cannot be read or written costs only the estimate."""

    def __init__(self, shell: Shell):
        self._shell = shell
        self._path = shell.boot.state / "load_times.json"
        self._times = self._read()

    def expected_s(self, profile: str | None) -> float | None:
        """Seconds from the start to the first answer, None if it was never measured."""
        return lookahead.load_s(self._times, profile)

    def measured(self, profile: str, took_s: float) -> None:
        """One more start. Written beside the loop."""
        self._times = lookahead.measured(self._times, profile, took_s)
        data = msgspec.json.encode(self._times)
        self._shell.beside(lambda: self._write(data), self._written)

    def _written(self, why: str | None) -> None:
        if why:
            self._shell.log.error("%s", why)

    def _write(self, data: bytes) -> str:
        try:
            write_atomic(self._path, data, durable=True)
        except OSError as error:
            return f"{self._path} cannot be written: {error.strerror}"
        return ""

    def _read(self) -> LoadTimes:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=LoadTimes)
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError) as error:
            self._shell.log.warning("%s cannot be read (%s): load times are measured anew", self._path, error)
            return {}
