"""The prolog hook on a real Slurm node with a whole llmwd: no job's first process ever meets our last one.

The llmwd is another user's, where other users can read this checkout and its interpreter; otherwise it is root's.
"""

import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmwd.adapters.desk import ask
from llmwd.ctl.main import main
from llmwd.ctl.program import Refusal
from llmwd.messages import Done, ReleaseOrder
from llmwd.vocab import Worker
from tests.slurm.test_prolog_hook import CAROL, HOOK, OWNER, SLACK_S, STRANGER
from tests.slurm.test_yield import SETTINGS, SOURCES
from tests.slurm.testbed import SlurmNode
from tests.tree.supervised import CHECKOUT, Supervised

JOBS = 20
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
# The job's first process says which of our processes it sees, by their mark, and when it was started itself.
FIRST_WORDS = """
import os, sys
mark, met = sys.argv[1].encode(), []
for entry in os.listdir("/proc"):
    try:
        if entry.isdigit() and mark in open(f"/proc/{entry}/environ", "rb").read() and b"server.py" in open(f"/proc/{entry}/cmdline", "rb").read():
            met.append(int(entry))
    except OSError:
        pass
print(open(f"/proc/{sys.argv[2]}/stat").read().rpartition(")")[2].split()[19], met)
"""


def as_user(uid: int, *command: str) -> list[str]:
    return ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups", *command]


def hook_settings(base: Path, within_s: int) -> dict[str, str]:
    users = " ".join(map(str, dict.fromkeys((owner(), other_owner()))))
    return {"LLMWD_RUNTIMES": f"{base}/llmwd-%u", "LLMWD_USERS": users, "LLMWD_WITHIN": str(within_s)}


def other_owner() -> int:
    """Of a second llmwd; the same user where only root can run one."""
    return CAROL if owner() else 0


@functools.cache
def owner() -> int:
    """Whose llmwd it is: OWNER, if that user can run it."""
    program = f"import sys, zmq, msgspec; sys.exit(sys.base_prefix != {sys.base_prefix!r} or __import__('subprocess').call([sys.executable, '-V']))"
    try:
        done = subprocess.run(as_user(OWNER, sys.executable, "-c", program), cwd=CHECKOUT, capture_output=True, timeout=60)
    except OSError:
        return 0
    readable = all(os.stat(folder).st_mode & 0o005 == 0o005 for folder in (CHECKOUT, *CHECKOUT.parents))
    return OWNER if done.returncode == 0 and readable else 0


