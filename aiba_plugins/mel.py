"""Mel scales, for the frequency edges of lattices (numpy only)."""

from __future__ import annotations

import numpy as np

# Slaney's Auditory Toolbox scale (librosa's default): linear below 1 kHz, logarithmic above
_LINEAR_STEP = 200.0 / 3
_BREAK_HZ = 1000.0
_BREAK_MEL = _BREAK_HZ / _LINEAR_STEP
_LOG_STEP = np.log(6.4) / 27.0


def slaney_mel(hertz: np.ndarray | float) -> np.ndarray:
    """Hertz to mel on Slaney's scale."""
    hertz = np.asarray(hertz, dtype=float)
    logarithmic = _BREAK_MEL + np.log(np.maximum(hertz, _BREAK_HZ) / _BREAK_HZ) / _LOG_STEP
    return np.where(hertz < _BREAK_HZ, hertz / _LINEAR_STEP, logarithmic)


def slaney_hertz(mel: np.ndarray | float) -> np.ndarray:
    """Mel to hertz on Slaney's scale."""
    mel = np.asarray(mel, dtype=float)
    logarithmic = _BREAK_HZ * np.exp(_LOG_STEP * (np.maximum(mel, _BREAK_MEL) - _BREAK_MEL))
    return np.where(mel < _BREAK_MEL, mel * _LINEAR_STEP, logarithmic)


def slaney_edges(bins: int, fmin: float, fmax: float) -> np.ndarray:
    """``bins + 1`` edges in hertz of mel bins of equal width between ``fmin`` and ``fmax``.

    A filter bank of ``bins`` triangles has ``bins + 2`` corner points; cell i is taken to reach halfway (in mel) to the
    centres of its neighbours, shifted so that the cells tile [fmin, fmax].
    """
    return slaney_hertz(np.linspace(slaney_mel(fmin), slaney_mel(fmax), bins + 1))
