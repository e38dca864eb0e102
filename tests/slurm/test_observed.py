"""Real jobs beside a serving llmwd, judged from outside by the observer, which shares no code with it."""

from pathlib import Path

from tests.chaos.stage import GRACE_S, RESOLVE_S, TTL_S, Observer
from tests.slurm.testbed import SlurmNode
from tests.slurm.test_yield import supervised_beside
from tests.waiting import wait_until

STUBBORN = {"FAKE_IGNORE_TERM": 1, "FAKE_ENGINE": 1, "FAKE_FORK_GRANDCHILD": 1, "FAKE_CHILDREN": 11}


def test_real_jobs_that_come_and_go_share_no_gpu_with_a_process_of_ours(slurm_node: SlurmNode, tmp_path: Path) -> None:
    node = slurm_node
    tree = supervised_beside(node, tmp_path, LEASE_TTL=TTL_S, YIELD_GRACE=GRACE_S, RESOLVE_DEADLINE=RESOLVE_S)
    tree.write_profile("fake", **STUBBORN)  # it uses all of its grace, so that the observer has something to see
    observer = Observer(tree, tree.runtime / "sim", tmp_path / "observer.jsonl", node.scope)
    try:
        tree.start()
        for gpus in (8, 1, 8):
            tree.serving()
            job = node.sbatch("exec sleep 600", f"--gres=gpu:{gpus}")
            if gpus == 8:
                tree.phase("waiting")
                wait_until(lambda: any(line.get("job") == str(job) for line in observer.lines()), 20, what="what the observer saw")
            else:  # on GPUs that are not ours
                node.wait_state(job, "RUNNING")
            node.scancel(job)
            node.wait_state(job, "CANCELLED")
        tree.serving()
        code, summary = observer.end()
    finally:
        observer.close()
        tree.close()
    assert (code, summary["violations"]) == (0, []), summary
    assert summary["releases"] == 2 and 0.0 < summary["worst_release_s"] < GRACE_S + RESOLVE_S + 2.0
