"""The keys of the front door: what the file holds, how keys come and go, and which count at a time. Pure.

What a client sends is the base64 of NAME:SECRET, because that is what Caddy's check of basic authentication takes.
"""

import base64
import collections
import re

import msgspec

VERSION = 1
_BCRYPT = re.compile(r"\$2[aby]\$\d\d\$[./A-Za-z0-9]{53}")
_NAME = re.compile(r"[A-Za-z0-9][-_.A-Za-z0-9]{0,63}")


class KeyFileError(Exception):
    """The file of the keys cannot be used; the text says why and what to do."""


class Key(msgspec.Struct, frozen=True):
    """One key: its secret only as bcrypt; id: by which its owner can tell it from another of that name. Times are wall
    time; expires_at None: never."""

    name: str
    id: str
    bcrypt: str
    created_at: float
    expires_at: float | None = None


class _File(msgspec.Struct, frozen=True):
    version: int
    keys: tuple[Key, ...] = ()


def parse(path: str, data: bytes) -> tuple[Key, ...]:
    """Raises KeyFileError: nobody gets in by half a file."""
    try:
        found = msgspec.json.decode(data, type=_File)
    except msgspec.DecodeError as error:
        raise KeyFileError(f"{path} is damaged ({error}): correct it, or remove it and make the keys anew") from error
    if found.version != VERSION:
        raise KeyFileError(f"{path} is of version {found.version}, and this llmwd reads {VERSION}")
    names = collections.Counter(key.name for key in found.keys)
    for key in found.keys:
        if not _NAME.fullmatch(key.name) or not _BCRYPT.fullmatch(key.bcrypt) or names[key.name] > 1:
            raise KeyFileError(f"{path}: the key {key.name!r} is damaged or there twice: remove it there, and make it anew")
    return found.keys


def dump(keys: tuple[Key, ...]) -> bytes:
    """The file's text for these keys."""
    return msgspec.json.format(msgspec.json.encode(_File(VERSION, keys))) + b"\n"


def is_name(name: str) -> bool:
    """Whether a key may be called so: it stands in the access log, in Caddy's configuration and before a colon."""
    return _NAME.fullmatch(name) is not None


def made_of(name: str, drawn: str) -> tuple[str, str] | None:
    """(what a client sends, the secret in it), of random characters; None: others have to be drawn.

    It has no padding and nothing that a shell or an address would take amiss.
    """
    secret = drawn[: len(drawn) - len(f"{name}:{drawn}") % 3]
    made = base64.b64encode(f"{name}:{secret}".encode()).decode()
    return None if re.search("[+/=]", made) else (made, secret)


def added(path: str, keys: tuple[Key, ...], key: Key) -> tuple[Key, ...]:
    """Raises KeyFileError where the name is taken: two people must not be one in the log."""
    if any(each.name == key.name for each in keys):
        raise KeyFileError(f"there is a key called {key.name!r} in {path} already: revoke it first, or choose another name")
    return (*keys, key)


def removed(path: str, keys: tuple[Key, ...], name: str) -> tuple[Key, ...]:
    """Raises KeyFileError where nobody is called so."""
    left = tuple(key for key in keys if key.name != name)
    if left == keys:
        there = ", ".join(sorted(key.name for key in keys)) or "none"
        raise KeyFileError(f"there is no key called {name!r} in {path}; there are: {there}")
    return left


def in_force(keys: tuple[Key, ...], now_at: float) -> tuple[Key, ...]:
    """The keys that have not expired."""
    return tuple(key for key in keys if key.expires_at is None or key.expires_at > now_at)


def next_end_at(keys: tuple[Key, ...], now_at: float) -> float | None:
    """When the next of them expires."""
    return min((key.expires_at for key in in_force(keys, now_at) if key.expires_at is not None), default=None)
