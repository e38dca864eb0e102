"""The configuration of the front door, Caddy's JSON. Pure: nothing is read or written here.

What changes often is not in it: whether the model can be reached, and what is said while it cannot, stands in files
that Caddy reads for every request, because each load of a new configuration closes the connections of clients on which
it has not read a whole request head (measured with 2.11.7, on TCP and unix sockets alike): only keys and settings do that.
The route of a request: the page for people · the allow-list · the method · the key · 503 while closed · vLLM.
"""

import base64
import json
import re

from llmwd.core import dooranswers as answers
from llmwd.core.dooranswers import Part
from llmwd.core.doorwanted import ADDED_METHODS, DIAL, HOLDING, LOOKS, OPEN, PATHS, STATE, UPSTREAM_KEY, Account, Wanted, closed

HEADER_BYTES = 32 << 10
HEADERS_WITHIN_S = 10
IDLE_S = 120  # longer than cloudflared keeps a connection (90 s): it has to be the one that closes it
PORT_IDLE_S = 15  # everybody on the node can hold connections to the port, and there is not room for any number
BODY_STALLS_S, BODY_BYTES_PER_S = 15, 1000  # a request may take this long, and a second more for each 1000 bytes
READS_WITHIN_S = 60  # a client that reads nothing of its answer for so long has gone
TRY_EVERY_S = 0.1
DIAL_WITHIN_S = 2
# Of what a client sends, vLLM gets no secret: it takes none but its own key, and it would stand in its log.
SECRETS = ("X-Api-Key", "Api-Key", "X-Goog-Api-Key", "Cookie", "Proxy-Authorization", "Cf-Access-*")
# Answers of vLLM that no client can do anything about: the key that it refuses is ours, the rest is what Cloudflare
# replaces or would take for its own (520 to 530), and what says less than our own 503.
NOT_FOR_CLIENTS = (401, 502, 503, 504, *range(520, 531))


def make(wanted: Wanted) -> bytes:
    """Caddy's configuration as JSON."""
    servers = {"door": _server(wanted, f"unix/{wanted.socket}|0600", IDLE_S)}
    if wanted.port:
        servers["port"] = _server(wanted, f"tcp4/127.0.0.1:{wanted.port}", PORT_IDLE_S)
    servers["closed"] = {
        "listen": [f"{closed(wanted.folder)}|0600"], "protocols": ["h1"], "automatic_https": {"disable": True},
        "routes": [{"handle": [answers.closed(wanted)]}],
    }  # fmt: skip
    config = {
        "admin": {"listen": f"unix/{wanted.admin}|0600", "config": {"persist": False}},
        "logging": {"logs": {"default": _faults_log(), "access": _access_log()}},
        "apps": {"http": {"servers": servers}},
    }
    return json.dumps(config, indent=1).encode()


def _server(wanted: Wanted, listen: str, idle_s: float) -> Part:
    return {
        "listen": [listen],
        "protocols": ["h1"],
        "automatic_https": {"disable": True},
        "read_header_timeout": _seconds(HEADERS_WITHIN_S),
        "idle_timeout": _seconds(idle_s),
        "max_header_bytes": HEADER_BYTES,
        # Not Caddy's read_timeout: it ends the answer as well. The time counts from the headers on, and a request that is held
        # is read only afterwards.
        "read_idle_timeout": _seconds(BODY_STALLS_S + wanted.hold_s), "read_min_rate": BODY_BYTES_PER_S,
        "write_idle_timeout": _seconds(READS_WITHIN_S),
        "trusted_proxies_unix": True,  # who reaches the socket is us: cloudflared, which tells whom it speaks for
        "client_ip_headers": ["Cf-Connecting-Ip", "X-Forwarded-For"],
        "logs": {"default_logger_name": "access"},
        "routes": _routes(wanted),
        "errors": {"routes": answers.of_errors(wanted)},
    }  # fmt: skip


def _seconds(seconds: float) -> int:
    """Caddy's durations are nanoseconds."""
    return int(seconds * 1e9)


