"""A drill strikes the model that really runs, says what the release took, and never leaves its job behind."""

import json
import signal
import subprocess
import sys

from tests.tree.conftest import Start
from tests.tree.supervised import CHECKOUT, Supervised
from tests.waiting import wait_until


def sim_files(tree: Supervised) -> list[str]:
    return [path.name for path in (tree.runtime / "sim").iterdir()]


def start_drill(tree: Supervised, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "llmwd.ctl.main", "drill", *words], env=tree.env, cwd=CHECKOUT, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_drill_while_serving_and_one_while_loading_are_within_the_budget_and_the_model_comes_back(supervised: Start) -> None:
    tree = supervised({"FAKE_ENGINE": 1, "FAKE_READY_AFTER": 2})
    before = tree.serving()["server"]["pid"]
    done = tree.ctl("drill", within_s=60)
    assert done.returncode == 0, done.stderr
    assert "proved within" in done.stdout and "of the budget of 5 s" in done.stdout and "the last process gone" in done.stdout
    assert tree.answers() and tree.status()["server"]["pid"] != before and sim_files(tree) == []

    done = tree.ctl("drill", "--while", "loading", "--json", within_s=60)
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["passed"] and told["while_phase"] == "loading" and told["gpus"] == list(range(8))
    assert told["parts"]["total_s"] == told["took_s"] <= told["budget_s"] == 5 and told["back_s"] > 0
    assert tree.answers() and sim_files(tree) == []

    report = json.loads(tree.ctl("report", "--json").stdout)
    assert report["drill"]["passed"] and report["drill"]["verdict"] == told["verdict"] and report["drill"]["while_phase"] == "loading"
    assert [one["while_phase"] for one in report["yields"]] == ["serving", "serving", "loading"]
    assert report["sums"]["simulated"] == 3 and report["sums"]["budget_broken"] == 0 and report["broken_lines"] == report["unknown_events"] == 0
    assert report["spans"][-1]["phase"] == "serving" and any(span["users"].get("llmwd") == 2 for span in report["spans"])


def test_a_server_that_takes_too_long_to_die_breaks_the_budget_and_the_drill_says_so(supervised: Start) -> None:
    tree = supervised({"FAKE_IGNORE_TERM": 1}, YIELD_GRACE=2.5, YIELD_BUDGET=1, LEASE_TTL=60)
    tree.serving()
    done = tree.ctl("drill", within_s=60)
    assert done.returncode == 1 and "the budget of 1 s is BROKEN" in done.stdout and "llmwd-ctl resume" in done.stdout
    assert tree.phase("held")["reason"] == "budget_broken" and sim_files(tree) == []
    again = tree.ctl("drill")
    assert again.returncode == 1 and "llmwd is held" in again.stderr and sim_files(tree) == []
    assert json.loads(tree.ctl("report", "--json").stdout)["drill"]["passed"] is False
    tree.ctl("resume")
    tree.serving()


def test_a_drill_that_is_interrupted_or_sees_no_release_leaves_no_job_behind(supervised: Start) -> None:
    tree = supervised({"FAKE_IGNORE_TERM": 1}, YIELD_GRACE=5, YIELD_BUDGET=30, LEASE_TTL=60)
    tree.serving()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        drill = start_drill(tree)
        wait_until(lambda: sim_files(tree), 30, what="the simulated job")
        tree.phase("yielding")  # or the next drill might begin while the model, as it seems then, still serves
        drill.send_signal(number)
        assert drill.wait(30) == 130 and sim_files(tree) == []
        drill.communicate()
        tree.serving()
    done = tree.ctl("drill", "--within", "0.5", "--no-wait")
    assert done.returncode == 1 and "no release was proved within 0.5 s" in done.stdout and sim_files(tree) == []
    tree.serving()

    drill = start_drill(tree, "--within", "3")
    path = wait_until(lambda: list((tree.runtime / "sim").glob("job_*")), 30)[0]
    assert "for=8" in path.read_text()  # so that it ends by itself, whatever happens to the drill
    drill.kill()
    drill.communicate()
    wait_until(lambda: sim_files(tree) == [], 20, what="the end of a job whose drill was killed")


def test_a_drill_that_is_interrupted_between_its_two_strikes_leaves_no_job_behind(supervised: Start) -> None:
    tree = supervised({"FAKE_READY_AFTER": 2}, RESUME_AFTER=5)
    tree.serving()
    drill = start_drill(tree, "--while", "loading")
    wait_until(lambda: tree.journal("drill"), 30, what="the first strike")
    drill.send_signal(signal.SIGINT)
    assert drill.wait(30) == 130 and sim_files(tree) == [] and len(tree.journal("drill")) == 1
    drill.communicate()
    tree.serving()


def test_a_drill_is_measured_against_the_budget_of_the_supervisor_not_of_a_file_edited_since(supervised: Start) -> None:
    tree = supervised()
    tree.serving()
    tree.write_settings(YIELD_BUDGET=60)
    done = tree.ctl("drill", "--no-wait", "--json", within_s=60)
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["budget_s"] == 5 and told["passed"]
    seen = tree.journal("job_seen")[-1]  # though its job was gone at once
    assert (seen["job"], seen["first"]) == (told["job"], "sim")
    proved = tree.journal("release_proved")[-1]
    assert proved["proved_by"] == "tree" and told["parts"]["driver_s"] is None


def test_where_there_can_be_no_drill_nothing_is_done(supervised: Start) -> None:
    tree = supervised()
    tree.serving()
    assert tree.ctl("drill", "--gpus", "8").returncode == 1
    aside = tree.ctl("drill", "--gpus", "0-1")
    assert aside.returncode == 1 and "the model is on GPUs 6-7" in aside.stderr
    quick = tree.ctl("drill", "--while", "loading")  # the stand-in is ready at once
    assert quick.returncode == (0 if "proved within" in quick.stdout else 1) and (quick.returncode == 0 or "too quickly" in quick.stderr)
    drills = len(tree.journal("drill"))
    tree.ctl("yield")
    tree.phase("held")
    held = tree.ctl("drill", "--while", "loading")
    assert held.returncode == 1 and "nothing was done" in held.stderr and len(tree.journal("drill")) == drills
    tree.ctl("stop")
    assert tree.ctl("drill").returncode == 3
