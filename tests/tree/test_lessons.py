"""What running the bash daemon taught: each test is one of its mistakes, which this system must not repeat.

Its docstring says what the bash daemon did and what came of it. The same in front of a real Slurm: tests/slurm.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import inotify_simple
import pytest

from llmwd.adapters import procs
from tests.fakes import cloudflared
from tests.fakes.nvml import FakeDriver, build
from tests.tree.conftest import Start
from tests.tree.supervised import CHECKOUT, Supervised
from tests.waiting import wait_until

TUNNEL = {"TUNNEL_HOSTNAME": "llm.example.org", "TUNNEL_ID": "6ff42ae2-765d-4adf-8112-31c55c1551ef"}


def gone(tree: Supervised, within_s: float = 20) -> None:
    wait_until(lambda: not [cmd for _, cmd in tree.left() if b"server.py" in cmd], within_s, what="the end of the server")


def with_tunnel(supervised: Start, folder: Path, *flags: str, **settings: object) -> Supervised:
    """Serving, with a stand-in cloudflared that is connected."""
    credentials = folder / "credentials.json"
    credentials.write_text(json.dumps({"AccountTag": "a", "TunnelSecret": "c2VjcmV0" * 6, "TunnelID": TUNNEL["TUNNEL_ID"]}))
    credentials.chmod(0o600)
    tree = supervised(
        {"FAKE_ENGINE": 1}, CLOUDFLARED_BIN=cloudflared.wrapper(folder, *flags), CLOUDFLARED_CREDS=credentials,
        **TUNNEL, **settings,
    )
    tree.until(lambda status: status["phase"] == "serving" and status["tunnel"]["phase"] == "ready", what="a tunnel")
    return tree


def test_the_server_ends_before_the_tunnel_and_nothing_sleeps(supervised: Start, tmp_path: Path) -> None:
    """It stopped the tunnel (2 s sleep) before the server, then slept again: 2.2 s and 2.5 s until the server's end."""
    tree = with_tunnel(supervised, tmp_path, "--ignore-term", "--drain", "20", LEASE_TTL=60)
    took_s = []
    for job in (1, 2, 3):  # the quickest of three, because other tests have the same two cores
        tree.serving()
        tree.job(job, "0-7")
        release = wait_until(lambda: next((it for it in tree.journal("released") if it["job"] == str(job)), None), 20)
        took_s.append(release["gone_s"] - release["seen_s"])
        tree.phase("waiting")
        tree.job_over(job)
    assert min(took_s) < 1.0
    assert [cmd for _, cmd in tree.left() if b"cloudflared.py" in cmd]  # deaf as it is, it was not waited for


def test_a_job_that_lands_while_the_model_loads_is_seen(supervised: Start) -> None:
    """It waited up to 10 minutes for /health without watching for jobs."""
    tree = supervised({"FAKE_READY_AFTER": 600, "FAKE_SWALLOW_TERM_WHILE_LOADING": 1}, LEASE_TTL=60)
    tree.phase("loading")
    tree.job(1, "0-7")
    gone(tree)
    assert tree.phase("waiting")["reason"] == "yielded_to_job"


def test_nothing_is_ever_signalled_by_its_name_or_its_user(supervised: Start) -> None:
    """`pkill -u $USER` and `pkill -f "vllm serve"` killed Slurm jobs' and other people's processes."""
    tree = supervised()
    tree.serving()
    # By every name and marker that one could go by, but not started by it.
    clothes = {"PATH": os.environ["PATH"], "LLMWD_TREE": "somebody-elses", "CUDA_VISIBLE_DEVICES": "SIM-6,SIM-7"}
    namesake = subprocess.Popen(
        ["bash", "-c", f"exec -a '{sys.executable} {tree.server_fact().bin} serve fake --port {tree.port}' sleep 1000"],
        env=clothes, start_new_session=True,
    )
    try:
        tree.job(1, "0-7")
        gone(tree)
        tree.phase("waiting")  # a status is kept after it is told, and the model may be gone before: it would still serve
        tree.job_over(1)
        tree.serving()
        tree.signal("holder", signal.SIGKILL)  # clearing up after a holder goes by the marker
        tree.until(lambda status: status["server"]["deaths"] == 1 and status["phase"] == "serving")
        tree.stop()
        assert namesake.poll() is None
    finally:
        namesake.kill()
        namesake.wait()
    sources = [*(CHECKOUT / "llmwd").rglob("*.py"), *(CHECKOUT / "scripts").glob("*.sh"), *CHECKOUT.glob("*.sh")]
    for path in sources:
        text = path.read_text()
        assert not re.search(r"\b(pkill|killall|pgrep|fuser)\b", text), path
        # These end the group of a command that they started and have not reaped, so its number cannot be another's.
        assert path.name in ("bashfile.py", "slurm.py") or not re.search(r"\bos\.(kill|killpg)\(", text), path


