"""bench.sh, run as a program, with small stand-ins for llmwd-ctl, vLLM's client and the server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmwd.bench.served import Served, jobs_on, why_it_ended
from llmwd.redact import mask_arguments
from tests.waiting import wait_until

CHECKOUT = Path(__file__).resolve().parents[2]

# Answers /version, as the server's first line says where.
SERVER = """
    import http.server
    class Version(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200); self.end_headers(); self.wfile.write(b'{"version": "9.8.7"}')
        def log_message(self, *_): pass
    server = http.server.HTTPServer(("127.0.0.1", 0), Version)
    print(server.server_port, flush=True)
    server.serve_forever()
"""

# `vllm bench serve …`: tells how it was called, then does what CLIENT_DOES says.
CLIENT = """
    import contextlib, json, os, pathlib, socket, sys, threading
    args = sys.argv[1:]
    last = lambda name: args[len(args) - 1 - args[::-1].index(name) + 1]
    here = pathlib.Path(__file__).parent
    does = (here / "does").read_text()
    if does == "fail when the server ends":
        sock = socket.create_connection(("127.0.0.1", int(last("--base-url").rsplit(":", 1)[1])))
    with (here / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps({"args": args, "pid": os.getpid(), "environ": dict(os.environ)}) + "\\n")
    print("the client's console")
    while does == "never end":
        print("still at it", flush=True)
        threading.Event().wait(0.05)
    result = {"num_prompts": int(last("--num-prompts")), "max_concurrency": int(last("--max-concurrency")),
              "completed": 3, "failed": 0, "request_throughput": 1.5, "output_throughput": 192.25,
              "median_ttft_ms": 41.0, "p99_ttft_ms": 43.0}
    if does == "fail when the server ends":
        with contextlib.suppress(ConnectionResetError):
            sock.recv(1)
        result["failed"] = result["num_prompts"] - 3
    if does == "exit 7":
        sys.exit(7)
    pathlib.Path(last("--result-dir"), last("--result-filename")).write_text(json.dumps(result))
