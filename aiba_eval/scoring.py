"""Every map against its mask, every number beside its references.

:func:`score` returns one row per (prompt, word, metric), as plain dicts: ``pandas.DataFrame(rows)`` makes a table,
``json.dump`` a file. Pairs that cannot be scored are rows too, with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from aiba_eval import metrics as _metrics
from aiba_eval import references as _references

if TYPE_CHECKING:
    from xarray import DataArray

Row = dict[str, Any]
PerWord = Mapping[str, ArrayLike]

_FIXED = ("prompt", "prompt_index", "waveform", "word", "mask_area", "metric", "value", "chance", "reason")


def score(
    maps: DataArray,
    masks: PerWord | Sequence[PerWord],
    *,
    mix: ArrayLike | None = None,
    lattice: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
    references: Mapping[str, ArrayLike | PerWord] | None = None,
    metrics: Sequence[str] | None = None,
    threshold: float = 0.5,
    thresholds: ArrayLike = _metrics.THRESHOLDS,
    mel_tolerance: int = 0,
    time_tolerance: int = 0,
) -> list[Row]:
    """Score projected maps against masks, each metric beside what maps that never saw the model get.

    Parameters
    ----------
    maps : DataArray, dims (prompt, word, time, mel)
        From :func:`aiba_eval.project`.
    masks : Mapping of word to array_like of bool, shape (time, mel), or a sequence of such mappings
        What each word is scored against: one mapping for all prompts, or one per entry of ``maps.prompt``. Words of
        the maps without a mask are not scored; a mask whose word the maps lack gives rows with a reason.
    mix : array_like, shape (time, mel) or (prompt, time, mel), optional
        The energy of the mix (:func:`aiba_eval.references.mix_energy`), scored as the map ``mix_energy``.
    lattice : (time, frequency) shape, or several, optional
        For ``oracle_projection``. Default: the maps' attribute ``finest_lattice``.
    references : Mapping of name to array_like, or to Mapping of word to array_like, optional
        Further maps to score beside, such as class priors: (time, mel) or (prompt, time, mel), for every word or by
        word. A word that a mapping lacks has ``nan`` there.
    metrics : sequence of str, optional
        A selection of :data:`aiba_eval.metrics.METRICS`; default all.
    threshold, thresholds, mel_tolerance, time_tolerance
        As in :func:`aiba_eval.metrics.evaluate`.

    Returns
    -------
    list of dict
        Keys: ``prompt`` (text), ``prompt_index``, ``waveform`` (None where the maps do not say), ``word``,
        ``mask_area``, ``metric``, ``value``, ``chance``, then one key per reference (``mix_energy``,
        ``oracle_projection`` and the given names, as far as there are any), and ``reason``: empty where ``value`` is
        a number, else why it is ``nan``. Every row has every key.

    Raises
    ------
    ValueError
        If shapes do not fit, a metric is unknown, or a reference's name is taken.
    """
    expected = ("prompt", "word", "time", "mel")
    if tuple(maps.dims) != expected:
        raise ValueError(f"maps must have dims {expected} (see aiba_eval.project), got {maps.dims} = {maps.shape}")
    prompts, _, *raster = maps.shape
    shape = tuple(raster)
    chosen = tuple(_metrics.METRICS if metrics is None else metrics)
    unknown = [m for m in chosen if m not in _metrics.METRICS]
    if unknown:
        raise ValueError(f"unknown metrics {unknown}; known: {', '.join(_metrics.METRICS)}")
    per_prompt = [masks] * prompts if isinstance(masks, Mapping) else list(masks)
    if len(per_prompt) != prompts:
        raise ValueError(f"{len(per_prompt)} mappings of masks for {prompts} prompts; maps are {maps.shape}")

    energy = None if mix is None else np.asarray(mix, float)
    if energy is not None:
        if energy.shape not in (shape, (prompts, *shape)):
            raise ValueError(f"mix must be {shape} or {(prompts, *shape)}, got {energy.shape}")
        energy = np.broadcast_to(energy, (prompts, *shape))
    if lattice is None and "finest_lattice" in maps.attrs:
        columns, bands = maps.attrs["finest_lattice"]
        lattice = (int(columns), int(bands))
    given = dict(references or {})
    names = [
        n for n, there in (("mix_energy", energy is not None), ("oracle_projection", lattice is not None)) if there
    ]
    taken = [n for n in given if n in names or n in _FIXED]
    if taken:
        raise ValueError(f"references {taken} have names that rows already use")
    names += list(given)

    options: dict[str, Any] = {
        "threshold": threshold,
        "thresholds": thresholds,
        "mel_tolerance": mel_tolerance,
        "time_tolerance": time_tolerance,
    }
    values = np.asarray(maps.values, float)
    labels = [str(w) for w in maps["word"].values]
    texts = [str(p) for p in maps["prompt"].values] if "prompt" in maps.coords else [""] * prompts
    waveforms: list[int | None] = [None] * prompts
    if "waveform" in maps.coords:
        waveforms = [int(w) for w in maps["waveform"].values]
    nothing = dict.fromkeys(_metrics.METRICS, float("nan"))

    rows: list[Row] = []
    for i, targets in enumerate(per_prompt):
        for word, target in targets.items():
            mask = np.asarray(target)
            if mask.shape != shape:
                raise ValueError(f"the mask of {word!r} is {mask.shape}, the maps are {shape} (time, mel)")
            _, mask = _metrics.validate(np.zeros(shape), mask)
            for saliency in [values[i, k] for k, label in enumerate(labels) if label == word] or [None]:
                reason = _unscorable(saliency, mask, word)
                got, level, beside = nothing, nothing, dict.fromkeys(names, nothing)
                if saliency is not None and not reason:
                    got = _metrics.evaluate(saliency, mask, **options)
                    level = _references.chance(mask, saliency, **options)
                    blind = {name: _reference(source, word, i, prompts) for name, source in given.items()}
                    if energy is not None:
                        blind["mix_energy"] = energy[i]
                    if lattice is not None:
                        blind["oracle_projection"] = _references.oracle_projection(mask, lattice)
                    beside |= {n: _metrics.evaluate(m, mask, **options) for n, m in blind.items() if m is not None}
                for metric in chosen:
                    undefined = "" if np.isfinite(got[metric]) else _metrics.UNDEFINED.get(metric, "undefined")
                    rows.append(
                        {
                            "prompt": texts[i],
                            "prompt_index": i,
                            "waveform": waveforms[i],
                            "word": word,
                            "mask_area": float(mask.mean()),
                            "metric": metric,
                            "value": got[metric],
                            "chance": level[metric],
                            **{name: beside[name][metric] for name in names},
                            "reason": reason or undefined,
                        }
                    )
    return rows


def unscored(rows: Sequence[Row]) -> dict[tuple[str, str], int]:
    """How many rows have no value, by (metric, reason): say it beside every mean.

    Parameters
    ----------
    rows : sequence of dict
        From :func:`score`.

    Returns
    -------
    dict of (metric, reason) to int
    """
    return dict(Counter((row["metric"], row["reason"]) for row in rows if row["reason"]))


def _reference(source: ArrayLike | PerWord, word: str, prompt: int, prompts: int) -> ArrayLike | None:
    """The map that a reference has for one pair, if it has one."""
    if isinstance(source, Mapping):
        if word not in source:
            return None
        source = source[word]
    array = np.asarray(source)
    if array.ndim == 3 and array.shape[0] != prompts:
        raise ValueError(f"a reference of shape {array.shape} does not hold one map for each of {prompts} prompts")
    return array[prompt] if array.ndim == 3 else array


def _unscorable(saliency: np.ndarray | None, mask: np.ndarray, word: str) -> str:
    if saliency is None:
        return f"the maps have no word {word!r}"
    missing = int((~np.isfinite(saliency)).sum())
    if missing == saliency.size:
        return "the prompt does not have this word"
    if missing:
        covered = 1 - missing / saliency.size
        return f"the map covers {covered:.0%} of the grid: project onto a grid inside the lattice's range"
    if not mask.any():
        return "the mask is empty"
    if mask.all():
        return "the mask is full"
    return ""
