"""The front door's page for people: what the model does, since when, and what is expected. Pure.

One file without anything from elsewhere. It says all without its script, which only turns times into the reader's own.
"""

import base64
import hashlib
import html
from datetime import UTC, datetime

from llmwd.core.doorwords import DoorState, iso, provided

RENEW_S = 30
STYLE = """
:root { color-scheme: light dark; --quiet: #666; --line: #ccc; --open: #1a7f37; --away: #9a6700; --bad: #cf222e }
@media (prefers-color-scheme: dark) { :root { --quiet: #999; --line: #444; --open: #3fb950; --away: #d29922; --bad: #f85149 } }
body { font: 1.05rem/1.5 system-ui, sans-serif; margin: 12vh auto; max-width: 34rem; padding: 0 1.2rem }
h1 { font-size: 1.1rem; font-weight: 600; color: var(--quiet); margin: 0; overflow-wrap: anywhere }
p { font-size: 1.5rem; margin: .4rem 0 1.6rem; color: var(--away) }
p.open { color: var(--open) }
p.failed { color: var(--bad) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .4rem 1.2rem; margin: 0; border-top: 1px solid var(--line); padding-top: 1rem }
dt { color: var(--quiet) }
dd { margin: 0; overflow-wrap: anywhere }
"""
SCRIPT = """
for (const time of document.querySelectorAll("time")) {
  time.textContent = new Date(time.dateTime).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}
"""


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# What a browser may do with it: this style, this script, and nothing else.
POLICY = f"default-src 'none'; style-src {_digest(STYLE)}; script-src {_digest(SCRIPT)}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def page(state: DoorState) -> bytes:
    """As HTML."""
    rows = [("Model", html.escape(state.model or "none")), ("Since", _time(state.since_at))]
    if state.expected_at is not None and not state.reachable:
        rows.append(("Expected", f"{_time(state.expected_at)}{provided(state)}"))
    listed = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in rows)
    title = html.escape(state.hostname or "llmwd")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="refresh" content="{RENEW_S}"><title>{title}: {state.code}</title><style>{STYLE}</style></head>'
        f'<body><h1>{title}</h1><p class="{state.code}">{html.escape(state.told)}</p><dl>{listed}</dl><script>{SCRIPT}</script></body></html>\n'
    ).encode()


def _time(at: float) -> str:
    shown = datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f'<time datetime="{iso(at)}">{shown}</time>'
