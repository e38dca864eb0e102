"""A file with a secret: of whom it may be, and what it may be."""

import errno
import os
from pathlib import Path

import pytest

from llmwd.adapters import keyfile, secretfile
from llmwd.adapters.rundir import DirError


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret"
    path.write_text("word\n")
    path.chmod(0o600)
    return path


def test_a_private_file_of_one_line_is_read(secret):
    assert secretfile.read("X", str(secret)) == "word" and secretfile.content("X", str(secret)) == (b"word\n", ())
    secret.write_text("two\nlines")
    with pytest.raises(DirError, match="must hold one line"):
        secretfile.read("X", str(secret))


def test_who_else_may_know_it_is_told(secret, monkeypatch):
    secret.chmod(0o640)
    real = os.fstat
    monkeypatch.setattr(os, "fstat", lambda fd: os.stat_result([*real(fd)[:4], os.getuid() + 4242, *real(fd)[5:]]))
    known = secretfile.content("X", str(secret))[1]
    assert len(known) == 2 and "is another user's" in known[0] and "chmod 600" in known[1]
    with pytest.raises(DirError, match="another user's"):
        secretfile.read("X", str(secret))


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path / "pipe", tmp_path, "/dev/null"):
        with pytest.raises(DirError, match="is not a regular file"):
            secretfile.content("X", str(path))
    with pytest.raises(DirError, match="cannot be read"):
        secretfile.content("X", str(tmp_path / "none"))


def test_a_key_that_a_network_file_system_does_not_give_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert keyfile.read_or_make(tmp_path) == keyfile.read(tmp_path)

    def fails(fd: int, most: int) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "read", fails)
    with pytest.raises(DirError, match="api-key cannot be read: Stale file handle"):
        keyfile.read(tmp_path)
