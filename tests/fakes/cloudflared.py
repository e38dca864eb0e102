#!/usr/bin/env python3
"""A small stand-in for cloudflared 2026.8: its flags, logs, metrics server, offline checks and exits.

    cloudflared.py [flags below] -- tunnel --config F [flags of cloudflared] run [--token-file F]
    cloudflared.py [flags below] -- tunnel --config F [flags of cloudflared] --url U      (a quick tunnel)
    cloudflared.py [flags below] -- tunnel --config F ingress validate
    cloudflared.py [flags below] -- version --short

A test wraps it in a script of its own (`wrapper`), because its environment is scrubbed. Like the real one: a wrong or
misplaced flag prints help and exits 0; no tunnel, bad token 255; bad configuration, protocol, grace or credentials, or a
metrics port that is taken 1, each with a plain sentence and no log; `{}` as credentials is taken; four connections come
one after another, and their loss is no error in the log; with UDP blocked `auto` falls back late and `quic` never; TERM
drains, a second TERM kills; ha_connections is 1 while not connected; a stray TUNNEL_TOKEN wins over the configuration.
Unlike the real one: it talks to no edge and proxies nothing.
"""

import argparse
import base64
import json
import math
import os
import re
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NoReturn

TUNNEL_FLAGS = {"--url", "--config", "--metrics", "--loglevel", "--output", "--grace-period", "--protocol", "--logfile", "--edge"}
CONNECTIONS = 4
LONGEST_GRACE_S = 180.0
SLOW_S = 8.0
QUICK_HOSTNAME = "three-random-words.trycloudflare.com"
TUNNEL_SWITCHES = {"--no-autoupdate", "--no-prechecks"}
RUN_FLAGS = {"--token", "--token-file", "--credentials-file", "--url", "--protocol"}


def wrapper(folder: Path, *flags: str) -> Path:
    """A program in `folder` that is cloudflared with these flags of the stand-in."""
    path, draft = folder / "cloudflared", folder / "cloudflared.new"
    draft.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" {" ".join(flags)} -- "$@"\n')
    draft.chmod(0o755)
    draft.replace(path)  # as a whole: the one before it may be started at any moment
    return path


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--metrics-after", type=float, default=0.0, help="seconds until it says where its metrics are")
    parser.add_argument("--ready-after", type=float, default=0.05, help="seconds until it is connected")
    parser.add_argument("--ready-file", help="connected only while this file is there")
    parser.add_argument("--exit-after", type=float, help="seconds until it ends by itself")
    parser.add_argument("--exit-code", type=int, default=1, help="with this exit code; below 0: by that signal")
    parser.add_argument("--exit-text", default="Could not lookup srv records", help="after this error")
    parser.add_argument("--exit-plain", action="store_true", help="printed as what it cannot begin with is: without time and level")
    parser.add_argument("--lacks", default="", help="a flag that this version does not know")
    parser.add_argument("--connect-every", type=float, default=0.05, help="seconds between two of its connections (really 1)")
    parser.add_argument("--udp-blocked", type=float, default=0.0, help="seconds until `auto` tries TCP (really 146)")
    parser.add_argument("--slow-file", help="/ready takes SLOW_S while this file is there")
    parser.add_argument("--asked", help="one byte for each /ready that was answered is added to this file")
    parser.add_argument("--unauthorized", action="store_true", help="the edge refuses every registration, for ever")
    parser.add_argument("--drain", type=float, default=0.0, help="seconds that a request in flight takes after TERM")
    parser.add_argument("--ignore-term", action="store_true", help="TERM does nothing (name servers that do not answer)")
    parser.add_argument("--term-hangs", action="store_true", help="a first TERM does nothing, a second one kills")
    parser.add_argument("--stays-lost", action="store_true", help="a lost connection never comes back by itself")
    parser.add_argument("--edge-ip", default="198.51.100.7", help="the address of the edge, as its log shows it")
    parser.add_argument("--refuses-config", default="", help="what `ingress validate` and the start say to any configuration")
    parser.add_argument("--flood", type=int, default=0, help="so many lines of log before anything else")
    parser.add_argument("--report", help="what it got (argv, environment, configuration, pid) goes there as JSON")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    return parser.parse_args(argv)


def log(level: str, text: str) -> None:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    print(f"{stamp} {level} {text}", file=sys.stderr, flush=True)


def fail(code: int, text: str) -> NoReturn:
    """It cannot begin: said as its command line library does it."""
    print(text, file=sys.stderr, flush=True)
    sys.exit(code)


def incorrect(usage: str) -> None:
    print(f"Incorrect Usage: flag provided but not defined: {usage}\n\nNAME:\n   cloudflared tunnel - Use Cloudflare Tunnel")
    sys.exit(0)


