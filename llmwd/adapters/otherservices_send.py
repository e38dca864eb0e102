"""A program: one notice through apprise. JSON on standard input, {"result", "why"} on standard output.

Arguments: the pid of who starts it, and the seconds that it has. It ends with its parent, because nobody would read the
answer and the next incarnation sends the notice again; and by the kernel's clock, because a service may hang for ever.
"""

import ctypes
import io
import json
import logging
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main(parent: int, within_s: float) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, within_s)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        return
    asked = json.load(sys.stdin)
    try:
        import apprise
    except ImportError:
        return answer("missing")
    service = asked["url"].partition("://")[0]
    said = io.StringIO()
    logging.getLogger("apprise").addHandler(logging.StreamHandler(said))
    logging.getLogger("apprise").setLevel(logging.WARNING)
    box = apprise.Apprise()
    if not box.add(asked["url"]) or len(box) != 1:
        return answer("refused", f"NOTIFY_URLS holds an address ({service}://...) that apprise does not understand: correct it")
    if "title" not in asked:
        return answer("sent")
    if box.notify(body=asked["message"], title=asked["title"], notify_type=asked["type"], body_format="text"):
        return answer("sent")
    lines = [line for line in said.getvalue().splitlines() if line.strip()]
    return answer("again", f"{service}: {lines[-1] if lines else 'apprise could not send it'}")


def answer(result: str, why: str = "") -> None:
    print(json.dumps({"result": result, "why": why}))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
