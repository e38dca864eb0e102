"""The configuration of the front door, Caddy's JSON. Pure: nothing is read or written here.

What changes often is not in it: whether the model can be reached, and what is said while it cannot, stands in files
that Caddy reads for every request, because each load of a new configuration closes the connections of clients on which
it has not read a whole request head (measured with 2.11.7, on TCP and unix sockets alike): only keys and settings do that.
The route of a request: the page for people · the allow-list · the method · the key · 503 while closed · vLLM.
"""

import base64
import json
import re
from urllib.parse import urlsplit

import msgspec

from llmwd.core.doorpage import POLICY

PATHS = {  # what passes, and by which methods
    "/health": ("GET", "HEAD"),
    "/v1/models": ("GET", "HEAD"),
    "/v1/chat/completions": ("POST",),
    "/v1/completions": ("POST",),
    "/v1/embeddings": ("POST",),
    "/v1/responses": ("POST",),
    "/v1/messages": ("POST",),
}
ADDED_METHODS = ("GET", "HEAD", "POST")  # of what DOOR_ALLOW adds
OPEN, HOLDING, CLOSED = "open", "holding", "closed"  # words of the file `state`
# The files: the word, what is answered while closed, and where and with which key vLLM is reached.
STATE, BODY, RETRY_AFTER, MODELS, PAGE = "state", "error.json", "retry-after", "models.json", "page.html"
DIAL, UPSTREAM_KEY = "dial", "upstream-key"

HEADER_BYTES = 32 << 10
HEADERS_WITHIN_S = 10
IDLE_S = 120
BODY_STALLS_S, BODY_BYTES_PER_S = 15, 1000  # a request may take this long, and a second more for each 1000 bytes
READS_WITHIN_S = 60  # a client that reads nothing of its answer for so long has gone
TRY_EVERY_S = 0.1
DIAL_WITHIN_S = 2


class Account(msgspec.Struct, frozen=True):
    """One key: `name` in the log, bcrypt of its secret."""

    name: str
    bcrypt: str


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """All that the configuration depends on. tls: vLLM speaks https. accounts None: everybody may come in. paces: Caddy
    can limit how slowly a body comes."""

    folder: str  # where the files above are
    socket: str
    admin: str
    port: int | None
    tls: bool
    accounts: tuple[Account, ...] | None
    allow: tuple[str, ...]
    body_mb: int
    most: int  # requests at vLLM at once
    hold_s: float
    paces: bool = False


def nobody(folder: str) -> str:
    """The address to dial while the model is away for a moment: there is nothing."""
    return f"unix/{folder}/nobody"


def closed(folder: str) -> str:
    """The address to dial while it is away for longer: our own word for that, so that a request that waits is told."""
    return f"unix/{folder}/closed.sock"


def dial(url: str) -> str:
    """The same for vLLM's URL."""
    parts = urlsplit(url)
    host = parts.hostname or "127.0.0.1"
    return f"{f'[{host}]' if ':' in host else host}:{parts.port}"


def make(wanted: Wanted) -> bytes:
    """Caddy's configuration as JSON."""
    listen = [f"unix/{wanted.socket}|0600"] + ([f"tcp4/127.0.0.1:{wanted.port}"] if wanted.port else [])
    server = {
        "listen": listen,
        "protocols": ["h1"],
        "automatic_https": {"disable": True},
        "read_header_timeout": _seconds(HEADERS_WITHIN_S),
        "idle_timeout": _seconds(IDLE_S),
        "max_header_bytes": HEADER_BYTES,
        **(_pace(wanted.hold_s) if wanted.paces else {}),
        "trusted_proxies_unix": True,  # who reaches the socket is us: cloudflared, which tells whom it speaks for
        "client_ip_headers": ["Cf-Connecting-Ip", "X-Forwarded-For"],
        "logs": {"default_logger_name": "access"},
        "routes": _routes(wanted),
        "errors": {"routes": _error_routes(wanted)},
    }
    told_closed = {
        "listen": [f"{closed(wanted.folder)}|0600"], "protocols": ["h1"], "automatic_https": {"disable": True},
        "routes": [{"handle": [_closed(wanted)]}],
    }  # fmt: skip
    servers = {"door": server, "closed": told_closed}
    config = {
        "admin": {"listen": f"unix/{wanted.admin}|0600", "config": {"persist": False}},
        "logging": {"logs": {"default": _log(None), "access": _log("http.log.access.access")}},
        "apps": {"http": {"servers": servers}},
    }
    return json.dumps(config, indent=1).encode()


def _pace(hold_s: float) -> dict[str, int]:
    """Not Caddy's read_timeout: in the versions that know nothing else it ends the answer as well."""
    return {  # the time counts from the headers on, and a request that is held is read only afterwards
        "read_idle_timeout": _seconds(BODY_STALLS_S + hold_s), "read_min_rate": BODY_BYTES_PER_S,
        "write_idle_timeout": _seconds(READS_WITHIN_S),
    }  # fmt: skip


