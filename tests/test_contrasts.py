"""Swaps by hand and by brute force, what each reference has of them, and the controls of the model."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from aiba_eval import contrasts, controls, metrics, references, statistics

SHAPE = (16, 12)


def test_cross_scores_are_every_map_against_every_mask():
    rng = np.random.default_rng(0)
    maps, masks = rng.random((3, *SHAPE)), rng.random((3, *SHAPE)) < 0.3
    got = contrasts.cross_scores(list(maps), list(masks), "iou", threshold=0.7)
    for i in range(3):
        for j in range(3):
            assert got[i, j] == metrics.iou(maps[i], masks[j], 0.7)
    assert contrasts.cross_scores(list(maps), list(masks))[1, 2] == metrics.average_precision(maps[1], masks[2])
    with pytest.raises(ValueError, match="3 maps and 2 masks"):
        contrasts.cross_scores(list(maps), list(masks[:2]))
    with pytest.raises(ValueError, match="unknown metrics"):
        contrasts.cross_scores(list(maps), list(masks), "accuracy")


def test_swap_by_hand():
    np.testing.assert_allclose(contrasts.swap([[0.9, 0.2], [0.4, 0.5]]), [0.5, 0.3])
    np.testing.assert_allclose(contrasts.swap([[0.9, 0.0, 0.3], [0.1, 0.5, 0.3], [0.3, 0.2, 0.3]]), [0.7, 0.4, 0.0])
    for bad in ([[1.0]], [[1.0, 2.0]], [1.0, 2.0]):
        with pytest.raises(ValueError, match="n at least 2"):
            contrasts.swap(bad)


def test_word_swap_is_the_mean_over_pieces():
    scores = {
        "a": [[0.9, 0.2], [0.4, 0.5]],
        "b": [[0.5, 0.5], [0.5, 0.5]],
        "solo": [[0.7]],
        "c": [[math.nan, 1], [1, 1]],
    }
    got = contrasts.word_swap(scores, resamples=200)
    assert got.per_piece == pytest.approx({"a": 0.4, "b": 0.0})
    mean, low, high = got
    assert mean == pytest.approx(0.2)
    assert low <= mean <= high
    assert got.excluded == {"solo": "no other word to swap with", "c": "1 of 4 scores are undefined"}
    with pytest.raises(ValueError, match="nothing can be swapped.*no other word"):
        contrasts.word_swap({"solo": [[0.7]]})
    with pytest.raises(ValueError, match=r"'a' must be square, got shape \(1, 2\)"):
        contrasts.word_swap({"a": [[0.7, 0.1]]})


def test_piece_swap_is_the_mean_over_pieces_of_their_words():
    scores = {"bass": [[0.9, 0.2], [0.4, 0.5]], "drums": [[0.6, 0.1], [0.2, 0.3]], "flute": [[0.4]]}
    pieces = {"bass": ["a", "b"], "drums": ["c", "a"], "flute": ["a"]}
    got = contrasts.piece_swap(scores, pieces, resamples=200)
    assert got.per_piece == pytest.approx({"a": (0.5 + 0.2) / 2, "b": 0.3, "c": 0.4})
    assert got.interval.mean == pytest.approx(np.mean([0.35, 0.3, 0.4]))
    assert got.excluded == {"flute": "no other piece to swap with"}
    with pytest.raises(ValueError, match="'bass' has scores of 2 pieces and these names"):
        contrasts.piece_swap(scores, {**pieces, "bass": ["a", "a"]})


@pytest.fixture(scope="module")
def music():
    """Pieces of three words in known bands, each sounding at its own times; and the mean mask of each word elsewhere."""
    rng = np.random.default_rng(0)
    bands = {"bass": slice(0, 3), "piano": slice(3, 8), "flute": slice(7, 12)}
    pieces = []
    for _ in range(20):
        masks = {}
        for word, rows in bands.items():
            mask = np.zeros(SHAPE, bool)
            mask[rng.random(SHAPE[0]) < 0.5, rows] = True
            mask[0, rows], mask[1, rows] = True, False
            masks[word] = mask & (rng.random(SHAPE) < 0.9)
        pieces.append(masks)
    priors = {word: references.class_prior([p[word] for p in pieces[12:]]) for word in bands}
    return pieces[:12], priors


def both(pieces, map_of):
    """(word swap, piece swap) of maps ``map_of(piece index, word)``."""
    words = list(pieces[0])
    names = [str(i) for i in range(len(pieces))]
    by_piece = {
        name: contrasts.cross_scores([map_of(i, w) for w in words], [pieces[i][w] for w in words])
        for i, name in enumerate(names)
    }
    by_word = {
        w: contrasts.cross_scores([map_of(i, w) for i in range(len(pieces))], [p[w] for p in pieces]) for w in words
    }
    return (
        contrasts.word_swap(by_piece, resamples=999),
        contrasts.piece_swap(by_word, dict.fromkeys(words, names), resamples=999),
    )


def test_what_a_prior_the_mix_and_both_together_have_of_the_contrasts(music):
    pieces, priors = music
    mixes = [sum(mask.astype(float) for mask in masks.values()) for masks in pieces]
    word, piece = both(pieces, lambda i, w: priors[w])
    assert word.interval.low > 0.1 and word.p == 1 / 1000
    assert tuple(piece) == (0, 0, 0) and piece.p == 1
    word, piece = both(pieces, lambda i, w: mixes[i])
    assert tuple(word) == (0, 0, 0) and word.p == 1
    assert piece.interval.low > 0 and piece.p == 1 / 1000
    word, piece = both(pieces, lambda i, w: references.prior_times_mix(priors[w], mixes[i]))
    assert word.interval.low > 0.1 and piece.interval.low > 0
    assert word.p == piece.p == 1 / 1000


def test_noise_has_neither_and_the_answer_has_both(music):
    pieces, _ = music
    rng = np.random.default_rng(3)
    noise = {(i, w): rng.random(SHAPE) for i in range(len(pieces)) for w in pieces[0]}
    for contrast in both(pieces, lambda i, w: noise[i, w]):
        assert contrast.interval.low < 0 < contrast.interval.high
        assert contrast.p > 0.02
    for contrast in both(pieces, lambda i, w: pieces[i][w].astype(float)):
        assert contrast.interval.low > 0.3
        assert contrast.p == 1 / 1000


# --- controls


def test_paired_controls():
    rng = np.random.default_rng(0)
    own = 0.4 + 0.1 * rng.random(20)
    for function in (controls.prompt_swap, controls.neutral_edit):
        got = function(own, own - 0.1 + 0.02 * rng.normal(size=20), resamples=999)
        assert got.name == function.__name__
        assert got.observed == pytest.approx(own.mean())
        assert got.observed - got.control == pytest.approx(got.difference.mean)
        assert 0.05 < got.difference.low < got.difference.high < 0.15
        assert got.p == 2 / 1000 and got.count == 20
        same = function(own, own)
        assert same.p == 1 and tuple(same.difference) == (0, 0, 0)


def test_presence_is_the_auroc_within_pieces():
    rng = np.random.default_rng(1)
    present = [rng.integers(0, 6, rng.integers(1, 4)) / 2 + 0.5 for _ in range(12)]
    absent = [rng.integers(0, 6, rng.integers(1, 4)) / 2 for _ in range(12)]
    expected = [roc_auc_score([1] * len(a) + [0] * len(b), np.concatenate([a, b])) for a, b in zip(present, absent)]
    got = controls.absent_instrument(present, absent, resamples=2000)
    assert got.observed == pytest.approx(np.mean(expected))
    around_half = [value - 0.5 for value in statistics.interval(expected, resamples=2000)]
    assert list(got.difference) == pytest.approx(around_half)
    one = controls.absent_instrument([[3.0, 4.0, 5.0]], [[1.0, 2.0]], resamples=20_000)
    exact = stats.mannwhitneyu([3, 4, 5], [1, 2], alternative="greater", method="exact").pvalue
    assert one.p == pytest.approx(exact, abs=0.01)
    # the level of a piece says nothing: only pairs within it count
    level = controls.absent_instrument([[1.0], [101.0]] * 6, [[2.0], [102.0]] * 6)
    assert level.observed == 0 and level.p == 1
    with pytest.raises(ValueError, match="same pieces, got 2 and 1"):
        controls.absent_instrument([[1.0], [2.0]], [[1.0]])
    for bad in ([], [math.nan]):
        with pytest.raises(ValueError, match="piece 1 has masses .* leave it out"):
            controls.absent_instrument([[1.0], bad], [[1.0], [2.0]])


def test_seed_variance_tells_seeds_from_pieces():
    rng = np.random.default_rng(2)
    pieces = rng.normal(0.5, 0.2, 400)
    got = controls.seed_variance(pieces[:, None] + rng.normal(0, 0.05, (400, 5)), resamples=200)
    assert got.control == pytest.approx(0.05, rel=0.1)
    assert got.observed == pytest.approx(pieces.mean(), abs=0.01)
    assert math.isnan(got.p)
    assert "between 5 seeds" in got.note and "between 400 pieces" in got.note
    by_hand = controls.seed_variance([[0.0, 2.0], [3.0, 3.0]])
    assert by_hand.control == pytest.approx(math.sqrt((2 + 0) / 2))
    with pytest.raises(ValueError, match=r"at least 2 seeds, got shape \(3, 1\)"):
        controls.seed_variance(np.ones((3, 1)))


def test_a_trained_figure_counts_where_it_lies_outside_the_initialisations():
    rng = np.random.default_rng(3)
    fresh = rng.normal(0.02, 0.01, 24)
    got = controls.reinitialised(0.19, fresh)
    assert got.p == 1 / 25
    assert tuple(got.difference) == pytest.approx((0.19 - fresh.mean(), 0.19 - fresh.max(), 0.19 - fresh.min()))
    assert got.note == "" and got.count == 24
    inside = controls.reinitialised(float(np.median(fresh)), fresh)
    assert inside.difference.low < 0 < inside.difference.high
    assert inside.p > 0.3
    one = controls.reinitialised(0.19, [0.044])
    assert one.p == 0.5 and "1 initialisations: at least 20" in one.note


def test_controls_together():
    rng = np.random.default_rng(4)
    own = rng.random(12)
    table = controls.controls(
        own,
        swapped=own - 0.1,
        masses=([[2.0]] * 12, [[1.0]] * 12),
        edits=(own, own / 2),
        seeds=rng.random((12, 3)),
        fresh=rng.random(20) / 10,
        resamples=200,
    )
    assert [c.name for c in table] == [
        "prompt_swap",
        "absent_instrument",
        "neutral_edit",
        "seed_variance",
        "reinitialised",
    ]
    assert table[0] == controls.prompt_swap(own, own - 0.1, resamples=200)
    assert table[-1].observed == pytest.approx(own.mean())
    assert [c.name for c in controls.controls(own, fresh=[0.1] * 20)] == ["reinitialised"]
    assert controls.controls(own) == []
