"""Intervals, permutation and correction against scipy, enumeration and simulation."""

import math
import warnings
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from aiba_eval import statistics
from aiba_eval.statistics import (
    assignment_permutation,
    benjamini_hochberg,
    holm,
    interval,
    paired_permutation,
    permutation_p,
    ratio_of_means,
)

many = settings(max_examples=60, deadline=None)


# --- intervals


def test_interval_is_scipys_bca_of_the_mean():
    values = np.random.default_rng(0).exponential(size=23)
    got = interval(values, confidence=0.9, resamples=499, seed=7)
    expected = stats.bootstrap(
        (values,), np.mean, confidence_level=0.9, n_resamples=499, method="BCa", rng=np.random.default_rng(7)
    ).confidence_interval
    assert tuple(got) == pytest.approx((values.mean(), expected.low, expected.high))
    assert got.count == 23
    assert got.note == ""
    mean, low, high = got
    assert low < mean < high
    assert tuple(interval(values, seed=1)) == tuple(interval(values, seed=1))
    assert tuple(interval(values, seed=1)) != tuple(interval(values, seed=2))
    assert interval(values, confidence=0.99).high > interval(values, confidence=0.5).high


def test_batches_bound_the_memory_and_not_the_result(monkeypatch):
    values = np.random.default_rng(0).normal(size=40)
    whole = tuple(interval(values, resamples=300))
    monkeypatch.setattr(statistics, "BATCH", 1000)
    assert tuple(interval(values, resamples=300)) == pytest.approx(whole)