def _log(level: str, dropped: tuple[str, ...], **more: object) -> Part:
    """Lines of JSON to standard error, which the holder writes to a log that it rotates. Headers and queries hold secrets."""
    fields: Part = {name: {"filter": "delete"} for name in ("request>headers", "request>tls", "resp_headers", *dropped)}
    fields["request>uri"] = {"filter": "regexp", "regexp": r"\?.*", "value": ""}
    encoder = {"format": "filter", "wrap": {"format": "json", "time_format": "iso8601"}, "fields": fields}
    return {"writer": {"output": "stderr"}, "level": level, "encoder": encoder, **more}


def _access_log() -> Part:
    """One line for each request."""
    return _log("INFO", ("logger", "level", "msg"), include=["http.log.access.access"])


def _faults_log() -> Part:
    """What goes wrong, also with requests."""
    return _log("WARN", (), exclude=["http.log.access", "admin"])


# --- the way in ---------------------------------------------------------------------------------------


def _routes(wanted: Wanted) -> list[Part]:
    allowed = {**{path: ADDED_METHODS for path in wanted.allow}, **PATHS}
    by_methods: dict[tuple[str, ...], list[str]] = {}
    for path, methods in allowed.items():
        by_methods.setdefault(methods, []).append(path)
    fits = [{**_path(paths), "method": list(methods)} for methods, paths in by_methods.items()]
    not_found, no_method = answers.said(404, "not_found", answers.NOT_FOUND), answers.said(405, "method_not_allowed", answers.NO_METHOD)
    return [
        {"match": [{**_path(["/"]), "method": ["GET", "HEAD"]}], "handle": [answers.page(wanted)], "terminal": True},
        {"match": [{"not": [_path(list(allowed))]}], "handle": [not_found], "terminal": True},
        {"match": [{"not": fits}], "handle": [no_method], "terminal": True},
        *_key_routes(wanted),
        # A connection that became something else than HTTP would be past all of this; and people put secrets into queries.
        {"match": [_path(list(PATHS))], "handle": [{"handler": "headers", "request": {"delete": ["Upgrade"]}}, {"handler": "rewrite", "uri": "?"}]},
        {"handle": [{"handler": "request_body", "max_size": wanted.body_mb << 20}]},
        *_away_routes(wanted),
        {"handle": [_work(wanted)]},
    ]  # fmt: skip


def _path(paths: list[str]) -> Part:
    # Caddy's own path matcher cleans a path and ignores case before it compares, but passes on what came: /metrics/../health
    # would be let through as /health, and vLLM would answer it as /metrics. This is the decoded path as it came.
    return {"vars": {"{http.request.uri.path}": paths}}


def _key_routes(wanted: Wanted) -> list[Part]:
    accounts = wanted.accounts
    if accounts is None:
        return []
    if not accounts:
        return [{"handle": [answers.said(403, "no_keys", answers.NO_KEYS[wanted.lack])], "terminal": True}]
    # All values of the header in one: a second Authorization makes it none of these, and nothing but what stands here reaches
    # the check.
    key = {"vars_regexp": {"{http.request.header.Authorization}": {"name": "key", "pattern": r"^(?i:bearer) +([A-Za-z0-9+/=_-]+) *$"}}}
    basic = {"handler": "headers", "request": {"set": {"Authorization": ["Basic {http.regexp.key.1}"]}}}
    of_header = {"handler": "headers", "request": {"set": {"Authorization": ["Basic {http.request.header.X-Api-Key}"]}}}
    neither = {"handler": "headers", "request": {"delete": ["Authorization"]}}
    listed = [{"username": account.name, "password": account.bcrypt} for account in accounts]
    check = {
        "handler": "authentication",
        "providers": {"http_basic": {"hash": {"algorithm": "bcrypt"}, "hash_cache": {}, "accounts": listed}},
    }
    return [
        {"group": "key", "match": [key], "handle": [basic]},
        {"group": "key", "match": [{"header": {"X-Api-Key": ["*"]}}], "handle": [of_header]},
        {"group": "key", "handle": [neither]},
        {"match": [{"not": [_known(accounts)]}], "handle": [answers.said(401, "invalid_api_key", answers.NO_KEY)], "terminal": True},
        {"handle": [check]},
    ]


