"""What an operator gets wrong is told in one sentence with file, line and variable; all of it at once."""

import grp
import os
import pwd
import time

import pytest

from llmwd import ownership
from llmwd.config import load
from llmwd.config.bashfile import read_files
from tests.config.homes import GOOD_PROFILE, environ, load_text, told, warned, write
from tests.waiting import wait_until


def has_ended(pid_file) -> bool:
    """Gone, or a zombie that only waits to be reaped: neither has a program."""
    return not os.path.exists(f"/proc/{int(pid_file.read_text())}/exe")


UUID = "GPU-01234567-89ab-cdef-0123-456789abcdef"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("NUM_GPUS=four", "NUM_GPUS: must be a whole number from 1 to 64, not 'four'"),
        ("NUM_GPUS=0", "NUM_GPUS: must be a whole number from 1 to 64, not '0'"),
        ("NUM_GPUS=4.0", "NUM_GPUS: must be a whole number from 1 to 64, not '4.0'"),
        ("NUM_GPUS=٤", "NUM_GPUS: must be a whole number from 1 to 64, not '٤'"),
        ("NUM_GPUS=(1 2)", "NUM_GPUS: must be one value, not an array"),
        ("NUM_GPUS=$'4\\r'", "NUM_GPUS: must be a whole number from 1 to 64, not '4\\r'"),
        ("SERVER_PORT=65536", "SERVER_PORT: must be a whole number from 1 to 65535, not '65536'"),
        ("POLL_INTERVAL=inf", "POLL_INTERVAL: must be a number of seconds from 0.05 to 60, not 'inf'"),
        ("POLL_INTERVAL=nan", "POLL_INTERVAL: must be a number of seconds from 0.05 to 60, not 'nan'"),
        ("LEASE_TTL=1.9", "LEASE_TTL: must be a number of seconds from 2 to 300, not '1.9'"),
        ("RECONCILE=1e9", "RECONCILE: must be a number of seconds from 0.1 to 3600, not '1e9'"),
        ("BACKOFF_MIN=20 BACKOFF_MAX=10", "BACKOFF_MIN: is 20, which is more than BACKOFF_MAX (10)"),
        ("SIM_GPUS=2 NUM_GPUS=3", "NUM_GPUS: is 3, but SIM_GPUS simulates only 2 GPUs"),
        ("CUDA_SETUP=perhaps", "CUDA_SETUP: must be true or false, not 'perhaps'"),
        ("CUDA_SETUP=true CUDA12_LIB=/", "CUDA_SETUP: is true, so CUDA_HOME_OVERRIDE has to be set as well"),
        ("LLM_VENV='~/venv'", "LLM_VENV: must be an absolute path (bash does not expand a ~ in quotes: write $HOME), not '~/venv'"),
        ("NTFY_TOPIC=https://ntfy.sh/t", "NTFY_TOPIC: must be up to 64 letters, digits, - and _ (the topic alone, not its address)"),
        ("NTFY_SERVER=ntfy.sh", "NTFY_SERVER: must be an address that begins with https:// or http://"),
        ("TUNNEL_HOSTNAME=https://a.b", "TUNNEL_HOSTNAME: must be a host name such as chat.example.org, without https:// and path, not 'https://a.b'"),
        ("TUNNEL_ID=chat", "TUNNEL_ID: must be a UUID (`cloudflared tunnel list`), not 'chat'"),
        ("DETECTION=stepd,inotify", "DETECTION: must be auto, or some of stepd,cgroup2,cgroup1,gresused,procfs,nvml,sim, not 'stepd,inotify'"),
        ("DETECTION=auto,sim", "DETECTION: must be auto, or some of stepd,cgroup2,cgroup1,gresused,procfs,nvml,sim, not 'auto,sim'"),
        ("GPU_MAP=0=1,1=1", "GPU_MAP: must be pairs such as 0=3,1=2 or 0:GPU-<full UUID>, no GPU twice, not '0=1,1=1'"),
        ("GPU_MAP=0:GPU-0123", "GPU_MAP: must be pairs such as 0=3,1=2 or 0:GPU-<full UUID>, no GPU twice, not '0:GPU-0123'"),
        ("LOG_LEVEL=loud", "LOG_LEVEL: must be one of debug, info, warning, error, not 'loud'"),
        (b"SIM_DIR=/x\xff", "SIM_DIR: holds bytes that are not UTF-8"),
        (b"export OTHER=\xff", "OTHER: holds bytes that are not UTF-8"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_with_its_line_and_what_it_must_be(tmp_path, line, message):
    text = b"# first line\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n"
    assert told(load_text(tmp_path, text)) == [f"etc/config.env:2: {message}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("NUM_GPUS = 4", ":1: NUM_GPUS: bash allows no blanks around = in NAME=value"),
        ("\nNUM_GPUS= 4", ":2: NUM_GPUS: bash allows no blanks around = in NAME=value"),
        ("false", ":1: a command in this line failed with status 1; if it may, add `|| true`"),
        ("A=$(exit 3)", ":1: A: a command in this line failed with status 3; if it may, add `|| true`"),
        ("if then\nfi", ":1: bash cannot read this line: forgotten quotes, or something that is not closed?"),
        ("UID=5", ":1: UID: sets a variable that is bash's own"),
        ("A=${B!}", ":1: A: a ${...} in this line is not as bash writes it"),
        ("A=1\nB=${C:?is needed}", ":2: B: bash cannot do what this line says"),
        ("A=1\nB=2\0\n", ":2: holds a NUL byte: this is not a text file"),
        ("A=1\r\nB=2\r\n", ":1: has Windows line ends; mend it with: sed -i 's/\\r$//' etc/config.env"),
        ("A=1\nexit 0", ": it ended bash before its last line was read (exit, exec, set -e, set -u or ${NAME:?}?)"),
        ("exec true", ": it ended bash before its last line was read (exit, exec, set -e, set -u or ${NAME:?}?)"),
        ("while :; do echo yes; done", ": it prints more than 1024 KiB"),
        ("kill -TERM $$", ": bash was ended by SIGTERM"),
        ("#" * (1 << 20) + "\n", ": is larger than 1 MiB: not a settings file"),
    ],
)
def test_a_line_that_bash_refuses_is_told_and_nothing_after_it_is_lost_in_silence(tmp_path, text, message):
    loaded = load_text(tmp_path, text + "\nRECONCILE=7\n" if "\0" not in text else text)
    assert f"etc/config.env{message}" in told(loaded)
    assert loaded.settings is None and loaded.profile is None


