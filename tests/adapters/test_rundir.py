"""Who could put another folder, or something in it, in the place of ours; and the files there."""

import fcntl
import os
import stat
import subprocess
from pathlib import Path

import pytest

from llmwd import ownership
from llmwd.adapters.procs import start_ticks
from llmwd.adapters.rundir import DirError, make_ours, make_private, running_supervisor

STRANGER = 54321  # a uid and a gid that nobody has


@pytest.fixture
def top(open_folder: Path) -> Path:
    return open_folder


def made(path: Path, mode: int, uid: int | None = None, gid: int | None = None) -> Path:
    """A folder; where the test is not root, of which only the mode can be had."""
    path.mkdir(parents=True)
    if os.getuid() == 0:
        os.chown(path, -1 if uid is None else uid, -1 if gid is None else gid)
    path.chmod(mode)
    return path


def needs_root() -> bool:
    return os.getuid() != 0


@pytest.mark.parametrize(
    ("mode", "uid", "gid", "why"),
    [
        (0o755, None, None, ""), (0o1777, None, None, ""), (0o1775, None, STRANGER, ""), (0o700, None, None, ""),
        (0o755, STRANGER, None, "because .*/above belongs to uid 54321"), (0o1777, STRANGER, None, "because .*/above belongs to uid 54321"),
        (0o700, STRANGER, STRANGER, "because .*/above belongs to uid 54321"),
        (0o775, None, STRANGER, "who may write to .*/above"), (0o777, None, None, "who may write to .*/above"), (0o2770, None, STRANGER, "who may write to .*/above"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("deep", [False, True])
def test_whoever_can_replace_a_folder_above_ours_is_told_and_it_is_refused(
    top: Path, mode: int, uid: int | None, gid: int | None, why: str, deep: bool
) -> None:
    if needs_root() and (uid or gid):
        return
    above = made(top / "above", mode, uid, gid)
    path = above / "ours" / "run" if deep else above / "run"
    if not why:
        make_private(path, "runtime")
        assert [stat.S_IMODE(each.stat().st_mode) for each in above.rglob("*")] == [0o700] * (2 if deep else 1)
        return
    with pytest.raises(DirError, match=f"runtime folder {path} can be replaced by others, {why}: name another folder"):
        make_private(path, "runtime")


def test_a_stranger_really_cannot_replace_what_is_accepted_and_can_what_is_refused(top: Path) -> None:
    if needs_root():
        return
    for name, mode, uid, accepted in (("sticky", 0o1777, 0, True), ("theirs", 0o1777, STRANGER, False), ("open", 0o777, 0, False)):
        above = made(top / name, mode, uid)
        (above / "run").mkdir(0o700)
        try:
            make_private(above / "run", "runtime")
            assert accepted, name
        except DirError:
            assert not accepted, name
        pid = os.fork()
        if pid == 0:
            os.setgroups([])
            os.setgid(STRANGER)
            os.setuid(STRANGER)
            try:
                (above / "run").rename(above / "stolen")
                os._exit(0)
            except OSError:
                os._exit(1)
        assert (os.waitpid(pid, 0)[1] != 0) == accepted, name


def test_links_above_are_followed_and_judged_each(top: Path) -> None:
    """A sticky folder lets everybody make a link in it; whoever owns it can lead it elsewhere at any time."""
    sticky = made(top / "sticky", 0o1777)
    home = made(top / "home", 0o755)
    (sticky / "ours").symlink_to("../home")
    (top / "twice").symlink_to(sticky / "ours")
    make_private(top / "twice" / "run", "runtime")
    assert (home / "run").is_dir()
    (top / "loop").symlink_to("loop")
    with pytest.raises(DirError, match="cannot be made"):
        make_private(top / "loop" / "run", "runtime")
    (sticky / "open").symlink_to(made(top / "open" / "in it", 0o755))
    (top / "open").chmod(0o777)
    with pytest.raises(DirError, match=f"others, who may write to {top}/open: name"):  # only resolving shows that folder
        make_private(sticky / "open" / "run", "runtime")
    if needs_root():
        return
    os.chown(sticky / "ours", STRANGER, STRANGER, follow_symlinks=False)
    for path in (sticky / "ours" / "run", top / "twice" / "run"):
        with pytest.raises(DirError, match=f"because {sticky}/ours belongs to uid {STRANGER}"):
            make_private(path, "runtime")


def test_what_is_made_on_the_way_is_for_us_alone_whatever_the_umask(top: Path) -> None:
    before = os.umask(0)
    try:
        make_private(top / "a" / "b" / "c", "state")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((top / each).stat().st_mode) for each in ("a", "a/b", "a/b/c")] == [0o700] * 3


def test_a_private_group_may_write_above_and_in_it(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "_is_ours_alone", lambda gid: True)
    made(top / "above", 0o775)
    make_private(made(top / "above" / "run", 0o775), "runtime")
    assert stat.S_IMODE((top / "above" / "run").stat().st_mode) == 0o700


@pytest.mark.parametrize("full", [True, False])
def test_a_folder_that_others_read_is_closed_to_them_only_while_nothing_is_in_it(tmp_path: Path, full: bool) -> None:
    """It may be theirs to read: `LLMWD_STATE_DIR=/srv/results` would lock a whole group out."""
    folder = tmp_path / "shared"
    folder.mkdir()
    if full:
        (folder / "results").touch()
    folder.chmod(0o755)
    if full:
        with pytest.raises(DirError, match="is not empty: name another folder"):
            make_private(folder, "state")
    else:
        make_private(folder, "state")
    assert stat.S_IMODE(folder.stat().st_mode) == (0o755 if full else 0o700)
    make_ours(folder, "simulation")


def test_a_supervisor_that_has_the_lock_and_not_said_who_it_is_is_not_taken_for_the_dead_one_before_it(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "1000"]) as dead:
        before = f"{dead.pid} {start_ticks(dead.pid)}\n"
        dead.kill()
    with (tmp_path / "supervisor.lock").open("w") as lock:
        lock.write(before)
        lock.flush()
        assert running_supervisor(tmp_path) is None
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert running_supervisor(tmp_path) == (0, 0)
        lock.seek(0)
        lock.truncate()
        lock.write(f"{os.getpid()} {start_ticks(os.getpid())}\n")
        lock.flush()
        assert running_supervisor(tmp_path) == (os.getpid(), start_ticks(os.getpid()))
