"""Whether notices can be sent, looked at by `llmwd-ctl check`: files with secrets, and apprise. Sends nothing."""

from llmwd.adapters import otherservices, secretfile
from llmwd.adapters.rundir import DirError
from llmwd.config import Settings


def survey(settings: Settings) -> list[tuple[str, str]]:
    """[(setting, sentence)]: all that is wrong. Some 0.3 s for each of NOTIFY_URLS."""
    s, problems = settings, []
    files = [("NTFY_TOKEN_FILE", s.ntfy_token_file), ("NTFY_PASSWORD_FILE", s.ntfy_password_file)]
    for setting, path in files if s.ntfy_topic else []:
        try:
            if path:
                secretfile.read(setting, path)
        except DirError as error:
            problems.append((setting, str(error)))
    if s.ntfy_topic and bool(s.ntfy_user) != bool(s.ntfy_password_file):
        setting, other = ("NTFY_PASSWORD_FILE", "NTFY_USER") if s.ntfy_user else ("NTFY_USER", "NTFY_PASSWORD_FILE")
        problems.append((setting, f"{setting} is not set, and {other} needs it"))
    if s.ntfy_topic and s.ntfy_user and s.ntfy_token_file:
        problems.append(("NTFY_USER", "NTFY_TOKEN_FILE is set as well: set one of them"))
    if s.ntfy_deadman and not s.ntfy_topic:
        problems.append(("NTFY_DEADMAN", "NTFY_TOPIC is not set, and only an ntfy server can hold a dead man's notice"))
    whys = dict.fromkeys(otherservices.check(url) for url in s.notify_urls)
    return problems + [("NOTIFY_URLS", why) for why in whys if why]
