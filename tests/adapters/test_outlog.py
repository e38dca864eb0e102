"""A service's log as its holder drains it. What is told of a death is read from there at once."""

import subprocess
import sys
from pathlib import Path

# The thread has taken the last words out of the pipe, and does not get to run for a while.
LATE = """
import os, sys, time
from llmwd.adapters import outlog
read = os.read
def late(fd, most):
    data = read(fd, most)
    time.sleep(0.3)
    return data
os.read = late
log = outlog.OutLog(sys.argv[1], 1 << 20, 1)
service = os.dup(log.service_end)
log.start()
os.write(service, b"last words\\n")
time.sleep(0.1)
log.settle(10)
print(open(sys.argv[1]).read(), end="", flush=True)
"""


def test_what_was_taken_from_the_pipe_and_is_not_written_yet_is_waited_for(tmp_path: Path) -> None:
    said = subprocess.run([sys.executable, "-c", LATE, str(tmp_path / "log")], capture_output=True, text=True, timeout=30)
    assert said.stdout == "last words\n", said.stderr
