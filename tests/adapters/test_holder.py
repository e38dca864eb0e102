"""The holder with real processes: what it starts, tells, writes down, and how it ends a tree in order."""

import json
import os
import stat
import sys
import time
from pathlib import Path

from llmwd.adapters import holding, procs
from llmwd.messages import Note, Release, Renew
from tests.adapters.held import SERVER, hold, running  # noqa: F401
from tests.waiting import wait_until

DEAF_TREE = ("--engine", "--tracker", "--fork-grandchild", "--ignore-term")


def test_the_service_gets_its_arguments_its_environment_and_the_marker(hold):
    held = hold("--json", '{"mode":"A B\'s"}', env={"CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2"})
    got = held.report()
    assert got["argv"][-2:] == ["--json", '{"mode":"A B\'s"}']
    assert got["cuda_visible_devices"] == "GPU-1,GPU-2"
    assert got["env"] == held.spec.env | {"LLMWD_TREE": held.spec.marker, "SPT_NOENV": "1"} | {
        name: got["env"][name] for name in got["env"] if name == "LC_CTYPE"  # python adds it
    }
    assert got["cwd"] == held.spec.cwd
    assert held.until(lambda state: state.server_pid == got["pid"]).status is None


def test_a_link_begins_with_the_whole_state(hold):
    held = hold("--engine", note={"ready_at": None, "url": "http://x"})
    pids = {held.report()["pid"], *held.report()["pids"]["engine"]}
    second = holding.connect(held.spec.socket, 5)
    state = wait_until(second.receive)[0]
    second.close()
    assert (state.pid, state.start) == (held.process.pid, procs.start_ticks(held.process.pid))
    assert (state.service, state.marker, state.error) == ("vllm", held.spec.marker, "")
    assert state.note == {"ready_at": None, "url": "http://x"}
    assert set(state.pids) == pids
    assert state.started_s <= time.monotonic() < state.expires_s == held.spec.expires_s


def test_the_service_has_its_own_session_no_input_and_default_signals(hold):
    program = (
        "import os, signal, sys; print(os.getsid(0) == os.getpid(), os.readlink('/proc/self/fd/0'),"
        "sorted(os.listdir('/proc/self/fd')), signal.getsignal(2) is signal.default_int_handler,"
        "signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.getsignal(1), os.umask(0), flush=True)"
    )
    mask = os.umask(0)
    os.umask(mask)
    held = hold(sys.executable, "-c", program)
    held.until(lambda state: state.gone_s)
    wait_until(lambda: "nothing is left" in held.output())
    fds = "['0', '1', '2', '3']"  # 3: the listing itself
    assert held.output().startswith(f"True /dev/null {fds} True set() 0 {mask}\n")


def test_it_is_a_small_program_with_a_name(hold):
    held = hold(site=holding.site_folder())
    held.report()
    assert Path(f"/proc/{held.process.pid}/cmdline").read_text().startswith("llmwd: holder vllm\0")
    pss = [line for line in Path(f"/proc/{held.process.pid}/smaps_rollup").read_text().splitlines() if "Pss:" in line]
    print(pss)
    assert int(pss[0].split()[1]) < 16 * 1024


def test_it_does_nothing_while_nothing_happens(hold):
    held = hold()
    held.report()

    def switches() -> int:
        text = Path(f"/proc/{held.process.pid}/status").read_text()
        return int(text.split("\nvoluntary_ctxt_switches:")[1].split()[0])

    wait_until(lambda: held.listen())
    before = switches()
    end = time.monotonic() + 1
    wait_until(lambda: time.monotonic() > end)
    assert switches() - before <= 2


def test_release_ends_the_tree_in_order_and_tells_each_step(hold):
    held = hold("--engine", "--tracker", "--fork-grandchild")
    got = held.report()
    ordered_s = time.monotonic()
    state = held.released(grace_s=20)
    held.link.close()  # at once: a holder waits a second for who has read its end
    assert ordered_s <= state.signalled_s <= state.model_gone_s <= state.gone_s < ordered_s + 20
    assert (state.releasing, state.status, state.killed_s, state.pids) == ("test", -15, None, ())
    assert not running([got["pid"], *sum(got["pids"].values(), [])])
    first = [next((s for s in held.heard if getattr(s, name)), None) for name in ("signalled_s", "model_gone_s", "gone_s")]
    assert all(first) and first == sorted(first, key=held.heard.index)
    assert held.ended() == 0
    assert not Path(held.spec.socket).exists() and not Path(held.spec.socket + ".last").exists()


