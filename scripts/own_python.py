"""For the scripts beside it: go on in the project's own environment, whoever's Python they were started with.

    import own_python
    own_python.ensure()

An environment that is missing or stale is made first (scripts/env.sh), with what the tests need.
"""

import os
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
ENVIRONMENT = CHECKOUT / ".venv-llmwd"


def ensure() -> None:
    """Return in the project's environment; does not return in another one. SystemExit: it cannot be made, as env.sh has said."""
    if Path(sys.prefix).resolve() == ENVIRONMENT.resolve():
        return
    if subprocess.run(["bash", CHECKOUT / "scripts/env.sh", "test"]).returncode:
        raise SystemExit(1)
    python = str(ENVIRONMENT / "bin/python")
    os.execv(python, [python, *sys.argv])
