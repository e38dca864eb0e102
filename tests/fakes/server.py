#!/usr/bin/env python3
"""A small stand-in for `vllm serve`, usable as LLM_BIN:  server.py serve MODEL [--port N …] [flags below]

Each flag has a variable as well: --ready-after 3 is FAKE_READY_AFTER=3, --ignore-term is FAKE_IGNORE_TERM=1.
FAKE_REPORT=FILE: what it got (argv, CUDA_VISIBLE_DEVICES, environment, pids) is written there as JSON.
Like vLLM: the port is bound early and listens only once ready, /health is a flag and no probe, nothing asks
for a death signal (the engine survives the SIGKILL of its server), and the engine's end ends the server with 0.
Unlike vLLM: ready at once, and gone at once on SIGTERM, unless told otherwise.
"""

import argparse
import json
import os
import signal
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FLAGS = {  # name: (type, meaning)
    "ready-after": (float, "seconds until it listens"),
    "ignore-term": (bool, "SIGTERM does nothing, in no process of the tree"),
    "note-term": (str, "SIGTERM does nothing but write the server's pid on a line of this file"),
    "hang-on-term": (bool, "on SIGTERM the engine ends and the server closes its port, but stays"),
    "swallow-term-while-loading": (bool, "the first SIGTERM before it is ready does nothing"),
    "refork-on-term": (int, "on SIGTERM go on in a new child, this many times, SIGTERM each"),
    "engine": (bool, "a child named VLLM::EngineCor, which holds the model"),
    "tracker": (bool, "multiprocessing's resource_tracker, as vLLM has it: deaf to SIGTERM"),
    "fork-grandchild": (bool, "a doubly forked process in a session of its own"),
    "children": (int, "this many further processes, every tenth a child of the one before, in its own session"),
    "lie-about-health": (bool, "/health says 200 while completions hang"),
    "silent-after": (float, "seconds after which completions hang while /health says 200"),
    "exit-after": (float, "seconds until it ends by itself"),
    "exit-code": (int, "with this exit code"),
    "token-every": (float, "seconds between the tokens of a stream (default 0.02)"),
    "contexts": (str, "who holds the model says in this folder which GPUs it is on: UUID.PID.START, for the stand-in driver"),
    "chatter": (int, "this many lines of output before anything else"),
}
open_now = {"requests": 0, "looks": 0}
pids: dict[str, list[int]] = {"engine": [], "tracker": [], "grandchild": [], "children": []}
settled, says_settled = os.pipe()  # a byte from each process of the tree that is as it is to stay


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vllm", allow_abbrev=False)
    parser.add_argument("verb", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--api-key", nargs="+", default=[os.environ["VLLM_API_KEY"]] if "VLLM_API_KEY" in os.environ else [])
    for name, (kind, meaning) in FLAGS.items():
        given = os.environ.get("FAKE_" + name.upper().replace("-", "_"), "")
        if kind is bool:
            parser.add_argument(f"--{name}", action="store_true", default=given not in ("", "0"), help=meaning)
        else:
            parser.add_argument(f"--{name}", type=kind, default=kind(given) if given else None, help=meaning)
    return parser.parse_known_args(argv)[0]  # what else vLLM knows means nothing here


def fork(body, *args) -> int:
    pid = os.fork()
    if pid == 0:
        body(*args)
        os._exit(0)
    return pid


def take_gpus(args: argparse.Namespace) -> None:
    """As a CUDA context: there from now on until the end of this process."""
    if args.contexts:
        with open("/proc/self/stat") as file:
            start = file.read().rpartition(")")[2].split()[19]
        for uuid in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","):
            open(os.path.join(args.contexts, f"{uuid}.{os.getpid()}.{start}"), "w").close()


def hold_model(args: argparse.Namespace) -> None:
    take_gpus(args)
    sleep_for_ever("VLLM::EngineCor", args.ignore_term)


