"""What jobs really had and when, by their own word, held against what llmwd's journal says it had.

The jobs write for themselves, so nothing of llmwd takes part in saying when one ran; both sides use the wall clock of
this machine.
"""

import time
from pathlib import Path
from typing import NamedTuple

from tests.slurm.testbed import SlurmNode
from tests.tree.supervised import Supervised
from tests.waiting import wait_until

# A job's processes and ours may meet for as long as a yield takes, on a machine that other tests use as well.
YIELD_WITHIN_S = 4.0
# A job that begins in the moment of a grant is seen a moment later, and the lease ends at once; on a busy machine the
# kernel lets the detector, and whoever writes the journal, run only after so long (the observer's bound, too).
SEEN_WITHIN_S = 1.0


class Run(NamedTuple):
    """One run of a job: its GPUs and its time; `ended_at` is infinite while it runs."""

    job: str
    gpus: frozenset[int]
    began_at: float
    ended_at: float


class Ledger:
    """A file to which jobs submitted here write when they begin and when they end."""

    def __init__(self, folder: Path):
        self._path = folder / "ledger"

    def script(self, command: str) -> str:
        """A job's script that runs `command` between its two lines."""
        note = f'"$SLURM_JOB_ID $(date +%s.%N) gpus=$SLURM_JOB_GPUS" >> {self._path}'
        return f"echo + {note}; {command}; echo - {note}"

    def sbatch(self, node: SlurmNode, command: str, *args: str) -> int:
        return node.sbatch(self.script(command), *args)

    def cancel(self, node: SlurmNode, *jobs: int) -> None:
        """scancel; until here they ran, whatever they had still to write."""
        for job in jobs:
            self.ends(job)
        node.scancel(*jobs)

    def ends(self, job: int) -> None:
        """From now on it need not run any more, as for a job that is about to be requeued. Waits until it has begun."""
        self.begun(job)
        with self._path.open("a") as file:
            file.write(f"- {job} {time.time():.6f} gpus=\n")

    def begun(self, job: int) -> None:
        """Wait until it runs by its own word."""
        wait_until(lambda: any(run.job == str(job) and run.ended_at == float("inf") for run in self.runs()), 30)

    def runs(self) -> list[Run]:
        found: list[Run] = []
        text = self._path.read_text() if self._path.exists() else ""
        for line in text[: text.rfind("\n") + 1].splitlines():  # a line over two pages may be half there for a moment
            sign, job, at, gpus = line.split()
            if sign == "+":
                indices = frozenset(int(index) for index in gpus.removeprefix("gpus=").split(",") if index)
                found.append(Run(job, indices, float(at), float("inf")))
            else:
                began = max(index for index, run in enumerate(found) if run.job == job)
                found[began] = found[began]._replace(ended_at=float(at))
        return found

    def wrongs(self, tree: Supervised) -> list[str]:
        """Every time llmwd had a GPU of a running job: granted beside it at all, or kept longer than a yield takes."""
        released = {entry["epoch"]: entry["at"] for entry in tree.journal("released")}
        revoked = {entry["epoch"]: entry["at"] for entry in tree.journal("lease_revoked")}
        found = []
        for lease in tree.journal("lease_granted"):
            epoch, since = lease["epoch"], lease["at"]
            until = released.get(epoch) or revoked.get(epoch) or float("inf")
            for run in self.runs():
                if not run.gpus & set(lease["gpus"]) or until <= run.began_at or run.ended_at <= since:
                    continue
                if since > run.began_at + SEEN_WITHIN_S:
                    found.append(f"lease {epoch} was granted {since - run.began_at:.2f} s after {run} had begun")
                elif min(until, run.ended_at) - run.began_at > YIELD_WITHIN_S:
                    found.append(f"lease {epoch} was kept for {until - run.began_at:.2f} s beside {run}")
        return found


def yields_started_twice(tree: Supervised) -> list[int]:
    """Epochs of leases that were revoked, or whose servers were released, more than once."""
    revoked = [entry["epoch"] for entry in tree.journal("lease_revoked")]
    released = [entry["epoch"] for entry in tree.journal("released")]
    return sorted({epoch for epochs in (revoked, released) for epoch in epochs if epochs.count(epoch) > 1})