def _known(accounts: tuple[Account, ...]) -> Part:
    """A name that is not listed would be compared with a hash that takes Caddy a second of a CPU: it never gets there."""
    names = "|".join(sorted(beginning(each.name) for each in accounts))
    return {"header_regexp": {"Authorization": {"pattern": f"^Basic (?:{names})"}}}


def beginning(name: str) -> str:
    """A regular expression for how the base64 of `name:SECRET` begins, whatever the secret: exactly this name's."""
    text = f"{name}:".encode()
    whole = base64.b64encode(text + bytes(-len(text) % 3)).decode()
    sure = len(text) * 8 // 6
    found = re.escape(whole[:sure])
    if len(text) % 3 == 0:
        return found
    possible = {base64.b64encode(text + bytes([byte, 0])).decode()[sure] for byte in range(33, 127)}
    return f"{found}[{''.join(sorted(map(re.escape, possible)))}]"


def _here(wanted: Wanted, *words: str) -> Part:
    return {"vars": {answers.file(wanted, STATE): list(words)}}


def _away_routes(wanted: Wanted) -> list[Part]:
    """Who only looks is answered at once; what has work for the model may wait. (Each look at the word reads its file: once
    for a request.)"""
    shut, away = {"not": [_here(wanted, OPEN)]}, {"not": [_here(wanted, OPEN, HOLDING)]}
    told = [{"match": [_path(["/v1/models"])], "handle": [answers.models(wanted)], "terminal": True}, {"handle": [answers.closed(wanted)]}]
    looks = [{"match": [shut], "handle": [{"handler": "subroute", "routes": told}], "terminal": True}, {"handle": _look(wanted)}]
    return [
        {"match": [_path(list(LOOKS))], "handle": [{"handler": "subroute", "routes": looks}], "terminal": True},
        {"match": [away], "handle": [answers.closed(wanted)], "terminal": True},
    ]


# --- to vLLM ------------------------------------------------------------------------------------------


def _look(wanted: Wanted) -> list[Part]:
    """For those that only look. Caddy counts requests by the upstream's text, so this one has another text."""
    return [{"handler": "vars", "dial": answers.file(wanted, DIAL)}, _proxy(wanted, {"dial": "{http.vars.dial}"})]


def _work(wanted: Wanted) -> Part:
    """A request that meets the end of vLLM is tried again as well: for some milliseconds nobody knows of that end."""
    # What has no connection yet is tried again in any case; what had one may have been worked on, or met our own refusal in
    # the clear where vLLM speaks TLS.
    again = [{**_here(wanted, OPEN, HOLDING), "method": ["GET", "HEAD"]}]
    hold = {"try_duration": _seconds(wanted.hold_s), "try_interval": _seconds(TRY_EVERY_S), "retry_match": again}
    # Read anew for every try: while the model is away, nobody else's program on its port gets a request.
    proxy = _proxy(wanted, {"dial": answers.file(wanted, DIAL), "max_requests": wanted.most})
    return {**proxy, **({"load_balancing": hold} if wanted.hold_s else {})}


def _proxy(wanted: Wanted, upstream: Part) -> Part:
    # A connection for each request: a kept one may have been closed by vLLM at this very moment (it does so after 5 idle
    # seconds, and when it ends), and a POST that meets that is lost. A new one on the loopback takes a tenth of a millisecond.
    transport: Part = {
        "protocol": "http", "dial_timeout": _seconds(DIAL_WITHIN_S), "compression": False, "versions": ["1.1"],
        "keep_alive": {"enabled": False},
    }  # fmt: skip
    if wanted.tls:  # our own server on the loopback: its certificate names another host
        transport["tls"] = {"insecure_skip_verify": True}
    return {
        "handler": "reverse_proxy",
        "transport": transport,
        "upstreams": [upstream],
        # No flush_interval: streams are flushed at once as it is, and -1 would keep vLLM at work for clients that left.
        "headers": {"request": {"set": {"Authorization": [answers.file(wanted, UPSTREAM_KEY)]}, "delete": list(SECRETS)}},
        "handle_response": [{"match": {"status_code": list(NOT_FOR_CLIENTS)}, "routes": [{"handle": [answers.closed(wanted)]}]}],
    }
