"""The front door of a whole llmwd, as people outside meet it: OpenAI's own client, keys, waiting."""

import json
import signal
import stat
import statistics
import time
from concurrent import futures

import httpx
import openai
import pytest

from llmwd.core import doorwanted
from llmwd.workers.doorkeyring import READ_EVERY_S
from tests.tree.outside import SECRETS, hashes, outside, token  # noqa: F401
from tests.waiting import wait_until


def test_a_job_in_the_middle_of_a_stream_ends_it_and_clients_are_told_until_the_model_is_back(outside):
    out = outside({"FAKE_READY_AFTER": 1})
    tree = out.tree
    wait_until(lambda: out.says("loading"), what="503 while loading")
    tree.serving()
    wait_until(lambda: out.status("GET", "/v1/models") == 200 and out.status("GET", "/health") == 200)
    pid = out.caddy_pid
    answer = out.client().chat.completions.create(model="fake", messages=[{"role": "user", "content": "a"}], max_tokens=2)
    assert answer.choices[0].message.content == " ok ok"
    with pytest.raises(openai.AuthenticationError):
        out.client("bob").models.list()

    stream = out.stream(100_000)
    assert next(iter(stream)).choices[0].delta.content == " ok"
    tree.job(1, "0-7")
    began_s = time.monotonic()
    with pytest.raises((openai.APIConnectionError, httpx.RemoteProtocolError)):
        for _ in stream:
            pass
    assert time.monotonic() - began_s < 20
    wait_until(lambda: out.says("yielded_to_job"))  # the model may be gone before the door has heard why
    with pytest.raises(openai.APIStatusError) as refused:
        out.stream(1)
    assert refused.value.status_code == 503 and refused.value.code == "yielded_to_job"
    assert int(refused.value.response.headers["retry-after"]) > 0
    assert [model.id for model in out.client().models.list()] == ["fake"]
    assert out.status("GET", "/health") == 503

    tree.job_over(1)
    tree.serving()
    wait_until(lambda: out.status("GET", "/health") == 200)
    assert [part.choices[0].delta.content for part in out.stream(3)] == [" ok"] * 3
    assert out.caddy_pid == pid
    log = tree.log("caddy")
    assert '"user_id":"alice"' in log and SECRETS["alice"] not in log and token("alice") not in log
    assert stat.S_IMODE((tree.state / "logs" / "caddy.log").stat().st_mode) == 0o600


def test_only_what_is_listed_passes_however_it_is_written(outside):
    out = outside(DOOR_ALLOW="/version").served()
    assert out.status("GET", "/version") == 200  # by DOOR_ALLOW
    for path in (
        "/metrics", "/metrics/../health", "//health", "/health/../metrics", "/v1/../metrics", "/%6detrics", "/metrics/%2e%2e/health",
        "/V1/models", "/v1/models/", "/v1/models/fake", "/v1%2fmodels/..", "/v1/load_lora_adapter", "/sleep", "/docs", "/invocations",
    ):  # fmt: skip
        assert out.status("GET", path) == 404, path
        assert out.status("POST", path, body=b"{}") == 404, path
    assert out.status("GET", "/v1/completions") == 405
    assert out.status("DELETE", "/v1/models") == 405
    status, headers, body = out.ask("GET", "/", {})
    assert status == 200 and headers["content-type"].startswith("text/html") and b"fake" in body
    for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": f"Bearer {token('alice', 'wrong')}"}, {"x-api-key": "x"}):
        status, _, body = out.ask("GET", "/v1/models", headers)
        assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")
    own = (out.tree.state / "api-key").read_text().strip()  # vLLM's own key opens nothing here
    assert out.status("GET", "/v1/models", {"Authorization": f"Bearer {own}"}) == 401
    assert out.status("GET", "/v1/models", {"x-api-key": token("alice")}) == 200


def test_keys_come_go_and_expire_within_a_second_and_no_stream_is_cut(outside):
    out = outside().served()
    bob, pid = {"Authorization": f"Bearer {token('bob')}"}, out.caddy_pid
    stream = out.streaming(1500)
    took_s = []
    for wanted in (200, 401, 200, 401, 200, 401):
        out.keys(alice=None, **({"bob": None} if wanted == 200 else {}))
        began_s = time.monotonic()
        wait_until(lambda: out.status("GET", "/health", bob) == wanted, 20, what=f"{wanted} for bob")
        took_s.append(time.monotonic() - began_s)
    assert statistics.median(took_s) <= 1.0 + READ_EVERY_S, took_s  # (of several: others may need the machine just then)
    ends_at = time.time() + 8
    out.keys(alice=None, bob=ends_at)
    wait_until(lambda: out.status("GET", "/health", bob) == 200, 7.9)
    wait_until(lambda: out.status("GET", "/health", bob) == 401, 30, what="the end of bob's key")
    assert time.time() >= ends_at
    assert sum(1 for _ in stream) == 1499 and out.caddy_pid == pid
    assert out.status("GET", "/health") == 200


def test_without_a_key_that_holds_it_is_shut_and_says_what_is_true(outside):
    out = outside()
    shut = lambda words: wait_until(lambda: words in out.ask("GET", "/health")[2])
    out.keys()
    shut(b"has been made yet")
    out.keys(alice=1.0)
    shut(b"has expired")
    (out.tree.state / "door-keys.json").write_text("{")
    wait_until(lambda: "damaged" in out.tree.look().facts.door.detail)
    shut(b"cannot be read")
    assert out.says("no_keys")


def test_a_request_may_wait_for_a_model_that_restarts_even_before_its_end_has_been_noticed(outside):
    # A lease that outlasts the stop: else the manager is killed for it, or begins again with a lease that is about to end.
    out = outside({"FAKE_READY_AFTER": 1}, DOOR_HOLD=20, LEASE_TTL=60).served()
    out.tree.signal("vllm", signal.SIGSTOP)  # who would notice
    out.tree.signal("server", signal.SIGKILL)
    wait_until(lambda: not out.tree.answers())
    assert out.told_to(doorwanted.OPEN)
    headers = {"Authorization": f"Bearer {token('alice')}", "Content-Type": "application/json"}
    with futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(out.ask, "POST", "/v1/completions", headers, b'{"model": "fake", "prompt": "a", "max_tokens": 1}')
        with pytest.raises(futures.TimeoutError):
            waiting.result(1)
        out.tree.signal("vllm", signal.SIGCONT)
        assert waiting.result(30)[0] == 200
    assert out.tree.status()["server"]["deaths"] == 1, out.tree.journal("server_died")


def test_a_request_that_waits_is_told_when_a_job_comes_instead_of_the_model(outside):
    out = outside({"FAKE_READY_AFTER": 600}, DOOR_HOLD=300)
    wait_until(lambda: out.status("GET", "/") == 200)
    wait_until(lambda: out.told_to(doorwanted.HOLDING))
    with futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(out.ask, "POST", "/v1/completions", None, b"{}")
        with pytest.raises(futures.TimeoutError):
            waiting.result(1)
        out.tree.job(1, "0-7")
        status, headers, body = waiting.result(20)
    assert (status, json.loads(body)["error"]["code"]) == (503, "yielded_to_job") and headers["retry-after"]


def test_a_door_that_shall_be_open_asks_nobody(outside):
    out = outside(DOOR_OPEN="yes-i-mean-it")
    out.keys()
    out.tree.serving()
    wait_until(lambda: out.status("GET", "/v1/models", {}) == 200)
