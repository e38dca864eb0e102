#!/usr/bin/env python3
"""How long a yield takes on a real Slurm node, watched from outside, and what llmwd costs while it idles.

    scripts/bench_yield.py                       20 yields with a server that exits at once on SIGTERM
    scripts/bench_yield.py --server vllm -n 20   with real vLLM (the embedded one) serving four streams
    scripts/bench_yield.py --idle 60             CPU and memory of all our processes over a minute, serving and idle

Needs root and slurm-wlm: it starts a one-node Slurm of its own. The clock starts when the job's cgroup folder appears
(inotify, in this process) and stops when the last process of the server's tree is gone (pidfds, in this process);
the parts in between are llmwd's own, from its journal. The socket of slurmstepd comes before the folder, so all of it
may be over before the folder is there: negative numbers mean that. As something to compare with, the same rounds time one bare
`scontrol show job`, which every yield has to wait for: the ratio says how far from that floor we are.
"""

import argparse
import contextlib
import http.client
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import own_python

own_python.ensure()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from inotify_simple import INotify, flags  # noqa: E402

from llmwd.adapters import procs  # noqa: E402
from tests.slurm.testbed import SlurmNode  # noqa: E402
from tests.tree.supervised import Supervised  # noqa: E402
from tests.waiting import wait_until  # noqa: E402

