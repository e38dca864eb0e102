"""The front door's page in a real browser: Chromium without a screen, which runs its script under its policy."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.tree.conftest import Start
from tests.tree.supervised import Supervised, free_port
from tests.waiting import wait_until

pytestmark = pytest.mark.browser
# Without its own services it asks nobody on the network for anything.
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=2000",
)  # fmt: skip


def seen(tree: Supervised, folder: Path) -> tuple[str, str]:
    """(what somebody in Tokyo reads, what the browser complains of)."""
    words = ["chromium", *QUIET, f"--user-data-dir={folder}", "--lang=en-US", "--dump-dom", f"http://127.0.0.1:{tree.settings['DOOR_PORT']}/"]
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "TZ": "Asia/Tokyo", "LANG": "en_US.UTF-8"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    body = re.sub(r"<(style|script).*?</\1>", "", done.stdout, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body)), "\n".join(re.findall(r".*CONSOLE.*", done.stderr))


def test_people_read_what_the_model_does_since_when_and_what_is_expected_in_their_own_time(supervised: Start, tmp_path: Path) -> None:
    tree = supervised({"FAKE_READY_AFTER": 2}, DOOR="true", DOOR_PORT=free_port(), TUNNEL_HOSTNAME="llm.example.org", TUNNEL_MODE="none")
    tree.serving()
    wait_until(lambda: tree.status()["door"]["reachable"])
    text, complaints = seen(tree, tmp_path / "1")
    assert "llm.example.org" in text and "The model answers." in text and "Model fake" in text and complaints == ""
    assert re.search(r"Since \w+ \d+, 20\d\d, \d+:\d\d\W[AP]M", text) and "UTC" not in text  # the script has run

    assert tree.ctl("yield", "--for", "2h").returncode == 0
    wait_until(lambda: tree.status()["door"]["code"] == "held")
    text, complaints = seen(tree, tmp_path / "2")
    assert "The operator has taken the model down" in text and re.search(r"Expected \w+ \d+, 20\d\d", text) and complaints == ""

    tree.job(1, "0-7")
    assert tree.ctl("resume").returncode == 0
    wait_until(lambda: tree.status()["door"]["code"] == "yielded_to_job")
    text, complaints = seen(tree, tmp_path / "3")
    assert "needed by a Slurm job" in text and "Expected" not in text and complaints == ""  # a simulated job has no time limit

    tree.write_profile("fake", FAKE_READY_AFTER=600)
    assert tree.ctl("reload").returncode == 0
    tree.job_over(1)
    wait_until(lambda: tree.status()["door"]["code"] == "loading")
    text, complaints = seen(tree, tmp_path / "4")
    assert "The model is being loaded." in text and complaints == ""
