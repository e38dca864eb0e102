"""A whole llmwd for a test: its own folders, a free port, the stand-in server as vLLM, the real programs."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

from llmwd.adapters import procs
from tests.waiting import wait_until

CHECKOUT = Path(__file__).resolve().parents[2]
FAKE_SERVER = CHECKOUT / "tests" / "fakes" / "server.py"
MARK = "LLMWD_TEST"  # in the environment of everything a test starts


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


class Supervised:
    """Start it with start(), ask it with status(), order it with ctl(); close() ends it and checks that nothing is left.

    settings: lines of etc/config.env over the defaults here; profile: lines of models/fake.env likewise.
    """

    def __init__(self, folder: Path, settings: dict[str, object] | None = None, profile: dict[str, object] | None = None,
                 environ: dict[str, str] | None = None):
        self.home, self.runtime, self.state = folder / "home", folder / "run", folder / "state"
        self.port = free_port()
        self.mark = uuid.uuid4().hex
        self.settings = {
            "SIM_GPUS": 8, "DETECTION": "sim", "RESUME_AFTER": 0.5, "LEASE_TTL": 6, "LLM_BIN": FAKE_SERVER,
            "SERVER_PORT": self.port, "BACKOFF_MIN": 0.2, "LOG_LEVEL": "debug", **(settings or {}),
        }
        self.process: subprocess.Popen | None = None
        (self.home / "etc" / "nodes").mkdir(parents=True)
        (self.home / "models").mkdir()
        self.write_settings()
        self.write_profile("fake", **(profile or {}))
        self.activate("fake")
        self.env = {
            "PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8", MARK: self.mark,
            "LLMWD_HOME": str(self.home), "LLMWD_RUNTIME_DIR": str(self.runtime), "LLMWD_STATE_DIR": str(self.state),
            **(environ or {}),
        }

    # --- its files ------------------------------------------------------------------------------------

    def write_settings(self, **changes: object) -> None:
        self.settings |= changes
        lines = [f'export {MARK}="{self.mark}"'] + [f'{name}="{value}"' for name, value in self.settings.items()]
        (self.home / "etc" / "config.env").write_text("\n".join(lines) + "\n")

    def write_profile(self, name: str, **lines: object) -> None:
        """VLLM_ARGS etc. as given; names that begin with FAKE_ or are lower case are exported to the server."""
        values = {"MODEL_NAME": name, "VLLM_ARGS": f"--served-model-name {name}", "NUM_GPUS": 2, **lines}
        text = [f"{'export ' if key.startswith('FAKE_') else ''}{key}='{value}'" for key, value in values.items()]
        (self.home / "models" / f"{name}.env").write_text("\n".join(text) + "\n")

    def activate(self, name: str) -> None:
        link = self.home / "active-model.env"
        link.unlink(missing_ok=True)
        link.symlink_to(f"models/{name}.env")

    # --- its life -------------------------------------------------------------------------------------

    def start(self) -> "Supervised":
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llmwd.supervisor"], env=self.env, cwd=CHECKOUT, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )
        return self

    def serving(self, within_s: float = 30) -> dict:
        return self.phase("serving", within_s)

    def phase(self, phase: str, within_s: float = 30) -> dict:
        def there() -> dict | None:
            found = self.status()
            return found if found["phase"] == phase else None

        return wait_until(there, within_s, every_s=0.02, what=f"phase {phase} (status: {self.status()})")

    def stop(self, within_s: float = 30) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(within_s)

    def close(self) -> None:
        """End it however it stands, and check that no process of it is left."""
        if self.process is not None and self.process.poll() is None:
            self.stop()
        wait_until(lambda: not self.left(), 15, what=f"the end of {self.left()}")

    def left(self) -> list[tuple[int, bytes]]:
        """Living processes that carry this test's mark, wherever they have gone."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                environ = (entry / "environ").read_bytes()
            except OSError:
                continue
            if f"{MARK}={self.mark}".encode() in environ:
                pid = int(entry.name)
                state = procs.stat(pid)
                if state is not None and state.state not in "ZX":
                    found.append((pid, procs.cmdline(pid)))
        return found

    # --- asking and ordering --------------------------------------------------------------------------

    def ctl(self, *words: str, within_s: float = 30) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "llmwd.ctl.main", *words], env=self.env, cwd=CHECKOUT, capture_output=True,
            text=True, timeout=within_s, stdin=subprocess.DEVNULL,
        )

    def status(self) -> dict:
        return json.loads(self.ctl("status", "--json").stdout)

    def worker(self, name: str) -> dict:
        return next(worker for worker in self.status()["workers"] if worker["name"] == name)

    def journal(self, event: str) -> list[dict]:
        path = self.state / "journal.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [entry for entry in map(json.loads, lines) if entry["event"] == event]

    def log(self, name: str) -> str:
        path = self.state / "logs" / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def job(self, id: int, gpus: str) -> None:
        """A simulated job: appears whole, by a rename."""
        draft = self.runtime / "sim" / f".{id}"
        draft.write_text(f"{gpus}\n")
        draft.rename(self.runtime / "sim" / f"job_{id}")

    def job_over(self, id: int) -> None:
        (self.runtime / "sim" / f"job_{id}").unlink()

    def forget(self) -> None:
        shutil.rmtree(self.runtime, ignore_errors=True)
