"""etc/slurm/prolog-llmwd.sh alone, as root on a node with several users: whom it calls, as whom, and how long it waits."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.waiting import wait_until

HOOK = Path(__file__).resolve().parents[2] / "etc" / "slurm" / "prolog-llmwd.sh"
# Of this run alone: the hook finds a user's processes wherever they are. Numbers without an entry in the user database.
ALICE, BOB, CAROL, OWNER, STRANGER = range(first := 20_000 + os.getpid() % 8_000 * 5, first + 5)
SPEAKS = """\
{ id -u; id -G; umask; grep NoNewPrivs /proc/self/status; ls /proc/self/fd | wc -l; echo "$@"; env; } > said.new
mv said.new said
"""


class Node:
    """The places that the hook looks into, and living processes that pass for llmwd's root."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.roots: list[subprocess.Popen[bytes]] = []
        self.env = {
            "SLURM_JOB_ID": "42", "SLURM_JOB_GPUS": "0,1", "SECRET": "of root", "PATH": "/nowhere",
            "LLMWD_RUNTIMES": f"{folder}/elsewhere-%u {folder}/llmwd-%u", "LLMWD_WITHIN": "5",
        }  # fmt: skip

    def place(self, uid: int, script: str = SPEAKS, owner: int | None = None, mode: int = 0o700) -> Path:
        """A runtime folder with a release.sh, as the supervisor of this user makes it."""
        path = self.folder / f"llmwd-{uid}"
        path.mkdir()
        (path / "release.sh").write_text(script)
        for each in (path, path / "release.sh"):
            os.chown(each, owner or uid, owner or uid)
        path.chmod(mode)
        return path

    def living(self, uid: int, program: str = "bash", name: str = "llmwd: root") -> subprocess.Popen[bytes]:
        """A process of this user that has this name."""
        script = f'printf "{name}" > /proc/$$/comm && echo there && read -r'
        command = ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups", *program.split(), "-c", script]
        root = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.roots.append(root)
        assert root.stdout.readline() == b"there\n"
        return root

    def user(self, uid: int, **place: object) -> Path:
        self.living(uid)
        return self.place(uid, **place)

    def prolog(self, **env: str) -> subprocess.CompletedProcess[str]:
        """Ends when the hook has ended and nobody has its output any more, as for slurmd."""
        return subprocess.run([str(HOOK)], env=self.env | env, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)

    def close(self) -> None:
        for root in self.roots:
            root.kill()
            root.wait()
            root.stdin.close()
            root.stdout.close()


@pytest.fixture
def node() -> Iterator[Node]:
    folder = Path(tempfile.mkdtemp(prefix="llmwd-prolog-"))  # not tmp_path: other users cannot go there
    folder.chmod(0o1777)
    node = Node(folder)
    yield node
    node.close()
    shutil.rmtree(folder)


def said(place: Path) -> list[str]:
    return (place / "said").read_text().splitlines() if (place / "said").exists() else []


def test_each_users_own_program_is_called_as_that_user_with_nothing_of_roots(node: Node) -> None:
    place = node.user(ALICE)
    done = node.prolog()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    uid, groups, mask, privileges, descriptors, arguments, *env = said(place)
    assert (uid, groups, mask) == (str(ALICE), "65534", "0077")
    assert privileges.split() == ["NoNewPrivs:", "1"]
    assert descriptors == "4"  # the three, and the one with which ls reads
    assert arguments == "--job 42 --gpus 0,1 --within 5"
    names = {line.split("=")[0] for line in env}
    assert names <= {"PATH", "LC_ALL", "HOME", "LLMWD_RUNTIME_DIR", "PWD", "OLDPWD", "SHLVL", "_"}
    assert f"LLMWD_RUNTIME_DIR={place}" in env and "PATH=/nowhere" not in env


def test_all_users_are_called_at_the_same_time(node: Node) -> None:
    meeting = node.folder / "meeting"
    meeting.mkdir()
    meeting.chmod(0o777)
    meet = f"touch {meeting}/$(id -u); until [ $(ls {meeting} | wc -l) = 3 ]; do sleep 0.05; done\n"
    places = [node.user(uid, script=meet + SPEAKS) for uid in (ALICE, BOB, CAROL)]
    assert node.prolog(LLMWD_WITHIN="30").stderr == ""
    assert [said(place)[0] for place in places] == [str(ALICE), str(BOB), str(CAROL)]


def test_a_release_that_is_not_proved_is_said_and_does_not_fail_the_prolog(node: Node) -> None:
    node.user(ALICE, script="exit 4\n")
    node.user(BOB, script="exit 3\n")  # not running: nothing to say
    done = node.prolog()
    assert done.returncode == 0
    assert "job 42" in done.stderr and f"uid {ALICE}" in done.stderr and str(BOB) not in done.stderr


