"""Every event that a program of ours writes to the journal is one that the report knows."""

import ast
from pathlib import Path

from llmwd.core.timeline import EVENTS, QUIET_EVENTS

MODULES = sorted((Path(__file__).parents[2] / "llmwd").rglob("*.py"))


def is_journal(node: ast.expr) -> bool:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name in ("journal", "_journal")
        case ast.Call(func=ast.Name(id="Journal")):
            return True
    return False


def written() -> dict[str, str]:
    """Event -> a place that writes it."""
    found: dict[str, str] = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(value=of, attr="write"), args=[event, *_]) if is_journal(of):
                    names = [part.value for part in ast.walk(event) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
                    assert names, f"{path}:{node.lineno}: the event's name is not in the source"
                    found |= dict.fromkeys(names, f"{path.name}:{node.lineno}")
    return found


def test_every_event_is_known_and_every_known_one_is_written() -> None:
    events = written()
    assert {"lease_revoked", "door_failed", "drill", "supervisor_started"} <= events.keys()
    assert {name: place for name, place in events.items() if name not in EVENTS | QUIET_EVENTS} == {}
    assert (EVENTS | QUIET_EVENTS) - events.keys() == set()
