"""Words, messages, settings, and Slurm's output, as the program itself understands them."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from llmwd import messages
from llmwd.config import SETTINGS
from llmwd.core import gres, lifecycle
from llmwd.ctl.explain import explain
from llmwd.ctl.explain import gres as gres_verb
from llmwd.vocab import NodePhase, Reason

CORPUS = Path(__file__).parent.parent / "data" / "gres_corpus.jsonl"
SINFO = "gpu:a100:2(IDX:0-1)   mixed\n"


def test_every_reason_and_phase_is_explained(stand):
    shown = stand.ctl("explain", "states").stdout
    for word in (*NodePhase, *Reason):
        assert word in shown
    told = json.loads(stand.ctl("explain", "states", "--json").stdout)
    assert told["Reason"] == {reason.value: reason.meaning for reason in Reason}
    assert len(told["lifecycle"]) == len(lifecycle.rows()) - 1


def test_every_message_is_explained_with_its_fields(stand):
    shown = stand.ctl("explain", "messages").stdout
    told = {each["name"]: each for each in json.loads(stand.ctl("explain", "messages", "--json").stdout)}
    kinds = [kind for kind in vars(messages).values() if isinstance(kind, type) and issubclass(kind, messages.Message)]
    for kind in set(kinds) - {messages.Message}:
        assert [field["name"] for field in told[kind.__name__]["fields"]] == list(kind.__struct_fields__)
        assert told[kind.__name__]["meaning"] and kind.__name__ in shown


def test_every_setting_is_explained(stand):
    shown = stand.ctl("explain", "settings").stdout
    told = {each["name"]: each for each in json.loads(stand.ctl("explain", "settings", "--json").stdout)}
    for spec in SETTINGS:
        assert spec.name in shown
        assert told[spec.name]["default"] == spec.default and told[spec.name]["meaning"]


@pytest.mark.parametrize("words", [("states",), ("settings",), ("messages",)])
def test_tables_fit_80_columns(stand, words):
    assert max(map(len, stand.ctl("explain", *words).stdout.splitlines())) <= 80


def test_gres_offers_the_forms_that_the_reader_has():
    [form] = [param for param in gres_verb.params if param.name == "form"]
    assert tuple(form.type.choices) == gres.FORMS


def test_gres_with_json_is_one_object_with_gpus_and_why(stand):
    done = stand.ctl("explain", "gres", "--form", "sinfo", "--node", "n1", "--json", text=SINFO)
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told.keys() == {"gpus", "why"}
    claim = gres.read("sinfo", SINFO, "n1")
    assert told["gpus"] == sorted(claim.gpus) == [0, 1]


def test_gres_that_cannot_be_decided_is_null_says_why_and_exits_0(stand):
    done = stand.ctl("explain", "gres", "--form", "stderr", "--node", "n1", "--json", text="slurm_load_jobs error: x\n")
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["gpus"] is None and told["why"]


def test_gres_for_people_is_a_sentence(stand, tmp_path):
    file = tmp_path / "text"
    file.write_text(SINFO)
    assert stand.ctl("explain", "gres", "--form", "sinfo", "--node", "n1", str(file)).stdout.startswith("GPUs 0-1 of n1")
    assert "counts as a conflict" in stand.ctl("explain", "gres", "--form", "job", "--node", "n1", text="?").stdout


def test_gres_reads_bytes_that_are_no_text(stand, tmp_path):
    file = tmp_path / "text"
    file.write_bytes(b"\xff\xfe\x00")
    done = stand.ctl("explain", "gres", "--form", "job", "--node", "n1", "--json", str(file))
    assert json.loads(done.stdout)["gpus"] is None


def test_gres_of_a_file_that_is_not_there_is_an_error_of_usage(stand):
    done = stand.ctl("explain", "gres", "--form", "job", "--node", "n1", "/does/not/exist")
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_gres_reads_every_form_that_was_collected_as_expected():
    """In this process: the same command, once for each sample."""
    for line in CORPUS.read_text().splitlines():
        sample = json.loads(line)
        words = ["gres", "--form", sample["form"], "--node", sample["node"], "--json"]
        words += ["--job", str(sample["jobid"])] if sample.get("jobid") else []
        done = CliRunner().invoke(explain, words, input=sample["text"])
        assert done.exit_code == 0, sample["name"]
        assert json.loads(done.stdout)["gpus"] == sample["expect"], sample["name"]
