"""The detector's sources beside a real Slurm: every job is seen, from its first sign to its end."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmwd.messages import JobSeen, JobsFact
from llmwd.workers import detector
from tests.fakes.loop_shell import LoopShell
from tests.slurm.testbed import SlurmNode
from tests.waiting import wait_until

pytestmark = pytest.mark.alone
Start = Callable[..., LoopShell]


@pytest.fixture(params=["v2", "v1"])
def node(request: pytest.FixtureRequest) -> SlurmNode:
    return request.getfixturevalue("slurm_node" if request.param == "v2" else "slurm_node_v1")


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a detector that lives on the given Slurm node."""
    made: list[LoopShell] = []

    def begin(node: SlurmNode, *detection: str) -> LoopShell:
        monkeypatch.setenv("SLURM_CONF", node.env["SLURM_CONF"])
        # Named, not auto: a node without a tree of its own in the other version looks at everybody's, and other
        # tests have some.
        every = ("stepd", cgroup_of(node), "procfs", "sim")
        shell = LoopShell(tmp_path, slurm_node=node.node, detection=detection or every)
        made.append(shell)
        detector.main(shell)  # type: ignore[arg-type]
        # On a busy machine the first fact is told before the slow look at processes has ended.
        shell.until(lambda: shell.facts and shell.facts[-1][1].scanned)
        return shell

    yield begin
    for shell in made:
        shell.close()


def jobs(shell: LoopShell) -> dict[str, JobSeen]:
    fact = shell.facts[-1][1]
    assert isinstance(fact, JobsFact)
    return {job.id: job for job in fact.jobs}


def cgroup_of(node: SlurmNode) -> str:
    return "cgroup" + node.cgroup.removeprefix("v")


def works(shell: LoopShell) -> dict[str, bool]:
    return {state.name: state.works for state in shell.facts[-1][1].sources}


def test_on_an_idle_node_all_of_slurms_sources_work_and_see_nothing(node: SlurmNode, start: Start) -> None:
    shell = start(node)
    assert not jobs(shell) and shell.facts[-1][1].scanned
    assert works(shell)["stepd"] and works(shell)["procfs"]
    # slurmd makes the tree of v1 when it starts, the scope of v2 too
    assert works(shell)[cgroup_of(node)]


def test_a_job_is_seen_by_socket_cgroup_and_process_and_gone_when_cancelled(node: SlurmNode, start: Start) -> None:
    shell = start(node)
    job = node.sbatch("exec sleep 600", "--gres=gpu:2")
    shell.until(lambda: {"stepd", cgroup_of(node)} <= set(jobs(shell)[str(job)].sources) if jobs(shell) else False)
    shell.fire("procfs")
    shell.until(lambda: "procfs" in jobs(shell)[str(job)].sources)
    assert set(jobs(shell)) == {str(job)} and jobs(shell)[str(job)].gpus is None
    node.scancel(job)
    wait_until(lambda: not node.job_dir(job).exists())
    shell.until(lambda: set(jobs(shell)[str(job)].sources) <= {"procfs"} if jobs(shell) else True)
    shell.fire("procfs")
    shell.until(lambda: not jobs(shell))


@pytest.mark.parametrize("source", ["stepd", "cgroup", "procfs"])
def test_each_source_alone_sees_the_job(source: str, node: SlurmNode, start: Start) -> None:
    shell = start(node, cgroup_of(node) if source == "cgroup" else source)
    job = node.sbatch()
    shell.until(lambda: str(job) in jobs(shell))
    node.scancel(job)
    shell.until(lambda: not jobs(shell))


def test_a_job_that_was_there_before_us_is_seen_in_the_first_fact(node: SlurmNode, start: Start) -> None:
    job = node.sbatch()
    wait_until(node.job_dir(job).is_dir)
    shell = start(node)
    assert str(job) in {seen.id for seen in shell.facts[0][1].jobs}


def test_a_job_that_ends_while_another_begins_is_noticed(node: SlurmNode, start: Start) -> None:
    shell = start(node, "stepd", cgroup_of(node))
    first = node.sbatch("exec sleep 600", "--gres=gpu:8")
    second = node.sbatch("exec sleep 600", "--gres=gpu:8")
    shell.until(lambda: set(jobs(shell)) == {str(first)})
    node.scancel(first)
    shell.until(lambda: set(jobs(shell)) == {str(second)})


def test_all_twenty_tasks_of_an_array_are_seen_and_go(node: SlurmNode, start: Start) -> None:
    shell = start(node, "stepd", cgroup_of(node))
    array = node.sbatch("exec sleep 600", "--array=1-20")
    shell.until(lambda: len(jobs(shell)) == 20, within_s=60)
    node.scancel(array)
    shell.until(lambda: not jobs(shell), within_s=60)
    everyone = {job.id for _, fact in shell.facts for job in fact.jobs}
    assert len(everyone) == 20


def test_a_job_cancelled_while_pending_is_never_seen(node: SlurmNode, start: Start) -> None:
    shell = start(node)
    job = node.sbatch("exec sleep 600", "--begin=now+1hour")
    node.scancel(job)
    after = node.sbatch()
    shell.until(lambda: str(after) in jobs(shell))
    assert str(job) not in {seen.id for _, fact in shell.facts for seen in fact.jobs}


def test_a_restart_of_slurmd_loses_no_job_and_the_next_one_is_seen(node: SlurmNode, start: Start) -> None:
    shell = start(node, "stepd", cgroup_of(node))
    job = node.sbatch()
    shell.until(lambda: str(job) in jobs(shell))
    count = len(shell.facts)
    node.restart_slurmd()
    after = node.sbatch()
    shell.until(lambda: str(after) in jobs(shell))
    assert all(str(job) in {seen.id for seen in fact.jobs} for _, fact in shell.facts[count:])


def test_while_slurmctld_is_away_detection_goes_on(slurm_node: SlurmNode, start: Start) -> None:
    job = slurm_node.sbatch()
    wait_until(slurm_node.job_dir(job).is_dir)
    slurm_node.stop_ctld()
    shell = start(slurm_node)
    assert str(job) in jobs(shell) and shell.facts[-1][1].scanned


def test_a_jobs_folder_is_never_held_open_or_watched(slurm_node: SlurmNode, start: Start) -> None:
    shell = start(slurm_node)
    job = slurm_node.sbatch()
    shell.until(lambda: str(job) in jobs(shell) and "cgroup2" in jobs(shell)[str(job)].sources)
    inode = f"{slurm_node.job_dir(job).stat().st_ino:x}"
    watched = [
        line.split()[2].removeprefix("ino:")
        for info in Path("/proc/self/fdinfo").iterdir()
        if info.exists()
        for line in info.read_text().splitlines()
        if line.startswith("inotify ")
    ]
    assert f"{slurm_node.scope.stat().st_ino:x}" in watched and inode not in watched
