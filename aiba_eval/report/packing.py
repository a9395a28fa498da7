"""Arrays and audio as text that a page can hold: eight bits a cell with a scale, one bit a cell, FLAC."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: the code of a cell without a value; the others, 0 to 254, run from ``low`` to ``high``
MISSING = 255


def images(values: ArrayLike) -> dict[str, Any]:
    """Images (…, time, mel) at eight bits a cell, each with a scale of its own.

    Parameters
    ----------
    values : array_like, shape (..., time, mel)
        NaN where there is nothing.

    Returns
    -------
    dict
        ``shape``; ``data``: base64 of unsigned bytes in that order; ``low`` and ``high``: flat lists, one of each per
        image, None for an image without a value. A cell is ``low + byte / 254 · (high − low)``; the byte 255 is missing.
        The error is at most (high − low) / 508.
    """
    array = np.asarray(values, float)
    flat = array.reshape(-1, *array.shape[-2:])
    codes = np.full(flat.shape, MISSING, np.uint8)
    low: list[float | None] = []
    high: list[float | None] = []
    for image, code in zip(flat, codes, strict=True):
        there = np.isfinite(image)
        if not there.any():
            low.append(None)
            high.append(None)
            continue
        bottom, top = float(image[there].min()), float(image[there].max())
        span = top - bottom if top > bottom else 1.0
        code[there] = np.rint((image[there] - bottom) / span * 254).astype(np.uint8)
        low.append(_short(bottom))
        high.append(_short(bottom + span))
    return {"shape": list(array.shape), "low": low, "high": high, "data": _text(codes.tobytes())}


def bits(mask: ArrayLike) -> str:
    """A boolean image (time, mel) at one bit a cell: base64, the first cell in the highest bit."""
    return _text(np.packbits(np.asarray(mask, bool).ravel()).tobytes())


def flac(samples: NDArray[np.floating], sample_rate: int) -> str:
    """Mono audio as base64 of a 16-bit FLAC file; channels (samples, channels) are averaged, what exceeds ±1 is clipped."""
    import soundfile

    mono = samples if samples.ndim == 1 else samples.mean(axis=1)
    file = io.BytesIO()
    soundfile.write(file, np.clip(mono, -1, 1), sample_rate, format="FLAC", subtype="PCM_16")
    return _text(file.getvalue())


def _short(value: float) -> float:
    """Six significant digits: the scale of eight bits needs no more."""
    return float(f"{value:.6g}")


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
