"""Secrets out of texts: whatever llmwd logs, shows, sends or keeps goes through `mask`, before it is cut to a length.

Every process learns the secrets it comes by (the configuration and the environment before the fork, so that workers
inherit them); what was never learnt is still recognized by its form. Only whole texts for people pass here, never
encoded messages: a secret that happens to be a word of ours must not break them.
"""

import json
import re
from collections.abc import Iterable, Mapping
from urllib.parse import quote, quote_plus, unquote, urlsplit

HIDDEN = "***"
SHORTEST = 6  # shorter ones are words and numbers that stand in every text
SHORTEST_LINE = 16  # of a secret with several, such as a private key: shorter ones are anybody's

# vLLM takes beginnings of its options as well; HF_TOKEN's and the API key's are those that hold secrets.
_SECRET_OPTION = re.compile(r"--(?:api[-_]k(?:e|ey)?|hf[-_]t(?:o|ok|oke|oken)?|(?:[a-z0-9]+[-_])*(?:token|secret|password))")

_NAME = r"[A-Za-z0-9_]*(?:KEYS?|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS|_PASS|_PAT)"
_NAMED_SO = re.compile(_NAME, re.IGNORECASE | re.ASCII)
_PATH_IN_IT = re.compile(r"[A-Za-z0-9_]*(?:KEYS?|TOKEN|SECRET|PASSWORD|CREDENTIALS)_FILE", re.IGNORECASE | re.ASCII)
_QUOTED = r"""(?:\\?"(?:[^"\\\n]|\\(?!").)*\\?"|'(?:[^'\\\n]|\\.)*')"""
_BARE = r"[^\s'\"`;,]"
_FIELD = r"(?:[A-Za-z0-9_-]*(?:key|token|secret|password|passwd|passphrase|credentials))"
# Services whose addresses, as apprise writes them, are made of secrets.
_SERVICES = (
    "tgram slack discord msteams workflows? wxteams gchat zulip rockets? mmosts? matrixs? mailtos? ntfys? gotifys? pover "
    "pbul prowl spush pushy join ifttt ses sns twilio vonage signals? line pagerduty opsgenie victorops webexteams"
).replace(" ", "|")

_FORMS = tuple(
    (re.compile(form, re.IGNORECASE | re.ASCII), instead)
    for form, instead in (
        (r"\b(?-i:(?:hf|tk|gh[opsu])_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{12,}|github_pat_\w{8,}|glpat-[\w-]{8,}|xox[a-z]-[A-Za-z0-9-]{8,})", HIDDEN),
        (r"\b(?-i:AKIA[A-Z0-9]{16}\b|eyJ[A-Za-z0-9_-]{12,}(?:\.[A-Za-z0-9_-]+)*={0,2})", HIDDEN),
        (r"(\bBearer\s+)[^\s'\",]+", rf"\1{HIDDEN}"),
        (r"(\b(?:proxy-)?authorization['\"]?\s*[:=]\s*['\"]?(?:basic|digest|token|apikey)\s+)[^'\"\r\n,]+", rf"\1{HIDDEN}"),
        (r"(\bx-(?:[a-z]+-)*(?:key|token)['\"]?\s*[:=]\s*['\"]?)[^\s'\",]+", rf"\1{HIDDEN}"),
        (rf"\b((?:{_SERVICES})://)[^\s'\"]+", rf"\1{HIDDEN}"),
        (r"(://)[^\s/@'\"]+@", rf"\1{HIDDEN}@"),
        (r"([?&](?:[a-z_]*(?:auth|token|key|secret|signature|password)|sig|pass)=)[^\s&'\"#]+", rf"\1{HIDDEN}"),
        (rf"({_SECRET_OPTION.pattern}(?:=|\s+))(?:{_QUOTED}|(?!-)[^\s'\"`]+)", rf"\1{HIDDEN}"),
        # "api_key": "…", 'hf_token': ['…'], "TunnelSecret": "…", also as text within JSON.
        (rf"(['\"]{_FIELD}\\?['\"]\s*:\s*)(?:{_QUOTED}|\[[^\]\n]*\])", rf'\1"{HIDDEN}"'),
        (rf"(\b{_NAME}\s?=\s?)(?:{_QUOTED}|\[[^\]\n]*\])", rf"\1{HIDDEN}"),
        (rf"(\b{_NAME}=['\"]?){_BARE}{{{SHORTEST},}}", rf"\1{HIDDEN}"),
        # NAME: value, of which only what is no word of a sentence.
        (rf"(\b(?=[a-z0-9]+_){_NAME}:\s+)(?=\S*[0-9]){_BARE}{{8,}}", rf"\1{HIDDEN}"),
    )
)
_ASSIGNED = re.compile(rf"\b({_NAME}(?:_FILE)?)\s*=\s*(?:\"([^\"\n]*)|'([^'\n]*)|([^\s'\"#;]+))", re.IGNORECASE | re.ASCII)
_known: set[str] = set()


