"""The tunnel manager as a real process, with a stand-in for cloudflared; long because each of its behaviours is one test."""

import base64
import json
import os
import random
import signal
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from llmwd.adapters.logfile import LOOK_BYTES
from llmwd.adapters.rundir import write_atomic
from llmwd.core import tunnelfaults
from llmwd.core.tunnelconfig import GRACE_S
from llmwd.messages import Done, DoorFact, Fact, ResetOrder
from llmwd.vocab import NodePhase, Phase
from tests.adapters.held import running
from tests.fakes import cloudflared
from tests.waiting import wait_until
from tests.workers.harness import Stage, replaced, server_fact

T = TypeVar("T")
TUNNEL = "6f0b2f36-3f4c-4d40-9a2f-0f1d2c3b4a59"


def credentials(folder: Path, **changes: object) -> Path:
    path = folder / "credentials.json"
    found = {"AccountTag": "a" * 32, "TunnelSecret": base64.b64encode(b"s" * 32).decode(), "TunnelID": TUNNEL}
    write_atomic(path, json.dumps(found | changes).encode())  # a manager may read it at any moment
    return path


SAID_AGAIN_S = 1.0


class Tunnel(Stage):
    """The settings of a tunnel that works, with the stand-in's flags. The other workers repeat their facts, as they do:
    else, on a busy machine, a server would count as gone before the tunnel to it is up. silent: until they say this no more."""

    def __init__(self, folder: Path, *flags: str, **settings: object):
        self.report_path = folder / "report"
        self.folder = folder
        self.base = {
            "TUNNEL_HOSTNAME": "llm.example.org", "TUNNEL_ID": TUNNEL, "CLOUDFLARED_CREDS": credentials(folder),
            "CLOUDFLARED_BIN": cloudflared.wrapper(folder, "--report", str(self.report_path), *flags),
            "LEASE_TTL": 4, "BACKOFF_MIN": 0.05, "DOOR": "false",
        } | settings  # fmt: skip
        super().__init__(folder, "tunnel", **self.base)
        self.silent = False
        self._said: dict[str, tuple[float, Fact]] = {}

    def publish(self, sender: str, fact: Fact) -> None:
        super().publish(sender, fact)
        self._said[sender] = time.monotonic(), fact

    def until(self, condition: Callable[[], T], within_s: float = 30.0, what: str = "") -> T:
        def turn() -> T:
            for sender, (said_s, fact) in list(self._said.items()):
                if not self.silent and time.monotonic() > said_s + SAID_AGAIN_S:
                    self.publish(sender, replaced(fact))
            return condition()

        return super().until(turn, within_s, what or f"what was awaited (last fact: {self.fact})")

    def serve(self, **fields: object) -> None:
        self.publish("vllm", server_fact(NodePhase.serving, **fields))

    def door(self, phase: Phase) -> None:
        self.publish("door", DoorFact(phase=phase, detail="", since_at=0.0, at_s=time.monotonic()))

    def report(self) -> dict:
        self.until(self.report_path.exists, what="a started cloudflared")
        return json.loads(self.report_path.read_text())

    def cloudflared_log(self) -> str:
        path = self.dirs.logs / "cloudflared.log"
        return path.read_text() if path.exists() else ""

    def journaled(self, event: str) -> int:
        path = self.dirs.state / "journal.jsonl"
        return path.read_text().count(f'"event":"{event}"') if path.exists() else 0


@pytest.fixture
def tunnel(tmp_path):
    """tunnel(*flags of the stand-in, **settings): a Tunnel whose cloudflared is gone after the test."""
    made: list[Tunnel] = []

    def make(*flags: str, **settings: object) -> Tunnel:
        made.append(Tunnel(tmp_path, *flags, **settings))
        return made[-1]

    yield make
    for one in made:
        pid = json.loads(one.report_path.read_text())["pid"] if one.report_path.exists() else 0
        with one:
            pass
        one_gone(pid)


def one_gone(pid: int, within_s: float = 20.0) -> None:
    wait_until(lambda: pid == 0 or not running([pid]), within_s, what=f"the end of {pid}")