def trial() -> bytes:
    """A configuration that only a Caddy takes that can pace clients (it came with 2.11.7 or a little before)."""
    server = {"listen": ["unix//nowhere"], "automatic_https": {"disable": True}, **_pace(0.0)}
    return json.dumps({"apps": {"http": {"servers": {"door": server}}}}).encode()


def is_paced(config: bytes) -> bool:
    """Whether this one of make() was for such a Caddy."""
    return b'"read_min_rate"' in config


def _seconds(seconds: float) -> int:
    """Caddy's durations are nanoseconds."""
    return int(seconds * 1e9)


def _log(logger: str | None) -> dict:
    """One line of JSON for each request, to standard error, which the holder writes to a log that it rotates."""
    if logger is None:
        return {"writer": {"output": "stderr"}, "level": "WARN", "encoder": {"format": "json"}, "exclude": ["http.log.access", "admin"]}
    dropped = ("request>headers", "request>tls", "resp_headers", "logger", "level", "msg")
    fields: dict = {name: {"filter": "delete"} for name in dropped}
    fields["request>uri"] = {"filter": "regexp", "regexp": r"\?.*", "value": ""}  # people put keys there
    return {
        "writer": {"output": "stderr"}, "level": "INFO", "include": [logger],
        "encoder": {"format": "filter", "wrap": {"format": "json", "time_format": "iso8601"}, "fields": fields},
    }  # fmt: skip


# --- the way in ---------------------------------------------------------------------------------------


def _routes(wanted: Wanted) -> list[dict]:
    allowed = {**{path: ADDED_METHODS for path in wanted.allow}, **PATHS}
    by_methods: dict[tuple[str, ...], list[str]] = {}
    for path, methods in allowed.items():
        by_methods.setdefault(methods, []).append(path)
    fits = [{"vars": {_PATH: paths}, "method": list(methods)} for methods, paths in by_methods.items()]
    return [
        {"match": [{"vars": {_PATH: ["/"]}, "method": ["GET", "HEAD"]}], "handle": [_page(wanted)], "terminal": True},
        {"match": [{"not": [{"vars": {_PATH: list(allowed)}}]}], "handle": [_said(404, "not_found", NOT_FOUND)], "terminal": True},
        {"match": [{"not": fits}], "handle": [_said(405, "method_not_allowed", NO_METHOD)], "terminal": True},
        *_key_routes(wanted),
        *_away_routes(wanted),
        {"handle": _proxy(wanted)},
    ]


# Caddy's own path matcher cleans a path and ignores case before it compares, but passes on what came: /metrics/../health
# would be let through as /health, and vLLM would answer it as /metrics. This is the decoded path as it came.
_PATH = "{http.request.uri.path}"
NOT_FOUND = "this path is not served here"
NO_METHOD = "this path is not served by this method"
NO_KEY = "a valid API key is needed: Authorization: Bearer KEY"
NO_KEYS = "no API key has been made yet, so this server is shut (llmwd-ctl key add)"


def _key_routes(wanted: Wanted) -> list[dict]:
    accounts = wanted.accounts
    if accounts is None:
        return []
    if not accounts:
        return [{"handle": [_said(403, "no_keys", NO_KEYS)], "terminal": True}]
    key = {"header_regexp": {"Authorization": {"name": "key", "pattern": r"^(?i:bearer)\s+(\S+)\s*$"}}}
    basic = {"handler": "headers", "request": {"set": {"Authorization": ["Basic {http.regexp.key.1}"]}}}
    of_header = {"handler": "headers", "request": {"set": {"Authorization": ["Basic {http.request.header.X-Api-Key}"]}}}
    listed = [{"username": account.name, "password": account.bcrypt} for account in accounts]
    check = {
        "handler": "authentication",
        "providers": {"http_basic": {"hash": {"algorithm": "bcrypt"}, "hash_cache": {}, "accounts": listed}},
    }
    # A name that is not listed would be compared with a hash that takes Caddy a second of a CPU: it never gets there.
    known = {"Authorization": {"pattern": f"^Basic (?:{'|'.join(sorted(beginning(each.name) for each in accounts))})"}}
    return [
        {"group": "key", "match": [key], "handle": [basic]},
        {"group": "key", "match": [{"header": {"X-Api-Key": ["*"]}}], "handle": [of_header]},
        {"match": [{"not": [{"header_regexp": known}]}], "handle": [_said(401, "invalid_api_key", NO_KEY)], "terminal": True},
        {"handle": [check]},
    ]


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


# --- while the model is away --------------------------------------------------------------------------


