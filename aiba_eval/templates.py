"""Where an instrument should be: knowledge bands, and masks made from stems.

Conventions
-----------

Masks are boolean ``(time, mel)`` arrays on a :class:`~aiba_eval.grid.MelGrid`. Stems are *linear* mels of the same
shape, as :meth:`MelGrid.power` returns them (``quantity="power"``, decibels are 10 log10) or magnitudes
(``quantity="magnitude"``, 20 log10); never log-mels.

Report the :func:`area` of a mask beside any score against it: a map that knows nothing reaches an average
precision of that area, and wide bands are easy (see :mod:`aiba_eval.references`).

Contents
--------

* :func:`band_mask`: a fixed frequency band per instrument, from a named preset. It holds for all times, so it
  cannot test timing.
* :func:`active_band_mask`: the same while the instrument plays, where notes are known and stems are not.
* :func:`dominance_mask`: cells where one stem holds more than a share of all stems. It separates instruments best.
* :func:`energy_mask`: cells where a stem is within some decibels of its own loudest cell.
* :func:`soft_share`: the share itself, for correlations.
* :func:`data_profile`, :func:`profile_mask`: where the power of a class lies in frequency, from other pieces' stems.
* :func:`ground_truth`: all of these for one section, with areas, and what had to be left out.
* :func:`presets`, :func:`instruments`, :func:`canonical`: what is known, and under which names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aiba_eval.grid import MelGrid

Floats = NDArray[np.float64]
Quantity = Literal["power", "magnitude"]


class Band(NamedTuple):
    """Frequencies f with low <= f < high, in hertz."""

    low: float
    high: float


#: Bands per preset and instrument.
#:
#: ``paper``: the bands that arXiv 2509.20891 states. It covers these three classes only. Its 2–5 kHz for guitar and
#: piano holds about 26 % and 7 % of the power of rendered guitar and piano stems: a stem's own energy scores below
#: chance against it.
#:
#: ``measured``: the 5th to 95th percentile of power over frequency, pooled per Slakh class over the stems of 160
#: General MIDI pieces rendered with the FluidR3 soundfont (60 s of each at most; 13 to 164 stems per class).
PRESETS: Mapping[str, Mapping[str, Band]] = MappingProxyType(
    {
        "paper": MappingProxyType(
            {
                "bass": Band(0, 250),
                "guitar": Band(2000, 5000),
                "piano": Band(2000, 5000),
            }
        ),
        "measured": MappingProxyType(
            {
                "bass": Band(47, 312),
                "brass": Band(344, 2672),
                "chromatic percussion": Band(391, 3055),
                "drums": Band(47, 4477),
                "guitar": Band(172, 3211),
                "organ": Band(156, 2766),
                "piano": Band(172, 2375),
                "pipe": Band(219, 1062),
                "reed": Band(312, 2297),
                "strings": Band(188, 938),
                "strings continued": Band(281, 2062),
                "synth lead": Band(242, 2492),
                "synth pad": Band(219, 867),
            }
        ),
    }
)

# Other words for a class. Instruments follow General MIDI's families, which are Slakh's classes:
# 41-48 are "strings", 49-56 (string ensembles, choirs) are "strings continued".
_ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "bass guitar": "bass",
        "electric bass": "bass",
        "acoustic bass": "bass",
        "synth bass": "bass",
        "basses": "bass",
        "bells": "chromatic percussion",
        "drum": "drums",
        "drum kit": "drums",
        "drumkit": "drums",
        "drum set": "drums",
        "guitars": "guitar",
        "electric guitar": "guitar",
        "acoustic guitar": "guitar",
        "pianos": "piano",
        "electric piano": "piano",
        "acoustic piano": "piano",
        "grand piano": "piano",
        "organs": "organ",
        "accordion": "organ",
        "harmonica": "organ",
        "string": "strings",
        "violin": "strings",
        "viola": "strings",
        "cello": "strings",
        "contrabass": "strings",
        "harp": "strings",
        "string ensemble": "strings continued",
        "string section": "strings continued",
        "strings (continued)": "strings continued",
        "trumpet": "brass",
        "trombone": "brass",
        "tuba": "brass",
        "french horn": "brass",
        "saxophone": "reed",
        "sax": "reed",
        "oboe": "reed",
        "clarinet": "reed",
        "bassoon": "reed",
        "flute": "pipe",
        "piccolo": "pipe",
        "recorder": "pipe",
        "glockenspiel": "chromatic percussion",
        "vibraphone": "chromatic percussion",
        "marimba": "chromatic percussion",
        "xylophone": "chromatic percussion",
        "celesta": "chromatic percussion",
        "pad": "synth pad",
        "lead": "synth lead",
    }
)


def area(mask: ArrayLike) -> float:
    """Share of the grid that a mask covers, in [0, 1]: the chance level of average precision, pointing and mass."""
    return float(np.mean(np.asarray(mask, bool)))


def presets() -> tuple[str, ...]:
    """Names of the band presets."""
    return tuple(PRESETS)


def instruments(preset: str = "measured") -> tuple[str, ...]:
    """Instruments that a preset has a band for.

    Raises
    ------
    ValueError
        If the preset is unknown.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    return tuple(PRESETS[preset])