def test_a_tunnel_that_is_not_configured_is_off_and_answers_the_line(tunnel):
    stage = tunnel(TUNNEL_HOSTNAME="", TUNNEL_NAME="lab")
    stage.start()
    stage.serve()
    fact = stage.until_fact(phase=Phase.stopped, detail="off: TUNNEL_HOSTNAME is not set")
    assert fact.hostname is None and fact.pid is None and fact.name == "lab"
    stage.until(lambda: stage.worker.beats >= 3)
    assert stage.stop() == 0
    assert not stage.report_path.exists()


def test_it_waits_for_the_model_and_is_ready_only_once_cloudflared_is_connected(tunnel, tmp_path):
    edge, asked = tmp_path / "edge", tmp_path / "asked"
    stage = tunnel("--ready-file", str(edge), "--asked", str(asked))
    stage.start()
    stage.until_fact(phase=Phase.stopped, detail="waiting for the model", hostname="llm.example.org")
    stage.publish("vllm", server_fact(NodePhase.loading, url="http://127.0.0.1:8123"))
    stage.serve()
    stage.until_fact(phase=Phase.starting, detail="connecting to Cloudflare")
    stage.until(lambda: asked.exists() and asked.stat().st_size >= 3, what="its third look at cloudflared")
    assert stage.fact.phase is Phase.starting and stage.fact.connections == 0
    edge.touch()
    fact = stage.until_fact(phase=Phase.ready)
    assert fact.pid == stage.report()["pid"]


def test_with_a_front_door_the_tunnel_leads_to_it_and_stays_while_the_model_goes(tunnel):
    stage = tunnel(DOOR="true")
    stage.start()
    stage.serve()
    stage.until_fact(phase=Phase.stopped, detail="waiting for the front door")
    stage.door(Phase.ready)
    pid = stage.until_fact(phase=Phase.ready).pid
    config = (stage.dirs.runtime / "config-cloudflared.yml").read_text()
    assert f'"unix:{stage.dirs.runtime}/door.sock"' in config
    stage.publish("vllm", server_fact(NodePhase.yielding))
    stage.publish("vllm", server_fact(NodePhase.waiting))
    for phase in (Phase.backoff, Phase.stopped, Phase.starting, Phase.ready):  # as the door tells a restart of Caddy
        stage.door(phase)
        published_s = time.monotonic()
        stage.until_fact(phase=Phase.ready, pid=pid, at_s=lambda at_s, told_s=published_s: at_s > told_s)
    stage.door(Phase.stopped)
    stage.until_fact(phase=Phase.stopped, detail="waiting for the front door")


def test_cloudflared_gets_a_private_configuration_and_a_clean_environment(tunnel, monkeypatch):
    monkeypatch.setenv("TUNNEL_TOKEN", "stray")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("SSL_CERT_FILE", "/site.pem")
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    stage = tunnel()
    stage.start()
    stage.serve()
    stage.until_fact(phase=Phase.ready)
    report = stage.report()
    config = stage.dirs.runtime / "config-cloudflared.yml"
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert report["argv"] == [
        "tunnel", "--config", str(config), "--no-autoupdate", "--metrics", "127.0.0.1:0", "--loglevel", "info",
        "--grace-period", "5s", "--protocol", "http2", "run",
    ]  # fmt: skip
    assert {name for name in report["env"] if "TUNNEL" in name or "PROXY" in name} == set()
    assert report["env"]["SSL_CERT_FILE"] == "/site.pem"
    assert set(report["env"]) <= {"PATH", "HOME", "SSL_CERT_FILE", "LLMWD_TREE", "SPT_NOENV", "PWD", "SHLVL", "_", "OLDPWD", "LC_CTYPE"}
    assert f'tunnel: "{TUNNEL}"' in report["config"] and 'service: "http://127.0.0.1:8123"' in report["config"]


def test_it_stays_while_the_gpus_are_given_back_and_goes_when_the_server_is_gone(tunnel):
    stage = tunnel()
    stage.start()
    stage.serve()
    pid = stage.until_fact(phase=Phase.ready).pid
    stage.publish("vllm", server_fact(NodePhase.yielding))
    published_s = time.monotonic()
    stage.until_fact(phase=Phase.ready, at_s=lambda at_s: at_s > published_s)
    assert running([pid])
    stage.publish("vllm", server_fact(NodePhase.waiting))
    stage.until_fact(phase=Phase.stopped, detail="waiting for the model", pid=None)
    one_gone(pid)
    stage.serve()
    assert stage.until_fact(phase=Phase.ready).pid != pid
    assert stage.journaled("tunnel_died") == 0


