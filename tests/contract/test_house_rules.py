"""Rules that hold for every file of ours, checked instead of remembered."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(ROOT.glob("llmwd/**/*.py"))
TESTS = sorted(ROOT.glob("tests/**/*.py"))
SCRIPTS = sorted({*ROOT.glob("*.sh"), *ROOT.glob("scripts/*"), *(ROOT / "bin").iterdir()})
PROGRAM = MODULES + [path for path in SCRIPTS if path.is_file()]
LINES_MOST = 330
FUNCTION_LINES_MOST = 50
# A first line that says why its module is longer than others.
EXCUSE = re.compile(r"\bfile\b|\bbecause\b|\bone table\b|\blong\b")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_bugs_crash_the_worker_and_nothing_is_caught_without_a_name(path: Path) -> None:
    catch_alls = [
        node.lineno
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or re.search(r"\b(Base)?Exception\b", ast.unparse(node.type)))
    ]
    # The fork's outermost frame: below it runs the root's own code.
    assert len(catch_alls) == (1 if name_of(path) == "llmwd/root.py" else 0), catch_alls


@pytest.mark.parametrize("path", PROGRAM, ids=name_of)
def test_nothing_is_signalled_by_its_name_or_its_user(path: Path) -> None:
    assert not re.search(r"\b(pkill|killall|pgrep|fuser)\b|kill -- -1|os\.kill\(", path.read_text())
    # The group of a child of ours that is not reaped: the number is still ours.
    assert "killpg" not in path.read_text() or name_of(path) in ("llmwd/config/bashfile.py", "llmwd/adapters/slurm.py")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_long_module_says_why_in_its_first_line(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= LINES_MOST or EXCUSE.search(text.splitlines()[0]), f"{text.count(chr(10))} lines"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_functions_are_short(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < FUNCTION_LINES_MOST, f"{path}:{node.lineno} {node.name}"


@pytest.mark.parametrize("path", [path for path in MODULES if path.read_text()], ids=name_of)
def test_every_module_says_what_it_is_and_every_public_class_as_well(path: Path) -> None:
    tree = tree_of(path)
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith(("_", "Shown")) and not path.match("*/ctl/*"):
            assert ast.get_docstring(node) or {ast.unparse(base) for base in node.bases} & {"StrEnum", "Protocol"}, node.name


@pytest.mark.parametrize("path", PROGRAM + TESTS, ids=name_of)
def test_nothing_is_left_for_later(path: Path) -> None:
    if path != Path(__file__):
        assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", path.read_text())


def test_no_module_is_a_drawer() -> None:
    assert not {path.stem for path in MODULES + TESTS} & {"utils", "util", "common", "helpers", "helper", "manager", "misc"}


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_tests_wait_in_one_place_and_leave_nothing_out(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and name_of(path) != "tests/waiting.py" and "fakes" not in path.parts:
            assert ast.unparse(node.func) not in {"time.sleep", "sleep"}, f"line {node.lineno}"
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in {"pytest.mark.skip", "pytest.mark.skipif", "pytest.mark.xfail", "pytest.xfail"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_deadline_or_an_age_says_its_unit(path: Path) -> None:
    """A number of seconds in a name without `_s` is read as something else sooner or later."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.arg):
            assert not re.search(r"(timeout|deadline|delay|interval|period|grace|within|duration)$", node.arg), node.lineno


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_what_is_decided_by_time_is_decided_by_the_monotonic_clock(path: Path) -> None:
    """Wall time is only shown: it is kept in names that end in `_at`, and never compared with the monotonic clock."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Assign) and "time.time()" == ast.unparse(node.value):
            for target in node.targets:
                assert re.search(r"(_at|wall|\bnow_at)$", ast.unparse(target)), f"line {node.lineno}"
