"""Mel scales, for the frequency edges of lattices."""

from __future__ import annotations

from typing import Literal

import numpy as np

# Slaney's Auditory Toolbox scale (librosa's default): linear below 1 kHz, logarithmic above
_LINEAR_STEP = 200.0 / 3
_BREAK_HZ = 1000.0
_BREAK_MEL = _BREAK_HZ / _LINEAR_STEP
_LOG_STEP = np.log(6.4) / 27.0

Scale = Literal["slaney", "htk"]


def mel_edges(bins: int, fmin: float, fmax: float, scale: Scale = "slaney") -> np.ndarray:
    """Edges of mel bins of equal width between ``fmin`` and ``fmax``.

    A filter bank of ``bins`` triangles has ``bins + 2`` corner points; cell i stands for filter i, shifted a little so that
    the cells tile [fmin, fmax]. Every ``n``-th edge bounds the rows of a latent that reduces the mel by n.

    Parameters
    ----------
    bins : number of mel bins
    fmin, fmax : hertz
    scale : ``"slaney"`` (librosa's default, AudioLDM's) or ``"htk"`` (Riffusion's)

    Returns
    -------
    array of shape (bins + 1,), hertz, ascending
    """
    if bins < 1 or not 0 <= fmin < fmax:
        raise ValueError(f"mel_edges needs at least one bin and 0 <= fmin < fmax, got {bins}, {fmin}, {fmax}")
    if scale == "htk":
        low, high = (2595.0 * np.log10(1.0 + f / 700.0) for f in (fmin, fmax))
        return 700.0 * (10.0 ** (np.linspace(low, high, bins + 1) / 2595.0) - 1.0)
    if scale != "slaney":
        raise ValueError(f"scale must be 'slaney' or 'htk', got {scale!r}")
    low, high = (_slaney_mel(f) for f in (fmin, fmax))
    mel = np.linspace(low, high, bins + 1)
    logarithmic = _BREAK_HZ * np.exp(_LOG_STEP * (np.maximum(mel, _BREAK_MEL) - _BREAK_MEL))
    return np.where(mel < _BREAK_MEL, mel * _LINEAR_STEP, logarithmic)


def _slaney_mel(hertz: float) -> float:
    return hertz / _LINEAR_STEP if hertz < _BREAK_HZ else _BREAK_MEL + float(np.log(hertz / _BREAK_HZ)) / _LOG_STEP
