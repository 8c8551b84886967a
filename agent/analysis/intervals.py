"""Confidence intervals for counts: how far the truth may lie from what was counted.

Exact methods, and no scipy: two special functions of a page serve all of them on a small board, and tests hold them
against scipy's.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from statistics import NormalDist

LEVEL = 0.95
"""The confidence that laboratories write beside a differential."""

BISECTIONS = 48
"""Halvings of a quantile's range: finer than any decimal that is published, cheaper than a cleverer search is long."""

MOST_TERMS = 100_000
"""Both expansions need a multiple of the root of the count; this ends what bad numbers would make endless."""

_SMALLEST = 1e-300
_PRECISION = 1e-14

Interval = tuple[float, float]
"""Lower and upper bound, in the unit of what was asked for."""


def binomial_interval(count: float, trials: float, level: float = LEVEL) -> Interval:
    """Clopper-Pearson interval of a share, 0 to 1: covers the truth at least as often as `level` says.

    count, trials: 0 <= count <= trials; they need not be whole (a planned sample). trials 0: nothing is known, (0, 1).
    Source: Clopper and Pearson, Biometrika 26 (1934) 404-413.
    """
    if not 0 <= count <= trials:
        raise ValueError(f"{count:g} of {trials:g}: a count lies between 0 and the number of trials")
    tail = (1 - level) / 2
    low = 0.0 if count == 0 else beta_quantile(tail, count, trials - count + 1)
    high = 1.0 if count == trials else beta_quantile(1 - tail, count + 1, trials - count)
    return low, high


def goodman_intervals(counts: Sequence[int], level: float = LEVEL) -> tuple[Interval, ...]:
    """Intervals of all shares of a whole that hold together with probability `level`; wider than one by one.

    counts: of each class. Approximate: for classes of which none or few were seen, Clopper-Pearson is the safer one.
    Source: Goodman, Technometrics 7 (1965) 247-254, equation 2.5 with the quantile for k classes.
    """
    total = sum(counts)
    if total == 0:
        return tuple((0.0, 1.0) for _ in counts)
    # The chi-square quantile with one degree of freedom is the square of a normal one.
    quantile = NormalDist().inv_cdf(1 - (1 - level) / (2 * len(counts))) ** 2
    intervals = []
    for count in counts:
        spread = math.sqrt(quantile * (quantile + 4 * count * (total - count) / total))
        scale = 2 * (total + quantile)
        intervals.append((max(0.0, (quantile + 2 * count - spread) / scale), (quantile + 2 * count + spread) / scale))
    return tuple(intervals)


def poisson_interval(count: int, level: float = LEVEL) -> Interval:
    """Exact interval of the mean of a Poisson count, such as the cells in a volume.

    Source: Garwood, Biometrika 28 (1936) 437-442.
    """
    if count < 0:
        raise ValueError(f"{count}: a count is not negative")
    tail = (1 - level) / 2
    widest = count + 12 * math.sqrt(count + 1) + 12
    low = 0.0 if count == 0 else _bisect(lambda mean: lower_gamma(count, mean), tail, 0.0, count)
    return low, _bisect(lambda mean: lower_gamma(count + 1, mean), 1 - tail, count, widest)


def ratio_interval(count: int, base: int, level: float = LEVEL) -> tuple[float, float | None]:
    """Interval of the ratio of two Poisson counts, such as erythroblasts to leukocytes; None = no upper bound.

    Given their sum, one of two Poisson counts is binomial, and a share p is a ratio p / (1 - p).
    Source: Przyborowski and Wilenski, Biometrika 31 (1940) 313-323.
    """
    low, high = binomial_interval(count, count + base, level)
    return low / (1 - low) if low < 1 else math.inf, None if high >= 1 else high / (1 - high)


