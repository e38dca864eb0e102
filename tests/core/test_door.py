"""The front door's decisions: its configuration, its keys, its words."""

import base64
import json
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmwd.core import doorconfig, doorpage, doorwords
from llmwd.core.doorwanted import Account, Wanted, shuts_out
from llmwd.core.doorkeys import KeyFileError, in_force, next_end_at, parse
from llmwd.messages import Gpu, GpusFact, Hold, JobClaim
from llmwd.vocab import Holder, NodePhase, Reason
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
    assert b"<script>x" not in doorpage.page(state) and b"&lt;script&gt;x" in doorpage.page(state)


def gpus(claims: tuple[JobClaim, ...], holders: str = "ssss", **fields: object) -> GpusFact:
    """holders: of each GPU, by its first letter."""
    words = {holder.value[0]: holder for holder in Holder}
    return GpusFact(**{
        "gpus": tuple(Gpu(index=n, uuid=str(n), holder=words[letter]) for n, letter in enumerate(holders)), "lease": None,
        "revocation": None, "claims": claims, "sources": (), "hold": None, "blocked": None, "detail": "", "node_states": (),
        "epoch": 1, "at_s": 0.0,
    } | fields)  # fmt: skip


def claim(indices: tuple[int, ...] | None, ends_at: float | None) -> JobClaim:
    return JobClaim(id="4711", gpus=indices, user="carla", ends_at=ends_at)


@pytest.mark.parametrize("claims, holders, wanted, free_at", [
    ((claim((0, 1, 2, 3), 500.0),), "ssss", 2, 500.0),
    ((claim((0, 1), 500.0), claim((2, 3), 300.0)), "ssss", 2, 300.0),
    ((claim((0, 1), 500.0), claim((2, 3), 300.0)), "ssss", 3, 500.0),
    ((claim((0, 1, 2), 500.0),), "sssf", 2, 500.0),
    ((claim((0, 1, 2), None), claim((3,), 300.0)), "ssss", 1, 300.0),
    ((claim((0, 1, 2), None), claim((3,), 300.0)), "ssss", 2, None),  # without a limit
    ((claim((0, 1), 500.0), claim((0, 1), 900.0)), "ssff", 3, 900.0),  # shared: the later one counts
    ((claim(None, 500.0),), "ssss", 1, None),  # it may have any
    ((claim((0, 1), 500.0),), "ssoo", 4, None),  # nobody knows when a stranger goes
    ((claim((0, 1), 500.0),), "ssff", 2, 0.0),  # there are enough
])  # fmt: skip
def test_the_model_is_expected_when_the_jobs_time_limits_leave_enough_gpus(claims, holders, wanted, free_at):
    assert doorwords.free_at(gpus(claims, holders), wanted) == free_at


def told(reason: Reason, phase: NodePhase, seen: GpusFact | None, now_at: float, **fields: object) -> doorwords.DoorState:
    return doorwords.state_of(msgspec.structs.replace(server_fact(phase), reason=reason, wanted_gpus=2, **fields), now_at, "", seen)


def test_an_estimate_is_what_is_known_and_none_where_something_is_not():
    seen = gpus((claim((0, 1, 2, 3), 2000.0),))
    away = told(Reason.yielded_to_job, NodePhase.waiting, seen, 1900.0, load_s=50.0)
    assert (away.expected_at, away.retry_after_s, away.by_limits) == (2050.0, 150, True)
    assert told(Reason.yielded_to_job, NodePhase.waiting, seen, 0.0, load_s=50.0).retry_after_s == doorwords.LATEST_S
    assert told(Reason.yielded_to_job, NodePhase.waiting, seen, 2051.0, load_s=50.0).expected_at is None  # it should be over by now
    assert told(Reason.yielded_to_job, NodePhase.waiting, None, 0.0, load_s=50.0).expected_at is None
    assert told(Reason.yielded_to_job, NodePhase.waiting, seen, 0.0).expected_at is None  # nobody knows how long it loads
    loading = told(Reason.loading, NodePhase.loading, seen, 120.0, started_at=100.0, load_s=60.0)
    assert (loading.expected_at, loading.retry_after_s, loading.by_limits) == (160.0, 40, False)
    assert told(Reason.loading, NodePhase.loading, seen, 120.0, started_at=100.0).expected_at is None


