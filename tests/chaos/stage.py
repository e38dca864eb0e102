"""The stage of the chaos: a whole llmwd with stand-ins for everything outside, and a hand on all of its parts."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import time
from pathlib import Path

from llmwd.adapters.rundir import write_atomic
from tests.chaos.disk import Disk
from tests.chaos.driver import Faults
from tests.chaos.plan import GPUS
from tests.fakes import cloudflared
from tests.fakes.ntfy import NtfyServer
from tests.fakes.wallclock import WallClock
from tests.observer.judge import Bounds
from tests.observer.sight import Process, Sight
from tests.observer.watch import Observer
from tests.tree.supervised import MARK, Supervised

TTL_S, GRACE_S, RESOLVE_S = 4.0, 0.5, 0.5
TUNNEL_ID = "6ff42ae2-765d-4adf-8112-31c55c1551ef"
PROFILES = {
    "fake": {"FAKE_READY_AFTER": 0.2},
    "slow": {"FAKE_READY_AFTER": 2, "FAKE_SWALLOW_TERM_WHILE_LOADING": 1, "FAKE_ENGINE": 1},
    "stubborn": {"FAKE_IGNORE_TERM": 1, "FAKE_ENGINE": 1, "FAKE_FORK_GRANDCHILD": 1, "FAKE_CHILDREN": 11},
    "hang": {"FAKE_HANG_ON_TERM": 1, "FAKE_ENGINE": 1, "FAKE_TRACKER": 1},
    "refork": {"FAKE_REFORK_ON_TERM": 20, "FAKE_FORK_GRANDCHILD": 1},
    "exits": {"FAKE_EXIT_AFTER": 0.3, "FAKE_EXIT_CODE": 1},
    "silent": {"FAKE_SILENT_AFTER": 2, "FAKE_ENGINE": 1},
    # Its phases are long enough to be met.
    "lasting": {"FAKE_READY_AFTER": 1.5, "FAKE_IGNORE_TERM": 1, "FAKE_ENGINE": 1, "FAKE_FORK_GRANDCHILD": 1},
}
LASTING = "lasting"


class Stage:
    """Start it, then act on it; close() ends all and leaves nothing. driver: its GPUs are those of the stand-in driver."""

    def __init__(self, folder: Path, driver: bool = False):
        self.folder = folder
        self.faults = Faults(folder / "driver") if driver else None
        self.disk, self.node_disk = Disk(folder / "disk"), Disk(folder / "node", mib=4)
        self.jobs_folder = folder / "jobs"
        self.jobs_folder.mkdir()
        self.clock = WallClock(folder)
        self.ntfy = NtfyServer()
        self.ntfy.__enter__()
        (folder / "tunnel").mkdir()
        credentials = folder / "tunnel" / "credentials.json"
        credentials.write_text(json.dumps({"AccountTag": "a", "TunnelSecret": "c2VjcmV0" * 6, "TunnelID": TUNNEL_ID}))
        credentials.chmod(0o600)
        settings = {
            "SIM_GPUS": GPUS, "SIM_DIR": self.jobs_folder, "LEASE_TTL": TTL_S, "YIELD_GRACE": GRACE_S,
            "RESOLVE_DEADLINE": RESOLVE_S, "RESUME_AFTER": 0.3, "RESTART_INTENSITY": 8, "RESTART_PERIOD": 15,
            "BACKOFF_MIN": 0.1, "BACKOFF_MAX": 1, "PROBE_INTERVAL": 1, "START_TIMEOUT": 15, "LOG_LEVEL": "info",
            "LOG_MAX_MB": 1, "LOG_KEEP": 1, "NTFY_TOPIC": "chaos", "NTFY_SERVER": self.ntfy.url,
            "TUNNEL_HOSTNAME": "llm.example.org", "TUNNEL_ID": TUNNEL_ID, "CLOUDFLARED_CREDS": credentials,
            "CLOUDFLARED_BIN": cloudflared.wrapper(folder / "tunnel"), "DOOR": "true",
        }  # fmt: skip
        environ, contexts = self.clock.environ, {}
        if self.faults is not None:
            settings |= {"SIM_GPUS": 0, "DETECTION": "sim,nvml"}
            environ, contexts = environ | self.faults.environ(), {"FAKE_CONTEXTS": self.faults.contexts}
        self.tree = Supervised(folder / "tree", settings, PROFILES["fake"] | contexts, environ, observed=False)
        for name, flags in PROFILES.items():
            self.tree.write_profile(name, **flags, **contexts)
        self.tree.state = self.disk.folder / "state"
        self.tree.runtime = self.node_disk.folder / "run"
        self.tree.env |= {"LLMWD_STATE_DIR": str(self.tree.state), "LLMWD_RUNTIME_DIR": str(self.tree.runtime)}
        self.sight = Sight(f"{MARK}={self.tree.mark}", str(self.tree.runtime), self.jobs_folder)
        self.bounds = Bounds(TTL_S, GRACE_S, RESOLVE_S)
        mark = f"{MARK}={self.tree.mark}"
        world = self.faults.driver.world if self.faults is not None else None
        self.observer = Observer(mark, self.tree.runtime, self.jobs_folder, folder / "observer.jsonl", self.bounds, world=world).ready()
        self.job_number = 0
        self.stopped: dict[tuple[int, int], float | None] = {}  # -> when it goes on (monotonic)
        self.spoilt: dict[Path, bytes] = {}  # -> what it held

    def begin(self) -> None:
        """Start it, up to the moment when all of it works, its way to the outside included."""
        self.tree.start()
        self.tree.all_ready(60)
        self.tree.until(lambda status: status["tunnel"]["phase"] == "ready", 60, "a tunnel that is connected")

    # --- what the operator does to its files

    def spoil(self, how: str) -> Path | None:
        """Make the settings, or the active profile, invalid; the file, None if it is so already."""
        home = self.tree.home
        path = home / "etc/config.env" if how == "settings" else (home / "active-model.env").resolve()
        if path in self.spoilt or not path.is_file():
            return None
        self.spoilt[path] = path.read_bytes()
        if how == "no profile":
            path.unlink()
        else:
            write_atomic(path, self.spoilt[path] + b"NUM_GPUS=many\n")
        return path

    def mend(self, path: Path) -> None:
        write_atomic(path, self.spoilt.pop(path))

    # --- who is there

    def roles(self) -> dict[str, list[Process]]:
        """The living processes of it by role; the server's are its whole tree, parents first."""
        found: dict[str, list[Process]] = {}
        for each in sorted(self.sight.look().processes.values(), key=lambda each: (each.start, each.pid)):
            found.setdefault(each.role, []).append(each)
        return found

    def send(self, process: Process, number: int) -> None:
        """Signal exactly this process."""
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(process.pid)
            try:
                if any(each.start == process.start for each in self.sight.look().processes.values() if each.pid == process.pid):
                    signal.pidfd_send_signal(fd, number)
            finally:
                os.close(fd)

    def pick(self, targets: str, dice: random.Random) -> list[Process]:
        roles = self.roles()
        return [dice.choice(roles[name]) if name == "server" else roles[name][0] for name in targets.split() if name in roles]

    # --- jobs

    def job(self, gpus: str) -> str:
        self.job_number += 1
        draft = self.jobs_folder / f".{self.job_number}"
        draft.write_text(f"{gpus}\n")
        self.observer.tell("job", gpus=gpus)
        draft.rename(self.jobs_folder / f"job_{self.job_number}")
        return str(self.job_number)

    def jobs(self) -> list[Path]:
        return sorted(self.jobs_folder.glob("job_*"))

    # --- faults

    def stop(self, processes: list[Process], cont_s: float | None) -> None:
        for process in processes:
            self.send(process, signal.SIGSTOP)
            self.stopped[process.pid, process.start] = None if cont_s is None else time.monotonic() + cont_s

    def let_go_on(self, everything: bool = False) -> None:
        """SIGCONT to what is due."""
        now_s, alive = time.monotonic(), self.sight.look().processes
        for key, when_s in list(self.stopped.items()):
            if key not in alive:
                del self.stopped[key]
            elif everything or (when_s is not None and when_s <= now_s):
                self.send(alive[key], signal.SIGCONT)
                del self.stopped[key]

    def starve(self, process: Process, of: str) -> tuple[int, tuple[int, int]] | None:
        """No new file, or no more memory, for a living process. (which limit, what it was); None: it is gone."""
        kind = resource.RLIMIT_NOFILE if of == "files" else resource.RLIMIT_AS
        try:
            before = resource.prlimit(process.pid, kind)
            if of == "files":
                most = max(int(name) for name in os.listdir(f"/proc/{process.pid}/fd")) + 1
            else:
                most = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.prlimit(process.pid, kind, (most, before[1]))
        except (ProcessLookupError, FileNotFoundError, ValueError):
            return None
        return kind, before

    def feed(self, process: Process, kind: int, before: tuple[int, int]) -> None:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(process.pid, kind, before)

    def throw(self, data: bytes) -> int:
        """Bytes and half-true words at every socket; how many there were."""
        paths = [path for path in self.tree.runtime.glob("*") if path.is_socket()]
        for path in paths:
            kind = socket.SOCK_SEQPACKET if path.name.startswith("holder") else socket.SOCK_STREAM
            for words in (data, b'{"type":"renew","expires_s":1}' + data[:5], b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48) + data):
                with socket.socket(socket.AF_UNIX, kind) as sock, contextlib.suppress(OSError):
                    sock.settimeout(0.2)
                    sock.connect(str(path))
                    sock.send(words)
        return len(paths)

    def heal_disks(self) -> None:
        self.disk.heal()
        self.node_disk.heal()

    def lose_runtime(self) -> None:
        shutil.rmtree(self.tree.runtime, ignore_errors=True)

    # --- its life

    def root_dead(self) -> bool:
        return self.tree.process is None or self.tree.process.poll() is not None

    def close(self) -> None:
        try:
            self.let_go_on(everything=True)
            self.heal_disks()
            self.tree.close()
        finally:
            self.observer.close()
            self.ntfy.__exit__(None, None, None)
            if self.faults is not None:
                self.faults.close()
            self.disk.close()
            self.node_disk.close()
