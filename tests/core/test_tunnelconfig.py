"""What cloudflared is started with and what its words mean."""

import base64
import json
import time

import pytest

from llmwd.core import tunnelconfig
from llmwd.core.tunnelconfig import check_credentials, death, last_error, metrics_address, origin, recipe, refusals
from llmwd.vocab import NodePhase, Phase
from tests.workers.harness import server_fact

TUNNEL = "6f0b2f36-3f4c-4d40-9a2f-0f1d2c3b4a59"
GOOD = {"AccountTag": "a" * 32, "TunnelSecret": base64.b64encode(b"s" * 32).decode(), "TunnelID": TUNNEL}


def check(content: object, mode: int = 0o100600, tunnel_id: str = TUNNEL) -> tunnelconfig.Credentials:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return check_credentials("/c.json", text, mode, tunnel_id)


def test_good_credentials_pass_without_a_word():
    assert check(GOOD) == tunnelconfig.Credentials(TUNNEL, GOOD["TunnelSecret"])
    assert check(GOOD, tunnel_id=TUNNEL.upper()).problem == ""


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
        (GOOD | {"TunnelSecret": "not base64!"}, "TunnelSecret is damaged"),
        (GOOD | {"TunnelID": "0" * 36}, f"TUNNEL_ID is {TUNNEL}"),
    ],
)
def test_credentials_that_cannot_work_are_refused_with_a_sentence(content, told):
    found = check(content)
    assert told in found.problem and found.problem.startswith("/c.json")


def test_what_is_not_right_but_may_work_is_a_warning():
    assert "chmod 600 /c.json" in check(GOOD, mode=0o100640).problem
    short = base64.b64encode(b"s" * 16).decode()
    assert "shorter than 32 bytes" in check(GOOD | {"TunnelSecret": short}).warnings[0]


def made(url: str = "http://127.0.0.1:8000", hostname: str = "llm.example.org", **environ: str) -> tunnelconfig.Recipe:
    return recipe("/bin/cloudflared", "/r/c.yml", hostname, TUNNEL, '/h/it"s.json', url, environ)


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


def test_nothing_but_path_and_home_reaches_cloudflared():
    env = made(PATH="/bin", HOME="/h", TUNNEL_TOKEN="t", HTTPS_PROXY="p", NO_TLS_VERIFY="1").env
    assert env == {"PATH": "/bin", "HOME": "/h"}


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


def test_a_fact_that_nobody_repeats_wants_no_tunnel():
    fact = server_fact(NodePhase.serving, at_s=100.0)
    assert origin(fact, True, 20.0, 119.0) and origin(fact, True, 20.0, 121.0) is None and origin(None, True, 20.0, 1) is None


LOG = """\
2026-11-23T19:15:00Z INF Starting tunnel tunnelID=6f0b2f36
2026-11-23T19:15:00Z INF Starting metrics server on 127.0.0.1:45787/metrics
2026-11-23T19:15:01Z ERR Register tunnel error from server side error="Unauthorized: Invalid tunnel secret" connIndex=0
2026-11-23T19:15:01Z INF Retrying connection in up to 2s connIndex=0
2026-11-23T19:15:02Z ERR Connection terminated connIndex=0
2026-11-23T19:15:02Z ERR no more connections active and exiting
"""


def test_the_address_of_the_metrics_server_is_found_in_the_log():
    assert metrics_address(LOG) == "127.0.0.1:45787"
    assert metrics_address("") is None and metrics_address("Starting metrics server on 10.0.0.1:80/metrics") is None


def test_the_cause_is_the_last_error_that_is_no_part_of_a_clean_stop():
    assert last_error(LOG).startswith("Register tunnel error from server side") and last_error("x\n") == ""
    assert len(last_error("2026-11-23T19:15:02Z ERR " + "y" * 900)) == tunnelconfig.LONGEST_ERROR


def test_refused_registrations_are_counted_since_cloudflared_never_ends_by_itself():
    assert refusals(LOG) == 1
    assert refusals('2026-11-23T19:15:01Z ERR Register tunnel error from server side error="try again"') == 0


@pytest.mark.parametrize(
    ("status", "error", "permanent", "told"),
    [
        (0, "", True, "does not know our arguments"),
        (255, "", True, "exit code 255"),
        (None, "no such file", True, "no such file"),
        (1, "", False, "exit code 1"),
        (-9, "", False, "killed by signal 9"),
        (None, "", False, "without a word"),
    ],
)
def test_an_unasked_end_is_permanent_only_where_a_restart_mends_nothing(status, error, permanent, told):
    found, how = death(status, error, LOG)
    assert found is permanent and told in how


def test_a_tunnel_without_a_connection_is_not_shown_as_ready():
    assert tunnelconfig.shown_phase(Phase.ready, False) is Phase.starting
    assert tunnelconfig.shown_phase(Phase.ready, True) is Phase.ready
    assert tunnelconfig.shown_phase(Phase.failed, False) is Phase.failed
