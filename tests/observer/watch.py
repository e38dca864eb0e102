"""The observer's process, as a test starts it, tells it what it does, and asks what it saw."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.observer.judge import Bounds
from tests.waiting import wait_until

CHECKOUT = Path(__file__).resolve().parents[2]


class Observer:
    """Watches everything that carries the mark. `seen`: the file of its lines; scope: where real jobs have their cgroups;
    world: the stand-in driver's."""

    def __init__(self, mark: str, runtime: Path, jobs: Path, seen: Path, bounds: Bounds, scope: Path | None = None,
                 every_s: float = 0.015, world: Path | None = None):
        self.seen = seen
        command = [sys.executable, "-m", "tests.observer", "--mark", mark, "--folder-in", "OBSERVED", "--jobs-in", "OBSERVED_JOBS"]
        command += ["--ttl", str(bounds.ttl_s), "--grace", str(bounds.grace_s), "--resolve", str(bounds.resolve_s), "--every", str(every_s)]
        command += ["--scope", str(scope)] if scope is not None else []
        command += ["--world-in", "OBSERVED_WORLD"] if world is not None else []
        # The folders are not on its command line: it would be taken for one of those that it watches.
        env = os.environ | {"OBSERVED": str(runtime), "OBSERVED_JOBS": str(jobs), "OBSERVED_WORLD": str(world)}
        with seen.open("wb") as out:
            self.process = subprocess.Popen(
                command, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )

    def ready(self) -> "Observer":
        wait_until(lambda: self.lines() or self.process.poll() is not None, 30, what="the observer's first look")
        return self

    def tell(self, event: str, **words: object) -> None:
        """What is done to the watched: see Judge.told."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"event": event, **words}).encode() + b"\n")
            self.process.stdin.flush()

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.seen.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def end(self) -> tuple[int, dict]:
        """Its exit code and its summary."""
        self.process.stdin.close()
        code = self.process.wait(30)
        return code, (self.lines() or [{}])[-1]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