def _file(wanted: Wanted, name: str) -> str:
    return f"{{file.{wanted.folder}/{name}}}"


def _here(wanted: Wanted) -> dict:
    return {"vars": {_file(wanted, STATE): [OPEN, HOLDING]}}


def _away_routes(wanted: Wanted) -> list[dict]:
    away = {"not": [_here(wanted)]}
    return [
        {"match": [{**away, "vars": {_PATH: ["/v1/models"]}}], "handle": [_models(wanted)], "terminal": True},
        {"match": [away], "handle": [_closed(wanted)], "terminal": True},
    ]


def _answer(status: int, kind: str, body: str, **headers: str) -> dict:
    sent = {"Content-Type": [kind], "Cache-Control": ["no-store"], **{name.replace("_", "-"): [value] for name, value in headers.items()}}
    return {"handler": "static_response", "status_code": status, "headers": sent, "body": body}


def _closed(wanted: Wanted) -> dict:
    return _answer(503, "application/json", _file(wanted, BODY), Retry_After=_file(wanted, RETRY_AFTER))


def _models(wanted: Wanted) -> dict:
    return _answer(200, "application/json", _file(wanted, MODELS))


def _page(wanted: Wanted) -> dict:
    return _answer(
        200, "text/html; charset=utf-8", _file(wanted, PAGE), Content_Security_Policy=POLICY,
        X_Content_Type_Options="nosniff", X_Frame_Options="DENY", Referrer_Policy="no-referrer",
    )  # fmt: skip


def _said(status: int, code: str, message: str) -> dict:
    kind = "authentication_error" if status == 401 else "permission_error" if status == 403 else "invalid_request_error"
    error = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    more = {"WWW_Authenticate": "Bearer"} if status == 401 else {}
    return _answer(status, "application/json", json.dumps(error), **more)


def _error_routes(wanted: Wanted) -> list[dict]:
    """What becomes of Caddy's own errors: never 502 nor 504, which Cloudflare replaces by a page of its own."""
    status = "{http.error.status_code}"
    no_prompt = {"handler": "headers", "response": {"deferred": True, "set": {"WWW-Authenticate": ["Bearer"]}}}
    too_large = f"the request is larger than {wanted.body_mb} MB"
    return [
        {"match": [{"vars": {status: ["401"]}}], "handle": [no_prompt, _said(401, "invalid_api_key", NO_KEY)], "terminal": True},
        {"match": [{"vars": {status: ["413"]}}], "handle": [_said(413, "request_too_large", too_large)], "terminal": True},
        {"match": [{"vars": {status: ["400", "408", "499"]}}], "handle": [_said(400, "bad_request", "the request is damaged")], "terminal": True},
        {"handle": [_closed(wanted)]},
    ]


# --- to vLLM ------------------------------------------------------------------------------------------


def _proxy(wanted: Wanted) -> list[dict]:
    """A request that meets the end of vLLM is tried again as well: for some milliseconds nobody knows of that end."""
    # A connection for each request: a kept one may have been closed by vLLM at this very moment (it does so after 5 idle
    # seconds, and when it ends), and a POST that meets that is lost. A new one on the loopback takes a tenth of a millisecond.
    transport: dict = {
        "protocol": "http", "dial_timeout": _seconds(DIAL_WITHIN_S), "compression": False, "versions": ["1.1"],
        "keep_alive": {"enabled": False},
    }  # fmt: skip
    if wanted.tls:  # our own server on the loopback: its certificate names another host
        transport["tls"] = {"insecure_skip_verify": True}
    # What has no connection yet is tried again in any case; what had one may have been worked on, or met our own refusal in
    # the clear where vLLM speaks TLS.
    again = [{**_here(wanted), "method": ["GET", "HEAD"]}]
    hold = {"try_duration": _seconds(wanted.hold_s), "try_interval": _seconds(TRY_EVERY_S), "retry_match": again} if wanted.hold_s else {}
    return [
        {"handler": "request_body", "max_size": wanted.body_mb << 20},
        {
            "handler": "reverse_proxy",
            "transport": transport,
            # Read anew for every try: while the model is away, nobody else's program on its port gets a request.
            "upstreams": [{"dial": _file(wanted, DIAL), "max_requests": wanted.most}],
            # No flush_interval: streams are flushed at once as it is, and -1 would keep vLLM at work for clients that left.
            **({"load_balancing": hold} if hold else {}),
            "headers": {
                "request": {
                    "set": {"Authorization": [_file(wanted, UPSTREAM_KEY)]},
                    "delete": ["X-Api-Key", "Cookie", "Proxy-Authorization"],
                }
            },
            "handle_response": [{"match": {"status_code": [502, 504]}, "routes": [{"handle": [_closed(wanted)]}]}],
        },
    ]
