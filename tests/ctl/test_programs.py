"""What holds for every verb, and the programs in bin/ as they are typed."""

import subprocess
import time

import click
import pytest

from llmwd.ctl.main import main
from tests.ctl.stand import CHECKOUT, CTL

BIN = CHECKOUT / "bin/llmwd-ctl"
FAST_S = 0.3


def verbs(group: click.Group, words: tuple[str, ...] = ()):
    for name, verb in group.commands.items():
        yield (*words, name), verb
        if isinstance(verb, click.Group):
            yield from verbs(verb, (*words, name))


VERBS = dict(verbs(main))


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_every_verb_has_help_with_an_example_of_itself(words):
    context = click.Context(VERBS[words], info_name=" ".join(words))
    shown = VERBS[words].get_help(context)
    assert "Example" in shown and f"llmwd-ctl {' '.join(words)}" in shown
    assert VERBS[words].help and max(map(len, shown.splitlines())) <= 120


def test_the_verbs_are_those_that_the_operator_was_promised():
    promised = "status switch models yield resume stop logs simulate explain reload reset completion".split()
    assert set(promised) <= {words[0] for words in VERBS if len(words) == 1}


@pytest.mark.parametrize("words", [("nope",), ("status", "--nope"), ("switch",), ("simulate", "job"), ("logs",)])
def test_errors_of_usage_exit_2(stand, words):
    done = stand.ctl(*words)
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [("status", "--json"), ("--help",), ("history",), ("report", "--json"), ("models",)])
def test_output_that_cannot_be_written_is_one_sentence_and_exit_1(stand, words):
    stand.profile("glm")
    stand.begin()
    (stand.dirs.state / "journal.jsonl").write_text('{"at": 1, "mono_s": 1, "event": "resumed"}\n')
    with open("/dev/full", "w") as full:
        done = subprocess.run([*CTL, *words], env=stand.env, stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "llmwd-ctl: the output could not be written: No space left on device\n")


def test_a_runtime_folder_that_cannot_be_looked_into_is_not_taken_for_no_supervisor(stand, tmp_path):
    stand.begin()
    stand.dirs.runtime.chmod(0)
    try:
        assert f"the runtime folder {stand.dirs.runtime} cannot be read" in stand.refused("status")
        stand.env["LLMWD_RUNTIME_DIR"] = str(stand.dirs.runtime / "below")
        assert "cannot be looked at: Permission denied" in stand.refused("status")
    finally:
        stand.dirs.runtime.chmod(0o700)
    stand.env["LLMWD_RUNTIME_DIR"] = str(tmp_path / "file")
    (tmp_path / "file").write_text("")
    assert "is not a folder" in stand.refused("yield")


def run(stand, program, *words, **env):
    return subprocess.run(
        [program, *words], env=stand.env | env, capture_output=True, text=True, timeout=60, cwd=stand.dirs.home
    )


def test_the_program_works_from_any_folder_through_a_link_and_with_a_foreign_python_environment(stand, tmp_path):
    (tmp_path / "bin").mkdir()
    link = tmp_path / "bin/ctl"
    link.symlink_to(BIN)
    (stand.dirs.home / "click.py").write_text("raise SystemExit('the wrong click')\n")  # in the current folder
    (stand.dirs.home / "llmwd").mkdir()
    foreign = {
        "PYTHONPATH": str(stand.dirs.home),
        "PYTHONHOME": "/nowhere",
        "VIRTUAL_ENV": "/nowhere",
        "PYTHONSTARTUP": "/nowhere",
    }
    done = run(stand, link, "status", **foreign)
    assert done.returncode == 3 and "start it with ./start.sh" in done.stderr


def test_the_supervisors_program_finds_its_python_in_the_same_way(stand, tmp_path):
    link = tmp_path / "supervisor"
    link.symlink_to(CHECKOUT / "bin/llmwd-supervisor")
    done = run(stand, link, "-h", PYTHONHOME="/nowhere")
    assert done.returncode == 0 and done.stdout.startswith("Usage: llmwd-supervisor "), done.stderr


@pytest.mark.parametrize(
    "words",
    [("status",), ("status", "--json"), ("models",), ("explain", "settings"), ("simulate", "job", "--gpus", "0"), ("--help",)],
    ids=" ".join,
)
def test_every_answer_comes_soon_for_a_program_in_python(stand, words):
    """0.3 s is wanted on an idle machine; on a busy one everything is slower, so bare Python is the measure."""
    for name in ("a", "b", "c", "d"):
        stand.profile(name)
    stand.begin()

    def took_s() -> float:
        begin_s = time.monotonic()
        run(stand, BIN, *words)
        return time.monotonic() - begin_s

    def bare_s() -> float:
        begin_s = time.monotonic()
        run(stand, BIN.parents[1] / ".venv-llmwd/bin/python", "-c", "import click, msgspec, json, subprocess")
        return time.monotonic() - begin_s

    # The best of some, in turn: what is measured is the program, not what else this machine does just now.
    pairs = [(took_s(), bare_s()) for _ in range(8)]
    assert min(took for took, _ in pairs) < FAST_S + 3 * min(bare for _, bare in pairs)


def test_reading_imports_neither_zmq_nor_rich_nor_what_only_workers_need(stand):
    stand.begin()
    done = run(stand, BIN.parents[1] / ".venv-llmwd/bin/python", "-I", "-X", "importtime", "-m", "llmwd.ctl.main", "status", "--json")
    for name in ("zmq", "rich", "requests", "psutil", "pynvml"):
        assert f" {name}\n" not in done.stderr, name


# --- completion ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_is_printed(stand, shell):
    done = stand.ctl("completion", shell)
    assert done.returncode == 0 and "_LLMWD_CTL_COMPLETE" in done.stdout


def complete(stand, *words: str) -> list[str]:
    """What bash would be offered for the last of these words."""
    done = run(
        stand, BIN, COMP_WORDS=" ".join(("llmwd-ctl", *words)), COMP_CWORD=str(len(words)),
        _LLMWD_CTL_COMPLETE="bash_complete",
    )  # fmt: skip
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_verbs_profiles_logs_and_job_ids_complete(stand):
    stand.profile("glm-4.7-flash")
    stand.profile("minimax-m2.5")
    stand.begin()
    assert complete(stand, "swi") == ["switch"]
    assert complete(stand, "switch", "gl") == ["glm-4.7-flash"]
    assert complete(stand, "logs", "clou") == ["cloudflared"]
    assert complete(stand, "explain", "gres", "--form", "s") == ["sinfo", "stderr"]


def test_the_completion_script_works_in_bash_itself(stand):
    stand.profile("glm-4.7-flash")
    script = f"""
        PATH={BIN.parent}:$PATH
        eval "$(llmwd-ctl completion bash)"
        COMP_WORDS=(llmwd-ctl switch gl) COMP_CWORD=2
        _llmwd_ctl_completion llmwd-ctl
        echo "${{COMPREPLY[@]}}"
    """
    done = run(stand, "bash", "-c", script)
    assert done.stdout == "glm-4.7-flash\n", done.stderr
