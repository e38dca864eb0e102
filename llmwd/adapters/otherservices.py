"""Notices to other services through apprise, each in a disposable process: apprise loads hundreds of modules, and may wait."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec

from llmwd import redact
from llmwd.adapters.ntfy import LONGEST_WHY, Outcome, Result

WITHIN_S = 45.0
PROGRAM = Path(__file__).with_name("otherservices_send.py")
MISSING = "apprise is not installed, and NOTIFY_URLS needs it: run `scripts/env.sh apprise`"


class Told(msgspec.Struct):
    """The program's answer."""

    result: str
    why: str = ""


def send(url: str, title: str, message: str, alarm: bool) -> Outcome:
    """To one of apprise's URLs. Blocks for up to WITHIN_S."""
    return _run({"url": url, "title": title, "message": message, "type": "failure" if alarm else "info"})


def check(url: str) -> str:
    """What is wrong with the URL, or with apprise; "" for nothing. Sends nothing."""
    outcome = _run({"url": url})
    return "" if outcome.result is Result.sent else outcome.why


def _run(asked: dict[str, str]) -> Outcome:
    # The URL holds secrets: on standard input, because everybody on the node can read a command line.
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(PROGRAM), str(os.getpid()), str(WITHIN_S)], input=msgspec.json.encode(asked), capture_output=True, timeout=WITHIN_S,
            cwd="/", env=dict(os.environ), start_new_session=True,
        )  # fmt: skip
        told = msgspec.json.decode(done.stdout, type=Told)
    except subprocess.TimeoutExpired:
        return Outcome(Result.again, f"a service of NOTIFY_URLS does not answer within {WITHIN_S:g} s")
    except OSError as error:
        return Outcome(Result.again, f"the program for NOTIFY_URLS cannot be run: {error.strerror}")
    except msgspec.DecodeError:
        return Outcome(Result.again, f"the program for NOTIFY_URLS ended without an answer (exit code {done.returncode})")
    if told.result == "missing":
        return Outcome(Result.refused, MISSING)
    why = redact.mask(told.why.replace(asked["url"], redact.HIDDEN))[:LONGEST_WHY]
    return Outcome(Result(told.result), why)
