"""What the front door goes through: full disks, lost files, taken ports, dead and restarted programs."""

import json
import resource
import signal
import socket
import threading
from concurrent import futures

from llmwd.adapters import caddy
from llmwd.core import doorwanted
from llmwd.workers.doorsaid import FILES
from tests.tree.outside import Outside, hashes, outside, token  # noqa: F401
from tests.waiting import wait_until


def restarted(out: Outside) -> None:
    """The door's worker, killed and there again."""
    worker = out.tree.worker("door")["pid"]
    out.tree.signal("door", 9)
    out.tree.until(lambda status: next(w for w in status["workers"] if w["name"] == "door")["pid"] not in (worker, None))


def test_the_door_outlives_its_worker_and_shows_itself_and_no_error_is_a_502(outside):
    out = outside().served()
    pid, stream = out.caddy_pid, out.streaming(50)
    with futures.ThreadPoolExecutor(1) as pool:
        over = threading.Event()
        seen = pool.submit(lambda: {out.status("GET", "/health") for _ in iter(over.is_set, True)})
        restarted(out)
        assert sum(1 for _ in stream) == 49
        shown = out.tree.until(lambda status: status["door"]["reachable"])["door"]
        over.set()
        assert seen.result() == {200}  # what Caddy was told is true all the while
    assert out.caddy_pid == pid
    assert shown["keys"] == 1 and shown["port"] == out.port and "door" in out.tree.ctl("status").stdout
    statuses: set[int] = set()
    out.tree.signal("server", 9)
    wait_until(
        lambda: statuses.add(out.status("GET", "/health")) or (statuses >= {200, 503} and out.status("GET", "/health") == 200)
    )
    assert statuses == {200, 503}


def test_a_profile_that_is_not_valid_any_more_keeps_nobody_from_the_model_that_runs(outside):
    out = outside().served()
    profile = out.tree.home / "models/fake.env"
    good = profile.read_text()
    profile.write_text(good + "NUM_GPUS='zwei'\n")
    restarted(out)
    out.tree.until(lambda status: status["door"]["reachable"])
    assert out.status("GET", "/v1/models") == 200 and b"loading" not in out.ask("GET", "/v1/models")[2]

    (out.tree.runtime / "door" / doorwanted.UPSTREAM).write_text("another")  # the key is not of the vLLM that runs
    restarted(out)
    shown = out.tree.until(lambda status: "key of the running model" in status["door"]["detail"])["door"]
    assert shown["code"] == "failed" and "profile fake" in shown["detail"]
    wait_until(lambda: out.says("failed"))
    assert b"has no key to ask it with" in out.ask("GET", "/")[2]

    profile.write_text(good)
    wait_until(lambda: out.status("GET", "/v1/models") == 200 and b"expected_at" not in out.ask("GET", "/v1/models")[2])


def asked_by_socket(out: Outside) -> bool:
    return caddy.answers(str(out.tree.runtime / "door.sock"))


def test_a_port_of_somebody_elses_costs_no_stream_and_is_taken_when_it_is_free(outside):
    out = outside().served()
    pid, stream = out.caddy_pid, out.streaming()
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        out.tree.write_settings(DOOR_PORT=taken)
        assert out.tree.ctl("reload").returncode == 0
        shown = out.tree.until(lambda status: f"port {taken}" in status["door"]["detail"] and status["door"]["port"] is None)["door"]
        next(stream)
        assert out.caddy_pid == pid and shown["phase"] == "ready" and asked_by_socket(out)
    out.port = taken
    wait_until(lambda: out.status("GET", "/health") == 200)
    shown = out.tree.until(lambda status: status["door"]["port"] == taken)["door"]
    next(stream)
    assert out.caddy_pid == pid and shown["detail"] == ""


def test_a_port_of_somebody_elses_at_the_start_leaves_the_socket(outside):
    with socket.create_server(("127.0.0.1", 0)) as other:
        out = outside(DOOR_PORT=other.getsockname()[1])
        out.tree.until(lambda status: status["door"]["reachable"] and "another program" in status["door"]["detail"])
        assert asked_by_socket(out) and not out.tree.journal("door_died")
    wait_until(lambda: out.status("GET", "/health") == 200)


