"""What is sent for a notice, within the limits of ntfy, and when a send is tried again. Pure."""

from datetime import UTC, datetime

import msgspec

from llmwd.core.outbox import Entry

# ntfy's limits are 4096 and 1024 bytes and a body of 8192 (docs and server); what is longer becomes an attachment or 400.
MESSAGE_BYTES = 3900
TITLE_BYTES = 250
BODY_BYTES = 8000
PRIORITIES = {"min": 1, "low": 2, "default": 3, "high": 4, "max": 5, "urgent": 5}
ALARM_PRIORITY = 4
TAGS_BYTES = 200
LATE_S = 60.0
LATE = "\n(This was at "
LOG_LINES = 8
LOG_BYTES = 1500

RETRY_MIN_S = 2.0
RETRY_LIMITED_MIN_S = 5.0  # ntfy says 429 without a Retry-After, and gives one request back every 5 s
RETRY_MAX_S = 300.0
DAILY_QUOTA = 42908  # given back at midnight, UTC
QUOTA_BACK_S = 300.0  # after midnight, with as much jitter: clocks differ, and all who wait come at once
DAY_S = 86400.0


def cut(text: str, most_bytes: int) -> str:
    """The text without control characters, at most so many bytes of UTF-8, whole characters only."""
    text = "".join(char for char in text if char >= " " or char == "\n").encode(errors="replace").decode()
    data = text.encode()
    if len(data) <= most_bytes:
        return text
    return data[: most_bytes - len("…".encode())].decode(errors="ignore") + "…"


def body(entry: Entry, topic: str, priority: str, tags: tuple[str, ...], click: str, now_at: float) -> bytes:
    """ntfy's JSON, in UTF-8 (escapes would triple what is not Latin). priority: a name or 1 to 5, for an ordinary notice."""
    level = int(priority) if priority.isdigit() else PRIORITIES[priority]
    return _within(
        {
            "topic": topic,
            "title": title(entry.title),
            "message": text(entry, now_at),
            "tags": _tags((entry.tag, *tags)),
            "priority": max(level, ALARM_PRIORITY) if entry.alarm else level,
            "sequence_id": entry.sid,
        }
        | ({"click": click} if click else {})
    )


def deadman(sid: str, node: str, topic: str, minutes: int, tags: tuple[str, ...], click: str) -> bytes:
    """The notice that the server tells in so many minutes, unless it gets another one with this sequence id."""
    message = (
        f"Nothing was heard from llmwd on {node} for {minutes} minutes: the node is down, has lost its network, or llmwd "
        "was killed."
    )
    sent = {
        "topic": topic, "title": title(f"No sign of life from llmwd on {node}"), "message": message,
        "tags": _tags(("skull", *tags)), "priority": ALARM_PRIORITY, "sequence_id": sid, "delay": f"{minutes}m",
    }  # fmt: skip
    return _within(sent | ({"click": click} if click else {}))


def _within(sent: dict[str, object]) -> bytes:
    data = msgspec.json.encode(sent)
    if len(data) > BODY_BYTES:  # full of characters that JSON has to escape
        short, late, when = str(sent["message"]).rpartition(LATE)
        if not late:
            short, when = when, ""
        data = msgspec.json.encode(sent | {"message": cut(short, MESSAGE_BYTES // 2) + late + when})
    return data


def _tags(tags: tuple[str, ...]) -> list[str]:
    kept, size = [], 0
    for tag in dict.fromkeys(tags):
        size += len(tag.encode()) + 1
        if size <= TAGS_BYTES:
            kept.append(tag)
    return kept


def title(text: str) -> str:
    """A title is one line."""
    return cut(" ".join(text.split()), TITLE_BYTES)


def text(entry: Entry, now_at: float) -> str:
    """The message within its limit; what is told late says when it was."""
    if now_at - entry.created_at < LATE_S or entry.folds or entry.lost:
        return cut(entry.message, MESSAGE_BYTES)
    when = LATE + datetime.fromtimestamp(entry.created_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") + ".)"
    return cut(entry.message, MESSAGE_BYTES - len(when)) + when


def with_log(message: str, log: str) -> str:
    """With the last lines of a log, of which the end is what matters."""
    lines = [line.rstrip() for line in log.splitlines() if line.strip()][-LOG_LINES:]
    end = "\n".join(lines).encode()[-LOG_BYTES:].decode(errors="ignore")
    return f"{message}\n\nThe end of its log:\n{end}" if end else message


def retry_after_s(tries: int, status: int | None, code: int | None, dice: float, now_at: float = 0.0) -> float:
    """Seconds until the next try after `tries` failed ones. status: of HTTP, None without an answer; code: ntfy's own;
    dice in [0, 1); now_at: without it, the longest that a wait can be."""
    if code == DAILY_QUOTA:
        return DAY_S - now_at % DAY_S + QUOTA_BACK_S * (1 + dice)
    first_s = RETRY_LIMITED_MIN_S if status == 429 else RETRY_MIN_S
    delay_s = min(RETRY_MAX_S, first_s * 2 ** min(tries - 1, 20))
    return delay_s * (1 + dice / 2)
