"""Every map against its mask, every number beside its references.

:func:`score` returns one row per (prompt, word, metric), as plain dicts: ``pandas.DataFrame(rows)`` makes a table,
``json.dump`` a file. Pairs that cannot be scored are rows too, with the reason. :func:`summarise` makes means over pieces of
them, with intervals, and differences from each reference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from aiba_eval import metrics as _metrics
from aiba_eval import references as _references
from aiba_eval.statistics import RESAMPLES, benjamini_hochberg, holm, interval, paired_permutation

if TYPE_CHECKING:
    from xarray import DataArray

Row = dict[str, Any]
PerWord = Mapping[str, ArrayLike]

#: Columns of a row that stand beside its value, as far as they could be made.
REFERENCES = (
    "chance",
    "mix_energy",
    "class_prior",
    "prior_times_mix",
    "oracle_projection",
    "other_word",
    "other_piece",
    "time_shift",
)
#: Pieces below which a class is not reported.
MINIMUM_PIECES = 10

_FIXED = ("prompt", "prompt_index", "waveform", "piece", "word", "mask_area", "metric", "value", "reason")


def score(
    maps: DataArray,
    masks: PerWord | Sequence[PerWord],
    *,
    mix: ArrayLike | None = None,
    priors: PerWord | None = None,
    pieces: Sequence[str] | None = None,
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
    priors : Mapping of word to array_like, shape (time, mel), optional
        Class priors from pieces that are not scored (:func:`aiba_eval.references.class_prior`), scored as ``class_prior``
        and, where there is a mix, as ``prior_times_mix``.
    pieces : sequence of str, optional
        The piece that each prompt of the maps is about: a key ``piece`` in the rows, and the reference ``other_piece``.
        It scores every map against the masks of all other pieces: the time grows with their square.
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
        ``mask_area``, ``metric``, ``value``, then one key per reference, and ``reason``: empty where ``value`` is a number,
        else why it is ``nan``. Every row has every key. The references are ``chance``; ``mix_energy``, ``class_prior``,
        ``prior_times_mix``, ``oracle_projection`` and ``other_piece``, as far as there is what they need; ``other_word``, the
        mean over the other words' maps of the same prompt, against this word's mask; ``time_shift``, the word's own map
        moved round in time (mean of two shifts); and the given names. ``value − other_word`` is the word swap,
        ``value − other_piece`` the piece swap (:mod:`aiba_eval.contrasts`).

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
    if pieces is not None and len(pieces) != prompts:
        raise ValueError(f"{len(pieces)} pieces for {prompts} prompts; maps are {maps.shape}")
    there = {
        "chance": True,
        "mix_energy": energy is not None,
        "class_prior": priors is not None,
        "prior_times_mix": priors is not None and energy is not None,
        "oracle_projection": lattice is not None,
        "other_word": True,
        "other_piece": pieces is not None,
        "time_shift": True,
    }
    names = [name for name in REFERENCES if there[name]]
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
    whole = np.isfinite(values).all(axis=(2, 3))
    labels = [str(w) for w in maps["word"].values]
    texts = [str(p) for p in maps["prompt"].values] if "prompt" in maps.coords else [""] * prompts
    waveforms: list[int | None] = [None] * prompts
    if "waveform" in maps.coords:
        waveforms = [int(w) for w in maps["waveform"].values]
    nothing = dict.fromkeys(chosen, float("nan"))

    def mean(saliencies: Sequence[ArrayLike], mask: ArrayLike) -> dict[str, float]:
        """Mean score of several maps, over those for which a metric is defined."""
        scores = [_metrics.evaluate(each, mask, metrics=chosen, **options) for each in saliencies]
        defined = {name: [s[name] for s in scores if np.isfinite(s[name])] for name in chosen}
        return {name: float(np.mean(some)) if some else float("nan") for name, some in defined.items()}

    rows: list[Row] = []
    for i, targets in enumerate(per_prompt):
        for word, target in targets.items():
            mask = np.asarray(target)
            if mask.shape != shape:
                raise ValueError(f"the mask of {word!r} is {mask.shape}, the maps are {shape} (time, mel)")
            _, mask = _metrics.validate(np.zeros(shape), mask)
            places: list[int | None] = [k for k, label in enumerate(labels) if label == word]
            for index in places or [None]:
                saliency = None if index is None else values[i, index]
                reason = _unscorable(saliency, mask, word)
                got, beside = nothing, dict.fromkeys(names, nothing)
                if saliency is not None and not reason:
                    got = _metrics.evaluate(saliency, mask, metrics=chosen, **options)
                    level = _references.chance(mask, saliency, **options)
                    beside["chance"] = {name: level[name] for name in chosen}
                    blind = {name: _reference(source, word, i, prompts) for name, source in given.items()}
                    prior = _reference(priors, word, i, prompts) if priors is not None else None
                    if prior is not None:
                        blind["class_prior"] = prior
                    if energy is not None:
                        blind["mix_energy"] = energy[i]
                    if prior is not None and energy is not None:
                        blind["prior_times_mix"] = _references.prior_times_mix(prior, energy[i])
                    if lattice is not None:
                        blind["oracle_projection"] = _references.oracle_projection(mask, lattice)
                    groups = {name: [blind_map] for name, blind_map in blind.items() if blind_map is not None}
                    groups["other_word"] = [
                        values[i, k]
                        for k, label in enumerate(labels)
                        if label != word and label in targets and whole[i, k]
                    ]
                    if shape[0] > 1:
                        groups["time_shift"] = [_references.time_shift(saliency, part) for part in _references.SHIFTS]
                    if pieces is not None:
                        groups["other_piece"] = [
                            values[j, index] for j in range(prompts) if pieces[j] != pieces[i] and whole[j, index]
                        ]
                    beside |= {name: mean(some, mask) for name, some in groups.items()}
                for metric in chosen:
                    undefined = "" if np.isfinite(got[metric]) else _metrics.UNDEFINED.get(metric, "undefined")
                    rows.append(
                        {
                            "prompt": texts[i],
                            "prompt_index": i,
                            "waveform": waveforms[i],
                            **({} if pieces is None else {"piece": str(pieces[i])}),
                            "word": word,
                            "mask_area": float(mask.mean()),
                            "metric": metric,
                            "value": got[metric],
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


def summarise(
    rows: Sequence[Row],
    *,
    by: Sequence[str] = ("word", "metric"),
    unit: str = "piece",
    references: Sequence[str] | None = None,
    minimum: int = MINIMUM_PIECES,
    correction: Literal["holm", "benjamini-hochberg"] = "holm",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Row]:
    """Means over pieces, with intervals, and how far they lie from each reference.

    Rows are averaged within a piece first. A piece counts where it has a value; a reference is compared over the pieces that
    have both. Differences are paired: their interval is the BCa bootstrap of piece differences, their p-value that of a
    paired permutation, two-sided, corrected over all that this call returns.

    Parameters
    ----------
    rows : sequence of dict
        From :func:`score`, with further keys as you like.
    by : sequence of str
        Keys that make a group. Add what else distinguishes rows (a model, a noise level, a kind of mask): what is not named
        is averaged over. ``("metric",)`` averages a piece's words.
    unit : str
        Key of the piece.
    references : sequence of str, optional
        Columns to compare with; default those of :data:`REFERENCES` that the rows have.
    minimum : int
        Groups of fewer pieces have no interval and no p-value, and say so in ``note``.
    correction : {"holm", "benjamini-hochberg"}
    resamples, seed
        Of intervals and permutations.

    Returns
    -------
    list of dict
        One per group and reference (one per group without any). Keys: those of ``by``; ``n`` (pieces) and
        ``without_value`` (rows of the group that have none); ``value``, ``low``, ``high``; ``reference``,
        ``reference_n`` (pieces that have it too) and ``reference_value`` (over these);
        ``difference``, ``difference_low``, ``difference_high``; ``ratio`` of the two means; ``p``, ``p_corrected``; ``note``.

    Raises
    ------
    ValueError
        If a row lacks a key, or the correction is unknown.
    """
    if correction not in ("holm", "benjamini-hochberg"):
        raise ValueError(f"correction must be 'holm' or 'benjamini-hochberg', got {correction!r}")
    wanted = [*by, unit, "value"]
    for row in rows:
        missing = [key for key in wanted if key not in row]
        if missing:
            raise ValueError(f"a row has no {missing}: add them, or name others as by= and unit=; it has {list(row)}")
    names = [n for n in REFERENCES if any(n in row for row in rows)] if references is None else list(references)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in by), []).append(row)
    found: list[Row] = []
    nan = float("nan")
    for group, members in groups.items():
        valued = [row for row in members if np.isfinite(row["value"])]
        value = _per_unit(valued, "value", unit)
        enough = len(value) >= minimum
        mean, low, high = (float(np.mean(list(value.values()))), nan, nan) if value else (nan, nan, nan)
        note = "" if enough else f"{len(value)} pieces: at least {minimum} are needed"
        if enough:
            estimate = interval(list(value.values()), resamples=resamples, seed=seed)
            (mean, low, high), note = estimate, estimate.note
        head: Row = dict(zip(by, group, strict=True))
        head |= {"n": len(value), "without_value": len(members) - len(valued), "value": mean, "low": low, "high": high}
        for name in names or [""]:
            # only rows that have both: a mean over words must be over the same words on both sides
            both = [row for row in valued if np.isfinite(row.get(name, nan))]
            own, other = _per_unit(both, "value", unit), _per_unit(both, name, unit) if both else {}
            a, b = np.array(list(own.values())), np.array(list(other.values()))
            entry: Row = {**head, "reference": name, "reference_n": len(b)}
            entry |= dict.fromkeys(_COMPARED, nan)
            if len(b):
                entry["reference_value"] = float(b.mean())
                entry["difference"] = float((a - b).mean())
                entry["ratio"] = float(a.mean() / b.mean()) if b.mean() > 0 else nan
            if len(b) and len(b) >= minimum:
                _, entry["difference_low"], entry["difference_high"] = interval(a - b, resamples=resamples, seed=seed)
                entry["p"] = paired_permutation(a, b, resamples=resamples, seed=seed)
            found.append({**entry, "note": note})
    tested = [entry for entry in found if np.isfinite(entry["p"])]
    if tested:
        adjust = holm if correction == "holm" else benjamini_hochberg
        for entry, p in zip(tested, adjust([entry["p"] for entry in tested])):
            entry["p_corrected"] = float(p)
    return found


_COMPARED = ("reference_value", "difference", "difference_low", "difference_high", "ratio", "p", "p_corrected")


def _per_unit(rows: Sequence[Row], column: str, unit: str) -> dict[Any, float]:
    """Mean of a column within each unit."""
    values: dict[Any, list[float]] = {}
    for row in rows:
        values.setdefault(row[unit], []).append(row[column])
    return {key: float(np.mean(some)) for key, some in values.items()}


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
