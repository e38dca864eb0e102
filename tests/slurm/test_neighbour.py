"""CPUs beside real jobs: the model leaves a job's cores while it is there, and takes them back afterwards."""

import contextlib
import os
from pathlib import Path

from llmwd.adapters import procs
from tests.slurm.testbed import SlurmNode
from tests.slurm.test_yield import supervised_beside
from tests.tree.supervised import Supervised
from tests.waiting import wait_until


def cpus_of_the_tree(tree: Supervised) -> set[frozenset[int]]:
    """What the threads of all processes of the tree may run on."""
    found = set()
    for pid in procs.descendants(tree.server_fact().holder_pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended since
            for thread in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(ProcessLookupError):  # the server has one for each request, and is asked now and then
                    found.add(frozenset(os.sched_getaffinity(int(thread))))
    return found


def test_the_tree_leaves_the_cores_of_a_job_that_comes_and_takes_them_again_when_it_goes(slurm_node: SlurmNode, tmp_path: Path) -> None:
    everything = frozenset(os.sched_getaffinity(0))
    theirs = frozenset(sorted(everything)[len(everything) // 2 :])
    tree = supervised_beside(slurm_node, tmp_path, LEASE_TTL=4)
    tree.write_profile("fake", FAKE_ENGINE=1, FAKE_CHILDREN=10)
    try:
        tree.start().serving()
        pid = tree.server_fact().pid
        assert cpus_of_the_tree(tree) == {everything}
        job = slurm_node.sbatch(f"exec taskset -c {','.join(map(str, sorted(theirs)))} sleep 600", "--gres=gpu:1")
        slurm_node.wait_state(job, "RUNNING")
        # Beside other sources processes are looked at twice a minute; but once soon after a job has come.
        wait_until(lambda: cpus_of_the_tree(tree) == {everything - theirs}, 20, what="the tree off the job's cores")
        row = wait_until(lambda: (found := tree.status()["neighbour"]) and f"job {job}" in found["detail"] and found, 30)
        assert row["cpus"] and "off the cores" in row["detail"]
        slurm_node.scancel(job)
        wait_until(lambda: cpus_of_the_tree(tree) == {everything}, 60, what="the tree on all cores again")
        assert tree.server_fact().pid == pid
    finally:
        tree.close()
