"""Publishing to ntfy. Blocks: only for use beside the loop. `requests` is imported with the first send, because a
node without notices need not hold its memory."""

import base64
import errno
import time
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

import msgspec

from llmwd import redact
from llmwd.adapters import secretfile
from llmwd.adapters.rundir import DirError

CONNECT_WITHIN_S = 5.0
ANSWER_WITHIN_S = 10.0
ANSWER_BYTES = 16 << 10
LONGEST_WHY = 200
REFUSED = (401, 403)  # no notice at all will pass
NOT_FOUND = 404  # the address is wrong, if it is ntfy that says so: a proxy in between says it while ntfy is away
MOVED = (301, 308)  # for good; what is moved for a while is tried again
BAD = (400, 413)
LASTING = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)  # of a file that cannot be read


class Result(StrEnum):
    sent = "sent"
    again = "again"  # try it later
    bad = "bad"  # this one notice is not accepted
    refused = "refused"  # no notice will be accepted until somebody corrects the settings


class Outcome(msgspec.Struct, frozen=True):
    """What became of one publish. why never holds the topic. status: of HTTP; code: ntfy's own error code; replaces:
    the server knows sequence ids (from ntfy 2.16 on)."""

    result: Result
    why: str = ""
    status: int | None = None
    code: int | None = None
    replaces: bool = False


class Access(msgspec.Struct, frozen=True):
    """What proves that we may publish: an access token, or user and password, by files of their own; all may be ""."""

    token_file: str = ""
    user: str = ""
    password_file: str = ""

    def headers(self) -> dict[str, str]:
        """Read anew for each send, because tokens are renewed. Raises DirError with a sentence."""
        if self.token_file:
            return {"Authorization": f"Bearer {_learnt('NTFY_TOKEN_FILE', self.token_file)}"}
        if self.user and self.password_file:
            pair = f"{self.user}:{_learnt('NTFY_PASSWORD_FILE', self.password_file)}"
            encoded = base64.b64encode(pair.encode()).decode()
            redact.learn([encoded])
            return {"Authorization": f"Basic {encoded}"}
        return {}


def _learnt(setting: str, path: str) -> str:
    secret = secretfile.read(setting, path)
    redact.learn([secret])
    return secret


class _Answer(msgspec.Struct):
    """Both of ntfy's answers: a message has an id, an error a code."""

    id: str | None = None
    code: int | None = None
    error: str = ""
    sequence_id: str = ""


def publish(server: str, topic: str, body: bytes, access: Access = Access()) -> Outcome:
    """POST the JSON `body` to `server` (https://host, maybe with user:password@)."""
    return _ask("POST", server, server, topic, body, access)


def cancel(server: str, topic: str, sid: str, access: Access = Access()) -> Outcome:
    """Take back what is scheduled, or shown, under this sequence id. sent: done."""
    return _ask("DELETE", server, f"{server}/{topic}/{sid}", topic, b"", access)


def _ask(method: str, server: str, url: str, topic: str, body: bytes, access: Access) -> Outcome:
    where = shown(server)
    try:
        import requests
    except ImportError as error:  # an environment that is being renewed
        return Outcome(Result.again, f"the library requests cannot be loaded: {error}")
    end_s = time.monotonic() + ANSWER_WITHIN_S
    try:
        headers = {"Content-Type": "application/json"} | access.headers()
    except DirError as error:
        # On a network file system a file is not there for a moment (ESTALE, EIO), and then it is again.
        cause = error.__cause__
        passing = isinstance(cause, OSError) and cause.errno not in LASTING
        return Outcome(Result.again if passing else Result.refused, str(error))
    try:
        # A redirected POST comes back as a GET, which ntfy answers with 200 and its start page.
        with requests.request(
            method, url, data=body, headers=headers, stream=True, allow_redirects=False,
            timeout=(CONNECT_WITHIN_S, ANSWER_WITHIN_S), auth=_as_told if access.token_file or access.user else None,
        ) as response:  # fmt: skip
            text = b""
            for chunk in response.iter_content(1024):
                text += chunk
                if len(text) > ANSWER_BYTES or time.monotonic() > end_s:
                    break
            return _judge(response.status_code, text, where, topic)
    except ValueError:  # also the base of what requests says about an address: InvalidURL, InvalidSchema
        return Outcome(Result.refused, f"{where} is not an address that notices can be sent to: correct NTFY_SERVER")
    except requests.exceptions.ConnectTimeout:
        return Outcome(Result.again, f"{where} cannot be reached within {CONNECT_WITHIN_S:g} s")
    except requests.exceptions.Timeout:
        return Outcome(Result.again, f"{where} does not answer within {ANSWER_WITHIN_S:g} s")
    # Not only its own: a bundle of certificates that is not there, for one, is an OSError.
    except (requests.exceptions.RequestException, OSError) as error:
        return Outcome(Result.again, f"{where} cannot be reached ({type(error).__name__})")


def _as_told(request: Any) -> Any:
    """Without this, requests would put what ~/.netrc says in the place of our own Authorization."""
    return request


def shown(server: str) -> str:
    """The address without user and password, for people to read."""
    try:
        parts = urlsplit(server)
    except ValueError:
        return "NTFY_SERVER"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _judge(status: int, text: bytes, where: str, topic: str) -> Outcome:
    try:
        answer = msgspec.json.decode(text, type=_Answer)
    except msgspec.DecodeError:
        answer = _Answer()
    said = f"{where} answers {status}"
    if answer.error:
        # The topic is the password of an open server, and some errors quote it.
        said += f": {answer.error.replace(topic, '***')[:LONGEST_WHY]}"
    if 200 <= status < 300 and answer.id:
        return Outcome(Result.sent, status=status, replaces=bool(answer.sequence_id))
    if 200 <= status < 300:
        return Outcome(Result.again, f"{where} answers, but not as ntfy does (a login page in between?)", status)
    if status in REFUSED or status in MOVED or (status == NOT_FOUND and answer.code):
        return Outcome(Result.refused, f"{said}: check NTFY_SERVER, NTFY_TOPIC and who may write to it", status, answer.code)
    return Outcome(Result.bad if status in BAD else Result.again, said, status, answer.code)