EMBEDDED = Path(
    os.environ.get("LLMWD_EMBEDDED_DIR")
    or Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "llmwd/embedded"
)
GPUS = 8
PARTS = ("resolved", "revoked", "signalled", "model gone", "gone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=20, help="yields (default 20)")
    parser.add_argument("--server", choices=("fake", "vllm"), default="fake")
    parser.add_argument("--streams", type=int, default=4, help="streams served while the job arrives (vllm only)")
    parser.add_argument("--detection", default="auto", help="sources that llmwd uses, e.g. cgroup2,gresused,procfs,sim")
    parser.add_argument("--idle", type=float, metavar="SECONDS", help="measure CPU and memory instead")
    parser.add_argument("--json", type=Path, help="write every round to this file as well")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, SlurmNode(Path(folder) / "s") as node:
        tree = supervised(node, Path(folder) / "l", asked)
        tree.start()
        try:
            tree.serving(within_s=300)
            if asked.idle:
                idle(tree, asked.idle)
                return
            rounds = [one_yield(node, tree, asked, number) for number in range(asked.n)]
        finally:
            tree.close()
    report(rounds, asked)
    if asked.json:
        asked.json.write_text(json.dumps(rounds, indent=1))


def supervised(node: SlurmNode, folder: Path, asked: argparse.Namespace) -> Supervised:
    settings = {"DETECTION": asked.detection, "SLURM_NODE": node.node, "SIM_GPUS": GPUS, "LEASE_TTL": 10, "RECONCILE": 15,
                "RESUME_AFTER": 0.5, "LOG_LEVEL": "info", "DOOR": "true"}
    tree = Supervised(folder, settings, environ=node.env, observed=False)  # it has its own
    if asked.server == "vllm":
        tree.write_settings(LLM_VENV=EMBEDDED / "venv", LLM_BIN=EMBEDDED / "venv/bin/vllm")
        tree.write_profile(
            "fake", MODEL_NAME=EMBEDDED / "smollm2-135m", NUM_GPUS=1,
            VLLM_ARGS="--served-model-name fake --max-model-len 2048 --enforce-eager",
        )
        with (tree.home / "models/fake.env").open("a") as file:
            file.write("export VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1\n")
    return tree


# --- one yield --------------------------------------------------------------------------------------------


def one_yield(node: SlurmNode, tree: Supervised, asked: argparse.Namespace, number: int) -> dict:
    """A job on all GPUs arrives, the tree goes, the job ends, the server comes back."""
    status = tree.serving(within_s=300)
    holder = _parents(status["server"]["pid"])[0]
    known = len(tree.journal("released"))
    clients = [Stream(tree) for _ in range(asked.streams if asked.server == "vllm" else 0)]
    for client in clients:
        wait_until(lambda client=client: client.tokens > 2, 60, what="a stream that flows")
    observer = Observer(node.scope, procs.descendants(holder))
    job = node.sbatch("exec sleep 600", f"--gres=gpu:{GPUS}")
    appeared_s, gone_s = observer.times(f"job_{job}")
    release = wait_until(lambda: tree.journal("released")[known:], 30)[0]
    bare = time.perf_counter()
    subprocess.run(["scontrol", "--local", "show", "job", str(job), "-d"], env={**os.environ, **node.env},
                   stdout=subprocess.DEVNULL, check=True)
    bare = time.perf_counter() - bare
    seen_s = release["seen_s"]
    found = {
        "total": gone_s - appeared_s, "scontrol": release["resolved_s"] - seen_s, "bare scontrol": bare,
        "event": seen_s - appeared_s, "resolved": release["resolved_s"] - appeared_s,
        "revoked": release["revoked_s"] - appeared_s, "signalled": release["signalled_s"] - appeared_s,
        "model gone": release["model_gone_s"] - appeared_s, "gone": release["gone_s"] - appeared_s,
        "killed": release["killed_s"] is not None,
        "clients": [client.outcome(appeared_s) for client in clients],
    }
    # llmwd often sees slurmstepd's socket before the folder is there: the path is counted from its first sign.
    found["path"] = gone_s - min(seen_s, appeared_s)
    found["own"] = found["path"] - found["scontrol"]
    node.scancel(job)
    print(f"  yield {number + 1:3}: {found['total'] * 1e3:8.1f} ms", *sorted({c["end"] for c in found["clients"]}),
          file=sys.stderr, flush=True)
    return found


def _parents(pid: int) -> list[int]:
    found = procs.stat(pid)
    return [found.ppid]


class Observer(threading.Thread):
    """Notes when folders appear in the scope and when the given processes end, in a thread that does nothing else."""

    def __init__(self, scope: Path, pids: list[int]):
        super().__init__(daemon=True)
        self._watch = INotify()
        self._watch.add_watch(str(scope), flags.CREATE)
        self._pidfds = [os.pidfd_open(pid) for pid in pids]
        self._appeared: dict[str, float] = {}
        self._gone_s = 0.0
        self.start()

    def run(self) -> None:
        poller = select.poll()
        left = set(self._pidfds)
        for fd in (self._watch.fileno(), *left):
            poller.register(fd, select.POLLIN)
        # A socket of slurmstepd comes before the folder, so the tree may be gone before the folder is there.
        while left or not any(name.startswith("job_") for name in self._appeared):
            ready = poller.poll(120_000)
            now_s = time.monotonic()
            for fd, _ in ready:
                if fd in left:
                    poller.unregister(fd)
                    left.discard(fd)
                    self._gone_s = now_s
                else:
                    self._appeared |= {event.name: now_s for event in self._watch.read(timeout=0)}

    def times(self, folder: str) -> tuple[float, float]:
        """Monotonic times at which the folder appeared and the last process ended."""
        self.join(timeout=120)
        if self.is_alive():
            raise SystemExit("the server's tree did not end")
        for fd in self._pidfds:
            os.close(fd)
        self._watch.close()
        return self._appeared[folder], self._gone_s


class Stream(threading.Thread):
    """A client that reads one long streamed answer, and remembers how it ended."""

    def __init__(self, tree: Supervised):
        super().__init__(daemon=True)
        self.port, self.tokens, self.end, self.end_s = tree.port, 0, "none", 0.0
        self.headers = {"Content-Type": "application/json", **tree.authorized()}
        self.start()

    def run(self) -> None:
        last = ""
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            body = {"model": "fake", "stream": True, "max_tokens": 1500, "ignore_eos": True, "temperature": 0,
                    "messages": [{"role": "user", "content": "Tell me a very long story about a mountain."}]}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), self.headers)
            for line in connection.getresponse():
                text = line.decode().strip()
                if text:
                    last, before = text, last
                    self.tokens += 1
            self.end = _ending(before, last)
        except (OSError, http.client.HTTPException) as error:
            self.end = f"cut ({type(error).__name__})"
        self.end_s = time.monotonic()

    def outcome(self, appeared_s: float) -> dict:
        self.join(timeout=60)
        return {"end": self.end, "after": self.end_s - appeared_s, "tokens": self.tokens}