def sleep_for_ever(name: str = "", deaf: bool = False, session: bool = False) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN if deaf else signal.SIG_DFL)
    if session:
        os.setsid()
    if name:
        with open("/proc/self/comm", "w") as file:
            file.write(name)
    os.write(says_settled, b".")
    os.close(settled)
    os.close(says_settled)
    while True:
        signal.pause()


def double_fork(deaf: bool, end: int) -> None:
    os.write(end, str(fork(sleep_for_ever, "", deaf, True)).encode())


def make_tree(args: argparse.Namespace) -> None:
    if args.engine:
        pids["engine"].append(fork(hold_model, args))
    else:
        take_gpus(args)
    if args.tracker:
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()
        pids["tracker"].append(resource_tracker._resource_tracker._pid)
    if args.fork_grandchild:
        out, end = os.pipe()
        os.waitpid(fork(double_fork, args.ignore_term, end), 0)
        pids["grandchild"].append(int(os.read(out, 20)))
    for number in range(args.children or 0):
        pids["children"].append(fork(sleep_for_ever, "", args.ignore_term, number % 10 == 0))
    # Else who has read the report may signal one that is not deaf yet.
    missing = len(pids["engine"]) + len(pids["grandchild"]) + len(pids["children"])
    while missing:
        missing -= len(os.read(settled, missing))


class Signals:
    """What SIGTERM does. It can be asked for anew once the server is ready."""

    def __init__(self, args: argparse.Namespace, server: ThreadingHTTPServer) -> None:
        self.args, self.server, self.loading, self.swallowed = args, server, True, False
        self.reforks = args.refork_on_term or 0
        if args.ignore_term:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif args.note_term:
            signal.signal(signal.SIGTERM, self.note)
        elif args.hang_on_term or args.swallow_term_while_loading or self.reforks:
            signal.signal(signal.SIGTERM, self.on_term)

    def note(self, *_) -> None:
        with open(self.args.note_term, "a") as file:
            file.write(f"{os.getpid()}\n")

    def on_term(self, *_) -> None:
        if self.loading and self.args.swallow_term_while_loading and not self.swallowed:
            self.swallowed = True
            print("INFO: SIGTERM swallowed", flush=True)
        elif self.reforks:
            self.reforks -= 1
            if os.fork():
                os._exit(0)
            if not self.args.engine:
                take_gpus(self.args)
        elif self.args.hang_on_term:
            for pid in pids["engine"]:
                os.kill(pid, signal.SIGKILL)
            self.server.socket.close()
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)


