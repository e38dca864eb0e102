"""Secrets out of texts: those that were learnt however they are written, and others by their form."""

import json
import time
from urllib.parse import quote

import pytest

from llmwd import redact

SECRET = "Sekret-abcdef-123456"


@pytest.mark.parametrize(
    "text",
    [
        '{"api_key": "@"}', '{"error": "{\\"api_key\\": \\"@\\"}"}', "{'api_key': ['@', '@'], 'hf_token': '@'}", "api_key='@'",
        "--api-key=@", "--api-k @", "--api_key @", '--api-key "@ @"', "--api-key '@ @'", "--hf-tok=@", "--token @", "--wandb-api-token=@",
        "X-Api-Key: @", 'curl --header "x-api-key: @"', "Authorization: Basic @", "Authorization: Bearer @", '"Authorization": "Basic @"',
        '"TunnelSecret": "@"', '{"AccountTag":"a","TunnelSecret":"@"}', "HF_TOKEN=@", 'HF_TOKEN="@ @"', "WANDB_API_KEY: @",
        "VLLM_KEYS=@", "AWS_CREDENTIALS=@", "DB_PASS=@", "GITHUB_PAT='@'",
        "tgram://@/42", "slack://@/@/@", "discord://1234/@", "mailtos://a.b?pass=@", "json://a.b/?auth=@", "https://ntfy.sh/?auth=@",
        "https://a.b/x?size=1&access_token=@", "http://me:@@a.b/x", "http://@@a.b/x",
    ],
)  # fmt: skip
def test_what_was_never_learnt_is_known_by_its_form(text: str) -> None:
    masked = redact.mask(text.replace("@", SECRET) if "@@" not in text else text.replace("@", SECRET, 1))
    assert SECRET not in masked and redact.HIDDEN in masked


@pytest.mark.parametrize("text", ["hf_abcdefgh12", "tk_AgQdq7mVBoFD37zQ", "gho_abcdefgh1234", "glpat-abcdefgh", "AKIAIOSFODNN7EXAMPLE", "xoxb-12345678-x", "eyJhIjoiYWNjb3VudCJ9.eyJ0Ijo"])
def test_well_known_kinds_of_token_are_known_anywhere(text: str) -> None:
    assert redact.mask(f"(it is {text}, they say)") == "(it is ***, they say)"


@pytest.mark.parametrize(
    "text",
    [
        "etc/config.env:2: REQUIRE_API_KEY: must be true or false, not 'perhaps'",
        "etc/config.env:2: WANDB_API_KEY: bash takes a word of this line for a command",
        "every user of this node can use the server: REQUIRE_API_KEY is off",
        "more than one key for --api-key: several could be given to vLLM on its command line only",
        "asks for an API key: the profile's own, or else the one that llmwd makes for this node",
        "NTFY_TOKEN_FILE=/home/me/.ntfy-token: cannot be read", "--max-num-batched-tokens 8192", "max_tokens=4096 'max_tokens': 4096",
        "the user with uid 1000 listens on tcp://127.0.0.1:8000 and ipc:///run/user/1000/llmwd/bus-vllm", "bypass=yes-please",
        "export HF_HUB_OFFLINE=1 hf_hub_offline hf_home=/x/y SK-12345678901234", "basic authentication is not supported", "GET https://ntfy.sh/v1/health?poll=1",
    ],
)  # fmt: skip
def test_sentences_stay_as_they_are(text: str) -> None:
    assert redact.mask(text) == text


@pytest.mark.parametrize("secret", ["a\"b'c\\de/f", 'quo"ted-secret', "apo'strophe", "back\\slash\\x", "with a blank+plus", "sécrètement"])
def test_what_was_learnt_is_hidden_as_python_json_and_addresses_write_it(secret: str) -> None:
    redact.learn_variables({"ANY_TOKEN": secret})
    for written in (secret, repr(secret), repr(f"it's \"{secret}\""), json.dumps(secret), json.dumps(secret, ensure_ascii=False), quote(secret, safe="")):
        masked = redact.mask(f"an error about <{written}> here")
        assert "***" in masked and masked.startswith("an error about <") and masked.endswith("> here") and len(masked) < 40, masked


def test_names_that_mean_secrets_are_learnt_and_a_file_that_holds_one_is_none() -> None:
    redact.learn_variables({
        "A_KEYS": "first-one,second-one", "B_CREDENTIALS": "third-one", "C_PASS": "fourth-one", "D_PAT": "fifth-one",
        "GOOGLE_APPLICATION_CREDENTIALS": "/home/me/gcp.json", "NTFY_TOKEN_FILE": "/home/me/token", "TUNNEL_TOKEN_FILE": "sixth-one",
        "BYPASS": "seventh-one",
    })  # fmt: skip
    said = "first-one second-one third-one fourth-one fifth-one sixth-one"
    assert redact.mask(said) == " ".join(["***"] * 6)
    kept = "/home/me/gcp.json /home/me/token seventh-one"
    assert redact.mask(kept) == kept


def test_a_key_of_several_lines_is_hidden_line_by_line() -> None:
    redact.learn_variables({"TLS_KEY": "-----BEGIN-----\nMIIEvQIBADANBgkqhkiG9w0BAQ\nEFAASCBKcwggSjAgEAAoIBAQ\nshort\n"})
    assert redact.mask("read MIIEvQIBADANBgkqhkiG9w0BAQ, short") == "read ***, short"


def test_a_settings_file_is_learnt_as_it_was_meant() -> None:
    redact.learn_file("export HF_TOKEN = first-one\nB_KEY=\"second one\"\nC_SECRET='third one'\nTUNNEL_TOKEN_FILE=fourth-one\nD_TOKEN_FILE=$HOME/x-token\n")
    assert redact.mask("first-one second one third one fourth-one $HOME/x-token") == "*** *** *** *** $HOME/x-token"


def test_options_that_show_a_secret_on_a_command_line_are_told() -> None:
    redact.learn(["learnt-one"])
    words = ["serve", "--a", '{"api_key": "abcdefgh"}', "--b=http://me:secret@a.b/", "--c", "learnt-one", "learnt-one", "--d", "x", "--token", "e"]
    assert redact.telling_arguments(words) == ("--a", "--b", "--c", "--token")
    assert redact.mask_arguments(["--api-k", "a", "--hf-tok=b", "--api-keyed", "c"]) == ("--api-k", "***", "--hf-tok=***", "--api-keyed", "c")


def test_hostile_text_is_masked_in_no_time() -> None:
    begin = time.monotonic()
    for text in ("a_" * 40_000, "--" * 40_000, '"' * 80_000, "key=" * 20_000, "key='" * 16_000, "x-a" * 27_000, "?a_" * 27_000, "A" * 80_000, "://a" * 20_000):
        redact.mask(text)
    assert time.monotonic() - begin < 20