def test_a_server_whose_manager_is_silent_for_long_counts_as_gone(tunnel):
    stage = tunnel(LEASE_TTL=2)
    stage.start()
    stage.serve()
    stage.until_fact(phase=Phase.ready)
    stage.silent = True
    stage.until_fact(phase=Phase.stopped, detail="waiting for the model")


def test_another_address_of_the_server_means_another_cloudflared(tunnel):
    stage = tunnel()
    stage.start()
    stage.serve()
    pid = stage.until_fact(phase=Phase.ready).pid
    stage.serve(url="http://127.0.0.1:8999")
    stage.until_fact(phase=Phase.ready, pid=lambda now: now not in (None, pid))
    assert "127.0.0.1:8999" in stage.report()["config"]


def test_cloudflared_that_dies_is_started_again_after_a_backoff(tunnel):
    stage = tunnel(BACKOFF_MIN=2)
    stage.start()
    stage.serve()
    pid = stage.until_fact(phase=Phase.ready).pid
    os.kill(pid, signal.SIGKILL)
    fact = stage.until_fact(phase=Phase.backoff)
    assert "killed by signal 9" in fact.detail
    stage.until_fact(phase=Phase.ready, pid=lambda now: now not in (None, pid))


def test_cloudflared_that_somebody_else_ends_in_order_is_started_again(tunnel):
    stage = tunnel(BACKOFF_MIN=2)
    stage.start()
    stage.serve()
    pid = stage.until_fact(phase=Phase.ready).pid
    os.kill(pid, signal.SIGTERM)
    assert "as if somebody had asked it to" in stage.until_fact(phase=Phase.backoff).detail
    stage.serve()
    stage.until_fact(phase=Phase.ready, pid=lambda now: now not in (None, pid))


def test_cloudflared_that_dies_too_often_is_left_alone_until_the_operator_resets_it(tunnel):
    stage = tunnel("--exit-after", "0.1", "--exit-code=-15", RESTART_INTENSITY=1)
    stage.start()
    stage.serve()
    fact = stage.until_fact(phase=Phase.failed)
    assert "killed by signal 15" in fact.detail and "Could not lookup srv records" in fact.detail
    assert stage.journaled("tunnel_started") == 2
    cloudflared.wrapper(stage.folder, "--report", str(stage.report_path))
    assert isinstance(stage.order(ResetOrder(by="test")), Done)
    stage.serve()
    stage.until_fact(phase=Phase.ready)


def test_a_network_that_is_away_is_tried_for_ever_and_comes_back_by_itself(tunnel):
    stage = tunnel("--exit-after", "0.1", RESTART_INTENSITY=1, BACKOFF_MAX=1)
    stage.start()
    stage.serve()
    stage.until(lambda: stage.journaled("tunnel_started") > 4, within_s=60)
    fact = stage.until_fact(phase=Phase.backoff)
    assert "exit code 1" in fact.detail and "Could not lookup srv records" in fact.detail
    cloudflared.wrapper(stage.folder, "--report", str(stage.report_path))
    stage.until_fact(phase=Phase.ready)


@pytest.fixture
def edge():
    """An address on the loopback whose port of the edge's answers."""
    with socket.socket() as listener:
        found = f"127.{random.randint(1, 254)}.{random.randint(0, 255)}.{random.randint(1, 254)}"
        listener.bind((found, tunnelfaults.EDGE_PORT))
        listener.listen(1024)  # nobody takes them: one for each look
        yield found


def test_a_lost_connection_is_made_anew_by_a_restart_once_the_edge_answers_again(tunnel, edge, tmp_path):
    here = tmp_path / "edge"
    here.touch()
    stage = tunnel("--ready-file", str(here), "--stays-lost", "--edge-ip", edge, LEASE_TTL=60)
    stage.start()
    stage.serve()
    pid = stage.until_fact(phase=Phase.ready).pid
    here.unlink()
    stage.until(lambda: "is lost" in stage.log())
    here.touch()
    stage.until_fact(phase=Phase.ready, pid=lambda now: now not in (None, pid))
    assert "while Cloudflare answers" in stage.log()


