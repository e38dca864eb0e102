"""etc/slurm/prolog-llmwd.sh alone, as root on a node with several users: whom it calls, as whom, and how long it waits."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from llmwd.adapters.cgroups import read_mounts
from tests.waiting import wait_until

HOOK = Path(__file__).resolve().parents[2] / "etc" / "slurm" / "prolog-llmwd.sh"
# Of this run alone: the hook finds a user's processes wherever they are. Numbers without an entry in the user database.
USERS = ALICE, BOB, CAROL, OWNER, STRANGER = range(first := 20_000 + os.getpid() % 8_000 * 5, first + 5)
DEFAULT_S = 6  # LLMWD_WITHIN
SLACK_S = 5.0  # for a busy machine
SPEAKS = """\
{ id -u; id -G; umask; grep NoNewPrivs /proc/self/status; ls /proc/self/fd | wc -l; echo "$@"
echo $(grep -E "Cap(Inh|Prm|Eff|Bnd)" /proc/self/status)
echo $(cat /proc/self/oom_score_adj) $(ulimit -Hc) $(ulimit -Hl); env; } > said.new
mv said.new said
"""


class Node:
    """The places that the hook looks into, and living processes that pass for llmwd's root."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.roots: list[subprocess.Popen[bytes]] = []
        self.took_s = 0.0  # the last prolog
        self.env = {
            "SLURM_JOB_ID": "42", "SLURM_JOB_GPUS": "0,1", "SECRET": "of root", "PATH": "/nowhere",
            "LLMWD_RUNTIMES": f"{folder}/elsewhere-%u {folder}/llmwd-%u", "LLMWD_WITHIN": "5", "LLMWD_USERS": " ".join(map(str, USERS)),
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
        """Ends when the hook has ended and nobody has its output any more, as for slurmd. It never takes longer than it promises."""
        env = self.env | env
        began_s = time.monotonic()
        done = subprocess.run([str(HOOK)], env=env, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        self.took_s = time.monotonic() - began_s
        promised_s = int(env["LLMWD_WITHIN"]) + 2 if env.get("LLMWD_WITHIN", "").isdigit() else DEFAULT_S + 2
        assert done.returncode == 0 and self.took_s < promised_s + SLACK_S
        return done

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
    uid, groups, mask, privileges, descriptors, arguments, capabilities, limits, *env = said(place)
    assert (uid, groups, mask) == (str(ALICE), "65534", "0077")
    assert privileges.split() == ["NoNewPrivs:", "1"]
    assert descriptors == "4"  # the three, and the one with which ls reads
    assert arguments == "--job 42 --gpus 0,1 --within 5"
    assert set(re.findall(r"\w+:\s*(\w+)", capabilities)) == {"0" * 16}
    assert limits == "0 0 64"
    names = {line.split("=")[0] for line in env}
    assert names <= {"PATH", "LC_ALL", "HOME", "LLMWD_RUNTIME_DIR", "PWD", "OLDPWD", "SHLVL", "_"}
    assert f"LLMWD_RUNTIME_DIR={place}" in env and "PATH=/nowhere" not in env


def test_how_soon_the_kernel_kills_slurmd_is_not_inherited(node: Node) -> None:
    """Of slurmd it is the last, and here the first: the other way round is not for every root."""
    place = node.user(ALICE)
    env = " ".join(f"{name}='{value}'" for name, value in node.env.items())
    subprocess.run(["choom", "-n", "500", "--", "env", "-i", "sh", "-c", f"{env} exec {HOOK}"], check=True, timeout=60)
    assert said(place)[7].split()[0] == "0"


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
    node.user(BOB)
    done = node.prolog()
    assert "job 42" in done.stderr and f"uid {ALICE}" in done.stderr and str(BOB) not in done.stderr


@pytest.mark.parametrize("gpus", [None, ""])
def test_a_job_without_gpus_calls_nobody(node: Node, gpus: str | None) -> None:
    place = node.user(ALICE)
    if gpus is None:
        del node.env["SLURM_JOB_GPUS"]
    else:
        node.env["SLURM_JOB_GPUS"] = gpus
    assert node.prolog().stderr == "" and not said(place)


@pytest.mark.parametrize("gpus", ["none", "0;reboot", "$(touch /tmp/x)", "0 1", "MIG-6e8a", "0\n1", "0-" * 500])
def test_a_list_of_gpus_that_is_not_understood_counts_as_all_of_them_and_is_said(node: Node, gpus: str) -> None:
    place = node.user(ALICE)
    (line,) = node.prolog(SLURM_JOB_GPUS=gpus).stderr.splitlines()
    assert "is not understood" in line and len(line) < 300
    assert said(place)[5] == "--job 42 --gpus 0-999 --within 5"


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
    (line,) = node.prolog().stderr.splitlines()
    assert f"uid {ALICE} has no folder in LLMWD_RUNTIMES" in line
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


HOLDER = "llmwd: holder vllm"


def among_children(pid: int, *names: str) -> list[psutil.Process]:
    """Processes that this one has started, themselves or by others, and that have these names."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [child] if child.name() in names else []
    return found


def waits_for(node: Node, holder: subprocess.Popen[bytes]) -> str:
    """That the hook ends with this process and not before; what it said."""
    with subprocess.Popen([str(HOOK)], env=node.env | {"LLMWD_WITHIN": "30"}, stderr=subprocess.PIPE, text=True) as prolog:
        wait_until(lambda: among_children(prolog.pid, "sleep"), 25)
        holder.kill()
        holder.wait()
        assert prolog.wait(20) == 0
        return prolog.stderr.read()


def test_a_server_whose_root_is_dead_is_waited_for(node: Node) -> None:
    holder = node.living(ALICE, name=HOLDER)
    assert f"uid {ALICE} still had its server" in node.prolog(LLMWD_WITHIN="1").stderr and node.took_s > 2
    assert waits_for(node, holder) == ""


def test_a_holder_that_is_stopped_costs_the_time_and_no_more(node: Node) -> None:
    node.living(ALICE, name=HOLDER).send_signal(signal.SIGSTOP)
    assert f"uid {ALICE} still had its server" in node.prolog(LLMWD_WITHIN="1").stderr


def test_a_root_that_is_dead_and_not_reaped_is_none(node: Node) -> None:
    root, holder = node.living(ALICE), node.living(ALICE, name=HOLDER)
    place = node.place(ALICE)
    os.kill(root.pid, signal.SIGKILL)
    wait_until(lambda: psutil.Process(root.pid).status() == psutil.STATUS_ZOMBIE, 10)
    assert waits_for(node, holder) == "" and not said(place)


def test_a_root_that_dies_while_it_is_being_called_leaves_a_server_that_is_waited_for(node: Node) -> None:
    holder = node.living(ALICE, name=HOLDER)
    node.user(ALICE, script="exit 3\n")  # no supervisor running
    assert "no folder in LLMWD_RUNTIMES" in waits_for(node, holder)


@pytest.mark.parametrize("deleted", [True, False], ids=["deleted", "elsewhere"])
def test_a_living_root_without_a_folder_is_said_and_its_server_is_waited_for(node: Node, deleted: bool) -> None:
    place, holder = node.user(ALICE), node.living(ALICE, name=HOLDER)
    if deleted:
        shutil.rmtree(place)
    else:
        place.rename(node.folder / "somewhere")
    assert "no folder in LLMWD_RUNTIMES" in waits_for(node, holder)


def test_a_server_on_other_gpus_keeps_nobody_waiting(node: Node) -> None:
    """Its llmwd has proved that it is off these."""
    node.living(ALICE, name=HOLDER)
    place = node.user(ALICE)
    assert node.prolog(LLMWD_WITHIN="30").stderr == "" and node.took_s < 20 and said(place)


@pytest.fixture
def in_a_job() -> Iterator[Callable[[int], None]]:
    """Puts a process into a cgroup that is named as a job's."""
    mount = next((mount for mount in read_mounts() if mount.version == 2), None) or read_mounts()[0]
    folder = Path(mount.point) / f"llmwd-test-{uuid.uuid4().hex}" / "job_7"
    folder.mkdir(parents=True)
    pids: list[int] = []

    def put(pid: int) -> None:
        (folder / "cgroup.procs").write_text(str(pid))
        pids.append(pid)

    yield put
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: (folder / "cgroup.procs").read_text() == "", 10)
    folder.rmdir()
    folder.parent.rmdir()


def test_a_users_process_inside_a_job_neither_is_an_llmwd_nor_hides_one(node: Node, in_a_job: Callable[[int], None]) -> None:
    """Whichever comes first in /proc."""
    for order in ((True, False), (False, True)):
        roots = [(node.living(ALICE), inside) for inside in order]
        for root, inside in roots:
            if inside:
                in_a_job(root.pid)
        node.place(ALICE)
        assert node.prolog().stderr == "" and said(node.folder / f"llmwd-{ALICE}")
        shutil.rmtree(node.folder / f"llmwd-{ALICE}")
        for root, inside in roots:
            if not inside:
                root.kill()
                root.wait()
        place = node.place(ALICE)
        assert node.prolog().stderr == "" and not said(place)
        shutil.rmtree(place)


def test_only_the_users_that_root_names_are_asked(node: Node) -> None:
    alice, bob = node.user(ALICE), node.user(BOB)
    node.prolog(LLMWD_USERS=f"{BOB} 1000")
    assert not said(alice) and said(bob)


ESCAPES = "setsid sleep 600 & echo $! > child; "  # a child that leaves the session


def left_of(uid: int) -> list[str]:
    return [process.info["name"] for process in psutil.process_iter(["name", "uids"]) if process.info["uids"].real == uid]


@pytest.mark.parametrize("script", [
    ESCAPES + "trap '' TERM; while :; do sleep 1; done\n", ESCAPES + "kill -STOP $$\n", ESCAPES + "exit 0\n", "sleep 600 & exit 0\n",
], ids=["ignores SIGTERM", "stopped", "ends", "leaves one"])  # fmt: skip
def test_whatever_was_called_costs_the_time_and_no_more_and_leaves_nobody_behind(node: Node, script: str) -> None:
    node.user(ALICE, script=script)
    bob = node.user(BOB)
    done = node.prolog(LLMWD_WITHIN="3")  # bob's dozen of programs have that long
    assert said(bob) and (f"uid {ALICE}" in done.stderr) is ("exit 0" not in script)
    wait_until(lambda: left_of(ALICE) == ["llmwd: root"], 20, what="the end of all but the root")


def test_a_call_whose_time_limit_is_stopped_ends_with_the_hook(node: Node) -> None:
    """The `timeout` is root's: only somebody with the same rights could."""
    node.user(ALICE, script="echo > there; while :; do sleep 1; done\n")
    with subprocess.Popen([str(HOOK)], env=node.env | {"LLMWD_WITHIN": "4"}, stderr=subprocess.PIPE, text=True) as prolog:
        began_s = time.monotonic()
        wait_until((node.folder / f"llmwd-{ALICE}" / "there").exists, 10)
        for child in among_children(prolog.pid, "timeout", "unshare"):
            child.suspend()
        assert prolog.wait(20) == 0 and time.monotonic() - began_s < 6 + SLACK_S
        assert "was left alone after 6 s" in prolog.stderr.read()
    wait_until(lambda: left_of(ALICE) == ["llmwd: root"], 20, what="the end of all but the root")


def test_garbage_for_a_time_is_the_default(node: Node) -> None:
    place = node.user(ALICE)
    node.prolog(LLMWD_WITHIN="10;reboot")
    assert said(place)[5] == f"--job 42 --gpus 0,1 --within {DEFAULT_S}"
