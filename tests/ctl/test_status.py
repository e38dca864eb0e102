"""`llmwd-ctl status`, as people and programs see it."""

import json
import os
import pty
import threading
import time

import msgspec

from llmwd.adapters import procs
from llmwd.ctl.place import look
from llmwd.messages import Hold, SourceState
from llmwd.vocab import NodePhase, Reason
from tests.ctl.stand import CTL

CONTRACT = {
    "node", "phase", "reason", "since", "model", "lease", "gpus", "jobs", "server", "tunnel", "workers", "root",
}  # fmt: skip


def test_without_a_supervisor_it_exits_3_and_says_how_to_start_one(stand):
    done = stand.ctl("status")
    assert done.returncode == 3
    assert "no supervisor is running on" in done.stderr and "./start.sh" in done.stderr
    assert done.stdout == ""


def test_without_a_supervisor_json_still_prints_the_whole_object_and_exits_3(stand):
    done = stand.ctl("status", "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 3
    assert CONTRACT <= told.keys()
    assert (told["phase"], told["reason"], told["workers"], told["lease"]) == ("stopped", "stopped", [], None)


def test_json_is_the_contract_while_a_supervisor_runs(stand):
    stand.begin()
    done = stand.ctl("status", "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 0 and CONTRACT <= told.keys()
    assert told["phase"] == "serving" and told["lease"] == {"epoch": 3, "gpus": [2, 3]}
    assert told["root"]["pid"] == stand.root.pid


def test_facts_that_a_killed_supervisor_left_behind_count_for_nothing(stand):
    stand.begin()
    stand.root.kill()
    stand.root.wait()
    assert stand.ctl("status").returncode == 3


def test_a_supervisor_without_facts_yet_is_starting(stand):
    stand.begin()
    for file in (stand.dirs.runtime / "facts").glob("*.bin"):
        file.unlink()
    told = json.loads(stand.ctl("status", "--json").stdout)
    assert (told["phase"], told["reason"]) == ("waiting", "starting")


def test_an_answer_that_is_read_before_its_cause_is_read_again(stand, monkeypatch):
    monkeypatch.setattr("llmwd.ctl.place.TORN_FOR_S", 20)  # for a thread that gets its turn late
    stand.begin()
    cause = stand.gpus(lease=None, hold=Hold(since_at=0.0, by="ann"))
    stand.say(stand.server(node_phase=NodePhase.held, reason=Reason.held, heard_s=cause.at_s))
    later = threading.Timer(0.05, stand.say, [cause])
    later.start()
    seen = look(stand.dirs)
    later.join()
    assert (seen.status.phase, seen.status.hold.by) == ("held", "ann")


def test_a_cause_that_is_never_kept_holds_nothing_up(stand):
    stand.begin()
    stand.say(stand.server(node_phase=NodePhase.held, reason=Reason.held, heard_s=time.monotonic()))
    assert json.loads(stand.ctl("status", "--json").stdout)["phase"] == "held"


def test_a_broken_fact_file_is_as_good_as_none(stand):
    stand.begin()
    (stand.dirs.runtime / "facts/vllm.bin").write_bytes(b"\x93garbage")
    assert json.loads(stand.ctl("status", "--json").stdout)["reason"] == "starting"


def test_the_table_fits_80_columns_and_tells_what_matters(stand):
    stand.begin()
    shown = stand.ctl("status").stdout
    assert all(len(line) <= 80 for line in shown.splitlines())
    for part in ("serving", "m001", "for 3m 1", "http://127.0.0.1:8000", "GPUs 2-3", "detector", "no Slurm here"):
        assert part in shown, part
    assert "\x1b" not in shown


def test_a_long_reason_takes_one_line_of_the_table_and_all_of_json(stand):
    stand.begin()
    why = "no folder slurm or slurm_NODE in " + " or ".join(f"/sys/fs/cgroup/{name}" for name in ("cpu", "memory", "devices"))
    stand.say(msgspec.structs.replace(stand.jobs(), sources=(SourceState(name="cgroup1", works=False, why=why),)))
    last = stand.ctl("status").stdout.splitlines()[-1]
    assert "cgroup1: no folder slurm or slurm_NODE in" in last and last.endswith(" …") and len(last) <= 80
    assert json.loads(stand.ctl("status", "--json").stdout)["sources"][0]["why"] == why


def test_colours_go_to_a_terminal_unless_no_color_is_set(stand):
    stand.begin()

    def on_a_terminal(**env: str) -> bytes:
        ours, theirs = pty.openpty()
        pid = os.posix_spawn(
            CTL[0], [*CTL, "status"], stand.env | {"TERM": "xterm-256color"} | env,
            file_actions=[(os.POSIX_SPAWN_DUP2, theirs, 1), (os.POSIX_SPAWN_DUP2, theirs, 2)],
        )  # fmt: skip
        os.close(theirs)
        shown = b""
        while True:
            try:
                block = os.read(ours, 65536)
            except OSError:  # EIO: the other end is closed
                break
            if not block:
                break
            shown += block
        os.waitpid(pid, 0)
        os.close(ours)
        return shown

    assert b"\x1b[32m" in on_a_terminal(NO_COLOR="")
    assert b"\x1b[32m" not in on_a_terminal(NO_COLOR="1")


def test_the_reason_is_told_in_words_and_the_detail_beside_it(stand):
    stand.begin()
    stand.say(stand.server(node_phase=NodePhase.waiting, reason=Reason.yielded_to_job, detail="job 42 has GPUs 2-3"))
    shown = stand.ctl("status").stdout
    assert Reason.yielded_to_job.meaning in shown and "job 42 has GPUs 2-3" in shown


def test_another_users_runtime_folder_is_not_believed(stand):
    if os.getuid() == 0:
        os.chown(stand.dirs.runtime, 12345, -1)
        done = stand.ctl("status")
    else:
        done = stand.ctl("status", LLMWD_RUNTIME_DIR="/")
    assert done.returncode == 1 and "belongs to uid" in done.stderr


def test_a_lock_of_a_process_that_is_no_more_does_not_make_facts_true(stand):
    stand.begin()
    fact = stand.root_fact()
    stand.say(msgspec.structs.replace(fact, start=procs.start_ticks(stand.root.pid) + 1))
    assert json.loads(stand.ctl("status", "--json").stdout)["reason"] == "starting"
