"""The yield benchmark runs, and prints what README says that it measures."""

import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[2] / "scripts" / "bench_yield.py"


def run(*words: str) -> str:
    words = ("--detection", "stepd,cgroup2,gresused,procfs,sim", *words)  # other tests' nodes have trees in v1
    done = subprocess.run([sys.executable, str(BENCHMARK), *words], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_yield_is_measured_from_outside_with_its_parts_and_compared_with_bare_scontrol(tmp_path: Path) -> None:
    told = run("-n", "2", "--json", str(tmp_path / "rounds.json"))
    for row in ("gone, seen from outside", "resolved", "revoked", "signalled", "own part", "whole path / bare scontrol"):
        assert row in told
    assert (tmp_path / "rounds.json").read_text().count('"path"') == 2


def test_cpu_and_memory_of_every_process_of_ours_are_measured() -> None:
    told = run("--idle", "1")
    for name in ("root", "notifier", "detector", "resolver", "vllm", "tunnel", "holder vllm", "all together"):
        assert name in told
