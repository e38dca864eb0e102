"""Looking at cloudflared from outside: its log, its metrics server, its offline checks, the edge. Blocks: beside the loop."""

import http.client
import json
import os
import socket
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from llmwd.adapters.logfile import LOOK_BYTES, read, size

ANSWERS_WITHIN_S = 5.0
RUNS_WITHIN_S = 15.0  # a program on a network file system; it takes 70 ms otherwise
EDGE_WITHIN_S = 3.0
SAID_MOST = 300


class Look(msgspec.Struct, frozen=True):
    """What one look told. connections: the living ones, None if /ready gave no answer, which says nothing of them.
    metrics: Prometheus' lines, only while connected. hostname: a quick tunnel's. edge_answers: asked only while not
    connected."""

    log: str
    offset: int
    address: str | None
    connections: int | None
    metrics: str = ""
    hostname: str = ""
    edge_answers: bool = False


def look(
    path: Path, offset: int, address: str | None, find_address: Callable[[str], str | None],
    find_edges: Callable[[str], tuple[str, ...]], port: int,
) -> Look:
    """find_address, find_edges: read from new log where its metrics server is, and the addresses that it dials."""
    if address is not None:
        offset = max(offset, size(path) - LOOK_BYTES)  # of a flood the end is enough
    log, end = read(path, offset)
    address = address or find_address(log)
    connections = ready(address) if address is not None else None
    if connections:
        found = _json(_get(address, "/quicktunnel"))
        hostname = found.get("hostname") if isinstance(found, dict) else ""
        metrics = (_get(address, "/metrics") or (0, ""))[1]
        return Look(log, end, address, connections, metrics, hostname if isinstance(hostname, str) else "")
    return Look(log, end, address, connections, edge_answers=connections == 0 and answers(find_edges(log), port))


def ready(address: str) -> int | None:
    """Its living connections by /ready: the gauge of connections counts tries as well. None: no answer of its own."""
    answer = _get(address, "/ready")
    found = _json(answer)
    count = found.get("readyConnections") if isinstance(found, dict) else None
    if answer is None or answer[0] not in (200, 503) or not isinstance(count, int):
        return None
    return count if answer[0] == 200 else 0


def answers(edges: tuple[str, ...], port: int) -> bool:
    """Whether one of these addresses takes a TCP connection."""
    for edge in edges:
        try:
            socket.create_connection((edge, port), EDGE_WITHIN_S).close()
            return True
        except OSError:
            continue
    return False


def version(program: str, env: Mapping[str, str]) -> tuple[str, str]:
    """(its version, why it cannot be run or ""). Raises TimeoutError with a sentence if it hangs, as validate does."""
    status, said = _run([program, "version", "--short"], env)
    return (said, "") if status == 0 else ("", said)


def validate(program: str, config: str, env: Mapping[str, str]) -> str:
    """Why cloudflared refuses the configuration in the file `config`; "" if it takes it. Needs no network."""
    status, said = _run([program, "tunnel", "--config", config, "ingress", "validate"], env)
    return "" if status == 0 else said


def _run(argv: list[str], env: Mapping[str, str]) -> tuple[int, str]:
    """(exit code, its last line). 1 with a sentence if it cannot be run."""
    try:
        done = subprocess.run(
            argv, env=dict(env), stdin=subprocess.DEVNULL, capture_output=True, timeout=RUNS_WITHIN_S, start_new_session=True
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"it did not end within {RUNS_WITHIN_S:.0f} s") from error
    except OSError as error:
        return 1, error.strerror or str(error)
    lines = (done.stdout + b"\n" + done.stderr).decode(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return done.returncode, (said[-1] if said else f"exit code {done.returncode}")[:SAID_MOST]


def _get(address: str, path: str) -> tuple[int, str] | None:
    connection = http.client.HTTPConnection(address, timeout=ANSWERS_WITHIN_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read(LOOK_BYTES).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _json(answer: tuple[int, str] | None) -> object:
    try:
        return json.loads(answer[1]) if answer is not None else None
    except ValueError:
        return None