"""


@dataclass
class Bench:
    folder: Path
    server: subprocess.Popen[str]
    port: int

    @property
    def served(self) -> dict:
        return {
            "node": "n1", "phase": "serving", "reason": "", "gpus": [], "jobs": [],
            "model": {"profile": "my-model", "name": "org/MyModel", "served_as": "mine"},
            "lease": {"epoch": 4, "gpus": [2, 3]},
            "server": {"pid": self.server.pid, "phase": "ready", "url": f"http://127.0.0.1:{self.port}",
                       "bin": str(self.folder / "vllm")},
        }  # fmt: skip

    def status(self, status: dict | None) -> None:
        """What the stand-in for llmwd-ctl says from now on; None: no supervisor."""
        beside = self.folder / "status.new"
        beside.write_text(json.dumps(status) if status else "")
        beside.replace(self.folder / "status")

    def client_does(self, what: str) -> None:
        (self.folder / "does").write_text(what)

    def start(self, *args: str, **environ: str) -> subprocess.Popen[str]:
        kind, rest = (args[:1], args[1:]) if args else ((), ())
        return subprocess.Popen(
            [CHECKOUT / "bench.sh", *kind, "--ctl", self.folder / "ctl", *rest],
            env={**os.environ, "LLMWD_HOME": str(self.folder), **environ}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        with self.start(*args) as process:
            out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def calls(self) -> list[dict]:
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be half written

    def result(self) -> dict:
        (path,) = (self.folder / "bench-results").glob("*.json")
        return json.loads(path.read_text())


def program(path: Path, text: str) -> None:
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(text)}")
    path.chmod(0o755)


@pytest.fixture
def bench(tmp_path: Path):
    program(tmp_path / "vllm", CLIENT)
    program(
        tmp_path / "ctl",
        """
        import pathlib, sys
        text = (pathlib.Path(__file__).parent / "status").read_text()
        print(text)
        sys.exit(0 if text else 3)
        """,
    )
    program(tmp_path / "server", SERVER)
    server = subprocess.Popen(
        [tmp_path / "server", "--api-key", "hush", "--tensor-parallel-size", "2"],
        env={**os.environ, "HF_HOME": "/models", "VLLM_API_KEY": "hush", "CUDA_VISIBLE_DEVICES": "GPU-2,GPU-3"},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with server:
        made = Bench(tmp_path, server, int(server.stdout.readline()))
        made.status(made.served)
        made.client_does("finish")
        yield made
        server.kill()


def test_it_refuses_when_no_supervisor_runs(bench: Bench) -> None:
    bench.status(None)
    done = bench.run("quick")
    assert done.returncode == 1
    assert done.stderr.startswith("bench.sh: vLLM server not running: llmwd is not running here.")
    assert not bench.calls()


@pytest.mark.parametrize("phase", ["loading", "yielding", "waiting", "held", "stopped", "failed"])
def test_it_refuses_when_the_model_is_not_served(bench: Bench, phase: str) -> None:
    bench.status({**bench.served, "phase": phase, "server": None, "model": None})
    done = bench.run()
    assert done.returncode == 1
    assert f"vLLM server not running: llmwd is {phase}" in done.stderr
    assert not bench.calls()


@pytest.mark.parametrize(("kind", "prompts"), [("default", 20), ("quick", 5), ("full", 100), ("stress", 200)])
def test_each_kind_sends_as_many_prompts_as_the_readme_says(bench: Bench, kind: str, prompts: int) -> None:
    done = bench.run(kind)
    assert done.returncode == 0, done.stderr
    (call,) = bench.calls()
    assert call["args"][call["args"].index("--num-prompts") + 1] == str(prompts)
    assert call["args"][:2] == ["bench", "serve"]


def test_the_result_has_the_numbers_with_model_configuration_and_versions_beside_them(bench: Bench) -> None:
    done = bench.run("quick")
    assert done.returncode == 0, done.stderr
    result = bench.result()
    assert result["output_throughput"] == 192.25
    beside = result["llmwd"]
    assert beside["model"] == {"profile": "my-model", "name": "org/MyModel", "served_as": "mine"}
    assert beside["configuration"]["gpus"] == [2, 3]
    assert beside["configuration"]["NUM_GPUS"] == 2
    assert beside["configuration"]["serve_command"][-2:] == ["--tensor-parallel-size", "2"]
    assert beside["versions"]["vllm"] == "9.8.7"
    assert beside["versions"]["llmwd"]
    assert beside["ended_by"] is None
    (text,) = (bench.folder / "bench-results").glob("*Z-my-model-quick.txt")
    assert "the client's console" in text.read_text()
    assert "192.2" in done.stdout and "41 / 43" in done.stdout


def test_a_key_is_used_but_not_kept(bench: Bench) -> None:
    bench.run("quick")
    assert bench.calls()[0]["environ"]["OPENAI_API_KEY"] == "hush"
    for path in (bench.folder / "bench-results").iterdir():
        assert "hush" not in path.read_text()


def test_the_client_has_the_servers_environment_without_its_gpus(bench: Bench) -> None:
    bench.run("quick")
    environ = bench.calls()[0]["environ"]
    assert environ["HF_HOME"] == "/models"
    assert environ["CUDA_VISIBLE_DEVICES"] == ""


def test_a_sweep_raises_the_concurrency_and_keeps_one_file(bench: Bench) -> None:
    done = bench.run("sweep")
    assert done.returncode == 0, done.stderr
    runs = bench.result()["runs"]
    assert [run["max_concurrency"] for run in runs] == [1, 2, 4, 8, 16]
    assert all(run["num_prompts"] >= run["max_concurrency"] for run in runs)
    seeds = [call["args"][call["args"].index("--seed") + 1] for call in bench.calls()]
    assert len(set(seeds)) == 5, "the prefix cache would know the prompts"


def test_arguments_after_the_dashes_win_but_cannot_hide_the_result(bench: Bench) -> None:
    done = bench.run("quick", "--", "--num-prompts", "9", "--result-dir", "/nowhere")
    assert done.returncode == 0, done.stderr
    assert bench.result()["num_prompts"] == 9
    assert bench.result()["llmwd"]["configuration"]["client_args"][:2] == ["--num-prompts", "9"]


def _yield(bench: Bench) -> None:
    """The server is killed and llmwd says that job 77 has one of its GPUs."""
    gpu = {"index": 3, "minor": 3, "uuid": "GPU-3", "holder": "slurm", "job": "77"}
    bench.status({**bench.served, "phase": "waiting", "reason": "claimed", "lease": None, "server": None, "gpus": [gpu]})
    bench.server.send_signal(signal.SIGKILL)


def test_a_yield_in_the_middle_is_named_and_partial_results_are_kept(bench: Bench) -> None:
    bench.client_does("fail when the server ends")
    with bench.start("default") as process:
        wait_until(bench.calls, what="the client's start")
        _yield(bench)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "llmwd yielded to Slurm job 77 during the benchmark; partial results are in " in err
    assert bench.result()["failed"] == 17
    assert bench.result()["llmwd"]["ended_by"] == "llmwd yielded to Slurm job 77 during the benchmark"
    assert "192.2" in out


def test_a_client_that_goes_on_after_a_yield_is_ended(bench: Bench) -> None:
    bench.client_does("never end")
    with bench.start("quick") as process:
        (call,) = wait_until(bench.calls, what="the client's start")
        _yield(bench)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "llmwd yielded to Slurm job 77 during the benchmark; nothing was measured" in err
    assert not Path("/proc", str(call["pid"])).exists()


def test_a_client_that_fails_is_told_with_its_exit_code(bench: Bench) -> None:
    bench.client_does("exit 7")
    done = bench.run("quick")
    assert done.returncode == 1
    assert "vllm bench serve ended with exit code 7" in done.stderr


def test_an_unknown_kind_is_a_usage_error(bench: Bench) -> None:
    done = bench.run("fast")
    assert done.returncode == 2
    assert "./bench.sh [default|quick|full|stress|sweep]" in done.stderr


def test_help_has_examples() -> None:
    done = subprocess.run([CHECKOUT / "bench.sh", "--help"], capture_output=True, text=True, check=True, timeout=60)
    assert "./bench.sh full -- --random-input-len 1024" in done.stdout


def test_a_foreign_python_environment_is_not_in_its_way(tmp_path: Path) -> None:
    (tmp_path / "rich.py").write_text("raise SystemExit('the wrong rich')\n")
    foreign = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONHOME": "/nowhere"}
    done = subprocess.run([CHECKOUT / "bench.sh", "--help"], env=foreign, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_only_jobs_on_the_leases_gpus_are_blamed(bench: Bench) -> None:
    gpus = [
        {"index": 0, "uuid": "GPU-0", "holder": "slurm", "job": "5"},
        {"index": 2, "uuid": "GPU-2", "holder": "slurm", "job": "6"},
        {"index": 3, "uuid": "GPU-3", "holder": "free", "job": None},
    ]
    assert jobs_on((2, 3), {"gpus": gpus}) == ["6"]
    assert jobs_on(("GPU-0",), {"gpus": gpus}) == ["5"]
    assert jobs_on((1,), {"gpus": gpus}) == []


def test_why_it_ended_tells_an_operators_order_from_a_crash() -> None:
    served = Served("p", "m", "s", "http://x", 1, "/v", "n", (0,))
    assert why_it_ended({"phase": "held", "reason": "held"}, served) == "gave its GPUs back by the operator's order"
    assert why_it_ended({"phase": "failed", "reason": "crashed"}, served) == "lost its server (now failed, crashed)"
    assert why_it_ended(None, served) == "was stopped"


def test_why_it_ended_blames_no_operator_for_a_yield_that_took_too_long() -> None:
    served = Served("p", "m", "s", "http://x", 1, "/v", "n", (0,))
    broken = {"phase": "held", "reason": "budget_broken"}
    assert why_it_ended(broken, served) == "yielded (budget_broken)"
    assert why_it_ended({**broken, "gpus": [{"index": 0, "job": "5"}]}, served) == "yielded to Slurm job 5"


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["serve", "--api-key", "a", "b", "--port", "1"], ("serve", "--api-key", "***", "***", "--port", "1")),
        (["--api-key=a", "x"], ("--api-key=***", "x")),
    ],
)
def test_secrets_are_taken_out_of_arguments(argv: list[str], shown: tuple[str, ...]) -> None:
    assert mask_arguments(argv) == shown