def test_a_metrics_server_that_is_slow_to_answer_costs_no_tunnel(tunnel, edge, tmp_path):
    slow = tmp_path / "slow"
    stage = tunnel("--slow-file", str(slow), "--edge-ip", edge, LEASE_TTL=60)
    stage.start()
    stage.serve()
    pid = stage.until_fact(phase=Phase.ready, connections=4).pid
    slow.touch()
    stage.until_fact(phase=Phase.ready, pid=pid, connections=4, detail=lambda told: "slow to answer" in told)
    slow.unlink()
    stage.until_fact(phase=Phase.ready, pid=pid, connections=4, detail="")
    assert stage.journaled("tunnel_down") == 0


def test_a_protocol_that_falls_back_late_is_left_alone_although_the_edge_answers_by_tcp(tunnel, edge):
    late_s = tunnelfaults.STARTED_PATIENCE_S + 2.0
    stage = tunnel("--udp-blocked", str(late_s), "--edge-ip", edge, TUNNEL_PROTOCOL="auto", LEASE_TTL=60)
    stage.start()
    stage.serve()
    pid = stage.until_fact(phase=Phase.starting, pid=lambda pid: pid, detail=lambda told: "with quic" in told).pid
    stage.until_fact(phase=Phase.ready, pid=pid)
    assert stage.journaled("tunnel_started") == 1


def test_name_servers_that_do_not_answer_keep_it_starting_until_they_do(tunnel):
    stage = tunnel("--metrics-after", "2", "--exit-after", "6", "--ready-after", "60", BACKOFF_MIN=2)
    stage.start()
    stage.serve()
    stage.until_fact(phase=Phase.starting, pid=lambda pid: pid, detail="connecting to Cloudflare")
    stage.until(lambda: "Starting metrics server" in stage.cloudflared_log())
    assert stage.fact.phase is Phase.starting and stage.journaled("tunnel_died") == 0
    assert "Could not lookup srv records" in stage.until_fact(phase=Phase.backoff).detail


def test_status_is_told_the_connections_their_places_and_the_mode(tunnel):
    stage = tunnel()
    stage.start()
    stage.serve()
    fact = stage.until_fact(phase=Phase.ready, connections=4)
    assert (fact.mode, fact.locations) == ("named", ("ams01", "fra03"))


def test_a_token_reaches_cloudflared_by_its_file_and_never_on_its_command_line(tunnel, tmp_path):
    text = json.dumps({"a": "a" * 32, "s": base64.b64encode(b"s" * 32).decode(), "t": TUNNEL})
    path = tmp_path / "token"
    path.write_text(base64.b64encode(text.encode()).decode() + "\n")
    path.chmod(0o600)
    stage = tunnel(TUNNEL_MODE="token", TUNNEL_TOKEN_FILE=path, TUNNEL_ID="", CLOUDFLARED_CREDS="", TUNNEL_PROTOCOL="quic")
    stage.start()
    stage.serve()
    stage.until_fact(phase=Phase.ready, mode="token")
    argv = stage.report()["argv"]
    assert argv[-3:] == ["run", "--token-file", str(path)] and argv[argv.index("--protocol") + 1] == "quic"
    assert path.read_text().strip() not in " ".join(argv) + str(stage.report()["config"])


def test_a_token_without_a_hostname_is_connected_to_what_the_dashboard_says(tunnel, tmp_path):
    text = json.dumps({"a": "a" * 32, "s": base64.b64encode(b"s" * 32).decode(), "t": TUNNEL})
    path = tmp_path / "token"
    path.write_text(base64.b64encode(text.encode()).decode())
    path.chmod(0o600)
    stage = tunnel(TUNNEL_MODE="token", TUNNEL_TOKEN_FILE=path, TUNNEL_HOSTNAME="", TUNNEL_ID="", CLOUDFLARED_CREDS="")
    stage.start()
    stage.serve()
    stage.until_fact(phase=Phase.ready, hostname=None)
    assert "the tunnel is connected (ams01" in stage.log() and "None" not in stage.log()


