"""How sure a mean over pieces is, and whether a difference is more than an accident of the pieces drawn.

Conventions
-----------

* The unit is the **piece**: average over the cells, words and windows of a piece first, and hand on one number for each.
  Words of one piece share its audio; as units of their own they make an interval about half as wide as it should be.
* **NaN and infinite values raise.** A piece without a score must be left out and counted by the caller.
* **No analytic p-values.** Every p-value here is a share of permutations.
* All randomness is drawn from ``seed``: the same values give the same figures.

Contents
--------

* :func:`interval`: a mean and its BCa bootstrap interval.
* :func:`ratio_of_means`: the same of mean(a) / mean(b), over pairs.
* :func:`paired_permutation`: whether two scores of the same pieces differ.
* :func:`permutation_p`: the p-value of an observation among draws of a null.
* :func:`assignment_permutation`: whether maps fit their own masks better than masks dealt out at random.
* :func:`holm`, :func:`benjamini_hochberg`: p-values corrected for their number.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Alternative = Literal["two-sided", "greater", "less"]

#: Draws of a bootstrap or of a permutation test.
RESAMPLES = 9999
#: Numbers held at once while resampling: bounds the memory, not the result.
BATCH = 1 << 22


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval; unpacks as ``mean, low, high``.

    Attributes
    ----------
    mean
        The estimate: a mean, or a ratio of means.
    low, high
        Ends of the interval; ``nan`` where there is none.
    count
        Values (pieces) that it rests on.
    note
        Empty, or why the interval is not an ordinary BCa interval. Print it beside the figures.
    """

    mean: float
    low: float
    high: float
    count: int
    note: str = ""

    def __iter__(self) -> Iterator[float]:
        return iter((self.mean, self.low, self.high))


