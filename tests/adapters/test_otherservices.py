"""The program that sends through apprise ends with who started it, and by itself."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmwd.adapters import otherservices
from tests.adapters.held import running
from tests.fakes.ntfy import NtfyServer
from tests.waiting import wait_until

CHECKOUT = Path(__file__).parents[2]


def test_it_ends_when_its_time_is_over_whatever_it_waits_for():
    argv = [sys.executable, "-P", str(otherservices.PROGRAM), str(os.getpid()), "0.5"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE) as waits:
        assert waits.wait(20) == -signal.SIGALRM


def test_it_ends_with_its_parent():
    """As the notifier does it: from a thread."""
    program = "import sys, threading\nfrom llmwd.adapters import otherservices\n" \
        "threading.Thread(target=otherservices.send, args=(sys.argv[1], 't', 'm', False)).start()"
    with NtfyServer() as server:
        server.plan[:] = ["hang"]
        with subprocess.Popen([sys.executable, "-c", program, f"json://127.0.0.1:{server.server_port}/x"], cwd=CHECKOUT) as parent:
            wait_until(lambda: server.tries, 60)
            (child,) = children(parent.pid)
            parent.kill()
        wait_until(lambda: not running([child]), 2)  # apprise itself waits 4 s


def children(pid: int) -> list[int]:
    return [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]


@pytest.mark.parametrize("url", ["json://127.0.0.1:9/x"])
def test_a_service_that_is_not_there_is_tried_again(url):
    assert otherservices.send(url, "t", "m", False).result is otherservices.Result.again