def test_an_open_quote_is_told_with_a_hint(tmp_path):
    (problem,) = told(load_text(tmp_path, 'A=1\nNTFY_TOPIC="abc\n'))
    assert problem == "etc/config.env:2: NTFY_TOPIC: a quote or bracket that is opened here or further down is not closed"


SECRET = "Sekret-abcdef-123456"


@pytest.mark.parametrize(
    ("config", "profile"),
    [
        ("NTFY_TOPIC=my @", ""), ("NTFY_TOPIC=my @ || true", ""), ("NOTIFY_URLS=json://a.b/x tgram://1/@/2", ""), ("NTFY_TOPIC=a/@ b", ""),
        ("@", ""), ("./@", ""), ("x=1 /@", ""), ("A=(@", ""), ("A=$(@)", ""), ("A=`@`", ""), ("A=${!@ x}", ""), ("A=${X:?@}", ""),
        ("A=<@", ""), ("export A= @+", ""), ("declare @+=1", ""), ("A=1 & & @", ""), ("if @ then", ""), ("@)", ""), ("A='@", ""), ("A=$((1@))", ""),
        ("[[ @ ]", ""), ("case @", ""), ("let @=", ""), ("readonly A=1; A=@", ""), ("set -u; A=$S_@", ""), ("echo @", ""),
        ("TUNNEL_TOKEN_FILE=@", ""), ("NTFY_PASSWORD_FILE=@", ""), ("NTFY_TOKEN_FILE=@", ""), ("CLOUDFLARED_CREDS=@", ""), ("CLOUDFLARED_CREDS=relative/@", ""),
        ("NTFY_CLICK='https://a.b/ ?token=@'", ""), ("NTFY_TAGS='a b?token=@'", ""), ("LOG_LEVEL='--api-k=@'", ""), ("SIM_GPUS=xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx,token=@", ""),
        ("B_KEYS=(@ other-one); LOG_LEVEL=@", ""),
        ("", "VLLM_ARGS=--api-key @"), ("", "VLLM_ARGS=--x {\"k\": @}"), ("", "VLLM_ARGS={\"api_key\":\"@\", \"b\": 1}"), ("", "VLLM_ARGS='--x \"@ y\"'"),
        ("", "export HF_TOKEN = @"), ("", "export HF_TOKEN= @"), ("", "HF_TOKEN @"), ("", "VLLM_ARGS=(--api-key @"),
    ],
)  # fmt: skip
def test_no_word_of_a_file_that_may_be_a_secret_is_quoted(tmp_path, config, profile):
    """Where quotes are forgotten, it is the secret that bash stumbles over."""
    loaded = load_text(tmp_path, config.replace("@", SECRET) + "\n", GOOD_PROFILE + profile.replace("@", SECRET) + "\n")
    said = told(loaded) + warned(loaded)
    assert said and "Sekret" not in str(said) and "abcdef" not in str(said), said
    assert any(each.startswith(("etc/config.env", "models/p.env")) for each in said)


