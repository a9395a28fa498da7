"""From scores to what a reader asks: means beside their references, contrasts, controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aiba_eval import controls, references
from aiba_eval.contrasts import Contrast, cross_scores, piece_swap, word_swap
from aiba_eval.evaluation.scores import JUDGED
from aiba_eval.grid import LOG_FLOOR
from aiba_eval.scoring import MINIMUM_PIECES, summarise

if TYPE_CHECKING:
    import pandas

    from aiba_eval.evaluation.workshop import Workshop

Row = dict[str, Any]
Maps = Mapping[str, Mapping[str, NDArray[Any]]]

#: references beside single classes; beside all of them stand all
BESIDE_CLASSES = ("chance", "mix_energy", "class_prior", "oracle_projection")
#: metric of contrasts and controls
METRIC = "average_precision"


def summary_of(workshop: Workshop, scores: pandas.DataFrame) -> dict[str, list[Row]]:
    """``summary``, ``contrasts`` and ``controls`` of a run; see :class:`aiba_eval.evaluation.Run`."""
    config = workshop.configuration
    own = scores[scores.condition == "own"]
    options: dict[str, Any] = {"resamples": config.resamples, "seed": config.seed}
    by = ("variant", "level", "target", "word", "metric")
    rows = own.to_dict("records")
    every = [{**row, "word": "all"} for row in rows]
    classes = [row for row in rows if row["variant"] == "default" and row["target"] in JUDGED[config.protocol]]
    return {
        "summary": [
            *summarise(every, by=by, **options),
            *summarise(classes, by=by, references=BESIDE_CLASSES, **options),
        ],
        "contrasts": _contrasts(workshop, options),
        "controls": _controls(workshop, scores, options),
    }


# ---- contrasts


def _contrasts(workshop: Workshop, options: Mapping[str, int]) -> list[Row]:
    """Word swap and piece swap of the model's maps and of every reference, by average precision."""
    config = workshop.configuration
    known = workshop.items("own")
    arrays = {name: item.fields.load() for name, item in known.items()}
    if not arrays:
        return []
    first = next(iter(arrays.values()))
    targets = [kind for kind in JUDGED[config.protocol] if kind in [str(t) for t in first["target"].values]]
    pieces = {name: item.piece for name, item in known.items()}
    found: list[Row] = []
    for target in targets:
        masks = {name: _masks(one, target, known[name].words) for name, one in arrays.items()}
        for source, level, maps in _sources(workshop, arrays, masks):
            head = {"map": source, "variant": "default", "level": level, "target": target}
            for kind, contrast in _both(maps, masks, pieces, options, config.generates):
                mean, low, high = contrast.interval
                enough = len(contrast.per_piece) >= MINIMUM_PIECES
                row: Row = {**head, "contrast": kind, "word": "all", "value": mean, "n": len(contrast.per_piece)}
                row |= (
                    {"low": low, "high": high, "p": contrast.p}
                    if enough
                    else dict.fromkeys(("low", "high", "p"), np.nan)
                )
                found.append(row)
    return found


