"""How well a map agrees with a mask.

Conventions
-----------

``saliency`` is a real ``(time, mel)`` array, ``mask`` a boolean one of the same shape. Every function takes the
saliency first, then what it is judged by, and returns a float (or floats).

* NaN or infinite values raise: a map that is missing must be counted as missing, not scored.
* An **empty or full mask** cannot tell one map from another: every metric against it is ``nan``.
* A **constant map** (within a millionth of its size: float32 resizing leaves such noise) is on nowhere after
  min–max normalisation. A constant profile has no correlation: ``nan``.
* Ties count in expectation, never in favour of the map: a uniform map scores its chance level.
* ``nan`` says "undefined"; :data:`UNDEFINED` says when. Count such cases, do not average over them in silence.

No metric means much alone: see :mod:`aiba_eval.references` for what a map that never saw the model scores.

Metrics
-------

* :func:`average_precision`: area under the precision–recall curve of the ranking of cells.
* :func:`iou`, :func:`iou_curve`, :func:`iou_area`: overlap with the thresholded map, at one threshold or over all.
* :func:`precision_recall_f1`: of the thresholded map.
* :func:`profile_pearson`, :func:`profile_spearman`: correlation of the time-averaged profiles over frequency.
* :func:`temporal_pearson`, :func:`temporal_spearman`: correlation of the frequency-averaged profiles over time.
* :func:`pointing_game`: whether the maximum lies on the mask.
* :func:`mass_accuracy`: share of the map's sum on the mask.
* :func:`rank_accuracy`: share of the top cells, as many as the mask has, on the mask.
* :func:`evaluate`: all of these.
* :func:`confusion`, :func:`averaged`: counts of cells, and precision, recall, F1 and IoU over many masks: micro, macro and
  positive-weighted.

Onsets and beats are in :mod:`aiba_eval.rhythm`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

#: Thresholds on the normalised map at which the IoU curve is read.
THRESHOLDS: tuple[float, ...] = tuple(float(t) for t in np.linspace(0, 1, 21))

#: When each metric of :func:`evaluate` is ``nan`` although the mask is neither empty nor full.
UNDEFINED: Mapping[str, str] = MappingProxyType(
    {
        "precision": "no cell is above the threshold",
        "profile_pearson": "a profile over frequency is constant",
        "profile_spearman": "a profile over frequency is constant",
        "temporal_pearson": "a profile over time is constant",
        "temporal_spearman": "a profile over time is constant",
        "mass_accuracy": "the map has negative values or no mass",
    }
)


def validate(saliency: ArrayLike, mask: ArrayLike) -> tuple[Floats, Mask]:
    """Check a map and a mask, and return them as float64 and bool.

    Raises
    ------
    ValueError
        If either is not (time, mel), their shapes differ, the map holds NaN or infinite values, or the mask holds
        anything but 0 and 1.
    """
    values, target = _validate_real(saliency, mask, "mask")
    if not np.isin(target, (0, 1)).all():
        raise ValueError("mask must be boolean (or 0 and 1)")
    return values, target.astype(bool)


def _validate_real(saliency: ArrayLike, target: ArrayLike, name: str) -> tuple[Floats, Floats]:
    values, other = np.asarray(saliency, float), np.asarray(target, float)
    if values.ndim != 2 or values.shape != other.shape or values.size == 0:
        raise ValueError(f"need two (time, mel) arrays of one shape: map is {values.shape}, {name} is {other.shape}")
    for label, array in (("map", values), (name, other)):
        if not np.isfinite(array).all():
            raise ValueError(f"{label} holds {int((~np.isfinite(array)).sum())} NaN or infinite of {array.size} cells")
    return values, other


def _trivial(mask: Mask) -> bool:
    return not mask.any() or bool(mask.all())


def _constant(x: Floats) -> bool:
    return bool(np.ptp(x) <= 1e-6 * np.abs(x).max())


def normalise(saliency: ArrayLike) -> Floats:
    """Min–max normalisation to [0, 1]: (a − min a) / (max a − min a); zeros for a constant map.

    As in DAAM (Tang et al., 2023), without its 1e-8 in the denominator.
    """
    values = np.asarray(saliency, float)
    if _constant(values):
        return np.zeros_like(values)
    low = values.min()
    return (values - low) / (values.max() - low)


def average_precision(saliency: ArrayLike, mask: ArrayLike) -> float:
    """Average precision: AP = Σ_n (R_n − R_{n−1}) P_n over the distinct values of the map, highest first.

    Tied cells enter together, so a constant map scores the area of the mask. No interpolation. Computed by
    ``sklearn.metrics.average_precision_score``.

    Parameters
    ----------
    saliency : array_like, shape (time, mel)
    mask : array_like of bool, shape (time, mel)

    Returns
    -------
    float
        In (0, 1]; ``nan`` for an empty or full mask (where scikit-learn returns 0 with a warning, or 1).

    Raises
    ------
    ValueError
        As :func:`validate`.
    """
    values, target = validate(saliency, mask)
    if _trivial(target):
        return float("nan")
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(target.ravel(), values.ravel()))


def average_precisions(saliency: ArrayLike, masks: Sequence[ArrayLike]) -> Floats:
    """:func:`average_precision` of one map against several masks, which takes one sort instead of one each.

    Swaps need the score of every map against every mask: of 150 pieces those are 22500 for each word.

    Parameters
    ----------
    saliency : array_like, shape (time, mel)
    masks : sequence of array_like of bool, shape (time, mel)

    Returns
    -------
    ndarray, shape (masks,)
        Those of :func:`average_precision` but for rounding.

    Raises
    ------
    ValueError
        As :func:`validate`, of the first mask that is refused.
    """
    checked = [validate(saliency, mask) for mask in masks]
    if not checked:
        return np.zeros(0)
    values = checked[0][0].ravel()
    order = np.argsort(-values, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(values[order])), values.size - 1)  # the last of each group of tied cells
    scores = []
    for _, mask in checked:
        hits = np.cumsum(mask.ravel()[order])[ends]
        steps = np.diff(hits, prepend=0)
        scores.append(float("nan") if _trivial(mask) else float((steps * (hits / (ends + 1))).sum() / hits[-1]))
    return np.asarray(scores)


def iou(saliency: ArrayLike, mask: ArrayLike, threshold: float = 0.5) -> float:
    """Intersection over union of the mask and the cells of the normalised map that lie strictly above a threshold.

    |on ∩ mask| / |on ∪ mask| with on = normalise(a) > τ (DAAM, Tang et al., 2023). Fix the threshold on other data.

    Parameters
    ----------
    saliency : array_like, shape (time, mel)
    mask : array_like of bool, shape (time, mel)
    threshold : float
        τ, on the map normalised to [0, 1].

    Returns
    -------
    float
        In [0, 1]; ``nan`` for an empty or full mask.

    Raises
    ------
    ValueError
        As :func:`validate`.
    """
    return float(iou_curve(saliency, mask, (threshold,))[0])


def iou_curve(saliency: ArrayLike, mask: ArrayLike, thresholds: ArrayLike = THRESHOLDS) -> Floats:
    """:func:`iou` at each threshold, shape (thresholds,)."""
    values, target = validate(saliency, mask)
    taus = np.asarray(thresholds, float)
    if taus.ndim != 1:
        raise ValueError(f"thresholds must be a sequence, got shape {taus.shape}")
    if _trivial(target):
        return np.full(taus.shape, np.nan)
    on = normalise(values) > taus[:, None, None]
    return (on & target).sum((1, 2)) / (on | target).sum((1, 2))


def iou_area(saliency: ArrayLike, mask: ArrayLike, thresholds: ArrayLike = THRESHOLDS) -> float:
    """Mean of the IoU curve: its integral by the trapezoidal rule, over the range of the thresholds.

    Free of the choice of one threshold. At least two ascending thresholds. In [0, 1]; ``nan`` as :func:`iou`.
    """
    return curve_area(iou_curve(saliency, mask, thresholds), thresholds)


def curve_area(curve: ArrayLike, thresholds: ArrayLike) -> float:
    """Trapezoidal integral of a curve over ascending thresholds, divided by their range."""
    values = np.asarray(curve, float)
    taus = np.asarray(thresholds, float)
    if taus.ndim != 1 or taus.size < 2 or np.any(np.diff(taus) <= 0):
        raise ValueError(f"thresholds must be at least two ascending numbers, got {taus.tolist()}")
    return float(((values[1:] + values[:-1]) / 2 * np.diff(taus)).sum() / (taus[-1] - taus[0]))


def precision_recall_f1(saliency: ArrayLike, mask: ArrayLike, threshold: float = 0.5) -> tuple[float, float, float]:
    """Precision, recall and F1 of the normalised map strictly above a threshold.

    P = |on ∩ mask| / |on|, R = |on ∩ mask| / |mask|, F1 = 2 |on ∩ mask| / (|on| + |mask|).

    Parameters
    ----------
    saliency : array_like, shape (time, mel)
    mask : array_like of bool, shape (time, mel)
    threshold : float
        τ, on the map normalised to [0, 1].

    Returns
    -------
    precision, recall, f1 : float
        All ``nan`` for an empty or full mask. Precision is ``nan`` where nothing is on; recall and F1 are 0 then.

    Raises
    ------
    ValueError
        As :func:`validate`.
    """
    values, target = validate(saliency, mask)
    if _trivial(target):
        return (float("nan"),) * 3
    on = normalise(values) > threshold
    both, chosen, wanted = int((on & target).sum()), int(on.sum()), int(target.sum())
    return both / chosen if chosen else float("nan"), both / wanted, 2 * both / (chosen + wanted)


def frequency_profile(values: ArrayLike) -> Floats:
    """Mean over time of a (time, mel) array, shape (mel,)."""
    return _profile(values, 0)


def temporal_profile(values: ArrayLike) -> Floats:
    """Mean over frequency of a (time, mel) array, shape (time,)."""
    return _profile(values, 1)


def profile_pearson(saliency: ArrayLike, target: ArrayLike) -> float:
    """Pearson correlation of the two frequency profiles, by ``scipy.stats.pearsonr``.

    The coefficient only: neighbouring bands are not independent draws, so the analytic p-value is far too small
    (independent smooth profiles over 64 bands exceed |r| = 0.5 about every second time). Compare with a null instead.

    Parameters
    ----------
    saliency : array_like, shape (time, mel)
    target : array_like, shape (time, mel)
        A mask, or any real target such as a soft share or an energy.

    Returns
    -------
    float
        In [−1, 1]; ``nan`` if either profile is constant, as on a lattice without frequency axis.

    Raises
    ------
    ValueError
        If shapes differ or values are not finite.
    """
    return _correlation(saliency, target, 0, "pearsonr")


def profile_spearman(saliency: ArrayLike, target: ArrayLike) -> float:
    """Spearman rank correlation of the two frequency profiles, by ``scipy.stats.spearmanr``; ties share their rank.

    Parameters, returns and errors as in :func:`profile_pearson`.
    """
    return _correlation(saliency, target, 0, "spearmanr")


def temporal_pearson(saliency: ArrayLike, target: ArrayLike) -> float:
    """Pearson correlation of the two profiles over time: does the map follow *when* the instrument plays?

    With the power mel of the stem as the target it is the temporal energy correlation: the map's profile against the
    stem's energy per column. With a mask, against the number of rows that are on.

    Parameters, returns and errors as in :func:`profile_pearson`; ``nan`` against a target that is constant in time, such
    as a knowledge band. Columns are no independent draws either: compare with a time shift.
    """
    return _correlation(saliency, target, 1, "pearsonr")


def temporal_spearman(saliency: ArrayLike, target: ArrayLike) -> float:
    """Spearman rank correlation of the two profiles over time; free of the scale of the energy.

    Parameters, returns and errors as in :func:`temporal_pearson`.
    """
    return _correlation(saliency, target, 1, "spearmanr")


def _profile(values: ArrayLike, axis: int) -> Floats:
    array = np.asarray(values, float)
    if array.ndim != 2:
        raise ValueError(f"need a (time, mel) array, got shape {array.shape}")
    return array.mean(axis=axis)


def _correlation(saliency: ArrayLike, target: ArrayLike, axis: int, name: str) -> float:
    values, other = _validate_real(saliency, target, "target")
    a, b = _profile(values, axis), _profile(other, axis)
    if _constant(a) or _constant(b):
        return float("nan")
    from scipy import stats

    return float(getattr(stats, name)(a, b)[0])


def dilate(mask: ArrayLike, *, mel_tolerance: int = 0, time_tolerance: int = 0) -> Mask:
    """Cells within a number of mel rows and time columns of the mask (a box), shape (time, mel)."""
    target = np.asarray(mask, bool)
    if mel_tolerance < 0 or time_tolerance < 0:
        raise ValueError(f"tolerances must not be negative, got mel {mel_tolerance}, time {time_tolerance}")
    from scipy.ndimage import maximum_filter

    size = (2 * int(time_tolerance) + 1, 2 * int(mel_tolerance) + 1)
    return maximum_filter(target, size=size, mode="constant", cval=0).astype(bool)


def pointing_game(saliency: ArrayLike, mask: ArrayLike, *, mel_tolerance: int = 0, time_tolerance: int = 0) -> float:
    """Pointing game (Zhang et al., 2016): does the maximum of the map lie on the mask?

    With ties, the chance that a maximum drawn among them does: (tied maxima on the mask) / (tied maxima). So a
    uniform map scores the area of the mask, not a hit.

    Parameters
    ----------
    saliency : array_like, shape (time, mel)
    mask : array_like of bool, shape (time, mel)
    mel_tolerance, time_tolerance : int
        Rows and columns by which a maximum may miss the mask. Zhang's 15 pixels would be a quarter of 64 mel
        bands: use 0 or 1.

    Returns
    -------
    float
        In [0, 1], 0 or 1 without ties; ``nan`` for an empty or full mask.

    Raises
    ------
    ValueError
        As :func:`validate`, or if a tolerance is negative.
    """
    values, target = validate(saliency, mask)
    near = dilate(target, mel_tolerance=mel_tolerance, time_tolerance=time_tolerance)
    if _trivial(target):
        return float("nan")
    return float(near[values == values.max()].mean())


def mass_accuracy(saliency: ArrayLike, mask: ArrayLike) -> float:
    """Relevance mass accuracy (Arras et al., 2022): Σ a·m / Σ a.

    Parameters
    ----------
    saliency : array_like, shape (time, mel)
        Non-negative.
    mask : array_like of bool, shape (time, mel)

    Returns
    -------
    float
        In [0, 1]; ``nan`` for an empty or full mask, and for a map with negative values or no mass, whose ratio
        would not be a share.

    Raises
    ------
    ValueError
        As :func:`validate`.
    """
    values, target = validate(saliency, mask)
    total = values.sum()
    if _trivial(target) or values.min() < 0 or not total > 0:
        return float("nan")
    return float(values[target].sum() / total)


def rank_accuracy(saliency: ArrayLike, mask: ArrayLike) -> float:
    """Relevance rank accuracy (Arras et al., 2022): share of the K highest cells on the mask, K the mask's size.

    Where a tie straddles the K-th place, its cells count by the expectation of a draw among them.

    Parameters
    ----------
    saliency : array_like, shape (time, mel)
    mask : array_like of bool, shape (time, mel)

    Returns
    -------
    float
        In [0, 1]; ``nan`` for an empty or full mask.

    Raises
    ------
    ValueError
        As :func:`validate`.
    """
    values, target = validate(saliency, mask)
    if _trivial(target):
        return float("nan")
    size = int(target.sum())
    border = np.partition(values.ravel(), -size)[-size]
    above, tied = values > border, values == border
    hits = target[above].sum() + (size - above.sum()) * target[tied].mean()
    return float(hits / size)


class Confusion(NamedTuple):
    """Cells of a thresholded map against a mask.

    Attributes
    ----------
    tp, fp, fn, tn : int
        On both; on the map only; on the mask only; on neither.
    """

    tp: int
    fp: int
    fn: int
    tn: int


def confusion(saliency: ArrayLike, mask: ArrayLike, threshold: float = 0.5) -> Confusion:
    """Counts of cells on and off, of the normalised map strictly above a threshold.

    Unlike the other metrics it is defined for an empty or a full mask: add the counts of many masks, then
    :func:`averaged`.

    Parameters
    ----------
    saliency : array_like, shape (time, mel)
    mask : array_like of bool, shape (time, mel)
    threshold : float
        τ, on the map normalised to [0, 1].

    Returns
    -------
    Confusion

    Raises
    ------
    ValueError
        As :func:`validate`.
    """
    values, target = validate(saliency, mask)
    on = normalise(values) > threshold
    both, chosen, wanted = int((on & target).sum()), int(on.sum()), int(target.sum())
    return Confusion(both, chosen - both, wanted - both, on.size - chosen - wanted + both)


def averaged(confusions: Sequence[Confusion] | ArrayLike) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and IoU over several labels, averaged in the three usual ways.

    With P = TP / (TP + FP), R = TP / (TP + FN), F1 = 2 TP / (2 TP + FP + FN), IoU = TP / (TP + FP + FN) of each label::

        micro               of the sums of TP, FP and FN: every cell counts the same, so wide masks decide
        macro               mean over labels: every label counts the same
        positive-weighted   mean weighted by each label's positives TP + FN; scikit-learn's ``average="weighted"``

    A label whose denominator is 0 is left out of that mean, as with scikit-learn's ``zero_division=nan``. If none of those
    left has positives, the weighted mean is ``nan``; scikit-learn would drop the weights.

    Parameters
    ----------
    confusions : sequence of Confusion, or array_like of shape (labels, 4)
        One per label. For a score per class, add those of a class over pieces first.

    Returns
    -------
    dict of str to dict of str to float
        ``micro``, ``macro`` and ``positive-weighted``, each with ``precision``, ``recall``, ``f1``, ``iou``; ``nan`` where
        no label has a denominator.

    Raises
    ------
    ValueError
        If there is no label, or the counts are not (labels, 4) and non-negative.
    """
    counts = np.asarray(confusions, float)
    if counts.ndim != 2 or counts.shape[1] != 4 or not len(counts) or counts.min() < 0:
        raise ValueError(f"need (tp, fp, fn, tn) of at least one label, got shape {counts.shape}")
    names = ("precision", "recall", "f1", "iou")

    def ratios(rows: Floats) -> tuple[Floats, Mask]:
        tp, fp, fn, _ = rows.T
        above = np.stack([tp, tp, 2 * tp, tp])
        below = np.stack([tp + fp, tp + fn, 2 * tp + fp + fn, tp + fp + fn])
        return np.divide(above, below, out=np.zeros_like(above), where=below > 0), below > 0

    def mean(weights: Floats) -> dict[str, float]:
        used = weights * defined
        total = used.sum(axis=1)
        means = np.divide((used * each).sum(axis=1), total, out=np.full(4, np.nan), where=total > 0)
        return dict(zip(names, means.tolist()))

    each, defined = ratios(counts)
    whole, there = ratios(counts.sum(axis=0, keepdims=True))
    return {
        "micro": {name: float(v[0]) if ok[0] else float("nan") for name, v, ok in zip(names, whole, there)},
        "macro": mean(np.ones(len(counts))),
        "positive-weighted": mean(counts[:, 0] + counts[:, 2]),
    }