def test_a_quick_tunnel_shows_the_name_that_it_was_given_and_says_what_it_cannot_do(tunnel):
    stage = tunnel(TUNNEL_MODE="quick", TUNNEL_HOSTNAME="", TUNNEL_ID="", CLOUDFLARED_CREDS="")
    stage.start()
    stage.serve()
    fact = stage.until_fact(phase=Phase.ready, hostname=cloudflared.QUICK_HOSTNAME)
    assert "not as a stream" in fact.detail and "run" not in stage.report()["argv"]


def test_what_was_wrong_is_tried_again_when_its_file_changes(tunnel):
    stage = tunnel(LEASE_TTL=3)
    (stage.folder / "credentials.json").write_text("{")
    stage.start()
    stage.serve()
    stage.until_fact(phase=Phase.failed, detail=lambda told: "is not JSON" in told)
    credentials(stage.folder)
    stage.until_fact(phase=Phase.ready)
    assert not stage.journaled("reset")


def test_a_reload_starts_it_anew_once_the_file_with_its_secret_is_another_one(tunnel):
    stage = tunnel()
    stage.start()
    stage.serve()
    pid = stage.until_fact(phase=Phase.ready).pid
    stage.reload(**stage.base | {"LOG_LEVEL": "debug"})
    credentials(stage.folder, TunnelSecret=base64.b64encode(b"t" * 32).decode())
    stage.reload(**stage.base)
    stage.until_fact(phase=Phase.ready, pid=lambda now: now not in (None, pid))
    assert stage.log().count("has changed") == 1 and stage.journaled("tunnel_started") == 2


def slow_to_tell_its_version(stage: Tunnel) -> None:
    """`asked` in the stage's folder: it has been asked for it; it answers once `answer` is there."""
    path = stage.folder / "cloudflared"
    waits = f'until [ -e "{stage.folder}/answer" ]; do sleep 0.1; done'
    slow = f'case "$*" in *version*) : >"{stage.folder}/asked"; {waits};; esac\nexec'
    path.write_text(path.read_text().replace("exec", slow, 1))


def test_settings_that_change_while_a_start_is_prepared_are_those_that_it_is_started_with(tunnel):
    stage = tunnel()
    slow_to_tell_its_version(stage)
    stage.start()
    stage.serve()
    stage.until((stage.folder / "asked").exists)
    stage.reload(**stage.base | {"TUNNEL_HOSTNAME": "new.example.org", "TUNNEL_PROTOCOL": "quic"})
    stage.until_fact(hostname="new.example.org", pid=None)
    (stage.folder / "answer").touch()
    stage.until_fact(phase=Phase.ready, hostname="new.example.org")
    report = stage.report()
    assert '"new.example.org"' in report["config"] and "quic" in report["argv"]
    assert stage.journaled("tunnel_started") == 1


def test_a_mistake_that_is_mended_while_a_start_is_prepared_is_no_fault(tunnel):
    stage = tunnel(CLOUDFLARED_CREDS="/nowhere")
    slow_to_tell_its_version(stage)
    stage.start()
    stage.serve()
    stage.until((stage.folder / "asked").exists)
    stage.reload(**stage.base | {"CLOUDFLARED_CREDS": credentials(stage.folder), "TUNNEL_NAME": "mended"})
    stage.until_fact(name="mended", pid=None)
    (stage.folder / "answer").touch()
    stage.until_fact(phase=Phase.ready)
    assert stage.journaled("tunnel_failed") == 0


def test_a_look_at_its_files_that_takes_long_is_told(tunnel):
    stage = tunnel(LEASE_TTL=60)
    slow_to_tell_its_version(stage)
    stage.start()
    stage.serve()
    told = stage.until_fact(phase=Phase.stopped, detail=lambda told: "takes long" in told).detail
    (stage.folder / "answer").touch()
    assert str(stage.folder / "cloudflared") in told and "credentials.json" in told
    stage.until_fact(phase=Phase.ready, detail="")


def test_a_configuration_that_cloudflared_refuses_is_told_before_a_start(tunnel):
    stage = tunnel("--refuses-config", "'port in hostname'")
    stage.start()
    stage.serve()
    assert "port in hostname" in stage.until_fact(phase=Phase.failed).detail
    assert stage.journaled("tunnel_started") == 0


