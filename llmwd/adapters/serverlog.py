"""The line of vLLM's log that says why it failed: the root cause is often not the last one."""

import re
from pathlib import Path

from llmwd import redact
from llmwd.adapters import logfile

TAIL_BYTES = 64 << 10
LONGEST = 300

_ENGINE = re.compile(r"\((?:Worker|EngineCore)\S*[^)]*\) ERROR.*?\]\s+(?P<text>\w*(?:Error|Exception)\b.*)$")
_ANY = re.compile(r"^(?:vllm serve: error: .*|[\w.]*(?:Error|Exception)\b: .*)$")


def cause(path: Path) -> str:
    """The first exception that the engine or a worker logged, else the last one of the tail, without secrets;
    "" if there is none."""
    return redact.mask(_cause(path))[:LONGEST]


def _cause(path: Path) -> str:
    lines = logfile.tail(path, most=TAIL_BYTES).splitlines()
    for line in lines:
        if found := _ENGINE.search(line):
            return found["text"]
    for line in reversed(lines):
        if _ANY.match(line.strip()):
            return line.strip()
    return ""
