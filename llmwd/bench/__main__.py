"""`./bench.sh`: the command line."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from llmwd.bench.client import Ended, run_client
from llmwd.bench.plan import INPUT_TOKENS, KINDS, OUTPUT_TOKENS, Round, client_command, client_environ
from llmwd.bench.results import about, base_name, document, print_table, table, write_json
from llmwd.bench.served import Refused, Served, api_key, ask_status, find_served, why_it_ended

CHECKOUT = Path(__file__).resolve().parents[2]
# How long after the server's end the daemon may take to say why.
EXPLAINED_WITHIN_S = 5.0

EXAMPLES = f"""\
kinds:
  default   20 prompts          quick   5 prompts, a smoke test
  full     100 prompts          stress  200 prompts, sustained load
  sweep    few prompts at each of 1, 2, 4, 8 and 16 at once

Each prompt has {INPUT_TOKENS} random tokens and is answered with {OUTPUT_TOKENS}. What follows -- goes to
`vllm bench serve` and wins over what llmwd chose.

examples:
  ./bench.sh
  ./bench.sh quick
  ./bench.sh sweep
  ./bench.sh full -- --random-input-len 1024 --max-concurrency 64

Results: bench-results/<UTC time>-<profile>-<kind>.json, and .txt for what was on the screen.
The server's API key is found in its environment and handed to the client the same way.
Exit codes: 0 done, 1 nothing is served, or the server left in the middle, 2 usage.
"""


def main(argv: list[str]) -> int:
    ours, extra = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(
        prog="bench.sh", usage="./bench.sh [default|quick|full|stress|sweep] [-- ARGUMENTS OF vllm bench serve]",
        description="Benchmarks the model that llmwd serves, with vLLM's own client.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("kind", nargs="?", default="default", choices=list(KINDS), help="(default: default)")
    parser.add_argument("--ctl", default=str(CHECKOUT / "bin/llmwd-ctl"), help=argparse.SUPPRESS)
    options = parser.parse_args(ours)
    try:
        return benchmark(options.ctl, options.kind, extra)
    except Refused as refused:
        print(f"bench.sh: {refused}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nbench.sh: interrupted.", file=sys.stderr)
        return 130


def benchmark(ctl: str, kind: str, extra: list[str]) -> int:
    """Runs every round of `kind`, keeps what was measured after each, prints the table; the exit code."""
    served = find_served(ctl)
    started_at = datetime.now(UTC)
    # Differs from run to run, so that the prefix cache does not know the prompts.
    seed = int(started_at.timestamp()) % 2**31
    kept = about(served, started_at, kind, seed, extra)
    folder = Path(os.environ.get("LLMWD_HOME") or CHECKOUT) / "bench-results"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        base = folder / base_name(started_at, served.profile, kind)
        return _rounds(ctl, served, KINDS[kind], kept, base)
    except OSError as error:
        raise Refused(f"{error.filename or served.vllm_bin}: {error.strerror}.") from error


def _rounds(ctl: str, served: Served, rounds: tuple[Round, ...], kept: dict, base: Path) -> int:
    json_path, text_path = (base.with_name(base.name + ending) for ending in (".json", ".txt"))
    measured: list[dict] = []
    problem = None
    for number, round_ in enumerate(rounds):
        seed = kept["configuration"]["seed"] + number
        result, ended = _one_round(served, round_, kept["configuration"]["client_args"], seed, text_path)
        if result is not None:
            measured.append(result)
        problem = _problem(ctl, served, result, ended)
        kept["ended_by"] = problem
        write_json(json_path, document(measured, kept))
        if problem:
            break
    if measured:
        made = table(f"{served.served_as} ({served.profile}), {kept['kind']}", measured)
        print_table(made)
        with text_path.open("a") as text:
            print_table(made, text)
    if problem:
        where = f"partial results are in {json_path}" if measured else f"nothing was measured; see {text_path}"
        raise Refused(f"{problem}; {where}.")
    print(f"results: {json_path}")
    return 0


def _one_round(
    served: Served, round_: Round, extra: list[str], seed: int, console: Path
) -> tuple[dict | None, Ended]:
    """vLLM's result of one round, None when it wrote none, and how the client ended."""
    with tempfile.TemporaryDirectory(prefix="llmwd-bench-") as scratch:
        command = client_command(
            served, round_, seed=seed, result_dir=scratch, result_name="result.json", extra=extra
        )
        ended = run_client(command, client_environ(served, api_key(served)), served.pid, console)
        # Absent or cut short when the client had to be ended.
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            return json.loads(Path(scratch, "result.json").read_text()), ended
    return None, ended


def _problem(ctl: str, served: Served, result: dict | None, ended: Ended) -> str | None:
    """What went wrong in a round, as the beginning of a sentence; None when all requests were answered."""
    complete = ended.returncode == 0 and result is not None
    if complete and not result.get("failed"):
        return None
    if ended.server_gone:
        return f"llmwd {_why(ctl, served)} during the benchmark"
    if complete:
        return f"{result['failed']} of {result.get('num_prompts', '?')} requests failed"
    return f"vllm bench serve ended with exit code {ended.returncode}"


def _why(ctl: str, served: Served) -> str:
    """Asks until the daemon shows something other than this server serving, at most EXPLAINED_WITHIN_S."""
    give_up_at = time.monotonic() + EXPLAINED_WITHIN_S
    while True:
        status = ask_status(ctl)
        gone = status is None or status.get("phase") != "serving" or (status.get("server") or {}).get("pid") != served.pid
        if gone or time.monotonic() > give_up_at:
            return why_it_ended(status, served)
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