def interval(values: ArrayLike, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean of one value per piece, with its bias-corrected and accelerated bootstrap interval.

    ``scipy.stats.bootstrap(method="BCa")`` of the mean (Efron, 1987): pieces are drawn with replacement, so the interval
    is about other pieces of the same kind, not about other models or seeds.

    Degenerate samples are not passed over in silence; ``note`` says which they are:

    * one value: no interval, ``low`` and ``high`` are ``nan``;
    * all values alike: the interval has no width;
    * no finite BCa correction (as when every resample lies on one side of the mean): the percentile interval instead.

    Parameters
    ----------
    values : array_like, shape (pieces,)
    confidence : float
        In (0, 1).
    resamples : int
        Bootstrap draws.
    seed : int

    Returns
    -------
    Interval

    Raises
    ------
    ValueError
        If there is no value, one is not finite, the shape is not (pieces,), or an option is out of range.
    """
    sample = _sample(values, "values")
    return _bootstrap((sample,), _mean, confidence, resamples, seed)


def ratio_of_means(
    a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """mean(a) / mean(b) over pieces, with its BCa interval; pieces are resampled in pairs.

    A lift such as "1.6 times chance". It is not the mean of the ratios a_i / b_i, which a few pieces with a small b_i
    carry away.

    Parameters
    ----------
    a, b : array_like, shape (pieces,)
        The same pieces in the same order.
    confidence, resamples, seed
        As in :func:`interval`.

    Returns
    -------
    Interval
        ``mean`` is the ratio. Degenerate samples as in :func:`interval`.

    Raises
    ------
    ValueError
        As :func:`interval`, if the lengths differ, or if b is not positive everywhere: a ratio to something that
        can vanish says nothing.
    """
    one, other = _pair(a, b)
    if other.min() <= 0:
        raise ValueError(
            f"the denominators must be positive, their smallest is {other.min()}: compare differences instead"
        )
    return _bootstrap((one, other), _ratio, confidence, resamples, seed)


def paired_permutation(
    a: ArrayLike, b: ArrayLike, *, alternative: Alternative = "two-sided", resamples: int = RESAMPLES, seed: int = 0
) -> float:
    """P-value of mean(a − b) when a and b are exchangeable within each piece.

    ``scipy.stats.permutation_test(permutation_type="samples")`` of the mean difference: each piece keeps its two numbers
    and swaps them or not. Where there are no more than ``resamples`` ways to swap (up to 13 pieces) all are enumerated
    and p is exact, else p = (1 + #{null at least as extreme}) / (1 + resamples). Two-sided is twice the smaller tail.

    Parameters
    ----------
    a, b : array_like, shape (pieces,)
        Scores of the same pieces in the same order.
    alternative : {"two-sided", "greater", "less"}
        "greater": a is larger than b.
    resamples : int
    seed : int

    Returns
    -------
    float
        In (0, 1]; 1 where a and b are equal throughout.

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, or an option is unknown.
    """
    one, other = _pair(a, b)
    _check(alternative, resamples)
    from scipy.stats import permutation_test

    result = permutation_test(
        (one, other),
        _mean_difference,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, BATCH // one.size),
        alternative=alternative,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def permutation_p(observed: float, null: ArrayLike, *, alternative: Alternative = "greater") -> float:
    """P-value of an observation among draws of its null: p = (1 + #{null ≥ observed}) / (1 + draws).

    The observation counts as a draw of the null, so that p is never 0 (Phipson & Smyth, 2010). Draws equal to the
    observation, within rounding, count against it. Two-sided is twice the smaller tail, at most 1.

    Parameters
    ----------
    observed : float
    null : array_like, shape (draws,)
        What the same statistic gave under the null: shuffled labels, re-initialised models.
    alternative : {"greater", "less", "two-sided"}

    Returns
    -------
    float
        In (0, 1]; no smaller than 1 / (1 + draws).

    Raises
    ------
    ValueError
        If there are no draws, a number is not finite, or the alternative is unknown.
    """
    draws = _sample(null, "null")
    _check(alternative)
    if not math.isfinite(observed):
        raise ValueError(f"the observed statistic is {observed}: leave it out and count it")
    slack = 1e-12 * max(abs(observed), float(np.abs(draws).max()))
    tails = {
        "greater": (1 + int((draws >= observed - slack).sum())) / (1 + draws.size),
        "less": (1 + int((draws <= observed + slack).sum())) / (1 + draws.size),
    }
    return min(1.0, 2 * min(tails.values())) if alternative == "two-sided" else tails[alternative]


def assignment_permutation(
    matrices: ArrayLike | Iterable[ArrayLike],
    *,
    labels: Sequence[Sequence[Hashable]] | None = None,
    weights: Sequence[ArrayLike] | None = None,
    alternative: Alternative = "greater",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> float:
    """P-value of maps against their own masks, when masks are dealt out to maps at random.

    The statistic is the weighted sum of all diagonals; under the null the rows of each matrix are shuffled. One matrix per
    piece, over its words, permutes *labels*: is it this word's map? One matrix per word, over pieces, permutes *pieces*: is
    it this audio's map? The scores of every map against every mask are all that it takes
    (:func:`aiba_eval.contrasts.cross_scores`).

    Parameters
    ----------
    matrices : array_like, shape (n, n), or iterable of those
        ``matrix[i, j]``: score of map i against mask j.
    labels : sequence of sequence, optional
        Names of each matrix's rows. Rows of one name move together: each draw orders all names at random, and every
        matrix follows that order. Words of a piece share its audio, so matrices per word need this. Default: every
        matrix is shuffled on its own.
    weights : sequence of array_like of shape (n,), optional
        Of each matrix's columns. Default: the mean over columns, then over matrices.
    alternative : {"greater", "less", "two-sided"}
    resamples : int
        Random permutations, p as in :func:`permutation_p`.
    seed : int

    Returns
    -------
    float
        In (0, 1].

    Raises
    ------
    ValueError
        If no matrix has two rows, one is not square or not finite, labels or weights do not fit, or an option is unknown.
    """
    _check(alternative, resamples)
    squares = _squares(matrices)
    sizes = [len(square) for square in squares]
    columns = [np.full(n, 1 / n) for n in sizes] if weights is None else [np.asarray(w, float) for w in weights]
    if [w.shape for w in columns] != [(n,) for n in sizes]:
        raise ValueError(f"weights must be one per column of matrices of sizes {sizes}")
    names = None if labels is None else [list(some) for some in labels]
    if names is not None and [len(set(some)) for some in names] != sizes:
        raise ValueError(f"labels must name each row of matrices of sizes {sizes}, none twice")
    rng = np.random.default_rng(seed)
    keys: dict[Hashable, Floats] = {}
    null, observed = np.zeros(resamples), 0.0
    for index, (square, weight) in enumerate(zip(squares, columns)):
        n = len(square)
        if names is None:
            order = rng.random((resamples, n))
        else:
            # a draw maps the i-th of the names here to the i-th in its order: so the names have one order everywhere
            drawn = [keys.setdefault(name, rng.random(resamples)) for name in names[index]]
            rank = {name: k for k, name in enumerate(keys)}
            same = sorted(range(n), key=lambda i: rank[names[index][i]])
            square, weight = square[np.ix_(same, same)], weight[same]
            order = np.stack([drawn[i] for i in same], axis=1)
        null += square[np.argsort(order, axis=1), np.arange(n)] @ weight
        observed += float(np.diagonal(square) @ weight)
    return permutation_p(observed, null, alternative=alternative)


def holm(p: ArrayLike) -> Floats:
    """Holm's adjusted p-values: reject those at most α, and the chance of *any* false rejection is at most α.

    With p sorted ascending, adjusted_(i) = max over k ≤ i of min(1, (m − k + 1) p_(k)) (Holm, 1979). Valid however the
    tests depend on each other.

    Parameters
    ----------
    p : array_like, shape (m,)
        P-values of one family: everything that is looked at for the same question.

    Returns
    -------
    ndarray, shape (m,)
        In the order given.

    Raises
    ------
    ValueError
        If there is none or one is outside [0, 1].
    """
    values = _p_values(p)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(values.size, 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def benjamini_hochberg(p: ArrayLike) -> Floats:
    """Benjamini and Hochberg's adjusted p-values: reject those at most α, and the expected *share* of false ones is at most α.

    adjusted_(i) = min over k ≥ i of min(1, p_(k) m / k) (Benjamini & Hochberg, 1995), by
    ``scipy.stats.false_discovery_control``. For independent or positively dependent tests.

    Parameters, returns and errors as in :func:`holm`.
    """
    values = _p_values(p)
    from scipy.stats import false_discovery_control

    return np.asarray(false_discovery_control(values, method="bh"), float)


def _bootstrap(
    samples: tuple[Floats, ...], statistic: Callable[..., Any], confidence: float, resamples: int, seed: int
) -> Interval:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    _check("two-sided", resamples)
    estimate, count = float(statistic(*samples, axis=-1)), samples[0].size
    if count == 1:
        return Interval(estimate, math.nan, math.nan, 1, "one piece: no interval")
    # values that resampling cannot change: all alike, or in a constant ratio
    spread = samples[0] - estimate * samples[1] if len(samples) == 2 else samples[0] - estimate
    if np.abs(spread).max() <= 1e-12 * max(np.abs(samples[0]).max(), np.finfo(float).tiny):
        return Interval(estimate, estimate, estimate, count, f"all {count} pieces alike: the interval has no width")
    from scipy.stats import bootstrap

    # BCa counts resamples below the estimate: equal means must be equal, whatever their sums rounded to
    digits = 12 - math.floor(math.log10(max(abs(estimate), np.abs(samples[0]).max())))

    def rounded(*drawn: Floats, axis: int) -> Any:
        return np.round(statistic(*drawn, axis=axis), digits)

    def ends(method: str) -> tuple[float, float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy warns of a degenerate BCa, which is handled here
            got = bootstrap(
                samples,
                rounded,
                paired=len(samples) > 1,
                vectorized=True,
                confidence_level=confidence,
                n_resamples=resamples,
                batch=max(1, BATCH // count),
                method=method,
                rng=np.random.default_rng(seed),
            ).confidence_interval
        return float(got.low), float(got.high)

    low, high = ends("BCa")
    if math.isfinite(low) and math.isfinite(high):
        return Interval(estimate, low, high, count)
    return Interval(
        estimate, *ends("percentile"), count, f"BCa is undefined for these {count} pieces: percentile interval"
    )


def _mean(values: Floats, axis: int) -> Any:
    return np.mean(values, axis=axis)


def _ratio(a: Floats, b: Floats, axis: int) -> Any:
    return np.mean(a, axis=axis) / np.mean(b, axis=axis)


def _mean_difference(a: Floats, b: Floats, axis: int) -> Any:
    return np.mean(a - b, axis=axis)


def _sample(values: ArrayLike, name: str) -> Floats:
    sample = np.asarray(values, float)
    if sample.ndim != 1 or sample.size == 0:
        raise ValueError(f"{name} must be (pieces,) and not empty, got shape {sample.shape}")
    if not np.isfinite(sample).all():
        missing = int((~np.isfinite(sample)).sum())
        raise ValueError(
            f"{missing} of {sample.size} {name} are NaN or infinite: leave these pieces out and count them"
        )
    return sample


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    one, other = _sample(a, "values"), _sample(b, "values")
    if one.size != other.size:
        raise ValueError(f"need two values of the same pieces, got {one.size} and {other.size}")
    return one, other


def _squares(matrices: ArrayLike | Iterable[ArrayLike]) -> Sequence[Floats]:
    given: list[Any] = list(matrices) if isinstance(matrices, Iterable) else [matrices]
    if given and np.ndim(given[0]) == 1:  # one matrix, whose rows were taken for matrices
        given = [np.asarray(given)]
    squares = [np.asarray(matrix, float) for matrix in given]
    for square in squares:
        if square.ndim != 2 or square.shape[0] != square.shape[1]:
            raise ValueError(f"matrices must be square, got shape {square.shape}")
        if not np.isfinite(square).all():
            raise ValueError(
                f"a matrix holds {int((~np.isfinite(square)).sum())} scores that are not finite: leave its rows and columns out"
            )
    if not any(len(square) > 1 for square in squares):
        raise ValueError(f"none of {len(squares)} matrices has two maps: nothing can be swapped")
    return squares


def _p_values(p: ArrayLike) -> Floats:
    values = _sample(p, "p-values")
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"p-values must lie in [0, 1], got {values.min()} to {values.max()}")
    return values


def _check(alternative: str, resamples: int = 1) -> None:
    if alternative not in ("two-sided", "greater", "less"):
        raise ValueError(f"alternative must be 'two-sided', 'greater' or 'less', got {alternative!r}")
    if resamples < 1:
        raise ValueError(f"need at least one resample, got {resamples}")
