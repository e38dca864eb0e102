"""Reading cloudflared's log, asking its program, and what the stand-in for it says when it cannot begin."""

import signal
import socket
import subprocess
import sys

import pytest

from llmwd.adapters import cloudflared
from llmwd.core import tunnelfaults
from llmwd.core.tunnelfaults import Kind
from tests.fakes import cloudflared as fake
from tests.waiting import wait_until

CONFIG = 'tunnel: "{id}"\ncredentials-file: "{creds}"\ningress:\n  - service: http_status:404\n'


def script(folder, text: str) -> str:
    path = folder / "program"
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("text", "told"),
    [("#!/bin/sh\nprintf 'GLIBC_2.34 not found\\n' >&2\nexit 3\n", "GLIBC_2.34 not found"), ("no program", "Exec format error"),
     ("#!/nowhere/sh\n", "No such file or directory"), ("#!/bin/sh\nexit 3\n", "exit code 3")],
    ids=["it ends with an error", "no program", "no interpreter", "it ends without a word"],
)  # fmt: skip
def test_a_program_that_cannot_be_run_is_told(tmp_path, text, told):
    assert cloudflared.version(script(tmp_path, text), {"PATH": "/bin"}) == ("", told)


def test_a_program_that_hangs_is_no_program_that_cannot_be_run(tmp_path, monkeypatch):
    monkeypatch.setattr(cloudflared, "RUNS_WITHIN_S", 0.2)
    with pytest.raises(TimeoutError, match="did not end within"):
        cloudflared.version(script(tmp_path, "#!/bin/sh\nexec sleep 60\n"), {"PATH": "/bin:/usr/bin"})


@pytest.fixture
def begin(tmp_path):
    """begin(config, *words): a stand-in that is started with this configuration."""
    made: list[subprocess.Popen] = []

    def make(config: str, *words: str, flags: tuple[str, ...] = ()) -> subprocess.Popen:
        path = tmp_path / "config.yml"
        path.write_text(config)
        argv = [sys.executable, fake.__file__, *flags, "--", "tunnel", "--config", str(path), *words]
        made.append(subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return made[-1]

    yield make
    for process in made:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("config", "words", "code", "kind"),
    [
        ("ingress: {\n", ["run"], 1, Kind.permanent),
        (CONFIG, ["--grace-period", "200s", "run"], 1, Kind.permanent),
        (CONFIG, ["--protocol", "udp", "run"], 1, Kind.permanent),
        (CONFIG, ["run"], 1, Kind.permanent),  # no credentials
        ("ingress:\n  - service: http_status:404\n", ["run"], 255, Kind.permanent),
        (CONFIG, ["run", "--token-file", "/nowhere"], 255, Kind.permanent),
        (CONFIG, ["run", "--metrics", "127.0.0.1:0"], 0, Kind.permanent),  # a misplaced flag
        (CONFIG, ["--metrics", "TAKEN", "--url", "http://localhost"], 1, Kind.network),
    ],
    ids=["yaml", "grace", "protocol", "credentials", "no tunnel", "token", "usage", "metrics port"],
)  # fmt: skip
def test_what_it_cannot_begin_with_is_a_plain_sentence_and_is_judged(begin, config, words, code, kind):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = [word.replace("TAKEN", f"127.0.0.1:{taken.getsockname()[1]}") for word in words]
        process = begin(config, *words)
        said = process.communicate(timeout=20)[0]
    assert process.returncode == code and tunnelfaults.last_error(said) == ""
    found = tunnelfaults.death(code, "", said, listened=False)
    assert found.kind is kind and tunnelfaults.last_words(said) in found.how and tunnelfaults.last_words(said)


def test_connections_come_one_after_another_and_a_sigterm_ends_it_with_0(begin, tmp_path):
    process = begin(CONFIG, "--url", "http://localhost", flags=("--connect-every", "1"))
    address = wait_until(lambda: tunnelfaults.metrics_address(process.stdout.readline()))
    seen: list[int | None] = []
    wait_until(lambda: seen.append(cloudflared.ready(address)) or seen[-1] == 4)
    assert {1, 2, 3, 4} <= set(seen) and seen == sorted(seen)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=20)[0]
    assert process.returncode == 0 and tunnelfaults.death(0, "", said, listened=False).kind is Kind.own
    assert cloudflared.ready(address) is None
