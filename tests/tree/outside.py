"""Somebody outside, before the front door of a whole llmwd: the real Caddy, the stand-in server as vLLM."""

import base64
import http.client
import json
import subprocess

import openai
import pytest

from llmwd.adapters import caddy
from llmwd.core import doorwanted
from tests.tree.conftest import Start
from tests.tree.supervised import Supervised, free_port
from tests.waiting import wait_until

SECRETS = {"alice": "a1b2c3", "bob": "d4e5f6", "carol": "g7h8i9"}


def token(name: str, secret: str | None = None) -> str:
    return base64.b64encode(f"{name}:{secret or SECRETS[name]}".encode()).decode()


@pytest.fixture(scope="session")
def hashes() -> dict[str, str]:
    def hashed(secret: str) -> str:
        argv = [caddy.find(""), "hash-password", "--bcrypt-cost", "4", "--plaintext", secret]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()

    return {name: hashed(secret) for name, secret in SECRETS.items()}


class Outside:
    """What somebody outside does. The door's port stands for the tunnel."""

    def __init__(self, tree: Supervised, hashes: dict[str, str]):
        self.tree, self.hashes, self.port = tree, hashes, int(tree.settings["DOOR_PORT"])

    def keys(self, **ends_at: float | None) -> None:
        keys = [
            {"name": name, "id": name, "bcrypt": self.hashes[name], "created_at": 0.0, "expires_at": at}
            for name, at in ends_at.items()
        ]
        self.tree.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = self.tree.state / ".door-keys"
        draft.write_text(json.dumps({"version": 1, "keys": keys}))
        draft.chmod(0o600)
        draft.rename(self.tree.state / "door-keys.json")

    def client(self, name: str = "alice", **more: object) -> openai.OpenAI:
        return openai.OpenAI(api_key=token(name), base_url=f"http://127.0.0.1:{self.port}/v1", max_retries=0, timeout=30, **more)

    def ask(self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes | None = None) -> tuple[int, dict, bytes]:
        """(0, …) while nothing answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, {"Authorization": f"Bearer {token('alice')}"} if headers is None else headers)
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        except ConnectionError:
            return 0, {}, b""
        finally:
            connection.close()

    def says(self, code: str, path: str = "/v1/chat/completions", method: str = "POST") -> bool:
        status, _, body = self.ask(method, path, body=b"{}" if method == "POST" else None)
        return status != 0 and status != 200 and json.loads(body)["error"]["code"] == code

    def status(self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes | None = None) -> int:
        return self.ask(method, path, headers, body)[0]

    def stream(self, tokens: int, name: str = "alice"):
        message = [{"role": "user", "content": "hello"}]
        return self.client(name).chat.completions.create(model="fake", messages=message, stream=True, max_tokens=tokens)

    def streaming(self, tokens: int = 100_000):
        """A stream that has begun: its first token has been read."""
        stream = iter(self.stream(tokens))
        next(stream)
        return stream

    def served(self) -> "Outside":
        """Once the model serves and the door lets through to it."""
        self.tree.serving()
        wait_until(lambda: self.status("GET", "/health") == 200)
        return self

    def told_to(self, word: str) -> bool:
        """Whether the word that Caddy reads is this one."""
        return (self.tree.runtime / "door" / doorwanted.STATE).read_text() == word

    @property
    def caddy_pid(self) -> int:
        return self.tree.look().facts.door.pid


@pytest.fixture
def outside(supervised: Start, hashes: dict[str, str]):
    """outside(profile={...}, **settings): what stands before the door of a started llmwd; alice has a key."""

    def make(profile: dict[str, object] | None = None, **settings: object) -> Outside:
        tree = supervised(profile, start=False, **{"DOOR": "true", "DOOR_PORT": free_port()} | settings)
        made = Outside(tree, hashes)
        made.keys(alice=None)
        tree.start()
        return made

    return make
