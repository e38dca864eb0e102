"""start.sh, step by step, in a checkout of which only the supervisor and the embedded set-up are stand-ins."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from llmwd.adapters import procs
from tests.ctl.stand import CHECKOUT
from tests.waiting import wait_until

TOOLS = "bash env readlink mkdir cp cat chmod tail uname mktemp rm setsid nohup grep sh dirname flock".split()


class Checkout:
    """A checkout with its own start.sh, in which `supervisor` is a shell script of the test."""

    def __init__(self, stand, folder: Path, tmux_dir: Path):
        self.stand, self.root = stand, folder
        (folder / "bin").mkdir(parents=True)
        (folder / "scripts").mkdir()
        shutil.copy(CHECKOUT / "start.sh", folder)
        self.script("bin/llmwd-ctl", f'exec "{sys.executable}" -I -m llmwd.ctl.main "$@"')
        self.script("scripts/env.sh", f'LLMWD_PYTHON="{sys.executable}"')
        self.script("scripts/setup-embedded.sh", 'echo "setup $*" >>"$LLMWD_HOME/setup"; [ "$1" != --check ]')
        self.supervisor("serving", "ready")
        (stand.dirs.home / "etc/config.env.example").write_text("NUM_GPUS=2\n")
        self.tools = folder / "tools"
        self.tools.mkdir()
        self.env = stand.env | {"TMUX_TMPDIR": str(tmux_dir), "TERM": "xterm", "LLMWD_TMUX_SESSION": "watch"}
        self.env.pop("TMUX", None)
        self.env["PATH"] = f"{self.tools}:{os.environ['PATH']}"

    def script(self, name: str, text: str) -> None:
        (self.root / name).unlink(missing_ok=True)  # it may be a link to the machine's own program
        (self.root / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (self.root / name).chmod(0o755)

    def supervisor(self, phase: str, reason: str) -> None:
        stand_in = f'"{sys.executable}" -m tests.ctl.rootstand "$LLMWD_RUNTIME_DIR" --node-phase {phase} {reason}'
        self.script("bin/llmwd-supervisor", f'cd "{CHECKOUT}" && exec {stand_in}')

    def tool(self, name: str, text: str) -> None:
        self.script(f"tools/{name}", text)

    def rm_that_tells_modes(self) -> None:
        """An `rm` that writes down which mode start.ended had."""
        looks = f'for file; do [[ $file != */start.ended || ! -e $file ]] || {shutil.which("stat")} -c %a "$file" >>"$LLMWD_HOME/modes"; done'
        self.tool("rm", f'{looks}; exec {shutil.which("rm")} "$@"')

    def start(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.root / "start.sh", *words], env=self.env | env, capture_output=True, text=True, timeout=90,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def tmux(self, *words: str) -> str:
        return subprocess.run(["tmux", *words], env=self.env, capture_output=True, text=True, timeout=30).stdout

    def environ(self) -> dict[str, str]:
        """What the supervisor got."""
        data = (self.stand.dirs.runtime / "environ").read_bytes().decode()
        return dict(item.split("=", 1) for item in data.split("\0") if item)


@pytest.fixture
def checkout(stand, tmp_path, short_path):
    (short_path / "tmux").mkdir()
    made = Checkout(stand, tmp_path / "the checkout", short_path / "tmux")
    stand.profile("glm-4.7-flash")
    stand.profile("smollm2-135m")
    yield made
    stand.ctl("stop")
    made.tmux("kill-server")


def without_driver(checkout) -> bool:
    """This machine may have a driver; then there is no way to hide it."""
    return not (Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi"))


def test_it_starts_the_supervisor_in_tmux_waits_and_says_what_to_do_next(checkout):
    done = checkout.start()
    assert done.returncode == 0, done.stderr
    assert checkout.tmux("list-sessions", "-F", "#{session_name}") == "watch\n"
    for part in (
        "serving, ",
        "curl -sS http://127.0.0.1:8000/v1/chat/completions",
        '"model":"glm"',
        "bin/llmwd-ctl status",
        "tmux attach -t watch",
        "bin/llmwd-ctl stop",
    ):
        assert part in done.stdout, part


def test_running_it_twice_is_harmless_and_says_so(checkout):
    checkout.start()
    root = json.loads(checkout.stand.ctl("status", "--json").stdout)["root"]
    done = checkout.start()
    assert done.returncode == 0
    assert "is running on this node already" in done.stdout and "● serving" in done.stdout
    # Not all of it: the stand-in repeats no fact, and those that are 15 s old are shown as old.
    assert json.loads(checkout.stand.ctl("status", "--json").stdout)["root"] == root
    assert checkout.tmux("list-windows", "-t", "=watch").count("\n") == 1


def test_the_first_time_it_makes_the_settings_and_never_touches_them_again(checkout):
    settings = checkout.stand.dirs.home / "etc/config.env"
    settings.unlink()
    assert "made etc/config.env" in checkout.start("--no-wait").stdout
    assert settings.read_text() == "NUM_GPUS=2\n"
    checkout.stand.ctl("stop")
    settings.write_text("NUM_GPUS=1\n")
    checkout.start("--no-wait")
    assert settings.read_text() == "NUM_GPUS=1\n"


def test_what_it_makes_is_for_the_user_alone_and_the_supervisor_has_the_users_umask(checkout):
    for name in TOOLS:
        (checkout.tools / name).symlink_to(shutil.which(name))
    dirs = checkout.stand.dirs
    settings, log, ended = dirs.home / "etc/config.env", dirs.logs / "start.log", dirs.runtime / "start.ended"
    settings.unlink()
    log.touch()
    log.chmod(0o666)
    # It writes down its umask, and leaves its end to be looked at.
    checkout.script("bin/llmwd-supervisor", 'umask >"$LLMWD_HOME/umask"; exit 1')
    checkout.rm_that_tells_modes()
    before = os.umask(0o022)
    try:
        assert checkout.start(PATH=str(checkout.tools)).returncode == 1
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (settings, log)] == [0o600, 0o600] and not ended.exists()
    assert (dirs.home / "umask").read_text() == "0022\n"
    assert (dirs.home / "modes").read_text() == "600\n"


def test_the_end_of_a_supervisor_in_tmux_is_written_for_the_user_alone(checkout):
    checkout.script("bin/llmwd-supervisor", 'exit 1')
    checkout.rm_that_tells_modes()
    assert checkout.start().returncode == 1
    assert (checkout.stand.dirs.home / "modes").read_text() == "600\n"


def test_settings_with_a_secret_that_others_can_read_are_warned_of_and_what_they_can_write_is_not_run(checkout):
    settings = checkout.stand.dirs.home / "etc/config.env"
    settings.write_text(settings.read_text() + f'touch "{checkout.root}/ran"\nexport WANDB_API_KEY=planted-secret\n')
    settings.chmod(0o644)
    done = checkout.start("--no-wait")
    assert done.returncode == 0 and "warning: etc/config.env: can be read by other users, and holds a secret" in done.stderr
    checkout.stand.ctl("stop")
    settings.chmod(0o666)
    (checkout.root / "ran").unlink()
    done = checkout.start("--no-wait")
    assert done.returncode == 1 and "can be written by other users, and bash would run what they write" in done.stderr
    assert not (checkout.root / "ran").exists()
    assert "planted-secret" not in done.stdout + done.stderr


def test_the_environment_goes_through_an_older_tmux_server_and_nobody_can_read_it_on_the_way(checkout):
    checkout.tmux("new-session", "-d", "-s", "older")
    assert checkout.start("--no-wait", HF_TOKEN="it's a secret").returncode == 0
    got = wait_until(checkout.environ)
    assert got["HF_TOKEN"] == "it's a secret"
    assert got["LLMWD_RUNTIME_DIR"] == str(checkout.stand.dirs.runtime)
    assert got["TERM"] != "xterm"  # tmux's own
    assert not list(checkout.stand.dirs.runtime.glob("start.*"))
    commands = [procs.cmdline(int(path.name)) for path in Path("/proc").glob("[0-9]*")]  # b"" of one that has just ended
    assert any(commands) and not any(b"it's a secret" in command for command in commands)


def test_an_existing_session_without_a_supervisor_gets_a_window_and_keeps_its_own(checkout):
    checkout.tmux("new-session", "-d", "-s", "watch", "-n", "mine")
    assert checkout.start("--no-wait").returncode == 0
    names = checkout.tmux("list-windows", "-t", "=watch", "-F", "#{window_name}").split()
    assert names == ["mine", "llmwd"]


def test_the_session_ends_with_the_supervisor(checkout):
    checkout.start("--no-wait")
    assert checkout.stand.ctl("stop").returncode == 0
    wait_until(lambda: "watch" not in checkout.tmux("list-sessions"))


def test_a_supervisor_that_does_not_come_up_is_shown_with_its_own_words(checkout):
    checkout.script("bin/llmwd-supervisor", 'echo "refused: inside a Slurm job" >&2; exit 1')
    done = checkout.start()
    assert done.returncode == 1
    assert "refused: inside a Slurm job" in done.stderr
    assert "watch" not in checkout.tmux("list-sessions")


def test_without_tmux_it_says_so_and_runs_detached_with_a_log(checkout):
    for name in TOOLS:
        (checkout.tools / name).symlink_to(shutil.which(name))
    done = checkout.start(PATH=str(checkout.tools))
    log = checkout.stand.dirs.logs / "start.log"
    assert done.returncode == 0, done.stderr
    assert "there is no tmux here" in done.stdout and str(log) in done.stdout
    wait_until(lambda: log.read_text() == "locked\n", what="its word")  # said after the facts that start.sh waits for
    assert "tmux attach" not in done.stdout
    pid = int(checkout.stand.ctl("status", "--json").stdout.split('"root"')[1].split('"pid": ')[1].split(",")[0])
    assert os.getsid(pid) != os.getsid(0)  # it does not end with this terminal


def test_without_tmux_a_supervisor_that_does_not_come_up_is_shown_too(checkout):
    for name in TOOLS:
        (checkout.tools / name).symlink_to(shutil.which(name))
    checkout.script("bin/llmwd-supervisor", 'echo "refused: no" >&2; exit 1')
    done = checkout.start(PATH=str(checkout.tools))
    assert done.returncode == 1 and "refused: no" in done.stderr


@pytest.mark.parametrize(
    ("phase", "reason", "code", "part"),
    [("failed", "server_failed", 1, "so it is"), ("held", "held", 0, "resume")],
)
def test_it_does_not_wait_for_what_will_not_come(checkout, phase, reason, code, part):
    checkout.supervisor(phase, reason)
    done = checkout.start()
    assert done.returncode == code and part in done.stdout + done.stderr


def test_without_a_driver_the_embedded_model_is_set_up_chosen_and_gpus_are_simulated(checkout):
    if not without_driver(checkout):
        pytest.fail("this test is for machines without an NVIDIA driver; CI has none")
    done = checkout.start("--no-wait")
    assert done.returncode == 0, done.stderr
    assert (checkout.stand.dirs.home / "setup").read_text() == "setup --check\nsetup \n"
    assert (checkout.stand.dirs.home / "active-model.env").readlink().name == "smollm2-135m.env"
    assert wait_until(checkout.environ)["SIM_GPUS"] == "4"


def test_an_embedded_model_that_is_there_is_not_set_up_again_and_sim_gpus_is_the_users(checkout):
    checkout.script("scripts/setup-embedded.sh", '[ "$1" = --check ] || exit 1')
    assert checkout.start("--no-wait", SIM_GPUS="8").returncode == 0
    assert wait_until(checkout.environ)["SIM_GPUS"] == "8"


def test_a_set_up_that_fails_ends_the_start(checkout):
    checkout.script("scripts/setup-embedded.sh", 'echo "no room" >&2; exit 1')
    done = checkout.start()
    assert done.returncode == 1 and "no room" in done.stderr
    assert checkout.stand.ctl("status").returncode == 3


def test_with_a_driver_the_default_is_glm_and_nothing_is_set_up_or_simulated(checkout):
    checkout.tool("nvidia-smi", "exit 0")
    assert checkout.start("--no-wait").returncode == 0
    assert (checkout.stand.dirs.home / "active-model.env").readlink().name == "glm-4.7-flash.env"
    assert not (checkout.stand.dirs.home / "setup").exists()
    assert "SIM_GPUS" not in wait_until(checkout.environ)


def test_with_a_driver_and_no_vllm_it_says_what_is_missing_and_what_to_do(checkout):
    checkout.tool("nvidia-smi", "exit 0")
    (checkout.stand.dirs.home / "venv/bin/vllm").unlink()
    done = checkout.start()
    assert done.returncode == 1
    assert "venv/bin/vllm" in done.stderr and "set LLM_VENV" in done.stderr
    assert checkout.stand.ctl("status").returncode == 3


def test_the_operators_choice_of_a_model_is_kept(checkout):
    checkout.stand.profile("mine")
    (checkout.stand.dirs.home / "active-model.env").symlink_to("models/mine.env")
    assert checkout.start("--no-wait").returncode == 0
    assert (checkout.stand.dirs.home / "active-model.env").readlink().name == "mine.env"
    assert not (checkout.stand.dirs.home / "setup").exists()


def test_a_node_is_started_over_ssh_in_the_same_folder(checkout, tmp_path):
    # As the real one: the words become one line for the other side's shell. That side's start.sh is a stand-in.
    checkout.tool("ssh", 'echo "$1 $2" >"$LLMWD_HOME/ssh"; shift 2; exec sh -c "$*"')
    real = (checkout.root / "start.sh").read_text().split("\n", 1)[1]
    again = 'if [ -e "$LLMWD_HOME/ssh" ]; then echo "here: $PWD $* $LLMWD_TMUX_SESSION"; exit 7; fi'
    checkout.script("start.sh", f"{again}\n{real}")
    done = checkout.start("--no-wait", "gilbreth-m001")
    assert (checkout.stand.dirs.home / "ssh").read_text() == "-t gilbreth-m001\n"
    assert f"here: {checkout.root} --no-wait watch" in done.stdout
    assert done.returncode == 7


@pytest.mark.parametrize("name", ["-oProxyCommand=touch x", "--", "-", "a b", "a;b", "$(x)", "", "a\nb"])
def test_what_is_no_node_name_never_reaches_ssh(checkout, name):
    checkout.tool("ssh", 'touch "$LLMWD_HOME/ssh"')
    assert checkout.start(name).returncode == 2
    assert not (checkout.stand.dirs.home / "ssh").exists()


def test_this_nodes_own_name_needs_no_ssh(checkout):
    checkout.tool("ssh", 'touch "$LLMWD_HOME/ssh"')
    assert checkout.start("--no-wait", os.uname().nodename).returncode == 0
    assert not (checkout.stand.dirs.home / "ssh").exists()


def test_help_tells_and_does_nothing(checkout):
    done = checkout.start("--help")
    assert done.returncode == 0 and "usage: ./start.sh" in done.stdout
    assert not (checkout.stand.dirs.home / "setup").exists()
