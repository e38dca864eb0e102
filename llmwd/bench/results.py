"""What is kept of a benchmark, and the table at its end."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.table import Table

from llmwd.bench.served import Served, server_version, serving_python
from llmwd.redact import mask_arguments


def base_name(started_at: datetime, profile: str, kind: str) -> str:
    """`20260102T030405Z-my-model-quick`: sorts by time, safe as a file name."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", profile)
    return f"{started_at.astimezone(UTC):%Y%m%dT%H%M%SZ}-{safe}-{kind}"


def about(served: Served, started_at: datetime, kind: str, seed: int, extra: Sequence[str]) -> dict:
    """The `llmwd` object of a result: model, configuration and versions. Asks the server for its version."""
    return {
        "kind": kind,
        "started_at": started_at.astimezone(UTC).isoformat(timespec="seconds"),
        "node": served.node,
        "model": {"profile": served.profile, "name": served.model, "served_as": served.served_as},
        "configuration": {
            "serve_command": list(served.argv),
            "gpus": list(served.gpus),
            "NUM_GPUS": len(served.gpus),
            "client_args": list(mask_arguments(extra)),
            "seed": seed,
        },
        "versions": {
            "vllm": server_version(served),
            "llmwd": version("llmwd"),
            "python": platform.python_version(),
            "serving_python": serving_python(served),
        },
        "ended_by": None,
    }


def document(rounds: Sequence[dict], about_: dict) -> dict:
    """What the JSON file holds: vLLM's own object with `llmwd` beside its keys; of several rounds, a list `runs`."""
    if about_["kind"] == "sweep":
        return {"llmwd": about_, "runs": list(rounds)}
    return {**(rounds[0] if rounds else {}), "llmwd": about_}


def write_json(path: Path, content: dict) -> None:
    """Whole or not at all: a benchmark may be interrupted while its results are written."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=2) + "\n")
    beside.replace(path)


def _ms(run: dict, metric: str) -> str:
    """`median / 99th percentile` of a metric, in milliseconds."""
    values = (run.get(f"median_{metric}_ms"), run.get(f"p99_{metric}_ms"))
    return " / ".join("-" if value is None else f"{value:.0f}" for value in values)


def table(title: str, rounds: Sequence[dict]) -> Table:
    """One row for each round."""
    made = Table(title=title, caption="times in ms: median / 99th percentile", title_justify="left")
    columns = ("at once", "prompts", "failed", "requests/s", "output tok/s", "first token", "per token", "whole answer")
    for name in columns:
        made.add_column(name, justify="right")
    for run in rounds:
        made.add_row(
            str(run.get("max_concurrency") or "all"),
            str(run.get("num_prompts", "-")),
            str(run.get("failed", "-")),
            f"{run.get('request_throughput', 0):.2f}",
            f"{run.get('output_throughput', 0):.1f}",
            _ms(run, "ttft"),
            _ms(run, "tpot"),
            _ms(run, "e2el"),
        )
    return made


def print_table(made: Table, to: TextIO | None = None) -> None:
    """On standard output by default; a file or pipe gets the full width whatever the terminal's is."""
    width = None if to is None and os.isatty(1) else 110
    Console(file=to, width=width).print(made)
