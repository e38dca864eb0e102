"""Faults of our own code, as the logs show them: nothing outside, and no user, can be the cause of such a traceback."""

import re
from pathlib import Path

KINDS = "Assertion|Attribute|Index|Key|Name|NotImplemented|Recursion|Type|UnboundLocal|Unicode(De|En)code|Value|ZeroDivision"
_BUG = re.compile(rf"^Traceback \(most recent call last\):\n(?:[ \t].*\n)+((?:{KINDS})Error\b.*)", re.MULTILINE)


def in_text(text: str) -> list[str]:
    """The last lines of the tracebacks."""
    return [found[1] for found in _BUG.finditer(text)]


def in_files(*paths: Path) -> list[str]:
    return [bug for path in paths if path.exists() for bug in in_text(path.read_text(errors="replace"))]
