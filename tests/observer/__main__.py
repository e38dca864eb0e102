"""python -m tests.observer --mark NAME=VALUE …: watch a whole llmwd, tell what breaks a guarantee.

On standard input: a JSON line for what is done to it (`Judge.told`); its end asks for the summary. On standard
output: a JSON line for each thing seen, the summary last. Exit code 1: a guarantee was violated.
"""

import argparse
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

from tests.observer.driver import DriverSight
from tests.observer.judge import Bounds, Judge
from tests.observer.sight import Sight, start_of

CGROUPS_EVERY_S = 0.5
BYSTANDERS = ("vllm serve fake", "VLLM::EngineCore", "llmwd: holder vllm")  # names that somebody else's may have


def bystanders() -> list[subprocess.Popen]:
    """Innocent processes of the same user under our names. Each ends with us: it reads from a pipe of ours."""
    return [
        subprocess.Popen(
            ["bash", "-c", f"exec -a '{name}' cat"], env={"PATH": os.environ["PATH"]}, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for name in BYSTANDERS
    ]


def harmed(innocents: list[subprocess.Popen]) -> str:
    for process, name in zip(innocents, BYSTANDERS):
        if process.poll() is not None:
            return f"the bystander `{name}` was ended by signal {-process.returncode}"
        if Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "Tt":
            return f"the bystander `{name}` was stopped"
    return ""


def say(word: dict) -> None:
    print(json.dumps(word), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mark", required=True, help="NAME=VALUE in the environment of all that is watched")
    parser.add_argument("--folder-in", required=True, help="name of the variable that holds what the command lines hold of those without the mark")
    parser.add_argument("--jobs-in", required=True, help="name of the variable that holds the folder of simulated jobs")
    parser.add_argument("--scope", type=Path, help="the cgroup below which slurmstepd makes a folder for each real job")
    parser.add_argument("--world-in", help="name of the variable that holds the stand-in driver's world file")
    for name, default in (("ttl", 10.0), ("grace", 1.0), ("resolve", 1.0)):
        parser.add_argument(f"--{name}", type=float, default=default, help="as in the settings, seconds")
    parser.add_argument("--every", type=float, default=0.015, help="seconds between two looks")
    asked = parser.parse_args()
    judge = Judge(Bounds(asked.ttl, asked.grace, asked.resolve), say)
    sight = Sight(asked.mark, os.environ[asked.folder_in], Path(os.environ[asked.jobs_in]), asked.scope)
    if asked.world_in:
        sight.trouble = DriverSight(Path(os.environ[asked.world_in]), start_of, asked.ttl).look
    innocents = bystanders()
    try:
        watch(judge, sight, innocents, asked.every)
    finally:
        for process in innocents:
            process.kill()
            process.wait()
    say(judge.summary())
    return 1 if judge.violations else 0


def watch(judge: Judge, sight: Sight, innocents: list[subprocess.Popen], every_s: float) -> None:
    unharmed = True
    lingered: set[tuple[int, str]] = set()
    looked_s = 0.0
    told = Told(sys.stdin.fileno())
    say({"event": "watching"})
    while not told.ended:
        sample = sight.look()
        # What is done is told before: all that can have had an effect on this look is known when it is judged.
        for word in told.words(0.0):
            judge.told(word, time.monotonic())
        judge.judge(sample)
        if time.monotonic() - looked_s > CGROUPS_EVERY_S:
            looked_s, before, lingered = time.monotonic(), lingered, sight.lingers()
            for pid, what in before & lingered:  # a look inside that is over at once keeps no cgroup from ending
                judge.cgroup_kept(f"process {pid} keeps {what}", looked_s)
        if unharmed and (how := harmed(innocents)):
            unharmed = False
            judge.bystander_harmed(how, time.monotonic())
        for word in told.words(every_s):
            judge.told(word, time.monotonic())


class Told:
    """The lines on a descriptor. `ended`: there will be no more."""

    def __init__(self, fd: int) -> None:
        self.fd, self.rest, self.ended = fd, b"", False

    def words(self, within_s: float) -> list[dict]:
        """What is there, or comes first within the time."""
        if self.ended or not select.select([self.fd], [], [], within_s)[0]:
            return []
        data = os.read(self.fd, 65536)
        self.ended = not data
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [json.loads(line) for line in lines]


if __name__ == "__main__":
    sys.exit(main())
