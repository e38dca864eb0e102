"""The model's processes stand back behind everybody else on the node; those that have to answer do not."""

import json
import os

from llmwd.adapters import courtesy, procs
from tests.waiting import wait_until


def as_found(pid: int) -> tuple[int, int, int | None, int]:
    found = courtesy.found(pid)
    return found["nice"], found["oom_score_adj"], found["io_priority"], len(found["cpus"])


def test_the_server_stands_back_with_all_its_children_and_nobody_else_of_us_does(supervised) -> None:
    node = supervised(profile={"FAKE_ENGINE": 1, "FAKE_CHILDREN": 11, "FAKE_FORK_GRANDCHILD": 1})
    status = node.serving()
    ordinary, all_cpus = as_found(os.getpid()), len(os.sched_getaffinity(0))
    holder = node.server_fact().holder_pid
    tree = procs.descendants(holder)
    assert len(tree) == 14 and {as_found(pid) for pid in tree} == {(10, 800, 7, all_cpus)}
    ours = [*node.pids().values(), holder]
    assert {as_found(pid) for pid in ours if pid and pid not in tree} == {ordinary}
    assert {name: status["neighbour"][name] for name in ("nice", "oom_score_adj", "io_priority")} == {
        "nice": 10, "oom_score_adj": 800, "io_priority": 7,
    }  # fmt: skip
    shown = " ".join(node.ctl("status").stdout.split())
    assert "neighbour nice 10 · oom_score_adj 800 · I/O best-effort 7 · CPUs 0" in shown
    assert json.loads(node.ctl("status", "--json").stdout)["neighbour"] == status["neighbour"]

    node.signal("vllm", 9)  # the restarted manager finds out by itself how the server stands
    wait_until(lambda: node.worker("vllm")["restarts"] == 1 and node.status()["neighbour"] == status["neighbour"], 30)


def test_each_of_it_can_be_switched_off(supervised) -> None:
    node = supervised(NICE=0, OOM_SCORE_ADJ=0, IO_PRIORITY="off", CPU_AFFINITY="off")
    node.serving()
    assert as_found(node.server_fact().pid) == as_found(os.getpid())
