"""Secrets out of texts: whatever llmwd logs, shows, sends or keeps goes through `mask`.

Every process learns the secrets it comes by (the configuration and the environment before the fork, so that workers
inherit them); what was never learnt is still recognized by its form. Only whole texts for people pass here, never
encoded messages: a secret that happens to be a word of ours must not break them.
"""

import re
from collections.abc import Iterable, Mapping
from urllib.parse import unquote, urlsplit

HIDDEN = "***"
SHORTEST = 6  # shorter ones are words and numbers that stand in every text
ARGUMENTS = frozenset({"--api-key", "--hf-token"})

_NAMED_SO = re.compile(r"[A-Za-z0-9_]*(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE)", re.IGNORECASE | re.ASCII)
_FORMS = (
    (re.compile(r"\b(?:hf|tk)_[A-Za-z0-9]{8,}|\bsk-[A-Za-z0-9_-]{12,}"), HIDDEN),
    (re.compile(r"(\bBearer\s+)[^\s'\",]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"(://)[^\s/@'\"]+@"), rf"\1{HIDDEN}@"),
    (re.compile(r"(--(?:api|hf)[-_](?:key|token)(?:=|\s+))[^\s'\"`]+"), rf"\1{HIDDEN}"),
    (re.compile(rf"(\b(?:{_NAMED_SO.pattern})=['\"]?)[^\s'\"`;]{{{SHORTEST},}}", re.IGNORECASE | re.ASCII), rf"\1{HIDDEN}"),
)
_ASSIGNED = re.compile(rf"\b{_NAMED_SO.pattern}\s*=\s*['\"]?([^\s'\"#;]+)", re.IGNORECASE | re.ASCII)
_known: set[str] = set()


def learn(values: Iterable[str]) -> None:
    """These texts are secrets from now on, in this process and those forked from it."""
    _known.update(value for value in values if len(value) >= SHORTEST)


def learn_variables(variables: Mapping[str, str]) -> None:
    """Learn the secrets among environment variables: by their names, and users' parts of addresses (proxies)."""
    learn(secret for name, value in variables.items() for secret in _in_variable(name, value))


def learn_file(text: str) -> None:
    """Learn what a settings file means to be secrets, whatever bash makes of it: it quotes what it does not understand."""
    learn(_ASSIGNED.findall(text))


def learn_arguments(words: Iterable[str]) -> None:
    """Learn the secrets among a command's arguments."""
    learn(secret for secret in _arguments(list(words)) if secret is not None)


def mask(text: str) -> str:
    """`text` with every known or recognizable secret replaced."""
    for secret in sorted(_known, key=len, reverse=True):  # one may be a part of another
        text = text.replace(secret, HIDDEN)
    for form, instead in _FORMS:
        text = form.sub(instead, text)
    return text


def mask_arguments(words: Iterable[str]) -> tuple[str, ...]:
    """A command's arguments, to be shown: the values of secret ones replaced."""
    words = list(words)
    shown = zip(words, _arguments(words))
    return tuple(word if secret is None else word.removesuffix(secret) + HIDDEN for word, secret in shown)


def _arguments(words: list[str]) -> list[str | None]:
    """For each word the secret that it ends with or is, or None."""
    found: list[str | None] = []
    hiding = False
    for word in words:
        name, equals, value = word.partition("=")
        is_secret = name.replace("_", "-") in ARGUMENTS
        if hiding and not word.startswith("-"):
            found.append(word)
            continue
        hiding = is_secret and not equals
        found.append(value if is_secret and equals else None)
    return found


def _in_variable(name: str, value: str) -> list[str]:
    if _NAMED_SO.fullmatch(name):
        return [value]
    if name == "NOTIFY_URLS":
        # Each service has its secrets in other places of its address: the whole, and all that is too long for a word.
        urls = value.split()
        parts = [part for url in urls for part in re.split(r"[/:@?&=#]", url.partition("://")[2]) if "." not in part]
        users = [secret for url in urls for secret in _in_variable("", url)]
        return [*urls, *users, *(each for part in parts if len(part) >= 10 for each in (part, unquote(part)))]
    if "://" not in value or "@" not in value:
        return []
    try:
        parts = urlsplit(value)
        return [part for each in (parts.password, parts.username) if each for part in (each, unquote(each))]
    except ValueError:
        return []
