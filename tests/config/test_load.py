"""Where a setting comes from, what leaks in, and what the loaded profile is."""

import os
import time

import msgspec
import pytest

from llmwd.config import SETTINGS, Settings, load
from tests.config.homes import GOOD_PROFILE, environ, load_text, warned, write
from tests.waiting import wait_until

SEED_CONFIG = """\
# GPU allocation
NUM_GPUS=4   # How many GPUs to claim for vLLM

# Notifications
NTFY_TOPIC="purduechat-watchdog"

# CUDA overrides (uncomment on nodes needing CUDA 13 for FP8)
#CUDA_SETUP="true"
#CUDA12_LIB="/apps/cuda/12.6.0/lib64"

# vLLM
LLM_VENV="/home/someone/llm-watchdog/.venv"
SERVER_PORT="8000"
HF_HOME="/scratch/someone/cache/huggingface"

# Cloudflare tunnel
TUNNEL_HOSTNAME="chat.example.org"

# Detection
POLL_INTERVAL="0.25"
"""


def test_the_bash_daemons_own_config_file_is_valid_as_it_is(tmp_path):
    loaded = load_text(tmp_path, SEED_CONFIG)
    assert not loaded.problems
    assert (loaded.settings.num_gpus, loaded.settings.server_port, loaded.settings.poll_interval_s) == (4, 8000, 0.25)
    assert loaded.profile.llm_bin == "/home/someone/llm-watchdog/.venv/bin/vllm"
    assert loaded.profile.hf_home == "/scratch/someone/cache/huggingface"


def test_files_win_over_the_environment_and_the_environment_over_defaults(tmp_path):
    loaded = load_text(
        tmp_path, "NUM_GPUS=2\nRECONCILE=20\n", node="NUM_GPUS=3\n", NUM_GPUS="8", RECONCILE="30", RESUME_AFTER="40"
    )
    settings = loaded.settings
    assert (settings.num_gpus, settings.reconcile_s, settings.resume_after_s, settings.lease_ttl_s) == (3, 20, 40, 10)


def test_a_later_file_sees_what_an_earlier_one_set(tmp_path):
    loaded = load_text(
        tmp_path,
        'ROOT=/data\nexport TOKENIZERS_PARALLELISM=false\nCOMMON=(--a "b c")\n',
        'MODEL_NAME="$ROOT/m"\nVLLM_ARGS=("${COMMON[@]}" --x)\nNUM_GPUS=$((NUM_GPUS * 2))\n',
        "ROOT+=/$HOSTNAME_SHORT\nNUM_GPUS=2\n",
    )
    profile = loaded.profile
    assert (profile.model_name, profile.num_gpus) == ("/data/n1/m", 4)
    assert profile.vllm_args == ("--a", "b c", "--x")
    assert profile.exports == {"TOKENIZERS_PARALLELISM": "false"}
    assert loaded.settings.num_gpus == 2


def test_nothing_else_of_the_callers_environment_leaks_in(tmp_path):
    home = write(tmp_path, {"etc/config.env": "env > seen\nset > all\n", "models/p.env": GOOD_PROFILE})
    hostile = environ(
        SECRET="s3cret", MODEL_NAME="leaked", VLLM_ARGS="--leaked", BASH_ENV="/tmp/x", ENV="/tmp/x", SLURM_JOB_ID="1",
        PYTHONPATH="/x", LD_PRELOAD="", SHELLOPTS="noexec", IFS="u", PS4="$(touch bad)", CDPATH="/", NUM_GPUS="2",
        **{"BASH_FUNC_source%%": "() { echo hijacked; }"},
    )  # fmt: skip
    loaded = load(home, "p", "n1", hostile)
    seen = {line.split("=", 1)[0] for line in (tmp_path / "seen").read_text().splitlines()}
    assert seen <= {
        "PATH", "HOME", "USER", "LANG", "NUM_GPUS", "LLMWD_HOME", "LLMWD_EMBEDDED_DIR", "HOSTNAME_SHORT",
        "LC_MESSAGES", "PWD", "OLDPWD", "SHLVL", "_",
    }  # fmt: skip
    everything = (tmp_path / "all").read_text()
    assert "s3cret" not in everything and "leaked" not in everything and "hijacked" not in everything
    assert loaded.profile.exports == {} and loaded.settings.num_gpus == 2