@pytest.mark.parametrize(("mode", "problem", "warning"), [
    (0o600, "", ""), (0o644, "", "can be read by other users, and holds a secret: `chmod 600 {}`"),
    (0o640, "", "can be read by other users, and holds a secret: `chmod 600 {}`"),
    (0o602, "can be written by other users, and bash would run what they write: look through it, then `chmod go-w {}`", ""),
    (0o620, "can be written by other users, and bash would run what they write: look through it, then `chmod go-w {}`", ""),
])  # fmt: skip
@pytest.mark.parametrize("name", ["etc/config.env", "models/p.env"])
def test_a_file_that_others_can_write_is_not_run_and_one_that_they_can_read_is_told(tmp_path, monkeypatch, name, mode, problem, warning):
    monkeypatch.setattr(ownership, "_is_ours_alone", lambda gid: False)
    text = f"touch {tmp_path}/ran\nexport WANDB_API_KEY={SECRET}\n"
    write(tmp_path, {"etc/config.env": "", "models/p.env": GOOD_PROFILE, name: (GOOD_PROFILE if "models" in name else "") + text})
    (tmp_path / name).chmod(mode)
    loaded = load(tmp_path, "p", "n1", environ())
    assert told(loaded) == ([f"{name}: {problem.format(name)}"] if problem else [])
    assert warned(loaded) == ([f"{name}: {warning.format(name)}"] if warning else [])
    assert (tmp_path / "ran").exists() == (not problem)


def test_a_group_that_has_only_us_in_it_is_no_harm(tmp_path, monkeypatch):
    us = pwd.getpwuid(os.getuid())
    groups = {"private": (us.pw_name, []), "with others": (us.pw_name, ["someone"]), "of others": ("lab", [])}
    write(tmp_path, {"etc/config.env": "NUM_GPUS=2\n", "models/p.env": GOOD_PROFILE})
    (tmp_path / "etc/config.env").chmod(0o664)
    for what, (name, members) in groups.items():
        monkeypatch.setattr(ownership.grp, "getgrgid", lambda gid: grp.struct_group((name, "x", us.pw_gid, members)))  # noqa: B023
        assert bool(load(tmp_path, "p", "n1", environ()).problems) == (what != "private"), what


def test_a_return_ends_its_own_file_only(tmp_path):
    loaded = load_text(tmp_path, "NUM_GPUS=2\nreturn 0\nNUM_GPUS=3\n", node="RECONCILE=7\n")
    assert not loaded.problems
    assert (loaded.settings.num_gpus, loaded.settings.reconcile_s) == (2, 7.0)


