#!/usr/bin/env python3
"""Faults at random against a whole llmwd with simulated jobs and a stand-in server, judged from outside.

    scripts/chaos.py --minutes 10 --seed 7       the same seed does the same things in the same order
    scripts/chaos.py --plan 100 --seed 7         only prints what it would do
    scripts/chaos.py --driver                    on the GPUs of a stand-in NVIDIA driver, with its faults and other people's processes
    scripts/chaos.py --matrix                    not at random: every process killed and stopped in every phase
    scripts/chaos.py --matrix --every 10         each tenth of these
    scripts/chaos.py --matrix --pairs            every two of those who free the GPUs, killed and stopped in all four ways
    scripts/chaos.py --matrix --driver           everything that goes wrong with the driver, while the model loads and serves
    scripts/chaos.py --only "serving kill+stop root holder"      one cell, as it is printed; may be given again

Prints what it does and what the observer (tests/observer) sees, then a summary. Exit code 1: a guarantee was violated,
or it did not serve again once everything was healed. As root it also fills disks. It leaves nothing behind; with
--keep FOLDER the logs and the observer's lines stay there.
"""

import argparse
import contextlib
import itertools
import json
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import own_python

own_python.ensure()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.chaos.matrix import DRIVER, cells, meet, named, of_driver, pairs  # noqa: E402
from tests.chaos.plan import actions  # noqa: E402
from tests.chaos.run import Play, Stuck  # noqa: E402
from tests.chaos.stage import Stage  # noqa: E402
from tests.tree import bugs  # noqa: E402

COLUMNS = 220


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--driver", action="store_true", help="GPUs of the stand-in NVIDIA driver, which hangs, loses GPUs, lists strangers, …")
    parser.add_argument("--matrix", action="store_true", help="go through tests/chaos/matrix.py instead, however long it takes")
    parser.add_argument("--pairs", action="store_true", help="with --matrix: the pairs instead")
    parser.add_argument("--only", action="append", type=named, default=[], metavar="CELL", help="this cell of the matrix alone")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="with --matrix: only each Nth cell, from --seed on")
    parser.add_argument("--pace", type=float, default=1.0, help="how many times as long to wait between two actions")
    parser.add_argument("--plan", type=int, metavar="N", help="print the first N actions and do nothing")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="copy its logs and all that was seen there")
    asked = parser.parse_args()
    asked.driver |= any(cell.how == DRIVER for cell in asked.only)
    if asked.plan:
        for action in itertools.islice(actions(asked.seed, asked.pace, asked.driver), asked.plan):
            print(action)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="chaos-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        stage = Stage(Path(folder), asked.driver)
        try:
            return perform(stage, asked)
        finally:
            if asked.keep:
                keep(stage, asked.keep)
            stage.close()


def perform(stage: Stage, asked: argparse.Namespace) -> int:
    began_s = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began_s:7.2f}  {text}"[:COLUMNS], flush=True)

    def show() -> None:
        lines = stage.observer.lines()
        for line in lines[show.count :]:
            print(f"{'':9}observed: {json.dumps(line)}", flush=True)
        show.count = len(lines)

    show.count = 0
    play = Play(stage, asked.seed, say)
    stuck, interrupted = "", False
    stage.begin()
    try:
        if asked.matrix or asked.only:
            whole = of_driver() if asked.driver else pairs() if asked.pairs else cells()
            chosen = asked.only or whole[asked.seed % asked.every :: asked.every]
            for number, cell in enumerate(chosen, 1):
                said = meet(play, cell)
                play.done["cells that missed their phase" if "MISSED" in said else "cells"] += 1
                say(f"{number}/{len(chosen)} {cell}  -> {said}")
                show()
        for action in () if asked.matrix or asked.only else actions(asked.seed, asked.pace, asked.driver):
            if time.monotonic() - began_s > asked.minutes * 60:
                break
            play.act(action)
            show()
        say(f"the end: {play.calm('fake')}")
    except (Stuck, AssertionError) as found:  # or something awaited did not come
        stuck = str(found)
    except KeyboardInterrupt:
        interrupted = True
    end = finish(stage) if not stuck and not interrupted else ""
    with contextlib.suppress(KeyboardInterrupt):
        code, summary = stage.observer.end()
    show()
    tell(play, summary, asked, time.monotonic() - began_s, stuck or end)
    return 130 if interrupted else 1 if code or stuck or end else 0


def finish(stage: Stage) -> str:
    """An orderly end; what was wrong with it."""
    stage.observer.tell("happened")
    code = stage.tree.stop(40)
    if found := bugs.in_files(stage.tree.errors):
        return f"faults of our own code: {found}"
    left = stage.tree.left()
    return f"after the ordered end (exit code {code}) there are still {left}" if left or code else ""


def tell(play: Play, summary: dict, asked: argparse.Namespace, took_s: float, wrong: str) -> None:
    did = ", ".join(f"{count} {kind}" for kind, count in play.done.most_common())
    print(f"\nseed {asked.seed}: {sum(play.done.values())} actions in {took_s / 60:.1f} min: {did}; {play.starts} restarts of the root")
    print(
        f"releases: {summary.get('releases')}, the worst {summary.get('worst_release_s')} s; in the middle of faults "
        f"{summary.get('worst_release_in_fault_s')} s (looks up to {summary.get('worst_look_s')} s apart)"
    )
    if asked.driver:
        print(f"left for what the driver had against us: {summary.get('left')} times, the worst after {summary.get('worst_left_s')} s")
    for violation in summary.get("violations", ()):
        print(f"VIOLATION {violation['guarantee']}: {violation['text']}")
    if wrong:
        print(f"STUCK: {wrong}"[:3000])
    print("violations: " + str(len(summary.get("violations", ())) + bool(wrong)))


def keep(stage: Stage, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(stage.tree.state, folder / "state", dirs_exist_ok=True)
    with contextlib.suppress(OSError):
        shutil.copytree(stage.tree.runtime / "facts", folder / "facts", dirs_exist_ok=True)
    for path in (stage.observer.seen, stage.tree.errors):
        shutil.copy(path, folder)


if __name__ == "__main__":
    sys.exit(main())
