"""A profile: a model's file in models/, and the link that names the active one."""

import os
import re
import stat
import time
from pathlib import Path

import msgspec

from llmwd.config.problems import ConfigError

LINK = "active-model.env"
FOLDER = "models"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", re.ASCII)


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """One model and how to serve it, checked. `num_gpus` and what follows: the node's settings unless the profile
    has its own. `exports` is what the settings files and the profile export for vLLM's environment."""

    name: str
    file: str
    model_name: str
    vllm_args: tuple[str, ...]
    exports: dict[str, str]
    num_gpus: int
    llm_venv: str
    llm_bin: str
    cuda_setup: bool
    cuda12_lib: str
    cuda_home_override: str
    hf_home: str


def check_name(name: str) -> str:
    """`name` if it can only be a file right in models/; ConfigError otherwise."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no profile name: use letters, digits, '.', '_' and '-', not '.' or '-' first")
    return name


def profile_names(home: Path) -> list[str]:
    """The profiles in models/, sorted."""
    found = (entry for entry in (home / FOLDER).glob("*.env") if os.path.isfile(entry))
    return sorted(entry.stem for entry in found if _NAME.fullmatch(entry.stem))


def active_profile(home: Path) -> str | None:
    """The name that the link active-model.env gives, whether or not that profile exists; None: no such link."""
    try:
        target = home / os.readlink(home / LINK)
    except OSError:
        return None
    in_models = os.path.realpath(target.parent) == os.path.realpath(home / FOLDER)
    return target.stem if in_models and target.suffix == ".env" and _NAME.fullmatch(target.stem) else None


def set_active(home: Path, name: str) -> None:
    """Make `name` the active profile, atomically and to stay. ConfigError when that cannot be, OSError from the disk."""
    if not os.path.isfile(home / FOLDER / f"{check_name(name)}.env"):
        raise ConfigError(f"there is no profile {name} in {home / FOLDER}; there are: {_listed(home)}")
    link = home / LINK
    try:
        if not stat.S_ISLNK(link.lstat().st_mode):
            raise ConfigError(f"{link} is not a link and may hold settings of yours: move it away first")
    except FileNotFoundError:
        pass
    fresh = home / f".{LINK}.{os.getpid()}.{time.monotonic_ns()}"
    fresh.symlink_to(f"{FOLDER}/{name}.env")
    try:
        fresh.replace(link)
    except OSError:
        fresh.unlink()
        raise
    folder = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def choose(home: Path, name: str | None) -> str:
    """The profile to load: `name`, or the active one. ConfigError tells what to do when there is none."""
    if name is None:
        name = active_profile(home)
        if name is None:
            state = "is missing" if not os.path.lexists(home / LINK) else f"is not a link to {FOLDER}/<profile>.env"
            raise ConfigError(f"{state}; choose a profile with ./switch-model.sh PROFILE ({_listed(home)})")
    if not os.path.exists(home / FOLDER / f"{check_name(name)}.env"):
        raise ConfigError(f"there is no profile {name}; choose one with ./switch-model.sh PROFILE ({_listed(home)})")
    return name


def _listed(home: Path) -> str:
    return ", ".join(profile_names(home)) or f"none yet in {home / FOLDER}"