class Handler(BaseHTTPRequestHandler):
    """The part of vLLM's HTTP that llmwd and its users touch."""

    protocol_version = "HTTP/1.1"
    args: argparse.Namespace
    names: list[str]
    silent_s: float  # monotonic, from when on completions hang

    def log_message(self, format: str, *values) -> None:
        print(f"INFO: {self.client_address[0]} - {format % values}", flush=True)

    def answer(self, status: int, body: object = None) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refused(self) -> bool:
        keys = self.args.api_key
        if not keys or not self.path.startswith("/v1") or self.headers.get("Authorization") in [f"Bearer {k}" for k in keys]:
            return False
        self.answer(401, {"error": "Unauthorized"})
        return True

    def do_GET(self) -> None:
        if self.refused():
            return
        if self.path == "/health":
            self.answer(200)
        elif self.path == "/version":
            self.answer(200, {"version": "0.32.0"})
        elif self.path == "/v1/models":
            data = [{"id": name, "object": "model", "owned_by": "vllm", "root": self.args.model} for name in self.names]
            self.answer(200, {"object": "list", "data": data})
        elif self.path == "/metrics":
            open_now["looks"] += 1
            labels = f'engine="0",model_name="{self.names[0]}"'
            values = {"vllm:num_requests_running": open_now["requests"], "vllm:num_requests_waiting": 0, "fake:looks": open_now["looks"]}
            self.text("".join(f"{name}{{{labels}}} {float(value)}\n" for name, value in values.items()))
        else:
            self.answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        open_now["requests"] += 1
        try:
            self.post()
        finally:
            open_now["requests"] -= 1

    def text(self, body: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def post(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.refused():
            return
        if self.path not in ("/v1/completions", "/v1/chat/completions"):
            self.answer(404, {"detail": "Not Found"})
            return
        asked = json.loads(body)
        if self.args.lie_about_health or time.monotonic() >= self.silent_s:
            threading.Event().wait()
        if asked.get("model", self.names[0]) not in self.names:
            text = f"The model `{asked['model']}` does not exist."
            self.answer(404, {"error": {"message": text, "type": "NotFoundError", "param": "model", "code": 404}})
            return
        chat = self.path.endswith("chat/completions")
        tokens = int(asked.get("max_completion_tokens") or asked.get("max_tokens") or 16)
        base = {"id": f"{'chat' if chat else ''}cmpl-{time.monotonic_ns():x}", "created": int(time.time()), "model": self.names[0]}
        if asked.get("stream"):
            self.stream(chat, tokens, base)
            return
        text = " ok" * tokens
        part = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        self.answer(200, base | {
            "object": "chat.completion" if chat else "text_completion",
            "choices": [{"index": 0, "finish_reason": "length"} | part],
            "usage": {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1},
        })  # fmt: skip

    def stream(self, chat: bool, tokens: int, base: dict) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        kind = "chat.completion.chunk" if chat else "text_completion"
        for number in range(tokens):
            time.sleep(0.02 if self.args.token_every is None else self.args.token_every)
            part = {"delta": {"content": " ok"}} if chat else {"text": " ok"}
            last = "length" if number == tokens - 1 else None
            self.event(json.dumps(base | {"object": kind, "choices": [{"index": 0, "finish_reason": last} | part]}))
        self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def event(self, text: str) -> None:
        data = f"data: {text}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def server_bind(self) -> None:  # without the look-up of the host's name
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request, client_address) -> None:  # a client that went away is no traceback
        pass


def report(port: int) -> None:
    if path := os.environ.get("FAKE_REPORT"):
        told = {"argv": sys.argv, "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
                "pid": os.getpid(), "pids": pids, "port": port, "env": dict(os.environ), "cwd": os.getcwd()}  # fmt: skip
        with open(f"{path}.new", "w") as file:
            json.dump(told, file)
        os.rename(f"{path}.new", path)


def watch_engine(pid: int) -> None:
    os.waitpid(pid, 0)
    os._exit(0)


def main() -> None:
    args = parse(sys.argv[1:])
    Handler.args = args
    Handler.names = args.served_model_name or [args.model]
    Handler.silent_s = float("inf") if args.silent_after is None else time.monotonic() + args.silent_after
    for number in range(args.chatter or 0):
        print(f"line {number}")
    try:
        server = Server((args.host, args.port), Handler, bind_and_activate=False)
        server.server_bind()
    except OSError as problem:
        sys.exit(f"OSError: {problem}")
    make_tree(args)
    signals = Signals(args, server)
    report(server.server_port)
    if args.exit_after is not None:
        timer = threading.Timer(args.exit_after, os._exit, [args.exit_code or 0])
        timer.daemon = True
        timer.start()
    if args.engine and not args.hang_on_term:
        threading.Thread(target=watch_engine, args=pids["engine"], daemon=True).start()
    ready_at = time.monotonic() + (args.ready_after or 0)
    while (left := ready_at - time.monotonic()) > 0:
        time.sleep(left)
    signals.loading = False
    server.server_activate()
    print("INFO: Application startup complete.", flush=True)
    try:
        server.serve_forever(poll_interval=60)
    except (OSError, ValueError):  # --hang-on-term closed the socket
        while True:
            signal.pause()


main()
