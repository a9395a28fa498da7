"""Controls of the model: what its scores are when what should matter is taken away.

References (:mod:`aiba_eval.references`) never ran the model; controls did, and know less than they should. Each function
here aggregates scores that were measured under one control. :func:`controls` puts those that were measured into one table.

* :func:`prompt_swap`: the same audio under another piece's prompt. If the score stays, the map did not follow the text.
* :func:`absent_instrument`: words of instruments that are not in the audio. If they have as much mass, the map did not
  listen.
* :func:`neutral_edit`: what an edit does that changes no instrument (drop "and", reorder). A word's effect has to exceed it.
* :func:`seed_variance`: what another seed changes (Wiegreffe & Pinter, 2019).
* :func:`reinitialised`: the same architecture with weights that were never trained (Adebayo et al., 2018). An untrained
  network leans towards some word by accident, the same way in every piece, so that no interval over pieces covers it: the
  control is the *distribution* over initialisations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aiba_eval.statistics import (
    RESAMPLES,
    Alternative,
    Interval,
    interval,
    paired_permutation,
    permutation_p,
)

Floats = NDArray[np.float64]

#: Initialisations below which their distribution is too coarse: with 20, p cannot fall below 1 / 21.
MINIMUM_INITIALISATIONS = 20


@dataclass(frozen=True)
class Control:
    """One control beside what it controls.

    Attributes
    ----------
    name
        Of the control.
    observed, control
        Mean score of the model, and under the control.
    difference
        Of the two, with its interval; for ``reinitialised`` and ``seed_variance`` see there.
    p
        ``nan`` where the control is no test.
    count
        Pieces, or initialisations.
    note
        Empty, or what to know before reading it.
    """

    name: str
    observed: float
    control: float
    difference: Interval
    p: float
    count: int
    note: str = ""


def prompt_swap(own: ArrayLike, swapped: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> Control:
    """Scores under the piece's own prompt against those under another piece's, over pieces.

    Parameters
    ----------
    own, swapped : array_like, shape (pieces,)
        Mean score of each piece's words, with the same audio and masks.
    resamples, seed
        Of interval and permutation.

    Returns
    -------
    Control
        ``p`` of a paired permutation, two-sided.

    Raises
    ------
    ValueError
        As :func:`aiba_eval.statistics.paired_permutation`.
    """
    return _paired("prompt_swap", own, swapped, resamples, seed)


def neutral_edit(effect: ArrayLike, neutral: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> Control:
    """What leaving out a word changes against what an edit without a sound changes, over pieces.

    Parameters
    ----------
    effect, neutral : array_like, shape (pieces,)
        Size of the change per piece, such as :func:`aiba_eval.effects.effect_mass`; the mean over words and over edits.
    resamples, seed
        Of interval and permutation.

    Returns
    -------
    Control
        ``p`` of a paired permutation, two-sided.
    """
    return _paired("neutral_edit", effect, neutral, resamples, seed)


def absent_instrument(
    present: Sequence[ArrayLike], absent: Sequence[ArrayLike], *, resamples: int = RESAMPLES, seed: int = 0
) -> Control:
    """AUROC of the mass of present against absent instruments, over pieces.

    The share of pairs (present, absent) *within a piece* in which the present one has more mass, ties counted half; then the
    mean over pieces. Within pieces, because the level of the mass differs from piece to piece. 0.5 is chance.

    Parameters
    ----------
    present, absent : sequence of array_like, shape (words,)
        Masses per piece.
    resamples, seed
        Of interval and permutation.

    Returns
    -------
    Control
        ``observed`` is the AUROC, ``control`` 0.5. ``p``: the labels "present" and "absent" are permuted within pieces.

    Raises
    ------
    ValueError
        If a piece lacks either, or a mass is not finite.
    """
    if len(present) != len(absent) or not len(present):
        raise ValueError(f"need present and absent masses of the same pieces, got {len(present)} and {len(absent)}")
    from scipy.stats import rankdata

    shares, null = [], np.zeros(resamples)
    rng = np.random.default_rng(seed)
    for index, (yes, no) in enumerate(zip(present, absent)):
        a, b = np.asarray(yes, float).ravel(), np.asarray(no, float).ravel()
        if not a.size or not b.size or not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ValueError(f"piece {index} has masses {a.tolist()} present and {b.tolist()} absent: leave it out")
        # Mann and Whitney's U from ranks, which are the same for every draw of the labels
        ranks = rankdata(np.concatenate([a, b]))
        base = a.size * (a.size + 1) / 2
        shares.append((ranks[: a.size].sum() - base) / (a.size * b.size))
        dealt = rng.permuted(np.tile(ranks, (resamples, 1)), axis=1)[:, : a.size]
        null += (dealt.sum(axis=1) - base) / (a.size * b.size)
    found = interval(shares, resamples=resamples, seed=seed)
    difference = Interval(found.mean - 0.5, found.low - 0.5, found.high - 0.5, found.count, found.note)
    p = permutation_p(float(np.sum(shares)), null)
    return Control("absent_instrument", found.mean, 0.5, difference, p, found.count)


def seed_variance(scores: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> Control:
    """How much of a score is the seed's.

    Parameters
    ----------
    scores : array_like, shape (pieces, seeds)
        The same pieces under several seeds; at least 2.
    resamples, seed
        Of the interval.

    Returns
    -------
    Control
        ``observed``: the mean. ``control``: the standard deviation between seeds within a piece, √(mean over pieces of the
        variance over seeds). ``difference``: the mean with its interval over pieces, after averaging over seeds. ``note``
        puts it beside the standard deviation between pieces. No test.

    Raises
    ------
    ValueError
        If there are fewer than 2 seeds or a score is not finite.
    """
    values = np.asarray(scores, float)
    if values.ndim != 2 or values.shape[1] < 2 or not np.isfinite(values).all():
        raise ValueError(f"need finite scores (pieces, seeds) of at least 2 seeds, got shape {values.shape}")
    within = float(np.sqrt(values.var(axis=1, ddof=1).mean()))
    means = values.mean(axis=1)
    between = float(means.std(ddof=1)) if len(means) > 1 else math.nan
    note = f"standard deviation {within:.3g} between {values.shape[1]} seeds, {between:.3g} between {len(means)} pieces"
    found = interval(means, resamples=resamples, seed=seed)
    return Control("seed_variance", found.mean, within, found, math.nan, len(means), note)


def reinitialised(observed: float, fresh: ArrayLike, *, alternative: Alternative = "greater") -> Control:
    """A trained model's figure against the same figure of models that were never trained.

    Parameters
    ----------
    observed : float
        Any figure of the trained model: a mean score, a contrast, an AUROC.
    fresh : array_like, shape (initialisations,)
        The same figure, measured in the same way, for each.
    alternative : {"greater", "less", "two-sided"}

    Returns
    -------
    Control
        ``control``: the mean over initialisations. ``difference``: observed less that, between observed less the largest and
        observed less the smallest of them. The figure counts where this range lies above 0. ``p`` as
        :func:`aiba_eval.statistics.permutation_p`. ``note`` says so where there are fewer than 20.

    Raises
    ------
    ValueError
        As :func:`aiba_eval.statistics.permutation_p`.
    """
    p = permutation_p(observed, fresh, alternative=alternative)
    values = np.asarray(fresh, float)
    few = values.size < MINIMUM_INITIALISATIONS
    note = f"{values.size} initialisations: at least {MINIMUM_INITIALISATIONS} are needed" if few else ""
    spread = Interval(observed - values.mean(), observed - values.max(), observed - values.min(), values.size, note)
    return Control("reinitialised", observed, float(values.mean()), spread, p, values.size, note)


def controls(
    scores: ArrayLike,
    *,
    swapped: ArrayLike | None = None,
    masses: tuple[Sequence[ArrayLike], Sequence[ArrayLike]] | None = None,
    edits: tuple[ArrayLike, ArrayLike] | None = None,
    seeds: ArrayLike | None = None,
    fresh: ArrayLike | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Control]:
    """Every control that was measured, one argument each.

    Parameters
    ----------
    scores : array_like, shape (pieces,)
        The model's own scores.
    swapped : array_like, shape (pieces,), optional
        For :func:`prompt_swap`: scores under other prompts.
    masses : (present, absent), optional
        For :func:`absent_instrument`.
    edits : (effect, neutral), optional
        For :func:`neutral_edit`.
    seeds : array_like, shape (pieces, seeds), optional
        For :func:`seed_variance`.
    fresh : array_like, shape (initialisations,), optional
        For :func:`reinitialised`: mean scores over the same pieces.
    resamples, seed
        Of intervals and permutations.

    Returns
    -------
    list of Control

    Raises
    ------
    ValueError
        As the single functions.
    """
    found: list[Control] = []
    if swapped is not None:
        found.append(prompt_swap(scores, swapped, resamples=resamples, seed=seed))
    if masses is not None:
        found.append(absent_instrument(*masses, resamples=resamples, seed=seed))
    if edits is not None:
        found.append(neutral_edit(*edits, resamples=resamples, seed=seed))
    if seeds is not None:
        found.append(seed_variance(seeds, resamples=resamples, seed=seed))
    if fresh is not None:
        found.append(reinitialised(float(np.mean(np.asarray(scores, float))), fresh))
    return found


def _paired(name: str, one: ArrayLike, other: ArrayLike, resamples: int, seed: int) -> Control:
    p = paired_permutation(one, other, resamples=resamples, seed=seed)
    a, b = np.asarray(one, float), np.asarray(other, float)
    difference = interval(a - b, resamples=resamples, seed=seed)
    return Control(name, float(a.mean()), float(b.mean()), difference, p, a.size)
