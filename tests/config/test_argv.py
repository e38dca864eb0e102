"""What vLLM is started with: its arguments, its environment, and where it answers."""

import msgspec
import pytest

from llmwd.config import ConfigError, api_key, base_url, endpoint, serve_argv, serve_environment
from tests.config.homes import load_text


def loaded(tmp_path, arguments, config="LOOPBACK_ONLY=false\n"):
    words = " ".join("'" + word.replace("'", "'\\''") + "'" for word in arguments)
    result = load_text(tmp_path, config, f"MODEL_NAME=org/Model\nVLLM_ARGS=({words})\nLLM_VENV=/v\nNUM_GPUS=8\n")
    assert result.settings and result.profile, result.problems
    return result


def argv(tmp_path, *arguments, gpus=2, port=None):
    got = loaded(tmp_path, arguments)
    return serve_argv(got.profile, got.settings, gpus, port)


@pytest.mark.parametrize(
    "spelling",
    [
        [],
        ["--tensor-parallel-size", "4"],
        ["--tensor-parallel-size=4"],
        ["--tensor_parallel_size", "4"],
        ["--tensor_parallel_size=4"],
        ["--tensor-parallel_size=4"],
        ["-tp", "4"],
        ["-tp=4"],
        ["--tensor-parallel", "4"],
        ["--tensor=4"],
        ["-tp", "4", "--tensor-parallel-size=1"],
        ["--tensor-parallel-size"],
    ],
)
def test_every_spelling_of_tensor_parallel_size_becomes_the_leased_gpus_exactly_once(tmp_path, spelling):
    got = argv(tmp_path, "--a", *spelling, "--b", "c")
    assert got == [
        "/v/bin/vllm", "serve", "org/Model", "--a", "--b", "c",
        "--host", "127.0.0.1", "--port", "8000", "--tensor-parallel-size", "2",
    ]  # fmt: skip


def test_a_yaml_config_is_left_alone_and_the_command_line_wins_over_it(tmp_path):
    got = argv(tmp_path, "--config", "/etc/vllm.yaml")
    assert got[3:5] == ["--config", "/etc/vllm.yaml"] and got[-2:] == ["--tensor-parallel-size", "2"]


@pytest.mark.parametrize("host", [["--host", "127.0.0.2"], ["--host=0.0.0.0"]])
@pytest.mark.parametrize("port", [["--port", "9000"], ["--port=9000"]])
def test_host_and_port_are_added_only_where_the_profile_has_none(tmp_path, host, port):
    assert argv(tmp_path, *host)[-4:-2] == ["--port", "8000"]
    assert argv(tmp_path, *port)[-4:-2] == ["--host", "127.0.0.1"]
    assert argv(tmp_path, *host, *port)[3:-2] == [*host, *port]
    assert argv(tmp_path, port=9001)[-4:-2] == ["--port", "9001"]


@pytest.mark.parametrize(
    "arguments", [["-pp", "2"], ["--pipeline_parallel_size=2"], ["--data-parallel-size", "2"], ["-dp=2"]]
)
def test_other_parallelism_takes_its_share_of_the_gpus(tmp_path, arguments):
    assert argv(tmp_path, *arguments, gpus=8)[-1] == "4"
    assert argv(tmp_path, *arguments, "-tp", "7", gpus=2)[-1] == "1"
    for gpus in (1, 3):
        with pytest.raises(ConfigError, match=f"a multiple of 2 GPUs, not {gpus}"):
            argv(tmp_path, *arguments, gpus=gpus)


def test_json_reaches_vllm_with_its_quotes_from_a_string_and_from_an_array(tmp_path):
    for text in (
        "VLLM_ARGS='--compilation-config {\"cudagraph_mode\":\"PIECEWISE\"}'",
        'VLLM_ARGS="--compilation-config {\\"cudagraph_mode\\":\\"PIECEWISE\\"}"',
        "VLLM_ARGS=(--compilation-config '{\"cudagraph_mode\":\"PIECEWISE\"}')",
    ):
        got = load_text(tmp_path, "", f"MODEL_NAME=m\n{text}\n")
        assert serve_argv(got.profile, got.settings, 1)[3:5] == ["--compilation-config", '{"cudagraph_mode":"PIECEWISE"}']


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ("127.0.0.1", 8000, "org/Model")),
        (["--port=9000", "--served-model-name", "one", "two"], ("127.0.0.1", 9000, "one")),
        (["--served_model_name=one", "--host", "0.0.0.0", "--port", "1", "--port", "2"], ("127.0.0.1", 2, "one")),
        (["--host=::"], ("::1", 8000, "org/Model")),
        (["--host", "10.0.0.7"], ("10.0.0.7", 8000, "org/Model")),
    ],
)
def test_the_endpoint_is_what_the_arguments_say(tmp_path, arguments, expected):
    got = loaded(tmp_path, arguments)
    assert tuple(endpoint(got.profile, got.settings)) == expected


