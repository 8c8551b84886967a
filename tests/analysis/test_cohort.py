"""Groups by age band: what is told of them, and what is not."""

from __future__ import annotations

from typing import Any

import pytest

from agent import cli
from agent.analysis import cohort
from agent.analysis.cohort import Group, Line, SampleFacts, compare
from agent.domain import AgeBand


def make_facts(number: int = 0, age_band: AgeBand | None = "adult", **changes: Any) -> SampleFacts:
    named: dict[str, Any] = {
        "accession": f"A-{number}",
        "models": "cls 1",
        "leukocytes": 100,
        "shares_pct": {"round": 40.0 + number, "lobed": 60.0 - number},
        "per_100": {"young": 1.0},
        "flags": {"round": "within"},
        "unidentified": 5,
        "nucleated": 95,
        "fields": 30,
        "refused": {"blurred": 10},
        "confidence_pct": 97.0,
        "low_margin_pct": 4.0,
        **changes,
    }
    return SampleFacts(("lab", "scope"), age_band, **named)


def line_of(group: Group, measure: str, name: str = "") -> Line:
    return next(line for line in group.lines if (line.measure, line.name) == (measure, name))


def test_a_band_has_the_median_of_its_samples_with_the_interval_of_order_statistics() -> None:
    (group,) = compare(make_facts(number) for number in range(20)).groups
    spread = line_of(group, "share", "round").spread
    assert spread is not None
    # Of 20 values the 6th and the 15th: a table of every book.
    assert (spread.median, spread.low, spread.high) == (49.5, 45.0, 54.0)
    assert (spread.quarter, spread.three_quarters) == (44.75, 54.25)


def test_unidentified_refused_and_sureness_are_those_of_each_sample() -> None:
    (group,) = compare(make_facts(number) for number in range(10)).groups
    found = {line.measure: line.spread.median for line in group.lines if line.spread and not line.name}
    assert found == {"unidentified": 5.0, "refused": 25.0, "confidence": 97.0, "low-margin": 4.0}
    assert group.refused == {"blurred": 100}


def test_of_a_band_with_too_few_samples_nothing_is_told_but_how_many() -> None:
    groups = compare([make_facts(n) for n in range(10)] + [make_facts(n, "child") for n in range(9)]).groups
    assert [(group.age_band, group.is_small) for group in groups] == [("child", True), ("adult", False)]
    small = groups[0]
    assert (small.samples, small.lines, small.refused, small.models, small.microscopes) == (9, (), None, None, 0)


def test_a_figure_that_too_few_samples_of_a_band_have_is_not_told() -> None:
    samples = [make_facts(n, confidence_pct=90.0 if n < 9 else None) for n in range(30)]
    (group,) = compare(samples).groups
    assert line_of(group, "confidence").samples == 9
    assert line_of(group, "confidence").spread is None
    assert line_of(group, "unidentified").spread is not None


def test_samples_with_too_few_leukocytes_give_no_shares_and_all_else() -> None:
    samples = [make_facts(n, leukocytes=49 if n % 2 else 50) for n in range(24)]
    (group,) = compare(samples).groups
    assert (line_of(group, "share", "round").samples, line_of(group, "confidence").samples) == (12, 24)


def test_samples_surely_outside_their_reference_are_counted_with_an_interval() -> None:
    flags = ["high"] * 3 + ["low"] + ["perhaps-high"] * 4 + ["within"] * 12
    (group,) = compare(make_facts(n, flags={"round": flag}) for n, flag in enumerate(flags)).groups
    outside = line_of(group, "share", "round").outside
    assert outside is not None
    assert (outside.compared, outside.below, outside.above) == (20, 1, 3)
    assert outside.above_pct == pytest.approx((3.21, 37.89), abs=0.01)
    assert line_of(group, "share", "lobed").outside is None


def test_samples_of_one_accession_are_told() -> None:
    (group,) = compare(make_facts(n, accession="A" if n < 3 else f"B-{n}" if n < 8 else None) for n in range(12)).groups
    assert group.with_shared_accession == 3


def test_samples_without_an_age_stand_last() -> None:
    samples = [make_facts(n, band) for band in (None, "elder", "newborn") for n in range(10)]
    assert [group.age_band for group in compare(samples).groups] == ["newborn", "elder", None]


def test_intervals_are_counted_for_the_caution_of_many_comparisons() -> None:
    comparison = compare(make_facts(n, band) for band in ("child", "adult") for n in range(10))
    assert comparison.intervals == 2 * (2 + 1 + 4)


def test_a_limit_below_which_no_interval_exists_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="at least 6"):
        compare([], fewest_samples=5)


def test_the_command_line_tells_the_same_limits() -> None:
    for name in ("FEWEST_SAMPLES", "LEAST_FEWEST", "FEWEST_LEUKOCYTES"):
        assert getattr(cli, name) == getattr(cohort, name)
