"""What cloudflared's words and its end mean, and when it is started again. Pure.

Theory of operation. Three kinds of fault are told apart. **Permanent**: what it was given cannot work (exit 255, exit 0
with "Incorrect Usage", an exit 1 about its configuration, registrations refused as unauthorized, which never end it).
It is told once and left until something changes. **Network**: every other exit 1 (name servers, the edge, a
registration that failed), and a cloudflared that runs but does not get its connection back. It is tried again for
ever, with a growing wait, and is no reason to give up: it gets well by itself. **Own**: killed by a signal (SIGTERM ends
it with 0, whoever sent it), a lost holder. It counts as any child's death does (core/restart.py).

Measured with 2026.8: after a lost edge it waits up to 320 s between two tries, and a new one connects within a second;
name servers that do not answer keep its metrics server from listening for 40 s and end it after 60 s; it logs up to
16 000 lines a second.
"""

import itertools
import re
from enum import StrEnum

import msgspec

REFUSALS_TOLD = 3  # so many registrations refused as unauthorized are no accident
LONGEST_ERROR = 200
METRICS_WITHIN_S = 75.0
STARTED_PATIENCE_S = 15.0  # for a first connection, while the edge answers: one dial may take that long
LOST_PATIENCE_S = 6.0  # for a connection that was lost, while the edge answers: its own first try comes within 22 s
PATIENCE_MOST_S = 300.0  # also while the edge does not answer us
SILENT_PATIENCE_S = 60.0  # of a metrics server that gives no answer: a busy node makes it slow, and the tunnel works
EDGE_PORT = 7844
HTTP2 = "http2"
EDGES_ASKED = 4

_METRICS = re.compile(r"Starting metrics server on (127\.0\.0\.1:\d{1,5})/metrics")
_LINE = re.compile(r"^\S+Z (?P<level>INF|WRN|ERR|FTL) (?P<text>.*)$")
# What it cannot begin with is printed as it is, as its last line, and a hint after it.
_NO_WORD_OF_ITS = re.compile(r"\s|$|llmwd holder: |See 'cloudflared ")
_HEADLINE = re.compile(r"Incorrect Usage|panic: |fatal error: ")  # what follows these explains nothing
_STAMPED = re.compile(r"\S+Z [A-Z]{3} ")
_ASKED_TO_END = "Initiating graceful shutdown"
_EDGE = re.compile(r"\bip=((?:\d{1,3}\.){3}\d{1,3}|[0-9a-fA-F]*:[0-9a-fA-F:]+)(?:\s|$)")
_LOCATION = re.compile(r'^cloudflared_tunnel_server_locations\{[^}]*edge_location="([^"]{1,32})"[^}]*\} 1$', re.M)
# A clean stop logs these as errors as well: they explain nothing.
_NOT_A_CAUSE = ("Connection terminated", "no more connections active and exiting", "Initiating shutdown")
_CONFIGURATION = re.compile(
    r"credentials|ingress rule|config(uration)? file|parsing YAML|yaml: |[Uu]nknown protocol|protocol .*not supported"
    r"|invalid value .* for flag|grace-period must|token is not valid|token file|originRequest"
)
_NETWORK = re.compile(r"lookup|dial |i/o timeout|refused|unreachable|no route|EOF|reset by peer|certificate|quick Tunnel")


class Kind(StrEnum):
    permanent = "permanent"
    network = "network"
    own = "own"


class Death(msgspec.Struct, frozen=True):
    """An end that nobody asked for. how: a sentence."""

    kind: Kind
    how: str


def metrics_address(log: str) -> str | None:
    """`127.0.0.1:PORT` of its metrics server, from what it logged since its start; the last one."""
    found = _METRICS.findall(log)
    return found[-1] if found else None


def locations(metrics: str) -> tuple[str, ...]:
    """The places of Cloudflare's that it is connected to (`ams01`), each once, from Prometheus' lines."""
    return tuple(sorted(set(_LOCATION.findall(metrics))))


