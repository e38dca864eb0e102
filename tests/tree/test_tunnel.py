"""The tunnel in a whole llmwd, with the real front door and a stand-in for cloudflared that is connected."""

import base64
import json
import signal
import time
from pathlib import Path

import pytest

from llmwd.adapters import procs
from llmwd.messages import TunnelFact
from tests.fakes import cloudflared
from tests.tree.conftest import Start
from tests.tree.supervised import Supervised
from tests.waiting import wait_until

TUNNEL = "6ff42ae2-765d-4adf-8112-31c55c1551ef"


@pytest.fixture
def public(supervised: Start, tmp_path: Path):
    """public(*flags of the stand-in, **settings): serving, and connected to the outside."""

    def make(*flags: str, **settings: object) -> Supervised:
        secret = tmp_path / "credentials.json"
        own = {"AccountTag": "a", "TunnelSecret": base64.b64encode(b"s" * 32).decode(), "TunnelID": TUNNEL}
        secret.write_text(json.dumps(own))
        secret.chmod(0o600)
        tree = supervised(
            DOOR="true", TUNNEL_HOSTNAME="llm.example.org", TUNNEL_ID=TUNNEL, CLOUDFLARED_CREDS=secret,
            CLOUDFLARED_BIN=cloudflared.wrapper(tmp_path, *flags), **settings,
        )  # fmt: skip
        tree.until(lambda status: status["phase"] == "serving" and status["tunnel"]["phase"] == "ready", what="a tunnel")
        return tree

    return make


def tunnel(tree: Supervised) -> TunnelFact:
    return tree.look().facts.tunnel


def test_the_tunnel_stays_up_while_caddy_is_restarted_and_while_the_gpus_are_given_back(public):
    tree = public()
    pid, caddy_pid = tunnel(tree).pid, tree.look().facts.door.pid
    tree.signal_pid(caddy_pid, signal.SIGKILL)
    wait_until(lambda: tree.look().facts.door.pid not in (None, caddy_pid), what="another Caddy")
    tree.until(lambda status: status["door"]["phase"] == "ready")
    tree.job(1, "0-7")
    tree.phase("waiting")
    tree.job_over(1)
    tree.serving()
    told_s = time.monotonic()
    wait_until(lambda: tunnel(tree).at_s > told_s, what="word of the tunnel")
    assert (tunnel(tree).pid, tunnel(tree).phase) == (pid, "ready")
    assert len(tree.journal("tunnel_started")) == len(tree.journal("tunnel_up")) == 1


def test_a_deaf_cloudflared_is_gone_within_its_lease_when_the_root_is_killed(public):
    tree = public("--ignore-term", LEASE_TTL=4)
    pid = tunnel(tree).pid
    start = procs.start_ticks(pid)
    tree.signal("root", signal.SIGKILL)
    tree.process.wait(10)
    wait_until(lambda: not procs.alive(pid, start), 20, what="the end of cloudflared")
