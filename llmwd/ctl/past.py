"""The journal as llmwd-ctl reads it: with or without a running supervisor."""

import time

import msgspec

from llmwd.adapters.journal import read_journal
from llmwd.adapters.rundir import Dirs, running_supervisor
from llmwd.core.history import History, tell
from llmwd.core.journaled import Journaled, read
from llmwd.ctl.program import Refusal


LAST = 1000


class Past(msgspec.Struct, frozen=True):
    """The lines, and the moment at which they were read. last: the last of them as they stand in the file."""

    journaled: Journaled
    last: frozenset[bytes]
    now_at: float
    running: bool

    def history(self, days: float) -> History:
        """The last days of it."""
        return tell(self.journaled, self.now_at - days * 86400, self.now_at, self.running)


def read_past(dirs: Dirs) -> Past:
    """Refusal where there is a journal that cannot be read."""
    running = running_supervisor(dirs.runtime) is not None
    try:
        rows = read_journal(dirs.state)
    except OSError as error:
        raise Refusal(f"the journal in {dirs.state} cannot be read: {error.strerror}") from error
    now_at, now_s = time.time(), time.monotonic()
    return Past(read(rows, now_at, now_s if running else None), frozenset(rows[-LAST:]), now_at, running)