def median_interval(values: Sequence[float], level: float = LEVEL) -> Interval | None:
    """Interval of the median of what the values are a sample of, whatever its shape; in the unit of the values.

    Two of the values themselves, as far apart as the binomial distribution with one half asks for. None where even the
    smallest and the largest are not far enough: below 6 values for 95 %.
    Source: David and Nagaraja, Order Statistics, 3rd edition (2003), section 7.1.
    """
    ordered, count = sorted(values), len(values)
    tail = (1 - level) / 2
    # The chance that fewer than `place` values lie below the median; it grows with the place.
    place = bisect_right(
        range(1, count // 2 + 1), tail, key=lambda place: incomplete_beta(0.5, count - place + 1, place)
    )
    return None if place == 0 else (ordered[place - 1], ordered[count - place])


def trials_for(share: float, half_width: float, level: float = LEVEL, most: int = 1_000_000) -> int | None:
    """How many must be counted so that the interval of this share is at most +- half_width; None = above `most`.

    share, half_width: 0 to 1. The half width is half of the Clopper-Pearson interval.
    """

    def is_enough(trials: int) -> bool:
        low, high = binomial_interval(share * trials, trials, level)
        return (high - low) / 2 <= half_width

    many = 1
    while not is_enough(many):
        many *= 2
        if many > most:
            return None
    few = many // 2
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if is_enough(middle) else (middle, many)
    return many


def student_quantile(tail: float, degrees: float) -> float:
    """The t beyond which, on both sides together, Student's distribution has this much of its probability.

    tail: 1e-8 to 0.5. degrees: of freedom, from 4 (of fewer the far quantiles are beyond the bisection).
    Source: Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 26.7.1.
    """
    x = beta_quantile(tail, degrees / 2, 0.5)
    return math.sqrt(degrees * (1 - x) / x)


# ---------------------------------------------------------------------------------------------- special functions


def beta_quantile(probability: float, a: float, b: float) -> float:
    """The x with I_x(a, b) = probability."""
    return _bisect(lambda x: incomplete_beta(x, a, b), probability, 0.0, 1.0)


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b); x 0 to 1, a and b above 0.

    Continued fraction by Lentz's method. Source: NIST Digital Library of Mathematical Functions, 8.17.22.
    """
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # the fraction converges quickly on one side only
        return 1 - incomplete_beta(1 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)

    def term(n: int) -> float:
        half = n // 2
        if n % 2 == 0:
            return half * (b - half) * x / ((a + n - 1) * (a + n))
        return -(a + half) * (a + b + half) * x / ((a + n - 1) * (a + n))

    return math.exp(log_front) / a * _lentz(term, lambda _n: 1.0, 1.0)


def lower_gamma(a: float, x: float) -> float:
    """The regularised lower incomplete gamma function P(a, x); a above 0, x not negative.

    Source: NIST Digital Library of Mathematical Functions, 8.11.4 (series) and 8.9.2 (continued fraction).
    """
    if x <= 0:
        return 0.0
    front = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:
        term = total = 1 / a
        for n in range(1, MOST_TERMS):
            term *= x / (a + n)
            total += term
            if term < total * _PRECISION:
                break
        return front * total
    fraction = _lentz(lambda n: n * (a - n), lambda n: x + 2 * n + 1 - a, x + 1 - a)
    return 1 - front * fraction


def _lentz(numerator: Callable[[int], float], denominator: Callable[[int], float], first: float) -> float:
    """1 / (first + numerator(1) / (denominator(1) + numerator(2) / ...)), by the modified method of Lentz."""
    c, d = 1 / _SMALLEST, 1 / _off_zero(first)
    value = d
    for n in range(1, MOST_TERMS):
        above, below = numerator(n), denominator(n)
        d = 1 / _off_zero(below + above * d)
        c = _off_zero(below + above / c)
        value *= c * d
        if abs(c * d - 1) < _PRECISION:
            break
    return value


def _off_zero(value: float) -> float:
    return value if abs(value) > _SMALLEST else _SMALLEST


def _bisect(rising: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return (low + high) / 2
