"""What cloudflared's words and its end mean, and when it is started again."""

import pytest

from llmwd.core import tunnelfaults
from llmwd.core.tunnelfaults import (
    Kind, death, edges, last_error, last_words, locations, metrics_address, refusals, retry_after_s, stuck,
)  # fmt: skip

LOG = """\
2026-11-23T19:15:00Z INF Starting tunnel tunnelID=6f0b2f36
2026-11-23T19:15:00Z INF Starting metrics server on 127.0.0.1:45787/metrics
2026-11-23T19:15:01Z ERR Register tunnel error from server side error="Unauthorized: Invalid tunnel secret" connIndex=0
2026-11-23T19:15:01Z INF Retrying connection in up to 2s connIndex=0
2026-11-23T19:15:02Z ERR Connection terminated connIndex=0
2026-11-23T19:15:02Z ERR no more connections active and exiting
"""


def test_the_address_of_the_metrics_server_is_found_in_the_log():
    assert metrics_address(LOG) == "127.0.0.1:45787"
    assert metrics_address("") is None and metrics_address("Starting metrics server on 10.0.0.1:80/metrics") is None


def test_the_cause_is_the_last_error_that_is_no_part_of_a_clean_stop():
    assert last_error(LOG).startswith("Register tunnel error from server side") and last_error("x\n") == ""
    assert len(last_error("2026-11-23T19:15:02Z ERR " + "y" * 900)) == tunnelfaults.LONGEST_ERROR


@pytest.mark.parametrize(
    ("printed", "cause"),
    [
        ("Provided Tunnel token is not valid.\nSee 'cloudflared tunnel run --help'.\n", "Provided Tunnel token is not valid."),
        ("Incorrect Usage: flag provided but not defined: -x\n\nNAME:\n   cloudflared tunnel\n", "Incorrect Usage: flag provided"),
        ("panic: runtime error\n\ngoroutine 1 [running]:\nmain.main()\n\t/x.go:1\n", "panic: runtime error"),
        ("", "Register tunnel error from server side"),
    ],
)
def test_what_it_prints_at_its_end_without_time_and_level_is_the_cause(printed, cause):
    told = last_words(f"{LOG}{printed}llmwd holder: server_exited: 1 processes signalled, 0 were alive after it\n")
    assert told.startswith(cause)


def test_what_it_prints_in_the_middle_is_no_cause():
    assert last_words(f"component status\nDNS ok\n{LOG}").startswith("Register tunnel error")


def test_refused_registrations_are_counted_since_cloudflared_never_ends_by_itself():
    assert refusals(LOG) == 1
    assert refusals('2026-11-23T19:15:01Z ERR Register tunnel error from server side error="try again"') == 0


@pytest.mark.parametrize(
    ("status", "error", "cause", "kind", "told"),
    [
        (0, "", "", Kind.permanent, "does not know our arguments"),
        (0, "", "grace-period must be equal or less than 3m0s", Kind.permanent, "does not know our arguments"),
        (255, "", "Provided Tunnel token is not valid.", Kind.permanent, "exit code 255"),
        (None, "no such file", "", Kind.permanent, "no such file"),
        (1, "", "Tunnel credentials file '/c.json' doesn't exist or is not a file", Kind.permanent, "exit code 1"),
        (1, "", "The last ingress rule must match all URLs", Kind.permanent, "ingress rule"),
        (1, "", "error parsing YAML in config file at /c.yml: yaml: line 2: did not find", Kind.permanent, "YAML"),
        (1, "", "grace-period must be equal or less than 3m0s", Kind.permanent, "grace-period"),
        (1, "", "Error opening metrics server listener: bind: address already in use", Kind.network, "already in use"),
        (1, "", "Unknown protocol udp, Available protocols: auto, http2, quic", Kind.permanent, "Unknown protocol"),
        (1, "", 'Register tunnel error from server side error="Unauthorized: Invalid"', Kind.permanent, "Unauthorized"),
        (1, "", 'Could not lookup srv records on _v2-origintunneld error="no such host"', Kind.network, "srv records"),
        (1, "", 'Register tunnel error from server side error="try again later"', Kind.network, "try again later"),
        (1, "", 'failed to request quick Tunnel: Post "https://x": dial tcp: lookup x', Kind.network, "quick Tunnel"),
        (1, "", "something nobody has seen yet", Kind.network, "nobody"),
        (-9, "", "", Kind.own, "killed by signal 9"),
        (None, "", "", Kind.own, "without a word"),
    ],
)
def test_an_unasked_end_is_permanent_of_the_network_or_its_own(status, error, cause, kind, told):
    for log in (f"2026-11-23T19:15:01Z ERR {cause}\n", f"{cause}\n"):
        found = death(status, error, log if cause else "", listened=False)
        assert found.kind is kind and told in found.how


