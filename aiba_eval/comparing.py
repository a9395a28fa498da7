"""Two models on the same pieces: attention maps and effect maps beside each other and beside what blind maps get.

Both models are given the same clips of real music, the same prompts, noise levels and draws of noise; their maps lie on the
same grid and are scored against the same stems.

**Clips** (:mod:`aiba_eval.clips`). Of each piece ``windows`` windows of ``seconds``, where two or more instruments play; two to ``most``
of these, in random order, are summed to a mix and named by the prompt ("bass, drums and piano"). Everything is drawn from ``seed``.

**Maps** (:mod:`aiba_eval.clip_maps`). *Attention*: the word's cross-attention on the noised latent of the mix, projected. *Effect*: what the
predicted log-mel loses without the word: the prompt against the same list less the word.

**Targets.** ``dominance``: cells where the instrument holds more than half of the power, by average precision (AP);
``dominance_60``: with quieter cells too. ``energy``: cells where it sounds, by AP. ``share``: its share of the power, by Spearman's ρ over cells.
An effect map agrees with a dominance mask partly by definition; the other two are less close to what it measures.

**Measures**, of a word w in clip c, with s(map, target) the score::

    score             s(map of w in c, target of w in c)
    chance            area of the mask; 0 for a share
    ratio             mean over pieces of score / mean over pieces of chance          (a ratio of means)
    above_chance      score − chance
    word_swap         score − mean over other words v of the prompt of s(map of v in c, target of w in c)      is it this word?
    piece_swap        score − mean over other pieces' clips d of s(map of w in d, target of w in c)            is it this audio?
    agreement         ρ(attention of w, effect of w), and agreement_swap: less the mean over v of ρ(attention of v, effect of w)
    presence          share of pairs in which an instrument has more effect mass (of log-mel) than an absent one in its place; ties half
    presence_by_word  the same over pairs of clips with equally many words, for one word: present in one, absent from the other
    power_presence, fit_presence          presence by effect mass in power, and in fit to the audio; each has its _by_word
    neutral_share     mean over pieces of the effect mass of edits that should do nothing / the same of present words

Words are averaged within a piece and the piece is the unit. Intervals are 95 % BCa bootstrap intervals over pieces; two models are
compared by paired permutation tests over pieces, corrected by Holm's method over all of them (:mod:`aiba_eval.statistics`).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aiba_eval import references
from aiba_eval.clip_maps import PROFILE, QUANTITIES, CannotCompare, ClipMaps, Store, clip_maps
from aiba_eval.clips import TARGETS, Clip, make_clips
from aiba_eval.controls import MINIMUM_INITIALISATIONS
from aiba_eval.demo import UNNAMED
from aiba_eval.effects import Quantity, rank_correlation
from aiba_eval.fresh import with_fresh_weights
from aiba_eval.grid import MelGrid
from aiba_eval.loading import CannotLoad, Loaded, sampling_rate, weights_digest
from aiba_eval.metrics import average_precision
from aiba_eval.outputs import OutputFolder, write_csv, write_json
from aiba_eval.run import Progress, as_loaded, quiet, random_weights, versions
from aiba_eval.scoring import MINIMUM_PIECES
from aiba_eval.statistics import RESAMPLES, holm, interval, paired_permutation, permutation_p, ratio_of_means

if TYPE_CHECKING:
    from aiba_eval.datasets import Piece

Floats = NDArray[np.float64]
Row = dict[str, Any]
#: one mapping of word to map for each clip
PerClip = Sequence[Mapping[str, NDArray[Any]]]
#: ``seed`` and ``resamples`` of a bootstrap or permutation test
_Draw = Mapping[str, Any]

#: measures that two models are tested on, per kind of map and noise level
TESTED = ("score", "word_swap", "piece_swap")
#: measures of a map against a target that are differences or scores, per word
MEASURES = ("score", "above_chance", "word_swap", "piece_swap")
#: a mask outside these areas is not scored: nearly every map, or none, would fit it
AREAS = (0.02, 0.9)
#: measure → the quantity of the effect masses that it compares
PRESENCES: dict[str, Quantity] = {"presence": "log", "power_presence": "energy", "fit_presence": "fit"}
#: references that are made of masks of other clips
PRIORS = ("class_prior", "prior_mix")
#: fewer pieces have no interval and no test
FEWEST = 3
#: clips of other pieces that a map is swapped with
PARTNERS = 4
#: of what is measured on a clip: stored results of another version are not mixed with new ones
METHOD = 3


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes
    ----------
    models : labels of the two models
    rows : one dict per figure: ``model`` (empty for a map that never saw one), ``map``, ``level`` (timestep, or None), ``target``
        (empty where there is none), ``word`` ("all" or a class), ``measure``, ``value``, ``low``, ``high`` (NaN without interval),
        ``pieces``
    tests : one dict per paired test: ``map``, ``level``, ``target``, ``measure``, ``difference`` (first model less second), ``p``,
        ``p_holm``, ``pieces``
    fresh : one dict per figure of re-initialised models: ``model``, ``map``, ``level``, ``target``, ``measure``, ``value`` (the
        model's own), ``fresh`` (one per initialisation), ``p`` = (1 + #fresh ≥ value) / (1 + #fresh), ``outside`` (above all of them, or for
        ``neutral_share`` below)
    profiles : one dict per model, level and attention site: ``entropy``, ``word_mass``, ``padding_mass``, ``special_mass``, means
        over clips (see :class:`aiba_eval.diagnostics.SiteSummary`)
    skipped : piece → why it was left out
    notes : what a reader has to know
    record : configuration and versions
    out : folder, or None
    files : what was written into it
    """

    models: tuple[str, str]
    rows: list[Row]
    tests: list[Row]
    fresh: list[Row]
    profiles: list[Row]
    skipped: dict[str, str]
    notes: list[str]
    record: dict[str, Any] = field(repr=False)
    out: Path | None = None
    files: list[str] = field(default_factory=list)

    def find(self, measure: str, **where: Any) -> Row:
        """The one row of a measure with these values: ``find("word_swap", model="demo:dit", map="effect", level=300)``.

        ``target`` is "dominance" and ``word`` "all" unless given; measures without a target are found without one.

        Raises
        ------
        KeyError
            No such row, or several.
        """
        wanted = {"measure": measure, "word": "all", **where}
        found = [row for row in self.rows if all(row[key] == value for key, value in wanted.items())]
        if "target" not in where:
            found = [row for row in found if row["target"] in ("", "dominance")]
        if len(found) != 1:
            raise KeyError(f"{len(found)} rows have {wanted}")
        return found[0]

    def table(self, *, target: str = "dominance", word: str = "all") -> list[Row]:
        """One row per kind of map, model and level, with a column per measure: ``(value, low, high)``.

        Parameters
        ----------
        target : one of :data:`TARGETS`
        word : ``"all"``, or a class that has enough pieces
        """
        wide: dict[tuple[Any, ...], Row] = {}
        for row in self.rows:
            if row["word"] != word or row["target"] not in ("", target):
                continue
            key = (row["model"], row["map"], row["level"])
            entry = wide.setdefault(key, {"model": key[0], "map": key[1], "level": key[2], "pieces": row["pieces"]})
            entry[row["measure"]] = (row["value"], row["low"], row["high"])
        return list(wide.values())

    def markdown(self, *, target: str = "dominance", word: str = "all", measures: Sequence[str] | None = None) -> str:
        """:meth:`table` as a table in Markdown: values with their intervals, of all measures or of those named."""
        rows = self.table(target=target, word=word)
        known = list(dict.fromkeys(k for row in rows for k in row if k not in ("model", "map", "level", "pieces")))
        measures = known if measures is None else [measure for measure in measures if measure in known]
        lines = [
            f"| map | t | {' | '.join(measures)} |",
            f"|---|---|{'---|' * len(measures)}",
        ]
        for row in rows:
            name = " ".join(filter(None, (row["model"], row["map"])))
            level = "" if row["level"] is None else row["level"]
            cells = [_shown(*row[m]) if m in row else "" for m in measures]
            lines.append(f"| {name} | {level} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as ``results.json`` holds it and ``aiba compare --json`` prints it."""
        return {
            "models": list(self.models),
            "rows": self.rows,
            "tests": self.tests,
            "fresh": self.fresh,
            "profiles": self.profiles,
            "skipped": self.skipped,
            "notes": self.notes,
            **self.record,
        }

    def __str__(self) -> str:
        return self.markdown() + "".join(f"\n{note}" for note in self.notes)


def compare(
    model_a: str | Loaded | Any,
    model_b: str | Loaded | Any,
    pieces: Sequence[Piece],
    *,
    training: Sequence[Piece] | None = None,
    words: Sequence[str] | None = None,
    timesteps: Sequence[int] = (300, 800),
    draws: int = 4,
    seed: int = 0,
    seconds: float = 2.56,
    windows: int = 1,
    most: int = 4,
    absent: int = 3,
    layers: str | Sequence[str] = "*",
    effects: bool = True,
    grid: MelGrid | None = None,
    batch: int = 16,
    resamples: int = RESAMPLES,
    reinitialisations: int | Mapping[str, int] = 0,
    reinitialise: Callable[[Any, int], Any] | None = None,
    labels: tuple[str, str] | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Comparison:
    """Compare two models' attention and effect maps on the same clips of real music. The module says what is measured.

    Parameters
    ----------
    model_a, model_b : str, Loaded or pipeline
        A name, folder or hub id (see :func:`aiba_eval.loading.load`), or a pipeline that :func:`aiba_eval.probe.probe` takes.
        A model that cannot decode to a log-mel has attention maps only, and a note says why.
    pieces : sequence of Piece
        From :func:`aiba_eval.datasets.slakh.pieces`: held out from what the models were trained on.
    training : sequence of Piece, optional
        For the class priors; other pieces than those compared. Default: each piece's priors come from the other pieces.
    words : sequence of str, optional
        Instruments that prompts may name; default all that the pieces have, without the collective names "other", "effects" and
        "ethnic".
    timesteps, draws, seed
        Noise levels, draws for each, and the seed of everything that is drawn.
    seconds, windows, most, absent
        Length of a clip, clips of each piece, most instruments in one, and how many absent instruments are asked for.
    layers
        Attention sites to average, as in :func:`aiba_eval.project`.
    effects : bool
        False compares attention only, which takes a tenth of the time.
    grid : MelGrid, optional
        Default ``MelGrid(128, 64)``; its duration becomes ``seconds``.
    batch : int
        Most rows in one forward.
    resamples : int
        Draws of every bootstrap and permutation test.
    reinitialisations : int or mapping of label to int
        Repeat everything with so many fresh initialisations of each model: untrained networks lean by accident, and a
        figure means something where it lies outside their distribution. It takes that many times as long; a mapping asks for
        one model only. A rerun may ask for more.
    reinitialise : callable, optional
        ``reinitialise(pipeline, seed) -> pipeline`` with fresh weights; default :func:`aiba_eval.fresh.with_fresh_weights`.
    labels : (str, str), optional
        What the models are called; default their names.
    out : path, optional
        Folder for per-piece results, ``results.json``, tables and figures. A run that was stopped goes on there.
    overwrite : bool
        Begin anew in the folder of another comparison.
    device, dtype, progress
        As in :func:`aiba_eval.run.run`.

    Returns
    -------
    Comparison

    Raises
    ------
    CannotCompare
        No piece can be used, an instrument that no piece has, models of different sample rates, or a clip that a model does
        not cover.
    CannotLoad, CannotProbe, aiba_hooks.AibaError
        A model cannot be loaded or probed.
    aiba_eval.outputs.FolderInUse
        The folder holds something else, or a comparison of another configuration.
    ValueError
        An option that does not fit.
    """
    tell = progress or quiet
    low = {"timesteps": len(timesteps), "draws": draws, "windows": windows, "batch": batch, "resamples": resamples}
    fewest = min(reinitialisations.values(), default=0) if isinstance(reinitialisations, Mapping) else reinitialisations
    if min(low.values()) < 1 or most < 2 or absent < 0 or fewest < 0 or seconds <= 0:
        raise ValueError(
            f"need {', '.join(low)} >= 1, most >= 2, absent and reinitialisations >= 0 and seconds > 0, got {low}, most={most}, "
            f"absent={absent}, reinitialisations={reinitialisations}, seconds={seconds}"
        )
    grid = dataclasses.replace(MelGrid() if grid is None else grid, duration=float(seconds), start=0.0)
    named = _named(pieces, words)
    loaded = [as_loaded(model, device=device, dtype=dtype, progress=tell) for model in (model_a, model_b)]
    labelled = _labels(loaded, labels)
    models = dict(zip(labelled, loaded, strict=True))
    initialisations = _initialisations(reinitialisations, labelled)
    _check_rates(models)
    settings = {
        "timesteps": tuple(int(t) for t in timesteps),
        "draws": int(draws),
        "seed": int(seed),
        "layers": layers if isinstance(layers, str) else list(layers),
        "effects": bool(effects),
    }
    material: dict[str, Any] = {
        "seconds": float(seconds),
        "windows": int(windows),
        "most": int(most),
        "absent": int(absent),
    }
    configuration = {
        "models": {
            label: {"name": one.name, "pipeline": type(one.pipeline).__name__, "weights": weights_digest(one.pipeline)}
            for label, one in models.items()
        },
        **settings,
        **material,
        "words": list(named),
        "grid": dataclasses.asdict(grid),
        "method": METHOD,
        "pieces": [piece.identity for piece in pieces],
        "training": None if training is None else [piece.identity for piece in training],
    }
    folder = None if out is None else OutputFolder(out, "compare", overwrite=overwrite, configuration=configuration)
    clips, skipped = make_clips(pieces, named, grid, seed=seed, progress=tell, **material)
    if not clips:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise CannotCompare(
            f"none of {len(pieces)} pieces can be used ({reasons}): give other pieces, words or seconds"
        )

    run = _Run(models, clips, grid, {**settings, "batch": batch}, _partners(clips, seed), Store(folder), tell)
    measured = run.measure()
    priors = _priors_of(clips, training, named, grid, seconds, seed, tell)
    sources = run.sources(measured) + _blind_sources(measured, clips, grid, priors)
    classes = _classes(clips)
    draw: _Draw = {"seed": int(seed), "resamples": int(resamples)}
    rows: list[Row] = []
    records: dict[tuple[str, str, int | None], list[Row]] = {}
    for done, (model, kind, level, maps) in enumerate(sources):
        tell("scoring", done, len(sources))
        key = {"model": model, "map": kind, "level": level}
        # a prior made of the other pieces has seen this one in each of theirs: nothing to swap
        partners = {} if training is None and kind in PRIORS else run.partners
        for target in TARGETS:
            found = _contrasts(clips, maps, target, partners)
            rows += _rows_of({**key, "target": target}, found, classes, draw)
            if target == "dominance":
                records[model, kind, level] = found
    masses = run.masses(measured)
    for (model, level), of in masses.items():
        rows += _presence_rows({"model": model, "map": "effect", "level": level}, of, draw)
        rows += _agreement_rows({"model": model, "map": "attention", "level": level}, run, measured[model], draw)
    tests = _tests(tuple(models), records, masses, run.levels, draw)
    fresh = []
    if any(initialisations.values()):
        rebuild = with_fresh_weights if reinitialise is None else reinitialise
        fresh = _beside_fresh(rows, run.fresh(rebuild, initialisations))

    result = Comparison(
        models=labelled,
        rows=rows,
        tests=tests,
        fresh=fresh,
        profiles=[row for model, of in measured.items() for row in _profiles(model, of)],
        skipped=skipped,
        notes=_notes(models, measured, clips, skipped, classes, initialisations, draws),
        record={
            "configuration": configuration,
            "reinitialisations": initialisations,
            "clips": [{"piece": c.piece, "start": c.start, "prompt": c.prompt, "absent": c.absent} for c in clips],
            "versions": versions(),
        },
    )
    if folder is None:
        return result
    tell("drawing", 0, None)
    _write(folder, result, clips, measured, grid)
    files = [name for name in folder.files if name != Store.WORK]
    return dataclasses.replace(result, out=folder.path, files=[*files, folder.manifest.name])


def compare_on(
    model_a: str | Loaded | Any,
    model_b: str | Loaded | Any,
    *,
    stems: str | Path | None = None,
    split: str = "test",
    training: str | None = "train",
    max_pieces: int | None = None,
    **options: Any,
) -> Comparison:
    """:func:`compare` on a set in Slakh's layout: what ``aiba compare`` does.

    Parameters
    ----------
    model_a, model_b
        As in :func:`compare`.
    stems : path, optional
        Folder of the set; default the one that ships with the package.
    split : str
        Whose pieces are compared. A set without splits is taken whole.
    training : str, optional
        Split of the class priors; where the set does not have it, or it is None, they come from the other pieces.
    max_pieces : int, optional
        So many pieces at most, the first by name.
    options
        Of :func:`compare`.

    Raises
    ------
    CannotCompare
        There is no such set or split, or as :func:`compare`.
    """
    from aiba_eval.datasets import freedoom_root, slakh

    root = freedoom_root() if stems is None else Path(stems)
    try:
        known = slakh.splits(root)
        pieces = slakh.pieces(root, split if known else None)
        others = slakh.pieces(root, training) if training in known and training != split else None
    except (FileNotFoundError, ValueError) as error:
        raise CannotCompare(str(error)) from error
    return compare(model_a, model_b, pieces[:max_pieces], training=others, **options)


# ---- what is compared


def _labels(loaded: Sequence[Loaded], labels: tuple[str, str] | None) -> tuple[str, str]:
    first, second = (one.name for one in loaded) if labels is None else labels
    if first == second and labels is None:
        return f"{first} (1)", f"{second} (2)"
    if first == second:
        raise ValueError(f"both models are labelled {first!r}: give two labels")
    return first, second


def _initialisations(asked: int | Mapping[str, int], labels: Sequence[str]) -> dict[str, int]:
    """How many of each model."""
    counts = asked if isinstance(asked, Mapping) else dict.fromkeys(labels, asked)
    unknown = sorted(set(counts) - set(labels))
    if unknown:
        raise ValueError(f"reinitialisations of {unknown[0]!r}: the models are {' and '.join(map(repr, labels))}")
    return {label: int(counts.get(label, 0)) for label in labels}


def _check_rates(models: Mapping[str, Loaded]) -> None:
    rates = {label: _rate(one) for label, one in models.items()}
    if len(set(rates.values())) > 1:
        shown = " and ".join(f"{label} makes audio of {rate} Hz" for label, rate in rates.items())
        raise CannotCompare(
            f"{shown}: their mels do not cover the same range, so that scores would differ by that alone. Compare models of one "
            "sample rate"
        )


def _rate(one: Loaded) -> int | None:
    try:
        return sampling_rate(one.pipeline)
    except CannotLoad:
        return None  # probing says what it lacks


def _named(pieces: Sequence[Piece], words: Sequence[str] | None) -> tuple[str, ...]:
    """The instruments that prompts may name."""
    names = [piece.name for piece in pieces]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise CannotCompare(f"two pieces are called {twice!r}: give pieces of one split or data set")
    known = sorted({name for piece in pieces for name in piece.instruments} - UNNAMED)
    unknown = [word for word in words or () if word not in known]
    if unknown:
        raise CannotCompare(f"no piece has {unknown[0]!r}; the pieces' instruments are {', '.join(known) or 'none'}")
    return tuple(known if words is None else dict.fromkeys(words))


# ---- what the models show


@dataclass(frozen=True)
class _Run:
    """Models, clips and how the first are asked about the second."""

    models: Mapping[str, Loaded]
    clips: Sequence[Clip]
    grid: MelGrid
    settings: Mapping[str, Any]  # of clip_maps
    partners: Mapping[tuple[int, str], Sequence[int]]
    store: Store
    tell: Progress

    @property
    def levels(self) -> tuple[int, ...]:
        return tuple(self.settings["timesteps"])

    def measure(self) -> dict[str, list[ClipMaps]]:
        """Maps of both models on every clip, piece by piece: what cannot be compared is found at the first."""
        groups: dict[str, list[Clip]] = {}
        for clip in self.clips:
            groups.setdefault(clip.piece, []).append(clip)
        found: dict[str, list[ClipMaps]] = {label: [] for label in self.models}
        done, total = 0, len(groups) * len(self.models)
        for piece, members in groups.items():
            for label, one in self.models.items():
                self.tell("measuring both models", done, total)

                def make(label: str = label, one: Loaded = one, members: Sequence[Clip] = members) -> list[ClipMaps]:
                    return [clip_maps(label, one.pipeline, clip, self.grid, **self.settings) for clip in members]

                found[label] += self.store.piece(label, piece, make)
                done += 1
        return found

    def sources(self, measured: Mapping[str, Sequence[ClipMaps]]) -> list[tuple[str, str, int | None, PerClip]]:
        """(model, kind of map, level, maps) of every map that a model made."""
        return [
            (label, kind, level, self.maps(of, kind, level))
            for kind in ("attention", "effect")
            for label, of in measured.items()
            if kind == "attention" or _has_effects(of)
            for level in self.levels
        ]

    def maps(self, of: Sequence[ClipMaps], kind: str, level: int) -> PerClip:
        number = self.levels.index(level)
        return [
            dict(zip(clip.words, getattr(one, kind)[number], strict=True))
            for clip, one in zip(self.clips, of, strict=True)
        ]

    def masses(self, measured: Mapping[str, Sequence[ClipMaps]]) -> dict[tuple[str, int], dict[Quantity, _Mass]]:
        """Effect masses by model and level, and quantity, of models that have them."""
        pieces = [clip.piece for clip in self.clips]
        return {
            (label, level): {
                quantity: _Mass(
                    pieces, [dict(zip(one.edits, np.asarray(one.masses)[kind, number], strict=True)) for one in of]
                )
                for kind, quantity in enumerate(QUANTITIES)
            }
            for label, of in measured.items()
            if _has_effects(of)
            for number, level in enumerate(self.levels)
        }

    def fresh(
        self, rebuild: Callable[[Any, int], Any], counts: Mapping[str, int]
    ) -> dict[tuple[str, str], list[float]]:
        """(model, "map level target measure") → the figure over all words, for each of so many initialisations."""
        drawn: dict[tuple[str, str], list[float]] = defaultdict(list)
        order = [
            (number, label) for number in range(max(counts.values())) for label in counts if number < counts[label]
        ]
        for step, (number, label) in enumerate(order):

            def make(label: str = label, number: int = number, done: int = step * len(self.clips)) -> dict[str, float]:
                pipeline = rebuild(self.models[label].pipeline, number)
                of = []
                for k, clip in enumerate(self.clips):
                    self.tell("measuring fresh weights", done + k, len(order) * len(self.clips))
                    of.append(clip_maps(label, pipeline, clip, self.grid, **self.settings))
                return self._means(of)

            for key, value in self.store.numbers(f"{label} fresh", str(number), make).items():
                drawn[label, key].append(value)
        return drawn

    def _means(self, of: Sequence[ClipMaps]) -> dict[str, float]:
        found: dict[str, float] = {}
        for _, kind, level, maps in self.sources({"": of}):
            for target in TARGETS:
                records = _contrasts(self.clips, maps, target, self.partners)
                for measure in MEASURES:
                    found[_fresh_key(kind, level, target, measure)] = _mean(_per_piece(records, measure).values())
        for (_, level), mass in self.masses({"": of}).items():
            present, neutral = (_mean(mass["log"].roles(role).values()) for role in ("present", "neutral"))
            shown = {"neutral_share": neutral / present if present > 0 else float("nan")}
            for measure, quantity in PRESENCES.items():
                shown[measure] = _mean(mass[quantity].presence().values())
                shown[f"{measure}_by_word"] = mass[quantity].presence_by_word()
            found |= {_fresh_key("effect", level, "", measure): value for measure, value in shown.items()}
        return found


def _fresh_key(kind: str, level: int | None, target: str, measure: str) -> str:
    return f"{kind} {level} {target} {measure}"


def _has_effects(of: Sequence[ClipMaps]) -> bool:
    return all(one.effect is not None for one in of)


def _mean(values: Any) -> float:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")


# ---- maps that never saw a model


def _priors_of(
    clips: Sequence[Clip],
    training: Sequence[Piece] | None,
    words: Sequence[str],
    grid: MelGrid,
    seconds: float,
    seed: int,
    tell: Progress,
) -> list[dict[str, Floats]]:
    """Class priors for each clip, from the training pieces or else from the other pieces."""
    if training is None:
        return [_priors([other for other in clips if other.piece != clip.piece], words, grid) for clip in clips]
    held, _ = make_clips(training, words, grid, seconds=seconds, absent=0, seed=seed, progress=tell)
    return [_priors(held, words, grid)] * len(clips)


def _blind_sources(
    measured: Mapping[str, Sequence[ClipMaps]],
    clips: Sequence[Clip],
    grid: MelGrid,
    priors: Sequence[Mapping[str, Floats]],
) -> list[tuple[str, str, int | None, PerClip]]:
    """Mix energy, class prior and their product; and the dominance mask itself through each model's finest lattice."""
    names = ("mix_energy", *PRIORS)
    maps: dict[str, list[Mapping[str, Floats]]] = {name: [] for name in names}
    for clip, prior in zip(clips, priors, strict=True):
        energy = references.mix_energy(clip.mix, clip.sample_rate, grid)
        power = references.mix_energy(clip.mix, clip.sample_rate, grid, scale="power")
        maps["mix_energy"].append(dict.fromkeys(clip.words, energy))
        maps["class_prior"].append({word: prior[word] for word in clip.words})
        maps["prior_mix"].append({word: prior[word] * power for word in clip.words})
    found: list[tuple[str, str, int | None, PerClip]] = [("", name, None, maps[name]) for name in names]
    for label, of in measured.items():
        oracle = [
            {word: references.oracle_projection(mask, one.lattice) for word, mask in clip.targets["dominance"].items()}
            for clip, one in zip(clips, of, strict=True)
        ]
        found.append((label, "oracle_projection", None, oracle))
    return found


def _priors(clips: Sequence[Clip], words: Sequence[str], grid: MelGrid) -> dict[str, Floats]:
    """Mean dominance mask by instrument; the constant map where no clip has it."""
    masks: dict[str, list[ArrayLike]] = defaultdict(list)
    for clip in clips:
        for word, mask in clip.targets["dominance"].items():
            masks[word].append(mask)
    return {word: references.class_prior(masks[word]) if masks[word] else references.uniform(grid) for word in words}


# ---- contrasts


def _partners(clips: Sequence[Clip], seed: int) -> dict[tuple[int, str], list[int]]:
    """For each clip and word, clips of other pieces that have the word: the same for every model, map and level."""
    rng = np.random.default_rng((seed, len(clips)))
    chosen = {}
    for i, clip in enumerate(clips):
        for word in clip.words:
            others = [j for j, other in enumerate(clips) if other.piece != clip.piece and word in other.words]
            chosen[i, word] = sorted(int(j) for j in rng.permutation(others)[:PARTNERS])
    return chosen


def _scorable(target: str, values: NDArray[Any]) -> bool:
    if target == "share":
        return bool(np.ptp(values) > 0)
    return AREAS[0] < float(values.mean()) < AREAS[1]


def _contrasts(
    clips: Sequence[Clip], maps: PerClip, target: str, partners: Mapping[tuple[int, str], Sequence[int]]
) -> list[Row]:
    """One record per clip and word that can be scored, with every measure against the target."""
    against = rank_correlation if target == "share" else average_precision
    found = []
    for i, clip in enumerate(clips):
        for word in clip.words:
            wanted = clip.targets[target][word]
            if not _scorable(target, wanted):
                continue
            own, chance = against(maps[i][word], wanted), 0.0 if target == "share" else float(wanted.mean())
            # means of differences: exactly 0 where the maps that are swapped are one map
            words = [own - against(maps[i][other], wanted) for other in clip.words if other != word]
            pieces = [own - against(maps[j][word], wanted) for j in partners.get((i, word), ())]
            found.append(
                {
                    "piece": clip.piece,
                    "word": word,
                    "score": own,
                    "chance": chance,
                    "above_chance": own - chance,
                    "word_swap": float(np.mean(words)),
                    "piece_swap": float(np.mean(pieces)) if pieces else float("nan"),
                }
            )
    return found


def _classes(clips: Sequence[Clip]) -> dict[str, int]:
    """Pieces in which each word can be scored against its dominance mask."""
    having: dict[str, set[str]] = defaultdict(set)
    for clip in clips:
        for word in clip.words:
            if _scorable("dominance", clip.targets["dominance"][word]):
                having[word].add(clip.piece)
    return {word: len(of) for word, of in sorted(having.items())}


def _per_piece(records: Sequence[Row], measure: str, word: str = "all") -> dict[str, float]:
    """Means within pieces. A record without a value, or a piece without a record, is left out."""
    groups: dict[str, list[float]] = {}
    for row in records:
        if word in ("all", row["word"]) and np.isfinite(row[measure]):
            groups.setdefault(row["piece"], []).append(row[measure])
    return {piece: float(np.mean(of)) for piece, of in groups.items()}


def _rows_of(key: Mapping[str, Any], records: Sequence[Row], classes: Mapping[str, int], draw: _Draw) -> list[Row]:
    rows = []
    for word in ("all", *(name for name, count in classes.items() if count >= MINIMUM_PIECES)):
        per_piece = {measure: _per_piece(records, measure, word) for measure in (*MEASURES, "chance")}
        figures = {measure: _with_interval(values, draw) for measure, values in per_piece.items()}
        if key["target"] != "share":
            figures["ratio"] = _with_ratio(per_piece["score"], per_piece["chance"], draw)
        rows += [{**key, "word": word, "measure": measure, **figure} for measure, figure in figures.items()]
    return rows


def _with_interval(per_piece: Mapping[str, float], draw: _Draw) -> Row:
    values = list(per_piece.values())
    if len(values) < FEWEST:
        return _figure(_mean(values), count=len(values))
    return _figure(*interval(values, **draw), count=len(values))


def _with_ratio(above: Mapping[str, float], below: Mapping[str, float], draw: _Draw) -> Row:
    """Ratio of the means over pieces that have both."""
    both = [piece for piece in above if piece in below]
    one, other = [above[piece] for piece in both], [below[piece] for piece in both]
    if not both or min(other) <= 0:
        return _figure(float("nan"), count=len(both))
    if len(both) < FEWEST:
        return _figure(_mean(one) / _mean(other), count=len(both))
    return _figure(*ratio_of_means(one, other, **draw), count=len(both))


def _figure(value: float, low: float = float("nan"), high: float = float("nan"), *, count: int) -> Row:
    return {"value": value, "low": low, "high": high, "pieces": count}


def _agreement_rows(key: Mapping[str, Any], run: _Run, of: Sequence[ClipMaps], draw: _Draw) -> list[Row]:
    """Spearman of attention with effect, and the same less that of other words' attention."""
    attention, effect = (run.maps(of, kind, key["level"]) for kind in ("attention", "effect"))
    records = []
    for clip, looked, done in zip(run.clips, attention, effect, strict=True):
        for word in clip.words:
            own = rank_correlation(looked[word], done[word])
            others = [rank_correlation(looked[other], done[word]) for other in clip.words if other != word]
            records.append(
                {"piece": clip.piece, "word": word, "agreement": own, "agreement_swap": own - float(np.mean(others))}
            )
    return [
        {**key, "target": "", "word": "all", "measure": m, **_with_interval(_per_piece(records, m), draw)}
        for m in ("agreement", "agreement_swap")
    ]


# ---- presence and neutral edits


@dataclass(frozen=True)
class _Mass:
    """Effect masses of one model at one level in one quantity, clip by clip."""

    pieces: Sequence[str]
    masses: Sequence[Mapping[tuple[str, str], float]]  # (role, label) → mass

    def roles(self, role: str) -> dict[str, float]:
        """Mean mass of a role by piece."""
        groups: dict[str, list[float]] = {}
        for piece, of in zip(self.pieces, self.masses, strict=True):
            groups.setdefault(piece, []).extend(float(value) for (r, _), value in of.items() if r == role)
        return {piece: float(np.mean(values)) for piece, values in groups.items() if values}

    def presence(self) -> dict[str, float]:
        """By piece: how often a present word has more mass than the absent word that takes its place."""
        groups: dict[str, list[float]] = {}
        for piece, of in zip(self.pieces, self.masses, strict=True):
            yes, no = ([value for (r, _), value in of.items() if r == role] for role in ("present", "absent"))
            groups.setdefault(piece, []).extend(_win(yes[k % len(yes)], value) for k, value in enumerate(no))
        return {piece: float(np.mean(values)) for piece, values in groups.items() if values}

    @staticmethod
    def words(of: Mapping[tuple[str, str], float]) -> int:
        return sum(role == "present" for role, _ in of)

    @cached_property
    def between(self) -> tuple[Floats, Floats]:
        """Wins and pairs [piece of the present word, piece of the same word absent]."""
        names = list(dict.fromkeys(self.pieces))
        wins, pairs = np.zeros((2, len(names), len(names)))
        for piece, of in zip(self.pieces, self.masses, strict=True):
            for other, theirs in zip(self.pieces, self.masses, strict=True):
                at = names.index(piece), names.index(other)
                if self.words(of) != self.words(theirs):
                    continue  # an edit of a shorter text does more
                for (role, word), value in of.items():
                    if role == "present" and ("absent", word) in theirs:
                        wins[at] += _win(value, theirs["absent", word])
                        pairs[at] += 1
        used = np.flatnonzero(pairs.any(axis=0) | pairs.any(axis=1))
        return wins[np.ix_(used, used)], pairs[np.ix_(used, used)]

    def presence_by_word(self) -> float:
        """Share of pairs of clips, one with a word and one without, in which the word has more mass in the first."""
        wins, pairs = self.between
        return float(wins.sum() / pairs.sum()) if pairs.any() else float("nan")

    def presence_by_word_row(self, draw: _Draw) -> Row:
        """With its BCa interval over pieces: a pair counts as often as both its pieces are drawn."""
        from scipy.stats import bootstrap

        wins, pairs = self.between
        value, count = self.presence_by_word(), len(wins)
        if count < FEWEST or np.unique(wins[pairs > 0] / pairs[pairs > 0]).size < 2:
            return _figure(value, count=count)

        def share(index: NDArray[np.int_], axis: int = -1) -> Floats:
            index = np.moveaxis(np.asarray(index, int), axis, -1)
            drawn = (index[..., None] == np.arange(count)).sum(axis=-2)
            above = np.einsum("...i,ij,...j->...", drawn, wins, drawn)
            below = np.einsum("...i,ij,...j->...", drawn, pairs, drawn)
            # a draw without a pair says nothing: it stands at the whole sample's value
            return np.where(below > 0, above / np.maximum(below, 1), value)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a degenerate distribution, whose ends are NaN
            found = bootstrap(
                (np.arange(count),),
                share,
                vectorized=True,
                n_resamples=draw["resamples"],
                batch=max(1, (1 << 22) // count**2),
                method="BCa",
                rng=np.random.default_rng(draw["seed"]),
            ).confidence_interval
        return _figure(value, float(found.low), float(found.high), count=count)


def _win(one: float, other: float) -> float:
    return float(one > other) + 0.5 * float(one == other)


def _presence_rows(key: Mapping[str, Any], of: Mapping[Quantity, _Mass], draw: _Draw) -> list[Row]:
    roles = {role: of["log"].roles(role) for role in ("present", "absent", "neutral")}
    found = {f"{role}_mass": _with_interval(masses, draw) for role, masses in roles.items() if masses}
    for measure, quantity in PRESENCES.items():
        if won := of[quantity].presence():
            found[measure] = _with_interval(won, draw)
            found[f"{measure}_by_word"] = of[quantity].presence_by_word_row(draw)
    found["neutral_share"] = _with_ratio(roles["neutral"], roles["present"], draw)
    return [{**key, "target": "", "word": "all", "measure": measure, **figure} for measure, figure in found.items()]


# ---- one model against the other, and against itself untrained


def _tests(
    models: Sequence[str],
    records: Mapping[tuple[str, str, int | None], Sequence[Row]],
    masses: Mapping[tuple[str, int], Mapping[Quantity, _Mass]],
    levels: Sequence[int],
    draw: _Draw,
) -> list[Row]:
    """Paired tests of the first model against the second, against dominance masks and of presence."""
    family: list[tuple[Row, Mapping[str, float], Mapping[str, float]]] = []
    for kind in ("attention", "effect"):
        for level in levels:
            held = [records.get((model, kind, level)) for model in models]
            if held[0] is None or held[1] is None:
                continue
            for measure in TESTED:
                key: Row = {"map": kind, "level": level, "target": "dominance", "measure": measure}
                family.append((key, _per_piece(held[0], measure), _per_piece(held[1], measure)))
            if kind == "effect":
                for measure, quantity in PRESENCES.items():
                    first, second = (masses[model, level][quantity].presence() for model in models)
                    family.append(({"map": kind, "level": level, "target": "", "measure": measure}, first, second))
    tests = []
    for key, one, other in family:
        both = [piece for piece in one if piece in other]
        if len(both) >= FEWEST:
            a, b = np.array([one[p] for p in both]), np.array([other[p] for p in both])
            mean, low, high = interval(a - b, **draw)
            ends = {"difference": mean, "low": low, "high": high}
            tests.append({**key, **ends, "p": paired_permutation(a, b, **draw), "pieces": len(both)})
    for test, corrected in zip(tests, holm([test["p"] for test in tests]) if tests else (), strict=True):
        test["p_holm"] = float(corrected)
    return tests


def _beside_fresh(rows: Sequence[Row], drawn: Mapping[tuple[str, str], Sequence[float]]) -> list[Row]:
    """The figures over all words beside the same figures of fresh initialisations."""
    found = []
    for row in rows:
        values = drawn.get((row["model"], _fresh_key(row["map"], row["level"], row["target"], row["measure"])))
        if values is None or row["word"] != "all":
            continue
        finite = [value for value in values if np.isfinite(value)]
        if not finite or not np.isfinite(row["value"]):
            continue
        # of a neutral edit little is hoped for, of everything else much
        less = row["measure"] == "neutral_share"
        beyond = row["value"] < min(finite) if less else row["value"] > max(finite)
        found.append(
            {
                **{name: row[name] for name in ("model", "map", "level", "target", "measure", "value")},
                "fresh": finite,
                "p": permutation_p(row["value"], finite, alternative="less" if less else "greater"),
                "outside": bool(beyond),
            }
        )
    return found


# ---- reports


def _profiles(model: str, of: Sequence[ClipMaps]) -> list[Row]:
    groups: dict[tuple[int, str], list[Row]] = {}
    for one in of:
        for site in one.sites:
            groups.setdefault((site["level"], site["site"]), []).append(site)
    return [
        {
            "model": model,
            "level": level,
            "site": site,
            "lattice": members[0]["lattice"],
            **{key: _mean([member[key] for member in members]) for key in PROFILE},
        }
        for (level, site), members in groups.items()
    ]


def _notes(
    models: Mapping[str, Loaded],
    measured: Mapping[str, Sequence[ClipMaps]],
    clips: Sequence[Clip],
    skipped: Mapping[str, str],
    classes: Mapping[str, int],
    initialisations: Mapping[str, int],
    draws: int,
) -> list[str]:
    pieces = len({clip.piece for clip in clips})
    notes = [random_weights(label) for label, one in models.items() if one.trained is False]
    for label, of in measured.items():
        without = [one.reason for one in of if one.effect is None]
        if without:
            notes.append(f"{label} has attention maps only: {without[0]}")
        if not of[0].frequency_resolved:
            notes.append(
                f"the attention of {label} has no frequency axis: its maps are constant in frequency, and its oracle_projection "
                "is the time-only one"
            )
    notes.append(f"{pieces} pieces, {len(clips)} clips; the piece is the unit")
    if pieces < FEWEST:
        notes.append(f"fewer than {FEWEST} pieces: no intervals and no tests")
    if skipped:
        few = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        notes.append(f"{len(skipped)} pieces were left out ({few}{'; …' if len(skipped) > 3 else ''})")
    small = [f"{name} {count}" for name, count in classes.items() if count < MINIMUM_PIECES]
    if small:
        notes.append(f"classes of fewer than {MINIMUM_PIECES} pieces are in the means only: {', '.join(small)}")
    if draws < 4:
        notes.append(f"{draws} draws of noise: average at least 4 before reading effect maps")
    fewest = min(initialisations, key=initialisations.__getitem__)
    if initialisations[fewest] < MINIMUM_INITIALISATIONS:
        whose = "" if len(set(initialisations.values())) == 1 else f" of {fewest}"
        notes.append(
            f"{initialisations[fewest] or 'no'} fresh initialisations{whose}: intervals over pieces do not cover how an untrained network leans "
            f"by accident; compare with {MINIMUM_INITIALISATIONS} or more"
        )
    return notes


def _shown(value: float, low: float, high: float) -> str:
    if not np.isfinite(value):
        return ""
    text = f"{value:.3f}" if not np.isfinite(low) else f"{value:.3f} [{low:.3f}, {high:.3f}]"
    return text.replace("-", "−")


def _write(
    folder: OutputFolder,
    result: Comparison,
    clips: Sequence[Clip],
    measured: Mapping[str, Sequence[ClipMaps]],
    grid: MelGrid,
) -> None:
    from aiba_eval import figures

    write_json(folder.file("results.json"), result.as_dict())
    write_csv(folder.file("scores.csv"), result.rows)
    if result.tests:
        write_csv(folder.file("tests.csv"), result.tests)
    tables = [f"# {target}\n\n{result.markdown(target=target)}" for target in TARGETS]
    text = "\n".join([*tables, *(f"- {note}" for note in result.notes)])
    folder.file("table.md").write_text(f"{text}\n", encoding="utf-8")
    shown = max(range(len(clips)), key=lambda i: len(clips[i].words))
    clip, of = clips[shown], {label: maps[shown] for label, maps in measured.items()}
    for number, level in enumerate(result.record["configuration"]["timesteps"]):
        columns = {
            f"{label} {kind}": dict(zip(clip.words, getattr(one, kind)[number], strict=True))
            for kind in ("attention", "effect")
            for label, one in of.items()
            if getattr(one, kind) is not None
        }
        figure = figures.side_by_side_figure(
            grid.spectrogram(clip.mix, clip.sample_rate),
            clip.targets["dominance"],
            columns,
            grid=grid,
            title=f"{clip.piece} at {clip.start:.2f} s, t = {level}: {clip.prompt}",
        )
        figures.save(figure, folder.file(f"figures/maps-{level}.png"))
    contrasts = figures.contrast_figure(result.rows, result.models, result.fresh)
    figures.save(contrasts, folder.file("figures/contrasts.png"))
    figures.save(figures.site_figure(result.profiles, result.models), folder.file("figures/sites.png"))
    folder.finish({key: result.as_dict()[key] for key in ("reinitialisations", "notes", "skipped", "versions")})
