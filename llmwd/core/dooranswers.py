"""The front door's own answers, as handlers and routes of Caddy's configuration. Pure.

None of them is 502 or 504, which Cloudflare replaces by a page of its own. What is said while the model is away stands in
files; where one is gone, a fixed text takes its place until it is written again.
"""

import json

from llmwd.core import doorwanted
from llmwd.core.doorpage import POLICY
from llmwd.core.doorwanted import ALL_EXPIRED, DAMAGED, NONE_MADE, Wanted

Part = dict[str, object]

NOT_FOUND = "this path is not served here"
NO_METHOD = "this path is not served by this method"
NO_KEY = "a valid API key is needed: Authorization: Bearer KEY"
NO_KEYS = {
    NONE_MADE: "no API key has been made yet, so this server is shut (llmwd-ctl key add)",
    ALL_EXPIRED: "every API key of this server has expired, so it is shut",
    DAMAGED: "the API keys of this server cannot be read at present, so it is shut (llmwd-ctl status)",
}
OVERLOADED = "more requests are under way than this server takes at once: ask again"
UNKNOWN = "It is not known at this moment whether the model can be reached. Ask again."
SOON = "5"  # seconds, of the fixed text
FREE_SOON = "2"  # of an overload
KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 503: "service_unavailable",
}  # fmt: skip


def answer(status: int, kind: str, body: str, **headers: str) -> Part:
    """A handler that answers this."""
    sent = {"Content-Type": [kind], "Cache-Control": ["no-store"], **{name.replace("_", "-"): [value] for name, value in headers.items()}}
    return {"handler": "static_response", "status_code": status, "headers": sent, "body": body}


def said(status: int, code: str, message: str, **headers: str) -> Part:
    """The same with an error object as OpenAI's clients know it."""
    error = {"error": {"message": message, "type": KINDS.get(status, KINDS[400]), "param": None, "code": code}}
    more = {"WWW_Authenticate": "Bearer"} if status == 401 else {}
    return answer(status, "application/json", json.dumps(error), **more, **headers)


def file(wanted: Wanted, name: str) -> str:
    """What the file holds, read anew each time; Caddy takes one that is not there as empty."""
    return f"{{file.{wanted.folder}/{name}}}"


def _either(wanted: Wanted, names: tuple[str, ...], otherwise: Part, then: Part) -> Part:
    """One handler: `then`, and `otherwise` if one of the files is empty."""
    empty = [{"vars": {file(wanted, name): [""]}} for name in names]
    return {"handler": "subroute", "routes": [{"match": empty, "handle": [otherwise], "terminal": True}, {"handle": [then]}]}


def closed(wanted: Wanted) -> Part:
    """503 with the reason."""
    told = answer(503, "application/json", file(wanted, doorwanted.BODY), Retry_After=file(wanted, doorwanted.RETRY_AFTER))
    return _either(wanted, (doorwanted.BODY, doorwanted.RETRY_AFTER), said(503, "loading", UNKNOWN, Retry_After=SOON), told)


def models(wanted: Wanted) -> Part:
    """/v1/models while the model is away."""
    return _either(wanted, (doorwanted.MODELS,), closed(wanted), answer(200, "application/json", file(wanted, doorwanted.MODELS)))


def page(wanted: Wanted) -> Part:
    """The page for people."""
    fixed = {
        "Content_Security_Policy": POLICY, "X_Content_Type_Options": "nosniff", "X_Frame_Options": "DENY", "Referrer_Policy": "no-referrer",
    }  # fmt: skip
    html = "text/html; charset=utf-8"
    return _either(wanted, (doorwanted.PAGE,), answer(200, html, UNKNOWN, **fixed), answer(200, html, file(wanted, doorwanted.PAGE), **fixed))


def of_errors(wanted: Wanted) -> list[Part]:
    """Routes: what becomes of Caddy's own errors. 503 is its word for no room at vLLM, by max_requests."""
    no_prompt: Part = {"handler": "headers", "response": {"deferred": True, "set": {"WWW-Authenticate": ["Bearer"]}}}
    too_large = f"the request is larger than {wanted.body_mb} MB"
    by_status: list[tuple[list[str], list[Part]]] = [
        (["401"], [no_prompt, said(401, "invalid_api_key", NO_KEY)]),
        (["413"], [said(413, "request_too_large", too_large)]),
        (["400", "408", "499"], [said(400, "bad_request", "the request is damaged")]),
        (["503"], [said(429, "overloaded", OVERLOADED, Retry_After=FREE_SOON)]),
    ]
    routes: list[Part] = [
        {"match": [{"vars": {"{http.error.status_code}": statuses}}], "handle": handlers, "terminal": True} for statuses, handlers in by_status
    ]
    return [*routes, {"handle": [closed(wanted)]}]
