"""Stands in for the root: holds the lock, writes each signal it gets to a file, ends on SIGTERM.

usage: python -m tests.ctl.rootstand RUNTIME [--deaf]
"""

import signal
import sys
from pathlib import Path

from llmwd.adapters import rundir

runtime, deaf = Path(sys.argv[1]), "--deaf" in sys.argv
WATCHED = {signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}
signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
lock = rundir.Lock(runtime)
if lock.take() is not None:
    sys.exit("somebody else has the lock")
print("locked", flush=True)
while True:
    number = signal.sigwait(WATCHED)
    with (runtime / "signals").open("a") as file:
        file.write(signal.Signals(number).name + "\n")
    if number == signal.SIGTERM and not deaf:
        sys.exit(0)