def canonical(instrument: str) -> str:
    """Class name of an instrument: lower case, blanks for ``_`` and ``-``, aliases resolved ("drum" → "drums").

    Raises
    ------
    ValueError
        If no preset and no alias knows the instrument; the message lists those known.
    """
    name = _class_of(instrument)
    known = sorted({i for bands in PRESETS.values() for i in bands})
    if name not in known:
        raise ValueError(f"unknown instrument {instrument!r}; known: {', '.join(known)}; also: {', '.join(_ALIASES)}")
    return name


def _class_of(instrument: str) -> str:
    name = " ".join(instrument.lower().replace("_", " ").replace("-", " ").split())
    return _ALIASES.get(name, name)


def band(instrument: str, preset: str = "paper") -> Band:
    """The band of an instrument in hertz.

    Raises
    ------
    ValueError
        If the preset or the instrument is unknown, or the preset has no band for it.
    """
    listed = instruments(preset)
    name = canonical(instrument)
    if name not in listed:
        others = [p for p in PRESETS if name in PRESETS[p]]
        raise ValueError(f"preset {preset!r} has no band for {name!r}, only for {', '.join(listed)}; see {others}")
    return PRESETS[preset][name]


def band_mask(instrument: str, grid: MelGrid | None = None, preset: str = "paper") -> NDArray[np.bool_]:
    """Knowledge band of an instrument on the grid: row k is on where low <= f_k < high.

    f_k are the peaks of the mel filters (:attr:`MelGrid.frequencies`). On the default grid the paper's bass band is
    5 of 64 rows (area 0.08) and its 2–5 kHz band 19 of 64 (area 0.30).

    Parameters
    ----------
    instrument : str
        A class or an alias of one.
    grid : MelGrid, optional
        Default ``MelGrid()``.
    preset : str
        One of :func:`presets`.

    Returns
    -------
    ndarray of bool, shape (time, mel)
        The same in every column. :func:`area` gives its size.

    Raises
    ------
    ValueError
        As :func:`band`, or if the band selects no row of this grid.
    """
    grid = MelGrid() if grid is None else grid
    low, high = band(instrument, preset)
    rows = grid.rows(low, high)
    if not rows.any():
        raise ValueError(f"{instrument!r} ({low}–{high} Hz) selects no row of a grid of {grid.fmin}–{grid.fmax} Hz")
    return np.tile(rows, (grid.time, 1))