def learn(values: Iterable[str]) -> None:
    """These texts are secrets from now on, in this process and those forked from it, however they are written down."""
    _known.update(form for value in values for secret in _lines(value) for form in _written(secret))


def learn_variables(variables: Mapping[str, str]) -> None:
    """Learn the secrets among environment variables: by their names, and users' parts of addresses (proxies)."""
    learn(secret for name, value in variables.items() for secret in _in_variable(name, value))


def learn_file(text: str) -> None:
    """Learn what a settings file means to be secrets, whatever bash makes of it."""
    learn(secret for name, *values in _ASSIGNED.findall(text) for secret in _in_variable(name, "".join(values)))


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


def telling_arguments(words: Iterable[str]) -> tuple[str, ...]:
    """The options (each once; "" for what stands before the first) with something in their values that `mask` hides."""
    option = ""
    found: dict[str, None] = {}
    for word in words:
        if word.startswith("-"):
            option = word.partition("=")[0]
        for text in (word, f"{option} {word}"):  # some forms are an option and its value
            if mask(text) != text:
                found[option] = None
    return tuple(found)


def holds_secret(text: str) -> bool:
    """Whether a settings file has one in it, comments aside."""
    return any(mask(line) != line for line in text.splitlines() if not line.lstrip().startswith("#"))


def _lines(value: str) -> list[str]:
    """The secret, and where it has several lines, as texts for people show it, each of them."""
    lines = value.splitlines()
    return [value, *(line for line in lines if len(line) >= SHORTEST_LINE)] if len(lines) > 1 else [value]


def _written(secret: str) -> set[str]:
    """As it is, and as Python, JSON and addresses write it."""
    if len(secret) < SHORTEST:
        return set()
    plain = secret.encode("utf-8", "replace").decode()
    doubled = secret.replace("\\", "\\\\")  # repr escapes the quotes by what else is in its text
    escaped = {doubled, doubled.replace("'", "\\'"), repr(secret)[1:-1], json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
    return {secret, *escaped, quote(plain, safe=""), quote(plain), quote_plus(plain)}


def _arguments(words: list[str]) -> list[str | None]:
    """For each word the secret that it ends with or is, or None."""
    found: list[str | None] = []
    hiding = False
    for word in words:
        name, equals, value = word.partition("=")
        is_secret = bool(_SECRET_OPTION.fullmatch(name))
        if hiding and not word.startswith("-"):
            found.append(word)
            continue
        hiding = is_secret and not equals
        found.append(value if is_secret and equals else None)
    return found


def _in_variable(name: str, value: str) -> list[str]:
    if _NAMED_SO.fullmatch(name):
        if name.upper().endswith("CREDENTIALS") and value.startswith("/"):
            return []  # the file that holds them
        return [value, *(re.split(r"[\s,]+", value) if name.upper().endswith("KEYS") else ())]
    if _PATH_IN_IT.fullmatch(name):
        return [] if value.startswith(("/", "~", "$")) else [value]  # the secret itself, written where its file belongs
    if name == "NOTIFY_URLS":
        # Each service has its secrets in other places of its address: the whole, and all that is too long for a word.
        urls = value.split()
        parts = [part for one in urls for part in re.split(r"[/:@?&=#]", one.partition("://")[2]) if "." not in part]
        users = [secret for one in urls for secret in _in_variable("", one)]
        return [*urls, *users, *(each for part in parts if len(part) >= 10 for each in (part, unquote(part)))]
    if "://" not in value or "@" not in value:
        return []
    try:
        url = urlsplit(value)
        return [part for each in (url.password, url.username) if each for part in (each, unquote(each))]
    except ValueError:
        return []