@pytest.mark.parametrize("gpus", [None, "", "none", "0;reboot", "$(touch /tmp/x)", "0 1"])
def test_a_job_without_gpus_calls_nobody(node: Node, gpus: str | None) -> None:
    place = node.user(ALICE)
    if gpus is None:
        del node.env["SLURM_JOB_GPUS"]
    else:
        node.env["SLURM_JOB_GPUS"] = gpus
    assert node.prolog().returncode == 0 and not said(place)


def fifo(place: Path) -> None:
    (place / "release.sh").unlink()
    os.mkfifo(place / "release.sh")
    os.chown(place / "release.sh", ALICE, ALICE)


def link_to_the_script(place: Path) -> None:
    (place / "release.sh").rename(place.parent / "real.sh")
    (place / "release.sh").symlink_to(place.parent / "real.sh")


def script_of_another(place: Path) -> None:
    os.chown(place / "release.sh", BOB, BOB)


def link_to_the_folder(place: Path) -> None:
    place.rename(place.parent / "real")
    place.symlink_to(place.parent / "real")


def folder_of_another(place: Path) -> None:
    os.chown(place, BOB, BOB)


def folder_for_all(place: Path) -> None:
    place.chmod(0o755)


def file_in_place(place: Path) -> None:
    shutil.rmtree(place)
    place.write_text("release.sh")


PLANTED = [fifo, link_to_the_script, script_of_another, link_to_the_folder, folder_of_another, folder_for_all, file_in_place]


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_what_is_not_the_users_own_and_alone_is_left_alone(node: Node, plant: Callable[[Path], None]) -> None:
    mark = node.folder / "ran"
    place = node.user(ALICE, script=f"echo > {mark}\n")
    plant(place)
    bob = node.user(BOB)
    done = node.prolog()
    assert (done.returncode, done.stderr) == (0, "")
    assert not mark.exists() and said(bob)


def test_a_folder_without_a_living_root_of_its_user_is_not_looked_into(node: Node) -> None:
    place = node.place(ALICE)
    node.living(BOB)
    assert node.prolog().returncode == 0 and not said(place)


def test_a_set_uid_program_under_a_borrowed_name_makes_nobody_a_user_of_ours(node: Node) -> None:
    borrowed = node.folder / "bash"
    shutil.copy(shutil.which("bash"), borrowed)
    borrowed.chmod(0o4755)  # runs as root, with -p below
    node.place(ALICE)
    root = node.living(ALICE, program=f"{borrowed} -p")
    assert os.stat(f"/proc/{root.pid}").st_uid == 0
    assert node.prolog().returncode == 0 and not said(node.folder / f"llmwd-{ALICE}")


def test_a_server_whose_root_is_dead_is_waited_for(node: Node) -> None:
    holder = node.living(ALICE, name="llmwd: holder vllm")
    said = node.prolog(LLMWD_WITHIN="1").stderr
    assert f"uid {ALICE}" in said and "exit code 4" in said
    with subprocess.Popen([str(HOOK)], env=node.env | {"LLMWD_WITHIN": "30"}, stderr=subprocess.PIPE) as prolog:
        wait_until(lambda: len(psutil.Process(prolog.pid).children(recursive=True)) >= 2, 10)
        holder.kill()
        holder.wait()
        assert prolog.wait(20) == 0 and prolog.stderr.read() == b""


def test_only_the_users_that_root_names_are_asked(node: Node) -> None:
    alice, bob = node.user(ALICE), node.user(BOB)
    node.prolog(LLMWD_USERS=f"{BOB} 1000")
    assert not said(alice) and said(bob)


def test_a_program_that_hangs_and_leaves_others_behind_costs_the_time_and_no_more(node: Node) -> None:
    """It ignores SIGTERM, and a child of it that left the session outlives it."""
    pids = node.folder / "pids"
    pids.mkdir()
    pids.chmod(0o777)
    hang = f"trap '' TERM; setsid sleep 600 & echo $! > {pids}/child; echo $$ > {pids}/self; while :; do sleep 1; done\n"
    node.user(ALICE, script=hang)
    bob = node.user(BOB)
    began_s = time.monotonic()
    done = node.prolog(LLMWD_WITHIN="1")
    took_s = time.monotonic() - began_s
    child = int((pids / "child").read_text())
    try:
        assert done.returncode == 0 and f"uid {ALICE}" in done.stderr and said(bob)
        assert 1 <= took_s < 10
        wait_until(lambda: not Path(f"/proc/{(pids / 'self').read_text().strip()}").exists(), 10)
    finally:
        os.kill(child, signal.SIGKILL)


def test_garbage_for_a_time_is_the_default(node: Node) -> None:
    place = node.user(ALICE)
    node.prolog(LLMWD_WITHIN="10;reboot")
    assert said(place)[5] == "--job 42 --gpus 0,1 --within 10"
