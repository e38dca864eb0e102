"""The front door's decisions: its configuration, its keys, its words."""

import base64
import json
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmwd.core import doorconfig, doorwords
from llmwd.core.doorkeys import KeyFileError, in_force, next_end_at, parse
from llmwd.vocab import NodePhase, Reason
from tests.workers.harness import server_fact

NAME = st.from_regex(r"\A[A-Za-z0-9][-_.A-Za-z0-9]{0,12}\Z")
SECRET = st.from_regex(r"\A[A-Za-z0-9_-]{1,40}\Z")
HASH = "$2a$04$" + "a" * 53


def token(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@given(NAME, NAME, SECRET)
def test_a_keys_beginning_is_its_names_and_no_others(name, other, secret):
    pattern = re.compile(doorconfig.beginning(name))
    assert pattern.match(token(f"{name}:{secret}"))
    assert (pattern.match(token(f"{other}:{secret}")) is not None) == (name == other)


def test_the_keys_that_count_are_those_that_have_not_expired():
    key = {"id": "1", "bcrypt": HASH, "created_at": 0.0}
    file = {"version": 1, "keys": [{"name": "a", **key}, {"name": "b", "expires_at": 50.0, **key}]}
    keys = parse("f", json.dumps(file).encode())
    assert [each.name for each in in_force(keys, 49.0)] == ["a", "b"] and next_end_at(keys, 49.0) == 50.0
    assert [each.name for each in in_force(keys, 50.0)] == ["a"] and next_end_at(keys, 50.0) is None


@pytest.mark.parametrize("keys", [
    '[{"name": "a:b", "id": "", "bcrypt": "%s", "created_at": 0}]' % HASH, '[{"name": "a", "id": "", "bcrypt": "x", "created_at": 0}]',
    '[{"name": "a"}]', "{", "[%s, %s]" % (('{"name": "a", "id": "", "bcrypt": "%s", "created_at": 0}' % HASH,) * 2),
])  # fmt: skip
def test_half_a_file_lets_nobody_in(keys):
    with pytest.raises(KeyFileError, match="/f"):
        parse("/f", b'{"version": 1, "keys": %s}' % keys.encode())


@pytest.mark.parametrize("phase, reason, code", [
    (NodePhase.serving, Reason.ready, "open"), (NodePhase.loading, Reason.loading, "loading"),
    (NodePhase.yielding, Reason.yielded_to_job, "yielded_to_job"), (NodePhase.waiting, Reason.unknown_job, "yielded_to_job"),
    (NodePhase.waiting, Reason.waiting_for_gpus, "waiting_for_gpus"), (NodePhase.held, Reason.held, "held"),
    (NodePhase.yielding, Reason.held, "held"), (NodePhase.yielding, Reason.switching, "loading"),
    (NodePhase.waiting, Reason.server_backoff, "loading"), (NodePhase.failed, Reason.server_failed, "failed"),
])  # fmt: skip
def test_each_state_has_the_code_that_people_know(phase, reason, code):
    state = doorwords.state_of(msgspec.structs.replace(server_fact(phase), reason=reason), 1000.0)
    assert (state.code, state.reachable, state.retry_after_s > 0) == (code, code == "open", True)
    error = json.loads(doorwords.error_body(state))["error"]
    assert error["code"] == (code if code != "open" else "loading") and error["param"] is None


def test_a_page_shows_a_models_name_and_runs_nothing_of_it():
    state = doorwords.state_of(msgspec.structs.replace(server_fact(NodePhase.serving), served_as="<script>x"), 1000.0)
    assert b"<script>x" not in doorwords.page(state) and b"&lt;script&gt;x" in doorwords.page(state)
