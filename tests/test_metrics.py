"""Every metric against an independent implementation or brute force, ties included."""

import math
import warnings
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    jaccard_score,
    precision_recall_fscore_support,
)

from aiba_eval import metrics

SHAPE = (7, 5)
DEGENERATE = {"empty": np.zeros(SHAPE, bool), "full": np.ones(SHAPE, bool)}


@st.composite
def pairs(draw, shape=SHAPE):
    """A map, often with ties, and a mask that is neither empty nor full."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([1, 2, 3, 10, 0]))
    saliency = rng.random(shape) if levels == 0 else rng.integers(0, levels, shape) / 8
    mask = rng.random(shape) < draw(st.floats(0.05, 0.95))
    mask.flat[:2] = True, False
    return saliency + draw(st.sampled_from([0.0, 1.0])), rng.permutation(mask.ravel()).reshape(shape)


many = settings(max_examples=80, deadline=None)


def brute_average_precision(saliency, mask):
    """Sum over distinct values of the gain in recall times the precision."""
    value = recall = 0.0
    for level in sorted(set(saliency.ravel().tolist()), reverse=True):
        on = saliency >= level
        gained = (on & mask).sum() / mask.sum()
        value += (gained - recall) * (on & mask).sum() / on.sum()
        recall = gained
    return value


@many
@given(pairs())
def test_average_precision(pair):
    saliency, mask = pair
    got = metrics.average_precision(saliency, mask)
    assert got == pytest.approx(brute_average_precision(saliency, mask))
    assert got == pytest.approx(average_precision_score(mask.ravel(), saliency.ravel()))


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 5, 1000]))
def test_average_precisions_are_those_of_each_mask(seed, distinct):
    rng = np.random.default_rng(seed)
    saliency = rng.integers(distinct, size=SHAPE) / 7
    masks = [rng.random(SHAPE) < share for share in (0.02, 0.3, 0.9)]
    masks += [np.zeros(SHAPE, bool), np.ones(SHAPE, bool)]
    expected = [metrics.average_precision(saliency, mask) for mask in masks]
    np.testing.assert_allclose(metrics.average_precisions(saliency, masks), expected, rtol=1e-12)
    assert metrics.average_precisions(saliency, []).shape == (0,)
    with pytest.raises(ValueError, match="one shape"):
        metrics.average_precisions(saliency, [masks[0], masks[0][1:]])


def test_average_precision_of_a_constant_map_is_the_area():
    mask = np.zeros(SHAPE, bool)
    mask[:2] = True
    assert metrics.average_precision(np.full(SHAPE, 0.3), mask) == pytest.approx(mask.mean())


def binary(saliency, threshold):
    """DAAM's own thresholding."""
    low, high = saliency.min(), saliency.max()
    return (saliency - low) / (high - low) > threshold if high > low else np.zeros(saliency.shape, bool)


@many
@given(pairs(), st.sampled_from([0.0, 0.25, 0.4, 0.5, 0.9, 1.0]))
def test_iou(pair, threshold):
    saliency, mask = pair
    on = binary(saliency, threshold)
    got = metrics.iou(saliency, mask, threshold)
    assert got == pytest.approx(jaccard_score(mask.ravel(), on.ravel(), zero_division=0))
    assert got == pytest.approx((on & mask).sum() / ((on | mask).sum() + 1e-8), abs=1e-6)  # DAAM's form


@many
@given(pairs())
def test_iou_curve_and_area(pair):
    saliency, mask = pair
    taus = [0.0, 0.1, 0.5, 1.0]
    curve = metrics.iou_curve(saliency, mask, taus)
    np.testing.assert_allclose(curve, [metrics.iou(saliency, mask, t) for t in taus])
    assert metrics.iou_area(saliency, mask, taus) == pytest.approx(np.trapezoid(curve, taus))
    assert metrics.iou_area(saliency, mask, [0.2, 0.4]) == pytest.approx(
        (metrics.iou(saliency, mask, 0.2) + metrics.iou(saliency, mask, 0.4)) / 2
    )