def _masks(arrays: Any, target: str, words: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    found = {}
    kinds = [str(kind) for kind in arrays["truth"]["target"].values]
    for word in words if target in kinds else ():
        values = arrays["truth"].sel(target=target, word=word).values
        if np.isfinite(values).all():
            found[word] = values > 0.5
    return found


def _sources(workshop: Workshop, arrays: Mapping[str, Any], masks: Maps) -> list[tuple[str, int | None, Maps]]:
    """Item → word → map: the model's at every level, and those that never ran it."""
    found: list[tuple[str, int | None, Maps]] = []
    for level in workshop.configuration.levels:
        own = {name: one["projected"].sel(variant="default", level=level) for name, one in arrays.items()}
        found.append(("model", level, {n: {w: own[n].sel(word=w).values for w in masks[n]} for n in arrays}))
    energy = {name: one["mix"].values.astype(float) - np.log(LOG_FLOOR) for name, one in arrays.items()}
    priors = {name: workshop.priors(workshop.items("own")[name].piece) for name in arrays}
    lattice = {name: one.attrs["finest_lattice"] for name, one in arrays.items()}
    found.append(("mix_energy", None, {n: dict.fromkeys(masks[n], energy[n]) for n in arrays}))
    found.append(("class_prior", None, {n: {w: priors[n][w] for w in masks[n] if w in priors[n]} for n in arrays}))
    found.append(
        (
            "prior_times_mix",
            None,
            {n: {w: priors[n][w] * energy[n] for w in masks[n] if w in priors[n]} for n in arrays},
        )
    )
    found.append(
        (
            "oracle_projection",
            None,
            {n: {w: references.oracle_projection(m, tuple(lattice[n])) for w, m in masks[n].items()} for n in arrays},
        )
    )
    return found


def _both(
    maps: Maps, masks: Maps, pieces: Mapping[str, str], options: Mapping[str, int], generates: bool
) -> list[tuple[str, Contrast]]:
    """The two contrasts, where there is something to swap. Of several windows of a piece the first that has the word counts."""
    groups: dict[str, dict[str, tuple[Any, Any]]] = {}
    for name, of in maps.items():
        for word, one in of.items():
            groups.setdefault(pieces[name], {}).setdefault(word, (one, masks[name][word]))
    found = []
    within = {
        piece: cross_scores([one for one, _ in of.values()], [mask for _, mask in of.values()], METRIC)
        for piece, of in groups.items()
        if len(of) > 1
    }
    if within:
        found.append(("word_swap", word_swap(within, **options)))
    words = {word for of in groups.values() for word in of}
    having = {word: [piece for piece, of in groups.items() if word in of] for word in sorted(words)}
    having = {word: names for word, names in having.items() if len(names) > 1}
    if having and not generates:  # bands are the same in every piece: nothing to tell apart
        across = {
            word: cross_scores([groups[p][word][0] for p in names], [groups[p][word][1] for p in names], METRIC)
            for word, names in having.items()
        }
        found.append(("piece_swap", piece_swap(across, having, **options)))
    return found


# ---- controls


def _controls(workshop: Workshop, scores: pandas.DataFrame, options: Mapping[str, int]) -> list[Row]:
    """Every control that was measured, per level and measure."""
    config = workshop.configuration
    found: list[Row] = []
    target = next((kind for kind in JUDGED[config.protocol] if (scores.target == kind).any()), None)
    chosen = scores[(scores.variant == "default") & (scores.metric == METRIC) & (scores.target == target)]
    fresh = [c for c in config.conditions if c.startswith("fresh-")]
    seeds = [c for c in config.conditions if c.startswith("seed-")]
    for level in config.levels:
        at = chosen[chosen.level == level]
        for measure in ("score", "word_swap", "piece_swap"):
            own = _per_piece(at[at.condition == "own"], measure)
            if not len(own):
                continue
            measured: list[controls.Control] = []
            if config.prompt_swap and measure == "score":
                other = _per_piece(at[at.condition == "prompt_swap"], measure)
                both = own.index.intersection(other.index)
                if len(both):
                    measured.append(controls.prompt_swap(own[both].to_numpy(), other[both].to_numpy(), **options))
            if seeds:
                several = [own, *(_per_piece(at[at.condition == c], measure) for c in seeds)]
                shared = several[0].index
                for one in several[1:]:
                    shared = shared.intersection(one.index)
                if len(shared):
                    table = np.stack([one[shared].to_numpy() for one in several], axis=1)
                    measured.append(controls.seed_variance(table, **options))
            if fresh:
                drawn = [_per_piece(at[at.condition == c], measure) for c in fresh]
                values = [float(one.mean()) for one in drawn if len(one)]
                if values:
                    measured.append(controls.reinitialised(float(own.mean()), values))
            found += [_row(control, measure, level) for control in measured]
        found += _masses(workshop, level, options)
    return found


def _per_piece(rows: pandas.DataFrame, measure: str) -> pandas.Series:
    """Piece → mean over its words of the score, or of its difference from the swapped maps' score."""
    values = rows["value"]
    if measure != "score":
        values = values - rows["other_word" if measure == "word_swap" else "other_piece"]
    return values.groupby(rows["piece"]).mean().dropna()


def _masses(workshop: Workshop, level: int, options: Mapping[str, int]) -> list[Row]:
    found = []
    if workshop.configuration.absent:
        of = [item.about["masses"][str(level)] for item in workshop.items("absent").values()]
        of = [one for one in of if one["present"] and one["absent"]]
        if of:
            present = [list(one["present"].values()) for one in of]
            control = controls.absent_instrument(present, [list(one["absent"].values()) for one in of], **options)
            found.append(_row(control, "mass AUROC", level))
    if workshop.configuration.neutral:
        of = [item.about["changes"][str(level)] for item in workshop.items("neutral").values()]
        if of:
            control = controls.neutral_edit(
                [np.mean(one["left out"]) for one in of], [np.mean(one["neutral"]) for one in of], **options
            )
            found.append(_row(control, "change of the other words' maps", level))
    return found


def _row(control: controls.Control, measure: str, level: int) -> Row:
    mean, low, high = control.difference
    return {
        "name": control.name,
        "measure": measure,
        "level": level,
        "observed": control.observed,
        "control": control.control,
        "difference": mean,
        "low": low,
        "high": high,
        "p": control.p,
        "count": control.count,
        "note": control.note,
    }
