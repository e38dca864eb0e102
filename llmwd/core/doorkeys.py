"""The keys of the front door: what the file holds, and which keys count at a time. Pure."""

import re

import msgspec

VERSION = 1
_BCRYPT = re.compile(r"\$2[aby]\$\d\d\$[./A-Za-z0-9]{53}")
_NAME = re.compile(r"[A-Za-z0-9][-_.A-Za-z0-9]{0,63}")


class KeyFileError(Exception):
    """The file of the keys cannot be used; the text says why and what to do."""


class Key(msgspec.Struct, frozen=True):
    """One key: its secret only as bcrypt. Times are wall time; expires_at None: never."""

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
    names = [key.name for key in found.keys]
    for key in found.keys:
        if not _NAME.fullmatch(key.name) or not _BCRYPT.fullmatch(key.bcrypt) or names.count(key.name) > 1:
            raise KeyFileError(f"{path}: the key {key.name!r} is damaged or there twice: remove it there, and make it anew")
    return found.keys


def in_force(keys: tuple[Key, ...], now_at: float) -> tuple[Key, ...]:
    """The keys that have not expired."""
    return tuple(key for key in keys if key.expires_at is None or key.expires_at > now_at)


def next_end_at(keys: tuple[Key, ...], now_at: float) -> float | None:
    """When the next of them expires."""
    return min((key.expires_at for key in in_force(keys, now_at) if key.expires_at is not None), default=None)
