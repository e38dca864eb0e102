"""What cloudflared is started with and what its words mean."""

import base64
import json
import time

import pytest

from llmwd.core import tunnelconfig
from llmwd.core.tunnelconfig import NAMED, QUICK, TOKEN, check_credentials, check_token, door_origin, origin, recipe
from llmwd.vocab import NodePhase, Phase
from tests.workers.harness import server_fact

TUNNEL = "6f0b2f36-3f4c-4d40-9a2f-0f1d2c3b4a59"
GOOD = {"AccountTag": "a" * 32, "TunnelSecret": base64.b64encode(b"s" * 32).decode(), "TunnelID": TUNNEL}


def check(content: object, tunnel_id: str = TUNNEL) -> tunnelconfig.Credentials:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return check_credentials("/c.json", text, tunnel_id)


def test_good_credentials_pass_without_a_word():
    assert check(GOOD) == tunnelconfig.Credentials(TUNNEL, (GOOD["TunnelSecret"],))
    assert check(GOOD, tunnel_id=TUNNEL.upper()).problems == ()


def test_without_a_tunnel_id_in_the_settings_the_files_own_is_taken():
    assert check(GOOD, tunnel_id="").tunnel_id == TUNNEL


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ([], "AccountTag, TunnelSecret, TunnelID is missing"),
        ({}, "AccountTag, TunnelSecret, TunnelID is missing"),
        (GOOD | {"AccountTag": 7}, "AccountTag is missing"),
        (GOOD | {"TunnelSecret": "not base64!"}, "secret is damaged"),
        (GOOD | {"TunnelSecret": base64.b64encode(b"s" * 16).decode()}, "shorter than 32 bytes"),
        (GOOD | {"TunnelID": "chat"}, "no UUID"),
        (GOOD | {"TunnelID": "0" * 36}, f"TUNNEL_ID is {TUNNEL}"),
    ],
)
def test_credentials_that_cannot_work_are_refused_with_a_sentence(content, told):
    found = check(content)
    assert told in " ".join(found.problems) and all(problem.startswith("/c.json") for problem in found.problems)


def test_everything_that_is_wrong_with_credentials_is_told_together():
    assert len(check(GOOD | {"TunnelSecret": "!", "TunnelID": "7"}).problems) == 3


def token(content: object) -> bytes:
    return base64.b64encode(json.dumps(content).encode()) + b"\n"


def test_a_token_is_judged_as_its_credentials_are():
    good = {"a": "a" * 32, "s": GOOD["TunnelSecret"], "t": TUNNEL}
    found = check_token("/t", token(good))
    assert found.problems == () and found.tunnel_id == TUNNEL and token(good).decode().strip() in found.secrets
    assert "holds no tunnel's token" in check_token("/t", b"TUNNEL_TOKEN=abc").problems[0]
    assert "s, t is missing" in check_token("/t", token({"a": "b"})).problems[0]
    assert len(check_token("/t", token(good | {"s": "c2hvcnQ=", "t": "x"})).problems) == 2


def made(
    url: str = "http://127.0.0.1:8000", hostname: str = "llm.example.org", mode: str = NAMED, **environ: str
) -> tunnelconfig.Recipe:
    return recipe("/bin/cloudflared", "/r/c.yml", mode, "http2", hostname, TUNNEL, '/h/it"s.json', url, environ)


def test_the_configuration_leads_one_name_to_the_server_and_everything_else_to_404():
    config = made().config
    assert config.index('hostname: "llm.example.org"') < config.index('service: "http://127.0.0.1:8000"')
    assert config.endswith("  - service: http_status:404\n")
    assert 'credentials-file: "/h/it\\"s.json"' in config
    assert "noTLSVerify" not in config and "noTLSVerify: true" in made("https://127.0.0.1:8000").config


def test_flags_of_tunnel_stand_before_run_and_nothing_secret_is_among_them():
    argv = made().argv
    assert argv[-1] == "run" and argv[:4] == ("/bin/cloudflared", "tunnel", "--config", "/r/c.yml")
    assert not {"--token", "--credentials-file", "--url"} & set(argv)


def test_a_token_is_named_by_its_file_after_run_and_a_quick_tunnel_by_its_address():
    assert made(mode=TOKEN).argv[-3:] == ("run", "--token-file", '/h/it"s.json')
    assert "credentials-file" not in made(mode=TOKEN).config and "tunnel:" not in made(mode=TOKEN).config
    quick = made("unix:/r/door.sock", mode=QUICK)
    assert quick.argv[-2:] == ("--url", "http://localhost") and quick.config.endswith('  - service: "unix:/r/door.sock"\n')


def test_nothing_but_its_paths_and_certificates_reaches_cloudflared():
    kept = {"PATH": "/bin", "HOME": "/h", "SSL_CERT_FILE": "/site.pem", "SSL_CERT_DIR": "/site"}
    assert made(**kept, TUNNEL_TOKEN="t", HTTPS_PROXY="p", NO_TLS_VERIFY="1").env == kept


@pytest.mark.parametrize(
    ("phase", "running", "wanted"),
    [
        (NodePhase.serving, False, True),
        (NodePhase.serving, True, True),
        (NodePhase.yielding, True, True),
        (NodePhase.yielding, False, False),
        (NodePhase.waiting, True, False),
        (NodePhase.loading, True, False),
    ],
)
def test_the_tunnel_comes_with_the_served_model_and_goes_after_it(phase, running, wanted):
    now_s = time.monotonic()
    fact = server_fact(phase, url="http://127.0.0.1:1", at_s=now_s - 1)
    assert origin(fact, running, 20.0, now_s) == ("http://127.0.0.1:1" if wanted else None)


@pytest.mark.parametrize(
    ("phase", "for_s", "running", "wanted"),
    [
        (Phase.ready, 0, False, True), (Phase.starting, 0, False, False), (Phase.starting, 99, True, True),
        (Phase.backoff, 99, True, True), (Phase.failed, 0, True, False), (None, 0, True, False),
        (Phase.stopped, 0, True, True), (Phase.stopped, 14, True, True), (Phase.stopped, 15, True, False),
        (Phase.stopped, 0, False, False),
    ],
)  # fmt: skip
def test_with_a_front_door_the_tunnel_follows_the_door_and_stays_while_it_is_restarted(phase, for_s, running, wanted):
    def origin_at(at_s: float) -> str | None:
        return door_origin("/r/door.sock", phase, 100.0 - for_s, at_s, running, 20.0, 100.0)

    assert origin_at(99.0) == ("unix:/r/door.sock" if wanted else None)
    assert origin_at(79.0) is None


def test_a_fact_that_nobody_repeats_wants_no_tunnel():
    fact = server_fact(NodePhase.serving, at_s=100.0)
    assert origin(fact, True, 20.0, 119.0) and origin(fact, True, 20.0, 121.0) is None and origin(None, True, 20.0, 1) is None


def test_a_tunnel_without_a_connection_is_not_shown_as_ready():
    assert tunnelconfig.shown_phase(Phase.ready, False) is Phase.starting
    assert tunnelconfig.shown_phase(Phase.ready, True) is Phase.ready
    assert tunnelconfig.shown_phase(Phase.failed, False) is Phase.failed