def test_the_address_has_the_scheme_and_the_key_that_the_server_wants(tmp_path):
    got = loaded(tmp_path, ["--host=::1", "--ssl-certfile", "/c.pem", "--api-key", "k1"])
    assert base_url(got.profile, got.settings) == "https://[::1]:8000" and api_key(got.profile, got.settings, "made") == "k1"
    plain, settings = loaded(tmp_path, []).profile, got.settings
    assert api_key(plain, settings, "made") == "made"
    assert api_key(plain, msgspec.structs.replace(settings, require_api_key=False), "made") is None
    assert api_key(msgspec.structs.replace(plain, exports={"VLLM_API_KEY": "k3"}), settings, "made") == "k3"


@pytest.mark.parametrize("args", (["--api-key", "k1"], ["--api_key=k1"], ["--api-k", "k1"]))
def test_secrets_among_the_arguments_reach_vllm_by_its_environment(tmp_path, args):
    got = loaded(tmp_path, ["--seed", "7", *args, "--hf-token", "hf_x", "--max-num-seqs", "4"])
    argv = serve_argv(got.profile, got.settings, 1)
    assert argv[3:7] == ["--seed", "7", "--max-num-seqs", "4"] and not {"k1", "hf_x"} & {*argv}
    env = serve_environment(got.profile, got.settings, [], {"HF_TOKEN": "other", "VLLM_API_KEY": "other"}, "made")
    assert env["VLLM_API_KEY"] == "k1" and env["HF_TOKEN"] == "hf_x"


def test_hf_token_without_a_value_is_no_secret_and_stays(tmp_path):
    got = loaded(tmp_path, ["--hf-token", "--seed", "7"])
    assert serve_argv(got.profile, got.settings, 1)[3:6] == ["--hf-token", "--seed", "7"]


def test_vllm_gets_its_environment_as_if_activated_and_nothing_of_ours(tmp_path):
    got = load_text(
        tmp_path,
        "export NCCL_DEBUG=WARN\nLLM_VENV=/v\nHF_HOME=/hf\nNTFY_TOPIC=t\nTUNNEL_NAME=x\n",
        "MODEL_NAME=m\nVLLM_ARGS=\nexport VLLM_USE_DEEP_GEMM=1 PYTHONHOME=/bad CUDA_VISIBLE_DEVICES=7\n",
    )
    base = {
        "HOME": "/home/me", "USER": "me", "PATH": "/ours/bin:/usr/bin", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8",
        "TMPDIR": "/tmp/me", "HF_TOKEN": "hf_x", "https_proxy": "http://p:1", "LD_LIBRARY_PATH": "/py/lib",
        "SLURM_JOB_ID": "7", "PYTHONPATH": "/ours", "PYTHONHOME": "/ours", "VIRTUAL_ENV": "/ours", "TUNNEL_TOKEN": "s",
        "NTFY_TOPIC": "t", "CUDA_VISIBLE_DEVICES": "0", "VLLM_ARGS": "x", "LLMWD_HOME": "/h", "NUM_GPUS": "3",
    }  # fmt: skip
    assert serve_environment(got.profile, got.settings, ["GPU-b", "GPU-a"], base, "made") == {
        "HOME": "/home/me", "USER": "me", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "TMPDIR": "/tmp/me",
        "HF_TOKEN": "hf_x", "https_proxy": "http://p:1", "LD_LIBRARY_PATH": "/py/lib",
        "PATH": "/v/bin:/ours/bin:/usr/bin", "VIRTUAL_ENV": "/v", "HF_HOME": "/hf",
        "NCCL_DEBUG": "WARN", "VLLM_API_KEY": "made", "VLLM_USE_DEEP_GEMM": "1", "VLLM_NO_USAGE_STATS": "1",
        "CUDA_VISIBLE_DEVICES": "GPU-b,GPU-a", "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }  # fmt: skip


def test_the_operators_word_on_usage_statistics_holds(tmp_path):
    for export in ("VLLM_NO_USAGE_STATS=0", "DO_NOT_TRACK=1"):
        got = load_text(tmp_path, "", f"MODEL_NAME=m\nVLLM_ARGS=\nexport {export}\n")
        env = serve_environment(got.profile, got.settings, [], {}, "made")
        assert env.get("VLLM_NO_USAGE_STATS") in ("0", None)


def test_cuda_setup_puts_the_overrides_first(tmp_path):
    for folder in ("cuda12/lib64", "cuda13"):
        (tmp_path / folder).mkdir(parents=True)
    cuda = f"CUDA_SETUP=true\nCUDA12_LIB={tmp_path}/cuda12/lib64\nCUDA_HOME_OVERRIDE={tmp_path}/cuda13\nLLM_VENV=/v\n"
    got = load_text(tmp_path, cuda + "export LD_LIBRARY_PATH=/own:\n")
    env = serve_environment(got.profile, got.settings, [], {"PATH": "/usr/bin"}, "made")
    assert env["CUDA_HOME"] == f"{tmp_path}/cuda13"
    assert env["LD_LIBRARY_PATH"] == f"{tmp_path}/cuda12/lib64:{tmp_path}/cuda13/lib64:/own"
    assert env["PATH"] == f"/v/bin:{tmp_path}/cuda13/bin:/usr/bin"