def test_what_ignores_sigterm_is_killed_after_the_grace(hold):
    held = hold(*DEAF_TREE)
    held.report()
    ordered_s = time.monotonic()
    state = held.released(grace_s=0.3)
    assert state.status == -9
    assert ordered_s + 0.3 <= state.killed_s <= state.model_gone_s <= state.gone_s


def test_no_grace_kills_at_once_stopped_processes_too(hold):
    held = hold(*DEAF_TREE, "--children", "3")
    got = held.report()
    stopped = [got["pid"], *got["pids"]["engine"], *got["pids"]["grandchild"]]
    for pid in stopped:
        procs.signal_process(pid, procs.start_ticks(pid), 19)
    wait_until(lambda: all(procs.stat(pid).state == "T" for pid in stopped))
    state = held.released(grace_s=0)
    assert state.killed_s <= state.signalled_s <= state.gone_s


def test_no_grace_ends_a_server_that_swallows_sigterm_while_it_loads(hold):
    held = hold("--ready-after", "600", "--swallow-term-while-loading", "--engine")
    held.report()
    assert held.released(grace_s=0).status == -9


def test_a_second_release_shortens_the_grace_and_never_lengthens_it(hold):
    held = hold(*DEAF_TREE)
    held.report()
    for grace_s in (600, 0.1, 600):
        held.link.send(Release(grace_s=grace_s, reason=f"{grace_s}"))
    state = held.until(lambda state: state.gone_s)
    assert state.releasing == "600" and state.killed_s


def test_processes_forked_on_sigterm_are_ended_as_well(hold):
    held = hold("--refork-on-term", "8", "--engine", grace_s=4.0)
    held.report()
    state = held.released(grace_s=4)
    assert state.status == 0 and state.gone_s  # 0: it did go on in a child


def test_a_process_forked_unnoticed_after_sigterm_gets_it_too(hold, tmp_path):
    program = f"""
import os, pathlib, signal
def on_term(*_):
    os.waitpid(os.posix_spawn("/bin/sleep", ["sleep", "1000"], {{}}), 0)
    os._exit(5)
signal.signal(signal.SIGTERM, on_term)
pathlib.Path({str(tmp_path / "set")!r}).touch()
while True:
    signal.pause()
"""
    held = hold(sys.executable, "-c", program)
    wait_until((tmp_path / "set").exists)
    state = held.released(grace_s=60)
    assert (state.status, state.killed_s) == (5, None)


def test_the_model_is_gone_before_a_server_that_hangs(hold):
    held = hold("--engine", "--tracker", "--hang-on-term")
    held.report()
    held.renew()
    state = held.released(grace_s=4)
    assert state.model_gone_s < state.killed_s <= state.gone_s


def test_a_server_alone_is_what_holds_the_model(hold):
    held = hold("--tracker", "--ignore-term")
    held.report()
    state = held.released(grace_s=0.3)
    assert state.killed_s <= state.model_gone_s <= state.gone_s


def test_a_lease_that_is_not_renewed_ends_the_tree(hold):
    held = hold("--engine")
    held.report()
    expires_s = time.monotonic() + 1.5
    held.link.send(Renew(expires_s=expires_s))  # the last one, after a start that may have taken its time
    state = held.until(lambda state: state.gone_s)
    assert state.releasing == "lease_expired" and state.signalled_s >= expires_s == state.expires_s


def test_renewing_keeps_it(hold):
    held = hold(expires_s=time.monotonic() + 5)  # it has to be up by then
    later = time.monotonic() + 300
    held.link.send(Renew(expires_s=later))
    wait_until(lambda: time.monotonic() > held.spec.expires_s + 0.2)
    held.link.send(Note(note={}))
    assert held.until(lambda state: state.expires_s == later).releasing is None


