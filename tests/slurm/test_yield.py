"""The whole tree beside a real Slurm node: which jobs make it yield, and which do not."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.testbed import SlurmNode
from tests.tree.supervised import Supervised
from tests.waiting import wait_until

# Named, not auto: a node without a tree of its own in the other version looks at everybody's, and other tests have some.
SOURCES = {"v2": "stepd,cgroup2,gresused,procfs,sim", "v1": "stepd,cgroup1,gresused,procfs,sim"}
SETTINGS = {"LEASE_TTL": 8, "RECONCILE": 3, "RESUME_AFTER": 0.5, "SCONTROL_TIMEOUT": 2}


def supervised_beside(node: SlurmNode, folder: Path, **settings: object) -> Supervised:
    """llmwd for this Slurm node, serving on two of its eight GPUs (the highest)."""
    settings = {**SETTINGS, "DETECTION": SOURCES[node.cgroup], "SLURM_NODE": node.node, **settings}
    return Supervised(folder, settings, environ=node.env, scope=node.scope)


@pytest.fixture(params=["v2", "v1"])
def beside(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[SlurmNode, Supervised]]:
    node = request.getfixturevalue("slurm_node" if request.param == "v2" else "slurm_node_v1")
    tree = supervised_beside(node, tmp_path).start()
    yield node, tree
    tree.close()


@pytest.fixture
def beside_v2(slurm_node: SlurmNode, tmp_path: Path) -> Iterator[tuple[SlurmNode, Supervised]]:
    tree = supervised_beside(slurm_node, tmp_path).start()
    yield slurm_node, tree
    tree.close()


def jobs_of(status: dict) -> dict[str, list[int] | None]:
    return {job["id"]: job["gpus"] for job in status["jobs"]}


def wait_for_job(tree: Supervised, job: int, gpus: list[int]) -> dict:
    def known() -> dict | None:
        status = tree.status()
        return status if jobs_of(status).get(str(job)) == gpus else None

    return wait_until(known, 60, every_s=0.05, what=f"job {job} known with GPUs {gpus}")


def test_only_a_job_on_our_gpus_makes_us_yield_and_we_resume_when_it_is_gone(beside: tuple[SlurmNode, Supervised]) -> None:
    node, tree = beside
    before = tree.serving()
    assert before["lease"]["gpus"] == [6, 7]
    assert before["node"] == node.node

    no_overlap = node.sbatch("exec sleep 600", "--gres=gpu:2")
    cpu_only = node.sbatch("exec sleep 600")
    wait_for_job(tree, no_overlap, [0, 1])
    status = wait_for_job(tree, cpu_only, [])
    assert status["phase"] == "serving" and status["server"]["pid"] == before["server"]["pid"]
    assert [gpu["holder"] for gpu in status["gpus"]] == ["slurm"] * 2 + ["free"] * 4 + ["llmwd"] * 2

    overlap = node.sbatch("exec sleep 600", "--gres=gpu:6", "--time=20")
    status = tree.phase("waiting")
    assert status["reason"] == "yielded_to_job" and status["lease"] is None
    ends_at = wait_until(lambda: {claim.id: claim.ends_at for claim in tree.look().facts.gpus.claims}.get(str(overlap)))
    assert abs(ends_at - time.time() - 20 * 60) < 120
    release = tree.released_for(overlap)
    steps = [release[name] for name in ("seen_s", "resolved_s", "revoked_s", "signalled_s", "gone_s") if release[name]]
    assert steps == sorted(steps) and len(steps) >= 3 and steps[-1] - steps[0] < 5
    assert tree.status()["server"]["pid"] is None

    node.scancel(overlap)
    assert tree.serving()["lease"]["gpus"] == [6, 7]


def test_the_journal_says_who_saw_the_job_first_and_how_much_later_all_the_others_did(beside: tuple[SlurmNode, Supervised]) -> None:
    node, tree = beside
    tree.serving()
    job = node.sbatch("exec sleep 600", "--gres=gpu:8")
    tree.released_for(job)
    quick = {"stepd", SOURCES[node.cgroup].split(",")[1]}

    def told() -> dict | None:
        lines = tree.journal("job_seen")
        return lines[-1] if lines and quick | {"procfs", "gresused"} <= {lines[-1]["first"], *lines[-1]["lags"]} else None

    seen = wait_until(told, 30, every_s=0.1, what="the line with the slow sources")
    assert seen["job"] == str(job) and len(seen["lags"]) >= 3 and all(lag >= 0 for lag in seen["lags"].values())


def test_a_job_that_lands_while_the_model_loads_is_a_yield_like_any_other(slurm_node: SlurmNode, tmp_path: Path) -> None:
    tree = supervised_beside(slurm_node, tmp_path)
    tree.write_profile("fake", FAKE_READY_AFTER=600, FAKE_SWALLOW_TERM_WHILE_LOADING=1)
    tree.start()
    try:
        tree.phase("loading")
        job = slurm_node.sbatch("exec sleep 600", "--gres=gpu:8")
        release = tree.released_for(job)
        assert release["gone_s"] - (release["seen_s"] or release["revoked_s"]) < 5
        assert tree.phase("waiting")["reason"] == "yielded_to_job"
    finally:
        tree.close()


def test_a_job_that_ends_while_another_begins_is_not_missed(beside_v2: tuple[SlurmNode, Supervised]) -> None:
    node, tree = beside_v2
    tree.serving()
    first = node.sbatch("exec sleep 600", "--gres=gpu:1")
    wait_for_job(tree, first, [0])
    second = node.sbatch("exec sleep 600", "--gres=gpu:8")  # waits for the first one's GPU
    node.scancel(first)
    node.wait_state(second, "RUNNING")
    tree.released_for(second)
    status = tree.phase("waiting")
    assert {gpu["holder"] for gpu in status["gpus"]} == {"slurm"}


def test_an_array_of_twenty_jobs_costs_one_yield_and_no_conflict_is_missed(
    slurm_node: SlurmNode, tmp_path: Path
) -> None:
    tree = supervised_beside(slurm_node, tmp_path, RESUME_AFTER=10).start()  # longer than the gaps between its waves
    try:
        tree.serving()
        slurm_node.sbatch("exec sleep 2", "--gres=gpu:1", "--array=1-20")  # eight at a time, the last on our GPUs
        tree.phase("waiting")  # for what, changes with the waves
        tree.serving(within_s=120)
        assert len(tree.journal("lease_revoked")) == 1
        assert [entry["reason"] for entry in tree.journal("released")] == ["yielded_to_job"]
    finally:
        tree.close()


def test_a_job_cancelled_while_pending_changes_nothing(beside_v2: tuple[SlurmNode, Supervised]) -> None:
    node, tree = beside_v2
    pid = tree.serving()["server"]["pid"]
    node.sbatch("exec sleep 600", "--gres=gpu:2")
    pending = node.sbatch("exec sleep 600", "--gres=gpu:8")
    assert node.state(pending) == "PENDING"
    node.scancel(pending)
    node.wait_state(pending, "CANCELLED")
    assert tree.status()["server"]["pid"] == pid
    assert tree.journal("lease_revoked") == []


def test_a_restarted_slurmd_neither_disturbs_us_nor_blinds_us(beside_v2: tuple[SlurmNode, Supervised]) -> None:
    node, tree = beside_v2
    pid = tree.serving()["server"]["pid"]
    node.restart_slurmd()
    assert tree.status()["server"]["pid"] == pid
    job = node.sbatch("exec sleep 600", "--gres=gpu:8")
    tree.released_for(job)


def test_a_job_whose_gpus_cannot_be_learned_because_slurmctld_hangs_counts_as_one_on_ours(
    beside_v2: tuple[SlurmNode, Supervised],
) -> None:
    node, tree = beside_v2
    tree.serving()
    node.stop_ctld()
    try:
        # The controller accepts and never answers; a job's folder appears all the same, as it does on a node whose
        # controller dies right after it sent a job off.
        unknown = node.scope / "job_4242"
        unknown.mkdir()
        try:
            release = tree.released_for(4242)
            assert release["reason"] == "unknown_job"
            tree.phase("waiting")  # the journal is written before the fact that the status shows
        finally:
            unknown.rmdir()
    finally:
        node.cont_ctld()
    tree.serving(within_s=60)


def test_slurmctld_being_away_alone_stops_no_model_and_no_job_meets_us_meanwhile(
    beside_v2: tuple[SlurmNode, Supervised],
) -> None:
    node, tree = beside_v2
    pid = tree.serving()["server"]["pid"]
    node.stop_ctld()
    try:
        wait_until(lambda: "gresused" in {s["name"] for s in tree.status()["sources"] if not s["works"]}, 30)
        assert tree.status()["server"]["pid"] == pid
    finally:
        node.cont_ctld()


def test_started_in_the_middle_of_running_jobs_it_takes_only_what_they_do_not_have(
    slurm_node: SlurmNode, tmp_path: Path
) -> None:
    job = slurm_node.sbatch("exec sleep 600", "--gres=gpu:7")
    slurm_node.wait_state(job, "RUNNING")
    tree = supervised_beside(slurm_node, tmp_path).start()
    try:
        status = wait_for_job(tree, job, list(range(7)))
        assert tree.phase("waiting")["lease"] is None
        slurm_node.scancel(job)
        assert tree.serving()["lease"]["gpus"] == [6, 7]
        assert status["server"]["pid"] is None
    finally:
        tree.close()


def test_a_leftover_job_folder_counts_until_it_is_certain_that_it_is_one(beside_v2: tuple[SlurmNode, Supervised]) -> None:
    node, tree = beside_v2
    tree.serving()
    job = node.sbatch("exec sleep 0.2", "--gres=gpu:1")
    wait_until(lambda: node.state(job) == "COMPLETED", 30)
    leftover = node.scope / f"job_{job}"
    wait_until(lambda: not leftover.exists(), 30)
    leftover.mkdir()
    try:
        wait_until(lambda: str(job) in jobs_of(tree.status()), 30, every_s=0.05)
        pid = tree.serving()["server"]["pid"]
        assert pid is not None
    finally:
        leftover.rmdir()


def test_one_controller_call_answers_for_a_storm_of_folders(beside_v2: tuple[SlurmNode, Supervised]) -> None:
    """Two hundred folders of jobs that Slurm does not know, made and removed: no call for each of them."""
    node, tree = beside_v2
    tree.serving()
    began_s = time.monotonic()
    folders = [node.scope / f"job_{90000 + number}" for number in range(200)]
    for folder in folders:
        folder.mkdir()
    for folder in folders:
        folder.rmdir()
    wait_until(lambda: tree.status()["jobs"] == [], 60, every_s=0.1)
    tree.serving(within_s=60)
    took_s = time.monotonic() - began_s
    # Counted by llmwd's own debug log of commands it started.
    calls = [line for line in tree.log("resolver").splitlines() if "asking Slurm:" in line]
    assert len(calls) <= 10 + took_s * 11


def test_sigkill_of_slurmd_and_its_return_is_seen(beside_v2: tuple[SlurmNode, Supervised]) -> None:
    node, tree = beside_v2
    pid = tree.serving()["server"]["pid"]
    node.kill_slurmd(signal.SIGKILL)
    assert tree.status()["server"]["pid"] == pid
    node.start_slurmd()
    job = node.sbatch("exec sleep 600", "--gres=gpu:8")
    tree.released_for(job)
