"""The detector's loop: from a sign in a source to the fact, without the tree around it."""

import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmwd.adapters import jobprocs
from llmwd.messages import JobsFact, SourceState
from llmwd.vocab import Source
from llmwd.workers import detector
from tests.fakes.loop_shell import LoopShell
from tests.tree.conftest import Start
from tests.waiting import wait_until

Make = Callable[..., LoopShell]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Starts a detector that sees no Slurm but the one in tmp_path/slurm.conf.

    The cgroups of other tests' nodes may be on the machine: theirs are other names."""
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    monkeypatch.setattr(detector.slurm, "show_config", lambda: ["false"])
    made: list[LoopShell] = []

    def start(**changes: object) -> LoopShell:
        shell = LoopShell(tmp_path, **{"slurm_node": f"none-{uuid.uuid4().hex}", **changes})
        made.append(shell)
        detector.main(shell)  # type: ignore[arg-type]
        return shell

    yield start
    for shell in made:
        shell.close()


def fact(shell: LoopShell) -> JobsFact:
    last = shell.facts[-1][1]
    assert isinstance(last, JobsFact)
    return last


def ids(shell: LoopShell) -> set[str]:
    return {job.id for job in fact(shell).jobs} if shell.facts else set()


def states(shell: LoopShell) -> dict[str, SourceState]:
    return {state.name: state for state in fact(shell).sources}


def simulate(shell: LoopShell, job: str, text: str) -> Path:
    path = shell.boot.runtime / "sim" / f"job_{job}"
    path.write_text(text)
    return path


def test_without_slurm_the_simulation_alone_makes_a_whole_picture(make: Make) -> None:
    shell = make(detection=("sim", "procfs"))
    shell.until(lambda: shell.facts)
    assert shell.is_ready and fact(shell).scanned and not fact(shell).jobs


def test_auto_says_what_works_and_why_the_rest_does_not(make: Make) -> None:
    shell = make(detection=("auto",))
    shell.until(lambda: shell.facts)
    assert set(states(shell)) == {"stepd", "cgroup2", "cgroup1", "procfs", "sim"}
    assert all(state.works or state.why for state in states(shell).values())
    assert states(shell)["sim"].works and not states(shell)["stepd"].works
    assert fact(shell).scanned


def test_nothing_half_true_is_said_before_every_source_has_looked(make: Make) -> None:
    shell = make(detection=("sim", "procfs"))
    assert not shell.facts
    shell.until(lambda: shell.facts)
    assert fact(shell).scanned


def test_a_job_that_arrives_while_a_slow_source_still_looks_is_told_at_once(make: Make) -> None:
    shell = make(detection=("sim", "procfs"))
    shell.cancel("procfs-overdue")
    simulate(shell, "42", "0-1")
    shell.turn()
    assert ids(shell) == {"42"}


def test_a_source_that_takes_too_long_does_not_silence_the_detector(make: Make) -> None:
    shell = make(detection=("sim", "procfs"))
    shell.fire("first")
    assert shell.facts and not fact(shell).scanned


def test_a_job_and_its_end_are_published_at_once(make: Make) -> None:
    shell = make(detection=("sim",))
    before_s = time.monotonic()
    path = simulate(shell, "42", "0-1")
    shell.turn()
    assert [(job.id, job.gpus) for job in fact(shell).jobs] == [("42", (0, 1))]
    assert before_s <= fact(shell).jobs[0].seen_s <= shell.facts[-1][0]
    path.unlink()
    shell.turn()
    assert ids(shell) == set()


def test_a_job_that_ends_while_another_begins_is_noticed(make: Make) -> None:
    shell = make(detection=("sim",))
    simulate(shell, "42", "0")
    shell.turn()
    count = len(shell.facts)
    (shell.boot.runtime / "sim" / "job_42").rename(shell.boot.runtime / "sim" / "job_43")
    shell.turn()
    assert ids(shell) == {"43"} and len(shell.facts) == count + 1


