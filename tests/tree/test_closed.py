"""Nobody gets in: what other users of the node can reach, what they may have planted, and where secrets go."""

import base64
import http.client
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from llmwd.adapters import procs
from llmwd.adapters.bus import bus_endpoint
from tests.fakes.cloudflared import wrapper
from tests.fakes.ntfy import NtfyServer
from tests.tree.conftest import Start
from tests.tree.supervised import CHECKOUT, WORKERS, Supervised, free_port
from tests.tree.test_starting import run_supervisor
from tests.waiting import wait_until

STRANGER = 54321  # a uid that nobody has
TUNNEL = "6ff42ae2-765d-4adf-8112-31c55c1551ef"


def credentials(folder: Path, secret: str) -> dict[str, object]:
    """The settings of a tunnel whose credentials file is made here."""
    path = folder / "credentials.json"
    path.touch(0o600)
    path.write_text(json.dumps({"AccountTag": "a", "TunnelSecret": secret, "TunnelID": TUNNEL}))
    return {"TUNNEL_HOSTNAME": "llm.example.org", "TUNNEL_ID": TUNNEL, "CLOUDFLARED_CREDS": path}


# --- other users ----------------------------------------------------------------------------------------


def as_stranger(attempts: list[Callable[[], object]]) -> list[int]:
    """Which of the attempts succeed for another user of this node. Only root can become one."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        worked = []
        os.setgroups([])
        os.setgid(STRANGER)
        os.setuid(STRANGER)
        for number, attempt in enumerate(attempts):
            try:
                attempt()
                worked.append(number)
            except OSError:
                pass
        os.write(writer, json.dumps(worked).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        told = file.read()
    os.waitpid(pid, 0)
    return json.loads(told)


def connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as trial:
        trial.connect(str(path))


@pytest.fixture
def busy(open_folder: Path) -> Iterator[Supervised]:
    """An llmwd in full work that has made every file it makes: served, yielded, told people, had a tunnel."""
    with NtfyServer() as ntfy:
        yield from at_work(open_folder, {"NTFY_SERVER": ntfy.url, "NTFY_TOPIC": "t"})


def at_work(folder: Path, settings: dict[str, object]) -> Iterator[Supervised]:
    settings |= credentials(folder, "s" * 44) | {"CLOUDFLARED_BIN": wrapper(folder), "DOOR": "true", "DOOR_PORT": free_port()}
    tree = Supervised(folder, settings)
    before = os.umask(0)  # the most careless operator
    try:
        tree.start()
    finally:
        os.umask(before)
    try:
        tree.all_ready()
        assert tree.ctl("key", "add", "alice").returncode == 0
        tree.job(1, "0-7")
        tree.phase("waiting")
        assert tree.ctl("yield", "--for", "1s").returncode == 0
        tree.job_over(1)
        tree.all_ready()
        yield tree
    finally:
        tree.close()


def test_without_a_door_the_models_key_is_in_no_file_of_the_doors(supervised: Start) -> None:
    tree = supervised()  # DOOR=false
    tree.serving()
    tree.all_ready()
    key = (tree.state / "api-key").read_text().strip()
    texts = {path: text_of(path) for path in tree.runtime.rglob("*") if path.is_file()}
    assert any(texts.values()) and [path for path, text in texts.items() if key in text] == []


def text_of(path: Path) -> str:
    """"" of what is gone by now: a worker's draft of a fact, renamed since."""
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def open_to_others(path: Path) -> bool:
    try:
        found = path.lstat()
    except FileNotFoundError:  # a database's journal, deleted since
        return False
    return bool(found.st_mode & 0o077) and not stat.S_ISLNK(found.st_mode)


