"""Our own special functions and intervals beside scipy's and beside printed tables."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.analysis.intervals import (
    binomial_interval,
    goodman_intervals,
    incomplete_beta,
    lower_gamma,
    median_interval,
    poisson_interval,
    ratio_interval,
    student_quantile,
    trials_for,
)

special = pytest.importorskip("scipy.special")
stats = pytest.importorskip("scipy.stats")

# Below the normal numbers scipy errs: 5e-324 ** (1/64) * (1 + 1/64) is 9.017e-6, not 8.974e-6.
SHARE = st.floats(0, 1, allow_subnormal=False)
SHAPE = st.one_of(st.floats(0.01, 10), st.floats(10, 100_000))


@settings(deadline=None)
@given(SHARE, SHAPE, SHAPE)
def test_the_incomplete_beta_function_is_scipys(x: float, a: float, b: float) -> None:
    assert incomplete_beta(x, a, b) == pytest.approx(special.betainc(a, b, x), abs=1e-8)


@settings(deadline=None)
@given(SHAPE, st.floats(0, 3))
def test_the_incomplete_gamma_function_is_scipys(a: float, times: float) -> None:
    assert lower_gamma(a, a * times) == pytest.approx(special.gammainc(a, a * times), abs=1e-8)


@settings(deadline=None)
@given(st.integers(0, 5000), st.integers(1, 5000), st.sampled_from([0.8, 0.95, 0.99]))
def test_shares_have_scipys_exact_interval(count: int, more: int, level: float) -> None:
    trials = count + more
    theirs = stats.binomtest(count, trials).proportion_ci(level, method="exact")
    assert binomial_interval(count, trials, level) == pytest.approx((theirs.low, theirs.high), abs=1e-8)


@settings(deadline=None)
@given(st.integers(0, 100_000))
def test_poisson_counts_have_the_interval_that_chi_square_gives(count: int) -> None:
    low = stats.chi2.ppf(0.025, 2 * count) / 2 if count else 0.0
    high = stats.chi2.ppf(0.975, 2 * count + 2) / 2
    assert poisson_interval(count) == pytest.approx((low, high), rel=1e-7, abs=1e-9)


@settings(deadline=None)
@given(st.floats(1e-8, 0.5), st.floats(4, 10_000))
def test_the_quantile_of_students_distribution_is_scipys(tail: float, degrees: float) -> None:
    assert student_quantile(tail, degrees) == pytest.approx(stats.t.isf(tail / 2, degrees), rel=1e-4, abs=1e-5)


def test_rumkes_table_of_the_differential_is_met() -> None:
    # Rümke, "The statistically expected variability in differential leukocyte counting" (1977): 100 and 200 cells.
    assert [round(100 * bound) for bound in binomial_interval(5, 100)] == [2, 11]
    assert [round(100 * bound) for bound in binomial_interval(50, 100)] == [40, 60]
    assert [round(100 * bound) for bound in binomial_interval(10, 200)] == [2, 9]


def test_nothing_counted_says_nothing() -> None:
    assert binomial_interval(0, 0) == (0, 1)
    assert goodman_intervals([0, 0]) == ((0, 1), (0, 1))
    assert goodman_intervals([]) == ()
    assert poisson_interval(0) == pytest.approx((0, 3.6889), abs=1e-4)
    assert ratio_interval(0, 0) == (0, None)


def test_a_count_above_its_trials_is_refused() -> None:
    with pytest.raises(ValueError, match="4 of 3"):
        binomial_interval(4, 3)
    with pytest.raises(ValueError, match="not negative"):
        poisson_interval(-1)


def test_goodmans_intervals_are_those_of_his_formula_and_hold_the_shares() -> None:
    counts = [56, 72, 73, 59, 62, 87, 58]
    total, quantile = sum(counts), stats.chi2.ppf(1 - 0.05 / len(counts), 1)
    for count, (low, high) in zip(counts, goodman_intervals(counts), strict=True):
        share = count / total
        for bound in (low, high):  # both solve (share - bound)^2 = quantile * bound (1 - bound) / total
            assert (share - bound) ** 2 == pytest.approx(quantile * bound * (1 - bound) / total, rel=1e-9)
        assert low < share < high


def test_all_intervals_together_are_wider_than_one_by_one() -> None:
    counts = [110, 60, 15, 5]
    for count, (low, high) in zip(counts, goodman_intervals(counts), strict=True):
        exact = binomial_interval(count, sum(counts))
        assert high - low > exact[1] - exact[0]


def test_a_ratio_has_the_interval_of_the_conditional_binomial() -> None:
    low, high = ratio_interval(4, 200)
    share = stats.binomtest(4, 204).proportion_ci(0.95, method="exact")
    assert high is not None
    assert (low, high) == pytest.approx((share.low / (1 - share.low), share.high / (1 - share.high)), rel=1e-8)
    assert ratio_interval(3, 0)[1] is None


@settings(deadline=None)
@given(st.integers(0, 1000).map(lambda n: n / 1000), st.floats(0.02, 0.3))
def test_so_many_trials_are_enough_and_one_less_is_not(share: float, half_width: float) -> None:
    trials = trials_for(share, half_width)
    assert trials is not None

    def half(n: int) -> float:
        low, high = binomial_interval(share * n, n)
        return (high - low) / 2

    assert half(trials) <= half_width
    assert trials == 1 or half(trials - 1) > half_width or math.isclose(half(trials - 1), half_width)


def test_a_width_beyond_reach_is_told_and_not_searched_for_ever() -> None:
    assert trials_for(0.5, 1e-5) is None


@pytest.mark.parametrize("count", [6, 7, 10, 25, 200, 1001])
def test_the_interval_of_a_median_is_the_narrowest_pair_of_values_that_holds_it_often_enough(count: int) -> None:
    low, high = median_interval([float(n) for n in range(count, 0, -1)]) or (0.0, 0.0)
    assert low + high == count + 1  # as far from either end

    def chance(place: float) -> float:
        return float(1 - 2 * stats.binom.cdf(place - 1, count, 0.5))

    assert chance(low) >= 0.95 > chance(low + 1)


def test_of_five_values_a_median_has_no_interval() -> None:
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) is None
    assert median_interval([]) is None
