"""Whether this host is a node of Slurm's, by default settings: "no" only on proof, for without Slurm nothing is asked."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmwd.adapters import slurmtraces
from llmwd.core.claims import Claims
from llmwd.messages import JobSeen
from llmwd.vocab import Source
from llmwd.workers.slurmdesk import SlurmDesk
from tests.fakes.loop_shell import LoopShell

HOST = "gpu07"
MINE = f"echo '{HOST} {HOST} gpu:h200:4'"
Ask = Callable[..., SlurmDesk]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ask]:
    """ask(what sinfo does, in shell; None: it is not installed; trace): the desk after its first answer."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sh", "bash", "env", "tail"):  # all else that the settings' files and the stand-ins need
        (programs / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(programs))
    made: list[tuple[SlurmDesk, LoopShell]] = []

    def make(sinfo: str | None, daemon: str = "", configuration: str = "", **settings: object) -> SlurmDesk:
        monkeypatch.setattr(slurmtraces, "daemon", lambda: daemon)
        monkeypatch.setattr(slurmtraces, "configuration", lambda: configuration)
        for name in ("sinfo", "scontrol", "squeue") if sinfo is not None else ():
            (programs / name).write_text(f"#!/bin/sh\n{sinfo}\n")
            (programs / name).chmod(0o755)
        shell = LoopShell(tmp_path, **settings)
        desk = SlurmDesk(shell, Claims(1.0), HOST, lambda: None)  # type: ignore[arg-type]
        made.append((desk, shell))
        if desk.applies or sinfo is not None:
            desk.pump()
            shell.until(lambda: desk.node is not None or desk.last_error or not desk.applies)
        return desk

    yield make
    for desk, shell in made:
        desk.close()
        shell.close()


def blocked(desk: SlurmDesk) -> str:
    """Why it grants nothing; the claims must count Slurm's jobs, too."""
    assert desk.applies and desk._claims.slurm and not desk.state.works
    return desk.grant_why(0.0)


def test_the_node_is_found_by_its_hosts_name(ask: Ask) -> None:
    assert ask(MINE).node is not None


@pytest.mark.parametrize(
    ("sinfo", "traces", "words"),
    [
        (f"{MINE}; echo 'other {HOST} gpu:4'", {}, "SLURM_NODE"),
        ("echo 'n1 box gpu:4'", {"daemon": "slurmd runs here (process 7)"}, "slurmd runs here"),
        ("echo 'error: cannot stat file /etc/slurm/slurm.conf' >&2; exit 1", {}, "its commands are here"),
        ("echo 'error: cannot stat file slurm.conf' >&2; exit 1", {"daemon": "slurmd runs here"}, "slurmd runs here"),
        ("echo 'fetch_config: no config from slurmctld, connect failure' >&2; exit 1", {}, "slurmctld does not answer"),
        ("echo 'slurm_load_partitions: Protocol authentication error' >&2; exit 1", {}, "slurmctld does not answer"),
        (None, {"daemon": "slurmd runs here (process 7)"}, "not installed here, and yet slurmd runs here"),
        (None, {"configuration": "there is /etc/slurm/slurm.conf"}, "there is /etc/slurm/slurm.conf"),
    ],
)
def test_what_leaves_open_whether_slurm_is_here_is_no_reason_to_take_a_gpu(
    ask: Ask, sinfo: str | None, traces: dict[str, str], words: str
) -> None:
    assert words in blocked(ask(sinfo, **traces))


@pytest.mark.parametrize(
    ("sinfo", "more"),
    [
        ("echo 'n1 box gpu:4'", {}),  # a host from which jobs are submitted
        ("echo 'n1 box gpu:4'", {"configuration": "there is /etc/slurm/slurm.conf"}),
        (None, {}),
        ("echo 'error: cannot stat file /etc/slurm/slurm.conf' >&2; exit 1", {"sim_gpus": 4}),  # these are nobody's
    ],
)
def test_a_host_that_is_none_of_slurms_needs_no_word_of_slurms(ask: Ask, sinfo: str | None, more: dict[str, object]) -> None:
    desk = ask(sinfo, **more)
    assert not desk.applies and desk.grant_why(0.0) == "" and desk.state.why


