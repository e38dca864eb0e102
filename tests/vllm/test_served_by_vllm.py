"""Real vLLM, on the CPU: what it is told, how it leaves for a real Slurm job, and what it survives."""

import contextlib
import http.client
import json
import os
import signal
import threading
from pathlib import Path

import pytest

from llmwd.adapters import procs
from tests.slurm.testbed import SlurmNode
from tests.tree.supervised import Supervised
from tests.vllm.conftest import LEASE_TTL_S
from tests.vllm.served import (
    CAPITAL,
    LOADS_WITHIN_S,
    Process,
    STREAM_ENDS_WITHIN_S,
    all_gone,
    nothing_left_of_the_server,
    processes,
    refuses_connections,
    release_of,
    titles,
)
from tests.waiting import wait_until


def ask(tree: Supervised, question: str, **more: object) -> str:
    """A chat's answer; connection and status errors are the test's failure."""
    connection = http.client.HTTPConnection("127.0.0.1", tree.port, timeout=60)
    body = {"model": "smollm2", "messages": [{"role": "user", "content": question}], "max_tokens": 40, **more}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json", **tree.authorized()})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    assert answer.status == 200, text
    return json.loads(text)["choices"][0]["message"]["content"]


class Stream(threading.Thread):
    """A client that reads one long streamed answer: how many pieces came, and whether the answer was whole."""

    def __init__(self, tree: Supervised, tokens: int):
        super().__init__(daemon=True)
        self.pieces, self.whole = 0, False
        self._port, self._tokens = tree.port, tokens
        self._headers = {"Content-Type": "application/json", **tree.authorized()}
        self.start()
        wait_until(lambda: self.pieces > 3, 60, what="a stream that flows")

    def run(self) -> None:
        body = {
            "model": "smollm2", "stream": True, "max_tokens": self._tokens, "ignore_eos": True,
            "messages": [{"role": "user", "content": "Tell me a very long story about a mountain."}],
        }
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        last = b""
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), self._headers)
            for line in connection.getresponse():
                self.pieces += line.startswith(b"data: {")
                self.whole |= line.startswith(b"data: [DONE]") and b'"finish_reason":"length"' in last
                last = line if line.strip() else last
        except (OSError, http.client.HTTPException):
            pass  # cut: `whole` says so
        finally:
            connection.close()


@pytest.mark.slurm
def test_a_job_that_lands_while_vllm_loads_finds_no_process_of_it_and_it_comes_back(tree: Supervised, node: SlurmNode) -> None:
    if tree.status()["phase"] == "serving":  # another test came before
        first = node.sbatch("exec sleep 600", "--gres=gpu:8")
        tree.phase("waiting")
        node.scancel(first)
    tree.phase("loading", 60)
    # The engine is there and loads; it swallows a SIGTERM now.
    wait_until(lambda: "VLLM::EngineCor" in titles(processes(tree)), LOADS_WITHIN_S, what="an engine that loads")
    tree_then = processes(tree)
    assert (tree.runtime / "rpc").is_dir()
    assert len(tree_then) >= 3

    job = node.sbatch("exec sleep 600", "--gres=gpu:8")
    release_of(tree, job)
    nothing_left_of_the_server(tree, tree_then)
    assert tree.phase("waiting")["reason"] == "yielded_to_job"

    node.scancel(job)
    tree.serving(LOADS_WITHIN_S)
    assert "Paris" in ask(tree, CAPITAL, temperature=0)


def listening(some: list[Process]) -> set[str]:
    """The addresses, as the kernel writes them, that these processes accept connections on."""
    inodes = set()
    for pid, _ in some:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # a connection that has ended since
                inodes.add(os.readlink(link)[8:-1])
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {words[1].partition(":")[0] for words in lines if words[3] == "0A" and words[9] in inodes}


def test_it_listens_on_the_loopback_only_and_asks_for_the_key_that_nobody_can_see(tree: Supervised) -> None:
    tree.serving(LOADS_WITHIN_S)
    key = tree.authorized()["Authorization"].split()[1]
    assert listening(processes(tree)) == {"0100007F"}
    assert key not in titles(processes(tree)) and key not in tree.log("server")
    connection = http.client.HTTPConnection("127.0.0.1", tree.port, timeout=60)
    for headers, status in (({}, 401), ({"Authorization": "Bearer wrong"}, 401), (tree.authorized(), 200)):
        connection.request("GET", "/v1/models", headers=headers)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == status
    connection.close()


def test_json_in_vllm_args_reaches_vllm_with_its_quotes_and_is_obeyed(tree: Supervised) -> None:
    server = tree.serving(LOADS_WITHIN_S)["server"]["pid"]
    words = procs.cmdline(server).split(b"\0")
    assert words[words.index(b"--override-generation-config") + 1] == b'{"temperature":0.0}'
    # Without it, vLLM's own temperature is 1 and such answers differ.
    question = "Invent a name for a boat and tell why."
    assert {ask(tree, question) for _ in range(3)} == {ask(tree, question, temperature=0)}


def test_a_stream_goes_on_to_its_end_over_the_managers_violent_death(tree: Supervised) -> None:
    tree.serving(LOADS_WITHIN_S)
    before = tree.all_ready()
    tree_then = processes(tree)
    stream = Stream(tree, tokens=250)
    tree.signal("vllm", signal.SIGKILL)
    manager = next(worker["pid"] for worker in before["workers"] if worker["name"] == "vllm")
    tree.until(lambda _: tree.worker("vllm")["pid"] not in (None, manager), 30, "another manager")
    after = tree.all_ready()
    pieces = stream.pieces
    assert stream.is_alive()
    assert after["server"]["pid"] == before["server"]["pid"]
    assert [each for each in tree_then if not procs.alive(*each)] == []

    stream.join(120)
    assert stream.whole and stream.pieces > pieces
    assert "Paris" in ask(tree, CAPITAL, temperature=0)


def test_after_the_roots_violent_death_no_process_of_vllm_is_left(tree: Supervised) -> None:
    tree.serving(LOADS_WITHIN_S)
    tree_then = processes(tree)
    assert "VLLM::EngineCor" in titles(tree_then) and "VLLM::Worker" in titles(tree_then)
    stream = Stream(tree, tokens=1800)
    tree.signal("root", signal.SIGKILL)
    tree.process.wait(30)
    all_gone(tree_then, LEASE_TTL_S + 5)
    wait_until(lambda: not tree.left(), 20, what="the end of everything")
    stream.join(STREAM_ENDS_WITHIN_S)
    assert not stream.is_alive() and refuses_connections(tree)