def active_band_mask(
    instrument: str, active: ArrayLike, grid: MelGrid | None = None, preset: str = "measured"
) -> NDArray[np.bool_]:
    """Knowledge band while the instrument plays: :func:`band_mask` in the columns that are active, empty in the others.

    For datasets with notes and without stems (MusicNet): ``piece.sounding(instrument, centres of the columns)``. Unlike
    a band it tests timing; unlike a mask from stems it does not know where in its band the instrument sounds.

    Parameters
    ----------
    instrument : str
    active : array_like of bool, shape (time,)
        Per column of the grid.
    grid : MelGrid, optional
        Default ``MelGrid()``.
    preset : str
        One of :func:`presets`.

    Returns
    -------
    ndarray of bool, shape (time, mel)

    Raises
    ------
    ValueError
        As :func:`band_mask`, or if ``active`` is not one value per column.
    """
    mask = band_mask(instrument, grid, preset)
    columns = np.asarray(active, bool)
    if columns.shape != mask.shape[:1]:
        raise ValueError(f"need one value for each of {mask.shape[0]} columns, got shape {columns.shape}")
    return mask & columns[:, None]


def _linear_mel(name: str, stem: ArrayLike) -> Floats:
    mel = np.asarray(stem, float)
    if mel.ndim != 2 or mel.size == 0:
        raise ValueError(f"stem {name!r} must be (time, mel), got shape {mel.shape}")
    if not np.isfinite(mel).all() or mel.min() < 0:
        raise ValueError(f"stem {name!r} must be linear, non-negative and finite; minimum {mel.min()} (a log-mel?)")
    return mel


def _above_floor(mel: Floats, floor_db: float, quantity: Quantity) -> NDArray[np.bool_]:
    if quantity not in ("power", "magnitude"):
        raise ValueError(f"quantity must be 'power' or 'magnitude', got {quantity!r}")
    return mel > mel.max() * 10 ** (floor_db / (10 if quantity == "power" else 20))


def soft_share(
    stem_mels: Mapping[str, ArrayLike], instrument: str, *, floor_db: float = -40.0, quantity: Quantity = "power"
) -> Floats:
    """Share of one stem in the sum of all, cell by cell.

    ::

        S = sum_j X_j            share_i = X_i / S   where S > max(S) · 10^(floor_db / 10),   0 elsewhere

    Parameters
    ----------
    stem_mels : Mapping of str to array_like, shape (time, mel)
        Linear mels of *all* stems of the mix. Stems of the same instrument must be summed by the caller.
    instrument : str
        A key of ``stem_mels``.
    floor_db : float
        Floor relative to the loudest cell of the sum, in decibels; below it a share means nothing.
        ``-inf`` keeps every cell that is not silent.
    quantity : {"power", "magnitude"}
        What the mels hold: decides 10 or 20 log10.

    Returns
    -------
    ndarray, shape (time, mel), in [0, 1]

    Raises
    ------
    ValueError
        If the instrument is not among the stems, shapes differ, or a stem is negative or not finite.
    """
    mels = {name: _linear_mel(name, stem) for name, stem in stem_mels.items()}
    if instrument not in mels:
        raise ValueError(f"no stem {instrument!r}; stems: {', '.join(mels)}")
    shapes = {name: mel.shape for name, mel in mels.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"stems must share one shape, got {shapes}")
    total = np.sum(list(mels.values()), axis=0)
    audible = _above_floor(total, floor_db, quantity)
    return np.divide(mels[instrument], total, out=np.zeros_like(total), where=audible)


