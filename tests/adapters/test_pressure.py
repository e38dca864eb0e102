"""The kernel's word on memory pressure."""

import os
from pathlib import Path

from llmwd.adapters.pressure import memory_pressure


def test_the_text_is_given_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_text("some avg10=1.00 avg60=0.00\n")
    assert memory_pressure(path) == ("some avg10=1.00 avg60=0.00\n", "")


def test_a_file_that_is_not_there_or_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    assert memory_pressure(tmp_path / "none")[1].endswith("without pressure stall information")
    assert memory_pressure(tmp_path)[1] == f"{tmp_path} cannot be read: {os.strerror(21)}"
