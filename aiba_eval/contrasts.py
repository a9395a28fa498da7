"""Contrasts that a map has to earn: is it *this* word, and is it *this* audio?

A score says how well a map fits a mask. Knowing that "bass is low" fits well, and so does knowing where the mix is loud. The
two contrasts take one of these away each, inside the same data:

* **word swap**: the map of a word against its mask, less the mean of the *other words'* maps of that mix against the same
  mask. A map that never read the text (the mix's energy) has 0, exactly.
* **piece swap**: the map of a word against its mask, less the mean of the same word's maps *from other pieces* against the
  same mask. A map that never heard the audio (a class prior) has 0, exactly.

Report both, and those of the references beside them. A class prior has a word swap, and its product with the mix may have
both without any model. It depends on the masks: where the mix is loud, a stem *sounds* (against energy masks the mix has a
piece swap above 0), but it is as likely another stem that *dominates* there (against dominance masks it has one of about 0, or
below). So a piece swap against dominance masks is the hardest to come by without a model.

Each takes the scores of every map against every mask (:func:`cross_scores`). The unit of intervals is the piece; p-values
are of permutations of words within pieces and of pieces, with all words of a piece together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aiba_eval import metrics
from aiba_eval.statistics import RESAMPLES, Interval, assignment_permutation, interval

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Contrast:
    """A contrast over pieces; unpacks as ``mean, low, high``.

    Attributes
    ----------
    interval
        Mean over pieces with its BCa interval.
    p
        One-sided p-value: maps that were dealt out at random fit as well.
    per_piece
        The contrast of each piece, the mean over its words.
    excluded
        What had nothing to be swapped with, and why.
    """

    interval: Interval
    p: float
    per_piece: Mapping[str, float]
    excluded: Mapping[str, str]

    def __iter__(self) -> Any:
        return iter(self.interval)


def cross_scores(
    maps: Sequence[ArrayLike], masks: Sequence[ArrayLike], metric: str = "average_precision", **options: Any
) -> Floats:
    """Scores of every map against every mask.

    Parameters
    ----------
    maps : sequence of array_like, shape (time, mel)
        One per word of a piece, or one per piece for a word.
    masks : sequence of array_like of bool, shape (time, mel)
        In the same order.
    metric : str
        One of :data:`aiba_eval.metrics.METRICS`.
    **options
        Of :func:`aiba_eval.metrics.evaluate`: thresholds, tolerances.

    Returns
    -------
    ndarray, shape (n, n)
        ``scores[i, j]``: map i against mask j. ``nan`` where the metric is undefined.

    Raises
    ------
    ValueError
        As :func:`aiba_eval.metrics.evaluate`, or if the numbers of maps and masks differ.
    """
    if len(maps) != len(masks):
        raise ValueError(f"{len(maps)} maps and {len(masks)} masks: each map needs its own mask")
    if metric == "average_precision" and not options:
        return np.asarray([metrics.average_precisions(a, masks) for a in maps]).reshape(len(maps), len(masks))
    scores = [[metrics.evaluate(a, m, metrics=[metric], **options)[metric] for m in masks] for a in maps]
    return np.asarray(scores, float).reshape(len(maps), len(masks))


def swap(scores: ArrayLike) -> Floats:
    """Each mask's own map less the mean of the others: s_jj − mean over i ≠ j of s_ij, shape (n,).

    Parameters
    ----------
    scores : array_like, shape (n, n)
        From :func:`cross_scores`; n at least 2.

    Raises
    ------
    ValueError
        If the scores are not square, or there is nothing to swap with.
    """
    square = np.asarray(scores, float)
    if square.ndim != 2 or square.shape[0] != square.shape[1] or len(square) < 2:
        raise ValueError(f"scores must be (n, n) with n at least 2, got shape {square.shape}")
    # a mean of differences: exactly 0 where all maps score the same
    return (np.diagonal(square) - square).sum(axis=0) / (len(square) - 1)


def word_swap(scores: Mapping[str, ArrayLike], *, resamples: int = RESAMPLES, seed: int = 0) -> Contrast:
    """Is it this word? The contrast with the other words of the same mix.

    Parameters
    ----------
    scores : Mapping of piece to array_like, shape (words, words)
        :func:`cross_scores` of the maps and masks of a piece's words.
    resamples, seed
        Of the interval and the permutation.

    Returns
    -------
    Contrast
        A piece with one word, or with a score that is undefined, is in ``excluded``.

    Raises
    ------
    ValueError
        If no piece is left, or scores are not square.
    """
    squares, excluded = _usable({piece: np.asarray(square, float) for piece, square in scores.items()}, "word")
    per_piece = {piece: float(swap(square).mean()) for piece, square in squares.items()}
    return Contrast(
        interval(list(per_piece.values()), resamples=resamples, seed=seed),
        assignment_permutation(list(squares.values()), resamples=resamples, seed=seed),
        per_piece,
        excluded,
    )


def piece_swap(
    scores: Mapping[str, ArrayLike],
    pieces: Mapping[str, Sequence[str]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Contrast:
    """Is it this audio? The contrast with the same word's maps from other pieces.

    Every piece is swapped with every other, so that pieces are not quite independent: the interval is over pieces all the
    same, and the permutation over whole pieces does not assume it.

    Parameters
    ----------
    scores : Mapping of word to array_like, shape (pieces, pieces)
        :func:`cross_scores` of one word's maps and masks over the pieces that have it.
    pieces : Mapping of word to sequence of str
        Names of the pieces, in the order of the scores.
    resamples, seed
        Of the interval and the permutation.

    Returns
    -------
    Contrast
        A word of one piece, or with a score that is undefined, is in ``excluded``.

    Raises
    ------
    ValueError
        If no word is left, scores are not square, or names do not fit.
    """
    squares, excluded = _usable({word: np.asarray(square, float) for word, square in scores.items()}, "piece")
    found: dict[str, list[float]] = {}
    for word, square in squares.items():
        if len(set(pieces.get(word, ()))) != len(square):
            raise ValueError(f"{word!r} has scores of {len(square)} pieces and these names: {pieces.get(word)}")
        for piece, value in zip(pieces[word], swap(square)):
            found.setdefault(piece, []).append(float(value))
    per_piece = {piece: float(np.mean(values)) for piece, values in found.items()}
    return Contrast(
        interval(list(per_piece.values()), resamples=resamples, seed=seed),
        assignment_permutation(
            list(squares.values()),
            labels=[pieces[word] for word in squares],
            # the mean over pieces of the mean over their words, as in the interval
            weights=[[1 / len(found[piece]) / len(found) for piece in pieces[word]] for word in squares],
            resamples=resamples,
            seed=seed,
        ),
        per_piece,
        excluded,
    )


def _usable(scores: Mapping[str, Floats], other: str) -> tuple[dict[str, Floats], dict[str, str]]:
    squares: dict[str, Floats] = {}
    excluded: dict[str, str] = {}
    for name, square in scores.items():
        if square.ndim != 2 or square.shape[0] != square.shape[1]:
            raise ValueError(f"scores of {name!r} must be square, got shape {square.shape}")
        if len(square) < 2:
            excluded[name] = f"no other {other} to swap with"
        elif not np.isfinite(square).all():
            excluded[name] = f"{int((~np.isfinite(square)).sum())} of {square.size} scores are undefined"
        else:
            squares[name] = square
    if not squares:
        raise ValueError(f"nothing can be swapped: {excluded or 'no scores were given'}")
    return squares, excluded
