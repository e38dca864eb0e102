"""The configuration compared with bash itself on many generated files."""

import os
import re
import subprocess
import tempfile
from pathlib import Path

from hypothesis import assume, event, example, given, settings
from hypothesis import strategies as st

from llmwd.config import load
from llmwd.config.bashfile import read_files
from tests.config.homes import environ, write

NAMES = ("MODEL_NAME", "VLLM_ARGS", "BASE", "EXTRA_1", "hf_token")
ALPHABET = "abAB01 -=,.:/{}[]()<>|&;#!~*?^%@+'\"`$\\\n\té☃\U0001f600"

# Read out by a second bash, in another way: sizes and elements, the shell's own splitting, a child's environment.
ORACLE = r"""
for file in "$@"; do source "./$file" 2>/dev/null; done
for name in NAMES; do
  declare -n ref=$name
  printf '%s\0' "${#ref[@]}" "${ref[@]}"
done
set -f
words=($VLLM_ARGS)
printf '%s\0' "${#words[@]}" "${words[@]}"
declare -p VLLM_ARGS 2>/dev/null | grep -qa '^declare -[a-z]*a' && printf 'array\0' || printf 'string\0'
env -0
""".replace("NAMES", " ".join(NAMES))

many = settings(max_examples=200, deadline=None, database=None)


def double_quoted(text: str) -> str:
    return '"' + "".join("\\" + c if c in '"\\`$' else c for c in text) + '"'


def escaped(text: str) -> str:
    return "".join("'\n'" if c == "\n" else c if c.isalnum() else "\\" + c for c in text)


def ansi_c(text: str) -> str:
    return "$'" + "".join(f"\\x{byte:02x}" for byte in text.encode("utf-8", "surrogateescape")) + "'"


texts = st.text(ALPHABET, max_size=12)
names = st.sampled_from(NAMES)
references = names.flatmap(
    lambda n: st.sampled_from([f"${n}", f'"${{{n}}}"', f'"${{{n}:-a b}}"', f'"${{{n}[*]}}"', f'"${{{n}%% *}}"', f'"${{#{n}}}"'])
)
pieces = st.one_of(
    texts.map(double_quoted),
    texts.map(escaped),
    texts.map(ansi_c),
    texts.map(lambda text: "'" + text.replace("'", "'\\''") + "'"),
    references,
    st.sampled_from(["$((1+2))", "$(printf 'x y\\n\\n')", '"a \\\n  b"', "\\\n", "~/x", "{a,b}", ""]),
)
words = st.lists(pieces, min_size=1, max_size=3).map("".join)
arrays = st.lists(words.map(lambda word: word or "''"), max_size=4).flatmap(
    lambda some: st.sampled_from([f"({' '.join(some)})", "(\n  # why\n  " + "\n  ".join(some) + "\n)"])
)
assignments = st.one_of(
    st.builds("{}={}".format, names, words),
    st.builds("{}+={}".format, names, words),
    st.builds("{}={}".format, names, arrays),
    st.builds("{}+={}".format, names, arrays),
    st.builds("{}[3]={}".format, names, words),
    st.builds("export {}={}".format, names, words),
    st.builds("declare -x {}={}".format, names, words),
)
statements = st.one_of(
    assignments,
    st.builds("{}  # and 'why' ${{NOT[}} \\".format, assignments),
    st.builds("{}; {}".format, assignments, assignments),
    names.map("export {}".format),
    names.map("unset {}".format),
    st.builds("if [ -n x ]; then {}; fi".format, assignments),
    st.sampled_from(["", "# a comment with 'half a quote", "   ", ": nothing", "[ -d /nonexistent ] && BASE=never"]),
)
files = st.lists(statements, max_size=6).map("\n".join)
profiles = st.builds("MODEL_NAME=m{}\n{}\nVLLM_ARGS+={}\n{}".format, words, files, words, files)