class Somebodys(Supervised):
    """An llmwd of the user `uid`, with its runtime folder where the hook looks for it."""

    def __init__(self, base: Path, uid: int, settings: dict[str, object], environ: dict[str, str] | None = None):
        self.folder = base / f"tree-{uid}"
        super().__init__(self.folder, settings, {"FAKE_ENGINE": 1, "FAKE_FORK_GRANDCHILD": 1}, environ)
        self.base, self.uid = base, uid
        self.runtime = base / f"llmwd-{uid}"
        self.env["LLMWD_RUNTIME_DIR"] = str(self.runtime)

    def start(self) -> "Somebodys":
        for path in [self.folder, *self.folder.rglob("*")]:
            os.chown(path, self.uid, self.uid, follow_symlinks=False)
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(
                as_user(self.uid, sys.executable, "-m", "llmwd.supervisor"), env=self.env, cwd=CHECKOUT,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,
            )  # fmt: skip
        return self

    def servers(self) -> list[int]:
        return [pid for pid, cmd in self.left() if b"server.py" in cmd]

    def prolog(self, gpus: str, within_s: int = 3) -> tuple[str, float]:
        """The hook as slurmd runs it: (what it said, how long it took), which is never more than it promises."""
        env = {"SLURM_JOB_ID": "42", "SLURM_JOB_GPUS": gpus, **hook_settings(self.base, within_s)}
        began_s = time.monotonic()
        done = subprocess.run([str(HOOK)], env=env, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        took_s = time.monotonic() - began_s
        assert done.returncode == 0 and took_s < within_s + 2 + SLACK_S
        return done.stderr, took_s


@pytest.fixture
def base() -> Iterator[Path]:
    """A folder that other users can go into; tmp_path is none."""
    folder = Path(tempfile.mkdtemp(prefix="llmwd-p-"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def slurm(base: Path) -> Iterator[Callable[..., SlurmNode]]:
    """A node whose slurm.conf other users can read."""
    made: list[SlurmNode] = []

    def make(**wanted: object) -> SlurmNode:
        (base / "s").mkdir()
        made.append(SlurmNode(base / "s", **wanted))
        made[-1].start()
        return made[-1]

    yield make
    for node in made:
        node.stop()


@pytest.fixture
def somebodys(base: Path) -> Iterator[Callable[..., Somebodys]]:
    made: list[Somebodys] = []

    def make(environ: dict[str, str] | None = None, uid: int | None = None, **settings: object) -> Somebodys:
        made.append(Somebodys(base, owner() if uid is None else uid, settings, environ))
        return made[-1].start()

    yield make
    for tree in made:
        tree.close()


def test_over_twenty_jobs_the_first_process_of_none_meets_our_last_one(
    base: Path, slurm: Callable[..., SlurmNode], somebodys: Callable[..., Somebodys]
) -> None:
    prolog, words = base / "prolog", base / "words.py"
    settings = " ".join(f"{name}='{value}'" for name, value in hook_settings(base, 10).items())
    prolog.write_text(f"#!/bin/sh\n{settings} exec {HOOK}\n")
    prolog.chmod(0o755)
    words.write_text(FIRST_WORDS)
    node = slurm(gpus=2, prolog=prolog)
    tree = somebodys(
        node.env, **SETTINGS | {"DETECTION": SOURCES["v2"], "SLURM_NODE": node.node, "SIM_GPUS": 2, "RESUME_AFTER": 0.1}
    )
    boot_offset_s = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
    gaps_s = []
    for gpus in itertools.islice(itertools.cycle((1, 2)), JOBS):
        tree.serving(60)
        assert tree.servers()
        job = node.sbatch(f"{sys.executable} {words} {tree.mark} $$", f"--gres=gpu:{gpus}")
        node.wait_state(job, "COMPLETED", 60)
        start_ticks, met = (node.folder / f"job-{job}.out").read_text().split(maxsplit=1)
        assert json.loads(met) == [], f"job {job} met processes of ours"
        released = tree.journal("released")
        assert len(released) == len(gaps_s) + 1  # and that was before the job's first process
        assert released[-1].get("job") in (str(job), None)  # None: slurmctld's reading of the node came first
        gaps_s.append(int(start_ticks) * TICK_S - boot_offset_s - released[-1]["gone_s"])
    print("ms from our last process to the job's first:", *sorted(round(gap_s * 1000) for gap_s in gaps_s))
    assert len(gaps_s) == JOBS
    assert min(gaps_s) >= 0, gaps_s
    answered = {entry["job"] for entry in tree.journal("prolog_answered") if entry["proved"]}
    assert len(answered & {entry.get("job") for entry in released}) >= JOBS / 2  # most are due to the prolog's word
    witnesses = {entry["job"]: {entry["first"], *entry["lags"]} for entry in tree.journal("job_seen")}
    assert sum({"prolog", "stepd"} <= names for names in witnesses.values()) >= JOBS / 2
    assert tree.journal("budget_broken") == [] and node.node_state() == "idle"


def test_a_dead_or_stopped_llmwd_costs_a_prolog_its_time_and_no_more(somebodys: Callable[..., Somebodys]) -> None:
    tree = somebodys(LEASE_TTL=60)
    tree.serving()
    said, _ = tree.prolog("0-5")
    assert said == "" and tree.servers() and tree.status()["phase"] == "serving"

    tree.signal("resolver", signal.SIGSTOP)
    said, _ = tree.prolog("6", within_s=1)
    assert f"uid {owner()}" in said and "exit code 4" in said
    tree.signal("resolver", signal.SIGCONT)

    said, _ = tree.prolog("0-7", within_s=20)
    assert said == "" and tree.servers() == []

    tree.signal("root", signal.SIGSTOP)
    said, took_s = tree.prolog("6", within_s=20)
    assert said == "" and took_s < 20  # the workers need no root for it
    tree.signal("root", signal.SIGCONT)

    tree.serving()
    tree.signal("root", signal.SIGKILL)
    tree.process.wait(30)  # killed and not dead yet, it would be one that takes no orders, which is said
    said, _ = tree.prolog("6", within_s=8)
    assert tree.servers() == []
    assert said == "" or owner() == 0  # root may have other llmwds, of other tests


def test_an_llmwd_that_holds_the_jobs_gpu_and_is_stopped_as_a_whole_costs_the_time_and_is_said(
    somebodys: Callable[..., Somebodys]
) -> None:
    tree = somebodys(LEASE_TTL=60)
    tree.serving()
    everybody = [pid for pid, _ in tree.left()]
    for pid in everybody:
        tree.signal_pid(pid, signal.SIGSTOP)
    said, took_s = tree.prolog("6-7", within_s=1)
    assert f"uid {owner()}" in said and took_s >= 1 and tree.servers()
    for pid in everybody:
        tree.signal_pid(pid, signal.SIGCONT)
    assert tree.prolog("6-7", within_s=20)[0] == "" and tree.servers() == []


def test_a_root_whose_folder_is_deleted_has_its_server_waited_for(somebodys: Callable[..., Somebodys]) -> None:
    """Its own word reaches nobody then; here its server ends because the lease does."""
    tree = somebodys(LEASE_TTL=60)
    tree.serving()
    tree.signal("root", signal.SIGSTOP)  # or it would make a new one at once
    root = tree.status()["root"]["pid"]
    tree.forget()
    said, _ = tree.prolog("6-7", within_s=1)
    assert "has no folder in LLMWD_RUNTIMES" in said and "still had its server" in said
    tree.signal_pid(root, signal.SIGCONT)


def test_one_prolog_has_the_llmwds_of_all_users_leave_the_jobs_gpus(somebodys: Callable[..., Somebodys]) -> None:
    """Of root's alone, where other users cannot run this checkout."""
    trees = [somebodys(uid=uid, LEASE_TTL=60) for uid in dict.fromkeys((owner(), other_owner()))]
    for tree in trees:
        tree.serving()
    assert trees[0].prolog("0-5", within_s=20)[0] == "" and all(tree.servers() for tree in trees)
    assert trees[0].prolog("6", within_s=20)[0] == "" and not any(tree.servers() for tree in trees)


def as_stranger(do: Callable[[], object]) -> str:
    """What it gives another user: in a child of ours, for that user may not be able to start our interpreter."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(STRANGER, STRANGER, STRANGER)
            os.setresuid(STRANGER, STRANGER, STRANGER)
            os.write(writer, repr(do()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        text = said.read()
    os.waitpid(pid, 0)
    return text


def test_another_user_can_order_no_release(base: Path, somebodys: Callable[..., Somebodys]) -> None:
    tree = somebodys()
    pid = tree.serving()["server"]["pid"]

    def by_our_program() -> object:
        os.environ.update(tree.env)
        try:
            return main(["release", "--job", "7", "--gpus", "0-7", "--within", "2"], standalone_mode=False)
        except Refusal as refusal:
            return refusal.exit_code, refusal.message

    def by_a_message(*gpus: int, within_s: float = 2.0) -> object:
        return ask(tree.runtime, Worker.resolver, ReleaseOrder(job="7", gpus=gpus, within_s=within_s, by="me"), within_s)

    assert isinstance(by_a_message(within_s=20.0), Done)  # root may: it is not the message that is wrong
    assert f"(1, 'the runtime folder {tree.runtime} belongs to uid {owner()}, not to you" in as_stranger(by_our_program)
    assert as_stranger(lambda: by_a_message(6, 7)) == "None"

    # The hook itself, started by a user, can become nobody else.
    hook = shutil.copy(HOOK, base)
    env = {"SLURM_JOB_ID": "42", "SLURM_JOB_GPUS": "6", **hook_settings(base, 2)}
    done = subprocess.run(as_user(STRANGER, hook), env=env, cwd=base, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and f"uid {owner()}" in done.stderr
    assert tree.status()["server"]["pid"] == pid and tree.journal("lease_revoked") == []
