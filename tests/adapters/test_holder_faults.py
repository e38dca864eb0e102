"""The holder when something breaks: its manager, the root, its service, the disk, what it is told."""

import os
import resource
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import msgspec
import pytest

from llmwd.adapters import holding, procs
from llmwd.adapters.sweeping import Sweep
from llmwd.messages import HolderState, Note, Release, Renew
from tests.adapters.held import SERVER, hold, running  # noqa: F401
from tests.waiting import wait_until


def test_a_service_that_ends_by_itself_is_told_with_its_exit_code(hold):
    held = hold("--exit-after", "0.3", "--exit-code", "3")
    state = held.until(lambda state: state.gone_s)
    assert (state.status, state.releasing, state.error) == (3, None, "")


def test_an_engine_does_not_outlive_its_killed_server(hold):
    held = hold("--engine", "--fork-grandchild")
    got = held.report()
    os.kill(got["pid"], signal.SIGKILL)
    state = held.until(lambda state: state.gone_s)
    told = next(state for state in held.heard if state.status is not None)
    assert told.status == -9 and told.gone_s is None and set(got["pids"]["engine"]) <= set(told.pids)
    assert state.releasing == "server_exited" and state.model_gone_s
    assert not running(sum(got["pids"].values(), []))


def test_a_deaf_engine_does_not_outlive_its_killed_server(hold):
    held = hold("--engine", "--ignore-term", grace_s=0.2)
    os.kill(held.report()["pid"], signal.SIGKILL)
    assert held.until(lambda state: state.gone_s).killed_s


def test_the_death_of_the_root_ends_the_tree(hold):
    root_end, end = os.pipe()
    held = hold("--engine", "--fork-grandchild", root_fd=root_end)
    os.close(root_end)
    held.report()
    assert held.until(lambda state: state.server_pid).releasing is None
    os.close(end)
    assert held.until(lambda state: state.gone_s).releasing == "root_gone"


def test_sigterm_to_the_holder_ends_the_tree(hold):
    held = hold("--engine", "--ignore-term", grace_s=0.2)
    held.report()
    held.until(bool)
    procs.signal_process(held.process.pid, procs.start_ticks(held.process.pid), signal.SIGTERM)
    assert held.until(lambda state: state.gone_s).releasing == "holder_terminated"


