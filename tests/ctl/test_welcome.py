"""What start.sh ends with, for somebody who has never used llmwd."""

import json
import shlex

from llmwd.messages import Gpu, GpusFact
from llmwd.vocab import Holder
from tests.ctl.stand import Stand

ATTACH = ("welcome", "--attach", "tmux attach -t here")


def simulated(stand: Stand) -> GpusFact:
    return stand.gpus(gpus=tuple(Gpu(index=n, uuid=f"SIM-{n}", minor=n, holder=Holder.free) for n in range(4)))


def serve(stand: Stand) -> None:
    stand.profile("glm", "--served-model-name glm")
    stand.begin()


def test_the_chat_line_can_be_pasted_and_asks_for_the_likeliest_answer(stand: Stand) -> None:
    serve(stand)
    lines = stand.ctl(*ATTACH).stdout.splitlines()
    first = lines.index("Chat with it:") + 1
    words = shlex.split(" ".join(line.removesuffix("\\") for line in lines[first : first + 2]))
    assert words[:3] == ["curl", "-sS", "http://127.0.0.1:8000/v1/chat/completions"]
    body = json.loads(words[words.index("-d") + 1])
    assert body["model"] == "glm" and body["temperature"] == 0


def test_where_gpus_are_simulated_the_job_it_proposes_takes_all_of_them(stand: Stand) -> None:
    """With fewer, the model would only move to spare ones, and nobody would see it leave and wait."""
    serve(stand)
    stand.say(simulated(stand))
    assert "  bin/llmwd-ctl simulate job --gpus 0-3 --for 30s; bin/llmwd-ctl status" in stand.ctl(*ATTACH).stdout.splitlines()


def test_where_gpus_are_real_the_job_it_proposes_takes_only_ours(stand: Stand) -> None:
    serve(stand)
    assert "simulate job --gpus 2-3 --for 30s" in stand.ctl(*ATTACH).stdout


def test_it_proposes_a_drill(stand: Stand) -> None:
    serve(stand)
    assert "  bin/llmwd-ctl drill" in stand.ctl(*ATTACH).stdout.splitlines()


def test_everything_but_the_chat_line_fits_80_columns_and_ends_with_how_to_stop_it(stand: Stand) -> None:
    serve(stand)
    stand.say(simulated(stand))
    shown = stand.ctl(*ATTACH).stdout
    assert all(len(line) <= 80 for line in shown.splitlines() if "curl" not in line and " -d " not in line)
    assert shown.endswith("See its screen:\n  tmux attach -t here\nStop it:\n  bin/llmwd-ctl stop\n")