@pytest.mark.parametrize("until_at, claims, holders, expected_at, by_limits", [
    (700.0, (), "ffff", 710.0, False), (700.0, (claim((0, 1), 9000.0),), "ssff", 710.0, False),
    (700.0, (claim((0, 1, 2, 3), 500.0),), "ssss", 710.0, False), (700.0, (claim((0, 1, 2, 3), 9000.0),), "ssss", 9010.0, True),
    (700.0, (claim((0, 1, 2, 3), None),), "ssss", None, False), (700.0, (), "oooo", None, False), (None, (), "ffff", None, False),
    (float("inf"), (), "ffff", None, False), (float("nan"), (), "ffff", None, False), (1e300, (), "ffff", None, False),
    (-1.0, (), "ffff", None, False),
])  # fmt: skip
def test_after_a_hold_the_model_waits_for_the_jobs_as_well(until_at, claims, holders, expected_at, by_limits):
    state = told(Reason.held, NodePhase.held, gpus(claims, holders, hold=Hold(since_at=0.0, until_at=until_at)), 100.0, load_s=10.0)
    assert (state.expected_at, state.by_limits) == (expected_at, by_limits)
    assert (b"if the jobs before it take all their time" in doorpage.page(state)) == by_limits
    assert (b"if the jobs before it take all their time" in doorwords.error_body(state)) == by_limits


@pytest.mark.parametrize("reason, phase, code, words", [
    (Reason.node_draining, NodePhase.waiting, "waiting_for_gpus", "drained, reserved or in maintenance"),
    (Reason.no_evidence, NodePhase.waiting, "waiting_for_gpus", "cannot be told"),
    (Reason.gpu_unknown, NodePhase.waiting, "waiting_for_gpus", "cannot be told"),
    (Reason.gpu_in_use, NodePhase.waiting, "waiting_for_gpus", "Somebody else's program"),
    (Reason.memory_pressure, NodePhase.waiting, "waiting_for_gpus", "short of memory"),
    (Reason.resume_delay, NodePhase.waiting, "waiting_for_gpus", "about to be loaded"),
    (Reason.expected_job, NodePhase.waiting, "yielded_to_job", "needs the GPUs soon"),
    (Reason.unknown_job, NodePhase.waiting, "yielded_to_job", "may need the GPUs"),
    (Reason.budget_broken, NodePhase.held, "held", "stays down until its operator has looked"),
    (Reason.map_contradicted, NodePhase.held, "held", "stays down until its operator has looked"),
    (Reason.not_wanted, NodePhase.waiting, "held", "No model is to be served"),
    (Reason.stopping, NodePhase.yielding, "held", "being stopped"), (Reason.stopping, NodePhase.stopped, "held", "being stopped"),
    (Reason.worker_failed, NodePhase.waiting, "failed", "cannot be served"),
])  # fmt: skip
def test_what_jobs_limits_do_not_end_has_no_estimate_of_theirs_and_words_of_its_own(reason, phase, code, words):
    state = told(reason, phase, gpus((claim((0, 1, 2, 3), 36000.0),)), 100.0, load_s=50.0)
    assert (state.code, state.expected_at, state.by_limits, state.gap) == (code, None, False, False)
    for text in (doorwords.error_body(state), doorpage.page(state)):
        assert words.replace("'", "&#x27;" if b"<html" in text else "'").encode() in text
        assert b"The operator has taken" not in text and b"Expected" not in text


def test_every_reason_has_words_that_people_read_and_an_open_door_a_short_wait():
    for reason in Reason:
        assert told(reason, NodePhase.waiting, None, 100.0).told
    assert told(Reason.ready, NodePhase.serving, None, 100.0).retry_after_s == doorwords.SOON_S


def test_a_configuration_keeps_somebody_out_if_a_key_or_a_path_is_there_no_longer():
    alice, bob = Account("alice", HASH), Account("bob", HASH)
    base = Wanted(
        folder="f", socket="s", admin="a", port=1, tls=False, accounts=(alice, bob), allow=("/a",), body_mb=1, most=1, hold_s=0.0
    )
    but = lambda **changes: msgspec.structs.replace(base, **changes)
    for changes in ({"accounts": (alice,)}, {"accounts": ()}, {"allow": ()}, {"accounts": (alice, Account("bob", HASH[:-1] + "b"))}):
        assert shuts_out(base, but(**changes))
    assert not shuts_out(but(accounts=(alice,), allow=()), base)
    assert shuts_out(but(accounts=None), base) and not shuts_out(base, but(accounts=None))
    assert shuts_out(None, base) and not shuts_out(base, but(port=2, most=9, body_mb=9, hold_s=1.0, tls=True))


def test_nobody_outside_learns_whose_job_it_is():
    state = told(Reason.yielded_to_job, NodePhase.waiting, gpus((claim((0, 1, 2, 3), 2000.0),)), 1900.0, load_s=1.0, detail="job 4711 of carla")
    for text in (doorwords.error_body(state), doorwords.models_body(state), doorpage.page(state)):
        assert b"4711" not in text and b"carla" not in text and b"00:33" in text
