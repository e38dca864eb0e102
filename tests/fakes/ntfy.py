#!/usr/bin/env python3
"""A small ntfy server: publish as JSON, poll, and on demand every way in which the real one fails.

    with NtfyServer() as server:  server.url, server.messages, server.plan[:] = ["429", "hang", ...]
    ntfy.py [PORT]                runs one in the foreground

Each publish takes the next word of `plan`; none left: "ok". Limits and error texts are those of ntfy 2.13; a 429 has
no Retry-After. A message with the sequence_id of an earlier one replaces it, as from 2.16 on.
"""

import json
import secrets
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MESSAGE_BYTES = 4096
BODY_BYTES = 8192
TITLE_BYTES = 1024
ERRORS = {  # word of the plan: (status, code, text)
    "400": (400, 40009, "invalid request: topic invalid"),
    "401": (401, 40101, "unauthorized"),
    "403": (403, 40301, "forbidden"),
    "404": (404, 40401, "page not found"),
    "413": (413, 41303, "JSON body too large"),
    "429": (429, 42901, "limit reached: too many requests; increase your limits with a paid plan"),
    "42908": (429, 42908, "limit reached: daily message quota reached"),
    "500": (500, 50001, "internal server error"),
    "503": (503, 50301, "unavailable"),
}


class NtfyServer(ThreadingHTTPServer):
    """Listens on 127.0.0.1. `port` 0: any free one."""

    daemon_threads = True

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.messages: list[dict] = []
        self.plan: list[str] = []
        self.tries: list[tuple[float, str, str | None]] = []  # (when, word of the plan, Authorization)
        self.ending = threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def titles(self) -> list[str]:
        return [message.get("title", "") for message in self.messages]

    def __enter__(self) -> "NtfyServer":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.ending.set()
        self.shutdown()
        self.server_close()
        self._thread.join()

    def take(self, sent: dict) -> dict:
        """Keep a message as the server does, and give the answer."""
        now = int(time.time())
        kept = {"id": secrets.token_urlsafe(9)[:12], "time": now, "expires": now + 43200, "event": "message"} | sent
        if sent.get("sequence_id"):
            self.messages = [one for one in self.messages if one.get("sequence_id") != sent["sequence_id"]]
        self.messages.append(kept)
        return kept

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that went away


class _Handler(BaseHTTPRequestHandler):
    server: NtfyServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        word = self.server.plan.pop(0) if self.server.plan else "ok"
        self.server.tries.append((time.monotonic(), word, self.headers.get("Authorization")))
        if word == "hang":
            self.server.ending.wait(60)
            return
        if word == "portal":
            self._answer(200, b"<html>Please log in</html>", "text/html")
        elif word == "redirect":
            self._answer(301, b"", "text/html", location="/login")
        elif word == "echo-topic":
            self._fail(403, 40301, f"forbidden: {json.loads(body)['topic']}")
        elif word in ERRORS:
            self._fail(*ERRORS[word])
        else:
            self._publish(body, cut=word == "cut")

    def _publish(self, body: bytes, cut: bool) -> None:
        if len(body) > BODY_BYTES:
            return self._fail(*ERRORS["413"])
        try:
            sent = json.loads(body)
        except ValueError:
            return self._fail(400, 40024, "invalid request: request body must be valid JSON")
        if self.path != "/" or not sent.get("topic"):
            return self._fail(*ERRORS["404"])
        if len(sent.get("message", "").encode()) > MESSAGE_BYTES:
            return self._fail(400, 40014, "invalid request: attachments not allowed")
        if len(sent.get("title", "").encode()) > TITLE_BYTES or sent.get("priority", 3) not in range(1, 6):
            return self._fail(400, 40057, "invalid request: title or priority")
        kept = self.server.take(sent)
        if not cut:  # else accepted, and the answer is lost
            self._answer(200, json.dumps(kept).encode())

    def do_GET(self) -> None:
        topic, _, rest = self.path.lstrip("/").partition("/")
        if rest.startswith("json"):
            lines = [json.dumps(message) for message in self.server.messages if message["topic"] == topic]
            self._answer(200, "".join(f"{line}\n" for line in lines).encode(), "application/x-ndjson")
        elif self.path == "/v1/health":
            self._answer(200, b'{"healthy":true}')
        else:
            self._fail(*ERRORS["404"])

    def _fail(self, status: int, code: int, text: str) -> None:
        answer = {"code": code, "http": status, "error": text, "link": "https://ntfy.sh/docs/publish/"}
        self._answer(status, json.dumps(answer).encode())

    def _answer(self, status: int, body: bytes, kind: str = "application/json", location: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if location:
            self.send_header("Location", location)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


if __name__ == "__main__":
    with NtfyServer(int(sys.argv[1]) if len(sys.argv) > 1 else 0) as running:
        print(running.url, flush=True)
        threading.Event().wait()