def test_a_command_that_is_allowed_to_fail_is_no_problem(tmp_path):
    loaded = load_text(tmp_path, "false || true\n[ -d /nonexistent ] && NUM_GPUS=9\nif false; then :; fi\n! true\n")
    assert not loaded.problems and loaded.settings.num_gpus == 1


def test_all_problems_of_all_files_are_reported_together_in_the_order_of_the_files(tmp_path):
    loaded = load_text(
        tmp_path,
        "NUM_GPUS=four\nSERVER_PORT=0\n",
        "LLM_VENV=relative\nVLLM_ARGS='--uds /x --port http'\n",
        "RECONCILE=never\nTUNNEL_ID=x\n",
        PROBE_INTERVAL="often",
    )
    assert [(problem.file, problem.line, problem.variable) for problem in loaded.problems] == [
        ("etc/config.env", 1, "NUM_GPUS"),
        ("etc/config.env", 2, "SERVER_PORT"),
        ("etc/nodes/n1.env", 1, "RECONCILE"),
        ("etc/nodes/n1.env", 2, "TUNNEL_ID"),
        ("models/p.env", None, "MODEL_NAME"),
        ("models/p.env", 1, "LLM_VENV"),
        ("models/p.env", 2, "VLLM_ARGS"),
        ("models/p.env", 2, "VLLM_ARGS"),
        ("environment", None, "PROBE_INTERVAL"),
    ] or told(loaded)
    assert loaded.settings is None and loaded.profile is None


def test_the_line_told_is_the_last_assignment_and_never_a_comment(tmp_path):
    loaded = load_text(tmp_path, "NUM_GPUS=3\nexport NUM_GPUS=x\n#NUM_GPUS=4\nA=$NUM_GPUS\nXNUM_GPUS=5\n")
    assert [problem.line for problem in loaded.problems] == [2]


def test_a_bad_profile_leaves_the_settings_and_bad_settings_leave_the_profile(tmp_path):
    loaded = load_text(tmp_path, "NUM_GPUS=2\n", "MODEL_NAME=\nVLLM_ARGS=\n")
    assert loaded.settings.num_gpus == 2 and loaded.profile is None
    assert told(loaded) == ["models/p.env:1: MODEL_NAME: must be a Hugging Face model id or the path of a local model"]
    loaded = load_text(tmp_path, "RECONCILE=x\n")
    assert loaded.settings is None and loaded.profile.model_name == "org/Model"


def test_a_profile_that_ends_bash_leaves_the_settings(tmp_path):
    loaded = load_text(tmp_path, "NUM_GPUS=2\n", GOOD_PROFILE + "exit\n")
    assert loaded.settings.num_gpus == 2 and loaded.profile is None
    assert [problem.file for problem in loaded.problems] == ["models/p.env"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--host 0.0.0.0", "--host 0.0.0.0 would let other machines reach the server: leave it out (the tunnel needs only the loopback), or set LOOPBACK_ONLY=false in etc/config.env if that is what you want"),
        ("--host=", "--host '' would let other machines reach the server: leave it out (the tunnel needs only the loopback), or set LOOPBACK_ONLY=false in etc/config.env if that is what you want"),
        ("--api-key a b", "more than one key for --api-key: several could be given to vLLM on its command line only, where every user reads them"),
        ("--uds /tmp/s", "--uds is not supported: llmwd and the tunnel reach the server by --host and --port"),
        ("--port=http", "--port must be a whole number from 1 to 65535, not 'http'"),
        ("--port", "--port must be a whole number from 1 to 65535, not ''"),
        ("-pp 0", "--pipeline-parallel-size must be a whole number from 1 on, not '0'"),
        (
            "-pp 2 --data_parallel_size=2",
            "pipeline and data parallelism of these arguments need a multiple of 4 GPUs, not 6: "
            "change NUM_GPUS or the arguments",
        ),
    ],
)
def test_arguments_that_llmwd_cannot_serve_with_are_problems(tmp_path, arguments, message):
    loaded = load_text(tmp_path, "", f"MODEL_NAME=m\nNUM_GPUS=6\nVLLM_ARGS='{arguments}'\n")
    assert told(loaded) == [f"models/p.env:3: VLLM_ARGS: {message}"]