def _ending(before: str, last: str) -> str:
    if "[DONE]" not in last:
        return "cut"
    if '"error"' in before:
        return "error event, [DONE]"
    return "abort, [DONE]" if '"abort"' in before else "[DONE]"


def report(rounds: list[dict], asked: argparse.Namespace) -> None:
    print(f"\n{len(rounds)} yields, {asked.server} server, milliseconds from the job's cgroup folder:")
    print(f"{'':32}{'min':>9}{'median':>9}{'p99':>9}")
    rows = [("gone, seen from outside", "total"), ("  llmwd's event", "event")]
    rows += [(f"  {part}", part) for part in PARTS]
    rows += [("whole path, from the first sign", "path"), ("  own part (without scontrol)", "own")]
    rows += [("  scontrol, as llmwd waited", "scontrol"), ("scontrol, bare", "bare scontrol")]
    for title, name in rows:
        values = sorted(entry[name] * 1e3 for entry in rounds)
        print(f"{title:32}{values[0]:9.1f}{_quantile(values, 0.5):9.1f}{_quantile(values, 0.99):9.1f}")
    ratio = sorted(entry["path"] / entry["bare scontrol"] for entry in rounds)
    print(f"{'whole path / bare scontrol':32}{ratio[0]:9.2f}{_quantile(ratio, 0.5):9.2f}{_quantile(ratio, 0.99):9.2f}")
    print(f"SIGKILL was needed in {sum(entry['killed'] for entry in rounds)} of {len(rounds)}")
    ends: dict[str, list[float]] = {}
    for entry in rounds:
        for client in entry["clients"]:
            ends.setdefault(client["end"], []).append(client["after"] * 1e3)
    for end, after in sorted(ends.items()):
        print(f"clients: {len(after):3} streams ended with {end!r}, median {_quantile(sorted(after), 0.5):.0f} ms")


def _quantile(values: list[float], part: float) -> float:
    return values[min(len(values) - 1, round(part * (len(values) - 1)))]


# --- idling -----------------------------------------------------------------------------------------------


def idle(tree: Supervised, seconds: float) -> None:
    """CPU (children that ended included) and PSS of the root, the workers, the holders and the front door's Caddy,
    without the server."""
    wait_until(lambda: tree.look().facts.door.phase == "ready", 30, what="the front door")
    status, caddy = tree.status(), tree.look().facts.door.pid
    server = status["server"]["pid"]
    ours = [status["root"]["pid"], *(worker["pid"] for worker in status["workers"]), *_parents(server), *_parents(caddy), caddy]
    before, began_s = {pid: _cpu_s(pid) for pid in ours}, time.monotonic()
    threading.Event().wait(seconds)
    took_s = time.monotonic() - began_s
    names = {pid: procs.cmdline(pid).split(b"\0")[0].decode() for pid in ours}
    total_cpu = total_pss = 0.0
    print(f"\nidle for {took_s:.0f} s, serving; per process: part of one core, PSS")
    for pid in ours:
        cpu, pss = (_cpu_s(pid) - before[pid]) / took_s, _pss_mib(pid)
        total_cpu, total_pss = total_cpu + cpu, total_pss + pss
        print(f"  {names[pid]:24}{cpu * 100:8.3f} %{pss:8.1f} MiB")
    print(f"  {'all together':24}{total_cpu * 100:8.3f} %{total_pss:8.1f} MiB")
    bare = subprocess.Popen([sys.executable, "-c", "import zmq, msgspec, time; time.sleep(9)"])
    with contextlib.suppress(subprocess.TimeoutExpired):
        bare.wait(2)
    one = _pss_mib(bare.pid)
    bare.kill()
    bare.wait()
    print(f"  one bare Python with zmq and msgspec: {one:.1f} MiB; ours are {total_pss / one:.2f} of it for {len(ours)} processes")


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def _pss_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


if __name__ == "__main__":
    main()
