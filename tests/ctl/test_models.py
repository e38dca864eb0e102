"""models, check, and switch-model.sh in front of them."""

import json
import subprocess

from tests.ctl.stand import CHECKOUT
from tests.fakes import cloudflared


def activate(stand, name):
    (stand.dirs.home / "active-model.env").symlink_to(f"models/{name}.env")


def switch_model(stand, *words):
    return subprocess.run(
        [CHECKOUT / "switch-model.sh", *words], env=stand.env, capture_output=True, text=True, timeout=60
    )


def test_the_list_is_the_seeds(stand):
    for name in ("qwen3-coder-fp8", "glm-4.7-flash", "minimax-m2.5"):
        stand.profile(name)
    activate(stand, "glm-4.7-flash")
    expected = "  * glm-4.7-flash  (active)\n    minimax-m2.5\n    qwen3-coder-fp8\n"
    assert stand.ctl("models").stdout == expected
    assert switch_model(stand).stdout == expected


def test_a_profile_with_mistakes_is_marked(stand):
    stand.profile("good")
    (stand.dirs.home / "models/bad.env").write_text("VLLM_ARGS=''\n")
    assert stand.ctl("models").stdout == "    bad  (not valid: llmwd-ctl check bad)\n    good\n"


def test_json_lists_name_active_and_problems(stand):
    stand.profile("good")
    (stand.dirs.home / "models/bad.env").write_text("VLLM_ARGS=''\n")
    activate(stand, "good")
    bad, good = json.loads(stand.ctl("models", "--json").stdout)
    assert good == {"name": "good", "active": True, "problems": []}
    assert (bad["name"], bad["active"]) == ("bad", False) and "MODEL_NAME" in bad["problems"][0]


def test_without_any_profile_it_says_so(stand):
    done = stand.ctl("models")
    assert done.returncode == 1 and "there is no profile in" in done.stderr


def test_check_passes_a_right_profile_and_finds_a_missing_program(stand):
    stand.profile("good")
    activate(stand, "good")
    assert stand.ctl("check").returncode == 0
    (stand.dirs.home / "venv/bin/vllm").unlink()
    done = stand.ctl("check")
    assert done.returncode == 1
    assert "LLM_BIN" in done.stderr and "venv/bin/vllm" in done.stderr and "etc/config.env" in done.stderr


def test_check_tells_everything_that_is_wrong_with_the_tunnel_together(stand, tmp_path):
    stand.profile("good")
    activate(stand, "good")
    tunnel = "6f0b2f36-3f4c-4d40-9a2f-0f1d2c3b4a59"
    secret = tmp_path / "credentials.json"
    secret.write_text(json.dumps({"AccountTag": "a", "TunnelSecret": "c2hvcnQ=", "TunnelID": tunnel.replace("6", "7")}))
    secret.chmod(0o644)
    config = stand.dirs.home / "etc/config.env"
    kept = config.read_text() if config.exists() else ""
    settings = f"TUNNEL_HOSTNAME=llm.example.org\nTUNNEL_ID={tunnel}\nCLOUDFLARED_CREDS={secret}\nCLOUDFLARED_BIN="
    config.write_text(f"{kept}\n{settings}/nowhere/cloudflared\n")
    done = stand.ctl("check")
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 4, done.stderr
    for told in ("chmod 600", "shorter than 32 bytes", "correct one of them", "CLOUDFLARED_BIN: /nowhere/cloudflared is not there"):
        assert told in done.stderr
    secret.write_text(json.dumps({"AccountTag": "a", "TunnelSecret": "c2VjcmV0" * 6, "TunnelID": tunnel}))
    secret.chmod(0o600)
    config.write_text(f"{kept}\n{settings}{cloudflared.wrapper(tmp_path, '--refuses-config', 'no')}\n")
    assert "refuses its configuration" in stand.ctl("check").stderr
    cloudflared.wrapper(tmp_path)
    assert stand.ctl("check").returncode == 0


def test_switch_model_switches(stand):
    stand.profile("a")
    stand.profile("b")
    assert switch_model(stand, "b").returncode == 0
    assert switch_model(stand).stdout == "    a\n  * b  (active)\n"


def test_switch_model_to_an_unknown_name_lists_the_known_ones(stand):
    stand.profile("a")
    done = switch_model(stand, "nope")
    assert done.returncode == 1 and "there is no profile nope" in done.stderr and "  a\n" in done.stderr


def test_switch_model_takes_no_options_and_one_name(stand):
    assert switch_model(stand, "--wait").returncode == 2
    assert switch_model(stand, "a", "b").returncode == 2
    assert switch_model(stand, "--help").returncode == 0


def test_check_tells_what_keeps_notices_from_being_sent(stand, tmp_path):
    stand.profile("good")
    activate(stand, "good")
    token, config = tmp_path / "token", stand.dirs.home / "etc/config.env"
    token.write_text("tk_secret_secret\n")
    token.chmod(0o644)
    kept = config.read_text() if config.exists() else ""
    config.write_text(
        f"{kept}\nNTFY_TOPIC=t\nNTFY_TOKEN_FILE={token}\nNTFY_USER=ann\nNOTIFY_URLS='nosuchservice://very-secret-token json://127.0.0.1:9/x'\n"
    )
    config.chmod(0o600)
    done = stand.ctl("check")
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 4, done.stderr
    for told in (f"chmod 600 {token}", "NTFY_PASSWORD_FILE is not set", "set one of them", "apprise does not understand"):
        assert told in done.stderr
    assert "very-secret" not in done.stderr and "tk_secret" not in done.stderr
    token.chmod(0o600)
    config.write_text(f"{kept}\nNTFY_TOPIC=t\nNTFY_TOKEN_FILE={token}\nNOTIFY_URLS=json://127.0.0.1:9/x\n")
    assert stand.ctl("check").returncode == 0


def test_profiles_that_cannot_be_read_are_not_said_to_be_none(stand):
    stand.profile("good")
    folder = stand.dirs.home / "models"
    folder.chmod(0)
    try:
        for words in (("models",), ("models", "--names"), ("switch", "good")):
            assert "models cannot be read: Permission denied" in stand.refused(*words)
    finally:
        folder.chmod(0o700)


def test_a_home_that_is_not_there_is_said(stand):
    stand.env["LLMWD_HOME"] = "/nowhere/llmwd"
    for words in (("models",), ("check",), ("switch", "good")):
        assert "LLMWD_HOME is /nowhere/llmwd, and there is no such folder" in stand.refused(*words)
    assert stand.ctl("report").returncode == 0  # the journal is enough
