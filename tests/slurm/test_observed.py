"""Real jobs beside a serving llmwd: what the observer, which shares no code with it, sees of a release."""

from pathlib import Path

from tests.slurm.testbed import SlurmNode
from tests.slurm.test_yield import supervised_beside
from tests.waiting import wait_until

GRACE_S, RESOLVE_S = 0.5, 0.5
STUBBORN = {"FAKE_IGNORE_TERM": 1, "FAKE_ENGINE": 1, "FAKE_FORK_GRANDCHILD": 1, "FAKE_CHILDREN": 11}


def test_real_jobs_that_come_and_go_share_no_gpu_with_a_process_of_ours(slurm_node: SlurmNode, tmp_path: Path) -> None:
    node = slurm_node
    tree = supervised_beside(node, tmp_path, LEASE_TTL=4, YIELD_GRACE=GRACE_S, RESOLVE_DEADLINE=RESOLVE_S)
    tree.write_profile("fake", **STUBBORN)  # it uses all of its grace, so that the observer has something to see
    try:
        tree.start()
        for gpus in (8, 1, 8):
            tree.serving()
            job = node.sbatch("exec sleep 600", f"--gres=gpu:{gpus}")
            if gpus == 8:
                tree.phase("waiting")
                wait_until(lambda: any(line.get("job") == str(job) for line in tree.observer.lines()), 20, what="what the observer saw")
            else:  # on GPUs that are not ours
                node.wait_state(job, "RUNNING")
            node.scancel(job)
            node.wait_state(job, "CANCELLED")
        tree.serving()
        summary = tree.judge()
    finally:
        tree.close()
    assert summary["releases"] == 2 and 0.0 < summary["worst_release_s"] < GRACE_S + RESOLVE_S + 2.0