def test_a_job_that_ends_while_another_begins_is_seen(supervised: Start) -> None:
    """It compared the number of jobs with a baseline."""
    tree = supervised(LEASE_TTL=60)
    tree.serving()
    tree.job(1, "0")
    tree.until(lambda status: status["jobs"])
    tree.job(2, "0-7")
    tree.job_over(1)
    gone(tree)
    tree.until(lambda status: status["phase"] == "waiting" and [job["id"] for job in status["jobs"]] == ["2"])


def test_while_nothing_happens_no_folder_of_jobs_is_polled_and_no_job_is_looked_into(supervised: Start) -> None:
    """It polled cgroupfs four times a second with find and cat, in the way of the kernel's removal of job cgroups."""
    tree = supervised(observed=False, POLL_INTERVAL=0.05)  # the observer does look into it
    tree.all_ready()
    tree.job(1, "0")
    tree.until(lambda status: status["jobs"])
    folder = tree.runtime / "sim"
    with inotify_simple.INotify() as eyes:
        flags = inotify_simple.flags
        eyes.add_watch(folder, flags.OPEN | flags.ACCESS)
        end_s = time.monotonic() + 2.0
        seen: list[object] = []
        while (left_s := end_s - time.monotonic()) > 0:
            seen += eyes.read(timeout=int(left_s * 1000) + 1)
    assert len([event for event in seen if event.mask & flags.OPEN]) <= 4  # polling would have been 40, and 40 files
    detector = tree.worker("detector")["pid"]
    held = []
    for path in Path(f"/proc/{detector}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since: it was not kept
            held.append(os.readlink(path))
    assert held and not [name for name in held if "job_" in name]


def test_the_api_server_is_never_killed_alone_and_its_end_leaves_no_engine(supervised: Start) -> None:
    """`kill -KILL` of the API server at once: its engine stayed on the GPUs for ever, or tore its contexts down late."""
    tree = supervised({"FAKE_ENGINE": 1, "FAKE_CHILDREN": 3}, LEASE_TTL=60, YIELD_GRACE=5)
    tree.serving()
    tree.job(1, "0-7")
    gone(tree)
    release = wait_until(lambda: tree.journal("released"), 10)[-1]
    assert release["killed_s"] is None  # SIGTERM to all of it, and that was enough
    assert release["model_gone_s"] <= release["gone_s"]
    tree.phase("waiting")
    tree.job_over(1)
    tree.serving()
    old = {pid for pid, cmd in tree.left() if b"server.py" in cmd}
    assert len(old) == 5
    tree.signal("server", signal.SIGKILL)  # somebody else does it
    tree.until(lambda status: status["server"]["deaths"] == 1)
    wait_until(lambda: not old & {pid for pid, _ in tree.left()}, 20)


def test_generated_files_lie_in_a_private_folder_that_must_be_ours(supervised: Start, tmp_path: Path) -> None:
    """It wrote /tmp/cloudflared_config.yml: a fixed name in a shared folder, which any user can plant or read."""
    tree = with_tunnel(supervised, tmp_path)
    config = next(Path(word) for _, cmd in tree.left() for word in os.fsdecode(cmd).split("\0") if word.endswith((".yml", ".yaml")))
    assert tree.runtime in config.parents
    for path in (tree.runtime, tree.state, *tree.runtime.rglob("*"), *tree.state.rglob("*")):
        try:
            found = path.lstat()
        except FileNotFoundError:  # a worker's draft of a fact, renamed since
            continue
        reached = found.st_mode & 0o077 and not path.is_socket()
        assert found.st_uid == os.getuid() and (not reached or tree.runtime.stat().st_mode & 0o077 == 0), path
    assert tree.runtime.stat().st_mode & 0o777 == 0o700 and config.stat().st_mode & 0o077 == 0

    planted = supervised(start=False)
    (tmp_path / "elsewhere").mkdir()
    planted.runtime.symlink_to(tmp_path / "elsewhere")
    planted.start()
    assert planted.process.wait(30) == 1
    assert "is not a folder (a link, or a file)" in planted.errors.read_text()


def test_what_is_not_known_counts_as_a_conflict(supervised: Start) -> None:
    """A job folder without processes was taken for nothing, and a slow scontrol answer for no GPUs."""
    tree = supervised(RESOLVE_DEADLINE=0.5, LEASE_TTL=60)
    tree.serving()
    tree.job(1, "?")
    gone(tree)
    status = tree.phase("waiting")
    assert status["reason"] == "unknown_job" and status["jobs"] == [{"id": "1", "gpus": None}]
    tree.until(lambda status: {gpu["holder"] for gpu in status["gpus"]} == {"unknown"})
    assert tree.status()["lease"] is None


def test_a_job_without_gpus_never_stops_the_server_even_with_all_gpus_claimed(supervised: Start) -> None:
    """Any job counted as a conflict when all GPUs were claimed."""
    tree = supervised({"NUM_GPUS": 8})
    before = tree.serving()
    assert before["lease"]["gpus"] == list(range(8))
    tree.job(1, "")
    status = tree.until(lambda status: status["jobs"] == [{"id": "1", "gpus": []}])
    assert status["phase"] == "serving" and status["server"]["pid"] == before["server"]["pid"]
    tree.job(2, "3")  # what comes later is seen, so the first one was decided, not overlooked
    tree.phase("waiting")
    assert [entry["job"] for entry in tree.journal("lease_revoked")] == ["2"]


def test_the_server_listens_on_the_loopback_and_keeps_its_api_key(supervised: Start) -> None:
    """`vllm serve` bound to all addresses without an API key: anybody on the campus network could use it."""
    tree = supervised({"VLLM_API_KEY": "unused", "VLLM_ARGS": "--served-model-name fake --api-key s3cret"})
    tree.serving()  # the probe knows the key
    assert not tree.answers()  # and who does not know it gets nothing
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    assert {words[1] for words in lines if words[3] == "0A" and int(words[1][9:], 16) == tree.port} == {f"0100007F:{tree.port:04X}"}
    told = [tree.ctl("status", "--json").stdout, *(path.read_text() for path in (tree.state / "logs").glob("[!s]*.log"))]
    assert not [text for text in told if "s3cret" in text]


def test_json_arguments_reach_vllm_with_their_quotes(supervised: Start) -> None:
    """It word-split $VLLM_ARGS without removing quotes: profiles hold JSON that must arrive as it is written."""
    config = '{"cudagraph_mode":"PIECEWISE"}'
    tree = supervised({"VLLM_ARGS": f"--served-model-name fake --compilation-config {config} --max-model-len 4096"})
    pid = tree.serving()["server"]["pid"]
    words = os.fsdecode(procs.cmdline(pid)).split("\0")
    assert words[words.index("--compilation-config") + 1] == config
    assert words[words.index("--max-model-len") + 1] == "4096"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


def leased(status: dict) -> set[str]:
    """UUIDs of the lease's GPUs."""
    return {gpu["uuid"] for gpu in status["gpus"] if status["lease"] and gpu["index"] in status["lease"]["gpus"]}


@pytest.mark.parametrize("map_line, left", [("0=2,1=0,2=3,3=1", {"GPU-a", "GPU-b", "GPU-d"}), ("", set())])
def test_slurms_index_is_not_taken_for_nvidia_smis(
    library: Path, tmp_path: Path, map_line: str, left: set[str]
) -> None:
    """It took Slurm's IDX for nvidia-smi's index. Here index, minor and PCI order are all different.

    With the operator's GPU_MAP, Slurm's GPU 0 is exactly GPU-c; without, it may be any that some order names.
    """
    driver = FakeDriver(library, tmp_path / "world")
    driver.write(*(
        f"gpu uuid=GPU-{name} minor={minor} pci=00000000:{bus}:00.0 name=NVIDIA_H200 memory=1000 used=0"
        for name, minor, bus in (("a", 1, "3B"), ("b", 3, "1B"), ("c", 0, "8B"), ("d", 2, "5B"))
    ))
    report = tmp_path / "report"
    tree = Supervised(
        tmp_path / "tree", {"SIM_GPUS": 0, "DETECTION": "sim,nvml", "GPU_MAP": map_line, "NUM_GPUS": 1},
        {"FAKE_REPORT": report, "NUM_GPUS": 1},
        environ={name: driver.env()[name] for name in ("LD_LIBRARY_PATH", "LLMWD_FAKE_NVML")},
    )
    tree.start()
    try:
        tree.serving()
        tree.job(1, "0")
        status = tree.until(lambda status: status["jobs"])
        claimed = {gpu["uuid"] for gpu in status["gpus"] if gpu["holder"] == "slurm"}
        if map_line:
            assert claimed == {"GPU-c"}
        else:
            assert claimed >= {"GPU-a", "GPU-b", "GPU-c"}  # first by NVML's index, by PCI order, by minor
        free = {"GPU-a", "GPU-b", "GPU-c", "GPU-d"} - claimed
        status = tree.until(lambda status: status["phase"] == "serving" and leased(status) and leased(status) <= free)
        assert {json.loads(report.read_text())["cuda_visible_devices"]} == leased(status)
        if left:
            tree.write_profile("fake", FAKE_REPORT=report, NUM_GPUS=3)
            assert tree.ctl("reload").returncode == 0
            tree.until(lambda status: status["phase"] == "serving" and leased(status) == left)
            assert set(json.loads(report.read_text())["cuda_visible_devices"].split(",")) == left
    finally:
        tree.close()