def test_another_user_of_the_node_can_neither_read_nor_write_nor_reach_anything_of_it(busy: Supervised) -> None:
    assert busy.state.parent == busy.runtime.parent and busy.state.parent.stat().st_mode & 0o005 == 0o005
    paths = [busy.runtime, busy.state]
    paths += [path for top in tuple(paths) for path in sorted(top.rglob("*")) if ".new" not in path.name]
    names = {path.name for path in paths}
    assert {"sim", "facts", "logs", "journal.jsonl", "api-key", "server.log", "supervisor.lock", "resolver.bin"} <= names, names
    assert {"door.sock", "door-keys.json", "caddy.log", "upstream-key", "outbox.sqlite3"} <= names, names
    assert sum(path.is_socket() for path in paths) >= 8
    found = [path for path in paths if path.exists()]
    # From the first instant, with any umask: nothing was made open and closed later.
    assert [path for path in found if open_to_others(path)] == []
    ours = [*(busy.pids()[name] for name in ("root", *WORKERS)), busy.server_fact().holder_pid]
    assert {umask_of(pid) for pid in ours} == {"0077"} and umask_of(busy.pids()["server"]) == "0000"
    if os.getuid() != 0:  # nobody to become: the modes have to do
        return
    attempts: dict[str, Callable[[], object]] = {}
    for path in found:
        if path.is_dir():
            attempts |= {f"list {path}": lambda p=path: os.listdir(p), f"make in {path}": lambda p=path: (p / "x").touch()}
        elif path.is_socket():
            attempts[f"connect {path}"] = lambda p=path: connect(p)
        else:
            attempts |= {f"read {path}": lambda p=path: p.read_bytes(), f"write {path}": lambda p=path: p.open("ab").close()}
        attempts[f"replace {path}"] = lambda p=path: p.rename(p.with_name("taken"))
    attempts |= {f"environment of {pid}": lambda p=pid: Path(f"/proc/{p}/environ").read_bytes() for pid in ours}
    attempts |= {f"answer at {port}": lambda p=port: answered(p) for port in (busy.port, busy.settings["DOOR_PORT"])}
    attempts["/proc"] = lambda: Path("/proc/self/stat").read_bytes()  # it can try at all
    worked = [list(attempts)[number] for number in as_stranger(list(attempts.values()))]
    assert worked == ["/proc"]


def answered(port: int) -> None:
    """A model's answer without a key, or OSError. Every user of the node reaches its loopback."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST", "/v1/completions", '{"model": "fake", "prompt": "a", "max_tokens": 1}', {"Content-Type": "application/json"})
        if (status := connection.getresponse().status) != 200:
            raise PermissionError(status)
    finally:
        connection.close()


def umask_of(pid: int) -> str:
    return re.search(r"^Umask:\s+(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.M)[1]


def test_a_new_beginning_keeps_the_operators_umask_for_services(supervised: Start) -> None:
    tree = supervised(start=False)
    before = os.umask(0o027)
    try:
        tree.start()
    finally:
        os.umask(before)
    first = tree.serving()["server"]["pid"]
    assert umask_of(first) == "0027"
    tree.tell("fault", name="the runtime folder is deleted")
    shutil.rmtree(tree.runtime, ignore_errors=True)

    def again() -> int | None:
        if not (tree.runtime / "facts").exists():
            return None
        status = tree.status()
        return status["server"]["pid"] if status["phase"] == "serving" and status["server"]["pid"] not in (None, first) else None

    assert umask_of(wait_until(again, 60, what="serving again")) == "0027"


# --- what others may have planted -----------------------------------------------------------------------


def of_another(tree: Supervised) -> None:
    if os.getuid() == 0:
        tree.runtime.mkdir(0o700)
        os.chown(tree.runtime, STRANGER, STRANGER)
    else:
        tree.env["LLMWD_RUNTIME_DIR"] = "/etc"


def loose(tree: Supervised) -> None:
    (tree.runtime / "facts").mkdir(parents=True)
    (tree.runtime / "facts" / "resolver.bin").write_bytes(b"lies")
    tree.runtime.chmod(0o777)


def replaceable(tree: Supervised) -> None:
    tree.runtime.parent.chmod(0o777)


def key_file(mode: int, text: str = "k" * 40) -> Callable[[Supervised], None]:
    def plant(tree: Supervised) -> None:
        tree.state.mkdir(0o700)
        (tree.state / "api-key").write_text(text)
        (tree.state / "api-key").chmod(mode)

    return plant


def link(name: str, folder: bool = True) -> Callable[[Supervised], None]:
    """Where `name` (run, state/logs, …) should be there is a link to something of somebody else's."""

    def plant(tree: Supervised) -> None:
        top = tree.runtime.parent
        (top / "elsewhere").mkdir()
        (top / "elsewhere" / "file").write_text("theirs\n")
        (top / name).parent.mkdir(0o700, exist_ok=True)
        (top / name).symlink_to(top / "elsewhere" if folder else top / "elsewhere" / "file")

    return plant


