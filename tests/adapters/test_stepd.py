"""Jobs by the sockets of their slurmstepds."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from inotify_simple import flags

from llmwd.adapters.stepd import DEFAULT_SPOOL, StepdSockets, configuration, configured_spool, spool_folders, spool_setting

NOBODY = 65534


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    (tmp_path / "spool").mkdir()
    return tmp_path / "spool"


@pytest.fixture
def source(spool: Path) -> Iterator[StepdSockets]:
    made = StepdSockets("", "host")
    made.learn([str(spool)])
    yield made
    made.close()


def listen(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    return made


@pytest.mark.parametrize(
    ("name", "job"),
    [
        ("n1_17.0", "17"), ("n1_17.4294967291", "17"), ("n1_17.4294967292", "17"), ("gpu_node_3_17.0.2", "17"),
        ("n1_17.0+2", "17"), ("cred_state", None), ("job00017", None), ("n1_17", None), ("_17.0", None),
        ("n1_17.0.tmp", None),
    ],
)
def test_a_socket_names_its_job(name: str, job: str | None) -> None:
    assert StepdSockets("", "").job_of(name) == job


def test_a_job_is_here_while_any_of_its_steps_has_a_socket(source: StepdSockets, spool: Path) -> None:
    assert source.scan() == {}
    with listen(spool / "n1_17.4294967292"), listen(spool / "n1_17.0"):
        assert source.drain() is False and set(source.jobs()) == {"17"}
    (spool / "n1_17.0").unlink()
    assert source.drain() is False and set(source.jobs()) == {"17"}
    (spool / "n1_17.4294967292").unlink()
    assert source.drain() is False and source.jobs() == {}
    assert source.came_back() == frozenset()


def test_a_job_that_went_and_came_back_before_anybody_looked_is_told(source: StepdSockets, spool: Path) -> None:
    for name in ("n1_17.4294967291", "n1_17.0", "n1_18.0"):
        (spool / name).touch()
    source.scan()
    (spool / "n1_17.0").unlink()
    (spool / "n1_17.1").touch()
    assert source.drain() is False and source.came_back() == frozenset(), "another step of it, beside the first"
    for name in ("n1_17.4294967291", "n1_17.1", "n1_18.0"):
        (spool / name).unlink()
    (spool / "n1_17.4294967291").touch()
    assert source.drain() is False and source.came_back() == {"17"} and set(source.jobs()) == {"17"}
    assert source.came_back() == frozenset(), "once"


def test_where_events_were_dropped_any_job_may_have_gone_and_come_back(
    source: StepdSockets, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (spool / "n1_17.0").touch()
    source.scan()
    monkeypatch.setattr(source._folders._inotify, "read", lambda timeout: [(-1, flags.Q_OVERFLOW, 0, "")])
    assert source.drain() is True and source.scan() == {"17": None} and source.came_back() == {"17"}


def test_jobs_that_were_there_before_are_found(source: StepdSockets, spool: Path) -> None:
    with listen(spool / "n1_17.0"):
        assert source.scan() == {"17": None}


def test_a_spool_folder_that_appears_later_or_again_is_heard(source: StepdSockets, spool: Path) -> None:
    for _ in range(2):
        if spool.exists():
            spool.rmdir()
        source.drain()
        assert source.scan() is None and source.absent and "does not exist" in source.check().why
        spool.mkdir()
        assert source.drain() is True
        assert source.scan() == {}
    with listen(spool / "n1_17.0"):
        source.drain()
        assert set(source.jobs()) == {"17"}


def test_without_a_known_folder_the_source_says_what_is_missing() -> None:
    source = StepdSockets("", "host")
    assert source.scan() is None and source.absent and "slurm.conf" in source.check().why
    source.close()


def test_a_folder_that_may_not_be_read_is_a_failure_not_an_absence(tmp_path: Path) -> None:
    (tmp_path / "closed" / "spool").mkdir(parents=True)
    (tmp_path / "closed").chmod(0o700)
    script = (
        "import sys; from llmwd.adapters.stepd import StepdSockets\n"
        "source = StepdSockets('', ''); source.learn([sys.argv[1]])\n"
        "import os; os.setuid(int(sys.argv[2])) if os.getuid() == 0 else os.chmod(os.path.dirname(sys.argv[1]), 0)\n"
        "print(source.scan(), source.absent, source.check().why)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "closed" / "spool"), str(NOBODY)],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    (tmp_path / "closed").chmod(0o700)
    assert done.stdout.startswith("None False cannot read") and "Permission denied" in done.stdout, done


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("SlurmdSpoolDir=/var/spool/d.%n # here\n", "/var/spool/d.%n"),
        ("# SlurmdSpoolDir=/old\n  slurmdspooldir = \"/new\"\n", "/new"),
        ("SlurmdPort              = 6818\nSlurmdSpoolDir          = /var/spool/slurmd\n", "/var/spool/slurmd"),
        ("SlurmdPort=6818\n", None),
    ],
)
def test_the_setting_is_read_from_slurm_conf_and_from_scontrol(text: str, setting: str | None) -> None:
    assert spool_setting(text) == setting


def test_slurm_conf_may_include_other_files(tmp_path: Path) -> None:
    (tmp_path / "slurm.conf").write_text("ClusterName=c\nInclude paths.conf\n")
    (tmp_path / "paths.conf").write_text("SlurmdSpoolDir=/x\nInclude slurm.conf\n")
    assert configured_spool(configuration({"SLURM_CONF": str(tmp_path / "slurm.conf")}) or "") == "/x"


def test_a_slurm_conf_without_the_setting_means_slurms_default(tmp_path: Path) -> None:
    (tmp_path / "slurm.conf").write_text("ClusterName=c\n")
    assert configured_spool(configuration({"SLURM_CONF": str(tmp_path / "slurm.conf")}) or "") == DEFAULT_SPOOL
    assert configuration({"SLURM_CONF": str(tmp_path / "none")}) is None


def test_node_and_host_are_put_into_the_setting(tmp_path: Path) -> None:
    for name in ("s.a", "s.b"):
        (tmp_path / name).mkdir()
    assert spool_folders("/s/%h.%n", "n1", "h1") == ["/s/h1.n1"]
    assert spool_folders(f"{tmp_path}/s.%n", "", "h1") == [f"{tmp_path}/s.a", f"{tmp_path}/s.b"]