def test_a_cloudflared_that_is_deaf_to_its_first_term_gets_a_second_one(tunnel):
    stage = tunnel("--term-hangs", LEASE_TTL=60)
    stage.start()
    stage.serve()
    stage.until_fact(phase=Phase.ready)
    before_s = time.monotonic()
    stage.publish("vllm", server_fact(NodePhase.waiting))
    stage.until(lambda: "taking the tunnel down" in stage.log())
    first_s = time.monotonic()
    stage.until(lambda: time.monotonic() > first_s + 4.0, what="a stop in the middle of the release")
    assert stage.stop(within_s=30.0) == 0
    assert time.monotonic() - before_s > GRACE_S + 2.5  # not before a request in flight may have ended
    # By the second SIGTERM; -9 would be the SIGKILL after it.
    stage.until(lambda: "nothing is left of cloudflared, exit status -15" in stage.cloudflared_log())
    assert "SIGKILL" not in stage.cloudflared_log()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--exit-after", "0.1", "--exit-plain", "--exit-code", "255"), "exit code 255): bad token"),
        (("--exit-after", "0.1", "--exit-plain", "--exit-code", "1"), "exit code 1): bad token: token is not valid"),
        (("--lacks=--protocol",), "does not know our arguments: Incorrect Usage"),
    ],
    ids=["255", "1 about its configuration", "0 at a flag that it does not know"],
)
def test_a_fault_that_no_restart_mends_is_told_once_and_not_tried_again(tunnel, flags, told):
    stage = tunnel(*flags, "--exit-text", "'bad token: token is not valid'")
    stage.start()
    stage.serve()
    assert told in stage.until_fact(phase=Phase.failed).detail
    stage.serve(at_s=time.monotonic())
    beats = stage.worker.beats
    stage.until(lambda: stage.worker.beats > beats + 2)
    assert stage.journaled("tunnel_started") == 1
    assert stage.log().count("the tunnel cannot work") == 1


def test_credentials_that_cloudflare_refuses_are_a_fault_that_no_restart_mends(tunnel):
    stage = tunnel("--unauthorized")
    stage.start()
    stage.serve()
    fact = stage.until_fact(phase=Phase.failed, pid=None)
    assert "Cloudflare refuses the credentials" in fact.detail and "Unauthorized" in fact.detail
    one_gone(stage.report()["pid"])
    assert stage.journaled("tunnel_started") == 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"CLOUDFLARED_BIN": "/nowhere/cloudflared"}, "/nowhere/cloudflared is not there or cannot be run"),
        ({"CLOUDFLARED_CREDS": "/nowhere/creds.json"}, "/nowhere/creds.json cannot be read (No such file or directory)"),
        ({"CLOUDFLARED_CREDS": "/dev/null"}, "/dev/null is not a regular file"),
        ({"TUNNEL_ID": TUNNEL.replace("6", "7")}, "correct one of them"),
    ],
    ids=["binary", "credentials", "no regular file", "another tunnel's credentials"],
)
def test_what_is_missing_is_told_in_one_sentence_and_can_be_mended_by_a_reload(tunnel, settings, told):
    stage = tunnel(**settings)
    stage.start()
    stage.serve()
    assert told in stage.until_fact(phase=Phase.failed).detail
    assert not stage.report_path.exists()
    good = credentials(stage.folder)
    stage.reload(**stage.base | {
        "TUNNEL_ID": TUNNEL, "CLOUDFLARED_CREDS": good, "CLOUDFLARED_BIN": stage.folder / "cloudflared"
    })  # fmt: skip
    stage.serve()
    stage.until_fact(phase=Phase.ready)


def test_credentials_that_others_can_read_are_refused(tunnel):
    stage = tunnel()
    (stage.folder / "credentials.json").chmod(0o644)
    stage.start()
    stage.serve()
    fact = stage.until_fact(phase=Phase.failed)
    assert "can be read or written by others" in fact.detail and "chmod 600" in fact.detail


def test_a_pipe_in_the_place_of_the_credentials_holds_nothing_up(tunnel):
    stage = tunnel()
    (stage.folder / "credentials.json").unlink()
    os.mkfifo(stage.folder / "credentials.json", 0o600)
    stage.start()
    stage.serve()
    assert "is not a regular file" in stage.until_fact(phase=Phase.failed).detail