ATTACKS = {
    "the runtime folder is another user's": (of_another, r"runtime folder \S+ belongs to uid \d+, not to us: name another"),
    "the runtime folder is a link": (link("run"), "runtime folder .* is not a folder .a link, or a file.: remove it"),
    "the runtime folder is a file": (lambda tree: tree.runtime.touch(), "runtime folder .* is not a folder .a link, or a file.: remove it"),
    "the runtime folder is a dangling link": (lambda tree: tree.runtime.symlink_to("/nonexistent/x"), "is not a folder .a link"),
    "the runtime folder was open to all": (loose, "can be written by others, who may have put something into it: remove it"),
    "the folder above is open to all": (replaceable, "can be replaced by others, who may write to .*: name another folder"),
    "the facts are a link": (link("run/facts"), "facts folder .* is not a folder"),
    "the state folder is a link": (link("state"), "state folder .* is not a folder"),
    "the logs are a link": (link("state/logs"), "log folder .* is not a folder"),
    "the lock is a link": (link("run/supervisor.lock", folder=False), "supervisor.lock"),
    "the key is a link": (link("state/api-key", folder=False), "api-key is a link; remove it"),
    "the key can be read by others": (key_file(0o640), "api-key can be read or written by others, so its key is no secret: remove"),
    "the key is none": (key_file(0o600, "\n"), "api-key holds no key: remove it, and the next start makes a new one"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_others_may_have_planted_is_refused_with_what_to_do(supervised: Start, attack: str) -> None:
    plant, sentence = ATTACKS[attack]
    tree = supervised(start=False)
    plant(tree)
    try:
        refused = run_supervisor(tree)
    finally:
        tree.runtime.parent.chmod(0o700)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr, refused.stderr
    assert re.search(sentence, refused.stderr), refused.stderr
    elsewhere = tree.runtime.parent / "elsewhere"
    assert not elsewhere.exists() or [path.read_text() for path in elsewhere.iterdir()] == ["theirs\n"]


def test_a_link_in_the_place_of_a_journal_or_log_is_not_followed(supervised: Start) -> None:
    tree = supervised(start=False)
    target = tree.runtime.parent / "theirs"
    target.touch()
    (tree.state / "logs").mkdir(parents=True, mode=0o700)
    tree.state.chmod(0o700)
    for name in ("journal.jsonl", "logs/root.log", "logs/resolver.log", "logs/server.log"):
        (tree.state / name).symlink_to(target)
    tree.start().serving()
    assert target.read_text() == ""


# --- the key --------------------------------------------------------------------------------------------


def asked(tree: Supervised, header: dict[str, str]) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", tree.port, timeout=10)
    connection.request("GET", "/v1/models", headers=header)
    status = connection.getresponse().status
    connection.close()
    return status


def test_the_server_asks_for_a_key_that_was_made_once_and_listens_on_the_loopback_only(supervised: Start) -> None:
    tree = supervised()
    tree.serving()
    path = tree.state / "api-key"
    key = path.read_text().strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(key) >= 40
    assert asked(tree, {}) == 401 and asked(tree, tree.authorized()) == 200
    assert tree.ctl("key", "local").stdout == f"{key}\n"
    assert tree.ctl("key", "local", "--header").stdout == f"Authorization: Bearer {key}\n"
    listening = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    assert [it[1] for it in listening if it[3] == "0A" and int(it[1][-4:], 16) == tree.port] == [f"0100007F:{tree.port:04X}"]
    tree.stop()
    tree.start().serving()
    assert path.read_text().strip() == key


def test_what_the_welcome_says_is_a_request_that_is_answered_and_shows_no_key(supervised: Start) -> None:
    tree = supervised()
    tree.serving()
    shown = tree.ctl("welcome").stdout
    lines = shown.splitlines()
    first = lines.index("Chat with it:") + 1
    assert tree.ctl("key", "local").stdout.strip() not in shown
    # tests/tree/test_readme.py runs bin/llmwd-ctl itself.
    command = "\n".join(lines[first : first + 2]).replace("bin/llmwd-ctl", "python -m llmwd.ctl.main")
    path = f"{Path(os.sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", command], env=tree.env | {"PATH": path}, cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["choices"], done


def test_without_REQUIRE_API_KEY_the_server_asks_for_none_and_the_operator_is_warned(supervised: Start) -> None:
    tree = supervised(REQUIRE_API_KEY="false")
    tree.serving()
    assert asked(tree, {}) == 200
    refused = tree.ctl("key", "local")
    assert refused.returncode == 1 and "asks for no API key" in refused.stderr
    assert "every user of this node can use the server" in tree.log("root")


# --- secrets --------------------------------------------------------------------------------------------


class Watch(threading.Thread):
    """Reads every command line on this machine, and everything on the bus, for as long as it runs."""

    def __init__(self, tree: Supervised, secrets: list[str]):
        super().__init__(daemon=True)
        self._tree, self._secrets, self._end = tree, [secret.encode() for secret in secrets], threading.Event()
        self.seen: set[bytes] = set()
        self.frames = 0
        self.start()

    def run(self) -> None:
        context = zmq.Context()
        bus = context.socket(zmq.SUB)
        bus.subscribe(b"")
        for worker in WORKERS:
            bus.connect(bus_endpoint(self._tree.runtime, worker))
        while not self._end.is_set():
            while bus.poll(10):
                self.frames += 1
                self._look(b"bus: " + b"".join(bus.recv_multipart()))
            for entry in os.listdir("/proc"):
                if entry.isdigit():
                    self._look(procs.cmdline(int(entry)))
        bus.close(0)
        context.term()

    def _look(self, text: bytes) -> None:
        if any(secret in text for secret in self._secrets):
            self.seen.add(text)

    def stop(self) -> None:
        self._end.set()
        self.join(20)


@pytest.fixture
def ntfy() -> Iterator[NtfyServer]:
    with NtfyServer() as server:
        yield server


def let_in(tree: Supervised, headers: dict[str, str]) -> bool:
    """Whether the door lets this key in, which stands in the query as well, where it counts for nothing."""
    connection = http.client.HTTPConnection("127.0.0.1", tree.settings["DOOR_PORT"], timeout=10)
    try:
        connection.request("GET", f"/v1/models?api_key={next(iter(headers.values())).split()[-1]}", headers=headers)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def test_no_secret_is_in_a_command_line_a_log_the_status_a_message_a_notice_or_the_journal(
    tmp_path: Path, ntfy: NtfyServer
) -> None:
    names = (
        "hub", "hf", "token", "proxy", "own_key", "talked_key", "talked_hf", "argument", "hf_argument", "ntfy", "mistyped", "unquoted",
        "notify", "as_a_path",
    )  # fmt: skip
    planted = {name: f"pLaNtEd-{name}-{os.urandom(8).hex()}" for name in names}
    planted["tunnel"] = base64.b64encode(os.urandom(33)).decode()
    tunnel = tmp_path / "cloudflared"
    settings = credentials(tmp_path, planted["tunnel"]) | {
        "CLOUDFLARED_BIN": tunnel, "NTFY_SERVER": f"http://me:{planted['ntfy']}@127.0.0.1:{ntfy.server_port}", "NTFY_TOPIC": "t",
        "DOOR": "true", "DOOR_PORT": free_port(),
    }  # fmt: skip
    # It ends and quotes what it was given, and so does the server of the last profile.
    tunnel.write_text(f'#!/bin/sh\ncase "$*" in *version*) echo 2025.11.1; exit 0 ;; *validate) exit 0 ;; esac\necho "2026-11-23T00:00:00Z ERR failed with $(cat {tmp_path}/credentials.json)" >&2\nexit 1\n')
    tunnel.chmod(0o755)
    talkative = tmp_path / "talkative"
    talkative.write_text('#!/bin/sh\necho "ValueError: $HF_TOKEN $HUGGING_FACE_HUB_TOKEN $VLLM_API_KEY $https_proxy Bearer $VLLM_API_KEY"\nexit 1\n')
    # (No form tells these secrets from other words: who quotes them has to know them.)
    talkative.chmod(0o755)
    tree = Supervised(tmp_path / "tree", settings, environ={
        "HF_TOKEN": planted["hf"], "HUGGING_FACE_HUB_TOKEN": planted["hub"], "TUNNEL_TOKEN": planted["token"],
        "https_proxy": f"http://me:{planted['proxy']}@127.0.0.1:9",
    })  # fmt: skip
    tree.write_profile("own", FAKE_REPORT=tmp_path / "report")
    with (tree.home / "models/own.env").open("a") as file:
        file.write(f"export VLLM_API_KEY={planted['own_key']}\n")
    tree.write_profile("argued", VLLM_ARGS=f"--api-key {planted['argument']} --hf-token={planted['hf_argument']}", FAKE_REPORT=tmp_path / "argued")
    tree.write_profile("talkative", LLM_BIN=talkative)
    with (tree.home / "models/talkative.env").open("a") as file:
        file.write(f"export VLLM_API_KEY={planted['talked_key']} HF_TOKEN={planted['talked_hf']}\n")
    tree.write_profile("mistyped")
    with (tree.home / "models/mistyped.env").open("a") as file:
        file.write(f"export WANDB_API_KEY= {planted['mistyped']}+\nVLLM_ARGS=--api-key {planted['unquoted']}\n")
    watch = Watch(tree, list(planted.values()))
    try:
        tree.start().serving()
        planted["made"] = tree.ctl("key", "local").stdout.strip()
        planted["door"] = tree.ctl("key", "add", "alice").stdout.strip()
        watch._secrets += [planted["made"].encode(), planted["door"].encode()]
        for headers in ({"Authorization": f"Bearer {planted['door']}"}, {"x-api-key": planted["door"]}):
            wait_until(lambda headers=headers: let_in(tree, headers), 30, what="an answer of the door's")
        wait_until(lambda: tree.journal("tunnel_died"), 30, what="a tunnel that has died")
        tree.job(1, "0-7")
        tree.phase("waiting")
        tree.job_over(1)
        tree.serving()
        texts = [tree.ctl("switch", "own", "--wait"), tree.ctl("switch", "argued", "--wait"), tree.ctl("welcome"), tree.ctl("status")]
        argued = json.loads((tmp_path / "argued").read_text())["env"]
        assert (argued["VLLM_API_KEY"], argued["HF_TOKEN"]) == (planted["argument"], planted["hf_argument"])
        assert json.loads((tmp_path / "report").read_text())["env"]["VLLM_API_KEY"] == planted["own_key"]
        assert "--api-key" not in " ".join(json.loads((tmp_path / "argued").read_text())["argv"])
        mistyped = tree.ctl("switch", "mistyped")
        assert mistyped.returncode == 1
        tree.ctl("switch", "talkative")
        tree.until(lambda status: "ValueError: ***" in status["detail"], what="the failure, quoted")
        texts += [mistyped, tree.ctl("check", "mistyped"), tree.ctl("status"), tree.ctl("status", "--json"), tree.ctl("models")]
        wait_until(lambda: any("Failed" in message.get("title", "") for message in ntfy.messages), 60, what="the notice of a failure")
        assert "ValueError: ***" in next(message["message"] for message in ntfy.messages if "Failed" in message.get("title", ""))
        with (tree.home / "etc/config.env").open("a") as file:
            file.write(f"NOTIFY_URLS=json://a.b/c tgram://123456:{planted['notify']}/42\nTUNNEL_TOKEN_FILE={planted['as_a_path']}\n")
        tree.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "TUNNEL_TOKEN_FILE" in tree.log("root"), 30, what="the settings, refused")
        texts += [tree.ctl("status"), tree.ctl("history", "-n", "100"), tree.ctl("report"), tree.ctl("report", "--json"), tree.ctl("check")]
        assert planted["tunnel"] in tree.log("cloudflared")  # it was there to be quoted
    finally:
        watch.stop()
        tree.close()
    files = [path for top in (tree.runtime, tree.state) for path in top.rglob("*") if path.is_file()]
    # What the services themselves print is theirs, and 0600; keys are in their own files.
    files = [path for path in files if path.name.split(".")[0] not in ("server", "cloudflared", "api-key", "upstream-key")]
    assert {"caddy.log", "door.log", "door-keys.json", "outbox.sqlite3"} <= {path.name for path in files}
    assert {"journal.jsonl", "root.log", "vllm.log", "tunnel.log", "notifier.log", "resolver.bin"} <= {path.name for path in files}
    told = {str(path): path.read_text(errors="replace") for path in [*files, tree.errors]}
    told |= {"ctl " + " ".join(done.args[3:]): done.stdout + done.stderr for done in texts}
    told |= {"ntfy": json.dumps(ntfy.messages)}
    assert [(name, where) for name, secret in planted.items() for where, text in told.items() if secret in text] == []
    assert watch.seen == set() and watch.frames > 20
