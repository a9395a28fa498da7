"""Whether a map rises when notes begin: onsets and beats, where the lattice is fine enough to tell.

Conventions
-----------

Times are seconds from the beginning of what the map covers. An onset of a map is a peak of its *novelty*, the rise of its
profile over time from one column to the next; it is placed at the border between the two, so that it is right to half a
column.

mir_eval counts an onset as found within ±50 ms and a beat within ±70 ms. A map of wider columns cannot meet that, whatever
the model knows: it is **refused** with :class:`TooCoarse`. What counts is the lattice of the attention, not the grid that it
was resized to: see :func:`time_resolution`.

A map with many onsets hits some by accident, so ``chance`` stands beside each score: the mean over circular time shifts of
the same onsets.

Contents
--------

* :func:`time_resolution`: seconds per column that a projected map really has.
* :func:`novelty`, :func:`map_onsets`, :func:`map_beats`: what rises, and when.
* :func:`onset_alignment`, :func:`beat_alignment`: against known onsets and beats, by ``mir_eval``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aiba_eval.metrics import temporal_profile
from aiba_eval.statistics import permutation_p

if TYPE_CHECKING:
    from xarray import DataArray

Floats = NDArray[np.float64]
Score = Callable[[Floats], tuple[float, float, float]]

#: mir_eval's tolerances in seconds.
ONSET_WINDOW = 0.05
BEAT_WINDOW = 0.07
#: Hertz of the curve that beats are tracked on.
TRACKING_RATE = 100
#: Time shifts that chance is the mean over.
SHIFTS = 200


class TooCoarse(ValueError):
    """The map's columns are wider than the tolerance of the metric."""


def time_resolution(projected: DataArray) -> float:
    """Seconds per column of the finest lattice behind a projected map, or of the grid where that is coarser.

    Parameters
    ----------
    projected : DataArray
        From :func:`aiba_eval.project`, whose attributes ``finest_lattice`` and ``seconds_per_column`` are read.
    """
    columns = projected.sizes["time"]
    step = float(projected.attrs["seconds_per_column"])
    return step * columns / min(columns, int(projected.attrs["finest_lattice"][0]))


def novelty(saliency: ArrayLike) -> Floats:
    """How much a map's profile over time rises into each column: max(0, p_t − p_{t−1}) / max, shape (time,).

    0 in the first column, whose onsets cannot be seen, and throughout where nothing rises.
    """
    profile = temporal_profile(saliency)
    rise = np.maximum(np.diff(profile, prepend=profile[:1]), 0)
    highest = rise.max(initial=0)
    # float noise of a resized constant map is no rise
    return rise / highest if highest > 1e-6 * np.abs(profile).max(initial=0) else np.zeros_like(rise)


def map_onsets(saliency: ArrayLike, seconds_per_column: float, *, threshold: float = 0.2) -> Floats:
    """Onsets of a map: local maxima of its :func:`novelty` of at least a share of the largest, in seconds.

    By ``scipy.signal.find_peaks``.

    Parameters
    ----------
    saliency : array_like, shape (time, mel)
    seconds_per_column : float
        Of the map as it is given.
    threshold : float
        In [0, 1]. Fix it on other data.

    Returns
    -------
    ndarray, shape (onsets,)
        Ascending.
    """
    from scipy.signal import find_peaks

    peaks, _ = find_peaks(np.pad(novelty(saliency), 1), height=max(threshold, 1e-12))
    return (peaks - 1) * float(seconds_per_column)


def map_beats(saliency: ArrayLike, seconds_per_column: float) -> Floats:
    """Beats of a map: ``librosa.beat.beat_track`` (Ellis, 2007) on its :func:`novelty`, in seconds, shape (beats,).

    The novelty is interpolated to :data:`TRACKING_RATE` first: the tracker measures tempo in whole frames, and doubles or
    halves it where they are long.
    """
    rise = novelty(saliency)
    if not rise.any():
        return np.empty(0)
    from librosa.beat import beat_track

    times = np.arange(rise.size) * float(seconds_per_column)
    fine = np.interp(np.arange(0, times[-1], 1 / TRACKING_RATE), times, rise)
    _, beats = beat_track(onset_envelope=fine, sr=TRACKING_RATE, hop_length=1, units="time", trim=False)
    return np.asarray(beats, float)