def test_the_threshold_is_strict_and_the_map_is_normalised():
    saliency = np.array([[10.0, 11.0, 12.0]])
    mask = np.array([[False, True, True]])
    assert metrics.iou(saliency, mask, 0.5) == 0.5
    assert metrics.iou(saliency, mask, 0.49) == 1.0
    assert metrics.iou(saliency, mask, 1.0) == 0.0
    np.testing.assert_array_equal(metrics.normalise(saliency), [[0, 0.5, 1]])
    noise = 1 + 1e-8 * np.random.default_rng(0).random(SHAPE)
    assert not metrics.normalise(noise).any()


@pytest.mark.parametrize("taus", [[0.5], [0.5, 0.1], [0.5, 0.5], [[0.1, 0.2]]])
def test_thresholds_of_an_area_ascend(taus):
    with pytest.raises(ValueError, match="thresholds must be"):
        metrics.iou_area(np.eye(3), np.eye(3), taus)


@many
@given(pairs(), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_precision_recall_f1(pair, threshold):
    saliency, mask = pair
    on = binary(saliency, threshold)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = precision_recall_fscore_support(
            mask.ravel(), on.ravel(), average="binary", pos_label=True, zero_division=np.nan
        )[:3]
    np.testing.assert_allclose(metrics.precision_recall_f1(saliency, mask, threshold), expected)


@many
@given(pairs())
def test_profile_correlations(pair):
    saliency, mask = pair
    a, b = metrics.frequency_profile(saliency), metrics.frequency_profile(mask)
    np.testing.assert_allclose(a, [np.mean([row[f] for row in saliency]) for f in range(SHAPE[1])])
    if np.ptp(a) < 1e-9 or np.ptp(b) < 1e-9:
        assert math.isnan(metrics.profile_pearson(saliency, mask))
        assert math.isnan(metrics.profile_spearman(saliency, mask))
        return
    pearson, spearman = metrics.profile_pearson(saliency, mask), metrics.profile_spearman(saliency, mask)
    assert pearson == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-9)
    assert pearson == pytest.approx(stats.pearsonr(a, b).statistic, abs=1e-12)
    ranks = [[np.mean([x < y, x <= y]) for y in p for x in p] for p in (a, b)]
    ranks = np.reshape(ranks, (2, SHAPE[1], SHAPE[1])).sum(-1)  # average ranks, up to a constant
    assert spearman == pytest.approx(np.corrcoef(ranks)[0, 1], abs=1e-9)
    assert spearman == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_profiles_accept_real_targets_and_reject_nothing_silently():
    rng = np.random.default_rng(0)
    energy = rng.random(SHAPE)
    assert metrics.profile_pearson(2 * energy + 1, energy) == pytest.approx(1)
    assert metrics.profile_spearman(np.exp(energy.mean(0)) * np.ones(SHAPE), energy) == pytest.approx(1)
    flat = np.repeat(rng.random((SHAPE[0], 1)), SHAPE[1], 1).astype(np.float32)  # no frequency axis
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(metrics.profile_pearson(flat, energy))
        assert math.isnan(metrics.profile_spearman(energy, flat))
    with pytest.raises(ValueError, match=r"\(5,\)"):
        metrics.frequency_profile(np.ones(5))


@many
@given(pairs())
def test_temporal_correlations_are_the_profiles_turned_round(pair):
    saliency, mask = pair
    for temporal, profile in (
        (metrics.temporal_pearson, metrics.profile_pearson),
        (metrics.temporal_spearman, metrics.profile_spearman),
    ):
        assert temporal(saliency, mask) == pytest.approx(profile(saliency.T, mask.T), nan_ok=True)


