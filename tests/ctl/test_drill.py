"""A drill's job is removed whenever it is interrupted, and its verdict is the resolver's."""

import subprocess
import sys
from pathlib import Path

import pytest

from llmwd.ctl.drill import judged
from llmwd.messages import ReleaseProof
from llmwd.vocab import Reason
from tests.ctl.stand import CHECKOUT

# Strikes, and is interrupted: in the middle (first), and where the job is about to be removed (last).
INTERRUPTED = """
import signal, sys
from pathlib import Path
from llmwd.ctl import drill
first, last, folder = sys.argv[1:]
stage = drill.Stage.__new__(drill.Stage)
stage.folder, stage.within_s = Path(folder), 1.0
for number in drill.ENDINGS:
    signal.signal(number, drill._end_once)
mask = signal.pthread_sigmask
def masked(how, numbers):
    if how == signal.SIG_BLOCK and list(Path(folder).iterdir()) and last:
        signal.raise_signal(signal.Signals[last])
    return mask(how, numbers)
signal.pthread_sigmask = masked
try:
    with stage._job((0,), set()):
        assert list(Path(folder).iterdir())
        if first:
            signal.raise_signal(signal.Signals[first])
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("ending", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("last", ["", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("first", [True, False])
def test_the_job_is_removed_however_often_the_drill_is_interrupted(tmp_path: Path, ending: str, last: str, first: bool) -> None:
    words = [ending if first else "", last, str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, *words], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert done.returncode == (130 if first or last else 0), done.stderr
    assert list(tmp_path.iterdir()) == []


def proof(gone_s: float, proved_s: float, judged: bool = False) -> ReleaseProof:
    return ReleaseProof(
        epoch=1, gpus=(6,), uuids=("A",), reason=Reason.yielded_to_job, job="900001", begun_s=100.0, gone_s=100 + gone_s,
        proved_s=100 + proved_s, judged=judged,
    )  # fmt: skip


def test_the_verdict_is_the_resolvers_and_a_driver_that_answers_late_is_told_but_breaks_nothing() -> None:
    assert judged(proof(0.3, 0.4), 5.0, 60.0) == (True, "proved within 0.40 s of the budget of 5 s")
    late = judged(proof(0.3, 8.0), 5.0, 60.0)
    assert late == (True, "gone within 0.30 s of the budget of 5 s; the driver's proof came only after 8.00 s")
    for broken in (proof(6.0, 6.1), proof(0.3, 8.0, judged=True)):
        passed, verdict = judged(broken, 5.0, 60.0)
        assert not passed and "BROKEN; llmwd stays away" in verdict
    assert judged(None, 5.0, 60.0) == (False, "no release was proved within 60 s; the budget of 5 s is BROKEN")
