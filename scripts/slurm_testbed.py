#!/usr/bin/env python3
"""A one-node Slurm with pretended GPUs to try things on: `scripts/slurm_testbed.py up --dir /tmp/slurm` (as root).

Prints how to use it and stays until Ctrl-C or SIGTERM, then takes everything down again."""

import argparse
import shlex
import signal
import sys
from pathlib import Path

import own_python

own_python.ensure()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.slurm.testbed import SlurmError, SlurmNode  # noqa: E402

STOPPING = (signal.SIGINT, signal.SIGTERM)

USE = """\
Slurm node {node} is idle: {gpus} GPUs, cgroup {cgroup}. In another shell:

  export SLURM_CONF={conf}
  sbatch --gres=gpu:2 --output=/dev/null --wrap 'sleep 600'
  squeue; scontrol show job 1 -d; scancel 1

Job folders: {scope}
Slurmd's spool: {spool}
Ctrl-C or SIGTERM takes everything down."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    up = parser.add_subparsers(dest="verb", required=True).add_parser("up", help="start it and stay")
    up.add_argument("--dir", type=Path, required=True, help="folder for everything it writes; a short path")
    up.add_argument("--cgroup", choices=("v1", "v2"), default="v2")
    up.add_argument("--gpus", type=int, default=8)
    wanted = parser.parse_args()
    # Blocked from here on, so that a signal during start or stop waits for its turn instead of leaving half of it.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        with SlurmNode(wanted.dir, cgroup=wanted.cgroup, gpus=wanted.gpus) as node:
            conf = shlex.quote(node.env["SLURM_CONF"])
            what = {"node": node.node, "gpus": node.gpus, "cgroup": node.cgroup}
            print(USE.format(conf=conf, scope=node.scope, spool=node.spool, **what), flush=True)
            signal.sigwait(STOPPING)
            print("Stopping.", flush=True)
    except (SlurmError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
