"""Control charts: learnt from what is usual, quiet over single odd values, loud over small lasting shifts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from agent.analysis.control_charts import BACK_WITHIN, Chart, Plan, follow, limit_of

PLAN = Plan(learn=30, weight=0.25, tail=6e-5)


def learnt(spread: float = 1.0, plan: Plan = PLAN, seed: int = 1) -> Chart:
    values = np.random.default_rng(seed).normal(10, spread, plan.learn)
    chart = Chart()
    for value in values:
        chart = follow(chart, float(value), "then", plan)
    assert chart.values == plan.learn
    assert chart.mean == pytest.approx(values.mean())
    assert chart.squares == pytest.approx(((values - values.mean()) ** 2).sum())
    return chart


def test_nothing_is_said_while_it_learns() -> None:
    chart = Chart()
    for value in (10.0, 1000.0) * 15:
        chart = follow(chart, value, "then", PLAN)
        assert (chart.shift, chart.limit) == (None, 0.0)


def test_the_limit_is_that_of_lucas_and_saccucci_widened_for_an_estimated_mean_and_spread() -> None:
    many = Chart(values=1_000_001, mean=0.0, squares=1_000_000.0)
    # Of so many values nothing is estimated badly: 3 standard deviations, times the root of weight / (2 - weight).
    assert limit_of(many, Plan(30, 0.25, 0.0026998)) == pytest.approx(3 * (0.25 / 1.75) ** 0.5, rel=1e-4)
    few = Chart(values=10, mean=0.0, squares=9.0)
    assert limit_of(few, Plan(10, 0.25, 0.0026998)) == pytest.approx(4.0942 * (0.25 / 1.75 + 0.1) ** 0.5, rel=1e-3)


def test_a_lasting_shift_is_told_once_with_from_what_to_what_and_since_when() -> None:
    chart = learnt()
    seen = []
    for number in range(12):
        chart = follow(chart, chart.mean + 4, f"field {number}", PLAN)
        seen.append(chart.shift)
    first = next(shift for shift in seen if shift is not None)
    assert seen[:2] == [None, None]  # one odd value, and a second one, are no shift yet
    assert seen.index(first) <= 4
    assert set(seen[seen.index(first) :]) == {first}
    assert first.usual == chart.mean
    assert abs(first.now - first.usual) > chart.limit
    assert first.since in ("then", "field 0")


def test_one_odd_value_however_odd_raises_nothing() -> None:
    chart = replace(learnt(), average=learnt().mean)
    for value in (1e9, chart.mean, chart.mean, -1e9, chart.mean):
        chart = follow(chart, value, "now", PLAN)
        assert chart.shift is None


def test_an_alarm_stays_until_the_average_is_well_back() -> None:
    chart = learnt()
    while chart.shift is None:
        chart = follow(chart, chart.mean + 4, "now", PLAN)
    while chart.shift is not None:
        distance = chart.average - chart.mean
        assert distance >= BACK_WITHIN * chart.limit * 0.999
        chart = follow(chart, chart.mean, "later", PLAN)
    assert chart.average - chart.mean < BACK_WITHIN * chart.limit


def test_what_is_not_worth_telling_is_not_told() -> None:
    chart = learnt(spread=0.001)
    for _ in range(50):
        chart = follow(chart, chart.mean + 0.04, "now", PLAN, least=0.05)
    assert chart.shift is None
    for _ in range(50):
        chart = follow(chart, chart.mean + 0.06, "now", PLAN, least=0.05)
    assert chart.shift is not None


def test_a_figure_that_never_varied_keeps_the_noise_of_its_counting() -> None:
    chart = learnt(spread=0.0)
    assert limit_of(chart, PLAN) == 0
    assert limit_of(chart, PLAN, noise=0.05) == pytest.approx(0.05 * limit_of(Chart(30, 0, 29.0), PLAN))


def test_a_longer_baseline_that_is_asked_for_later_goes_on_from_the_shorter_one() -> None:
    chart = learnt()
    longer = replace(PLAN, learn=31)
    chart = follow(replace(chart, limit=1.0), 10.0, "now", longer)
    assert (chart.values, chart.limit) == (31, 0.0)
