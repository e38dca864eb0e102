"""What vLLM is started with, and what becomes of one that dies, lies or cannot start."""

import http.client
import json
import os
import signal
import socket
from pathlib import Path

from llmwd.adapters.rundir import write_atomic
from tests.tree.conftest import Start
from tests.tree.supervised import Supervised
from tests.waiting import wait_until


def report(path: Path) -> dict:
    """What the server says it was started with."""
    wait_until(path.exists, 20)
    return json.loads(path.read_text())


def test_it_gets_the_leases_gpus_its_arguments_as_they_were_written_and_the_loopback(supervised: Start, tmp_path: Path) -> None:
    told = tmp_path / "report"
    compilation = '{"cudagraph_mode":"PIECEWISE","level":3}'
    tree = supervised(
        {"FAKE_REPORT": told, "NUM_GPUS": 3, "VLLM_ARGS": f"--served-model-name fake -tp 8 --compilation-config {compilation}"}
    )
    status = tree.serving()
    got = report(told)
    args = got["argv"][1:]
    assert args[:2] == ["serve", "fake"]
    assert args[args.index("--compilation-config") + 1] == compilation
    assert args[args.index("--host") + 1] == "127.0.0.1" and args[args.index("--port") + 1] == str(tree.port)
    assert args[args.index("--tensor-parallel-size") + 1] == "3" and "-tp" not in args
    assert status["lease"]["gpus"] == [5, 6, 7] and got["cuda_visible_devices"] == "SIM-5,SIM-6,SIM-7"
    assert got["pid"] == status["server"]["pid"]
    listening = [line.split()[1:4:2] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    hosts = {address[:8] for address, state in listening if state == "0A" and int(address[9:], 16) == tree.port}
    assert hosts == {"0100007F"}  # 127.0.0.1, and no other address


def test_an_array_of_arguments_reaches_it_word_by_word(supervised: Start, tmp_path: Path) -> None:
    told = tmp_path / "report"
    tree = supervised(start=False)
    (tree.home / "models" / "fake.env").write_text(
        f"MODEL_NAME=fake\nNUM_GPUS=1\nexport FAKE_REPORT='{told}' GREETING='two words'\n"
        "VLLM_ARGS=(--served-model-name fake --chat-template \"{{ 'a b' }}\" '')\n"
    )
    tree.start()
    tree.serving()
    got = report(told)
    assert got["argv"][3:8] == ["--served-model-name", "fake", "--chat-template", "{{ 'a b' }}", ""]
    assert got["env"]["GREETING"] == "two words"
    assert not [name for name in got["env"] if name.startswith(("SLURM_", "NTFY_", "TUNNEL_"))]


def test_one_that_dies_by_itself_is_started_again_after_a_backoff_without_losing_the_lease(supervised: Start) -> None:
    tree = supervised({"FAKE_ENGINE": 1, "FAKE_FORK_GRANDCHILD": 1}, BACKOFF_MIN=2)
    before = tree.serving()
    left = {pid for pid, cmd in tree.left() if b"server.py" in cmd}
    tree.signal("server", 9)
    tree.until(lambda status: status["reason"] == "server_backoff")
    assert not left & {pid for pid, _ in tree.left()}  # its engine would hold the GPUs for ever
    after = tree.serving()
    assert after["server"]["deaths"] == 1 and after["lease"]["gpus"] == before["lease"]["gpus"]
    assert "signal 9" in tree.journal("server_died")[0]["how"]


def healthy(tree: Supervised) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", tree.port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def test_one_that_says_healthy_and_answers_nothing_is_never_called_serving(supervised: Start) -> None:
    tree = supervised({"FAKE_LIE_ABOUT_HEALTH": 1}, START_TIMEOUT=6, BACKOFF_MIN=60, BACKOFF_MAX=60)
    tree.phase("loading")
    wait_until(lambda: healthy(tree), 20)
    status = tree.phase("waiting")
    assert status["reason"] == "server_backoff" and "START_TIMEOUT" in status["detail"]
    assert tree.journal("server_ready") == []
    assert "serving" not in {entry["phase"] for entry in tree.journal("phase")}


def test_a_manager_that_was_killed_while_one_loads_gives_it_no_more_time(supervised: Start) -> None:
    tree = supervised({"FAKE_LIE_ABOUT_HEALTH": 1}, START_TIMEOUT=8, BACKOFF_MIN=60, BACKOFF_MAX=60)
    wait_until(lambda: healthy(tree), 20)
    tree.signal("vllm", signal.SIGKILL)
    status = tree.phase("waiting")
    assert len(tree.journal("server_started")) == 1, "it was not taken over"
    assert status["reason"] == "server_backoff" and "START_TIMEOUT" in status["detail"]


def test_a_profile_that_has_become_invalid_takes_nothing_down_though_the_manager_is_killed(supervised: Start) -> None:
    tree = supervised({}, LEASE_TTL=60, PROBE_INTERVAL=0.2)
    pid, profile = tree.all_ready()["server"]["pid"], tree.home / "models/fake.env"
    text, killed = profile.read_bytes(), tree.worker("vllm")["pid"]
    write_atomic(profile, b"NUM_GPUS=many\n")
    tree.signal("vllm", signal.SIGKILL)
    tree.until(lambda status: "NUM_GPUS" in status["detail"], what="a manager that knows of it")
    status = tree.all_ready()
    assert tree.worker("vllm")["pid"] != killed
    assert (status["server"]["pid"], status["model"]["profile"], status["model"]["served_as"]) == (pid, "fake", "fake")

    write_atomic(profile, text)
    tree.signal("root", signal.SIGHUP)
    assert tree.until(lambda status: not status["detail"])["server"]["pid"] == pid
    tree.signal("server", signal.SIGSTOP)  # it is asked again whether it answers
    wait_until(lambda: tree.journal("server_died"), what="the end of a server that does not answer")


def test_a_port_in_use_is_told_in_a_sentence_and_waited_for(supervised: Start) -> None:
    tree = supervised(start=False)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", tree.port))
        other.listen()
        tree.start()
        status = tree.until(lambda status: status["reason"] in ("server_backoff", "server_failed"))
        assert f"port {tree.port} is in use" in status["detail"] and "SERVER_PORT" in status["detail"]
    if status["phase"] == "failed":
        tree.ctl("reset")
    tree.serving()


def test_a_program_that_is_not_there_is_told_in_a_sentence(supervised: Start) -> None:
    tree = supervised(LLM_BIN="/nonexistent/vllm")
    status = tree.phase("failed")
    assert status["reason"] == "server_failed" and "/nonexistent/vllm" in status["detail"]
    assert status["server"]["pid"] is None


def test_its_output_is_kept_beside_the_logs(supervised: Start) -> None:
    tree = supervised({"FAKE_CHATTER": 20000})
    tree.serving()
    wait_until(lambda: "Application startup complete" in tree.log("server"), 10)
    logs = tree.ctl("logs", "server")
    assert logs.returncode == 0 and "Application startup complete" in logs.stdout
    assert os.stat(tree.state / "logs" / "server.log").st_mode & 0o077 == 0
