"""Cells of thresholded maps on and off their masks, added up over a run: what averages over classes are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from aiba_eval import metrics, references
from aiba_eval.grid import LOG_FLOOR

if TYPE_CHECKING:
    import xarray

    from aiba_eval.evaluation import Item
    from aiba_eval.report.entries import Entries

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
#: (target, level) → source → word → (TP, FP, FN, TN)
Counts = dict[tuple[str, int], dict[str, dict[str, Floats]]]


def count(entries: Entries) -> Counts:
    """Counts of the primary variant and of its references at the threshold 0.5, every item read once.

    Sources are ``model``, ``mix_energy``, ``class_prior``, ``prior_times_mix`` (priors as the run's own: mean masks of its training
    windows, the item's own piece left out) and ``oracle_projection``. What is no mask, or has no map, is not counted.
    """
    priors = _priors(entries)
    found: Counts = {}
    for item in entries.items:
        arrays = item.fields
        if "projected" not in arrays or "truth" not in arrays:
            continue
        own = arrays["projected"].isel(variant=0).load()
        truth, energy = arrays["truth"].load(), np.maximum(arrays["mix"].values.astype(float) - np.log(LOG_FLOOR), 0)
        for word in item.words:
            blind = {"mix_energy": energy}
            known = [mask for piece, mask in priors.get(word, ()) if piece != item.piece]
            if known:
                blind["class_prior"] = references.class_prior(known)
                blind["prior_times_mix"] = references.prior_times_mix(blind["class_prior"], energy)
            for target in truth["target"].values:
                mask = _mask(truth.sel(target=target, word=word))
                if mask is None:
                    continue
                beside = {name: _count(heat, mask) for name, heat in blind.items()}
                if "finest_lattice" in arrays.attrs:
                    oracle = references.oracle_projection(mask, tuple(arrays.attrs["finest_lattice"]))
                    beside["oracle_projection"] = _count(oracle, mask)
                for level in own["level"].values:
                    heat = own.sel(level=level, word=word).values
                    if np.isfinite(heat).all():
                        sources = found.setdefault((str(target), int(level)), {})
                        for source, four in {"model": _count(heat, mask), **beside}.items():
                            of = sources.setdefault(source, {})
                            of[word] = of.get(word, np.zeros(4)) + four
    return found


def _count(heat: Floats, mask: Mask) -> Floats:
    return np.array(metrics.confusion(heat, mask), float)


def _mask(values: xarray.DataArray) -> Mask | None:
    """The mask, or None where there is none or it is a share."""
    array = values.values
    return array > 0.5 if np.isfinite(array).all() and np.isin(array, (0, 1)).all() else None


def _priors(entries: Entries) -> dict[str, list[tuple[str, Mask]]]:
    """Word → (piece, mask) of the run's training windows."""
    found: dict[str, list[tuple[str, Mask]]] = {}
    for item in entries.training:
        for word, mask in _prior_masks(item).items():
            found.setdefault(word, []).append((item.piece, mask))
    return found


def _prior_masks(item: Item) -> dict[str, Mask]:
    """Word → the mask that class priors are made of."""
    truth = item.fields["truth"].load()
    kinds = [str(kind) for kind in truth["target"].values]
    kind = next((name for name in ("dominance", "band:measured") if name in kinds), None)
    if kind is None:
        return {}
    masks = {word: _mask(truth.sel(target=kind, word=word)) for word in item.words}
    return {word: mask for word, mask in masks.items() if mask is not None}
