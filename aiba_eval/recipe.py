"""The recipe that gives flat maps: the paper's tap, step by step, for teaching. :func:`aiba_hooks.capture` does not use it.

"The paper" is AIBA, arXiv 2509.20891.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aiba_hooks.selectors import LOG_FLOOR

Floats = NDArray[np.float64]

#: Default of the length rule's ratio. Text is shorter than audio; how much shorter is a choice.
CROSS_RATIO = 0.5


@dataclass(frozen=True)
class RecipeMaps:
    """What the recipe makes of one attention call.

    Attributes
    ----------
    taken : whether the length rule takes the call for cross-attention: keys ≤ ratio × queries
    side : rows and columns of the square
    dropped : queries at the end that the square has no place for
    mean : mean over heads and over *all* keys, shape (side, side). A softmax sums to 1, so it is 1/keys everywhere
    log_mean : the same of the logarithm, shape (side, side). It is not constant: the logarithm is not linear
    """

    taken: bool
    side: int
    dropped: int
    mean: Floats
    log_mean: Floats


def paper_recipe(probabilities: ArrayLike, *, cross_ratio: float = CROSS_RATIO) -> RecipeMaps:
    """Apply the paper's tap to the attention probabilities of one call.

    1. The **length rule**: a call is cross-attention if it has at most ``cross_ratio`` keys per query. The name and the
       source of the keys are not looked at.
    2. The **mean over all keys** (Eq. 4), after the mean over heads; and the same mean of log A.
    3. The **square reshape**: the first ⌊√queries⌋² queries in raster order, whatever tokens they are.

    Parameters
    ----------
    probabilities : array_like, shape (queries, keys) or (heads, queries, keys)
        Rows of a softmax: non-negative, with sum 1.
    cross_ratio : float
        Positive.

    Returns
    -------
    RecipeMaps

    Raises
    ------
    ValueError
        If the rows are no probabilities or a shape or the ratio does not fit.
    """
    rows = np.asarray(probabilities, float)
    if rows.ndim == 2:
        rows = rows[None]
    if rows.ndim != 3 or 0 in rows.shape:
        raise ValueError(f"probabilities must be (queries, keys) or (heads, queries, keys), got shape {rows.shape}")
    if not cross_ratio > 0:
        raise ValueError(f"cross_ratio must be positive, got {cross_ratio!r}")
    if not np.isfinite(rows).all() or rows.min() < 0 or np.abs(rows.sum(-1) - 1).max() > 1e-3:
        raise ValueError("every row of probabilities must be non-negative and sum to 1: apply the softmax first")
    _, queries, keys = rows.shape
    side = math.isqrt(queries)
    mean = rows.mean((0, 2))
    # the logarithm of the head mean, which is what is displayed; an exact zero stays finite
    log_mean = np.log(np.maximum(rows.mean(0), LOG_FLOOR)).mean(-1)
    square = slice(0, side * side)
    return RecipeMaps(
        taken=keys <= cross_ratio * queries,
        side=side,
        dropped=queries - side * side,
        mean=mean[square].reshape(side, side),
        log_mean=log_mean[square].reshape(side, side),
    )
