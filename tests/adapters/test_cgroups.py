"""Jobs by their cgroup folders: layouts in plain folders, and what only the real cgroup file system does."""

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmwd.adapters.cgroups import CgroupV1, CgroupV2, Mount, made_for_jobs, mounts, read_mounts
from llmwd.adapters.jobfolders import JobFolders, job_folder
from tests.waiting import wait_until

MOUNTINFO = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
36 31 0:33 / /sys/fs/cgroup/freezer rw shared:9 - cgroup cgroup rw,freezer
40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup systemd rw,xattr,name=systemd
41 31 0:38 / /mnt/with\\040blank rw - cgroup2 cgroup2 rw
42 31 0:38 / /other/place rw - cgroup2 cgroup2 rw
"""
SLUID = "sEKNKTV3WPV500"


@pytest.fixture
def v2(tmp_path: Path) -> Iterator[Callable[..., CgroupV2]]:
    made: list[JobFolders] = []

    def make(node: str = "") -> CgroupV2:
        made.append(CgroupV2(node, lambda: [Mount(str(tmp_path), 2, frozenset())]))
        return made[-1]

    yield make
    for source in made:
        source.close()


@pytest.fixture
def v1(tmp_path: Path) -> Iterator[Callable[..., CgroupV1]]:
    made: list[JobFolders] = []
    found = [Mount(str(tmp_path / name), 1, frozenset({name})) for name in ("freezer", "memory", "net_cls")]
    for mount in found:
        Path(mount.point).mkdir()

    def make(node: str = "") -> CgroupV1:
        made.append(CgroupV1(node, lambda: found))
        return made[-1]

    yield make
    for source in made:
        source.close()


def folder(*parts: str | Path) -> Path:
    path = Path(*parts)
    path.mkdir(parents=True)
    return path


def watched(source: JobFolders) -> set[str]:
    """What the source sees after having been told by inotify alone, scanning only when it asks for that."""
    if source.drain():
        source.scan()
    return set(source.jobs())


def test_every_hierarchy_is_found_once_in_mountinfo() -> None:
    assert mounts(MOUNTINFO) == [
        Mount("/sys/fs/cgroup/freezer", 1, frozenset({"rw", "freezer"})),
        Mount("/sys/fs/cgroup/systemd", 1, frozenset({"rw", "xattr", "name=systemd"})),
        Mount("/mnt/with blank", 2, frozenset()),
    ]


@pytest.mark.parametrize(
    ("name", "job"),
    [
        ("job_17", "17"), (SLUID, SLUID), ("system", None), ("slurmd", None), ("job_", None), ("job_1x", None),
        ("sEKNKTV3WPV50", None), ("sEKNKTV3WPVI00", None), ("cgroup.procs", None), ("step_0", None),
    ],
)
def test_a_job_is_known_by_its_number_or_its_sluid(name: str, job: str | None) -> None:
    assert job_folder(name) == job


@pytest.mark.parametrize(
    "scope",
    [
        "system.slice/slurmstepd.scope",
        "system.slice/n1_slurmstepd.scope",
        "kubepods.slice/kubepods-burstable.slice/kubepods-pod1.slice/cri-containerd-1a.scope/system.slice/slurmstepd.scope",
        "slurm.slice/node_with_line_slurmstepd.scope",
    ],
)
def test_jobs_are_found_wherever_the_scope_is(scope: str, v2: Callable[..., CgroupV2], tmp_path: Path) -> None:
    for name in ("job_3", SLUID, "system", "slurmd"):
        folder(tmp_path, scope, name)
    assert set(v2().scan() or ()) == {"3", SLUID}


def test_the_scopes_of_several_slurmds_count_all_unless_this_node_is_named(
    v2: Callable[..., CgroupV2], tmp_path: Path
) -> None:
    for node, job in (("a", "job_1"), ("b", "job_2")):
        folder(tmp_path, "system.slice", f"{node}_slurmstepd.scope", job)
    assert set(v2().scan() or ()) == {"1", "2"}
    assert set(v2("b").scan() or ()) == {"2"}
    assert set(v2("misspelt").scan() or ()) == {"1", "2"}, "a wrong name must never hide a job"


def test_a_new_job_is_told_by_the_event_alone(v2: Callable[..., CgroupV2], tmp_path: Path) -> None:
    scope = folder(tmp_path, "system.slice", "slurmstepd.scope")
    source = v2()
    assert source.scan() == {} and source.check().works
    folder(scope, "job_8")
    folder(scope, "job_9")
    (scope / "job_8").rmdir()
    assert source.drain() is False
    assert set(source.jobs()) == {"9"}


def test_a_scope_that_appears_later_is_found_without_waiting(v2: Callable[..., CgroupV2], tmp_path: Path) -> None:
    source = v2()
    assert source.scan() is None and source.absent and "slurmstepd.scope" in source.check().why
    folder(tmp_path, "system.slice", "n1_slurmstepd.scope", "job_8")
    assert watched(source) == {"8"}
    assert source.check().works


def test_where_no_cgroup2_is_mounted_the_source_says_so() -> None:
    source = CgroupV2(find_mounts=list)
    assert source.scan() is None and source.absent
    assert "mounted" in source.check().why


def test_what_lies_inside_a_jobs_folder_is_never_listed_or_watched(
    v2: Callable[..., CgroupV2], tmp_path: Path
) -> None:
    job = folder(tmp_path, "system.slice", "slurmstepd.scope", "job_8")
    source = v2()
    source.scan()
    (job / "step_0").mkdir()
    inside = job / "step_0" / "slurmstepd.scope"
    inside.mkdir()
    assert source.drain() is False and source.fileno() is not None


def test_the_walk_is_bounded(v2: Callable[..., CgroupV2], tmp_path: Path) -> None:
    for number in range(600):
        folder(tmp_path, "kubepods.slice", f"docker-{number}")
    source = v2()
    source.scan()
    assert len(source._places) <= 260


def test_v1_jobs_of_all_users_and_controllers_are_found(v1: Callable[..., CgroupV1], tmp_path: Path) -> None:
    folder(tmp_path, "freezer", "slurm", "uid_0", "job_1", "step_0")
    folder(tmp_path, "freezer", "slurm", "uid_7", "job_2")
    folder(tmp_path, "memory", "slurm_n1", "uid_7", "job_3")
    folder(tmp_path, "net_cls", "slurm", "uid_7", "job_4")
    folder(tmp_path, "freezer", "slurm", "system")
    assert set(v1().scan() or ()) == {"1", "2", "3"}


def test_v1_a_job_is_here_until_the_last_controller_has_lost_it(v1: Callable[..., CgroupV1], tmp_path: Path) -> None:
    jobs = [folder(tmp_path, name, "slurm", "uid_0", "job_1") for name in ("freezer", "memory")]
    source = v1()
    source.scan()
    jobs[0].rmdir()
    assert watched(source) == {"1"}
    jobs[1].rmdir()
    assert watched(source) == set()


def test_v1_every_level_may_appear_later(v1: Callable[..., CgroupV1], tmp_path: Path) -> None:
    source = v1()
    assert source.scan() is None and source.absent
    folder(tmp_path, "freezer", "slurm_n1")
    assert watched(source) == set() and source.check().works
    folder(tmp_path, "freezer", "slurm_n1", "uid_5")
    watched(source)
    folder(tmp_path, "freezer", "slurm_n1", "uid_5", "job_6")
    assert source.drain() is False
    assert set(source.jobs()) == {"6"}
    (tmp_path / "freezer/slurm_n1/uid_5/job_6").rmdir()
    (tmp_path / "freezer/slurm_n1/uid_5").rmdir()
    assert watched(source) == set()
    folder(tmp_path, "freezer", "slurm_n1", "uid_5", "job_7")
    assert watched(source) == {"7"}


# --- the real cgroup file system ---------------------------------------------------------------------------


@pytest.fixture(params=["2", "1"])
def real(request: pytest.FixtureRequest) -> Iterator[tuple[CgroupV2 | CgroupV1, Path]]:
    """A source on a cgroup folder of our own, and the folder whose names are jobs (not made yet)."""
    version = int(request.param)
    points = [mount.point for mount in read_mounts() if mount.version == version and version == 2] + [
        mount.point for mount in read_mounts() if version == 1 and "freezer" in mount.controllers
    ]
    top = Path(points[0]) / f"llmwd-test-{uuid.uuid4().hex[:12]}.slice"
    top.mkdir()
    mount = Mount(str(top), version, frozenset({"freezer"}) if version == 1 else frozenset())
    source = CgroupV2("", lambda: [mount]) if version == 2 else CgroupV1("", lambda: [mount])
    yield source, top / ("system.slice/slurmstepd.scope" if version == 2 else "slurm/uid_0")
    source.close()
    for path, _, _ in os.walk(top, topdown=False):
        os.rmdir(path)


def test_a_real_cgroup_folder_is_told_by_the_event_alone(real: tuple[CgroupV2 | CgroupV1, Path]) -> None:
    source, scope = real
    scope.mkdir(parents=True)
    assert source.scan() == {}
    (scope / "job_8").mkdir()
    assert source.drain() is False and set(source.jobs()) == {"8"}
    (scope / "job_8").rmdir()
    assert source.drain() is False and source.jobs() == {}


@pytest.mark.parametrize("whole", [False, True], ids=["its folder", "the folder around it, too"])
def test_a_job_whose_real_folder_went_and_came_back_before_anybody_looked_is_told(
    real: tuple[CgroupV2 | CgroupV1, Path], whole: bool
) -> None:
    source, scope = real
    (scope / "job_8").mkdir(parents=True)
    source.scan()
    (scope / "job_8").rmdir()
    if whole:
        scope.rmdir()
    (scope / "job_8").mkdir(parents=True)
    if source.drain():
        source.scan()
    assert set(source.jobs()) == {"8"} and source.came_back() == {"8"}


def test_a_real_scope_that_was_removed_and_made_again_is_heard_again(
    real: tuple[CgroupV2 | CgroupV1, Path]
) -> None:
    source, scope = real
    scope.mkdir(parents=True)
    source.scan()
    scope.rmdir()
    scope.mkdir()
    assert source.drain() is True, "the folder above tells, for the removed one does not"
    source.scan()
    (scope / "job_8").mkdir()
    wait_until(lambda: not source.drain() and set(source.jobs()) == {"8"}, within_s=5)


def test_the_slow_scan_alone_finds_a_scope_that_was_made_again(real: tuple[CgroupV2 | CgroupV1, Path]) -> None:
    source, scope = real
    scope.mkdir(parents=True)
    source.scan()
    scope.rmdir()
    scope.mkdir()
    source._folders.read()  # the events get lost
    source.scan()
    (scope / "job_8").mkdir()
    source.drain()
    assert set(source.jobs()) == {"8"}


def test_our_watches_never_hinder_the_removal_of_a_cgroup(real: tuple[CgroupV2 | CgroupV1, Path]) -> None:
    source, scope = real
    (scope / "job_8" / "step_0").mkdir(parents=True)
    source.scan()
    (scope / "job_8" / "step_0").rmdir()
    (scope / "job_8").rmdir()
    scope.rmdir()
    if source.drain():
        source.scan()
    assert source.jobs() == {}


def test_folders_that_come_and_go_leave_no_dead_watch_behind(real: tuple[CgroupV2 | CgroupV1, Path]) -> None:
    def watches() -> int:
        return Path(f"/proc/self/fdinfo/{source.fileno()}").read_text().count("inotify ")

    source, scope = real
    scope.mkdir(parents=True)
    source.scan()
    with_scope = watches()
    for _ in range(3):
        scope.rmdir()
        scope.mkdir()
        source.scan()
        assert watches() == with_scope
    scope.rmdir()
    source.scan()
    assert watches() == with_scope - 1


@pytest.mark.parametrize(
    ("config", "made"),
    [
        ("ProctrackType           = proctrack/cgroup\nTaskPlugin              = task/none\n", True),
        ("ProctrackType=proctrack/linuxproc\nTaskPlugin=task/affinity\nJobAcctGatherType=jobacct_gather/linux\n", False),
        ("proctracktype=proctrack/pgid\n  TaskPlugin=task/affinity,task/cgroup # both\n", True),
        ("ProctrackType = proctrack/linuxproc\nJobAcctGatherType = jobacct_gather/cgroup\n", True),
        ("#ProctrackType=proctrack/linuxproc\nSlurmdSpoolDir=/x\n", True),  # cgroup is the default
    ],
)
def test_slurms_configuration_tells_whether_jobs_get_folders_at_all(config: str, made: bool) -> None:
    assert made_for_jobs(config) is made