def test_ties_do_not_hang_on_rounding():
    """Of hits and misses many resamples have the estimate itself as their mean: noise must not decide on which side."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        hits = rng.choice([0.0, 1 / 3, 0.5, 2 / 3, 1.0], 12)
        plain = list(interval(hits, resamples=300))
        shifted, scaled = interval(hits - 0.7, resamples=300), interval(1e-7 * hits, resamples=300)
        assert [value + 0.7 for value in shifted] == pytest.approx(plain, rel=1e-9)
        assert [value * 1e7 for value in scaled] == pytest.approx(plain, rel=1e-9)


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(3)
    hits = 0
    for draw in range(300):
        _, low, high = interval(rng.exponential(size=25), confidence=0.9, resamples=400, seed=draw)
        hits += low <= 1.0 <= high
    assert 0.82 < hits / 300 < 0.95  # skewed and small: a little under 0.9 is known of BCa


def test_degenerate_samples_say_so_and_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = interval([0.3])
        alike = interval([0.3] * 12)
        zero = interval(np.zeros(12))
        lopsided = interval([0.0] * 39 + [1.0], resamples=20, seed=2)
    assert one.mean == 0.3 and math.isnan(one.low) and math.isnan(one.high) and "one piece" in one.note
    assert tuple(alike) == pytest.approx((0.3, 0.3, 0.3)) and "12 pieces alike" in alike.note
    assert tuple(zero) == (0, 0, 0) and "no width" in zero.note
    assert math.isfinite(lopsided.low) and math.isfinite(lopsided.high)


def test_where_bca_fails_the_percentile_interval_is_given_and_named(monkeypatch):
    real = stats.bootstrap

    def broken(*args, method, **options):
        result = real(*args, method="percentile", **options)
        if method == "BCa":
            result.confidence_interval = type(result.confidence_interval)(math.nan, math.nan)
        return result

    monkeypatch.setattr(stats, "bootstrap", broken)
    values = np.random.default_rng(0).normal(size=9)
    got = interval(values, resamples=200, seed=4)
    expected = real((values,), np.mean, n_resamples=200, method="percentile", rng=np.random.default_rng(4))
    assert (got.low, got.high) == pytest.approx(tuple(expected.confidence_interval))
    assert "percentile" in got.note and "9 pieces" in got.note


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, r"not empty, got shape \(0,\)"),
        ([[1.0, 2.0]], {}, r"got shape \(1, 2\)"),
        ([1.0, math.nan, math.inf], {}, "2 of 3 values are NaN or infinite: leave these pieces out and count them"),
        ([1.0, 2.0], {"confidence": 1.0}, "confidence must lie in"),
        ([1.0, 2.0], {"resamples": 0}, "at least one resample, got 0"),
    ],
)
def test_what_has_no_interval_is_refused(values, options, message):
    with pytest.raises(ValueError, match=message):
        interval(values, **options)


def test_the_ratio_of_means_is_not_the_mean_of_ratios():
    a, b = np.array([1.0, 1.0, 8.0]), np.array([0.1, 2.0, 4.0])
    got = ratio_of_means(a, b)
    assert got.mean == pytest.approx(10 / 6.1)
    assert got.mean != pytest.approx(np.mean(a / b))
    rng = np.random.default_rng(0)
    b = rng.random(30) + 0.5
    a = 1.6 * b + 0.05 * rng.normal(size=30)
    paired = ratio_of_means(a, b, resamples=999)
    assert paired.low < 1.6 < paired.high
    expected = stats.bootstrap(
        (a, b),
        lambda x, y, axis: x.mean(axis) / y.mean(axis),
        paired=True,
        n_resamples=999,
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert (paired.low, paired.high) == pytest.approx((expected.low, expected.high))
    assert paired.high - paired.low < 0.1  # pairs: b alone varies by far more
    constant = ratio_of_means(2 * b, b)
    assert tuple(constant) == pytest.approx((2, 2, 2)) and "no width" in constant.note
    with pytest.raises(ValueError, match="denominators must be positive"):
        ratio_of_means([1.0, 1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="got 2 and 3"):
        ratio_of_means([1.0, 1.0], [1.0, 2.0, 3.0])


# --- permutation


@pytest.mark.parametrize("alternative", ["greater", "less", "two-sided"])
def test_paired_permutation_enumerates_all_swaps_of_few_pieces(alternative):
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.4, 1, 7), rng.normal(size=7)
    observed = (a - b).mean()
    null = [np.mean(np.array(signs) * (a - b)) for signs in product((1, -1), repeat=7)]
    greater = np.mean([d >= observed - 1e-12 for d in null])
    less = np.mean([d <= observed + 1e-12 for d in null])
    expected = {"greater": greater, "less": less, "two-sided": min(1, 2 * min(greater, less))}[alternative]
    assert paired_permutation(a, b, alternative=alternative) == pytest.approx(expected)


def test_paired_permutation_of_many_pieces():
    rng = np.random.default_rng(2)
    base = rng.normal(size=40)
    assert paired_permutation(base, base) == 1.0
    assert paired_permutation(base + 1, base, resamples=999) == pytest.approx(2 / 1000)
    assert paired_permutation(base - 1, base, resamples=999, alternative="greater") == 1.0
    shifted = base + rng.normal(0.2, 0.6, 40)
    p = paired_permutation(shifted, base, resamples=4999)
    assert p == paired_permutation(shifted, base, resamples=4999)
    assert p == pytest.approx(paired_permutation(base, shifted, resamples=4999), abs=0.02)
    assert p == pytest.approx(stats.ttest_rel(shifted, base).pvalue, abs=0.02)  # near normal, so that they agree
    with pytest.raises(ValueError, match="alternative must be"):
        paired_permutation(base, base, alternative="bigger")
    with pytest.raises(ValueError, match="NaN"):
        paired_permutation([1.0, math.nan], [1.0, 2.0])


def test_p_values_under_the_null_are_uniform():
    """No smaller than it says: at most a share α of null data sets has p ≤ α."""
    rng = np.random.default_rng(4)
    p = np.array([paired_permutation(*rng.normal(size=(2, 8)), resamples=300) for _ in range(300)])
    for level in (0.1, 0.3, 0.5):
        assert (p <= level).mean() < level + 3 * math.sqrt(level * (1 - level) / 300)
    p = np.array([assignment_permutation(rng.random((4, 4)), resamples=99, seed=i) for i in range(300)])
    for level in (0.1, 0.3, 0.5):
        assert abs((p <= level).mean() - level) < 0.09


def test_permutation_p_counts_the_observation_and_ties_against_it():
    assert permutation_p(5, [1, 2, 3, 4]) == 1 / 5
    assert permutation_p(3, [1, 2, 3, 4]) == 3 / 5
    assert permutation_p(3, [1, 2, 3, 4], alternative="less") == 4 / 5
    assert permutation_p(5, [1, 2, 3, 4], alternative="two-sided") == 2 / 5
    assert permutation_p(2, [1, 2, 3], alternative="two-sided") == 1.0
    assert permutation_p(0.1 + 0.2, [0.3]) == 1.0  # equal but for rounding
    with pytest.raises(ValueError, match="not empty"):
        permutation_p(1, [])
    with pytest.raises(ValueError, match="observed statistic is nan"):
        permutation_p(math.nan, [1])


def test_assignment_permutation_against_all_permutations():
    rng = np.random.default_rng(5)
    squares = [rng.random((3, 3)) + 0.3 * np.eye(3), rng.random((2, 2)) + 0.3 * np.eye(2)]
    observed = np.mean([np.diagonal(s).mean() for s in squares])
    null = [
        np.mean([s[list(rows), range(len(s))].mean() for s, rows in zip(squares, chosen)])
        for chosen in product(*(permutations(range(len(s))) for s in squares))
    ]
    expected = np.mean([value >= observed - 1e-12 for value in null])
    assert assignment_permutation(squares, resamples=20_000) == pytest.approx(expected, abs=0.015)


def test_assignment_permutation_finds_what_there_is_and_nothing_else():
    rng = np.random.default_rng(6)
    noise = rng.random((20, 4, 4))
    assert assignment_permutation(noise + 0.5 * np.eye(4), resamples=999) == 1 / 1000
    assert assignment_permutation(noise - 0.5 * np.eye(4), resamples=999) == 1.0
    assert assignment_permutation(noise - 0.5 * np.eye(4), resamples=999, alternative="less") == 1 / 1000
    alike = np.tile(rng.random((20, 1, 4)), (1, 4, 1))  # every map scores the same against a mask: mix energy
    assert assignment_permutation(alike, resamples=999) == 1.0
    one = rng.random((12, 12)) + 0.5 * np.eye(12)
    assert assignment_permutation(one, resamples=999) == assignment_permutation([one], resamples=999) == 1 / 1000


def test_rows_of_one_name_move_together():
    """Two words of the same pieces say no more than one: shuffled apart they would look like twice the evidence."""
    rng = np.random.default_rng(8)
    one = rng.random((8, 8)) + 0.25 * np.eye(8)
    pieces = list("abcdefgh")
    alone = assignment_permutation(one, resamples=20_000)
    together = assignment_permutation([one, one], labels=[pieces, pieces], resamples=20_000)
    apart = assignment_permutation([one, one], resamples=20_000)
    assert together == pytest.approx(alone, rel=0.15)
    assert apart < 0.5 * alone
    turned = one[::-1, ::-1]  # the same pieces in another order
    assert assignment_permutation([one, turned], labels=[pieces, pieces[::-1]], resamples=20_000) == pytest.approx(
        alone, rel=0.15
    )
    with pytest.raises(ValueError, match=r"each row of matrices of sizes \[8\], none twice"):
        assignment_permutation(one, labels=["aabcdefg"])


def test_weights_of_columns():
    one = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])  # only the first map fits its own mask
    assert assignment_permutation(one, weights=[[1, 0, 0]], resamples=20_000) == pytest.approx(1 / 3, abs=0.02)
    assert assignment_permutation(one, weights=[[0, 1, 1]], resamples=999) == 1.0
    with pytest.raises(ValueError, match=r"one per column of matrices of sizes \[3\]"):
        assignment_permutation(one, weights=[[1, 0]])


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        (np.ones((2, 3)), r"square, got shape \(2, 3\)"),
        ([np.ones((1, 1))] * 3, "none of 3 matrices has two maps"),
        ([], "none of 0 matrices"),
        ([np.array([[1.0, math.nan], [0.0, 1.0]])], "1 scores that are not finite"),
    ],
)
def test_matrices_that_cannot_be_permuted(matrices, message):
    with pytest.raises(ValueError, match=message):
        assignment_permutation(matrices)


# --- correction for the number of tests


@many
@given(
    st.lists(
        st.sampled_from([0.0, 0.001, 0.01, 0.02, 0.04, 0.05, 0.2, 0.5, 1.0]) | st.floats(0, 1), min_size=1, max_size=8
    )
)
def test_corrections_reject_what_their_step_rules_reject(p):
    ascending = sorted(p)
    m = len(p)
    for level in (0.01, 0.05, 0.3):
        down = 0  # Holm: step down while p_(k) <= level / (m - k + 1)
        while down < m and ascending[down] * (m - down) <= level:
            down += 1
        up = max((k for k in range(1, m + 1) if ascending[k - 1] * m / k <= level), default=0)
        assert (holm(p) <= level).sum() == down
        assert (benjamini_hochberg(p) <= level).sum() == up
    assert (holm(p) >= benjamini_hochberg(p) - 1e-15).all()
    assert (benjamini_hochberg(p) >= np.array(p) - 1e-15).all()


@many
@given(st.permutations([0.01, 0.04, 0.03, 0.2, 0.01]))
def test_corrections_keep_the_order_given(p):
    for correct in (holm, benjamini_hochberg):
        by_value = dict(zip([0.01, 0.04, 0.03, 0.2, 0.01], correct([0.01, 0.04, 0.03, 0.2, 0.01])))
        np.testing.assert_allclose(correct(p), [by_value[value] for value in p])


def test_corrections_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(benjamini_hochberg([0.01, 0.04, 0.03]), [0.03, 0.04, 0.04])
    np.testing.assert_allclose(holm([0.6, 0.7]), [1, 1])
    for correct in (holm, benjamini_hochberg):
        assert correct([0.2]) == [0.2]
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got -0.1 to 0.2"):
            correct([-0.1, 0.2])
        with pytest.raises(ValueError, match="not empty"):
            correct([])
