"""The types that the program's own words promise, checked: a call that does not fit would end a worker, again and again."""

from pathlib import Path

import mypy.api

ROOT = Path(__file__).parents[2]


def test_every_call_fits_what_it_calls(tmp_path: Path) -> None:
    told, failed, status = mypy.api.run(["--config-file", str(ROOT / "setup.cfg"), "--cache-dir", str(tmp_path), str(ROOT / "llmwd")])
    assert status == 0, told + failed