def read_flags(argv: list[str], lacks: str) -> dict[str, str]:
    """The flags where cloudflared takes them: those of `tunnel` before `run`, those of `run` after it."""
    given, words = {}, iter(argv)
    if next(words, None) != "tunnel":
        incorrect(argv[0] if argv else "")
    allowed = TUNNEL_FLAGS
    for word in words:
        if word == lacks:
            incorrect(word)
        elif word == "run":
            allowed = RUN_FLAGS
            given["run"] = ""
        elif word in TUNNEL_SWITCHES and allowed is TUNNEL_FLAGS:
            given[word] = ""
        elif word in allowed:
            given[word] = next(words, "")
        else:
            incorrect(word)
    return given


def read_config(path: str) -> dict[str, str]:
    """The few keys of the configuration that matter here; ends as cloudflared does on a bad one."""
    try:
        text = Path(path).read_text()
    except OSError:
        fail(1, f"Cannot find config file {path}")
    if text.count("{") != text.count("}"):
        fail(1, f"error parsing YAML in config file at {path}: yaml: line 2: did not find expected ',' or '}}'")
    found = dict(re.findall(r'^(tunnel|credentials-file): "?([^"\n]*)"?$', text, re.M))
    services = re.findall(r'^\s*(?:- )?service: "?([^"\n]*)"?$', text, re.M)
    if not services or "hostname:" in text.rsplit("\n  - ", 1)[-1]:
        fail(1, "The last ingress rule must match all URLs (i.e. it should not have a hostname or path filter)")
    return found | {"text": text, "service": services[0]}


