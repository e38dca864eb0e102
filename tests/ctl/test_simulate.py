"""Simulated jobs are files, whole from their first moment, each with an id of its own."""

import json
import resource
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from llmwd.adapters.simjobs import parse
from llmwd.ctl.program import Refusal
from llmwd.ctl.simulate import write_job
from llmwd.messages import JobClaim, SourceState


def files(stand) -> dict[str, str]:
    return {path.name: path.read_text() for path in stand.dirs.sim.iterdir()}


def test_a_job_is_a_file_with_its_gpus_and_its_id_is_all_of_standard_output(stand):
    stand.begin()
    done = stand.ctl("simulate", "job", "--gpus", "0-1")
    assert (done.returncode, done.stdout) == (0, "900001\n")
    assert files(stand) == {"job_900001": "0-1\n"}


@pytest.mark.parametrize("gpus", ["", "none"])
def test_a_job_without_gpus_says_so_in_a_way_the_detector_understands(stand, gpus):
    stand.begin()
    assert stand.ctl("simulate", "job", "--gpus", gpus).returncode == 0
    assert parse(files(stand)["job_900001"]) == ((), None)


def test_its_time_is_written_in_a_way_the_detector_understands(stand):
    stand.begin()
    done = stand.ctl("simulate", "job", "--gpus", "0,2-3", "--for", "1m30s", "--json")
    told = json.loads(done.stdout)
    assert (told["id"], told["gpus"], told["for_s"]) == ("900001", [0, 2, 3], 90.0)
    assert parse(files(stand)["job_900001"]) == ((0, 2, 3), 90.0)


def test_an_id_that_a_job_on_this_node_has_is_not_given_again(stand):
    stand.begin()
    stand.say(stand.gpus(claims=(JobClaim(id="900001", gpus=(0,)),)))
    assert stand.ctl("simulate", "job", "--gpus", "1").stdout == "900002\n"


def test_many_at_once_get_different_ids(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: write_job(tmp_path, "0\n", set()), range(40)))
    assert len(set(paths)) == 40
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths}


def test_a_full_disk_leaves_nothing_of_a_job(tmp_path):
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(Refusal, match="no simulated job can be made in"):
            write_job(tmp_path, "0\n", set())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []
    assert write_job(tmp_path, "0\n", set()).name == "job_900001"


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_is_refused_in_a_sentence(stand, tmp_path, place):
    (tmp_path / "file").write_text("")
    (stand.dirs.home / "etc/config.env").write_text(f"SIM_DIR={tmp_path}/{place}\n")
    stand.begin()
    assert f"no simulated job can be made in {tmp_path}/{place}" in stand.refused("simulate", "job", "--gpus", "0")
    assert "cannot be ended: Not a directory" in stand.refused("simulate", "end", "900001")
    assert "no simulated job can be made" in stand.refused("drill", "--gpus", "2")


def test_the_end_of_a_job_removes_its_file_and_a_second_end_exits_1(stand):
    stand.begin()
    stand.ctl("simulate", "job", "--gpus", "0")
    assert stand.ctl("simulate", "end", "job_900001").returncode == 0
    assert files(stand) == {}
    done = stand.ctl("simulate", "end", "900001")
    assert done.returncode == 1 and "there are: none" in done.stderr


def test_gpus_that_the_node_does_not_have_are_refused(stand):
    stand.begin()
    done = stand.ctl("simulate", "job", "--gpus", "3-4")
    assert done.returncode == 1 and "this node has GPUs 0-3" in done.stderr
    assert files(stand) == {}


@pytest.mark.parametrize("gpus", ["a", "1-", "3-1", "0;1", "-1", "1,,2", "1000"])
def test_what_is_no_list_of_gpus_is_an_error_of_usage(stand, gpus):
    assert stand.ctl("simulate", "job", "--gpus", gpus).returncode == 2


def test_a_job_id_cannot_lead_out_of_the_folder(stand):
    stand.begin()
    assert stand.ctl("simulate", "end", "../../x").returncode == 2


def test_it_says_when_nobody_looks_at_simulated_jobs(stand):
    stand.begin()
    off = SourceState(name="sim", works=False, why="not in DETECTION")
    stand.say(msgspec.structs.replace(stand.jobs(), sources=(off,)))
    assert "not in DETECTION" in stand.ctl("simulate", "job", "--gpus", "0").stderr


def test_the_folder_of_the_settings_is_used(stand, tmp_path):
    (stand.dirs.home / "etc/config.env").write_text(f"SIM_DIR={tmp_path}/jobs\n")
    stand.begin()
    assert stand.ctl("simulate", "job", "--gpus", "0").returncode == 0
    assert (tmp_path / "jobs/job_900001").read_text() == "0\n"


def test_without_a_supervisor_nothing_is_simulated(stand):
    done: subprocess.CompletedProcess = stand.ctl("simulate", "job", "--gpus", "0")
    assert done.returncode == 3
    assert files(stand) == {}
