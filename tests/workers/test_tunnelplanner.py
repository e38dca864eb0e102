"""Planning a start of the tunnel, where files and programs do not answer."""

from collections.abc import Callable

import pytest

from llmwd.config import Settings, load
from llmwd.workers.tunnelplan import Plan, made_for
from llmwd.workers.tunnelplanner import Planner

ORIGIN = "http://127.0.0.1:8000"


class Stalled:
    """A shell whose work beside the loop has not come to its end."""

    def __init__(self):
        self.timers: dict[str, Callable[[], None]] = {}
        self.ends: list[Callable] = []

    def at(self, name, when_s, callback):
        self.timers[name] = callback

    def cancel(self, name):
        self.timers.pop(name, None)

    def beside(self, work, then):
        self.ends.append(then)


@pytest.fixture
def settings(tmp_path) -> Settings:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "config.env").write_text("TUNNEL_MODE=token\nTUNNEL_TOKEN_FILE=/far/token\n")
    return load(tmp_path).settings


@pytest.fixture
def made(tmp_path):
    """(the shell, the planner, the plans that it made)."""
    shell, plans = Stalled(), []
    return shell, Planner(shell, tmp_path / "config.yml", plans.append, lambda: None), plans


def test_a_look_that_hangs_is_told_then_given_up_and_its_late_end_means_nothing(settings, made):
    shell, planner, plans = made
    planner.begin(settings, ORIGIN)
    shell.timers["plan"]()
    assert planner.busy and "/far/token takes long" in planner.slow and not plans
    shell.timers["plan"]()
    assert not planner.busy and planner.slow == "" and plans[0].made_for == made_for(settings, ORIGIN)
    assert "Not within 60 s" in plans[0].passing and plans[0].recipe is None
    shell.ends[0](Plan(stamp="late"))
    assert len(plans) == 1 and planner.stamp == "" and not shell.timers


def test_a_look_in_time_takes_the_word_of_its_slowness_back(settings, made):
    shell, planner, plans = made
    planner.begin(settings, ORIGIN)
    shell.timers["plan"]()
    shell.ends[0](Plan(stamp="a"))
    assert (plans, planner.slow, planner.stamp, shell.timers) == ([Plan(stamp="a")], "", "a", {})
    planner.begin(settings, ORIGIN)
    shell.ends[1](None)  # a fault in the look itself
    assert plans[1].passing and plans[1].made_for == made_for(settings, ORIGIN)


def test_one_look_at_the_files_hangs_at_a_time(settings, made):
    shell, planner, _ = made
    changes: list[str] = []
    planner.look(settings, lambda: changes.append("before any plan"))
    planner.stamp = "a"
    for name in ("first", "second", "third"):
        planner.look(settings, lambda name=name: changes.append(name))
    assert len(shell.ends) == 1
    shell.ends[0]("a")
    assert changes == [] and len(shell.ends) == 2, "what changed after the first look was missed"
    shell.ends[1]("b")
    assert changes == ["third"] and len(shell.ends) == 2
    planner.look(settings, lambda: changes.append("fourth"))
    shell.ends[2]("b")
    assert changes == ["third", "fourth"]
