"""The short versions of the proofs that run for long; the long ones are programs: `python -m tests.proofs.NAME`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.brokers import NotInstalled
from tests.proofs import clock, damage, disk_faults, kills, memory, power_cuts, throughput, whole_slide
from tests.proofs.proving import prove


@pytest.mark.timeout(300)
def test_at_full_rate_with_faults_the_agent_keeps_no_frames(tmp_path: Path) -> None:
    """Half a minute shows gross leaks only: frames that are kept would be some 50 MB."""
    try:
        figures = memory.run(tmp_path, minutes=0.6, seed=1)
    except NotInstalled as error:
        pytest.skip(str(error))
    assert figures.fields > 0
    assert sum(figures.faults.values()) > 0
    assert figures.added_mb < 25, str(figures)


def memory_figures(*sample_mb: float) -> memory.Figures:
    """An hour in which samples, two minutes each, add so much to 100 MB while they last."""
    rss_mb = tuple(100 + mb * second / 120 for mb in sample_mb for second in range(120))
    return memory.Figures(60, rss_mb, 1, 1, Counter(), 0)


def test_a_longer_sample_is_no_leak_and_what_stays_after_each_one_is() -> None:
    assert memory_figures(*[3] * 20, *[6] * 10).is_flat
    leak = memory.Figures(60, tuple(100 + second / 3600 * 1.2 for second in range(3300)), 1, 1, Counter(), 0)
    assert not leak.is_flat
    assert leak.mb_per_hour == pytest.approx(1.2, abs=0.1)
    assert leak.medians_mb == pytest.approx((100.14, 100.41, 100.69, 100.96), abs=0.01)


@pytest.mark.timeout(120)
def test_a_piece_of_a_whole_slide_is_counted_once() -> None:
    figures = whole_slide.run(fields=25)
    assert figures.faults == [], str(figures)
    assert figures.score.truth["red"] > 200


def test_the_proof_of_a_whole_slide_sees_a_map_that_grows_and_cells_that_count_twice() -> None:
    figures = whole_slide.Figures(memory_mb=[(5000, 70.0), (6000, 72.0), (7000, 90.0)])
    figures.score.truth.update(nucleated=100, red=100)
    figures.score.unique.update(nucleated=102, red=97)
    assert figures.faults == [
        "the map took 90.0 MB, the bound is 80",
        "it grows by 10.00 MB a thousand fields, the bound is 1",
        "nucleated cells: +2.00%, the bound is 1%",
    ]


# By name only: libfaketime turns the absolute deadlines of sleeps and waits by the new offset. On an idle machine the
# agent may die of a refused sleep in the moment of a step, which no real clock brings about.
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_clock_that_is_set_back_and_forth_by_a_year_costs_no_result_and_no_order(tmp_path: Path) -> None:
    try:
        verdict = clock.run(tmp_path, fields=3)
    except NotInstalled as error:
        pytest.skip(str(error))
    assert verdict.faults == (), str(verdict)
    assert verdict.boots == 2


def test_after_a_power_cut_the_outbox_opens_whole_with_all_that_was_stored(tmp_path: Path) -> None:
    try:
        verdict = power_cuts.run(tmp_path, cuts=60, seed=1)
    except NotInstalled as error:
        pytest.skip(str(error))
    assert verdict.faults == [], str(verdict)
    assert verdict.unsynced > 30


def test_the_rig_of_power_cuts_sees_a_disk_that_lies_about_having_synced(tmp_path: Path) -> None:
    try:
        verdict = power_cuts.run(tmp_path, cuts=20, seed=1, lies=True)
    except NotInstalled as error:
        pytest.skip(str(error))
    assert verdict.faults, str(verdict)


@pytest.mark.timeout(300)
def test_a_damaged_outbox_gives_back_all_that_is_unhurt(tmp_path: Path) -> None:
    verdict = damage.run(tmp_path, seeds=25, first=10_000)
    assert verdict.faults == [], str(verdict)
    assert verdict.salvaged > 3


@pytest.mark.timeout(300)
def test_delivery_that_is_killed_loses_nothing_and_halves_nothing(tmp_path: Path) -> None:
    try:
        verdict = kills.run(tmp_path, kills=len(kills.LABELS) + 4, seed=1)
    except NotInstalled as error:
        pytest.skip(str(error))
    assert verdict.faults == [], str(verdict)
    assert verdict.promised > 0


@pytest.mark.timeout(300)
def test_a_disk_that_fails_at_any_operation_stops_intake_with_an_alert_and_costs_nothing(tmp_path: Path) -> None:
    try:
        verdict = disk_faults.run(tmp_path, every=41)
    except NotInstalled as error:
        pytest.skip(str(error))
    assert verdict.faults == [], str(verdict)
    assert verdict.stops > 3
    assert verdict.starts > 1
    assert verdict.stored > 500


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_disk_that_fails_at_every_single_operation_costs_nothing(tmp_path: Path) -> None:
    assert disk_faults.run(tmp_path).faults == []


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_the_long_proofs_of_the_outbox(tmp_path: Path) -> None:
    for name in ("cuts", "kills", "damage"):
        (tmp_path / name).mkdir()
    assert power_cuts.run(tmp_path / "cuts", cuts=15_000).faults == []
    assert kills.run(tmp_path / "kills", kills=1000).faults == []
    assert damage.run(tmp_path / "damage", seeds=1000).faults == []


def test_a_proof_that_saw_a_fault_fails_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    verdict = damage.Verdict(seeds=1)
    assert prove(lambda _folder: verdict, name="short", is_in_memory=False) == 0
    assert "0 faults" in capsys.readouterr().out
    verdict.faults.append("seed 0: row 3 is missing")
    assert prove(lambda _folder: verdict, name="short", is_in_memory=True) == 1
    assert "1 faults\n  seed 0: row 3 is missing" in capsys.readouterr().out


def test_a_proof_that_lacks_what_it_needs_is_not_taken_for_passed(capsys: pytest.CaptureFixture[str]) -> None:
    def run(_folder: Path) -> damage.Verdict:
        raise NotInstalled("gcc is missing")

    assert prove(run, name="short", is_in_memory=False) == 2
    assert "gcc is missing" in capsys.readouterr().err


@pytest.mark.timeout(300)
def test_the_throughput_is_measured_and_what_is_below_a_bound_is_a_fault(tmp_path: Path) -> None:
    """In short it says nothing of the bounds, least on a busy machine; that it measures is seen."""
    try:
        verdict = throughput.run(tmp_path, backlog=300, rows=2000, seconds=0.5)
    except NotInstalled as error:
        pytest.skip(str(error))
    assert verdict.field_bytes > 5000
    assert len(verdict.intake) == 3
    assert min(min(intake.per_s, intake.bare_per_s, intake.cpu_ms) for intake in verdict.intake.values()) > 0
    assert len(verdict.costs) == throughput.ROUNDS + 1
    assert verdict.rows >= 2000
    assert verdict.shares
    assert min(*verdict.drain_cpu_ms, *verdict.paho_cpu_ms) > 0
    assert max(verdict.growth_mb.values()) < throughput.MOST_GROWTH_MB, str(verdict)
    below = throughput.Verdict(
        intake={throughput.FIELDS: throughput.Intake(999, 2000, 0.5, 0.1)}, costs=[1.0, 1.6], shares=[0.7, 0.79, 0.9]
    )
    below.growth_mb["draining"] = 17.0
    below.judge()
    assert len(below.faults) == 4, str(below)
    for per_s, bare_per_s, faults in ((1001, 2000, 0), (999, 2000, 1), (799, 800, 1)):
        verdict = throughput.Verdict(intake={throughput.FIELDS: throughput.Intake(per_s, bare_per_s, 0.5, 0.1)})
        verdict.judge()
        assert len(verdict.faults) == faults, str(verdict)


@pytest.mark.soak
@pytest.mark.timeout(14_400)
def test_the_throughput_keeps_its_bounds(tmp_path: Path) -> None:
    verdict = throughput.run(tmp_path, backlog=100_000, rows=1_000_000, seconds=20)
    assert verdict.faults == [], str(verdict)
