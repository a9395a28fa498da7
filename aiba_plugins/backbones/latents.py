"""What backbones on one-dimensional waveform latents share: columns of a kept window, and the scheduler's noise level."""

from __future__ import annotations

import math
from typing import Any

from aiba_hooks import Lattice


def time_lattice(
    columns: int, seconds_per_column: float, *, prefix: int = 0, window: tuple[float, float] | None = None
) -> Lattice:
    """A lattice without a frequency axis, cropped to the columns whose centre lies in the window that the pipeline keeps.

    Columns before the window are dropped like prefix tokens, and time 0 is the window's start: the first sample returned.

    Parameters
    ----------
    columns : time tokens that the denoiser generates
    prefix : tokens before them that lie nowhere in time
    window : start and end in seconds; None keeps every column
    """
    if window is None:
        return Lattice(shape=(columns,), axes=("time",), seconds_per_column=seconds_per_column, prefix=prefix)
    # the tolerance keeps a centre that lies on the edge but for rounding
    first, stop = (math.ceil(edge / seconds_per_column - 0.5 - 1e-9) for edge in window)
    first = min(max(first, 0), columns - 1)
    kept = min(max(stop - first, 1), columns - first)
    return Lattice(
        shape=(columns - first,),
        axes=("time",),
        seconds_per_column=seconds_per_column,
        start=first * seconds_per_column - window[0],
        prefix=prefix + first,
        valid_columns=kept if kept < columns - first else None,
    )


def scheduler_sigma(scheduler: Any) -> Any:
    """Noise level of the forward that is about to run, by the scheduler's own count of steps; None where it has none.

    A scheduler counts from its first ``scale_model_input`` or ``step`` on; before that it stands at its first step. With
    ``invert_sigmas`` a flow-matching scheduler holds the share of the signal instead.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        return None
    index = getattr(scheduler, "step_index", None)
    if index is None:
        index = getattr(scheduler, "begin_index", None) or 0
    return 1 - sigmas[index] if scheduler.config.get("invert_sigmas") else sigmas[index]
