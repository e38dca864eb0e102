"""What comes and goes is told once, and not for ever."""

from llmwd.core.complaint import AGAIN_S, Complaint


def test_a_trouble_is_told_when_it_is_new_and_then_rarely_however_often_it_comes_and_goes() -> None:
    disk = Complaint()
    assert disk.is_due("full", 1.0) and not disk.is_due("full", 2.0) and not disk.is_due("", 3.0) and not disk.is_due("full", 4.0)
    assert disk.is_due("read-only", 5.0) and not disk.is_due("read-only", 6.0)
    assert disk.is_due("read-only", 5.0 + AGAIN_S)
