#!/usr/bin/env python3
"""A small ntfy server: publish as JSON, poll, and on demand every way in which the real one fails.

    with NtfyServer() as server:  server.url, server.messages, server.plan[:] = ["429", "hang", ...]
    ntfy.py [PORT]                runs one in the foreground

Each publish takes the next word of `plan`, each DELETE one of `delete_plan`; none left: "ok". Limits and error texts are those of ntfy 2.13; a 429 has
no Retry-After. A message with the sequence_id of an earlier one replaces it on the screen and while it is scheduled, as
from 2.16 on (`old`: before that); DELETE takes it back. `users`: who may publish, "Bearer ..." or "Basic ..." to the
topics that they may write to, others (without credentials) to none of these; empty: everybody. down() and up(): on the same port. `ahead_s` moves the server's clock.
"""

import json
import re
import secrets
import socket
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
# Answers of what stands before an ntfy: no code of its own. Word: (status, where to)
PROXIES = {
    "portal": (200, None), "redirect": (301, "/login"), "308": (308, "/login"), "302": (302, "/login"), "307": (307, "/login"),
    "204": (204, None), "proxy-404": (404, None), "405": (405, None), "408": (408, None), "425": (425, None), "502": (502, None),
}  # fmt: skip


class NtfyServer(ThreadingHTTPServer):
    """Listens on 127.0.0.1. `port` 0: any free one."""

    daemon_threads = True

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.messages: list[dict] = []  # as on a screen
        self.cache: list[dict] = []  # every one, as GET .../json?poll=1 gives them
        self.scheduled: list[tuple[float, dict]] = []  # (when by our clock, message)
        self.hooks: list[dict] = []
        self.users: dict[str, set[str]] = {}
        self.old = False
        self.ahead_s = 0.0
        self.lock = threading.RLock()
        self.plan: list[str] = []
        self.delete_plan: list[str] = []
        self.deletes: list[tuple[str, str]] = []  # (word of the plan, sequence id)
        self.tries: list[tuple[float, str, str | None]] = []  # (when, word of the plan, Authorization)
        self.ending = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def titles(self) -> list[str]:
        return [message.get("title", "") for message in self.messages]

    def __enter__(self) -> "NtfyServer":
        self._serve()
        return self

    def __exit__(self, *exc: object) -> None:
        self.ending.set()
        if self._thread is not None:
            self.shutdown()
            self._thread.join()
        self.server_close()

    def _serve(self) -> None:
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def down(self) -> None:
        """Connections are refused; the port stays ours."""
        self.shutdown()
        self._thread.join()
        self._thread = None
        self.socket.close()
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(("127.0.0.1", self.server_port))

    def up(self) -> None:
        self.socket.listen(16)
        self._serve()

    def pass_time(self, seconds: float) -> None:
        """What is scheduled by then is told."""
        with self.lock:
            self.ahead_s += seconds
            due = [kept for at, kept in self.scheduled if at <= time.time() + self.ahead_s]
            self.scheduled = [(at, kept) for at, kept in self.scheduled if kept not in due]
            for kept in due:
                self._show(kept)

    def take(self, sent: dict) -> dict:
        """Keep a message as the server does, and give the answer."""
        now = int(time.time() + self.ahead_s)
        kept = {"id": secrets.token_urlsafe(9)[:12], "time": now, "expires": now + 43200, "event": "message"} | sent
        with self.lock:
            if self.old:
                kept.pop("sequence_id", None)
            sid = kept.get("sequence_id")
            others = [(at, one) for at, one in self.scheduled if not sid or one.get("sequence_id") != sid]
            delay_s = seconds(kept.pop("delay", ""))
            # In one step: a test that looks meanwhile sees the one before or this one.
            self.scheduled = [*others, (time.time() + self.ahead_s + delay_s, kept)] if delay_s else others
            if not delay_s:
                self._show(kept)
        return kept

    def _show(self, kept: dict) -> None:
        self.cache.append(kept)
        same = [place for place, one in enumerate(self.messages) if kept.get("sequence_id") and one.get("sequence_id") == kept["sequence_id"]]
        if same:
            self.messages[same[0]] = kept
        else:
            self.messages.append(kept)

    def forget(self, topic: str, sid: str) -> None:
        with self.lock:
            mine = lambda one: one["topic"] == topic and one.get("sequence_id") == sid  # noqa: E731
            self.scheduled = [(at, one) for at, one in self.scheduled if not mine(one)]
            self.messages = [one for one in self.messages if not mine(one)]

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that went away