def test_temporal_correlation_with_the_energy():
    rng = np.random.default_rng(0)
    power = rng.exponential(size=SHAPE) ** 3
    per_column = [sum(power[t]) for t in range(SHAPE[0])]
    rows = rng.random((1, SHAPE[1]))  # a map of other frequencies and the same times
    assert metrics.temporal_pearson(np.outer(per_column, rows), power) == pytest.approx(1)
    assert metrics.temporal_spearman(np.outer(np.log(per_column), rows), power) == pytest.approx(1)
    other = rng.random(SHAPE)
    expected = stats.pearsonr([np.mean(row) for row in other], per_column).statistic
    assert metrics.temporal_pearson(other, power) == pytest.approx(expected)
    assert math.isnan(metrics.temporal_pearson(other, np.tile(rows, (SHAPE[0], 1))))  # a band is the same at all times
    np.testing.assert_allclose(metrics.temporal_profile(power), np.array(per_column) / SHAPE[1])


@many
@given(pairs(), st.integers(0, 2), st.integers(0, 2))
def test_pointing_game(pair, mel, time):
    saliency, mask = pair
    hits = []
    for t in range(SHAPE[0]):
        for f in range(SHAPE[1]):
            if saliency[t, f] == saliency.max():
                box = mask[max(0, t - time) : t + time + 1, max(0, f - mel) : f + mel + 1]
                hits.append(box.any())
    got = metrics.pointing_game(saliency, mask, mel_tolerance=mel, time_tolerance=time)
    assert got == pytest.approx(np.mean(hits))


def test_pointing_tolerance_is_along_its_own_axis_and_does_not_wrap():
    mask = np.zeros(SHAPE, bool)
    mask[0, 0] = True
    for point, mel, time in (((0, 1), 1, 0), ((1, 0), 0, 1)):
        saliency = np.zeros(SHAPE)
        saliency[point] = 1
        assert metrics.pointing_game(saliency, mask) == 0
        assert metrics.pointing_game(saliency, mask, mel_tolerance=mel, time_tolerance=time) == 1
        assert metrics.pointing_game(saliency, mask, mel_tolerance=time, time_tolerance=mel) == 0
    corner = np.zeros(SHAPE)
    corner[-1, -1] = 1
    assert metrics.pointing_game(corner, mask, mel_tolerance=1, time_tolerance=1) == 0
    assert metrics.pointing_game(np.ones(SHAPE), mask) == pytest.approx(mask.mean())  # not a hit
    with pytest.raises(ValueError, match="tolerances"):
        metrics.pointing_game(corner, mask, mel_tolerance=-1)


@many
@given(pairs())
def test_mass_accuracy(pair):
    saliency, mask = pair
    if saliency.sum() == 0:
        assert math.isnan(metrics.mass_accuracy(saliency, mask))
    else:
        inside = sum(s for s, m in zip(saliency.ravel().tolist(), mask.ravel()) if m)
        assert metrics.mass_accuracy(saliency, mask) == pytest.approx(inside / saliency.sum())


def test_mass_of_signed_maps_is_undefined():
    mask = np.eye(3, dtype=bool)
    assert math.isnan(metrics.mass_accuracy(-np.eye(3), mask))
    assert math.isnan(metrics.mass_accuracy(np.zeros((3, 3)), mask))


@many
@given(pairs(shape=(2, 3)))
def test_rank_accuracy_is_the_mean_over_all_ways_to_break_ties(pair):
    saliency, mask = (a.ravel() for a in pair)
    size = int(mask.sum())
    orders = [o for o in permutations(range(6)) if all(saliency[i] >= saliency[j] for i, j in pairwise(o))]
    expected = np.mean([np.mean([mask[i] for i in order[:size]]) for order in orders])
    assert metrics.rank_accuracy(*pair) == pytest.approx(expected)


