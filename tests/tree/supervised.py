"""A whole llmwd for a test: its own folders, a free port, the stand-in server as vLLM, the real programs.

The observer watches it from before its start until nothing of it is left, and judges it by the guarantees.
"""

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import msgspec

from llmwd.adapters import procs
from llmwd.adapters.rundir import Dirs, write_atomic
from llmwd.ctl.place import Look, look
from llmwd.messages import ServerFact
from tests.observer.judge import Bounds
from tests.observer.watch import Observer
from tests.ports import free_port
from tests.tree import bugs
from tests.waiting import wait_until

CHECKOUT = Path(__file__).resolve().parents[2]
FAKE_SERVER = CHECKOUT / "tests" / "fakes" / "server.py"
MARK = "LLMWD_TEST"  # in the environment of everything a test starts
OBSERVED_EVERY_S = 0.04  # a look costs about a millisecond
WORKERS = ("notifier", "detector", "resolver", "vllm", "door", "tunnel")


def pids_in(status: dict) -> dict[str, int]:
    """Of the workers, the server and the root."""
    found = {worker["name"]: worker["pid"] for worker in status["workers"]}
    return found | {"server": status["server"]["pid"], "root": status["root"]["pid"]}


class Supervised:
    """Start it with start(), ask it with status(), order it with ctl(); close() ends it, checks that nothing is left, and
    that the observer saw no guarantee broken.

    settings: lines of etc/config.env over the defaults here; profile: lines of models/fake.env likewise; scope: where
    the real jobs beside it have their cgroups; observed: False where the test has an observer of its own.
    """

    def __init__(self, folder: Path, settings: dict[str, object] | None = None, profile: dict[str, object] | None = None,
                 environ: dict[str, str] | None = None, scope: Path | None = None, observed: bool = True):
        self.home, self.runtime, self.state = folder / "home", folder / "run", folder / "state"
        self.errors = folder / "errors"  # what it writes to standard error
        self.port = free_port()
        self.mark = uuid.uuid4().hex
        self.settings = {
            "SIM_GPUS": 8, "DETECTION": "sim", "RESUME_AFTER": 0.5, "LEASE_TTL": 6, "LLM_BIN": FAKE_SERVER,
            "SERVER_PORT": self.port, "BACKOFF_MIN": 0.2, "DOOR": "false", "LOG_LEVEL": "debug", **(settings or {}),
        }
        self.scope, self.observed = scope, observed
        self.observer: Observer | None = None
        self.process: subprocess.Popen | None = None
        self.within: tuple[str, ...] = ()  # a program that becomes the supervisor in the end, such as unshare
        (self.home / "etc" / "nodes").mkdir(parents=True)
        (self.home / "models").mkdir()
        self.write_settings()
        self.write_profile("fake", **(profile or {}))
        self.activate("fake")
        self.env = {
            "PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8", MARK: self.mark,
            "SPT_NOENV": "1",  # or setproctitle would overwrite the mark
            "LLMWD_HOME": str(self.home), "LLMWD_RUNTIME_DIR": str(self.runtime), "LLMWD_STATE_DIR": str(self.state),
            **(environ or {}),
        }

    # --- its files ------------------------------------------------------------------------------------

    def write_settings(self, **changes: object) -> None:
        self.settings |= changes
        lines = [f'export {MARK}="{self.mark}"'] + [f'{name}="{value}"' for name, value in self.settings.items()]
        write_atomic(self.home / "etc" / "config.env", ("\n".join(lines) + "\n").encode())

    def write_profile(self, name: str, **lines: object) -> None:
        """VLLM_ARGS etc. as given; names that begin with FAKE_ or are lower case are exported to the server."""
        values = {"MODEL_NAME": name, "VLLM_ARGS": f"--served-model-name {name}", "NUM_GPUS": 2, **lines}
        text = [f"{'export ' if key.startswith('FAKE_') else ''}{key}='{value}'" for key, value in values.items()]
        write_atomic(self.home / "models" / f"{name}.env", ("\n".join(text) + "\n").encode())

    def activate(self, name: str) -> None:
        link = self.home / "active-model.env"
        link.unlink(missing_ok=True)
        link.symlink_to(f"models/{name}.env")

    # --- its life -------------------------------------------------------------------------------------

    def start(self) -> "Supervised":
        if self.observed and self.observer is None:
            self.observe()
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(
                [*self.within, sys.executable, "-m", "llmwd.supervisor"], env=self.env, cwd=CHECKOUT, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,
            )
        return self

    def serving(self, within_s: float = 30) -> dict:
        return self.phase("serving", within_s)

    def serving_on(self, *gpus: int) -> dict:
        """Serving with a lease of exactly these GPUs. (For a moment a revoked lease is gone, and the server is not.)"""
        return self.until(
            lambda status: status["phase"] == "serving" and status["lease"] and status["lease"]["gpus"] == list(gpus),
            what=f"serving on {gpus}",
        )

    def phase(self, phase: str, within_s: float = 30) -> dict:
        return self.until(lambda status: status["phase"] == phase, within_s, f"phase {phase}")

    def until(self, condition: Callable[[dict], object], within_s: float = 30, what: str = "the awaited status") -> dict:
        """The first status that fulfils the condition."""
        last: dict = {}

        def there() -> dict | None:
            nonlocal last
            last = self.status()
            return last if condition(last) else None

        try:
            return wait_until(there, within_s, what=what)
        except AssertionError as error:
            raise AssertionError(f"{error}\nstatus: {last}\n{self.errors.read_text()[-4000:]}") from None

    def all_ready(self, within_s: float = 30) -> dict:
        """Serving, and every worker works."""
        return self.until(
            lambda status: status["phase"] == "serving" and all(each["phase"] == "ready" for each in status["workers"]),
            within_s, "serving with all workers ready",
        )

    def stop(self, within_s: float = 60) -> int:
        self.tell("happened")
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(within_s)

    def observe(self) -> None:
        """Begin to watch it; start() does, a test that starts it by another way says so itself."""
        bounds = Bounds(*(float(self.settings.get(name, 1.0)) for name in ("LEASE_TTL", "YIELD_GRACE", "RESOLVE_DEADLINE")))
        jobs = Path(self.settings.get("SIM_DIR", self.runtime / "sim"))
        seen = self.errors.with_name("observer.jsonl")
        world = Path(self.env["LLMWD_FAKE_NVML"]) if "LLMWD_FAKE_NVML" in self.env else None
        self.observer = Observer(f"{MARK}={self.mark}", self.runtime, jobs, seen, bounds, self.scope, OBSERVED_EVERY_S, world)

    def tell(self, event: str, **words: object) -> None:
        """What the test does to it, for the observer (Judge.told)."""
        if self.observer is not None:
            self.observer.tell(event, **words)

    def judge(self) -> dict:
        """The observer's verdict and summary; it watches no more."""
        observer, self.observer = self.observer, None
        try:
            code, summary = observer.end()
        finally:
            observer.close()
        assert code == 0 and summary["violations"] == [], summary
        return summary

    def close(self) -> None:
        """End it however it stands, check that no process is left (what is all the same, is killed), and judge it and its log."""
        for pid, _ in self.left():
            self.signal_pid(pid, signal.SIGCONT)
        try:
            if self.process is not None and self.process.poll() is None:
                self.stop()
            wait_until(lambda: not self.left(), 30, what=f"the end of {self.left()}")
            if self.observer is not None:
                self.judge()
            assert not (found := bugs.in_files(self.errors)), found
        finally:
            for pid, _ in self.left():
                self.signal_pid(pid, signal.SIGKILL)
            if self.observer is not None:
                self.observer.close()

    def signal_pid(self, pid: int, number: int) -> None:
        """Signal one of its processes; one that has just ended is no mistake of the test."""
        start = procs.start_ticks(pid)
        self.tell("fault", name=f"signal {number}")
        if start is not None:
            procs.signal_process(pid, start, number)

    def signal(self, names: str, number: int) -> None:
        """Signal some of it at once: names of workers, `root`, `holder`, `server`, in this order."""
        status, fact = self.status(), self.server_fact()
        pids = {worker["name"]: worker["pid"] for worker in status["workers"]}
        pids |= {"root": status["root"]["pid"], "server": fact and fact.pid, "holder": fact and fact.holder_pid}
        for name in names.split():
            self.signal_pid(pids[name], number)

    def pids(self) -> dict[str, int]:
        """Of the workers, the server and the root."""
        return pids_in(self.status())

    def left(self) -> list[tuple[int, bytes]]:
        """Living processes that carry this test's mark, wherever they have gone; cloudflared gets no mark, but our folder."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                environ = (entry / "environ").read_bytes()
            except OSError:
                continue
            pid = int(entry.name)
            if f"{MARK}={self.mark}".encode() in environ or os.fsencode(self.runtime) in procs.cmdline(pid):
                state = procs.stat(pid)
                if state is not None and state.state not in "ZX":
                    found.append((pid, procs.cmdline(pid)))
        return found

    # --- asking and ordering --------------------------------------------------------------------------

    def ctl(self, *words: str, within_s: float = 30) -> subprocess.CompletedProcess:
        self.tell("unheld" if words[:1] == ("resume",) else "happened")
        done = subprocess.run(
            [sys.executable, "-m", "llmwd.ctl.main", *words], env=self.env, cwd=CHECKOUT, capture_output=True,
            text=True, timeout=within_s, stdin=subprocess.DEVNULL,
        )
        if words[:1] == ("yield",) and "--for" not in words and done.returncode == 0:
            self.tell("held")
        return done

    def look(self) -> Look:
        return look(Dirs(self.home, self.runtime, self.state))

    def status(self) -> dict:
        """What `llmwd-ctl status --json` prints, by the same code, but without starting a program for it."""
        return msgspec.json.decode(msgspec.json.encode(self.look().status))

    def server_fact(self) -> ServerFact | None:
        return self.look().facts.server

    def worker(self, name: str) -> dict:
        return next(worker for worker in self.status()["workers"] if worker["name"] == name)

    def answers(self, model: str = "fake") -> bool:
        """Whether the served model answers a real request."""
        body = json.dumps({"model": model, "prompt": "a", "max_tokens": 1})
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json", **self.authorized()})
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def authorized(self) -> dict[str, str]:
        """The header with the key that llmwd made."""
        return {"Authorization": f"Bearer {(self.state / 'api-key').read_text().strip()}"}

    def journal(self, event: str | None = None) -> list[dict]:
        """Its lines about this, or all."""
        path = self.state / "journal.jsonl"
        text = path.read_text() if path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()  # one over two pages may be half there for a moment
        lines = [line for line in lines if line]  # and who writes then takes it for torn: an empty one, as every reader of ours allows
        return [entry for entry in map(json.loads, lines) if event in (None, entry["event"])]

    def released_for(self, job: int) -> dict:
        """The release that this job caused; slurmctld's reading of the node may come before any sign of the job itself."""
        def there() -> dict | None:
            return next((entry for entry in self.journal("released") if entry.get("job", "") in (str(job), None)), None)

        try:
            return wait_until(there, 30, what=f"the release for job {job}")
        except AssertionError as error:
            told = "\n".join((self.state / "journal.jsonl").read_text().splitlines()[-12:])
            raise AssertionError(f"{error}\n{told}\nstatus: {self.status()}") from None

    def log(self, name: str) -> str:
        path = self.state / "logs" / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def job(self, id: int, gpus: str) -> None:
        """A simulated job: appears whole, by a rename."""
        draft = self.runtime / "sim" / f".{id}"
        draft.write_text(f"{gpus}\n")
        self.tell("job", gpus=gpus)
        draft.rename(self.runtime / "sim" / f"job_{id}")

    def job_over(self, id: int) -> None:
        (self.runtime / "sim" / f"job_{id}").unlink()

    def forget(self) -> None:
        shutil.rmtree(self.runtime, ignore_errors=True)