def dominance_mask(
    stem_mels: Mapping[str, ArrayLike],
    instrument: str,
    share: float = 0.5,
    floor_db: float = -40.0,
    *,
    quantity: Quantity = "power",
) -> NDArray[np.bool_]:
    """Cells that one stem dominates: ``soft_share(...) > share``.

    With a share of 0.5 or more the masks of different stems do not overlap. Parameters and errors as in
    :func:`soft_share`; ``share`` must lie in [0, 1).

    Returns
    -------
    ndarray of bool, shape (time, mel)
        All False for a stem that dominates nowhere. :func:`area` gives its size.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must lie in [0, 1), got {share}")
    return soft_share(stem_mels, instrument, floor_db=floor_db, quantity=quantity) > share


def energy_mask(stem: ArrayLike, floor_db: float = -30.0, *, quantity: Quantity = "power") -> NDArray[np.bool_]:
    """Cells where a stem sounds: X > max(X) · 10^(floor_db / 10), or / 20 for magnitudes.

    Parameters
    ----------
    stem : array_like, shape (time, mel)
        Linear mel.
    floor_db : float
        Floor relative to the stem's own loudest cell, in decibels.
    quantity : {"power", "magnitude"}

    Returns
    -------
    ndarray of bool, shape (time, mel)
        All False for a silent stem. :func:`area` gives its size.

    Raises
    ------
    ValueError
        If the stem is not (time, mel), negative or not finite.
    """
    return _above_floor(_linear_mel("stem", stem), floor_db, quantity)


def data_profile(stems: Iterable[ArrayLike], *, floor_db: float = -40.0, quantity: Quantity = "power") -> Floats:
    """Where the power of a class lies in frequency: the mean over frames of each frame's share per row.

    ::

        profile(f) = mean over frames t of X_t(f) / sum_f X_t(f)

    over the frames of all stems whose sum lies above the floor. Each frame counts the same, loud or soft, so that one
    loud piece does not decide; every stem counts by its audible frames. Take stems of pieces that are *not* scored.

    Parameters
    ----------
    stems : iterable of array_like, shape (time, mel)
        Linear mels of one class. Times may differ, rows may not.
    floor_db : float
        Frames below this level against the stem's loudest frame are silent and left out.
    quantity : {"power", "magnitude"}

    Returns
    -------
    ndarray, shape (mel,)
        Non-negative, with sum 1. ``np.tile(profile, (grid.time, 1))`` is the profile as a map.

    Raises
    ------
    ValueError
        If there is no audible frame, numbers of rows differ, or a stem is negative or not finite.
    """
    total: Floats | None = None
    frames = 0
    for stem in stems:
        mel = _linear_mel("stem", stem)
        if total is not None and total.size != mel.shape[1]:
            raise ValueError(f"stems must have the same rows: {total.size}, then {mel.shape[1]}")
        loudness = mel.sum(axis=1, keepdims=True)
        audible = mel[_above_floor(loudness, floor_db, quantity)[:, 0]]
        shares = (audible / audible.sum(axis=1, keepdims=True)).sum(axis=0)
        total = shares if total is None else total + shares
        frames += len(audible)
    if total is None or not frames:
        raise ValueError("no frame sounds in any of the stems: there is no profile")
    return total / frames


def profile_mask(profile: ArrayLike, grid: MelGrid | None = None, *, share: float = 0.9) -> NDArray[np.bool_]:
    """The fewest rows that hold a share of a profile, as a mask that is the same at all times.

    Rows are taken by falling profile until they hold at least ``share`` of its sum.

    Parameters
    ----------
    profile : array_like, shape (mel,)
        From :func:`data_profile`.
    grid : MelGrid, optional
        Default ``MelGrid()``.
    share : float
        In (0, 1).

    Returns
    -------
    ndarray of bool, shape (time, mel)

    Raises
    ------
    ValueError
        If the profile does not have the grid's rows, is negative or has no sum, or the share is out of range.
    """
    grid = MelGrid() if grid is None else grid
    values = np.asarray(profile, float)
    if values.shape != (grid.mel,) or not np.isfinite(values).all() or values.min() < 0 or not values.sum() > 0:
        raise ValueError(f"a profile is {grid.mel} non-negative numbers with a sum, got shape {values.shape}")
    if not 0 < share < 1:
        raise ValueError(f"share must lie in (0, 1), got {share}")
    order = np.argsort(-values, kind="stable")
    held = np.cumsum(values[order]) / values.sum()
    rows = np.zeros(grid.mel, bool)
    rows[order[: int(np.searchsorted(held, share - 1e-12)) + 1]] = True
    return np.tile(rows, (grid.time, 1))


@dataclass(frozen=True)
class GroundTruth:
    """What the maps of one section are judged by.

    Attributes
    ----------
    masks
        Kind to word to mask: ``dominance``, ``energy``, ``band:<preset>``, ``profile``.
    shares
        Word to :func:`soft_share`, for correlations.
    areas
        Kind to word to :func:`area` of the mask.
    excluded
        (word, kind) to the reason why there is no mask. Count these beside every mean.
    """

    masks: Mapping[str, Mapping[str, NDArray[np.bool_]]]
    shares: Mapping[str, Floats]
    areas: Mapping[str, Mapping[str, float]]
    excluded: Mapping[tuple[str, str], str]


def ground_truth(
    stem_mels: Mapping[str, ArrayLike],
    grid: MelGrid | None = None,
    *,
    words: Iterable[str] | None = None,
    profiles: Mapping[str, ArrayLike] | None = None,
    dominance_floor_db: float = -40.0,
    energy_floor_db: float = -30.0,
    quantity: Quantity = "power",
) -> GroundTruth:
    """Every mask of every word of one section.

    Parameters
    ----------
    stem_mels : Mapping of str to array_like, shape (time, mel)
        Linear mels of *all* instruments of the mix, on the grid.
    grid : MelGrid, optional
        For bands; default ``MelGrid()``.
    words : iterable of str, optional
        Instruments to make masks of; default all. Name those that are silent here too: they are excluded, with the reason.
    profiles : Mapping of word to array_like, shape (mel,), optional
        From :func:`data_profile`, of other pieces.
    dominance_floor_db, energy_floor_db, quantity
        As ``floor_db`` and ``quantity`` of :func:`dominance_mask` and :func:`energy_mask`.

    Returns
    -------
    GroundTruth
        A mask that would be empty or full is not in ``masks`` but in ``excluded``.

    Raises
    ------
    ValueError
        As :func:`soft_share`, or if the stems are not on the grid.
    """
    grid = MelGrid() if grid is None else grid
    mels = {word: _linear_mel(word, stem) for word, stem in stem_mels.items()}
    for word, mel in mels.items():
        if mel.shape != grid.shape:
            raise ValueError(f"stem {word!r} is {mel.shape}, the grid is {grid.shape} (time, mel)")
    masks: dict[str, dict[str, NDArray[np.bool_]]] = {}
    excluded: dict[tuple[str, str], str] = {}
    shares: dict[str, Floats] = {}

    def add(kind: str, word: str, mask: NDArray[np.bool_]) -> None:
        if mask.any() and not mask.all():
            masks.setdefault(kind, {})[word] = mask
        else:
            excluded[word, kind] = "the mask is full" if mask.any() else "the mask is empty"

    for word in mels if words is None else words:
        kinds = ["dominance", "energy", *(f"band:{preset}" for preset in PRESETS), *(["profile"] if profiles else [])]
        if word not in mels or not mels[word].any():
            excluded.update({(word, kind): "the instrument is silent" for kind in kinds})
            continue
        shares[word] = soft_share(mels, word, floor_db=dominance_floor_db, quantity=quantity)
        add("dominance", word, dominance_mask(mels, word, floor_db=dominance_floor_db, quantity=quantity))
        add("energy", word, energy_mask(mels[word], energy_floor_db, quantity=quantity))
        for preset, bands in PRESETS.items():
            if _class_of(word) in bands:
                rows = grid.rows(*bands[_class_of(word)])  # a coarse grid may have none there
                add(f"band:{preset}", word, np.tile(rows, (grid.time, 1)))
            else:
                excluded[word, f"band:{preset}"] = f"the preset {preset!r} has no band for it"
        if profiles:
            if word in profiles:
                add("profile", word, profile_mask(profiles[word], grid))
            else:
                excluded[word, "profile"] = "no other piece has a profile of it"
    areas = {kind: {word: area(mask) for word, mask in some.items()} for kind, some in masks.items()}
    return GroundTruth(masks, shares, areas, excluded)
