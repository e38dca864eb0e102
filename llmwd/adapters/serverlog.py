"""The line of vLLM's log that says why it failed: the root cause is often not the last one."""

import re
from pathlib import Path

TAIL_BYTES = 64 << 10
LONGEST = 300

_ENGINE = re.compile(r"\((?:Worker|EngineCore)\S*[^)]*\) ERROR.*?\]\s+(?P<text>\w*(?:Error|Exception)\b.*)$")
_ANY = re.compile(r"^(?:vllm serve: error: .*|[\w.]*(?:Error|Exception)\b: .*)$")


def cause(path: Path) -> str:
    """The first exception that the engine or a worker logged, else the last one of the tail; "" if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        if found := _ENGINE.search(line):
            return found["text"][:LONGEST]
    for line in reversed(lines):
        if _ANY.match(line.strip()):
            return line.strip()[:LONGEST]
    return ""