def test_a_simulated_job_with_a_time_ends_by_itself(make: Make) -> None:
    shell = make(detection=("sim",))
    path = simulate(shell, "42", "0\nfor=1")
    shell.turn()
    assert ids(shell) == {"42"}
    shell.until(lambda: not ids(shell))
    assert not path.exists()


def test_the_whole_truth_is_repeated_while_nothing_changes(make: Make) -> None:
    shell = make(detection=("sim",), lease_ttl_s=2.0)
    shell.until(lambda: len(shell.facts) >= 3)
    assert shell.facts[-1][1].at_s > shell.facts[0][1].at_s


def test_a_named_source_that_does_not_work_blocks_with_its_reason(make: Make) -> None:
    shell = make(detection=("sim", "stepd", "gresused"))
    shell.until(lambda: shell.facts)
    assert not fact(shell).scanned
    assert not states(shell)["stepd"].works and states(shell)["stepd"].why


def test_sockets_are_seen_in_the_folder_that_slurm_conf_names(make: Make, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    (tmp_path / "slurm.conf").write_text(f"SlurmdSpoolDir={spool}\n")
    shell = make(detection=("auto",))
    shell.until(lambda: shell.facts)
    assert not states(shell)["stepd"].works and fact(shell).scanned == states(shell)["procfs"].works
    shell.cancel("scan")  # the events alone have to do
    (tmp_path / "spooled").mkdir()
    shell.turn()
    assert not states(shell)["stepd"].works, "something else beside it is no spool folder"
    spool.mkdir()
    shell.until(lambda: states(shell)["stepd"].works)
    (spool / "n_77.4294967291").touch()
    shell.until(lambda: "77" in ids(shell))


def test_a_source_that_worked_and_broke_blocks_until_it_works_again(make: Make, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    (tmp_path / "slurm.conf").write_text(f"SlurmdSpoolDir={spool}\n")
    shell = make(detection=("stepd", "sim"))
    shell.until(lambda: shell.facts)
    assert fact(shell).scanned
    spool.rmdir()
    spool.symlink_to(spool.name)  # a loop: looking fails, for root too
    shell.fire("scan")
    assert not fact(shell).scanned and "symbolic" in states(shell)["stepd"].why
    spool.unlink()
    spool.mkdir()
    shell.fire("scan")
    assert fact(shell).scanned


def test_where_no_source_can_see_slurms_jobs_nothing_is_scanned_and_every_reason_is_told(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No cgroups for jobs, a spool folder that cannot be read, and processes that are hidden: each has its excuse."""
    spool = tmp_path / "spool"
    spool.symlink_to(spool.name)  # a loop: looking fails, for root too
    (tmp_path / "slurm.conf").write_text(f"SlurmdSpoolDir={spool}\nProctrackType=proctrack/linuxproc\n")
    monkeypatch.setattr(jobprocs, "hidden", lambda *_: "/proc is mounted with hidepid")
    shell = make(detection=("auto",))
    shell.until(lambda: shell.facts)
    assert not fact(shell).scanned
    assert all(not state.works and state.why for state in states(shell).values() if state.name != "sim")
    spool.unlink()
    spool.mkdir()
    shell.fire("scan")
    assert fact(shell).scanned and states(shell)["stepd"].works


def test_without_inotify_a_source_is_polled_and_says_so(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(24, os.strerror(24))

    monkeypatch.setattr("llmwd.adapters.inotify.INotify", refuse)
    shell = make(detection=("sim",), poll_interval_s=0.05)
    shell.until(lambda: shell.facts)
    assert states(shell)["sim"].works and "polled" in states(shell)["sim"].why and fact(shell).scanned
    simulate(shell, "42", "0")
    shell.until(lambda: "42" in ids(shell))
    monkeypatch.undo()
    shell.fire("scan")
    assert states(shell)["sim"].why == ""
    simulate(shell, "43", "0")
    shell.turn()
    assert ids(shell) == {"42", "43"}


def test_processes_are_looked_at_seldom_where_folders_work_and_often_where_nothing_does(
    make: Make, tmp_path: Path
) -> None:
    (tmp_path / "slurm.conf").write_text(f"SlurmdSpoolDir={tmp_path}/spool\n")
    alone = make(detection=("procfs",), poll_interval_s=0.05)
    alone.until(lambda: "procfs" in alone.timers)
    assert alone.timers["procfs"] < time.monotonic() + 2
    (tmp_path / "spool").mkdir()
    beside = make(detection=("procfs", "stepd"), poll_interval_s=0.05)
    beside.until(lambda: "procfs" in beside.timers)
    assert beside.timers["procfs"] > time.monotonic() + 10


def test_a_job_that_is_requeued_within_one_batch_of_events_is_another_run(make: Make, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    (tmp_path / "slurm.conf").write_text(f"SlurmdSpoolDir={spool}\n")
    (spool / "n_7.0").touch()
    shell = make(detection=("stepd", "procfs"))
    shell.until(lambda: shell.facts)
    seen_s, count = fact(shell).jobs[0].seen_s, len(shell.facts)
    (spool / "n_7.0").unlink()
    (spool / "n_7.4294967291").touch()
    shell.until(lambda: len(shell.facts) > count)
    assert ids(shell) == {"7"} and fact(shell).jobs[0].seen_s > seen_s


def test_a_job_that_is_requeued_while_the_detector_is_stopped_is_another_run(supervised: Start, tmp_path: Path) -> None:
    """A real one, that hangs (SIGSTOP) for as long as one run ends and the next begins."""
    spool = tmp_path / "spool"
    spool.mkdir()
    (tmp_path / "slurm.conf").write_text(f"SlurmdSpoolDir={spool}\n")
    tree = supervised(start=False, DETECTION="stepd,sim")
    tree.env["SLURM_CONF"] = str(tmp_path / "slurm.conf")
    tree.start().all_ready()

    def first_sign() -> float | None:
        jobs = tree.look().facts.jobs
        return next((job.seen_s for job in jobs.jobs if job.id == "7"), None) if jobs else None

    (spool / "n_7.0").touch()
    seen_s = wait_until(first_sign, 30, every_s=0.02, what="the job's first run")
    tree.signal("detector", signal.SIGSTOP)
    (spool / "n_7.0").unlink()
    (spool / "n_7.0").touch()
    began_s = time.monotonic()
    tree.signal("detector", signal.SIGCONT)
    wait_until(lambda: (first_sign() or 0) >= began_s > seen_s, 30, every_s=0.02, what="its second run")


def test_new_settings_bring_new_sources_without_a_gap(make: Make) -> None:
    shell = make(detection=("sim",))
    simulate(shell, "42", "0")
    shell.turn()
    seen_s = fact(shell).jobs[0].seen_s
    shell.reload(detection=("sim", "procfs"))
    shell.until(lambda: "procfs" in states(shell) and fact(shell).scanned)
    assert all("42" in {job.id for job in said.jobs} for _, said in shell.facts[1:])
    assert fact(shell).jobs[0].seen_s == seen_s
    simulate(shell, "43", "0")
    shell.until(lambda: ids(shell) == {"42", "43"})


def test_stopping_ends_the_loop_and_closes_everything(make: Make) -> None:
    before = set(os.listdir("/proc/self/fd"))
    shell = make(detection=("auto",))
    shell.until(lambda: shell.facts)
    shell.close()
    assert shell.finished
    assert len(set(os.listdir("/proc/self/fd")) - before) == 0
    shell.stop = lambda within_s: None


def test_only_local_sources_are_the_detectors() -> None:
    assert detector.chosen(("gresused", "nvml", "sim")) == ((Source.sim,), True)
    assert detector.chosen(("auto",))[1] is False


def test_a_broken_source_looks_again_as_soon_as_something_happens(make: Make, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    (tmp_path / "slurm.conf").write_text(f"SlurmdSpoolDir={spool}\n")
    shell = make(detection=("stepd",))
    shell.until(lambda: shell.facts)
    shell.cancel("scan")
    spool.rmdir()
    spool.symlink_to(spool.name)
    shell.until(lambda: not fact(shell).scanned)
    spool.unlink()
    spool.mkdir()
    shell.until(lambda: fact(shell).scanned)
