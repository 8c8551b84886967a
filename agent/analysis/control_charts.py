"""Control charts: whether a figure that is measured again and again has moved away from what was usual.

    value --follow--> Chart: learning its usual value, then watching; a Shift while it lies beyond the limit

An exponentially weighted moving average sees a small lasting change that no single value shows, and passes over a
single odd value. Sources: Roberts, Technometrics 1 (1959) 239-250; Lucas and Saccucci, Technometrics 32 (1990) 1-12
(weight and limits); Nishina, Quality and Reliability Engineering International 8 (1992) 537-541 (since when).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from agent.analysis.intervals import student_quantile

STEP_AT_MOST: Final = 0.5
"""Of the limit: no single value moves the average further, so that an odd one never raises an alarm by itself while
the others are as usual."""

BACK_WITHIN: Final = 0.5
"""Of the limit: only when the average is as near again is a shift over, so that an alarm does not flicker."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How charts of one kind learn and judge.

    learn: values of the baseline, at least 3. weight: of the newest value in the average, 0 to 1. tail: probability
    that the average of an undisturbed figure lies beyond the limit, both sides together.
    """

    learn: int
    weight: float
    tail: float


@dataclass(frozen=True, slots=True)
class Shift:
    """A figure that has moved: from what to what, in the unit of the chart, and since when, RFC 3339."""

    usual: float
    now: float
    since: str


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure. values: in the baseline; mean, squares: theirs, squares = sum of squared deviations.

    average: the moving one. limit: how far it may lie from the mean; 0 while the baseline is learnt. crossed_at: when
    the average last lay on the other side of the mean, RFC 3339. shift: as it was when it was raised.
    """

    values: int = 0
    mean: float = 0.0
    squares: float = 0.0
    average: float = 0.0
    limit: float = 0.0
    crossed_at: str = ""
    shift: Shift | None = None


def follow(chart: Chart, value: float, at: str, plan: Plan, *, least: float = 0.0, noise: float = 0.0) -> Chart:
    """The chart with one value more.

    at: when it was seen, RFC 3339. least: the smallest shift that is worth telling. noise: standard deviation that
    the value has by the way it was counted, where that is known; the spread is never taken to be smaller.
    """
    if chart.values < plan.learn:
        return _learn(chart, value, at)
    limit = max(least, limit_of(chart, plan, noise))
    reach = STEP_AT_MOST * limit / plan.weight
    step = min(max(value - chart.average, -reach), reach)
    average = chart.average + plan.weight * step
    is_crossed = (average - chart.mean) * (chart.average - chart.mean) <= 0
    moved = replace(chart, average=average, limit=limit, crossed_at=at if is_crossed else chart.crossed_at)
    distance = abs(average - chart.mean)
    if chart.shift is None and distance > limit:
        return replace(moved, shift=Shift(chart.mean, average, moved.crossed_at))
    if chart.shift is not None and distance < BACK_WITHIN * limit:
        return replace(moved, shift=None)
    return moved


def limit_of(chart: Chart, plan: Plan, noise: float = 0.0) -> float:
    """How far the average of an undisturbed figure lies from the mean at most, but for `plan.tail` of the time.

    The asymptotic limit of Lucas and Saccucci. Mean and spread are estimates of few values: the mean's own variance is
    added, and the quantile is Student's.
    """
    spread = max(noise, math.sqrt(chart.squares / (chart.values - 1)))
    variance = plan.weight / (2 - plan.weight) + 1 / chart.values
    return _quantile(plan.tail, chart.values - 1) * spread * math.sqrt(variance)


def _learn(chart: Chart, value: float, at: str) -> Chart:
    """Mean and squares by Welford's recurrence (Technometrics 4 (1962) 419-420)."""
    values = chart.values + 1
    mean = chart.mean + (value - chart.mean) / values
    squares = chart.squares + (value - chart.mean) * (value - mean)
    return Chart(values, mean, squares, average=mean, crossed_at=at)


_quantile = lru_cache(maxsize=64)(student_quantile)
