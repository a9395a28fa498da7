"""Learned layer weights: non-negative, with sum 1, fitted on validation pieces.

With A_l the centred map of a word at site l on the grid and M its centred dominance mask, over all validation words and levels::

    u = argmin Σ (Σ_l u_l A_l − M)²,  u_l ≥ 0,   then u / Σ u

a non-negative least squares problem (Lawson & Hanson, 1974; :func:`scipy.optimize.nnls`) of which each piece adds its normal
equations. The scale of u is lost, which no ranking sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from aiba_eval.demo import at_timestep
from aiba_eval.grid import MelGrid, project
from aiba_eval.templates import GroundTruth

if TYPE_CHECKING:
    from xarray import DataArray

Row = dict[str, Any]


def equations(
    maps: Mapping[str, DataArray], truth: GroundTruth, words: Sequence[str], grid: MelGrid, timesteps: Sequence[int]
) -> Row:
    """Normal equations of one piece: ``sites``, ``gram`` (sites, sites) and ``moment`` (sites,).

    Parameters
    ----------
    maps : of a probe
    truth : with dominance masks; words without one are left out
    words, grid, timesteps
    """
    sites = list(maps)
    gram, moment = np.zeros((len(sites), len(sites))), np.zeros(len(sites))
    for timestep in timesteps:
        at = at_timestep(maps, timestep)
        single = [project({site: at[site]}, grid).isel(prompt=0) for site in sites]
        for word in words:
            mask = truth.masks.get("dominance", {}).get(word)
            if mask is None:
                continue
            stacked = np.stack([one.sel(word=word).values.ravel() for one in single]).astype(float)
            stacked -= stacked.mean(axis=1, keepdims=True)
            gram += stacked @ stacked.T
            moment += stacked @ (mask.ravel() - mask.mean())
    return {"sites": sites, "gram": gram.tolist(), "moment": moment.tolist()}


def fit(pieces: Sequence[Row]) -> dict[str, float]:
    """Site → weight from the pieces' :func:`equations`.

    Returns
    -------
    dict of str to float
        Non-negative, with sum 1; equal where no site agrees with the masks at all.

    Raises
    ------
    ValueError
        The pieces have different sites, or there are none.
    """
    from scipy.optimize import nnls

    if not pieces or any(piece["sites"] != pieces[0]["sites"] for piece in pieces):
        raise ValueError("layer weights need the same sites in every piece, and at least one piece")
    sites: list[str] = pieces[0]["sites"]
    gram = np.sum([piece["gram"] for piece in pieces], axis=0)
    moment = np.sum([piece["moment"] for piece in pieces], axis=0)
    scale = np.sqrt(np.clip(np.diagonal(gram), 1e-300, None))  # sites of any scale, for the numbers' sake
    values, vectors = np.linalg.eigh(gram / np.outer(scale, scale))
    root = np.sqrt(np.clip(values, 1e-10, None))
    found, _ = nnls((vectors * root).T, (vectors.T @ (moment / scale)) / root)
    found = found / scale
    if not found.sum():
        return {site: 1 / len(sites) for site in sites}
    return {site: float(value) for site, value in zip(sites, found / found.sum(), strict=True)}
