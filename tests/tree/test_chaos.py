"""A short play of faults at random, judged by the observer; long ones are run by hand with other seeds."""

import subprocess
import sys
import time

import pytest

from tests.tree.conftest import Start
from tests.tree.supervised import CHECKOUT
from tests.waiting import wait_until


def chaos(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, CHECKOUT / "scripts" / "chaos.py", *words], capture_output=True, text=True, timeout=280,
        stdin=subprocess.DEVNULL,
    )


def test_faults_at_random_violate_no_guarantee_and_it_serves_again_after_them() -> None:
    done = chaos("--driver", "--minutes", "0.35", "--seed", "4", "--pace", "0.4")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert "violations: 0" in done.stdout and "the end: serves" in done.stdout


def test_what_goes_wrong_with_the_driver_makes_us_leave_where_it_must_and_delays_no_job() -> None:
    names = ("serving driver stranger", "loading driver lost", "serving driver ghost", "serving driver forgotten-stranger")
    done = chaos(*(word for name in names for word in ("--only", name)))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert "violations: 0" in done.stdout and done.stdout.count("free after") == len(names)
    assert '"for": "the stranger' in done.stdout and '"for": "a driver that says 15' in done.stdout  # the observer saw it


def test_processes_killed_and_stopped_in_phases_of_the_matrix_keep_no_gpu_from_a_job() -> None:
    names = (
        "serving kill+stop root holder", "yielding stop holder", "serving stop guard holder", "loading stop+stop vllm holder",
        "serving kill+stop resolver vllm", "waiting kill server", "resuming kill+kill root holder",
    )  # fmt: skip
    done = chaos(*(word for name in names for word in ("--only", name)))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert "violations: 0" in done.stdout and done.stdout.count("free after") == len(names)


@pytest.mark.parametrize("name", ["chaos.py", "bench_door.py", "bench_yield.py", "slurm_testbed.py"])
def test_a_script_finds_the_projects_environment_from_any_python(name: str) -> None:
    """As README has it: typed by somebody whose python3 knows nothing of ours."""
    done = subprocess.run(
        [sys._base_executable, "-s", CHECKOUT / "scripts" / name, "--help"], capture_output=True, text=True, timeout=280,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0 and done.stdout.startswith("usage:"), done.stderr


def test_a_seed_is_always_the_same_sequence() -> None:
    first, again, other = (chaos("--plan", "200", "--seed", seed).stdout for seed in ("7", "7", "8"))
    assert first == again != other and first.count("\n") == 200


def test_every_tree_of_these_tests_is_judged_by_the_observer(supervised: Start) -> None:
    tree = supervised()
    tree.serving()
    wait_until(lambda: tree.observer.lines(), 30, what="its first look")
    tree.tell("held")  # a lie: nobody has ordered it
    told_s = time.monotonic()
    wait_until(lambda: time.monotonic() > told_s + 2, what="the end of the second in which a start is excused")
    tree.write_profile("other")
    assert tree.ctl("switch", "other", "--wait").returncode == 0
    with pytest.raises(AssertionError, match="G8.*a server was started"):
        tree.judge()