class Edge:
    """Whether it is connected, and the metrics server that says so."""

    def __init__(self, flags: argparse.Namespace, quick: bool, protocol: str):
        self.flags, self.started_s = flags, time.monotonic()
        self.ending = self.lost = False
        self.quick = quick
        blocked_s = flags.udp_blocked if protocol == "auto" else math.inf if protocol == "quic" and flags.udp_blocked else 0.0
        self.ready_after_s = max(flags.ready_after, blocked_s)
        self.first_s: float | None = None  # of the connections that it has

    @property
    def connections(self) -> int:
        now_s = time.monotonic()
        here = self.flags.ready_file is None or os.path.exists(self.flags.ready_file)
        # Here, not in the main loop: who has been told of the loss by /ready may have brought the edge back before that looks.
        if self.flags.stays_lost and not here and self.first_s is not None:
            self.lost = True
        if self.ending or self.lost or self.flags.unauthorized or not here or now_s - self.started_s < self.ready_after_s:
            self.first_s = None
            return 0
        self.first_s = self.first_s or now_s
        return min(CONNECTIONS, 1 + int((now_s - self.first_s) / self.flags.connect_every))

    def asked(self) -> None:
        if self.flags.slow_file and os.path.exists(self.flags.slow_file):
            time.sleep(SLOW_S)
        if self.flags.asked:
            with open(self.flags.asked, "a") as file:
                file.write(".")

    def serve(self, address: str) -> None:
        edge = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                connections = edge.connections
                if self.path == "/ready":
                    edge.asked()
                    status = 200 if connections else 503
                    body = json.dumps({"status": status, "readyConnections": connections, "connectorId": "0" * 8})
                elif self.path == "/metrics":
                    status, body = 200, f"cloudflared_tunnel_ha_connections {connections or 1}\n"
                    for number, (place, value) in enumerate((("ams01", 1), ("fra03", 1), ("fra03", 1), ("cdg05", 0))):
                        labels = f'connection_id="{number}",edge_location="{place}"'
                        body += f"cloudflared_tunnel_server_locations{{{labels}}} {value}\n"
                elif self.path == "/quicktunnel":
                    status, body = 200, json.dumps({"hostname": QUICK_HOSTNAME if edge.quick else ""})
                else:
                    status, body = 200, "OK"
                self.send_response(status)
                self.send_header("Content-Type", "text/plain; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *args: object) -> None:
                pass

        host, port = address.rsplit(":", 1)
        try:
            server = ThreadingHTTPServer((host, int(port)), Handler)
        except OSError:
            fail(1, f"Error opening metrics server listener: listen tcp {address}: bind: address already in use")
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        log("INF", f"Starting metrics server on {host}:{server.server_port}/metrics")


def main(argv: list[str]) -> None:
    flags = parse(argv)
    words = flags.rest[1:]
    if words == ["version", "--short"]:
        print("2026.8.2")
        return
    if words[-2:] == ["ingress", "validate"]:
        validate(flags, words[:-2])
        return
    given = read_flags(words, flags.lacks)
    if flags.report:
        config = Path(given.get("--config", "/")).read_text() if Path(given.get("--config", "/")).is_file() else None
        report = {"argv": flags.rest[1:], "env": dict(os.environ), "config": config, "pid": os.getpid()}
        Path(f"{flags.report}.new").write_text(json.dumps(report))
        os.replace(f"{flags.report}.new", flags.report)
    for number in range(flags.flood):
        log("ERR", f"Serve tunnel error error=\"connection refused\" connIndex=0 try={number}")
    config = read_config(given.get("--config", ""))
    if flags.refuses_config:
        fail(1, flags.refuses_config)
    if given.get("--protocol", "auto") not in ("auto", "http2", "quic"):
        fail(1, f"Unknown protocol {given['--protocol']}, Available protocols: auto, http2, quic")
    if float(given.get("--grace-period", "30s").rstrip("s")) > LONGEST_GRACE_S:
        fail(1, "grace-period must be equal or less than 3m0s")
    quick = "--url" in given and "run" not in given
    if not quick:
        check_secret(given, config)
    run(flags, given, quick)


def validate(flags: argparse.Namespace, words: list[str]) -> None:
    config = read_config(dict(zip(words[1::2], words[2::2], strict=False))["--config"])
    if flags.refuses_config:
        print(f"Validating rules from {config}\n{flags.refuses_config}", file=sys.stderr)
        sys.exit(1)
    print("OK")


def check_secret(given: dict[str, str], config: dict[str, str]) -> None:
    """The tunnel's token or credentials; ends as cloudflared does on bad ones."""
    if "TUNNEL_TOKEN" in os.environ or "--token-file" in given:
        try:
            text = os.environ.get("TUNNEL_TOKEN") or Path(given["--token-file"]).read_text()
            json.loads(base64.b64decode(text.strip(), validate=True))
        except (OSError, ValueError):
            fail(255, "Provided Tunnel token is not valid.\nSee 'cloudflared tunnel run --help'.")
        return
    if not config.get("tunnel") or "run" not in given:
        needs = "requires the ID or name of the tunnel to run as the last command line argument or in the configuration file."
        fail(255, f'"cloudflared tunnel run" {needs}\nSee \'cloudflared tunnel run --help\'.')
    try:
        json.loads(Path(config.get("credentials-file", "")).read_text())
    except (OSError, ValueError):
        fail(1, f"Tunnel credentials file '{config.get('credentials-file')}' doesn't exist or is not a file")


def run(flags: argparse.Namespace, given: dict[str, str], quick: bool) -> None:
    terms: list[float] = []

    def term(number: int, frame: object) -> None:
        if flags.ignore_term:
            return
        terms.append(time.monotonic())
        if len(terms) > 1:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, term)
    signal.signal(signal.SIGINT, term)
    grace_s = float(given.get("--grace-period", "30s").rstrip("s"))
    edge, was, tries, listening = Edge(flags, quick, given.get("--protocol", "auto")), 0, 0, False
    while True:
        now_s, ran_s = time.monotonic(), time.monotonic() - edge.started_s
        if not listening and ran_s >= flags.metrics_after:
            listening = True
            edge.serve(given.get("--metrics", "127.0.0.1:0"))
        if terms and not flags.term_hangs:
            if not edge.ending:
                edge.ending = True
                log("INF", "Initiating graceful shutdown due to signal terminated ...")
            if now_s - terms[0] >= min(grace_s, flags.drain):
                log("ERR", "no more connections active and exiting")
                sys.exit(0)
        elif flags.exit_after is not None and ran_s >= flags.exit_after:
            print(flags.exit_text, file=sys.stderr, flush=True) if flags.exit_plain else log("ERR", flags.exit_text)
            if flags.exit_code < 0:
                signal.signal(-flags.exit_code, signal.SIG_DFL)
                os.kill(os.getpid(), -flags.exit_code)
            os._exit(flags.exit_code)
        elif (connections := edge.connections) != was:
            if flags.udp_blocked and not was:
                log("INF", "Switching to fallback protocol http2 connIndex=0")
            if connections:
                log("INF", f"Registered tunnel connection connIndex={connections - 1} ip={flags.edge_ip} location=ams01 protocol=http2")
            else:
                log("INF", "Lost connection with the edge connIndex=0")
            was = connections
        elif flags.udp_blocked and not connections and tries < ran_s:
            tries += 1
            why = 'error="failed to dial to edge with quic: timeout: no recent network activity"'
            log("ERR", f"Failed to dial a quic connection {why} connIndex=0 event=0 ip={flags.edge_ip}")
        elif flags.unauthorized and tries < ran_s * 20:
            tries += 1
            log("ERR", 'Register tunnel error from server side error="Unauthorized: Invalid tunnel secret" connIndex=0')
        time.sleep(0.01)


if __name__ == "__main__":
    main(sys.argv[1:])
