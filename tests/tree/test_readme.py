"""Every command in README.md is run: here with the stand-in server and eight simulated GPUs, or where it says below."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from llmwd.config import SETTINGS
from tests.tree.supervised import CHECKOUT, FAKE_SERVER, MARK, Supervised
from tests.waiting import wait_until

README = (CHECKOUT / "README.md").read_text()
ELSEWHERE = {
    "./scripts/test.sh": "is what runs this test",
    "scripts/bench_yield.py": "needs a Slurm node: tests/slurm/test_benchmark.py",
    "scripts/bench_door.py": "takes a minute: tests/tree/test_bench_door.py",
    "scripts/chaos.py": "takes minutes: tests/tree/test_chaos.py",
    "./bench.sh": "needs vLLM's own client: tests/tree/test_bench_script.py",
}
SLURM_RECORD = """JobId=42 JobName=train
   JobState=RUNNING Reason=None Dependency=(null)
   NodeList=gpu01
   NumNodes=1 NumCPUs=8 NumTasks=1
   JOB_GRES=gpu:2
     Nodes=gpu01 CPU_IDs=0-7 Mem=32768 GRES=gpu:2(IDX:0-1)
   MinCPUsNode=8
"""


def commands() -> list[str]:
    """The commands of all ```sh blocks, in order; a here-document belongs to its command."""
    found: list[str] = []
    for block in re.findall(r"^```sh\n(.*?)^```$", README, re.M | re.S):
        lines = iter(block.splitlines())
        for line in lines:
            command = line.split("  #")[0].strip()
            if not command or command.startswith("#"):
                continue
            if here := re.search(r"<< '(\w+)'", command):
                body = [command]
                for more in lines:
                    body.append(more)
                    if more == here[1]:
                        break
                command = "\n".join(body)
            found.append(command)
    return found


def elsewhere(command: str) -> bool:
    return command.split()[0] in ELSEWHERE


@pytest.fixture
def home(tmp_path: Path):
    """A home that looks like a checkout from where the reader sits, with the stand-in server as vLLM."""
    tree = Supervised(tmp_path, {"LEASE_TTL": 10})
    for name in ("bin", "start.sh", "switch-model.sh", "bench.sh", "scripts"):
        (tree.home / name).symlink_to(CHECKOUT / name)
    for profile in (CHECKOUT / "models").glob("*.env"):
        (tree.home / "models" / profile.name).write_text(profile.read_text().replace("LLM_VENV=", "#LLM_VENV="))
    tree.activate("glm-4.7-flash")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "scontrol").write_text(f"#!/bin/sh\ncat <<'EOF'\n{SLURM_RECORD}EOF\n")
    (tools / "scontrol").chmod(0o755)
    tree.env |= {
        "PATH": f"{tools}:{os.environ['PATH']}", "LLMWD_TMUX_SESSION": f"readme-{tree.mark[:8]}", "TERM": "xterm",
        "TMUX_TMPDIR": str(tmp_path),
    }
    tree.observe()
    yield tree
    tree.ctl("stop", within_s=60)
    subprocess.run(["tmux", "kill-server"], env=tree.env, capture_output=True, check=False)
    tree.close()


def test_every_command_in_the_readme_works(home: Supervised) -> None:
    assert FAKE_SERVER.exists() and MARK in home.env
    for command in commands():
        if elsewhere(command):
            continue
        done = subprocess.run(
            ["bash", "-c", command], cwd=home.home, env=home.env, capture_output=True, text=True, timeout=120,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
    wait_until(lambda: not home.left(), 20, what="the end after the last stop")


def test_the_commands_that_are_run_elsewhere_exist_and_are_named_in_the_readme() -> None:
    named = {command.split()[0] for command in commands() if elsewhere(command)}
    assert named == set(ELSEWHERE)
    for program in named:
        assert os.access(CHECKOUT / program, os.X_OK)


def test_the_readme_names_every_setting_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", README, re.M))
    assert list(rows) == [spec.name for spec in SETTINGS]
    for spec in SETTINGS:
        assert spec.default in rows[spec.name], spec.name


def test_the_programs_that_the_readme_describes_are_the_ones_that_run() -> None:
    from llmwd.spec import CHILDREN

    for spec in CHILDREN:
        assert re.search(rf"[├└]─ {spec.name}\b", README), spec.name