@many
@given(pairs(), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_confusion(pair, threshold):
    saliency, mask = pair
    got = metrics.confusion(saliency, mask, threshold)
    on = binary(saliency, threshold)
    tn, fp, fn, tp = confusion_matrix(mask.ravel(), on.ravel(), labels=[False, True]).ravel()
    assert got == (tp, fp, fn, tn)
    precision, recall, f1 = metrics.precision_recall_f1(saliency, mask, threshold)
    single = metrics.averaged([got])
    for average in ("micro", "macro", "positive-weighted"):
        assert single[average] == pytest.approx(
            {"precision": precision, "recall": recall, "f1": f1, "iou": metrics.iou(saliency, mask, threshold)},
            nan_ok=True,
        )


def test_confusion_of_an_empty_mask_counts():
    saliency = np.arange(35.0).reshape(SHAPE)
    assert metrics.confusion(saliency, DEGENERATE["empty"], 0.5) == (0, 17, 0, 18)
    assert metrics.confusion(saliency, DEGENERATE["full"], 0.5) == (17, 0, 18, 0)


@st.composite
def labels(draw):
    """Decisions about some labels, of which some are never right, never predicted or never there."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 5))
    truth = rng.random((40, count)) < rng.choice([0.0, 0.1, 0.5, 1.0], count)
    return truth, rng.random((40, count)) < rng.choice([0.0, 0.3, 0.7], count)


@many
@given(labels())
def test_averages_are_scikit_learns(decisions):
    truth, on = decisions
    counts = [
        metrics.Confusion(*(int(x.sum()) for x in (o & t, o & ~t, ~o & t, ~o & ~t))) for o, t in zip(on.T, truth.T)
    ]
    got = metrics.averaged(counts)
    for ours, theirs in (("micro", "micro"), ("macro", "macro"), ("positive-weighted", "weighted")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # one label is a column, which scikit-learn takes for a binary problem: `labels` makes it one of several
            expected = precision_recall_fscore_support(
                np.c_[truth, np.zeros(40, bool)],
                np.c_[on, np.zeros(40, bool)],
                average=theirs,
                labels=list(range(len(counts))),
                zero_division=np.nan,
            )[:3]
        if (
            theirs == "weighted"
        ):  # where only labels without positives are defined, scikit-learn drops the weights; we say nan
            defined = (on.any(0), truth.any(0), on.any(0) | truth.any(0))
            expected = [e if truth[:, d].any() else np.nan for e, d in zip(expected, defined)]
        np.testing.assert_allclose([got[ours][n] for n in ("precision", "recall", "f1")], expected, atol=1e-12)
        ious = [(o & t).sum() / (o | t).sum() if (o | t).any() else np.nan for o, t in zip(on.T, truth.T)]
        if ours == "micro":
            iou = (on & truth).sum() / (on | truth).sum() if (on | truth).any() else np.nan
        else:
            weights = np.array([1.0 if ours == "macro" else t.sum() for t in truth.T])
            kept = ~np.isnan(ious) & (weights > 0)
            iou = np.average(np.array(ious)[kept], weights=weights[kept]) if kept.any() else np.nan
        np.testing.assert_allclose(got[ours]["iou"], iou)


def test_averages_against_jaccard_score_and_by_hand():
    counts = [(8, 2, 0, 90), (1, 0, 9, 90)]
    got = metrics.averaged(counts)
    assert got["micro"] == pytest.approx({"precision": 9 / 11, "recall": 0.5, "f1": 18 / 29, "iou": 9 / 20})
    assert got["macro"] == pytest.approx(
        {"precision": 0.9, "recall": 0.55, "f1": (16 / 18 + 2 / 11) / 2, "iou": (0.8 + 0.1) / 2}
    )
    assert got["positive-weighted"]["recall"] == pytest.approx((8 * 1.0 + 10 * 0.1) / 18)
    rng = np.random.default_rng(0)
    truth, on = rng.random((2, 50, 3)) < 0.4
    counts = [((o & t).sum(), (o & ~t).sum(), (~o & t).sum(), (~o & ~t).sum()) for o, t in zip(on.T, truth.T)]
    for ours, theirs in (("micro", "micro"), ("macro", "macro"), ("positive-weighted", "weighted")):
        assert metrics.averaged(counts)[ours]["iou"] == pytest.approx(jaccard_score(truth, on, average=theirs))
    for bad in ([], [(1, 2, 3)], [(1, 2, 3, -4)], (1, 2, 3, 4)):
        with pytest.raises(ValueError, match="of at least one label"):
            metrics.averaged(bad)


# --- conventions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", DEGENERATE.values(), ids=DEGENERATE)
def test_an_empty_or_full_mask_is_nan_everywhere(mask):
    saliency = np.random.default_rng(0).random(SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = metrics.evaluate(saliency, mask)
        assert np.isnan(metrics.iou_curve(saliency, mask)).all()
    assert tuple(result) == metrics.METRICS
    assert all(math.isnan(v) for v in result.values())


def test_evaluate_is_the_single_functions():
    rng = np.random.default_rng(1)
    saliency, mask = rng.random((128, 64)), rng.random((128, 64)) < 0.2
    result = metrics.evaluate(saliency, mask, threshold=0.7, thresholds=[0.1, 0.9], mel_tolerance=1, time_tolerance=2)
    precision, recall, f1 = metrics.precision_recall_f1(saliency, mask, 0.7)
    assert result == {
        "average_precision": metrics.average_precision(saliency, mask),
        "iou": metrics.iou(saliency, mask, 0.7),
        "iou_area": metrics.iou_area(saliency, mask, [0.1, 0.9]),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "profile_pearson": metrics.profile_pearson(saliency, mask),
        "profile_spearman": metrics.profile_spearman(saliency, mask),
        "temporal_pearson": metrics.temporal_pearson(saliency, mask),
        "temporal_spearman": metrics.temporal_spearman(saliency, mask),
        "pointing_game": metrics.pointing_game(saliency, mask, mel_tolerance=1, time_tolerance=2),
        "mass_accuracy": metrics.mass_accuracy(saliency, mask),
        "rank_accuracy": metrics.rank_accuracy(saliency, mask),
    }
    assert tuple(result) == metrics.METRICS
    some = metrics.evaluate(saliency, mask, metrics=["iou", "f1", "average_precision"], threshold=0.7)
    assert some == {name: result[name] for name in ("iou", "f1", "average_precision")}
    assert tuple(some) == ("iou", "f1", "average_precision")
    with pytest.raises(ValueError, match="unknown metrics.*'accuracy'.*average_precision"):
        metrics.evaluate(saliency, mask, metrics=["accuracy"])
    assert set(metrics.UNDEFINED) <= set(metrics.METRICS)


def test_a_perfect_map_scores_one():
    mask = np.zeros((128, 64), bool)
    mask[20:90, 3:9] = True
    assert metrics.evaluate(mask, mask) == pytest.approx(
        {**dict.fromkeys(metrics.METRICS, 1.0), "iou_area": 1 - 0.05 / 2}  # nothing lies above the threshold 1
    )


@many
@given(pairs())
def test_affine_changes_of_the_map_change_only_mass(pair):
    saliency, mask = pair
    a, b = metrics.evaluate(saliency, mask), metrics.evaluate(saliency * 4 + 2, mask)  # exact in binary
    np.testing.assert_allclose(
        [v for k, v in a.items() if k != "mass_accuracy"], [v for k, v in b.items() if k != "mass_accuracy"], atol=1e-9
    )


FUNCTIONS = [
    metrics.average_precision,
    metrics.iou,
    metrics.iou_curve,
    metrics.iou_area,
    metrics.precision_recall_f1,
    metrics.profile_pearson,
    metrics.profile_spearman,
    metrics.temporal_pearson,
    metrics.temporal_spearman,
    metrics.confusion,
    metrics.pointing_game,
    metrics.mass_accuracy,
    metrics.rank_accuracy,
    metrics.evaluate,
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_bad_input_is_refused(function):
    good, mask = np.random.default_rng(0).random(SHAPE), np.eye(*SHAPE, dtype=bool)
    bad = good.copy()
    bad[0, 0] = np.nan
    bad[1, 1] = np.inf
    with pytest.raises(ValueError, match="map holds 2 NaN or infinite of 35 cells"):
        function(bad, mask)
    with pytest.raises(ValueError, match=r"map is \(7, 5\), (mask|target) is \(5, 7\)"):
        function(good, mask.T)
    with pytest.raises(ValueError, match=r"\(35,\)"):
        function(good.ravel(), mask.ravel())
    if not function.__name__.startswith(("profile", "temporal")):
        with pytest.raises(ValueError, match="mask must be boolean"):
            function(good, good)
