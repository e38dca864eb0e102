"""The end of a log, and what is added to it, over rotations."""

import os
import signal

import pytest


@pytest.fixture
def log(stand):
    return stand.dirs.logs / "server.log"


def test_the_last_lines_are_printed(stand, log):
    log.write_text("".join(f"line {n}\n" for n in range(100)))
    assert stand.ctl("logs", "server", "-n", "2").stdout == "line 98\nline 99\n"
    assert len(stand.ctl("logs", "server").stdout.splitlines()) == 40


def test_just_after_a_rotation_the_lines_before_it_are_still_shown(stand, log):
    log.with_name("server.log.1").write_text("a\nb\n")
    log.write_text("c\n")
    assert stand.ctl("logs", "server", "-n", "2").stdout == "b\nc\n"


def test_an_unknown_name_is_refused_with_the_list(stand):
    done = stand.ctl("logs", "../../etc/passwd")
    assert done.returncode == 1 and "cloudflared" in done.stderr


def test_a_log_that_nobody_has_written_yet_is_refused(stand):
    done = stand.ctl("logs", "cloudflared")
    assert done.returncode == 1 and "has not written a log yet" in done.stderr


def test_following_prints_what_is_added_over_rotations_and_ends_with_ctrl_c(stand, log):
    log.write_text("old\n")
    following = stand.start_ctl("logs", "server", "-f", "-n", "1")
    try:
        assert following.stdout.readline() == "old\n"
        with log.open("a") as file:
            file.write("added\n")
        assert following.stdout.readline() == "added\n"
        with log.open("a") as file:
            file.write("last before\n")
        os.rename(log, log.with_name("server.log.1"))
        log.write_text("first after\n")
        assert following.stdout.readline() == "last before\n"
        assert following.stdout.readline() == "first after\n"
        os.rename(log, log.with_name("server.log.1"))
        log.write_text("after the second\n")
        assert following.stdout.readline() == "after the second\n"
    finally:
        following.send_signal(signal.SIGINT)
        _, errors = following.communicate(timeout=30)
    assert following.returncode == 130 and "Traceback" not in errors


def test_following_waits_for_a_log_that_does_not_exist_yet(stand, log):
    following = stand.start_ctl("logs", "server", "-f")
    try:
        log.write_text("born\n")
        assert following.stdout.readline() == "born\n"
    finally:
        following.kill()
        following.communicate(timeout=30)


def test_a_reader_that_goes_away_is_no_error(stand, log):
    log.write_text("x" * 79 + "\n" + "y\n" * 200000)
    following = stand.start_ctl("logs", "server", "-n", "200000")
    following.stdout.close()
    errors = following.stderr.read()
    following.wait(timeout=30)
    following.stderr.close()
    assert errors == ""


def test_a_log_that_cannot_be_read_is_refused_in_a_sentence(stand, log):
    log.write_text("x\n")
    log.chmod(0)
    assert "server.log cannot be read: Permission denied" in stand.refused("logs", "server")
    assert "cannot be read" in stand.refused("logs", "server", "-f")
    stand.dirs.logs.chmod(0)
    try:
        assert "cannot be read: Permission denied" in stand.refused("logs", "root")
    finally:
        stand.dirs.logs.chmod(0o700)
    (stand.dirs.logs / "root.log").mkdir()
    assert "root.log cannot be read: Is a directory" in stand.refused("logs", "root")


def test_more_lines_than_there_can_be_are_all_of_them(stand, log):
    log.write_text("a\nb\n")
    assert stand.ctl("logs", "server", "-n", "99999999999999999999").stdout == "a\nb\n"
    assert stand.ctl("history", "-n", "99999999999999999999").returncode == 0