def test_a_lost_connection_is_told_and_so_is_its_return(tunnel, tmp_path):
    edge = tmp_path / "edge"
    edge.touch()
    stage = tunnel("--ready-file", str(edge), LEASE_TTL=30)
    stage.start()
    stage.serve()
    pid = stage.until_fact(phase=Phase.ready).pid
    edge.unlink()
    fact = stage.until_fact(phase=Phase.starting, pid=pid)
    assert "the connection to Cloudflare is lost" in fact.detail
    edge.touch()
    stage.until_fact(phase=Phase.ready, pid=pid)


def test_a_restarted_manager_still_knows_which_edge_to_ask(tunnel, edge, tmp_path):
    here = tmp_path / "edge"
    here.touch()
    stage = tunnel("--ready-file", str(here), "--stays-lost", "--edge-ip", edge, LEASE_TTL=60)
    stage.start()
    stage.serve()
    pid = stage.until_fact(phase=Phase.ready, connections=4).pid
    stage.worker.kill()
    stage.start()
    stage.serve()
    stage.until_fact(phase=Phase.ready, pid=pid)
    here.unlink()
    stage.until(lambda: "is lost" in stage.log())
    here.touch()
    stage.until_fact(phase=Phase.ready, pid=lambda now: now not in (None, pid))


def test_a_restarted_manager_takes_the_running_cloudflared_over(tunnel):
    stage = tunnel(LEASE_TTL=10)
    stage.start()
    stage.serve()
    pid = stage.until_fact(phase=Phase.ready).pid
    stage.worker.kill()
    stage.start()
    stage.until_fact(phase=Phase.ready, pid=pid)
    stage.serve()
    heard_s = time.monotonic()
    stage.until_fact(phase=Phase.ready, pid=pid, at_s=lambda at_s: at_s > heard_s)
    assert stage.journaled("tunnel_started") == 1
    stage.publish("vllm", server_fact(NodePhase.waiting))
    stage.until_fact(phase=Phase.stopped)
    one_gone(pid)


def test_cloudflared_outlives_its_lease_while_the_manager_renews_it(tunnel):
    stage = tunnel(LEASE_TTL=3)
    stage.start()
    stage.serve()
    fact = stage.until_fact(phase=Phase.ready)
    for after_s in (1.5, 3.0, 4.5):
        stage.serve()
        stage.until_fact(phase=Phase.ready, pid=fact.pid, at_s=lambda at_s, end=fact.at_s + after_s: at_s > end)


def test_cloudflared_ends_when_nobody_renews_its_lease(tunnel):
    stage = tunnel(LEASE_TTL=2)
    stage.start()
    stage.serve()
    pid = stage.until_fact(phase=Phase.ready).pid
    stage.worker.kill()
    one_gone(pid)


def test_cloudflared_ends_with_the_root(tunnel):
    stage = tunnel("--ignore-term", LEASE_TTL=4)
    stage.start()
    stage.serve()
    pid = stage.until_fact(phase=Phase.ready).pid
    stage.worker.kill()
    stage.end_root()
    one_gone(pid, within_s=4 + 1.0)


@pytest.mark.parametrize("flags", [(), ("--ignore-term",), ("--drain", "60")], ids=["idle", "deaf", "request in flight"])
def test_an_ordered_stop_ends_cloudflared_within_its_time(tunnel, flags):
    stage = tunnel(*flags)
    stage.start()
    stage.serve()
    pid = stage.until_fact(phase=Phase.ready).pid
    assert stage.stop(within_s=4.0) == 0
    assert not running([pid])
    assert "the tunnel is down" in stage.log()


def test_a_flood_in_the_log_hides_nothing(tunnel):
    stage = tunnel("--flood", str(2 * LOOK_BYTES // 80), LEASE_TTL=60)
    stage.start()
    stage.serve()
    stage.until_fact(phase=Phase.ready)
    assert len(stage.cloudflared_log()) > 2 * LOOK_BYTES


def test_switching_the_tunnel_off_by_a_reload_takes_it_down(tunnel):
    stage = tunnel()
    stage.start()
    stage.serve()
    pid = stage.until_fact(phase=Phase.ready).pid
    stage.reload(**stage.base | {"TUNNEL_HOSTNAME": ""})
    stage.until_fact(phase=Phase.stopped, detail="off: TUNNEL_HOSTNAME is not set")
    one_gone(pid)