def seconds(delay: str) -> float:
    """Of "30m", "10s", "2h"; 0 for none, -1 for what is not understood."""
    found = re.fullmatch(r"(\d+)\s*([smhd])", delay)
    return 0 if not delay else int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]] if found else -1


class _Handler(BaseHTTPRequestHandler):
    server: NtfyServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        word = self.server.plan.pop(0) if self.server.plan else "ok"
        self.server.tries.append((time.monotonic(), word, self.headers.get("Authorization")))
        if word == "hang":
            self.server.ending.wait(60)
            return
        if self.path != "/" and self.headers.get("User-Agent", "").startswith("Apprise"):  # some other service's webhook
            self.server.hooks.append(json.loads(body))
            return self._answer(200, b"{}")
        if word == "ok" and self._refused(json.loads(body).get("topic", "")):
            return
        if word in PROXIES:
            self._from_a_proxy(word)
        elif word == "echo-topic":
            self._fail(403, 40301, f"forbidden: {json.loads(body)['topic']}")
        elif word in ERRORS:
            self._fail(*ERRORS[word])
        else:
            self._publish(body, cut=word == "cut", late=word == "late", status=201 if word == "201" else 200)

    def _refused(self, topic: str) -> bool:
        """Whether the answer was that they may not: 401 for credentials that are none, 403 for a right that they lack."""
        who, users = self.headers.get("Authorization"), self.server.users
        if not users or topic in users.get(who, ()):
            return False
        if who is None and not any(topic in topics for topics in users.values()):
            return False  # a topic that is nobody's is open
        self._fail(*ERRORS["401" if who is not None and who not in users else "403"])
        return True

    def _from_a_proxy(self, word: str) -> None:
        status, location = PROXIES[word]
        self._answer(status, b"" if status == 204 else b"<html>Please log in</html>", "text/html", location)

    def _publish(self, body: bytes, cut: bool, late: bool, status: int) -> None:
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
        if sent.get("sequence_id") and not re.fullmatch(r"[-_A-Za-z0-9]{1,64}", sent["sequence_id"]):
            return self._fail(400, 40049, "invalid request: sequence ID invalid")
        if sum(len(tag.encode()) + 1 for tag in sent.get("tags", [])) > 512:
            return self._fail(400, 40058, "invalid request: tags too long")
        if sent.get("delay") and not 10 <= seconds(sent["delay"]) <= 3 * 86400:
            return self._fail(400, 40005, "invalid request: delay must be between 10 s and 3 days")
        kept = self.server.take(sent)
        if late:
            self.server.ending.wait(60)
        elif not cut:  # else accepted, and the answer is lost
            self._answer(status, json.dumps(kept).encode())

    def do_DELETE(self) -> None:
        topic, _, sid = self.path.lstrip("/").partition("/")
        word = self.server.delete_plan.pop(0) if self.server.delete_plan else "ok"
        self.server.deletes.append((word, sid))
        if word == "hang":
            self.server.ending.wait(60)
            return
        if word in ERRORS:
            return self._fail(*ERRORS[word])
        if self._refused(topic):
            return
        if self.server.old or not sid:
            return self._fail(*ERRORS["404"])
        self.server.forget(topic, sid)
        self._answer(200, json.dumps({"id": secrets.token_urlsafe(9)[:12], "event": "message_delete", "topic": topic, "sequence_id": sid}).encode())

    def do_GET(self) -> None:
        topic, _, rest = self.path.lstrip("/").partition("/")
        if rest.startswith("json"):
            lines = [json.dumps(message) for message in self.server.cache if message["topic"] == topic]
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
