"""The keys of the front door, as their owner makes, sees and takes them away."""

import base64
import json
import os
import re
import stat
import threading

import bcrypt
import pytest

from llmwd.core import doorkeys
from tests.ctl.stand import Stand


def made(stand: Stand, name: str, *more: str) -> str:
    done = stand.ctl("key", "add", name, *more)
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n")


def listed(stand: Stand) -> dict[str, dict]:
    return {each["name"]: each for each in json.loads(stand.ctl("key", "list", "--json").stdout)}


def test_a_key_is_shown_once_and_only_its_hash_is_kept(stand: Stand) -> None:
    key = made(stand, "alice")
    assert re.fullmatch(r"[A-Za-z0-9]{40,}", key) and len(key) % 4 == 0
    name, _, secret = base64.b64decode(key, validate=True).decode().partition(":")
    path = stand.dirs.state / "door-keys.json"
    kept = path.read_text()
    assert name == "alice" and len(secret) >= 30 and secret not in kept and key not in kept
    assert bcrypt.checkpw(secret.encode(), json.loads(kept)["keys"][0]["bcrypt"].encode())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    shown = stand.ctl("key", "list").stdout
    assert "alice" in shown and "until revoked" in shown and secret[:10] not in shown and key[:-6] not in shown


def test_keys_end_in_time_and_by_revocation(stand: Stand) -> None:
    assert listed(stand) == {} and "key add" in stand.ctl("key", "list").stdout
    made(stand, "alice", "--expires", "30d")
    made(stand, "bob")
    keys = listed(stand)
    assert keys["alice"]["expires_at"] - keys["alice"]["created_at"] == pytest.approx(30 * 86400)
    assert keys["bob"]["expires_at"] is None and keys["alice"]["valid"] and keys["bob"]["valid"]
    assert "until 20" in stand.ctl("key", "list").stdout
    assert stand.ctl("key", "revoke", "bob").returncode == 0
    assert set(listed(stand)) == {"alice"}
    made(stand, "bob")  # the name is free again


def test_what_cannot_be_done_is_said_and_changes_nothing(stand: Stand) -> None:
    nobody = stand.ctl("key", "revoke", "alice")
    assert nobody.returncode == 1 and "no key called 'alice'" in nobody.stderr
    made(stand, "alice")
    path = stand.dirs.state / "door-keys.json"
    before = path.read_bytes()
    twice = stand.ctl("key", "add", "alice")
    assert twice.returncode == 1 and twice.stdout == "" and "revoke it first" in twice.stderr
    for words in (("add", "a:b"), ("add", "-x"), ("add", ""), ("add", "a" * 65), ("add", "é"), ("add", "bob", "--expires", "soon"), ("add",)):
        refused = stand.ctl("key", *words)
        assert refused.returncode == 2 and refused.stdout == "" and "Traceback" not in refused.stderr, words
    other = stand.ctl("key", "revoke", "carol")
    assert other.returncode == 1 and "there are: alice" in other.stderr
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["open", "half", "link"])
def test_a_file_that_is_not_sound_is_refused_and_left_alone(stand: Stand, damage: str) -> None:
    made(stand, "alice")
    path = stand.dirs.state / "door-keys.json"
    if damage == "open":
        path.chmod(0o644)
    elif damage == "half":
        path.write_text('{"version": 1, "keys": [')
    else:
        path.rename(stand.dirs.state / "elsewhere")
        path.symlink_to(stand.dirs.state / "elsewhere")
    before = path.read_bytes()
    for words in (("add", "bob"), ("list",), ("revoke", "alice")):
        refused = stand.ctl("key", *words)
        assert refused.returncode == 1 and str(path) in refused.stderr and "Traceback" not in refused.stderr
    assert path.read_bytes() == before and path.is_symlink() == (damage == "link")


def test_keys_that_are_made_at_the_same_time_are_all_kept(stand: Stand) -> None:
    names = [f"user{number}" for number in range(6)]
    threads = [threading.Thread(target=made, args=(stand, name)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(listed(stand)) == set(names)


def test_a_folder_that_cannot_be_written_is_said(stand: Stand) -> None:
    made(stand, "alice")
    (stand.dirs.state / "door-keys.lock").unlink()
    os.symlink("/nowhere/at/all", stand.dirs.state / "door-keys.lock")
    refused = stand.ctl("key", "add", "bob")
    assert refused.returncode == 1 and refused.stdout == "" and "door-keys.lock" in refused.stderr
    assert set(listed(stand)) == {"alice"}


def test_every_name_gives_a_key_without_padding() -> None:
    for length in range(1, 65):
        name = "a" * length
        made, secret = next(
            found for shift in range(200) if (found := doorkeys.made_of(name, f"{'Xy0123456789aBcDefGhIjKlMnOpQrSt'[shift % 32:]}{'Q' * (shift % 32)}"))
        )
        assert base64.b64decode(made, validate=True).decode() == f"{name}:{secret}" and not set(made) & set("+/=")
