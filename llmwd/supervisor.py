"""`llmwd-supervisor`: checks that it may start here, then is the root until it is told to end.

Runs in the foreground; logs to standard error and to `<state>/logs/`. Exit codes: vocab.Exit.
"""

import importlib.util
import logging
import os
import sys
from pathlib import Path

import click

from llmwd import __version__, redact, spec
from llmwd.adapters import keyfile, procs, rundir
from llmwd.adapters.journal import Journal, open_log
from llmwd.config import Loaded, Settings, load
from llmwd.vocab import Exit
from llmwd.workers.base import Boot


NAME = "llmwd-supervisor"


class CannotStart(Exception):
    """The supervisor may not or cannot start; the text is for the user."""


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: bin/llmwd-supervisor, in the foreground; start.sh does it in tmux. SIGTERM or SIGINT end "
    "everything in order, a second one at once; SIGHUP reads the settings again."
)
@click.version_option(__version__, prog_name=NAME)
def main() -> None:
    """Serve the active model on this node's idle GPUs, and yield them to every Slurm job."""
    try:
        code = supervise()
    except (CannotStart, rundir.DirError) as error:
        print(f"{NAME}: {redact.mask(str(error))}", file=sys.stderr)
        code = Exit.refused
    sys.exit(code)


def supervise() -> int:
    """Check, lock, run. Raises CannotStart or DirError with a sentence."""
    inside = procs.own_job_cgroup()
    if inside is not None:
        raise CannotStart(
            f"refused: this shell is inside a Slurm job ({inside}). llmwd would be killed with the job and would see "
            "only its GPUs; start it from a session outside Slurm (a plain ssh login, systemd)"
        )
    umask = os.umask(0o077)  # before the first file: whatever we make is ours alone from its first instant
    redact.learn_variables(os.environ)
    dirs = rundir.find_dirs(os.environ)
    rundir.prepare(dirs)
    loaded = _load_valid(dirs.home)
    lock = rundir.Lock(dirs.runtime)
    other = lock.take()
    if other is not None:
        raise CannotStart(f"refused: a supervisor is already running on this node, pid {other[0]}")
    redact.learn([key := keyfile.read_or_make(dirs.state)])
    settings = loaded.settings
    log = open_log(dirs.logs, "root", settings.log_level, settings.log_max_mb, settings.log_keep)
    logging.raiseExceptions = False
    _tell(log, loaded)
    _renew_runtime(dirs, log)
    procs.title("llmwd: root")  # the prolog finds us by it
    boot = Boot(
        name="root", settings=settings, home=dirs.home, runtime=dirs.runtime, state=dirs.state,
        node=settings.slurm_node or rundir.short_host(), root_fd=-1, api_key=key, umask=umask,
    )
    log.info("llmwd %s on %s, home %s, runtime %s, state %s", __version__, boot.node, *map(str, (dirs.home, dirs.runtime, dirs.state)))
    journal = Journal(dirs.state, "root", log)
    journal.write("supervisor_started", pid=os.getpid(), version=__version__)
    spec.check(spec.CHILDREN, importlib.util.find_spec)

    def reload() -> Settings | None:
        again = load(dirs.home)
        _tell(log, again)
        if again.settings is not None:
            log.info("settings read again")
        return again.settings

    from llmwd.root import Root  # imports every worker's module

    root = Root(boot, spec.CHILDREN, lock, log, reload)
    root.run()
    if root.homeless:
        log.info("beginning again")
        _begin_again(umask)
    journal.write("supervisor_stopped", pid=os.getpid())
    log.info("ended; nothing of ours is left")
    return Exit.done


def _begin_again(umask: int) -> None:
    """As a new program: the lock, the folders and the workers' modules are made as at any start, by the operator's umask."""
    os.umask(umask)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _renew_runtime(dirs: rundir.Dirs, log: logging.Logger) -> None:
    """Away with the facts of an earlier supervisor; and let the node's prolog know how to call this one."""
    for fact in (dirs.runtime / "facts").glob("*.bin"):
        fact.unlink()
    try:
        rundir.write_atomic(dirs.runtime / rundir.RELEASE_SCRIPT, rundir.release_script(sys.executable))
    except OSError as error:
        log.error("the node's prolog cannot call us: %s in %s: %s", rundir.RELEASE_SCRIPT, dirs.runtime, error.strerror)


def _load_valid(home: Path) -> Loaded:
    loaded = load(home)
    if loaded.settings is None:
        raise CannotStart("the settings are not valid:\n" + "\n".join(f"  {problem}" for problem in loaded.problems))
    return loaded


def _tell(log: logging.Logger, loaded: Loaded) -> None:
    for problem in loaded.problems:
        log.error("%s", problem)
    for warning in loaded.warnings:
        log.warning("%s", warning)


if __name__ == "__main__":
    main(prog_name=NAME)
