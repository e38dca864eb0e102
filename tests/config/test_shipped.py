"""The files that are shipped load without a problem and say what the README promises."""

import re
import shutil
from pathlib import Path

import pytest

from llmwd.config import SETTINGS, endpoint, load, profile_names, serve_argv
from tests.config.homes import environ

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = (REPOSITORY / "etc/config.env.example").read_text()


@pytest.fixture
def home(tmp_path):
    shutil.copytree(REPOSITORY / "models", tmp_path / "models")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/config.env").write_text(EXAMPLE)
    return tmp_path


def test_the_bash_daemons_profiles_and_the_embedded_default_are_shipped():
    assert set(profile_names(REPOSITORY)) >= {"glm-4.7-flash", "minimax-m2.5", "qwen3-coder-fp8", "smollm2-135m"}


@pytest.mark.parametrize("name", profile_names(REPOSITORY))
def test_every_shipped_profile_loads_and_is_served_under_its_own_name(home, name):
    loaded = load(home, name, "n", environ())
    assert not loaded.problems and {warning.variable for warning in loaded.warnings} <= {"LLM_BIN"}
    assert endpoint(loaded.profile, loaded.settings) == ("127.0.0.1", 8000, name)
    argv = serve_argv(loaded.profile, loaded.settings, 2)
    assert argv.count("--tensor-parallel-size") == 1 and argv[-1] == "2"


def test_the_embedded_default_runs_from_its_own_folder_whatever_the_node_says(home):
    (home / "etc/config.env").write_text("LLM_VENV=/v\nLLM_BIN=/opt/wrapper\nNUM_GPUS=4\n")
    profile = load(home, "smollm2-135m", "n", environ(LLMWD_EMBEDDED_DIR="/e")).profile
    assert (profile.model_name, profile.llm_bin, profile.num_gpus) == ("/e/smollm2-135m", "/e/venv/bin/vllm", 1)
    assert profile.exports == {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


def test_json_of_a_shipped_profile_keeps_its_quotes(home):
    args = load(home, "minimax-m2.5", "n", environ()).profile.vllm_args
    assert args[args.index("--compilation-config") + 1] == '{"cudagraph_mode":"PIECEWISE"}'


def test_the_example_shows_every_setting_with_its_default(home):
    shown = dict(re.findall(r'^#?([A-Z][A-Z0-9_]*)="?([^"\s]*)"?\s+#', EXAMPLE, re.MULTILINE))
    assert shown == {spec.name: spec.default for spec in SETTINGS}


def test_the_example_with_every_comment_taken_away_means_the_defaults(home):
    before = load(home, "smollm2-135m", "n", environ()).settings
    (home / "etc/config.env").write_text(re.sub(r"^#(?=[A-Z0-9_]+=)", "", EXAMPLE, flags=re.MULTILINE))
    loaded = load(home, "smollm2-135m", "n", environ(CLOUDFLARED_CREDS=""))
    assert not loaded.problems
    after = {spec.field: getattr(loaded.settings, spec.field) for spec in SETTINGS}
    assert after | {"cloudflared_creds": ""} == {spec.field: getattr(before, spec.field) for spec in SETTINGS}