def ask_bash(home: Path, env: dict[str, str], names_of_files: list[str]) -> tuple[dict, list[str], dict[str, str]]:
    """({name: values}, VLLM_ARGS as words, environment of a child)."""
    command = ["bash", "--norc", "--noprofile", "-c", ORACLE, "bash", *names_of_files]
    raw = subprocess.run(command, cwd=home, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60).stdout
    tokens = iter(os.fsdecode(raw).split("\0")[:-1])
    lists = [[next(tokens) for _ in range(int(next(tokens)))] for _ in range(len(NAMES) + 1)]
    values = dict(zip(NAMES, lists, strict=False))
    arguments = values["VLLM_ARGS"] if next(tokens) == "array" else lists[-1]
    return values, arguments, dict(token.split("=", 1) for token in tokens)


@many
@given(config=files, node=files, profile=st.one_of(profiles, files))
@example(config="BASE='a  b'", node='export hf_token="$BASE\n$(echo x)"', profile="VLLM_ARGS=$BASE MODEL_NAME=$hf_token")
@example(config="export BASE=1", node="BASE+=2", profile="unset BASE; VLLM_ARGS=()")
def test_every_generated_configuration_means_what_bash_says(config, node, profile):
    with tempfile.TemporaryDirectory() as folder:
        home = write(Path(folder), {"etc/config.env": config, "etc/nodes/n.env": node, "models/p.env": profile})
        env = environ()
        loaded = load(home, "p", "n", env)
        values, arguments, child = ask_bash(home, env, ["etc/config.env", "etc/nodes/n.env", "models/p.env"])
    event('a profile' if loaded.profile else 'problems')
    if loaded.profile is None:
        model = values["MODEL_NAME"]
        is_missing = not "".join(model[:1]).strip() or any(p.variable == "VLLM_ARGS" for p in loaded.problems)
        is_array = any(p.variable == "MODEL_NAME" for p in loaded.problems)
        failed = [p for p in loaded.problems if p.variable is None]
        assert loaded.problems and (is_missing or is_array or failed)
        return
    assert loaded.profile.model_name == values["MODEL_NAME"][0]
    assert list(loaded.profile.vllm_args) == arguments
    ours = {"MODEL_NAME", "VLLM_ARGS"}
    exports = {name: child[name] for name in NAMES if name in child and name not in ours}
    assert loaded.profile.exports == exports


@many
@given(text=st.text("AB=12 \"'\\\n$;#{}", max_size=40), more=st.text("AB=1\"'\n$;x\udcff\udce9", max_size=12))
@example(text='A="open', more="B=1")
@example(text="A=1\nA =2\nB=$A", more="A=\udcff")
def test_any_text_at_all_gives_the_variables_that_it_gives_in_bash(text, more):
    assume(not re.search(r"\$\{?#?\$", f"{text}\n{more}".replace("\\\n", "")))  # $$: two shells have two pids
    with tempfile.TemporaryDirectory() as folder:
        home = write(Path(folder), {"a.env": text, "b.env": more})
        readout = read_files([home / "a.env", home / "b.env"], environ(), home)
        script = 'source ./a.env; source ./b.env; for n in A B; do declare -n r=$n; printf "%s\\0" "${r+x}" "${r-}"; done'
        process = subprocess.run(
            ["bash", "--norc", "--noprofile", "-c", script], cwd=home, env=environ(), capture_output=True, timeout=60
        )
    if len(readout.states) < 3:
        assert readout.ended_by and not process.stdout
        return
    a_set, a, b_set, b = os.fsdecode(process.stdout).split("\0")[-5:-1]
    expected = {name: value for name, is_set, value in (("A", a_set, a), ("B", b_set, b)) if is_set}
    assert {name: readout.states[-1][name].values[0] for name in "AB" if name in readout.states[-1]} == expected


@many
@given(st.lists(st.text(ALPHABET, min_size=1, max_size=10), max_size=5))
def test_an_array_of_arguments_reaches_vllm_unchanged(arguments):
    with tempfile.TemporaryDirectory() as folder:
        quoted = " ".join(map(double_quoted, arguments))
        home = write(Path(folder), {"models/p.env": f"MODEL_NAME=m\nVLLM_ARGS=({quoted})\n"})
        loaded = load(home, "p", "n", environ())
    assert loaded.profile is not None and list(loaded.profile.vllm_args) == arguments