def test_cuda_folders_have_to_exist(tmp_path):
    text = f"CUDA_SETUP=true\nCUDA12_LIB={tmp_path}/lib64\nCUDA_HOME_OVERRIDE={tmp_path}\n"
    assert told(load_text(tmp_path, text)) == [
        f"etc/config.env:2: CUDA12_LIB: must be a folder that exists, and {tmp_path}/lib64 is none"
    ]
    (tmp_path / "lib64").mkdir()
    assert load_text(tmp_path, text).profile.cuda_setup is True


def test_a_profile_may_do_without_the_nodes_cuda_setup(tmp_path):
    loaded = load_text(tmp_path, "CUDA_SETUP=true\n", GOOD_PROFILE + "CUDA_SETUP=false\n")
    assert not loaded.problems and loaded.settings.cuda_setup and not loaded.profile.cuda_setup


@pytest.mark.parametrize(
    ("config", "profile", "warning"),
    [
        ("NUM_GPU=4", "", "etc/config.env:1: NUM_GPU: is not a setting; did you mean NUM_GPUS?"),
        ("num_gpus=4", "", "etc/config.env:1: num_gpus: is not a setting; did you mean NUM_GPUS?"),
        ("echo hello", "", "etc/config.env, models/p.env: prints something: a settings file should only set variables"),
        ("nope || true", "", "etc/config.env:1: bash takes a word of this line for a command or a file: forgotten quotes?"),
        ("VLLM_ARGS=--x", "", "etc/config.env:1: VLLM_ARGS: belongs into a profile in models/"),
        ("", "SERVER_PORT=9", "models/p.env:3: SERVER_PORT: has no effect in a profile: set it in etc/config.env"),
        ("", "export CUDA_VISIBLE_DEVICES=1", "models/p.env:3: CUDA_VISIBLE_DEVICES: has no effect: the lease says which GPUs are used"),
        ("LOOPBACK_ONLY=no", "VLLM_ARGS='--host 0.0.0.0'", "models/p.env:3: VLLM_ARGS: --host 0.0.0.0 lets other machines use the server"),
        ("LOOPBACK_ONLY=no REQUIRE_API_KEY=no", "VLLM_ARGS='--host 0.0.0.0'", "models/p.env:3: VLLM_ARGS: --host 0.0.0.0 lets other machines use the server, and it asks for no API key"),
        ("REQUIRE_API_KEY=no", "", "models/p.env:2: VLLM_ARGS: every user of this node can use the server: REQUIRE_API_KEY is off"),
        ("", 'VLLM_ARGS=(--api-key abcdef --kv-transfer-config "{\\"token\\": \\"x\\"}" --hf-token=abcdef)', "models/p.env:3: VLLM_ARGS: what looks like a secret (--kv-transfer-config) stays on vLLM's command line, which every user of this node can read: export it or put it in a file"),
        ("", "VLLM_ARGS='--x s3://me:abcdef@a.b/'", "models/p.env:3: VLLM_ARGS: what looks like a secret (--x) stays on vLLM's command line, which every user of this node can read: export it or put it in a file"),
        ("", "VLLM_ARGS=\"--j '{}'\"", "models/p.env:3: VLLM_ARGS: its word 2 reaches vLLM with its quotes; for quoting, write an array: VLLM_ARGS=(...)"),
        ("TUNNEL_HOSTNAME=chat.example.org", "", "etc/config.env:1: TUNNEL_HOSTNAME: needs TUNNEL_ID (`cloudflared tunnel list` shows it) or CLOUDFLARED_CREDS: there is no tunnel until then"),
    ],
)  # fmt: skip
def test_what_is_odd_but_harmless_is_a_warning(tmp_path, config, profile, warning):
    loaded = load_text(tmp_path, config, GOOD_PROFILE + profile)
    assert not loaded.problems and loaded.settings and loaded.profile
    assert [each for each in warned(loaded) if "chmod 600" not in each] == [warning]


