"""Publishing to ntfy. Blocks: only for use beside the loop. `requests` is imported with the first send, because a
node without notices need not hold its memory."""

import time
from enum import StrEnum
from urllib.parse import urlsplit

import msgspec

CONNECT_WITHIN_S = 5.0
ANSWER_WITHIN_S = 10.0
ANSWER_BYTES = 16 << 10
LONGEST_WHY = 200
REFUSED = (401, 403, 404)  # the address or the right is wrong: no notice at all will pass


class Result(StrEnum):
    sent = "sent"
    again = "again"  # try it later
    bad = "bad"  # this one notice is not accepted
    refused = "refused"  # no notice will be accepted until somebody corrects the settings


class Outcome(msgspec.Struct, frozen=True):
    """What became of one publish. why never holds the topic. status: of HTTP; code: ntfy's own error code."""

    result: Result
    why: str = ""
    status: int | None = None
    code: int | None = None


class _Answer(msgspec.Struct):
    """Both of ntfy's answers: a message has an id, an error a code."""

    id: str | None = None
    code: int | None = None
    error: str = ""


def publish(server: str, topic: str, body: bytes) -> Outcome:
    """POST the JSON `body` to `server` (https://host, maybe with user:password@)."""
    import requests

    where = shown(server)
    end_s = time.monotonic() + ANSWER_WITHIN_S
    try:
        # A redirected POST comes back as a GET, which ntfy answers with 200 and its start page.
        with requests.post(
            server, data=body, headers={"Content-Type": "application/json"}, stream=True, allow_redirects=False,
            timeout=(CONNECT_WITHIN_S, ANSWER_WITHIN_S),
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
    except requests.exceptions.RequestException as error:
        return Outcome(Result.again, f"{where} cannot be reached ({type(error).__name__})")


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
    if status == 200 and answer.id:
        return Outcome(Result.sent, status=status)
    if status == 200:
        return Outcome(Result.again, f"{where} answers, but not as ntfy does (a login page in between?)", status)
    if status in REFUSED or 300 <= status < 400:
        return Outcome(Result.refused, f"{said}: check NTFY_SERVER, NTFY_TOPIC and who may write to it", status, answer.code)
    if status == 429 or status >= 500:
        return Outcome(Result.again, said, status, answer.code)
    return Outcome(Result.bad, said, status, answer.code)