def test_a_killed_manager_comes_back_and_finds_its_server(hold):
    held = hold("--engine", connected=False)
    held.report()
    program = (
        "import sys; from llmwd.adapters import holding; link = holding.connect(sys.argv[1], 30);"
        "print(bool(link), flush=True); sys.stdin.read()"
    )
    manager = subprocess.Popen(
        [sys.executable, "-c", program, held.spec.socket], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert manager.stdout.readline() == b"True\n"
    manager.kill()
    manager.wait()
    manager.stdin.close()
    manager.stdout.close()
    state = held.connect().until(bool)
    assert state.releasing is None and state.server_pid == held.report()["pid"] and len(state.pids) == 2
    assert held.released().gone_s


def test_a_manager_that_is_killed_takes_neither_holder_nor_server_along(hold, tmp_path):
    held = hold()  # gives the spec; a second one is launched by a process that dies
    spec = tmp_path / "spec"
    fields = msgspec.structs.replace(held.spec, socket=str(tmp_path / "s2"), env=held.spec.env | {"FAKE_REPORT": str(tmp_path / "r2")})
    spec.write_bytes(msgspec.json.encode(fields))
    program = (
        "import msgspec, os, sys; from llmwd.adapters import holding; from llmwd.messages import HolderSpec;"
        "holding.launch(msgspec.json.decode(open(sys.argv[1], 'rb').read(), type=HolderSpec), None);"
        "link = holding.connect(sys.argv[2], 30); os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(spec), fields.socket], timeout=60)
    assert ended.returncode == -9
    wait_until((tmp_path / "r2").exists)
    link = holding.connect(fields.socket, 5)
    state = wait_until(link.receive)[-1]
    assert running([state.pid, state.server_pid]) == [state.pid, state.server_pid]
    link.send(Release(grace_s=1, reason="test"))
    wait_until(lambda: any(state.gone_s for state in link.receive() or []))
    link.close()
    wait_until(lambda: not running([state.pid]))


def test_what_a_killed_holder_leaves_is_killed_by_its_guard(hold):
    held = hold("--engine", "--fork-grandchild", "--ignore-term")
    got = held.report()
    mine = {got["pid"], *got["pids"]["engine"], *got["pids"]["grandchild"]}
    assert {pid for pid, _ in procs.find_marked(held.spec.marker)} == mine
    os.kill(held.process.pid, signal.SIGKILL)
    wait_until(lambda: not running(mine), what="the end of what the dead holder left")
    assert holding.connect(held.spec.socket, 0) is None, "the guard must not keep its socket"


def freed(pids) -> None:
    """Long before the lease's end."""
    wait_until(lambda: not running(pids), what="the end of the tree")


@pytest.mark.parametrize("when", ["waits", "releases"])
def test_a_holder_that_is_stopped_and_has_nobody_is_ended_by_its_guard(hold, when):
    held = hold("--engine", "--fork-grandchild", "--ignore-term", grace_s=0.3)
    got = held.report()
    mine = [got["pid"], *got["pids"]["engine"], *got["pids"]["grandchild"]]
    if when == "releases":
        held.link.send(Release(grace_s=0.3, reason="test"))
        held.until(lambda state: state.releasing)
    else:
        held.spec = msgspec.structs.replace(held.spec, expires_s=time.monotonic() + 1)
        held.link.send(Renew(expires_s=held.spec.expires_s))
        held.until(lambda state: state.expires_s == held.spec.expires_s)
        held.renew()  # once more: the guard is told after the answer, and before the next one
    os.kill(held.process.pid, signal.SIGSTOP)
    freed(mine)  # without the guard's doing: after 300 s
    assert held.ended() == -9


def test_what_put_away_the_marker_does_not_outlive_a_holder(hold):
    held = hold("/bin/sh", "-c", "env -i setsid sleep 1000 & exec sleep 1000")
    both = [b"sleep\0001000\0"] * 2  # what ran before had the marker
    state = wait_until(lambda: (now := held.renew()) and list(map(procs.cmdline, now.pids)) == both and now)
    os.kill(held.process.pid, signal.SIGKILL)
    freed(state.pids)


def guards(held) -> list[int]:
    """By the title, which names this test's service."""
    pids = map(int, filter(str.isdigit, os.listdir("/proc")))
    return [pid for pid in pids if procs.cmdline(pid).startswith(f"guard of {held.spec.service}\0".encode()) and running([pid])]


def test_a_holder_whose_guard_is_killed_has_another(hold):
    held = hold("--engine", "--ignore-term", service=f"test{os.getpid()}", site=holding.site_folder())
    got = held.report()
    first = wait_until(lambda: guards(held), what="a guard with its title, which it gives itself after the fork")
    assert len(first) == 1
    for pid in first:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: "the guard was killed: there is another" in held.output())
    second = wait_until(lambda: guards(held), what="the title of the other")
    assert len(second) == 1 and second != first
    assert held.renew().pids and not set(second) & set(held.heard[-1].pids), "it is nobody's child whom the holder waits for"
    os.kill(held.process.pid, signal.SIGKILL)
    freed([got["pid"], *got["pids"]["engine"]])


@pytest.mark.parametrize("limit", [resource.RLIMIT_NOFILE, resource.RLIMIT_AS], ids=["files", "memory"])
@pytest.mark.parametrize("children", [3, 150])
def test_a_holder_without_files_or_memory_ends_its_tree_all_the_same(hold, limit, children):
    held = hold("--engine", "--fork-grandchild", "--ignore-term", "--children", str(children))
    got = held.report()
    held.renew()
    used = sorted(int(name) for name in os.listdir(f"/proc/{held.process.pid}/fd"))
    most = next(number for number in range(1000) if number not in used)
    if limit == resource.RLIMIT_AS:
        most = int(Path(f"/proc/{held.process.pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(held.process.pid, limit, (most, resource.prlimit(held.process.pid, limit)[1]))
    held.link.send(Release(grace_s=0.3, reason="test"))
    freed([got["pid"], *sum(got["pids"].values(), [])])
    held.link.close()
    held.link = None
    held.ended()


def test_strangers_neither_renew_nor_push_the_managers_connection_out(hold):
    held = hold("/bin/sleep", "1000", kin=os.getppid(), ttl_s=60.0)
    liar = f"""
import socket, sys, time
links = []
for number in range(40):
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link.connect({held.spec.socket!r})
    link.send(b'{{"type":"renew","expires_s":%f}}' % (time.monotonic() + 250))
    links.append(link)
print(flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", liar], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as strangers:
        assert strangers.stdout.readline()
        before_s = time.monotonic()
        held.spec = msgspec.structs.replace(held.spec, expires_s=before_s + 250)
        assert before_s + 59 < held.renew().expires_s < time.monotonic() + 60.1, "a renewal reaches as far as the lease's time"
        strangers.stdin.close()
    assert held.released().gone_s


def test_what_carries_the_marker_is_found_and_killed(tmp_path):
    marker = uuid.uuid4().hex
    env = {"PATH": os.environ["PATH"], procs.MARKER: marker, "FAKE_REPORT": str(tmp_path / "report")}
    server = subprocess.Popen(
        [SERVER, "serve", "m", "--port", "0", "--engine", "--fork-grandchild", "--ignore-term"], env=env, stdout=subprocess.DEVNULL
    )
    wait_until((tmp_path / "report").exists)
    said: list[str] = []
    sweep = Sweep(marker, None)
    wait_until(lambda: sweep.step(said.append))
    assert len(said) == 3 and server.wait(10) == -signal.SIGKILL and not list(procs.find_marked(marker))


def test_a_dead_holders_socket_is_in_nobodys_way(hold, tmp_path):
    path = tmp_path / "stale"
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stale.bind(str(path))
    stale.close()
    assert holding.connect(str(path), 0) is None
    assert hold(socket=str(path)).until(bool).server_pid
    assert oct(path.stat().st_mode)[-3:] == "600"


def test_a_living_holders_socket_is_not_taken_away(hold, capfd):
    held = hold()
    second = holding.launch(held.spec, None)
    wait_until(lambda: second.reap() is not None)
    assert second.reap() == 1
    second.close()
    assert "another holder answers" in capfd.readouterr().err
    assert held.released().gone_s


@pytest.mark.parametrize(
    "packet",
    [b"x", b"[" * 60_000, b"{}", b"[]", b"null", b'{"type":"renew"}', b'{"type":"renew","expires_s":NaN}', b"\xff\0",
     b'{"type":"renew","expires_s":true}', b'{"type":"note","note":1}', b'{"type":"release","grace_s":"now","reason":""}',
     b'{"type":"unheard-of"}', b"a" * 100_000, b'{"type":"renew","expires_s":1e999}'],
    ids=range(14),
)  # fmt: skip
def test_garbage_is_ignored_and_written_down(hold, packet):
    held = hold("/bin/sleep", "1000")
    held.until(bool)
    held.link.sock.setblocking(True)
    held.link.sock.send(packet)
    held.link.sock.setblocking(False)
    wait_until(lambda: "a packet was ignored" in held.output())
    state = held.released()
    assert state.releasing == "test" and state.expires_s == held.spec.expires_s


def test_many_links_are_served(hold):
    held = hold("/bin/sleep", "1000")
    links = [holding.connect(held.spec.socket, 5) for _ in range(12)]
    assert wait_until(links[-1].receive)[0].server_pid
    links[-1].send(Release(grace_s=1, reason="last"))
    wait_until(lambda: any(state.gone_s for state in links[-1].receive() or []))
    for link in links:
        link.close()


def test_a_reader_that_reads_nothing_harms_nobody(hold):
    held = hold("/bin/sleep", "1000")
    deaf = held.link
    held.link = holding.connect(held.spec.socket, 5)
    for number in range(2000):
        wait_until(lambda: held.link.send(Note(note={"number": number})))
        held.listen()
    held.until(lambda state: state.note == {"number": 1999})
    newest: list[HolderState] = []
    wait_until(lambda: newest.extend(deaf.receive() or []) or (newest and newest[-1].note == {"number": 1999}))
    deaf.close()


@pytest.mark.parametrize(
    "argv, why",
    [
        (("/nowhere/vllm", "serve"), "cannot start /nowhere/vllm: No such file or directory"),
        (("/proc/version",), "cannot start /proc/version: Permission denied"),
        (("/bin/echo", "a\0b"), "cannot start /bin/echo: embedded null byte"),
    ],
)
def test_what_cannot_be_started_is_told_in_a_sentence(hold, argv, why):
    held = hold(*argv)
    state = held.until(lambda state: state.gone_s)
    assert (state.error, state.server_pid, state.status) == (why, None, None)


def test_a_missing_interpreter_and_a_missing_folder_are_told_too(hold, tmp_path):
    script = tmp_path / "vllm"
    script.write_text("#!/nowhere/python\n")
    script.chmod(0o755)
    told = hold(str(script)).until(lambda state: state.gone_s).error
    assert told == f"cannot start {script}: the interpreter named in its first line does not exist"
    told = hold("/bin/echo", cwd="/nowhere").until(lambda state: state.gone_s).error
    assert told == "cannot run in the folder /nowhere: No such file or directory"


def test_why_nothing_could_be_started_is_kept_if_nobody_asks(hold):
    held = hold("/nowhere/vllm", connected=False)
    assert held.ended() == 0
    assert "cannot start" in holding.last_words(held.spec.socket).error


def test_a_full_disk_stops_neither_the_service_nor_its_end(hold):
    held = hold("--chatter", "200000", log="/dev/full")
    held.report()
    assert held.released().gone_s
    held.link.close()
    assert held.ended() == 0 and Path("/dev/full").is_char_device()


def test_lost_output_is_counted_once_the_disk_has_room_again(hold, tmp_path):
    log = tmp_path / "not-yet" / "log"
    lost = tmp_path / "lost"
    program = f"""
import pathlib, time
for _ in range(32):
    print('lost' * 16384, flush=True)  # twice what the pipe holds: some of it was taken out, and has been lost
pathlib.Path({str(lost)!r}).touch()
for number in range(10_000):
    print(number, flush=True)
    time.sleep(0.01)
"""
    hold(sys.executable, "-c", program, log=str(log))
    wait_until(lost.exists)
    log.parent.mkdir()
    wait_until(lambda: log.exists() and "could not be written here" in log.read_text())


def test_a_log_that_hangs_does_not_hold_up_the_end(hold, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)  # opening it for writing waits for a reader for ever, as a dead file server does
    held = hold("/bin/sh", "-c", "yes & exec sleep 1000", log=str(fifo))

    def blocked() -> bool:
        return any(procs.cmdline(pid) == b"yes\0" and procs.stat(pid).state == "S" for pid in procs.children(held.until(bool).server_pid))

    wait_until(blocked, what="a full pipe")
    assert held.released().gone_s
    held.link.close()
    assert held.ended() == 0


def test_what_is_no_plain_file_is_never_renamed(hold, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    held = hold("--chatter", "20000", log=str(fifo), log_max_bytes=4096)
    text = b""

    def read_on() -> bool:
        nonlocal text
        try:
            text += os.read(reader, 65536)
        except BlockingIOError:
            pass
        return b"startup complete" in text

    wait_until(read_on, every_s=0.001)
    os.close(reader)
    assert fifo.is_fifo() and [path.name for path in tmp_path.glob("fifo*")] == ["fifo"]
    assert held.released().gone_s


def test_a_fault_of_the_holder_itself_leaves_nothing_behind(hold, monkeypatch):
    fault = "; holder.Holder._obey = lambda *_: 1 / 0; holder.main"
    monkeypatch.setattr(holding, "_PROGRAM", holding._PROGRAM.replace("; holder.main", fault))
    held = hold("--engine", "--fork-grandchild", "--ignore-term")
    got = held.report()
    held.link.send(Note(note={}))
    assert held.ended() == 1
    wait_until(lambda: not running([got["pid"], *sum(got["pids"].values(), [])]))
    assert "ZeroDivisionError" in held.output()


def test_last_words_of_others_and_nonsense_are_not_believed(tmp_path):
    path = tmp_path / "s"
    assert holding.last_words(str(path)) is None
    Path(f"{path}.last").write_text("{nonsense")
    assert holding.last_words(str(path)) is None


def test_a_link_to_a_holder_that_is_not_understood_counts_as_closed(tmp_path):
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    here.setblocking(False)
    link = holding.HolderLink(here)
    assert link.receive() == []
    there.send(b'{"type":"state","from":"the future"}')
    assert link.receive() is None and link.receive() is None
    there.close()
    link.close()
