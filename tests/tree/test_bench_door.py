"""The benchmark of the front door runs, prints what README says that it measures, and a gross cost fails here already."""

import json
import subprocess
import sys
from pathlib import Path

from tests.tree.supervised import CHECKOUT


def test_what_the_door_costs_is_measured_beside_the_models_own_port(tmp_path: Path) -> None:
    words = [sys.executable, str(CHECKOUT / "scripts/bench_door.py"), "--quick", "--json", str(tmp_path / "found.json")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for row in ("time to first token, median", "64 streams at 50 tokens/s", "64 streams without a pause", "of the direct"):
        assert row in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    for ways in found.values():
        assert set(ways) == {"direct", "door", "door's socket"} and all(value > 0 for values in ways.values() for value in values)
    # Far from what it may cost, and by the best turn of each: others may need the machine just now. What is judged takes long.
    added_s = [min(a - b for a, b in zip(values, found["first token"]["direct"])) for values in found["first token"].values()]
    paced = found["64 streams at 50 tokens/s"]
    shares = [max(a / b for a, b in zip(values, paced["direct"])) for values in paced.values()]
    assert max(added_s) <= 0.010 and min(shares) >= 0.70, done.stdout
