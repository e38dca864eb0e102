"""The fake server does what the tests that use it rely on."""

import http.client
import json
import signal

import pytest

from llmwd.adapters import procs
from tests.adapters.held import hold  # noqa: F401
from tests.waiting import wait_until


def ask(port: int, path: str, body: dict | None = None, timeout_s: float = 30, key: str = "") -> tuple[int, str]:
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        link.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
        answer = link.getresponse()
        return answer.status, answer.read().decode()
    finally:
        link.close()


def healthy(port: int) -> bool:
    try:
        return ask(port, "/health")[0] == 200
    except ConnectionRefusedError:
        return False


def test_it_refuses_connections_until_it_is_ready(hold):
    held = hold("--ready-after", "600")
    with pytest.raises(ConnectionRefusedError):
        ask(held.report()["port"], "/health")


@pytest.mark.parametrize("path, part", [("/v1/completions", "text"), ("/v1/chat/completions", "delta")])
def test_it_answers_and_streams(hold, path, part):
    port = hold("--served-model-name", "a", "b", "--api-key", "k").report()["port"]
    wait_until(lambda: healthy(port))
    assert ask(port, path, {"model": "b", "max_tokens": 1})[0] == 401
    status, text = ask(port, path, {"model": "b", "max_tokens": 1}, key="k")
    assert (status, json.loads(text)["usage"]["completion_tokens"]) == (200, 1)
    events = ask(port, path, {"model": "a", "max_tokens": 3, "stream": True}, key="k")[1].split("\n\n")
    assert len(events) == 5 and events[3] == "data: [DONE]" and part in json.loads(events[0][6:])["choices"][0]
    assert ask(port, path, {"model": "c"}, key="k")[0] == 404
    assert [model["id"] for model in json.loads(ask(port, "/v1/models", key="k")[1])["data"]] == ["a", "b"]


def test_it_lies_about_health(hold):
    port = hold("--lie-about-health").report()["port"]
    wait_until(lambda: healthy(port))
    with pytest.raises(TimeoutError):
        ask(port, "/v1/completions", {"model": "m", "max_tokens": 1}, timeout_s=0.3)
    assert healthy(port)


def test_it_swallows_the_first_sigterm_while_it_loads(hold):
    held = hold("--ready-after", "600", "--swallow-term-while-loading")
    pid = held.report()["pid"]
    assert procs.signal_process(pid, procs.start_ticks(pid), signal.SIGTERM)
    wait_until(lambda: "SIGTERM swallowed" in held.output())
    state = held.released(grace_s=60)  # sends the second
    assert (state.status, state.killed_s) == (-15, None)


def test_its_engine_takes_it_along_with_exit_code_0(hold):
    held = hold("--engine")
    engine = held.report()["pids"]["engine"][0]
    assert procs.signal_process(engine, procs.start_ticks(engine), signal.SIGKILL)
    assert held.until(lambda state: state.gone_s).status == 0


def test_its_flags_can_be_variables(hold):
    state = hold(env={"FAKE_EXIT_AFTER": "0.1", "FAKE_EXIT_CODE": "9"}).until(lambda state: state.gone_s)
    assert state.status == 9
