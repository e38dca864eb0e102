"""Asking the served model whether it answers. Blocks: only for use beside the loop."""

import http.client
import json
import re
import ssl
from urllib.parse import urlsplit

import msgspec


class Answered(msgspec.Struct, frozen=True):
    """ok: a one-token request was answered. tokens: generated so far by the server's own count, None if not told."""

    ok: bool
    why: str = ""
    tokens: float | None = None


def probe(url: str, served_as: str, api_key: str | None, within_s: float) -> Answered:
    """A real one-token request: /health alone is a flag that stays up while the engine is dead.

    Tries completions, then chat, then embeddings, because not every model serves each of them.
    """
    bodies = (
        ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}),
        ("/v1/embeddings", {"input": "a"}),
    )
    try:
        status, _ = _ask(url, "GET", "/health", None, api_key, within_s)
        if status != 200:
            return Answered(False, f"/health answers {status}")
        for path, body in bodies:
            status, text = _ask(url, "POST", path, {"model": served_as, **body}, api_key, within_s)
            if status == 200:
                return Answered(True, tokens=_tokens(url, within_s))
            if status not in (400, 404, 405, 501):
                return Answered(False, f"{path} answers {status}: {text[:200]}")
        return Answered(False, f"no kind of one-token request is answered; the last: {status} {text[:200]}")
    except (OSError, http.client.HTTPException) as error:
        return Answered(False, f"{type(error).__name__}: {error}", _tokens(url, 2.0))


def requests_open(url: str, within_s: float) -> int | None:
    """Requests that vLLM runs or has waiting at present, by its own count; None if it does not tell."""
    text = _metrics(url, within_s)
    counts = [_metric(text, f"vllm:num_requests_{state}") for state in ("running", "waiting")]
    told = [count for count in counts if count is not None]
    return int(sum(told)) if told else None


def _tokens(url: str, within_s: float) -> float | None:
    """vLLM's counter of generated tokens: if it moves, the engine lives, however long the queue."""
    return _metric(_metrics(url, within_s), "vllm:generation_tokens_total")


def _metrics(url: str, within_s: float) -> str:
    try:
        status, text = _ask(url, "GET", "/metrics", None, None, within_s)
    except (OSError, http.client.HTTPException):
        return ""
    return text if status == 200 else ""


def _metric(text: str, name: str) -> float | None:
    """The sum of a metric over its labels, None where it is not among Prometheus' lines."""
    counts = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? ([0-9.e+]+)$", text, re.M)
    return sum(map(float, counts)) if counts else None


def _ask(url: str, method: str, path: str, body: dict | None, api_key: str | None, within_s: float) -> tuple[int, str]:
    parts = urlsplit(url)
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        # Our own server on the loopback: the certificate names the public host, not 127.0.0.1.
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=within_s,
                                                 context=ssl._create_unverified_context())
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=within_s)
    try:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        data = None
        if body is not None:
            data, headers["Content-Type"] = json.dumps(body), "application/json"
        connection.request(method, path, data, headers)
        response = connection.getresponse()
        return response.status, response.read(1 << 20).decode(errors="replace")
    finally:
        connection.close()