def test_nothing_is_started_on_a_lease_that_has_ended(hold):
    held = hold(expires_s=time.monotonic() - 1)
    state = held.until(lambda state: state.gone_s)
    assert state.server_pid is None and "lease" in state.error
    assert not Path(held.spec.env["FAKE_REPORT"]).exists()


def test_a_note_is_given_to_the_next_manager(hold):
    held = hold()
    held.link.send(Note(note={"ready_at": 12.5, "profile": "p"}))
    held.until(lambda state: state.note)
    held.link.close()
    held.connect().heard.clear()
    assert held.until(bool).note == {"ready_at": 12.5, "profile": "p"}


def test_only_the_newest_link_renews_but_any_may_release(hold):
    old = hold()
    wait_until(old.listen)
    new = holding.connect(old.spec.socket, 5)
    wait_until(new.receive)
    old.link.send(Renew(expires_s=time.monotonic() + 1000))
    old.link.send(Note(note={"from": "old"}))
    wait_until(lambda: "'note' on an older connection was ignored" in old.output())
    new.send(Note(note={"from": "new"}))
    state = old.until(lambda state: state.note)
    assert (state.note, state.expires_s) == ({"from": "new"}, old.spec.expires_s)
    assert old.released().releasing == "test"
    wait_until(lambda: any(state.gone_s for state in new.receive() or []))
    new.close()


def test_an_end_that_nobody_reads_is_left_for_who_comes_later(hold):
    held = hold("--exit-after", "0.3", "--exit-code", "7")
    wait_until(held.listen)
    held.link.close()
    held.ended()
    last = Path(held.spec.socket + ".last")
    assert stat.S_IMODE(last.stat().st_mode) == 0o600
    state = holding.last_words(held.spec.socket)
    assert state.status == 7 and state.gone_s and state.releasing is None
    assert not last.exists() and holding.last_words(held.spec.socket) is None


def test_an_end_that_a_hanging_manager_never_reads_is_left_too(hold):
    held = hold()
    held.report()
    held.link.send(Release(grace_s=1, reason="test"))  # and never reads
    held.ended()
    held.link.close()
    assert holding.last_words(held.spec.socket).releasing == "test"


def test_the_log_is_rotated_and_private(hold):
    lines = 20_000
    held = hold("--chatter", str(lines), log_max_bytes=40_000, log_keep=2)
    wait_until(lambda: "startup complete" in held.output())
    held.released()
    held.link.close()
    held.ended()
    folder = Path(held.spec.log).parent
    names = sorted(folder.glob("log*"))
    assert [path.name for path in names] == ["log", "log.1", "log.2"]
    assert all(path.stat().st_size <= 40_000 and stat.S_IMODE(path.stat().st_mode) == 0o600 for path in names)
    text = "".join(path.read_text() for path in reversed(names))
    numbers = [int(line.split()[1]) for line in text.splitlines() if line.startswith("line ")]
    assert numbers == list(range(numbers[0], lines))
    assert all(path.read_text().endswith("\n") for path in names)


def test_a_log_goes_on_where_the_last_one_ended(hold, tmp_path):
    log = tmp_path / "again"
    log.write_text("before\n")
    held = hold("/bin/echo", "hello", log=str(log))
    held.until(lambda state: state.gone_s)
    wait_until(lambda: "nothing is left" in log.read_text())
    assert log.read_text().startswith("before\nhello\n")


def test_a_tree_of_100_processes(hold):
    held = hold("--engine", "--tracker", "--children", "100")
    held.report()
    assert len(held.until(lambda state: state.server_pid).pids) <= 104
    ordered_s = time.monotonic()
    state = held.released(grace_s=20)
    parts = {name: round(getattr(state, name) - ordered_s, 4) for name in ("signalled_s", "model_gone_s", "gone_s")}
    print(json.dumps(parts))
    assert state.killed_s is None


def test_a_deaf_tree_of_200_processes(hold):
    held = hold("--children", "200", "--ignore-term")
    held.report()
    assert held.released(grace_s=0).gone_s


def test_the_fake_server_can_be_run_by_its_path(hold):
    held = hold(str(SERVER), "serve", "m", "--port", "0", "--host", "127.0.0.1")
    assert held.report()["pid"] == held.until(bool).server_pid
