"""Who may import whom, and the one door to each outside thing. All imports count, those within functions too."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(ROOT.glob("llmwd/**/*.py"))
OUTSIDE_CORE = {
    "os", "time", "random", "socket", "subprocess", "signal", "logging", "threading", "zmq", "pynvml", "asyncio", "io",
    "multiprocessing", "pathlib", "psutil", "requests", "select", "selectors", "shutil", "sys", "tempfile", "uuid",
    "inotify_simple", "setproctitle", "secrets", "sqlite3",
}  # fmt: skip
# Programs of their own beside the tree: they take what they need, and nobody imports them but who starts them.
TOPS = {"llmwd.supervisor", "llmwd.ctl", "llmwd.bench"}
ALLOWED = {
    "vocab": set(),
    "redact": set(),
    "ownership": set(),
    "messages": {"vocab"},
    "spec": {"vocab"},
    "core": {"core", "messages", "vocab"},
    "config": {"redact", "ownership", "config", "vocab"},
    "adapters": {"redact", "ownership", "adapters", "messages", "vocab"},
    "workers": {"redact", "workers", "core", "adapters", "config", "messages", "vocab"},
    # The root is the supervisor's loop: it meets core and adapters, and knows of workers only how one is run.
    "root": {"redact", "core", "adapters", "config", "messages", "spec", "vocab", "workers"},
    "supervisor": {"redact", "root", "config", "adapters", "workers", "vocab", "spec", "messages", "core"},
    "ctl": {"redact", "ctl", "core", "adapters", "config", "messages", "vocab", "spec"},
    "bench": {"redact", "bench"},
}
# Of the workers' folder, what is no worker but a shell that workers share, or a part of one worker's shell.
SHARED_SHELLS = {
    "base", "service", "slurmdesk", "drivers", "nodegpus", "readiness", "neighbour", "shortage", "standing", "prologs",
    "proving", "load", "usage", "ahead", "loadtimes", "tunnelplan", "tunnelplanner", "tunnelwatch",
    "doorkeyring", "doorsaid", "keeping", "sending", "deadman", "noticeplan",
}  # fmt: skip
# A worker's look at files and programs before a start that a command takes as well: no loop, no bus, no state.
LENT_TO_COMMANDS = {"llmwd.workers.tunnelplan", "llmwd.workers.noticeplan"}
DOORS = {
    "zmq": {"adapters/bus.py", "adapters/desk.py", "workers/base.py"},  # base: the loop's poller and its context
    "pynvml": {"adapters/nvml_probe.py"},
    "inotify_simple": {"adapters/inotify.py"},
    "requests": {"adapters/http.py", "adapters/ntfy.py", "bench/served.py"},
    "sqlite3": {"adapters/outbox.py"},
    "apprise": {"adapters/otherservices_send.py"},
    "click": {"ctl/", "supervisor.py"},
    "rich": {"ctl/", "bench/"},
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Absolute names of all that a file imports: modules, and what it takes from packages."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inner if name.startswith("llmwd") and _is_module(name)}
            names |= modules | ({node.module} if modules != inner else set())
    return names


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def layer(name: str) -> str | None:
    """The layer of a module of ours: the folder or module right below llmwd."""
    parts = name.split(".")
    return None if parts[0] != "llmwd" or len(parts) < 2 else parts[1]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_module_imports_only_from_layers_below_its_own(path: Path) -> None:
    mine = layer(name_of(path))
    if mine is None:
        return  # llmwd/__init__.py: a version
    wrong = {name for name in imports(path) if layer(name) is not None and layer(name) not in ALLOWED[mine]}
    assert not wrong - (LENT_TO_COMMANDS if mine == "ctl" else set())


def test_nothing_below_imports_a_program() -> None:
    for path in FILES:
        mine = name_of(path)
        for name in imports(path):
            top = ".".join(name.split(".")[:2])
            assert top not in TOPS or mine.startswith(top), f"{mine} imports {name}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("llmwd/core/*.py")), ids=name_of)
def test_the_core_knows_no_clock_no_dice_and_no_outside(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & OUTSIDE_CORE
    names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    assert not names & {"open", "print", "input", "__import__", "eval", "exec"}
    attributes = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert not attributes & {"now", "utcnow", "today"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("llmwd/workers/*.py")), ids=name_of)
def test_workers_import_one_another_never_and_of_their_folder_only_what_they_share(path: Path) -> None:
    others = {name.split(".")[2] for name in imports(path) if name.startswith("llmwd.workers.")}
    assert others <= SHARED_SHELLS - {path.stem}


def test_the_root_knows_workers_only_as_names_in_their_specs() -> None:
    for path in (ROOT / "llmwd/root.py", ROOT / "llmwd/supervisor.py"):
        assert {name for name in imports(path) if name.startswith("llmwd.workers")} <= {"llmwd.workers.base"}


def test_every_child_spec_names_a_module_with_a_main() -> None:
    from llmwd.spec import CHILDREN, check

    check(CHILDREN, importlib.util.find_spec)
    for spec in CHILDREN:
        path = ROOT.joinpath(*spec.module.split(".")).with_suffix(".py")
        assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in ast.parse(path.read_text()).body)


@pytest.mark.parametrize("package", list(DOORS))
def test_each_outside_thing_has_its_door(package: str) -> None:
    users = {str(path.relative_to(ROOT / "llmwd")) for path in FILES if package in {n.split(".")[0] for n in imports(path)}}
    door = DOORS[package]
    assert users and all(user.startswith(tuple(door)) for user in users)


def calls(path: Path) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}


def test_only_the_root_and_the_holder_fork() -> None:
    """The root its workers; the holder, a standard-library program, its service (with a death signal) and its guard."""
    forks = {"os.fork", "os.forkpty", "os.posix_spawn", "pty.fork"}
    assert {name_of(path) for path in FILES if calls(path) & forks} == {"llmwd.root", "llmwd.adapters.starting", "llmwd.adapters.guard"}
    assert "llmwd.adapters.starting" in imports(ROOT / "llmwd/workers/holder.py")
    assert [name_of(path) for path in FILES if "llmwd.adapters.starting" in imports(path)] == ["llmwd.workers.holder"]


def test_slurm_is_asked_through_one_module() -> None:
    def commands(path: Path) -> set[str]:
        words = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        return words & {"scontrol", "sinfo", "squeue", "sacct"}

    users = {name_of(path) for path in FILES if not name_of(path).startswith("llmwd.ctl.") and commands(path)}
    # gres: `sinfo` is also the name of a form of text there.
    assert users - {"llmwd.core.gres"} == {"llmwd.adapters.slurm"}


def test_no_command_goes_through_a_shell() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert not any(keyword.arg == "shell" for keyword in node.keywords), f"{path}:{node.lineno}"
        assert not calls(path) & {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}


def test_the_observer_shares_no_code_with_what_it_judges() -> None:
    for path in ROOT.glob("tests/observer/*.py"):
        assert not [name for name in imports(path) if name.split(".")[0] == "llmwd" or name.startswith("tests.tree")], path


def test_no_worker_listens_to_or_waits_for_the_notifier() -> None:
    named = {path.name for path in ROOT.glob("llmwd/workers/*.py") if "Worker.notifier" in path.read_text() or "NoticesFact" in path.read_text()}
    assert named == {"notifier.py", "sending.py"}