def onset_alignment(
    saliency: ArrayLike,
    onsets: ArrayLike,
    seconds_per_column: float,
    *,
    resolution: float | None = None,
    threshold: float = 0.2,
    window: float = ONSET_WINDOW,
) -> dict[str, float]:
    """A map's onsets against known ones: ``mir_eval.onset.f_measure``.

    Parameters
    ----------
    saliency : array_like, shape (time, mel)
    onsets : array_like, shape (n,)
        Seconds from the beginning of the map, ascending: of the instrument's notes, or detected in its stem.
    seconds_per_column : float
        Of the map as it is given.
    resolution : float, optional
        Seconds per column of the attention behind it (:func:`time_resolution`); default ``seconds_per_column``.
    threshold : float
        As in :func:`map_onsets`.
    window : float
        Tolerance in seconds, ±.

    Returns
    -------
    dict
        ``f1``, ``precision``, ``recall``; ``chance``, the mean F1 over circular time shifts of the map's onsets, and
        ``p``, the share of shifts that score as much (:func:`aiba_eval.statistics.permutation_p`); ``found`` and
        ``known``, how many onsets there are. Without known onsets all but these are ``nan``; without found ones the
        scores are 0.

    Raises
    ------
    TooCoarse
        If a column is wider than the window.
    ValueError
        If onsets are not ascending times inside the map.
    """
    from mir_eval import onset

    known, duration = _events(saliency, onsets, seconds_per_column, resolution, window, "onset")
    found = map_onsets(saliency, seconds_per_column, threshold=threshold)

    def score(estimated: Floats) -> tuple[float, float, float]:
        f1, precision, recall = onset.f_measure(known, estimated, window=window)
        return float(f1), float(precision), float(recall)

    return _aligned(found, known, duration, score)


def beat_alignment(
    saliency: ArrayLike,
    beats: ArrayLike,
    seconds_per_column: float,
    *,
    resolution: float | None = None,
    window: float = BEAT_WINDOW,
) -> dict[str, float]:
    """A map's beats against known ones: ``mir_eval.beat.f_measure`` from the first beat on.

    mir_eval's ``evaluate`` leaves out the first five seconds, half of a usual clip; they count here.

    Parameters
    ----------
    saliency, seconds_per_column, resolution, window
        As in :func:`onset_alignment`.
    beats : array_like, shape (n,)
        Seconds from the beginning of the map, ascending.

    Returns
    -------
    dict
        ``f1``, ``chance``, ``p``, ``found``, ``known``, as :func:`onset_alignment` does.

    Raises
    ------
    TooCoarse
        If a column is wider than the window.
    ValueError
        If beats are not ascending times inside the map.
    """
    from mir_eval import beat

    known, duration = _events(saliency, beats, seconds_per_column, resolution, window, "beat")
    found = map_beats(saliency, seconds_per_column)

    def score(estimated: Floats) -> tuple[float, float, float]:
        f1 = float(beat.f_measure(known, estimated, f_measure_threshold=window))
        return f1, float("nan"), float("nan")

    aligned = _aligned(found, known, duration, score)
    return {name: value for name, value in aligned.items() if name not in ("precision", "recall")}


def _events(
    saliency: ArrayLike, events: ArrayLike, step: float, resolution: float | None, window: float, name: str
) -> tuple[Floats, float]:
    """Known events and the map's duration, or the reason why they cannot be compared."""
    width = step if resolution is None else max(step, resolution)
    if not step > 0 or not window > 0:
        raise ValueError(f"seconds per column and window must be positive, got {step} and {window}")
    if width > window:
        raise TooCoarse(
            f"a column of this map is {1000 * width:.0f} ms wide and {name}s count within ±{1000 * window:.0f} ms: its times "
            "say nothing; use temporal_pearson, a wider window, or layers with a finer lattice"
        )
    known = np.asarray(events, float)
    duration = len(np.asarray(saliency)) * step
    if known.ndim != 1 or np.any(np.diff(known) <= 0) or (known.size and not (known[0] >= 0 and known[-1] <= duration)):
        raise ValueError(f"{name}s must be ascending times from 0 to {duration:.3f} s, got {known.tolist()[:5]}…")
    return known, duration


def _aligned(found: Floats, known: Floats, duration: float, score: Score) -> dict[str, float]:
    counts = {"found": float(found.size), "known": float(known.size)}
    if not known.size:
        return dict.fromkeys(("f1", "precision", "recall", "chance", "p"), float("nan")) | counts
    if not found.size:
        return {"f1": 0.0, "precision": 0.0, "recall": 0.0, "chance": 0.0, "p": 1.0} | counts
    f1, precision, recall = score(found)
    # even shifts over the duration, without the unshifted one
    null = [score(np.sort((found + duration * k / (SHIFTS + 1)) % duration))[0] for k in range(1, SHIFTS + 1)]
    return {
        "f1": f1,
        "precision": precision,
        "recall": recall,
        "chance": float(np.mean(null)),
        "p": permutation_p(f1, null),
    } | counts