def test_our_own_process_environment_is_neither_changed_nor_passed_on(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMWD_TEST_SECRET", "s3cret")
    before = dict(os.environ)
    write(tmp_path, {"etc/config.env": "export NEW=1\nset > all\n", "models/p.env": GOOD_PROFILE})
    assert load(tmp_path, "p", "n1").profile.exports == {"NEW": "1"}
    assert dict(os.environ) == before and "s3cret" not in (tmp_path / "all").read_text()


def test_exports_are_what_the_files_export_and_not_what_they_only_set(tmp_path):
    loaded = load_text(
        tmp_path,
        "export A=1 B=2\nC=3\nset -a; D=4; set +a\nexport NUM_GPUS=2 HF_HOME=/hf\nexport -n B\nexport E\n",
        GOOD_PROFILE + 'export PATH="/opt/bin:$PATH"\nexport VLLM_USE_DEEP_GEMM=1 A="x\ny"\nexport MODEL_NAME\n',
    )
    assert loaded.profile.exports == {
        "A": "x\ny", "D": "4", "VLLM_USE_DEEP_GEMM": "1", "PATH": "/opt/bin:" + os.environ["PATH"],
    }  # fmt: skip
    assert loaded.profile.hf_home == "/hf"


def test_our_three_names_are_there_for_the_files(tmp_path):
    text = 'MODEL_NAME="$LLMWD_HOME|$LLMWD_EMBEDDED_DIR|$HOSTNAME_SHORT"\nVLLM_ARGS=\n'
    assert load_text(tmp_path, "", text).profile.model_name == f"{tmp_path}|/home/someone/.local/share/llmwd/embedded|n1"
    data = load_text(tmp_path, "", text, XDG_DATA_HOME="/data").profile.model_name
    assert data.split("|")[1] == "/data/llmwd/embedded"
    moved = load_text(tmp_path, "", text, LLMWD_EMBEDDED_DIR="/e", XDG_DATA_HOME="/data").profile.model_name
    assert moved.split("|")[1] == "/e"


@pytest.mark.parametrize(
    ("config", "profile", "venv", "program"),
    [
        ("", "", "{home}/.venv", "{home}/.venv/bin/vllm"),
        ("LLM_VENV=/v", "", "/v", "/v/bin/vllm"),
        ("LLM_VENV=/v", "LLM_VENV=/w", "/w", "/w/bin/vllm"),
        ('LLM_VENV=/v\nLLM_BIN="$LLM_VENV/bin/vllm"', "LLM_VENV=/w", "/w", "/w/bin/vllm"),
        ("LLM_VENV=/v LLM_BIN=/opt/wrapper", "LLM_VENV=/w", "/w", "/opt/wrapper"),
        ("LLM_BIN=/opt/wrapper", "LLM_VENV=/w LLM_BIN=/w/bin/vllm", "/w", "/w/bin/vllm"),
    ],
)
def test_the_vllm_of_a_profile_follows_its_environment(tmp_path, config, profile, venv, program):
    loaded = load_text(tmp_path, config, GOOD_PROFILE + profile)
    assert loaded.profile.llm_venv == venv.format(home=tmp_path)
    assert loaded.profile.llm_bin == program.format(home=tmp_path)


def test_a_profile_overrides_for_itself_only(tmp_path):
    folders = f"CUDA12_LIB={tmp_path} CUDA_HOME_OVERRIDE={tmp_path}"
    own = GOOD_PROFILE + f"NUM_GPUS=8\nLLM_VENV=/w\nCUDA_SETUP=true\n{folders}\n"
    loaded = load_text(tmp_path, "NUM_GPUS=2\nLLM_VENV=/v\n", own)
    assert (loaded.profile.num_gpus, loaded.profile.llm_venv, loaded.profile.cuda_setup) == (8, "/w", True)
    assert (loaded.settings.num_gpus, loaded.settings.llm_venv, loaded.settings.cuda_setup) == (2, "/v", False)
    assert not warned(loaded)


def test_a_string_of_arguments_is_split_without_quote_removal_and_without_globbing(tmp_path):
    write(tmp_path, {"--a": "", "x": ""})
    text = "MODEL_NAME=m\nVLLM_ARGS='--c {\"cudagraph_mode\":\"PIECEWISE\"}\n\t * ? \\*  ~ $HOME '\n"
    loaded = load_text(tmp_path, "", text)
    assert loaded.profile.vllm_args == ("--c", '{"cudagraph_mode":"PIECEWISE"}', "*", "?", "\\*", "~", "$HOME")


def test_empty_arguments_are_allowed_and_missing_ones_are_not(tmp_path):
    for empty in ("VLLM_ARGS=", "VLLM_ARGS=()", 'VLLM_ARGS="  "'):
        assert load_text(tmp_path, "", f"MODEL_NAME=m\n{empty}\n").profile.vllm_args == ()
    loaded = load_text(tmp_path, "", "MODEL_NAME=m\n")
    assert [str(problem) for problem in loaded.problems] == ["models/p.env: VLLM_ARGS: is missing: a profile needs it"]


def test_an_empty_value_means_the_default(tmp_path):
    loaded = load_text(tmp_path, 'NUM_GPUS=""\nNTFY_SERVER=\nDETECTION=""\n')
    assert loaded.settings == load_text(tmp_path, "").settings


def test_the_credentials_file_follows_the_tunnel(tmp_path):
    tunnel = "01234567-89ab-cdef-0123-456789abcdef"
    assert load_text(tmp_path, "").settings.cloudflared_creds == ""
    settings = load_text(tmp_path, f"TUNNEL_ID={tunnel}").settings
    assert settings.cloudflared_creds == f"/home/someone/.cloudflared/{tunnel}.json"


def test_only_this_nodes_file_is_read_and_a_strange_host_name_reads_none(tmp_path):
    files = {"etc/config.env": "", "etc/nodes/a.env": "NUM_GPUS=2\n", "etc/x.env": "NUM_GPUS=9\n"}
    write(tmp_path, {**files, "models/p.env": GOOD_PROFILE})
    assert load(tmp_path, "p", "a.example.org", environ()).settings.num_gpus == 2
    assert load(tmp_path, "p", "b", environ()).settings.num_gpus == 1
    assert load(tmp_path, "p", "../x", environ()).settings.num_gpus == 1


def test_settings_and_their_table_name_the_same_things():
    assert [spec.field for spec in SETTINGS] == [field.name for field in msgspec.structs.fields(Settings)]
    assert len({spec.name for spec in SETTINGS}) == len(SETTINGS)
    for spec in SETTINGS:
        assert spec.meaning.endswith(".") and spec.kind
        if "$" not in spec.default:
            spec.parse(spec.default) if spec.default else spec.parse.read("")


def test_the_three_files_load_in_under_30_ms(tmp_path):
    def once() -> float:
        begin = time.monotonic()
        assert load_text(tmp_path, SEED_CONFIG, GOOD_PROFILE, "NUM_GPUS=2\n").profile
        return time.monotonic() - begin

    wait_until(lambda: once() < 0.030, what="a load in under 30 ms, while no other process is in the way")
