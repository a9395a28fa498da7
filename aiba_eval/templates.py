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
* :func:`dominance_mask`: cells where one stem holds more than a share of all stems. It separates instruments best.
* :func:`energy_mask`: cells where a stem is within some decibels of its own loudest cell.
* :func:`soft_share`: the share itself, for correlations.
* :func:`presets`, :func:`instruments`, :func:`canonical`: what is known, and under which names.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aiba_eval.grid import MelGrid

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
    name = " ".join(instrument.lower().replace("_", " ").replace("-", " ").split())
    name = _ALIASES.get(name, name)
    known = sorted({i for bands in PRESETS.values() for i in bands})
    if name not in known:
        raise ValueError(f"unknown instrument {instrument!r}; known: {', '.join(known)}; also: {', '.join(_ALIASES)}")
    return name


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


def _linear_mel(name: str, stem: ArrayLike) -> NDArray[np.float64]:
    mel = np.asarray(stem, float)
    if mel.ndim != 2 or mel.size == 0:
        raise ValueError(f"stem {name!r} must be (time, mel), got shape {mel.shape}")
    if not np.isfinite(mel).all() or mel.min() < 0:
        raise ValueError(f"stem {name!r} must be linear, non-negative and finite; minimum {mel.min()} (a log-mel?)")
    return mel


def _above_floor(mel: NDArray[np.float64], floor_db: float, quantity: Quantity) -> NDArray[np.bool_]:
    if quantity not in ("power", "magnitude"):
        raise ValueError(f"quantity must be 'power' or 'magnitude', got {quantity!r}")
    return mel > mel.max() * 10 ** (floor_db / (10 if quantity == "power" else 20))


def soft_share(
    stem_mels: Mapping[str, ArrayLike], instrument: str, *, floor_db: float = -40.0, quantity: Quantity = "power"
) -> NDArray[np.float64]:
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