def edges(log: str, known: tuple[str, ...], protocol: str) -> tuple[str, ...]:
    """The addresses of Cloudflare's edge that it has tried, the latest first, at most EDGES_ASKED. None where it may be
    trying by UDP (`auto` does so for 146 s): that they answer by TCP then says nothing of its next try."""
    if protocol != HTTP2:
        return ()
    return tuple(dict.fromkeys((*reversed(_EDGE.findall(log)), *known)))[:EDGES_ASKED]


def last_error(log: str) -> str:
    """The last line of a log that says what went wrong, without its time; "" if none does."""
    for line in reversed(log.splitlines()):
        found = _LINE.match(line)
        if found and found["level"] in ("ERR", "FTL") and not found["text"].startswith(_NOT_A_CAUSE):
            return _cut(found["text"])
    return ""


def last_words(log: str) -> str:
    """Why it ended: as last_error, and what it printed without time and level before its end."""
    lines = log.splitlines()
    plain = itertools.takewhile(lambda line: not _STAMPED.match(line), reversed(lines))
    said = next((line for line in lines if _HEADLINE.match(line)), "")
    return _cut(said or next((line for line in plain if not _NO_WORD_OF_ITS.match(line)), "")) or last_error(log)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_ERROR else text[: LONGEST_ERROR - 1] + "…"


def refusals(log: str) -> int:
    """How many registrations the edge has refused for the credentials: cloudflared tries again for ever."""
    return sum("Register tunnel error" in line and "Unauthorized" in line for line in log.splitlines())


def death(status: int | None, error: str, log: str, listened: bool) -> Death:
    """Judge an end that nobody asked for. status, error: as in HolderState; log: what it logged last; listened: its
    metrics server did, so it took what it was given."""
    cause = last_words(log)
    tail = f": {cause}" if cause else ""
    if error:
        return Death(Kind.permanent, error)
    if status == 0 and (listened or _ASKED_TO_END in log) and not cause.startswith("Incorrect Usage"):
        return Death(Kind.own, f"cloudflared ended as if somebody had asked it to (exit code 0){tail}")
    if status == 0:
        how = f"cloudflared ended at once as if it had been asked to: this version does not know our arguments{tail}"
        return Death(Kind.permanent, how)
    if status == 255:
        return Death(Kind.permanent, f"cloudflared does not accept what it was given (exit code 255){tail}")
    if status is None:
        return Death(Kind.own, f"cloudflared ended without a word{tail}")
    if status < 0:
        return Death(Kind.own, f"cloudflared ended by itself (killed by signal {-status}){tail}")
    how = f"cloudflared ended by itself (exit code {status}){tail}"
    if status == 1 and (refusals(log) or (_CONFIGURATION.search(cause) and not _NETWORK.search(cause))):
        return Death(Kind.permanent, how)
    return Death(Kind.network, how)


def retry_after_s(faults: int, least_s: float, most_s: float, dice: float) -> float:
    """The wait after so many network faults in a row (from 1). dice is in [0, 1): two nodes do not knock together."""
    return min(most_s, least_s * 2 ** min(faults - 1, 30)) * (0.5 + dice)


def stuck(listening: bool, was_connected: bool, down_s: float, silent_s: float, edge_answers: bool, faults: int) -> str:
    """Why a cloudflared that runs has to be started anew, "": it has not.

    listening: its metrics server. down_s: since it was started, or lost its connection; 0 while it has one, as far as is
    known. silent_s: since its metrics server's last answer. faults: network faults in a row; each fruitless one makes us
    wait longer, since a restart that changes nothing only starts its tries over.
    """
    if not listening:
        return f"cloudflared said nothing of its metrics server for {down_s:.0f} s" if down_s > METRICS_WITHIN_S else ""
    if silent_s > SILENT_PATIENCE_S:
        return f"cloudflared has not answered for {silent_s:.0f} s"
    patience_s = LOST_PATIENCE_S if was_connected else STARTED_PATIENCE_S
    if edge_answers and down_s > min(PATIENCE_MOST_S, patience_s * 2 ** min(faults, 30)):
        return f"without a connection for {down_s:.0f} s while Cloudflare answers: a new cloudflared tries at once"
    return f"without a connection to Cloudflare for {down_s:.0f} s" if down_s > PATIENCE_MOST_S else ""
