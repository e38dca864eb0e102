"""A home folder with settings files, for the tests of the configuration."""

import os
from collections.abc import Mapping
from pathlib import Path

from llmwd.config import Loaded, load

GOOD_PROFILE = 'MODEL_NAME="org/Model"\nVLLM_ARGS="--served-model-name m"\n'


def environ(**more: str) -> dict[str, str]:
    """The little that bash needs, and what a test adds."""
    return {"PATH": os.environ["PATH"], "HOME": "/home/someone", **more}


def write(home: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, text in files.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape"))
    return home


def load_text(
    home: Path, config: str | bytes = "", profile: str | bytes = GOOD_PROFILE, node: str | bytes | None = None, **env: str
) -> Loaded:
    """Load etc/config.env, etc/nodes/n1.env (when given) and models/p.env with these texts."""
    files = {"etc/config.env": config, "models/p.env": profile}
    write(home, files if node is None else {**files, "etc/nodes/n1.env": node})
    return load(home, "p", "n1.cluster.example.org", environ(**env))


def told(loaded: Loaded) -> list[str]:
    return [str(problem) for problem in loaded.problems]


def warned(loaded: Loaded) -> list[str]:
    """The warnings, without the one about LLM_BIN, which exists on no test machine."""
    return [str(warning) for warning in loaded.warnings if warning.variable != "LLM_BIN"]
