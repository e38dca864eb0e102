"""Reading a service's log while it grows, and its end."""

from pathlib import Path

from llmwd.adapters import logfile
from llmwd.core import tunnelfaults


def test_a_flood_is_read_in_whole_lines_one_part_after_the_other(tmp_path: Path) -> None:
    log, line = tmp_path / "log", "2026-11-23T19:15:00Z ERR Serve tunnel error é\n"
    log.write_text(line * (logfile.LOOK_BYTES // 40) + "2026-11-23T19:15:00Z INF Starting metrics server on 127.0.0.1:45787/metrics\n")
    offset, parts = 0, []
    while offset < log.stat().st_size:
        text, offset = logfile.read(log, offset)
        parts.append(text)
    assert len(parts) > 1 and all(part.endswith("\n") for part in parts) and "".join(parts) == log.read_text()
    assert [tunnelfaults.metrics_address(part) for part in parts] == [None] * (len(parts) - 1) + ["127.0.0.1:45787"]


def test_the_line_that_is_still_being_written_is_left_for_the_next_look(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one\nStarting metrics server on 127.0.0.1:457")
    assert logfile.read(log, 0) == ("one\n", 4)
    log.write_text("a rotated one\n")
    assert logfile.read(log, 99) == ("a rotated one\n", 14)


def test_the_end_of_a_log_has_whole_lines_at_its_begin_and_the_last_word_without_a_newline(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("a line\n" * logfile.TAIL_BYTES + "Killed")
    told = logfile.tail(log)
    assert told.startswith("a line\n") and told.endswith("a line\nKilled") and len(told) > logfile.TAIL_BYTES - 10
    assert logfile.tail(log, log.stat().st_size - 6) == "Killed"
    log.write_text("a rotated one\n")
    assert logfile.tail(log, 99) == "a rotated one\n" and logfile.tail(tmp_path / "none") == ""
