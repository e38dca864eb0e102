"""Where llmwd's folders are, whether a supervisor runs in them, and what its workers have said last."""

import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from llmwd.adapters import procs
from llmwd.adapters.rundir import Dirs, find_dirs, read_fact, running_supervisor, short_host
from llmwd.core.nodestatus import Facts, gather, status_of, torn
from llmwd.core.shown import Status
from llmwd.ctl.program import Refusal
from llmwd.vocab import Exit, Worker

SPEAKERS = ("root", *Worker)
LOOK_EVERY_S = 0.05
TORN_FOR_S = 0.5  # much longer than between a fact's telling and its keeping; on a full disk it stays torn
TORN_EVERY_S = 0.002

Running = tuple[int, int]  # pid and start ticks of the root


class Look(msgspec.Struct, frozen=True):
    """One look at everything: the running root (None: none), the facts, and what they amount to."""

    running: Running | None
    facts: Facts
    status: Status


def find_place() -> Dirs:
    """The folders, by the environment. Refused where the runtime folder is another user's, for its facts may be lies, or
    cannot be looked into, for then nobody knows whether a supervisor runs."""
    dirs = find_dirs(os.environ)
    try:
        found = dirs.runtime.lstat()
    except FileNotFoundError:
        return dirs
    except OSError as error:
        raise Refusal(f"the runtime folder {dirs.runtime} cannot be looked at: {error.strerror}") from error
    if found.st_uid != os.getuid():
        raise Refusal(
            f"the runtime folder {dirs.runtime} belongs to uid {found.st_uid}, not to you: set LLMWD_RUNTIME_DIR to your own"
        )
    if not stat.S_ISDIR(found.st_mode):
        raise Refusal(f"the runtime folder {dirs.runtime} is not a folder (a link, or a file): remove it, or set LLMWD_RUNTIME_DIR to another")
    if not os.access(dirs.runtime, os.R_OK | os.X_OK):
        raise Refusal(f"the runtime folder {dirs.runtime} cannot be read: `chmod 700 {dirs.runtime}`")
    return dirs


def look(dirs: Dirs, running: Running | None = None) -> Look:
    """Read the retained facts. `running` spares asking the lock, where it is known already."""
    running = running or running_supervisor(dirs.runtime)
    facts = _facts(dirs.runtime) if running else Facts()
    return Look(running, facts, status_of(short_host(), running, facts, time.monotonic()))


def _facts(runtime: Path) -> Facts:
    """Facts that fit together: a worker tells the bus before it keeps the file, so an answer can be read before its cause."""
    end_s = time.monotonic() + TORN_FOR_S
    while True:
        facts = gather([read_fact(runtime, name) for name in SPEAKERS])
        if not torn(facts) or time.monotonic() >= end_s:
            return facts
        time.sleep(TORN_EVERY_S)


def not_running() -> Refusal:
    return Refusal(f"no supervisor is running on {short_host()}; start it with ./start.sh", Exit.not_running)


def require_running(dirs: Dirs) -> Running:
    """The running root; Refusal with exit code 3 if there is none."""
    running = running_supervisor(dirs.runtime)
    if running is None:
        raise not_running()
    return running


def served_home(dirs: Dirs, seen: Look) -> Path:
    """The LLMWD_HOME that counts: the running supervisor's own, which may not be ours. Refusal where it is not there."""
    ours = seen.running is not None and seen.facts.root is not None and seen.facts.root.pid == seen.running[0]
    home = Path(seen.facts.root.home) if ours else dirs.home
    if not os.path.isdir(home):
        raise Refusal(f"LLMWD_HOME is {home}, and there is no such folder" + (" any more, though a supervisor runs from it" if ours else ""))
    return home


def profiles_in(home: Path) -> list[str]:
    """The names of the profiles. Refusal where models/ is there and cannot be read."""
    from llmwd.config import profile_names
    from llmwd.config.profile import FOLDER

    try:
        os.listdir(home / FOLDER)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Refusal(f"the profiles in {home / FOLDER} cannot be read: {error.strerror}") from error
    return profile_names(home)


def watch(dirs: Dirs, running: Running, within_s: float) -> Iterator[Look]:
    """Look again and again, until `within_s` seconds have passed. Refusal (3) when the root ends meanwhile."""
    end_s = time.monotonic() + within_s
    while True:
        # The root's pid instead of its lock: asking the lock takes it for a moment, which a start could meet.
        if not procs.alive(*running):
            raise Refusal("the supervisor has ended meanwhile", Exit.not_running)
        yield look(dirs, running)
        if time.monotonic() >= end_s:
            return
        time.sleep(LOOK_EVERY_S)
