"""What is shipped fits together: dependencies, programs, examples. (tests/config loads the settings and profiles.)"""

import ast
import configparser
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from llmwd.config import SETTINGS

ROOT = Path(__file__).parents[2]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
IMPORTED_AS = {"pyzmq": "zmq", "inotify-simple": "inotify_simple"}
FROM_THE_CARD = {"pyzmq", "msgspec", "pynvml", "inotify-simple", "setproctitle", "requests"}


def requirements() -> dict[str, str]:
    lines = (SETUP["options"]["install_requires"] + SETUP["options.extras_require"]["apprise"]).split("\n")
    return {re.match(r"[\w-]+", line)[0]: line for line in lines if line}


def imported() -> set[str]:
    found: set[str] = set()
    for path in ROOT.glob("llmwd/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
    return found


def test_every_dependency_is_bounded_from_below_and_above_and_the_cards_are_there() -> None:
    assert all(">=" in line and "<" in line.split(">=")[1] for line in requirements().values())
    assert requirements().keys() >= FROM_THE_CARD


def test_everything_that_is_imported_is_required() -> None:
    names = {IMPORTED_AS.get(name, name) for name in requirements()}
    ours = {name for name in imported() if name not in sys.stdlib_module_names and name not in ("llmwd", "_setproctitle")}
    assert ours <= names


def test_pip_can_read_the_project() -> None:
    assert "setuptools" in str(tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"])
    assert SETUP["options"]["python_requires"] == ">=3.11" and (ROOT / "LICENSE").read_text().startswith("MIT")


@pytest.mark.parametrize("path", [*sorted((ROOT / "bin").iterdir()), ROOT / "start.sh", ROOT / "switch-model.sh", ROOT / "bench.sh", *ROOT.glob("etc/slurm/*.sh")], ids=lambda path: path.name)
def test_every_program_may_be_run(path: Path) -> None:
    assert os.access(path, os.X_OK) and path.read_text().startswith("#!")


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.sh"), *ROOT.glob("scripts/*.sh"), *ROOT.glob("etc/slurm/*.sh"), *ROOT.glob("models/*.env")]), ids=lambda path: path.name)
def test_bash_can_read_every_script_and_profile(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr


def test_every_setting_is_explained_once_under_a_name_that_bash_takes() -> None:
    names = [spec.name for spec in SETTINGS]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[A-Z][A-Z0-9_]*", name) for name in names)
    assert all(spec.meaning.rstrip().endswith((".", ")", "…")) for spec in SETTINGS)


def test_no_file_of_ours_names_a_folder_of_one_machine() -> None:
    for path in [*ROOT.glob("llmwd/**/*.py"), *ROOT.glob("models/*"), *ROOT.glob("etc/*"), *ROOT.glob("*.sh")]:
        assert path.is_dir() or not re.search(r"/work/|/root/|/home/(?!USER|you|user|a\b|\$)", path.read_text()), path
