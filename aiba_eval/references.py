"""What a map scores that never saw the model.

A number is only as good as what stands beside it. Against a band of 19 of 64 rows a map of noise has an average
precision of 0.30 and an all-on map an F1 of 0.46; the mix's own energy, which has read no text, beats both.

Conventions
-----------

p is the area of the mask, q the share of cells that a thresholded map has on; both in [0, 1]. Maps and masks are
``(time, mel)``.

References
----------

* :func:`chance`: closed forms for a map whose cells are shuffled. It saw nothing.
* :func:`all_on`: closed forms for the map that is on everywhere.
* :func:`uniform`: the constant map itself.
* :func:`mix_energy`: the energy of the mix. It never read the text.
* :func:`class_prior`: the mean mask of a class over other pieces. It never read the model or the audio.
* :func:`prior_times_mix`: both of these together. It knows the word and the audio, and never ran the model.
* :func:`time_shift`: the model's own map at a wrong time.
* :func:`oracle_projection`: the mask itself, at the resolution of the attention lattice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aiba_eval import metrics
from aiba_eval.grid import LOG_FLOOR, MelGrid, area_matrix, linear_matrix

Floats = NDArray[np.float64]

#: Fractions of a map's length that :func:`time_shift` is averaged over: both parts of the golden section.
SHIFTS = (0.382, 0.618)


def chance_average_precision(p: float, cells: int | None = None) -> float:
    """Expected average precision of a random ranking: p for many cells, and exactly p for a constant map.

    With N cells, R = pN of them on the mask, and H_N the N-th harmonic number, the exact expectation over rankings
    without ties is (1/N) [H_N + (R − 1)/(N − 1) · (N − H_N)], above p by less than H_N / N (0.001 for 8192 cells).

    Parameters
    ----------
    p : float
        Area of the mask.
    cells : int, optional
        N; at least 2. Without it, p is returned.
    """
    if cells is None:
        return p
    harmonic = float((1 / np.arange(1, cells + 1)).sum())
    return (harmonic + (p * cells - 1) / (cells - 1) * (cells - harmonic)) / cells


def chance_iou(p: float, q: float) -> float:
    """IoU of a random map of density q: about pq / (p + q − pq), the ratio of the two expectations."""
    return p * q / (p + q - p * q) if p + q > 0 else 0.0


def chance_f1(p: float, q: float) -> float:
    """Expected F1 of a random map of density q: 2pq / (p + q), exact for a fixed number of cells."""
    return 2 * p * q / (p + q) if p + q > 0 else 0.0


def chance(
    mask: ArrayLike,
    saliency: ArrayLike | None = None,
    *,
    threshold: float = 0.5,
    thresholds: ArrayLike = metrics.THRESHOLDS,
    mel_tolerance: int = 0,
    time_tolerance: int = 0,
) -> dict[str, float]:
    """Chance level of every metric: the expectation over shuffles of the map's cells.

    ============================ =====================================================
    average_precision            p (see :func:`chance_average_precision`)
    iou                          pq / (p + q − pq), q the map's own density at the threshold
    iou_area                     the same over all thresholds
    precision, recall, f1        p, q, 2pq / (p + q)
    pointing_game                area of the mask with its tolerance
    mass_accuracy, rank_accuracy p
    profile_ and temporal_       ``nan``: zero on average, but smooth profiles correlate by accident, so that
    _pearson, _spearman          zero is no fair bar; use a permutation over pieces or labels, or a time shift
    ============================ =====================================================

    Parameters
    ----------
    mask : array_like of bool, shape (time, mel)
    saliency : array_like, shape (time, mel), optional
        The map, whose density decides the thresholded metrics. Without it iou, iou_area, precision, recall and f1
        are ``nan``.
    threshold, thresholds, mel_tolerance, time_tolerance
        As in :func:`aiba_eval.metrics.evaluate`.

    Returns
    -------
    dict of str to float
        Keyed as :func:`aiba_eval.metrics.evaluate`. All ``nan`` for an empty or full mask; precision ``nan`` where
        nothing is on.

    Raises
    ------
    ValueError
        As :func:`aiba_eval.metrics.validate`.
    """
    values, target = metrics.validate(np.zeros(np.shape(mask)) if saliency is None else saliency, mask)
    nan = float("nan")
    levels = dict.fromkeys(metrics.METRICS, nan)
    p = float(target.mean())
    if p in (0.0, 1.0):
        return levels
    near = metrics.dilate(target, mel_tolerance=mel_tolerance, time_tolerance=time_tolerance)
    levels.update(average_precision=p, pointing_game=float(near.mean()), mass_accuracy=p, rank_accuracy=p)
    if saliency is None:
        return levels
    normalised = metrics.normalise(values)
    q = float((normalised > threshold).mean())
    densities = [float((normalised > tau).mean()) for tau in np.asarray(thresholds, float)]
    levels.update(
        iou=chance_iou(p, q),
        iou_area=metrics.curve_area(np.array([chance_iou(p, d) for d in densities]), thresholds),
        precision=p if q > 0 else nan,
        recall=q,
        f1=chance_f1(p, q),
    )
    return levels


def all_on(mask: ArrayLike) -> dict[str, float]:
    """What the map that is on everywhere scores: IoU p, precision p, recall 1, F1 2p / (1 + p).

    ``nan`` for an empty or full mask.
    """
    p = float(np.asarray(mask, bool).mean())
    if p in (0.0, 1.0):
        return dict.fromkeys(("iou", "precision", "recall", "f1"), float("nan"))
    return {"iou": p, "precision": p, "recall": 1.0, "f1": chance_f1(p, 1.0)}


def uniform(grid: MelGrid | None = None) -> Floats:
    """The constant map, shape (time, mel). Every metric with honest ties gives it its chance level."""
    return np.ones((MelGrid() if grid is None else grid).shape)


def mix_energy(
    waveform: ArrayLike,
    sample_rate: float,
    grid: MelGrid | None = None,
    *,
    scale: Literal["log", "power"] = "log",
) -> Floats:
    """The energy of the mix on the grid, a map that knows the audio and not the word.

    Parameters
    ----------
    waveform : array_like, shape (samples,) or (channels, samples)
    sample_rate : float
        In hertz.
    grid : MelGrid, optional
    scale : {"log", "power"}
        ``log``: :meth:`MelGrid.spectrogram` above its floor, ln(mel / 1e-5) ≥ 0. ``power``: :meth:`MelGrid.power`.
        They rank cells almost alike, but threshold and mass see them differently.

    Returns
    -------
    ndarray, shape (time, mel), non-negative
    """
    grid = MelGrid() if grid is None else grid
    if scale == "power":
        return grid.power(waveform, sample_rate).astype(float)
    if scale != "log":
        raise ValueError(f"scale must be 'log' or 'power', got {scale!r}")
    log_mel = grid.spectrogram(waveform, sample_rate)
    return (log_mel - np.log(LOG_FLOOR, dtype=np.float32)).astype(float)  # in float32: silence is exactly zero


def class_prior(masks: Iterable[ArrayLike], *, frequency_only: bool = True) -> Floats:
    """Mean mask of a class over training pieces: what knowing "bass is low" is worth.

    Parameters
    ----------
    masks : iterable of array_like of bool, shape (time, mel)
        Masks of one class in pieces that are *not* scored. Empty masks count: there the class was silent.
    frequency_only : bool
        Average over time too, so that the prior is constant in time.

    Returns
    -------
    ndarray, shape (time, mel), in [0, 1]
        Times the mix's energy it becomes the stronger reference :func:`prior_times_mix`.

    Raises
    ------
    ValueError
        If there are no masks or their shapes differ.
    """
    total: Floats | None = None
    count = 0
    for mask in masks:
        values = np.asarray(mask, bool).astype(float)
        if values.ndim != 2:
            raise ValueError(f"masks must be (time, mel), got shape {values.shape}")
        if total is not None and values.shape != total.shape:
            raise ValueError(f"masks must share one shape: {total.shape}, then {values.shape}")
        total = values if total is None else total + values
        count += 1
    if total is None:
        raise ValueError("no masks to average")
    prior = total / count
    return np.tile(prior.mean(axis=0), (prior.shape[0], 1)) if frequency_only else prior


def prior_times_mix(prior: ArrayLike, mix: ArrayLike) -> Floats:
    """Prior × mix, cell by cell: where the class usually lies and this mix is loud.

    It has read the text and heard the audio, and ran no model: often the strongest reference, and the one that may have a
    word swap and a piece swap both (:mod:`aiba_eval.contrasts`).

    Parameters
    ----------
    prior : array_like, shape (time, mel)
        From :func:`class_prior`.
    mix : array_like, shape (time, mel)
        From :func:`mix_energy`.

    Returns
    -------
    ndarray, shape (time, mel), non-negative

    Raises
    ------
    ValueError
        If shapes differ or either has negative or non-finite cells.
    """
    one, other = np.asarray(prior, float), np.asarray(mix, float)
    if one.shape != other.shape or one.ndim != 2:
        raise ValueError(f"prior and mix must be (time, mel) of one shape, got {one.shape} and {other.shape}")
    for name, array in (("prior", one), ("mix", other)):
        if not np.isfinite(array).all() or array.min() < 0:
            raise ValueError(f"{name} must be finite and non-negative, its minimum is {array.min()}")
    return one * other


def time_shift(saliency: ArrayLike, fraction: float = SHIFTS[0]) -> Floats:
    """A map moved round in time by a fraction of its length: the same frequencies at wrong times.

    What a map scores without timing. Against a mask that is the same at all times, such as a band, nothing changes. (A
    shift round in frequency would be no fair null: it turns bass into treble.)

    Parameters
    ----------
    saliency : array_like, shape (time, mel)
    fraction : float
        In (0, 1). Default the smaller part of the golden section, which falls on no bar or beat of a steady metre.

    Returns
    -------
    ndarray, shape (time, mel)

    Raises
    ------
    ValueError
        If the map is not (time, mel) or the fraction moves it by no column or all.
    """
    values = np.asarray(saliency, float)
    columns = round(fraction * len(values)) if values.ndim == 2 else 0
    if values.ndim != 2 or not 0 < columns < len(values):
        raise ValueError(f"a map of shape {values.shape} cannot be shifted by {fraction} of its columns")
    return np.roll(values, columns, axis=0)


def oracle_projection(mask: ArrayLike, lattice: tuple[int, int] | Sequence[tuple[int, int]]) -> Floats:
    """The mask through the eye of the needle: area-averaged down to the lattice, bilinearly back up.

    What the resolution of the attention allows. It is a reference, not a bound: a map fitted to the lattice can
    score higher.

    Parameters
    ----------
    mask : array_like of bool, shape (time, mel)
    lattice : (int, int) or sequence of (int, int)
        Shape(s) of the attention lattices as (time, frequency), frequency 1 where there is none. Of several the one
        with the most cells is used: ``projected.attrs["finest_lattice"]``. The lattice is taken to span the grid
        evenly on its mel scale.

    Returns
    -------
    ndarray, shape (time, mel), in [0, 1]

    Raises
    ------
    ValueError
        If the mask is not (time, mel) or a lattice shape is not two positive integers.
    """
    target = np.asarray(mask, bool).astype(float)
    shapes = np.atleast_2d(np.asarray(lattice, float))
    if target.ndim != 2:
        raise ValueError(f"mask must be (time, mel), got shape {target.shape}")
    if shapes.ndim != 2 or shapes.shape[1] != 2 or np.any(shapes < 1) or np.any(shapes != np.round(shapes)):
        raise ValueError(f"lattice must be (time, frequency) or several of these, got {lattice!r}")
    columns, bands = (int(n) for n in shapes[np.argmax(shapes.prod(axis=1))])
    across = _down_and_up(target.shape[0], columns)
    up = _down_and_up(target.shape[1], bands)
    return across @ target @ up.T


def _down_and_up(cells: int, lattice: int) -> Floats:
    """Area averages over ``lattice`` equal parts, read back linearly at the centres of ``cells``."""
    fine, coarse = np.arange(cells + 1.0), np.linspace(0, cells, lattice + 1)
    return linear_matrix(fine[:-1] + 0.5, coarse) @ area_matrix(coarse, fine)