def test_a_node_whose_gpus_become_others_is_known_by_the_next_reading(ask: Ask, tmp_path: Path) -> None:
    columns = "case \"$*\" in *GresUsed*) printf '%-256s%-64s%s\\n' 'gpu:h200:0(IDX:N/A)' idle gpu:h200:3 ;; *) " + MINE + " ;; esac"
    desk = ask(columns)
    assert desk.node.gpus == 4
    shell = desk._shell
    shell.until(lambda: desk.state.works)
    assert (desk.node.gpus, desk.node.counts, desk.grant_why(0.0)) == (3, (3,), "")


def test_plans_that_are_not_understood_or_not_told_end_nothing_and_are_said_once(
    ask: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    use = "*GresUsed*) printf '%-256s%-64s%s\\n' 'gpu:h200:0(IDX:N/A)' idle gpu:h200:4 ;;"
    plans = '*squeue*) echo "from job $$" ;; *reservations*) echo no >&2; exit 1 ;;'
    desk = ask(f'case "$0 $*" in {plans} {use} *) {MINE} ;; esac', lookahead=True)
    shell = desk._shell
    for _ in range(3):
        shell.until(lambda: not desk.ahead.grant_why() and not desk._calls, 30)
        assert {(plans.kind, len(plans.expected)) for plans in desk.ahead.plans} == {("pending jobs", 1), ("reservations", 0)}
        desk.ahead.adopt(())  # as when both are asked for the first time
        desk.pump()
    told = [line for line in caplog.messages if "look-ahead" in line]
    assert len(told) == 2 and "a pending job: 'from job" in told[0] and "does not tell the reservations" in told[1]


def test_a_job_whose_question_hangs_is_known_by_a_reading_of_the_node_before_it_counts_as_one_on_our_gpus(ask: Ask) -> None:
    """It is alone, and nothing else makes us ask: the next reading would come a minute later."""
    use = "*GresUsed*) printf '%-256s%-64s%s\\n' 'gpu:h200:1(IDX:1)' mixed gpu:h200:4 ;;"
    script = f'case "$0 $*" in *"show job"*) exec tail -f /dev/null ;; {use} *) {MINE} ;; esac'
    desk = ask(script, reconcile_s=60.0, scontrol_timeout_s=30.0)
    shell, claims = desk._shell, desk._claims
    claims.resolve_deadline_s = 6.0
    shell.until(lambda: desk.state.works, 30)
    claims.see((JobSeen(id="7", sources=(Source.stepd,), seen_s=time.monotonic()),), time.monotonic())
    desk.pump()
    shell.until(lambda: not claims.views(time.monotonic())[0].pending, 30)
    assert claims.views(time.monotonic())[0].gpus == {1}


def test_traces_are_daemons_and_their_cgroups(tmp_path: Path) -> None:
    (tmp_path / "proc/12").mkdir(parents=True)
    (tmp_path / "proc/12/comm").write_text("slurm-tool\n")
    (tmp_path / "cgroup/system.slice").mkdir(parents=True)
    assert slurmtraces.daemon(tmp_path / "proc", tmp_path / "cgroup") == ""
    (tmp_path / "cgroup/system.slice/gpu07_slurmstepd.scope").mkdir()
    assert "gpu07_slurmstepd.scope" in slurmtraces.daemon(tmp_path / "proc", tmp_path / "cgroup")
    (tmp_path / "proc/9").mkdir()
    (tmp_path / "proc/9/comm").write_text("slurmd\n")
    assert slurmtraces.daemon(tmp_path / "proc", tmp_path / "cgroup") == "slurmd runs here (process 9)"
    assert slurmtraces.configuration([str(tmp_path / "none")]) == ""
