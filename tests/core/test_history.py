"""A period's history from the journal's lines, whatever happened to the clocks, the machine and the lines."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmwd.core.history import History, percentiles, tell
from llmwd.core.journaled import read
from llmwd.core.telling import event_text, summary
from llmwd.core.timeline import EVENTS, PHASES, QUIET_EVENTS, UNKNOWN

DAY_S = 86400.0
NOW = 1_800_000_000.0
BOOT_AT = NOW - 3 * DAY_S  # when the machine of these journals was booted


def line(mono_s: float, event: str, worker: str = "vllm", boot_at: float = BOOT_AT, wall_s: float = 0.0, **details: object) -> bytes:
    """wall_s: how wrong the wall clock is."""
    return json.dumps({"at": boot_at + mono_s + wall_s, "mono_s": mono_s, "worker": worker, "event": event, **details}).encode()


def phase(mono_s: float, name: str, reason: str = "ready", **more: object) -> bytes:
    return line(mono_s, "phase", phase=name, reason=reason, detail="", **more)


def life(begin_s: float, epoch: int = 1, **more) -> list[bytes]:
    """Started, and serving on two GPUs 20 s later."""
    return [
        line(begin_s, "supervisor_started", "root", pid=1, version="1", **more),
        line(begin_s + 5, "lease_granted", "resolver", epoch=epoch, gpus=[6, 7], **more),
        line(begin_s + 5, "server_started", profile="glm", gpus=[6, 7], epoch=epoch, **more),
        phase(begin_s + 5, "loading", "loading", **more),
        phase(begin_s + 20, "serving", **more),
    ]


def leaving(seen_s: float, epoch: int = 1, job: str | None = "77", total_s: float = 0.5, **more) -> list[bytes]:
    """A yield to a job, told by all the lines there are."""
    end_s = seen_s + total_s
    return [
        line(seen_s + 0.1, "lease_revoked", "resolver", epoch=epoch, reason="yielded_to_job", detail="", job=job,
             seen_s=seen_s, resolved_s=seen_s + 0.1, revoked_s=seen_s + 0.1, **more),
        phase(seen_s + 0.1, "yielding", "yielded_to_job", **more),
        line(end_s, "released", reason="yielded_to_job", epoch=epoch, gpus=[6, 7], job=job, seen_s=seen_s,
             resolved_s=seen_s + 0.1, revoked_s=seen_s + 0.1, signalled_s=seen_s + 0.15, model_gone_s=seen_s + 0.25,
             gone_s=end_s - 0.1, killed_s=None, requests=3, **more),
        phase(end_s, "waiting", "yielded_to_job", **more),
        line(end_s, "release_proved", "resolver", epoch=epoch, gpus=[6, 7], reason="yielded_to_job", job=job,
             begun_s=seen_s, gone_s=end_s - 0.1, proved_s=end_s, took_s=total_s, budget_s=5.0, within_budget=True, **more),
    ]  # fmt: skip


def seen(mono_s: float, first: str, seen_s: float, epoch: int = 1, **lags: float) -> bytes:
    return line(mono_s, "job_seen", "resolver", epoch=epoch, job="77", first=first, seen_s=seen_s, lags=lags)


def told(rows: list[bytes], days: float = 7, running: bool = False, now_at: float = NOW, now_mono_s: float | None = None) -> History:
    return tell(read(rows, now_at, now_mono_s), now_at - days * DAY_S, now_at, running)


def test_a_yield_has_every_part_from_the_end_of_the_one_before() -> None:
    one, = told(life(1000) + leaving(2000)).yields
    parts = (one.resolve_s, one.revoke_s, one.signal_s, one.model_s, one.tree_s, one.driver_s, one.total_s)
    assert parts == pytest.approx((0.1, 0.0, 0.05, 0.1, 0.15, 0.1, 0.5), abs=1e-6)
    assert (one.job, one.reason, one.gpus, one.requests, one.proved, one.broken, one.killed) == ("77", "yielded_to_job", (6, 7), 3, True, False, False)
    assert one.at == pytest.approx(BOOT_AT + 2000) and one.while_phase == "serving" and one.budget_s == 5.0


def switched(seen_s: float) -> list[bytes]:
    """Another model on the same lease, and then its end for a job, up to the revocation."""
    return life(1000) + [
        line(1500, "released", reason="switching", epoch=1, gpus=[6, 7], signalled_s=1499.0, model_gone_s=1499.5, gone_s=1500.0, requests=9),
        line(1501, "server_started", profile="b", gpus=[6, 7], epoch=1), phase(1501, "loading", "loading"), phase(1520, "serving"),
        *leaving(seen_s)[:2],
    ]  # fmt: skip


def test_the_end_of_a_server_for_another_one_is_not_the_end_of_the_next_on_the_same_lease() -> None:
    one, = told(switched(2000)).yields
    assert (one.overlap_s, one.ended, one.requests, one.signal_s, one.ran) == (None, False, None, None, True)
    proof = leaving(2000, total_s=4.0)[-1]  # the line about the second server's end is lost
    one, = told([*switched(2000), proof]).yields
    assert one.overlap_s == pytest.approx(3.9) and one.total_s == pytest.approx(4.0) and one.requests is None


def test_without_a_driver_the_end_of_the_tree_is_the_proof_and_nothing_is_said_of_the_driver() -> None:
    rows = life(1000) + leaving(2000)
    by_tree = [*rows[:-1], rows[-1].replace(b'"budget_s"', b'"proved_by": "tree", "budget_s"')]
    one, = told(by_tree).yields
    assert (one.proved, one.proved_by, one.driver_s) == (True, "tree", None) and one.total_s == pytest.approx(0.5)
    assert "driver_s" not in told(by_tree).sums.parts and "driver_s" in told(rows).sums.parts
    by_driver, = told([*rows[:-1], rows[-1].replace(b'"budget_s"', b'"proved_by": "driver", "budget_s"')]).yields
    assert by_driver.proved_by == "driver" and by_driver.driver_s == pytest.approx(0.1)


def test_of_two_lines_about_who_saw_the_job_the_later_counts_unless_its_writer_came_after_the_first_sign() -> None:
    first, last = seen(2000.1, "stepd", 2000.0), seen(2035, "stepd", 2000.0, procfs=3.0)
    assert told(life(1000) + leaving(2000) + [first, last]).yields[0].lags == {"procfs": 3.0}
    reborn = seen(2040, "procfs", 2010.0)
    one, = told(life(1000) + leaving(2000) + [first, reborn]).yields
    assert (one.first, one.overlap_s) == ("stepd", pytest.approx(0.4))


def test_what_older_lines_do_not_tell_is_not_made_up() -> None:
    rows = [
        line(50, "lease_revoked", "resolver", epoch=4, reason="yielded_to_job", job="9", seen_s=50.0, resolved_s=None, revoked_s=50.1),
        line(51, "released", epoch=4, reason="yielded_to_job", gpus=[1], job="9", signalled_s=50.2, gone_s=50.9),
    ]
    one, = told(rows).yields
    assert (one.resolve_s, one.driver_s, one.requests, one.proved, one.budget_s) == (None, None, None, False, None)
    assert one.total_s == pytest.approx(0.9) and one.ended


def test_the_overlap_begins_with_the_jobs_first_sign_on_the_node_and_is_never_guessed_shorter() -> None:
    def overlap(*witnesses: bytes) -> float:
        one, = told(life(1000) + leaving(2000) + list(witnesses)).yields
        return one.overlap_s

    assert overlap() == pytest.approx(0.4)  # from the first sign there is, to the last process: not to the driver's proof
    assert overlap(seen(2001, "stepd", 2000.0, cgroup2=0.1)) == pytest.approx(0.4)
    # slurmctld said it before there was a process of the job
    assert overlap(seen(2001, "gresused", 2000.0, cgroup2=0.15, stepd=0.1)) == pytest.approx(0.3)
    assert overlap(seen(2001, "gresused", 2000.0, stepd=3.0)) == 0
    assert overlap(seen(2001, "gresused", 2000.0)) == pytest.approx(0.4)
    assert overlap(seen(2001, "gresused", 2000.0, procfs=0.3)) == pytest.approx(0.4)  # a slow look comes late
    # The prolog's word, too, comes before the job; a driver or a look at /proc that was first saw the job itself.
    assert overlap(seen(2001, "prolog", 2000.0, gresused=0.05, stepd=0.3)) == pytest.approx(0.1)
    assert overlap(seen(2001, "prolog", 2000.0)) == overlap(seen(2001, "prolog", 2000.0, nvml=0.3)) == pytest.approx(0.4)
    assert overlap(seen(2001, "nvml", 2000.0, stepd=3.0)) == overlap(seen(2001, "procfs", 2000.0, cgroup2=3.0)) == pytest.approx(0.4)
    assert overlap(seen(2001, "gresused", 2000.0, nvml=0.1, stepd=0.3)) == pytest.approx(0.3)


def test_a_process_on_the_gpu_that_was_a_jobs_is_told_as_a_yield_to_that_job() -> None:
    rows = [row.replace(b'"yielded_to_job"', b'"gpu_in_use"') for row in life(1000) + leaving(2000, job=None)]
    one, = told(rows).yields
    assert (one.job, one.overlap_s) == (None, None)
    one, = told([*rows, seen(2000.1, "nvml", 2000.0), seen(2020.0, "nvml", 2000.0, stepd=1.5)]).yields
    assert (one.job, one.first, one.lags, one.overlap_s) == ("77", "nvml", {"stepd": 1.5}, pytest.approx(0.4))
    line = read([seen(2020.0, "nvml", 2000.0, stepd=1.5, prolog=2.0)], NOW).lines[0]
    assert event_text(line) == "job 77 was seen first by nvml, stepd +1.50 s, prolog +2.00 s"


def test_workers_that_write_beside_one_another_change_nothing() -> None:
    rows = life(1000)
    rows[1:4] = rows[2], rows[3], rows[1]  # the lease is told last
    left = leaving(2000)
    left[0], left[1] = left[1], left[0]
    one, = told(rows + left).yields
    assert one.ran and one.while_phase == "serving" and one.overlap_s == pytest.approx(0.4)
    one, = told(rows[:-1] + left).yields
    assert one.while_phase == "loading"


def test_a_lease_on_which_nothing_was_started_overlaps_with_nothing() -> None:
    rows = [line(10, "lease_granted", "resolver", epoch=1, gpus=[0]), *leaving(20)[:1]]
    one, = told(rows).yields
    assert one.overlap_s == 0 and one.ended and not one.ran


def test_who_waits_for_nobody_is_no_yield() -> None:
    rows = life(1000) + [
        line(2000, "lease_revoked", "resolver", epoch=1, reason="switching", detail="", job=None, revoked_s=2000.0),
        line(2001, "released", reason="switching", epoch=1, gpus=[6, 7], signalled_s=2000.0, gone_s=2001.0),
    ]
    history = told(rows)
    assert history.yields == () and history.sums.gpu_hours["harvested"] == pytest.approx(2 * 995 / 3600)


def test_the_sums_of_a_day() -> None:
    rows = life(1000) + leaving(2020) + [phase(2020.5, "waiting", "yielded_to_job")]
    rows += [
        line(3000, "lease_granted", "resolver", epoch=2, gpus=[4, 5]), phase(3000, "loading", "loading"), phase(3015, "serving"),
        line(4000, "held", "resolver", by="a", until_at=None, reason="held", detail=""),
        line(4000, "lease_revoked", "resolver", epoch=2, reason="held", detail="ordered by a", job=None, revoked_s=4000.0),
        phase(4000, "yielding", "held"), line(4001, "released", reason="held", epoch=2, gpus=[4, 5], signalled_s=4000.1, gone_s=4001.0),
        phase(4001, "held", "held"), line(5000, "server_died", how="x"), line(6001, "supervisor_stopped", "root", pid=1),
    ]  # fmt: skip
    sums = told(rows).sums
    assert sums.phases_s["serving"] == pytest.approx(1000.1 + 985) and sums.phases_s["loading"] == pytest.approx(30)
    assert sums.parked_s == {"held": pytest.approx(2000)} and sums.waiting_s["yielded_to_job"] == pytest.approx(979.5)
    assert sums.gpu_hours == pytest.approx({
        "harvested": 2 * (1015.1 + 1000) / 3600, "serving": 2 * 1985.1 / 3600, "loading": 2 * 30 / 3600, "parked": 2 * 2000 / 3600,
    })  # fmt: skip
    assert (sums.yields, sums.conflicts, sums.reasons) == (2, 1, {"held": 1, "yielded_to_job": 1})
    assert (sums.requests_cut, sums.requests_untold, sums.deaths, sums.starts, sums.lost) == (3, 1, 1, 1, 0)
    assert sums.up_s == pytest.approx(5001) and sums.recorded_s == pytest.approx(NOW - BOOT_AT - 1000)


def test_parked_are_as_many_gpus_as_it_had_last_while_they_are_free() -> None:
    rows = life(0) + [line(100, "gpus", "resolver", llmwd=[6, 7], free=[0, 1, 2])]
    rows += [line(1000, "lease_revoked", "resolver", epoch=1, reason="held", detail="", job=None, revoked_s=1000.0), phase(1000, "held", "held")]
    rows += [line(1000, "gpus", "resolver", free=[0, 1, 2, 6, 7]), line(4600, "gpus", "resolver", slurm=[0, 1, 2, 6], free=[7])]
    rows += [line(8200, "gpus", "resolver", slurm=[0, 1, 2, 6, 7]), line(11800, "supervisor_stopped", "root")]
    assert told(rows).sums.gpu_hours["parked"] == pytest.approx(2 + 1 + 0)


def test_who_had_the_gpus_is_told_from_line_to_line() -> None:
    rows = life(0) + [line(100, "gpus", "resolver", slurm=[0, 1, 2], free=[3, 4, 5], llmwd=[6, 7]), line(3700, "gpus", "resolver", slurm=[0])]
    rows += [line(7300, "supervisor_stopped", "root")]
    hours = told(rows).sums.users_gpu_hours
    assert (hours["slurm"], hours["free"], hours["llmwd"]) == pytest.approx((4, 3, 2))


def test_a_running_supervisor_goes_on_doing_what_it_did_last() -> None:
    history = told(life(1000), running=True, now_mono_s=3 * DAY_S)
    assert history.spans[-1].phase == "serving" and history.spans[-1].end_at == NOW
    assert history.sums.phases_s["serving"] == pytest.approx(3 * DAY_S - 1020)


def test_what_a_supervisor_did_after_its_last_line_is_not_known() -> None:
    history = told([*life(1000), line(1500, "gpus", "resolver", llmwd=[6, 7])])
    assert history.sums.phases_s["serving"] == pytest.approx(480) and history.spans[-1].phase == UNKNOWN
    again = told(life(1000) + life(9000, epoch=2), running=True, now_mono_s=3 * DAY_S)
    assert [span.phase for span in again.spans] == ["waiting", "loading", "unknown", "waiting", "loading", "serving"]
    assert again.sums.lost == 1


def test_a_reboot_begins_the_clock_anew_and_adds_nothing_negative() -> None:
    boot_at = BOOT_AT + DAY_S
    rows = life(50_000) + leaving(60_000) + life(100, epoch=1, boot_at=boot_at) + leaving(900, epoch=1, boot_at=boot_at, total_s=0.7)
    history = told(rows)
    assert [one.total_s for one in history.yields] == pytest.approx([0.5, 0.7])
    assert history.sums.lost == 1 + 1 and all(span.long_s > 0 for span in history.spans)
    assert history.sums.phases_s["serving"] == pytest.approx(9980.1 + 780.1)


def test_a_reboot_is_known_by_the_boots_name_where_both_clocks_have_only_gone_on() -> None:
    first_at, second_at = NOW - 6 * DAY_S, NOW - 5 * DAY_S  # up for an hour; then for two days before llmwd is started
    rows = life(1000, boot_at=first_at, boot_id="a") + leaving(3600, boot_at=first_at)
    rows += [line(2 * DAY_S, "supervisor_started", "root", boot_at=second_at, boot_id="b"), phase(2 * DAY_S + 10, "waiting", boot_at=second_at)]
    history = told(rows, running=True, now_mono_s=5 * DAY_S)
    assert history.yields[0].at == pytest.approx(first_at + 3600) and history.sums.recorded_s == pytest.approx(NOW - first_at - 1000)
    assert history.sums.phases_s[UNKNOWN] == pytest.approx(3 * DAY_S - 3600.5, abs=1)
    same = told([row.replace(b'"b"', b'"a"') for row in rows], running=True, now_mono_s=5 * DAY_S)
    assert same.yields[0].at == pytest.approx(second_at + 3600)  # one boot: a clock that was set says nothing


def test_a_dead_lifes_leases_are_not_the_next_ones() -> None:
    rows = life(1000) + [line(2000, "supervisor_started", "root", pid=2), line(2005, "lease_granted", "resolver", epoch=1, gpus=[2])]
    one, = told([*rows, *leaving(2010)[:1]]).yields
    assert (one.ran, one.gpus, one.while_phase, one.overlap_s) == (False, (2,), "waiting", 0)


def test_a_lease_that_ran_out_is_harvested_no_longer() -> None:
    rows = life(1000) + [line(2000, "released", reason="lease_expired", epoch=1, gpus=[6, 7], signalled_s=1999.0, gone_s=2000.0)]
    sums = told([*rows, phase(2000, "waiting", "lease_expired")], running=True, now_mono_s=3 * DAY_S).sums
    assert sums.gpu_hours["harvested"] == pytest.approx(2 * 995 / 3600)
    kept = [rows[-1].replace(b"lease_expired", b"server_backoff"), line(2010, "supervisor_stopped", "root")]
    assert told(rows[:-1] + kept).sums.gpu_hours["harvested"] == pytest.approx(2 * 1005 / 3600)


@pytest.mark.parametrize("wrong_s", [-3600.0, 3600.0, 40 * DAY_S])
def test_a_wall_clock_that_jumps_changes_no_duration(wrong_s: float) -> None:
    rows = life(1000) + leaving(2000, wall_s=wrong_s) + [line(3000, "supervisor_stopped", "root")]
    history = told(rows)
    assert history.sums.phases_s["serving"] == pytest.approx(980.1) and history.yields[0].total_s == pytest.approx(0.5)
    assert history.yields[0].at == pytest.approx(BOOT_AT + 2000)  # the clock was right again at the end
    ahead = told(life(1000, wall_s=wrong_s) + leaving(2000, wall_s=wrong_s) + [line(3000, "supervisor_stopped", "root", wall_s=wrong_s)], days=60)
    assert ahead.sums.phases_s["serving"] == pytest.approx(980.1) and ahead.spans[-1].end_at <= NOW


def test_a_line_that_was_written_late_disturbs_nothing() -> None:
    late = [*life(1000)[:-1], phase(1030, "serving"), line(1029.9, "notice_failed", "notifier"), *leaving(2000)]
    assert told(late).sums.phases_s["serving"] == pytest.approx(970.1)


def test_lines_that_cannot_be_read_are_counted_and_never_fatal() -> None:
    rows = [b"", b"{", b"\xff\x00", b"[]", b'"a"', b'{"at": 1}', line(1, "x")[:-5], b'{"at": -1, "mono_s": 1, "event": "phase"}',
            b'{"at": 1, "mono_s": NaN, "event": "phase"}', line(3, "from_the_future", a=1), *life(1000), *leaving(2000)]  # fmt: skip
    history = told(rows)
    assert (history.broken_lines, history.unknown_events, len(history.yields)) == (8, 1, 1)


def test_a_release_whose_end_is_missing_says_so() -> None:
    history = told(life(1000) + leaving(2000)[:1])
    assert (history.sums.unfinished, history.yields[0].total_s) == (1, None)
    assert any("not recorded" in sentence for sentence in summary(history))


def test_only_the_period_counts_but_the_state_at_its_beginning_is_known() -> None:
    rows = life(1000) + [line(3 * DAY_S - 1, "notice_failed", "notifier")]
    history = told(rows, days=1, running=True, now_mono_s=3 * DAY_S)
    assert history.sums.phases_s["serving"] == pytest.approx(DAY_S) and history.sums.starts == 0


def test_a_broken_budget_is_told_by_either_line() -> None:
    broken = line(2006, "budget_broken", "resolver", epoch=1, job="77", left="", detail="too long")
    late = leaving(2000, total_s=6.0)
    late[-1] = late[-1].replace(b'"within_budget": true', b'"within_budget": false')
    for rows in ([*leaving(2000), broken], late, [*late, broken]):
        sums = told(life(1000) + rows).sums
        assert (sums.budget_broken, sums.yields) == (1, 1)
    assert any("longer than it may" in sentence for sentence in summary(told(life(1000) + late)))


def test_simulated_jobs_are_told_apart() -> None:
    rows = life(1000) + leaving(2000) + [seen(2001, "sim", 2000.0)]
    assert told(rows).sums.simulated == 1
    rows = life(1000) + leaving(2000) + [line(2010, "drill", "ctl", epoch=1, job="77", passed=True, verdict="fine", took_s=0.5, budget_s=5.0)]
    history = told(rows)
    assert history.sums.simulated == 1 and history.drill.passed and history.drill.took_s == 0.5


def test_simulated_jobs_have_percentiles_and_an_overlap_of_their_own() -> None:
    rows = life(1000) + leaving(2000, total_s=0.5)
    rows += [phase(2000.5, "waiting"), *life(3000, epoch=2)[1:], *leaving(4000, epoch=2, total_s=3.0), seen(4001, "sim", 4000.0, epoch=2)]
    sums = told(rows).sums
    assert (sums.yields, sums.simulated, sums.parts["total_s"].max, sums.simulated_parts["total_s"].max) == (2, 1, 0.5, 3.0)
    assert (sums.worst_overlap_s, sums.overlap_s, sums.simulated_overlap_s) == (pytest.approx(0.4), pytest.approx(0.4), pytest.approx(2.9))
    words = " ".join(summary(told(rows)))
    assert "Half of the real ones were over within 0.50 s, the longest took 0.50 s (job 77)" in words
    assert "Half of the simulated ones were over within 3.00 s" in words and "a simulated job's first sign" in words


def test_the_last_drill_is_told_however_long_ago_it_was() -> None:
    rows = [line(1, "supervisor_started"), line(100, "drill", "ctl", epoch=1, job="900001", passed=True, verdict="fine", while_phase="serving")]
    history = told(rows, days=1)
    assert history.drill.at == pytest.approx(BOOT_AT + 100) and history.drill.at < history.begin_at and history.drill.while_phase == "serving"


def test_a_percentile_is_a_measured_value() -> None:
    assert percentiles([]) is None and percentiles([None]) is None
    found = percentiles([*map(float, range(1, 101)), None])
    assert (found.count, found.p50, found.p90, found.p99, found.max) == (100, 50, 90, 99, 100)
    assert percentiles([3.0, 1.0]).p50 == 1.0


def test_nothing_at_all_is_an_empty_history() -> None:
    history = told([])
    assert history.spans[0].phase == UNKNOWN if history.spans else summary(history) == ["Nothing is recorded in this period."]
    assert history.sums.yields == 0


def test_text_in_a_line_does_nothing_to_a_terminal_and_absurd_numbers_are_not_told() -> None:
    odd = line(1, "resumed", by="\x1b[2Jmallory\u009b\n", epoch=10**400, took_s=1e300, gone_s=1.7e308)
    told_line, = read([odd], NOW).lines
    assert told_line.text("by") == r"\x1b[2Jmallory\x9b\n" and event_text(told_line) == r"resumed by \x1b[2Jmallory\x9b\n"
    assert [told_line.number(name) for name in ("epoch", "took_s", "gone_s")] == [None, None, None]
    other, = read([line(1, "\x1b[31mnew", x=1e300, y="\x07", z=3)], NOW).lines
    assert event_text(other) == r"\x1b[31mnew: y=\x07, z=3"


ODD = (None, -5, 0, 1, 1e300, 1.7e308, 10**30, "\x1b\x00", 400_000, -10.5, 1999.5, 2000.0, 250_000.25, "", "a", True, [1], {"stepd": 0.1, "sim": None, "x": "y"})
CHOICES = {
    "epoch": (0, 1, 2, 3, *ODD), "gpus": ([], [0, 1], [6, 7, -1, "x"], *ODD), "phase": (*PHASES, "x", None), "job": ("77", None, 77),
    "reason": ("held", "yielded_to_job", "switching", "x", 1), "first": ("sim", "stepd", "gresused", 3), "slurm": ([0, 1], 1),
} | dict.fromkeys(("seen_s", "revoked_s", "gone_s", "proved_s", "signalled_s", "budget_s", "within_budget", "requests", "lags"), ODD)


@given(st.integers(0, 2**32), st.booleans(), st.floats(0.01, 10))
def test_whatever_the_lines_say_no_sum_exceeds_the_period_and_nothing_is_negative(seed: int, running: bool, days: float) -> None:
    dice = random.Random(seed)
    rows = [
        (dice.uniform(0, 3 * DAY_S), dice.choice((0.0, 3600.0, dice.uniform(-3, 3) * DAY_S)), dice.choice([*EVENTS, *QUIET_EVENTS, "else"]),
         {name: dice.choice(values) for name, values in CHOICES.items() if dice.random() < 0.7})
        for _ in range(dice.randrange(30))
    ]  # fmt: skip
    if dice.random() < 0.5:
        rows.sort(key=lambda row: row[0])
    encoded = [
        json.dumps({**details, "at": NOW - 2 * DAY_S + mono_s + wall_s, "mono_s": mono_s, "worker": "a", "event": event}).encode()
        for mono_s, wall_s, event, details in rows
    ]
    history = told(encoded, days, running, now_mono_s=3 * DAY_S if running else None)
    sums = history.sums
    assert sum(sums.phases_s.values()) <= sums.period_s + 1e-3 and sums.recorded_s <= sums.period_s + 1e-3
    assert sums.gpu_hours["harvested"] * 3600 <= 10 * sums.period_s + 1e-3
    assert all(before.end_at <= after.begin_at for before, after in zip(history.spans, history.spans[1:]))
    assert all(span.long_s > 0 for span in history.spans)
    for one in history.yields:
        assert min([part for part in (one.resolve_s, one.tree_s, one.total_s, one.overlap_s) if part is not None], default=0) >= 0
    assert all(summary(history)) and all(isinstance(event_text(each), str) for each in read(encoded, NOW).lines)