def test_variables_of_the_operators_own_are_fine(tmp_path):
    loaded = load_text(tmp_path, f'SCRATCH=/scratch/me\nHF_HOME="$SCRATCH/hf"\nGPU_MAP="0:{UUID}, 1=2"\n')
    assert not loaded.problems and not warned(loaded)
    assert loaded.settings.hf_home == "/scratch/me/hf" and loaded.settings.gpu_map == {0: UUID, 1: "2"}


def test_a_missing_config_file_is_a_warning_and_defaults_hold(tmp_path):
    write(tmp_path, {"models/p.env": GOOD_PROFILE})
    loaded = load(tmp_path, "p", "n1", environ())
    assert loaded.settings.num_gpus == 1 and loaded.profile and not loaded.problems
    assert warned(loaded) == [
        "etc/config.env: is missing, defaults are used; begin with: cp etc/config.env.example etc/config.env"
    ]


def test_a_folder_or_a_pipe_in_place_of_a_file_is_told(tmp_path):
    write(tmp_path, {"models/p.env": GOOD_PROFILE})
    (tmp_path / "etc/nodes/n1.env").mkdir(parents=True)
    os.mkfifo(tmp_path / "etc/config.env")
    assert told(load(tmp_path, "p", "n1", environ())) == [
        "etc/config.env: is not a regular file",
        "etc/nodes/n1.env: is not a regular file",
    ]


def test_a_file_that_hangs_is_ended_with_all_it_started_and_told(tmp_path):
    write(tmp_path, {"a.env": "sleep 1000 & echo $! > pid\nwait\n", "b.env": "B=1\n"})
    begin = time.monotonic()
    readout = read_files([tmp_path / "a.env", tmp_path / "b.env"], environ(), tmp_path, within_s=3)
    assert time.monotonic() - begin < 60
    assert readout.ended_by == "it was not done after 3 s: does a command in it wait for something?"
    assert len(readout.states) == 1
    assert wait_until(lambda: has_ended(tmp_path / "pid"))


def test_a_file_that_waits_for_input_gets_none_and_does_not_hang(tmp_path):
    ours, writer, saved = *os.pipe(), os.dup(0)
    os.dup2(ours, 0)  # an input that stays open and silent, as a terminal's
    try:
        loaded = load_text(tmp_path, "read -r ANSWER || true\nNUM_GPUS=2\n")
    finally:
        os.dup2(saved, 0)
        for fd in (ours, writer, saved):
            os.close(fd)
    assert not loaded.problems and loaded.settings.num_gpus == 2


def test_options_that_a_file_leaves_set_do_not_end_the_next_one(tmp_path):
    loaded = load_text(tmp_path, "set -euxv\nNUM_GPUS=2\n", node="RECONCILE=7$NOT_SET\n[ -d /nonexistent ] && A=1\n")
    assert not loaded.problems and loaded.profile
    assert (loaded.settings.num_gpus, loaded.settings.reconcile_s) == (2, 7.0)


def test_something_left_running_in_the_background_does_not_delay_the_load(tmp_path):
    loaded = load_text(tmp_path, "sleep 1000 & echo $! > pid\nNUM_GPUS=2\n")
    assert loaded.settings.num_gpus == 2
    assert wait_until(lambda: has_ended(tmp_path / "pid"))


def test_without_bash_the_reason_is_told(tmp_path):
    write(tmp_path, {"etc/config.env": "", "models/p.env": GOOD_PROFILE})
    loaded = load(tmp_path, "p", "n1", {"PATH": str(tmp_path)})
    assert told(loaded) == ["bash: cannot be run (No such file or directory): it has to be on PATH"]
    assert loaded.settings is None and loaded.profile is None