def test_a_configuration_that_is_not_taken_ends_caddy_only_for_a_key_that_must_not_hold(outside):
    out = outside(LEASE_TTL=20)
    out.keys(alice=None, bob=None)
    out.served()
    pid, stream = out.caddy_pid, out.streaming()
    out.tree.write_settings(DOOR_MAX_REQUESTS=100)
    out.tree.signal_pid(pid, signal.SIGSTOP)  # it takes nothing
    assert out.tree.ctl("reload").returncode == 0
    out.tree.until(lambda status: "does not take" in status["door"]["detail"])
    out.tree.signal_pid(pid, signal.SIGCONT)
    out.tree.until(lambda status: status["door"]["detail"] == "")
    next(stream)
    assert out.caddy_pid == pid

    out.tree.signal_pid(pid, signal.SIGSTOP)
    out.keys(alice=None)
    wait_until(lambda: out.tree.journal("door_died"))
    wait_until(lambda: out.status("GET", "/health") == 200 and out.caddy_pid != pid)
    assert out.status("GET", "/health", {"Authorization": f"Bearer {token('bob')}"}) == 401


def test_files_of_the_door_that_are_deleted_come_back(outside):
    out = outside().served()
    for path in (out.tree.runtime / "door").iterdir():
        if path.is_file():
            path.unlink()
    status, headers, body = out.ask("POST", "/v1/completions", body=b"{}")
    assert status in (200, 400) or (status == 503 and headers["retry-after"] and json.loads(body)["error"]["code"] == "loading")
    wait_until(lambda: out.status("GET", "/v1/models") == 200 and all((out.tree.runtime / "door" / name).exists() for name in FILES))
    wait_until(lambda: out.status("GET", "/health") == 200)


def test_without_caddy_the_model_is_served_on_this_node_and_the_fault_is_said(outside):
    out = outside(CADDY_BIN="/nowhere/caddy")
    out.tree.serving()
    assert out.tree.answers()
    out.tree.until(lambda status: status["door"]["phase"] == "failed" and "CADDY_BIN" in status["door"]["detail"])
    assert len(out.tree.journal("door_failed")) == 1
    assert "CADDY_BIN" in out.tree.ctl("check").stderr


def test_a_full_disk_closes_the_door_and_it_opens_when_there_is_room_again(outside):
    """The state's file names the model's port: were it left there, requests could meet another program on it."""
    out = outside(LEASE_TTL=4).served()
    worker = out.tree.worker("door")["pid"]
    before = resource.prlimit(worker, resource.RLIMIT_FSIZE)
    resource.prlimit(worker, resource.RLIMIT_FSIZE, (0, before[1]))
    out.tree.job(1, "0-7")
    wait_until(lambda: not (out.tree.runtime / "door" / doorwanted.STATE).exists())
    assert out.status("GET", "/health") == 503
    out.tree.job_over(1)
    out.tree.serving()
    assert out.status("GET", "/health") == 503
    resource.prlimit(worker, resource.RLIMIT_FSIZE, before)
    wait_until(lambda: out.status("GET", "/health") == 200)
    assert out.tree.worker("door")["pid"] == worker


def test_a_deleted_runtime_folder_costs_no_door(outside):
    out = outside().served()
    out.tree.forget()
    out.served()


def test_a_key_made_while_the_disk_is_full_cuts_no_stream(outside):
    out = outside().served()
    pid, stream, bob = out.caddy_pid, out.streaming(), {"Authorization": f"Bearer {token('bob')}"}
    worker = out.tree.worker("door")["pid"]
    before = resource.prlimit(worker, resource.RLIMIT_FSIZE)
    resource.prlimit(worker, resource.RLIMIT_FSIZE, (0, before[1]))
    out.keys(alice=None, bob=None)
    wait_until(lambda: out.status("GET", "/health", bob) == 200)
    out.keys(alice=None)
    restarted(out)  # it does not know what Caddy has
    wait_until(lambda: out.status("GET", "/health", bob) == 401)
    next(stream)
    assert out.caddy_pid == pid and out.status("GET", "/health") == 200
