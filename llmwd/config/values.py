"""What a setting's text may be. Each parser gives the value, or raises ValueError with what it must be."""

import re
from collections.abc import Callable
from typing import Any

import msgspec

from llmwd import redact


class Parser(msgspec.Struct, frozen=True):
    """`wanted` completes "must be ..."; `read` returns None for a text that is not so."""

    wanted: str
    read: Callable[[str], Any]
    private: bool = False  # a wrong value is not quoted: it may be, or hold, a secret

    def __call__(self, text: str) -> Any:
        value = self.read(text)
        if value is None:
            if self.private:
                raise ValueError(f"must be {self.wanted}")
            shown = redact.mask(text)
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            raise ValueError(f"must be {self.wanted}, not {shown!r}")
        return value


def _matching(pattern: str, wanted: str) -> Parser:
    compiled = re.compile(pattern, re.ASCII)
    return Parser(wanted, lambda text: text if not text or compiled.fullmatch(text) else None)


def integer(low: int, high: int) -> Parser:
    def read(text: str) -> int | None:
        digits = text.strip(" \t\n")
        if not re.fullmatch(r"\d{1,12}", digits, re.ASCII):
            return None
        return int(digits) if low <= int(digits) <= high else None

    return Parser(f"a whole number from {low} to {high}", read)


def percent() -> Parser:
    number = seconds(0, 100)
    return Parser("a percentage from 0 to 100", number.read)


def seconds(low: float, high: float) -> Parser:
    """No exponents, signs, `inf` or `nan`: a wait that is mistyped must not become one that never ends."""

    def read(text: str) -> float | None:
        digits = text.strip(" \t\n")
        if not re.fullmatch(r"\d{1,12}(\.\d{0,12})?|\.\d{1,12}", digits, re.ASCII):
            return None
        return float(digits) if low <= float(digits) <= high else None

    return Parser(f"a number of seconds from {low:g} to {high:g}", read)


def flag() -> Parser:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    return Parser("true or false", lambda text: words.get(text.strip().lower()))


def choice(*allowed: str) -> Parser:
    wanted = f"one of {', '.join(allowed)}"
    return Parser(wanted, lambda text: text.lower() if text.lower() in allowed else None)


def names(alone: str, *allowed: str) -> Parser:
    """Names joined by commas, or the one word that stands for all. tuple[str, ...]"""

    def read(text: str) -> tuple[str, ...] | None:
        parts = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",")))
        return parts if parts == (alone,) or all(part in allowed for part in parts) else None

    return Parser(f"{alone}, or some of {','.join(allowed)}", read)


def gpu_map() -> Parser:
    """`0:GPU-...,1:GPU-...` or `0=3,1=2`: dict[Slurm's index, NVML's index or UUID], neither side twice."""
    pair = re.compile(r"(\d{1,3})\s*[:=]\s*(\d{1,3}|(?:GPU|MIG)-[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})")

    def read(text: str) -> dict[int, str] | None:
        pairs = [pair.fullmatch(part.strip()) for part in text.split(",")] if text.strip() else []
        if not all(pairs):
            return None
        found = {int(match[1]): str(int(match[2])) if match[2].isdigit() else match[2] for match in pairs}
        return found if len(found) == len(pairs) == len({uuid.lower() for uuid in found.values()}) else None

    return Parser("pairs such as 0=3,1=2 or 0:GPU-<full UUID>, no GPU twice", read)


def path() -> Parser:
    def read(text: str) -> str | None:
        return text if not text or text.startswith("/") else None

    return Parser("an absolute path (bash does not expand a ~ in quotes: write $HOME)", read)


def secret_file() -> Parser:
    """The path of a file with a secret. The secret itself is what people write there by mistake."""
    return Parser("the absolute path of a file (with $HOME, not ~), not what is in it", path().read, private=True)


def paths() -> Parser:
    """Paths of URLs, joined by commas. tuple[str, ...]"""

    def read(text: str) -> tuple[str, ...] | None:
        parts = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
        good = all(re.fullmatch(r"(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+", part) for part in parts)
        return parts if good else None

    return Parser("whole paths joined by commas, such as /v1/rerank,/tokenize", read)


def url() -> Parser:
    found = _matching(r"https?://[^\s/?#]+(/[^\s?#]*)?", "an address that begins with https:// or http://")
    return Parser(found.wanted, lambda text: (found.read(text) or "").rstrip("/") or None, private=True)


def urls() -> Parser:
    """Addresses joined by blanks, each of which may hold secrets. tuple[str, ...]"""

    def read(text: str) -> tuple[str, ...] | None:
        parts = tuple(dict.fromkeys(text.split()))
        good = all(re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*://[^\x00-\x1f\x7f]+", part) for part in parts)
        return parts if good else None

    return Parser("addresses as apprise knows them, such as slack://..., with blanks between them", read, private=True)


def tags() -> Parser:
    """Words joined by commas. tuple[str, ...]"""

    def read(text: str) -> tuple[str, ...] | None:
        parts = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
        good = all(part.isprintable() and not re.search(r"\s", part) for part in parts)
        return parts if good and len(text.encode()) <= 150 else None

    return Parser("words joined by commas, at most 150 bytes", read)


def click() -> Parser:
    return _matching(r"[a-z][a-z0-9+.-]*:[^\s]{1,1000}", "an address such as https://llm.example.org/")


def text() -> Parser:
    return _matching(r"[^\x00-\x1f\x7f]*", "one line of text")


def topic() -> Parser:
    found = _matching(r"[-_A-Za-z0-9]{1,64}", "up to 64 letters, digits, - and _ (the topic alone, not its address)")
    return Parser(found.wanted, found.read, private=True)


def hostname() -> Parser:
    label = r"[A-Za-z0-9]([-A-Za-z0-9]{0,61}[A-Za-z0-9])?"
    return _matching(rf"{label}(\.{label})+", "a host name such as chat.example.org, without https:// and path")


def tunnel_id() -> Parser:
    return _matching(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", "a UUID (`cloudflared tunnel list`)")


def node() -> Parser:
    return _matching(r"[A-Za-z0-9][-_.A-Za-z0-9]{0,254}", "a node name as `sinfo -N` shows it")
