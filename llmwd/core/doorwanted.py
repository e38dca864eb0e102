"""What the configuration of the front door depends on, and the names of the files that Caddy reads. Pure."""

from urllib.parse import urlsplit

import msgspec

PATHS = {  # what passes, and by which methods
    "/health": ("GET", "HEAD"),
    "/v1/models": ("GET", "HEAD"),
    "/v1/chat/completions": ("POST",),
    "/v1/completions": ("POST",),
    "/v1/embeddings": ("POST",),
    "/v1/responses": ("POST",),
    "/v1/messages": ("POST",),
}
LOOKS = ("/health", "/v1/models")  # those that only look: they wait for nobody, and nobody is refused for them
ADDED_METHODS = ("GET", "HEAD", "POST")  # of what DOOR_ALLOW adds
OPEN, HOLDING, CLOSED = "open", "holding", "closed"  # words of the file `state`
# The files: the word, what is answered while closed, and where and with which key vLLM is reached.
STATE, BODY, RETRY_AFTER, MODELS, PAGE = "state", "error.json", "retry-after", "models.json", "page.html"
DIAL, UPSTREAM_KEY = "dial", "upstream-key"
UPSTREAM = "upstream"  # not for Caddy: the incarnation of vLLM that the key is of
NONE_MADE, ALL_EXPIRED, DAMAGED = "none made", "all expired", "damaged"  # why no key opens the door


class Account(msgspec.Struct, frozen=True):
    """One key: `name` in the log, bcrypt of its secret."""

    name: str
    bcrypt: str


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """All that the configuration depends on. tls: vLLM speaks https. accounts None: everybody may come in; lack: why there
    are none."""

    folder: str  # where the files above are
    socket: str
    admin: str
    port: int | None
    tls: bool
    accounts: tuple[Account, ...] | None
    lack: str = NONE_MADE
    allow: tuple[str, ...]
    body_mb: int
    most: int  # requests at vLLM at once
    hold_s: float


def shuts_out(before: Wanted | None, after: Wanted) -> bool:
    """Whether `before` (None: not known) lets somebody or something in that `after` keeps out."""
    if before is None:
        return True
    if after.accounts is not None and (before.accounts is None or set(before.accounts) - set(after.accounts)):
        return True
    return bool(set(before.allow) - set(after.allow))


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