def evaluate(
    saliency: ArrayLike,
    mask: ArrayLike,
    *,
    metrics: Sequence[str] | None = None,
    threshold: float = 0.5,
    thresholds: ArrayLike = THRESHOLDS,
    mel_tolerance: int = 0,
    time_tolerance: int = 0,
) -> dict[str, float]:
    """Every metric of a map against a mask.

    Parameters
    ----------
    saliency : array_like, shape (time, mel)
    mask : array_like of bool, shape (time, mel)
    metrics : sequence of str, optional
        A selection of :data:`METRICS`; nothing else is computed. Default all.
    threshold : float
        For ``iou``, ``precision``, ``recall`` and ``f1``.
    thresholds : array_like
        For ``iou_area``.
    mel_tolerance, time_tolerance : int
        For ``pointing_game``.

    Returns
    -------
    dict of str to float
        By name, in the order asked for. All ``nan`` for an empty or full mask.

    Raises
    ------
    ValueError
        As :func:`validate`, or if a metric is unknown.
    """
    chosen = METRICS if metrics is None else tuple(metrics)
    unknown = [name for name in chosen if name not in METRICS]
    if unknown:
        raise ValueError(f"unknown metrics {unknown}; known: {', '.join(METRICS)}")
    values, target = validate(saliency, mask)
    if _trivial(target):
        return dict.fromkeys(chosen, float("nan"))
    on: dict[str, float] = {}
    if not {"precision", "recall", "f1"}.isdisjoint(chosen):
        on = dict(zip(("precision", "recall", "f1"), precision_recall_f1(values, target, threshold)))
    compute: Mapping[str, Callable[[], float]] = {
        "average_precision": lambda: average_precision(values, target),
        "iou": lambda: iou(values, target, threshold),
        "iou_area": lambda: iou_area(values, target, thresholds),
        "profile_pearson": lambda: profile_pearson(values, target),
        "profile_spearman": lambda: profile_spearman(values, target),
        "temporal_pearson": lambda: temporal_pearson(values, target),
        "temporal_spearman": lambda: temporal_spearman(values, target),
        "pointing_game": lambda: pointing_game(
            values, target, mel_tolerance=mel_tolerance, time_tolerance=time_tolerance
        ),
        "mass_accuracy": lambda: mass_accuracy(values, target),
        "rank_accuracy": lambda: rank_accuracy(values, target),
    }
    return {name: on[name] if name in on else compute[name]() for name in chosen}


#: Names of the metrics, in the order of :func:`evaluate`.
METRICS: tuple[str, ...] = (
    "average_precision",
    "iou",
    "iou_area",
    "precision",
    "recall",
    "f1",
    "profile_pearson",
    "profile_spearman",
    "temporal_pearson",
    "temporal_spearman",
    "pointing_game",
    "mass_accuracy",
    "rank_accuracy",
)
