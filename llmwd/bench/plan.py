"""The kinds of benchmark and the client's command line. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmwd.bench.served import Served

INPUT_TOKENS = 256
OUTPUT_TOKENS = 128


@dataclass(frozen=True)
class Round:
    """One run of the client: so many prompts, at most so many at once."""

    prompts: int
    concurrency: int


QUICK_PROMPTS = 5

# Concurrency grows with the number of prompts, so that each kind spends most of its time at its level.
KINDS: Mapping[str, tuple[Round, ...]] = {
    "default": (Round(20, 8),),
    "quick": (Round(QUICK_PROMPTS, QUICK_PROMPTS),),
    "full": (Round(100, 16),),
    "stress": (Round(200, 32),),
    # Twice the level at least: with fewer prompts than that the level is never held.
    "sweep": tuple(Round(max(QUICK_PROMPTS, 2 * level), level) for level in (1, 2, 4, 8, 16)),
}


def client_command(
    served: Served, round_: Round, *, seed: int, result_dir: str, result_name: str, extra: Sequence[str] = ()
) -> list[str]:
    """`vllm bench serve …` for one round.

    `extra` comes after our choices, so that it wins, and before where the result goes, which we must find.
    """
    return [
        served.vllm_bin, "bench", "serve",
        "--backend", "openai-chat",
        "--endpoint", "/v1/chat/completions",
        "--base-url", served.url,
        "--model", served.served_as,
        "--tokenizer", served.model,
        "--dataset-name", "random",
        "--random-input-len", str(INPUT_TOKENS),
        "--random-output-len", str(OUTPUT_TOKENS),
        "--num-prompts", str(round_.prompts),
        "--max-concurrency", str(round_.concurrency),
        # Answers of equal length make runs comparable.
        "--ignore-eos",
        # Another seed each time: the same prompts again would be answered from the prefix cache.
        "--seed", str(seed),
        "--percentile-metrics", "ttft,tpot,itl,e2el",
        "--metric-percentiles", "50,90,99",
        *extra,
        "--save-result", "--result-dir", result_dir, "--result-filename", result_name,
    ]  # fmt: skip


def client_environ(served: Served, api_key: str | None) -> dict[str, str]:
    """The server's own environment (offline mode, caches, libraries), without its GPUs.

    The client needs none, and a CUDA context of it would be on a GPU without a lease.
    """
    environ = {**served.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    if api_key:
        environ["OPENAI_API_KEY"] = api_key
    return environ