def test_a_sigterm_of_somebody_elses_ends_it_with_0_and_is_no_fault_of_its_arguments():
    begun = death(0, "", LOG, listened=True)
    assert begun.kind is Kind.own and "as if somebody had asked it to" in begun.how
    early = "2026-11-23T19:15:00Z INF Initiating graceful shutdown due to signal terminated ...\n"
    assert death(0, "", early, listened=False).kind is Kind.own
    assert death(0, "", f"{LOG}Incorrect Usage: no such flag\n", listened=True).kind is Kind.permanent


def test_network_faults_are_tried_again_for_ever_with_a_wait_that_grows_to_its_bound():
    waits = [retry_after_s(faults, 1.0, 300.0, 0.5) for faults in (1, 2, 3, 9, 10, 5000)]
    assert waits == [1.0, 2.0, 4.0, 256.0, 300.0, 300.0]
    assert retry_after_s(5000, 1.0, 300.0, 0.0) == 150.0


@pytest.mark.parametrize(
    ("listening", "was", "down_s", "answers", "faults", "anew"),
    [
        (False, False, 74.0, False, 0, False),  # name servers that hang keep it from listening for 40 s
        (False, False, 76.0, False, 0, True),
        (True, True, 5.0, True, 0, False),
        (True, True, 7.0, True, 0, True),
        (True, True, 7.0, False, 0, False),
        (True, False, 7.0, True, 0, False),
        (True, False, 16.0, True, 0, True),
        (True, False, 16.0, True, 1, False),  # the last restart did not help either
        (True, False, 299.0, True, 5000, False),
        (True, True, 301.0, False, 5000, True),
    ],
)
def test_what_runs_without_a_connection_is_started_anew_once_that_helps(listening, was, down_s, answers, faults, anew):
    assert bool(stuck(listening, was, down_s, 0.0, answers, faults)) is anew


def test_a_metrics_server_that_gives_no_answer_is_given_time():
    assert stuck(True, True, 0.0, 59.0, False, 0) == ""
    assert "has not answered for 61 s" in stuck(True, True, 0.0, 61.0, False, 0)


def test_the_edges_addresses_and_the_places_are_read_from_its_own_words():
    log = "2026-11-23T19:15:01Z ERR Unable to establish connection. connIndex=0 event=0 ip=198.51.100.1\n"
    log += log.replace("100.1", "100.2") + "x ip=1 y ip=1.2.3.4.5"
    known = ("9.9.9.9", "198.51.100.1")
    assert edges(log, known, "http2") == ("198.51.100.2", "198.51.100.1", "9.9.9.9")
    assert edges(log, known, "auto") == edges(log, known, "quic") == ()  # that TCP answers says nothing of UDP
    line = 'cloudflared_tunnel_server_locations{connection_id="0",edge_location="%s"} %d\n'
    assert locations(line % ("fra03", 1) + line % ("ams01", 1) + line % ("cdg05", 0) + line % ("ams01", 1)) == ("ams01", "fra03")
