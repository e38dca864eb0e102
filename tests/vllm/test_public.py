"""The whole of it, as people outside and the operator meet it: real vLLM, real Slurm, the real Caddy, OpenAI's client."""

import contextlib
import http.client
import json
import re
import time
from collections.abc import Iterator
from datetime import datetime

import httpx
import openai
import pytest

from llmwd.core import doorconfig
from tests.fakes.ntfy import NtfyServer
from tests.slurm.testbed import SlurmNode
from tests.tree.supervised import Supervised
from tests.vllm.served import CAPITAL, LOADS_WITHIN_S, STREAM_ENDS_WITHIN_S, nothing_left_of_the_server, processes, release_of, titles
from tests.waiting import wait_until

QUESTION = [{"role": "user", "content": CAPITAL}]
STORY = [{"role": "user", "content": "Tell me a very long story about a mountain."}]


@pytest.fixture
def alice(tree: Supervised) -> Iterator[openai.OpenAI]:
    """Somebody outside with a key that the operator has made. The door's port stands for the tunnel."""
    made = tree.ctl("key", "add", "alice")
    assert made.returncode == 0, made.stderr
    yield client(tree, made.stdout.strip())
    assert tree.ctl("key", "revoke", "alice").returncode == 0


def client(tree: Supervised, key: str) -> openai.OpenAI:
    return openai.OpenAI(api_key=key, base_url=f"http://127.0.0.1:{tree.settings['DOOR_PORT']}/v1", max_retries=0, timeout=60)


def refused(ask: openai.OpenAI) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as error:
        ask.chat.completions.create(model="smollm2", messages=QUESTION, max_tokens=1)
    return error.value


def refused_as(ask: openai.OpenAI, code: str, within_s: float = 30) -> openai.APIStatusError:
    """The first refusal with this code: the door hears of what changes a moment after the status, and takes it over in one in
    which it may cut a connection."""

    def there() -> openai.APIStatusError | None:
        with contextlib.suppress(openai.APIConnectionError):
            return error if (error := refused(ask)).code == code else None

    return wait_until(there, within_s, what=f"a refusal with the code {code}")


def answer(ask: openai.OpenAI) -> str:
    parts = ask.chat.completions.create(model="smollm2", messages=QUESTION, stream=True, max_tokens=40)
    return "".join(part.choices[0].delta.content or "" for part in parts)


def let_in(ask: openai.OpenAI) -> None:
    """Until the key counts and the door has heard that the model serves: then the list is vLLM's own, without a state."""

    def listed() -> bool:
        try:
            return [(model.id, model.model_extra.get("state")) for model in ask.models.list()] == [("smollm2", None)]
        except (openai.APIStatusError, openai.APIConnectionError):  # the latter: in the moment in which the key is taken over
            return False

    wait_until(listed, 30, what="a door that is open to this key")


@pytest.mark.slurm
def test_a_real_job_in_the_middle_of_a_stream_ends_it_and_people_are_told_until_the_model_is_back(
    tree: Supervised, node: SlurmNode, ntfy: NtfyServer, alice: openai.OpenAI
) -> None:
    tree.serving(LOADS_WITHIN_S)
    let_in(alice)
    assert "Paris" in answer(alice)
    assert refused(client(tree, "bWFsbG9yeTpndWVzcw==")).status_code == 401
    wait_until(lambda: ntfy.titles[-1:] and ntfy.titles[-1].startswith(("Serving", "Resumed")), 60, what="the notice of the start")
    told_before = len(ntfy.messages)
    tree_then = processes(tree)
    assert "VLLM::EngineCor" in titles(tree_then) and "VLLM::Worker" in titles(tree_then)

    endless = {"ignore_eos": True}
    stream = iter(alice.chat.completions.create(model="smollm2", messages=STORY, stream=True, max_tokens=1800, extra_body=endless))
    for _ in range(5):
        next(stream)
    ntfy.down()
    job = node.sbatch("exec sleep 600", "--gres=gpu:8", "--time=10")
    release_of(tree, job)
    began_s = time.monotonic()
    with pytest.raises((openai.APIError, httpx.RemoteProtocolError)):  # vLLM's last word, or a connection that ends
        for _ in stream:
            pass
    assert time.monotonic() - began_s < STREAM_ENDS_WITHIN_S
    nothing_left_of_the_server(tree, tree_then)
    status = tree.phase("waiting")
    assert status["reason"] == "yielded_to_job" and status["lease"] is None
    assert {gpu["holder"] for gpu in status["gpus"]} == {"slurm"}

    away = refused_as(alice, "yielded_to_job")
    assert away.status_code == 503 and int(away.response.headers["retry-after"]) > 0
    # The job's time limit may be heard after its GPUs.
    listed = wait_until(lambda: next((each for each in alice.models.list() if each.model_extra.get("expected_at")), None), 30)
    assert (listed.id, listed.model_extra["state"]) == ("smollm2", "yielded_to_job")
    expected_s = datetime.fromisoformat(listed.model_extra["expected_at"]).timestamp() - time.time()
    assert 300 < expected_s < 600 + LOADS_WITHIN_S  # the job's time limit, and what loading takes
    tree.until(lambda status: status["notices"]["waiting"], 30, "a notice that waits for its server")
    ntfy.up()
    node.scancel(job)
    refused_as(alice, "loading", 60)
    tree.serving(LOADS_WITHIN_S)
    let_in(alice)
    assert "Paris" in answer(alice)

    wait_until(lambda: len(ntfy.messages) >= told_before + 2, 120, what="what happened while the ntfy server was down")
    yielded, resumed = (message["title"] for message in ntfy.messages[told_before:])
    assert yielded.startswith(f"Yielded to Slurm job {job}") and resumed.startswith("Resumed: smollm2")


def fetched(port: int, method: str, path: str, key: str = "") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        connection.request(method, path, b"{}" if method != "GET" else None, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_of_all_that_vllm_serves_only_the_listed_passes_the_door(tree: Supervised, alice: openai.OpenAI) -> None:
    tree.serving(LOADS_WITHIN_S)
    let_in(alice)
    door = int(tree.settings["DOOR_PORT"])
    routes = json.loads(fetched(tree.port, "GET", "/openapi.json")[1])["paths"]
    hidden = ("/metrics", "/metrics/", "/docs", "/redoc", "/openapi.json", "/invocations", "/version")  # some are in no schema
    asked = {(method.upper(), path) for path, methods in routes.items() for method in methods}
    asked |= {(method, path) for path in hidden for method in ("GET", "POST")}
    assert len(asked) > 30 and ("POST", "/v1/chat/completions") in asked
    for method, path in sorted(asked):
        status, body = fetched(door, method, re.sub(r"[{].*?[}]", "x", path), alice.api_key)
        passes = method in doorconfig.PATHS.get(path, ())
        assert (status in (404, 405) and b"is not served" in body) != passes, (method, path, status, body[:200])
        if passes:
            assert fetched(door, method, path)[0] == 401, path
