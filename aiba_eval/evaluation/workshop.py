"""The work of an evaluation, one task at a time, in this process or in a worker.

A task is a path below the run's folder: ``training/ID`` and ``validation/ID`` (what priors, profiles and layer weights are made
of), ``CONDITION/ID`` (an item), ``scores/CONDITION/ID``. Its result is one folder or file of that name, so that what is there is
done, whoever did it. A task depends on its seed, on earlier phases, and on nothing else: order and place do not matter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aiba_eval import references, templates
from aiba_eval.datasets import DamagedAudio
from aiba_eval.evaluation import items, scores, weights
from aiba_eval.evaluation.configuration import CannotEvaluate, Configuration
from aiba_eval.evaluation.items import Floats, Row, Unusable
from aiba_eval.evaluation.runs import ITEMS, SCORES, Item, read_items
from aiba_eval.fresh import with_fresh_weights
from aiba_eval.loading import Loaded, load, threads_of
from aiba_eval.outputs import write_json

if TYPE_CHECKING:
    from aiba_eval.datasets import Piece

LAYER_WEIGHTS = "layer-weights.json"
#: phases that are no conditions: nothing of them is scored
TRAINING, VALIDATION = "training", "validation"


@dataclass(frozen=True)
class Source:
    """Where a worker gets the model: by name; a loaded one cannot travel."""

    name: str
    device: str
    dtype: str


@dataclass(eq=False)
class Workshop:
    """Everything that tasks need.

    Attributes
    ----------
    folder : of the run
    configuration : of the run
    model : loaded, or where to load it
    pieces : what is evaluated
    training : pieces of priors and profiles; None takes the others of ``pieces``
    validation : pieces that layer weights are fitted on
    """

    folder: Path
    configuration: Configuration
    model: Loaded | Source
    pieces: Sequence[Piece]
    training: Sequence[Piece] | None = None
    validation: Sequence[Piece] = ()
    _fresh: dict[int, Any] = field(default_factory=dict, init=False, repr=False)
    _items: dict[str, dict[str, Item]] = field(default_factory=dict, init=False, repr=False)
    _averages: dict[int, dict[str, Floats]] = field(default_factory=dict, init=False, repr=False)
    _phase: str = field(default="", init=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """What it is made of, without what it has loaded and read: a model cannot be sent, and workers hand it to each other."""
        return Workshop, tuple(getattr(self, one.name) for one in fields(self) if one.init)

    # ---- the plan

    @cached_property
    def plan(self) -> dict[str, tuple[str, int]]:
        """Item → (piece, window) or (class, seed), in order."""
        if self.configuration.generates:
            words = items.instruments_of(self.configuration, self.pieces)
            return {item_id(word, seed): (word, seed) for seed in self.configuration.seeds for word in words}
        windows = range(self.configuration.windows)
        return {item_id(piece.name, k): (piece.name, k) for piece in self.pieces for k in windows}

    def _held(self, phase: str) -> dict[str, Piece]:
        """Item → piece of ``training`` or ``validation``: one window of each piece."""
        if phase == VALIDATION:
            pieces = self.validation
        else:
            pieces = self.pieces if self.training is None else self.training
        return {item_id(piece.name, 0): piece for piece in pieces}

    def phases(self) -> Iterator[tuple[str, list[str]]]:
        """Phases in order, each with its tasks: a phase needs all of those before it."""
        config = self.configuration
        yield "reading training pieces", [f"{TRAINING}/{name}" for name in self._held(TRAINING)]
        if config.fits:
            yield "fitting layer weights", [f"{VALIDATION}/{name}" for name in self._held(VALIDATION)]
        for condition in config.conditions:
            yield self._what(condition), [f"{condition}/{name}" for name in self.plan]
        scored = [c for c in config.conditions if c not in ("absent", "neutral")]
        yield "scoring", [f"{SCORES}/{condition}/{name}" for condition in scored for name in self.plan]

    def _what(self, condition: str) -> str:
        verb = "generating" if self.configuration.generates else "probing"
        return verb if condition == "own" else f"{verb}: {condition.replace('_', ' ')}"

    def done(self, task: str) -> bool:
        """Whether a task's result is there."""
        return self._path(task).exists()

    def _path(self, task: str) -> Path:
        condition, _, name = task.rpartition("/")
        if condition.startswith(f"{SCORES}/"):
            return self.folder / condition / f"{name}.parquet"
        return self.folder / ITEMS / condition / name

    # ---- the work

    def perform(self, task: str) -> None:
        """Do one task. What is there already is left as it is.

        Raises
        ------
        Exception
            Whatever the model, the dataset or the disk raises.
        """
        if self.done(task):
            return
        path = self._path(task)
        path.parent.mkdir(parents=True, exist_ok=True)
        condition, _, name = task.rpartition("/")
        with threads_of(self.configuration.threads):
            if condition.startswith(f"{SCORES}/"):
                scores.write_scores(path, scores.rows_of(self, condition.removeprefix(f"{SCORES}/"), name))
                return
            try:
                self._make(condition, name, path)
            except (Unusable, DamagedAudio) as error:
                items.write_item(path, {"id": name, "condition": condition, "skipped": str(error)}, None)

    def _make(self, condition: str, name: str, path: Path) -> None:
        if condition == TRAINING:
            self._training(self._held(TRAINING)[name], name, path)
            return
        if condition == VALIDATION:
            self._validation(self._held(VALIDATION)[name], name, path)
            return
        pipeline = self._pipeline(condition)
        if self.configuration.generates:
            self._generate(pipeline, condition, name, path)
            return
        piece_name, window = self.plan[name]
        piece = _named(self.pieces, piece_name)
        given = items.material(piece, window, self.configuration, self.profiles(piece_name))
        head = _head(name, condition, given)
        if condition == "absent":
            items.write_item(path, {**head, "masses": scores.masses(pipeline, given, piece, self)}, None)
        elif condition == "neutral":
            items.write_item(path, {**head, "changes": scores.changes(pipeline, given, piece, self)}, None)
        else:
            self._probe(pipeline, condition, given, head, path)

    def _probe(self, pipeline: Any, condition: str, given: items.Material, head: Row, path: Path) -> None:
        rate, grid = given.section.piece.sample_rate, items.grid_for(self.configuration)
        words: Sequence[str] = given.words
        prompt = given.prompt
        if condition == "prompt_swap":
            words, prompt = self._other_prompt(head["id"], given.words)
        seed = int(condition.removeprefix("seed-")) if condition.startswith("seed-") else None
        captures = items.probed(pipeline, given.mix, rate, prompt, words, self.configuration, seed=seed)
        own = condition == "own"
        projected, reasons = items.variants_of(
            captures, self.configuration, words, grid, self.layer_weights, only_default=not own
        )
        if condition == "prompt_swap":  # the i-th word's map is scored in the place of the own i-th word's
            projected = projected.isel(word=[k % len(words) for k in range(len(given.words))])
            projected = projected.assign_coords(word=list(given.words))
        mix = grid.spectrogram(given.mix, rate)
        arrays = items.fields(projected, given.truth, given.words, mix)
        about = {**head, "prompt": prompt, "excluded": _listed(given.truth.excluded), "without": reasons}
        about["silent"] = list(given.section.silent)
        if not own:
            items.write_item(path, about, arrays)
            return
        maps = captures(("cross", "sum"))
        items.write_item(
            path,
            {**about, "diagnosis": _diagnosis(maps)},
            arrays,
            maps=maps if self.configuration.keep_maps else None,
            audio=given.mix,
            sample_rate=rate,
        )

    def _generate(self, pipeline: Any, condition: str, name: str, path: Path) -> None:
        word, seed = self.plan[name]
        grid = items.grid_for(self.configuration)
        made = items.Generated(pipeline, word, seed, self.configuration)
        captures = made.captures()
        own = condition == "own"
        projected, reasons = items.variants_of(
            captures, self.configuration, [word], grid, self.layer_weights, only_default=not own
        )
        truth = items.band_truth(word, grid, self.profiles(""))
        mix = grid.spectrogram(items.normalise(made.audio), made.sample_rate)
        about = {
            "id": name,
            "condition": condition,
            "piece": f"seed-{seed}",
            "start": 0.0,
            "seconds": float(self.configuration.seconds),
            "prompt": made.prompt,
            "words": [word],
            "excluded": _listed(truth.excluded),
            "without": reasons,
        }
        maps = captures(("cross", "sum"))
        if own:
            about["diagnosis"] = _diagnosis(maps)
        items.write_item(
            path,
            about,
            items.fields(projected, truth, [word], mix),
            maps=maps if own and self.configuration.keep_maps else None,
            audio=made.audio if own else None,
            sample_rate=made.sample_rate,
        )

    def _training(self, piece: Piece, name: str, path: Path) -> None:
        """Masks and power of every instrument of one window."""
        whole = Configuration(**{**vars(self.configuration), "words": None})
        given = items.material(piece, 0, whole)
        grid = items.grid_for(self.configuration)
        mix = grid.spectrogram(given.mix, piece.sample_rate)
        arrays = items.fields(None, given.truth, given.words, mix)
        if given.powers:
            arrays["power"] = (("word", "time", "mel"), np.stack([given.powers[word] for word in given.words]))
        items.write_item(path, _head(name, TRAINING, given), arrays)

    def _validation(self, piece: Piece, name: str, path: Path) -> None:
        """Normal equations of the layer weights."""
        given = items.material(piece, 0, self.configuration)
        rate = piece.sample_rate
        captures = items.probed(self._pipeline("own"), given.mix, rate, given.prompt, given.words, self.configuration)
        equations = weights.equations(
            captures(("cross", "sum")),
            given.truth,
            given.words,
            items.grid_for(self.configuration),
            self.configuration.timesteps,
        )
        items.write_item(path, {**_head(name, VALIDATION, given), "equations": equations}, None)

    def _other_prompt(self, name: str, own: Sequence[str]) -> tuple[tuple[str, ...], str]:
        """Words and prompt of the next piece whose instruments are not the same."""
        order = list(self.plan)
        after = order[order.index(name) + 1 :] + order[: order.index(name)]
        for other in after:
            piece_name, window = self.plan[other]
            if piece_name == self.plan[name][0]:
                continue
            try:
                _, words = items.window_of(_named(self.pieces, piece_name), window, self.configuration)
            except Unusable:
                continue
            if set(words) != set(own):
                return words, items.prompt_of(words)
        raise Unusable("no other piece has other instruments")

    # ---- what tasks share

    @cached_property
    def loaded(self) -> Loaded:
        """The model."""
        if isinstance(self.model, Loaded):
            return self.model
        return load(self.model.name, device=self.model.device, dtype=self.model.dtype)

    def _pipeline(self, condition: str) -> Any:
        if not condition.startswith("fresh-"):
            return self.loaded.pipeline
        number = int(condition.removeprefix("fresh-"))
        if number not in self._fresh:
            self._fresh.clear()  # one at a time in memory
            self._fresh[number] = with_fresh_weights(self.loaded.pipeline, number)
        return self._fresh[number]

    @cached_property
    def _masks(self) -> dict[str, list[tuple[str, NDArray[np.bool_], Floats | None]]]:
        """Word → (piece, dominance mask, power) of the training windows."""
        found: dict[str, list[tuple[str, NDArray[np.bool_], Floats | None]]] = {}
        for item in read_items(self.folder, TRAINING):
            arrays = item.fields.load()
            kinds = [str(kind) for kind in arrays["truth"]["target"].values]
            kind = next((k for k in ("dominance", "band:measured") if k in kinds), None)
            for word in item.words:
                if kind is None:
                    continue
                mask = arrays["truth"].sel(target=kind, word=word).values
                if np.isfinite(mask).all():
                    power = arrays["power"].sel(word=word).values if "power" in arrays else None
                    found.setdefault(word, []).append((item.piece, mask > 0.5, power))
        return found

    def priors(self, piece: str) -> dict[str, Floats]:
        """Class priors from the training windows of other pieces."""
        return self._of_others(references.class_prior, 1, piece)

    def profiles(self, piece: str) -> dict[str, Floats]:
        """Data-driven profiles from the training windows of other pieces."""
        return self._of_others(templates.data_profile, 2, piece)

    def _of_others(self, average: Callable[[list[Any]], Floats], column: int, piece: str) -> dict[str, Floats]:
        """Word → average of a column of ``_masks`` over other pieces; made once for all pieces that no training window is of."""
        among = any(row[0] == piece for rows in self._masks.values() for row in rows)
        if not among and column in self._averages:
            return self._averages[column]
        others = {
            word: [row[column] for row in rows if row[0] != piece and row[column] is not None]
            for word, rows in self._masks.items()
        }
        found = {word: average(some) for word, some in others.items() if some}
        if not among:
            self._averages[column] = found
        return found

    @cached_property
    def layer_weights(self) -> dict[str, float] | None:
        """Site → weight, fitted on the validation windows once all of these are done; None where no variant asks."""
        if not self.configuration.fits:
            return None
        path = self.folder / LAYER_WEIGHTS
        if not path.is_file():
            known = [item.about["equations"] for item in read_items(self.folder, VALIDATION)]
            if not known:
                raise CannotEvaluate(
                    "layer weights are to be fitted, but no validation piece could be used: give a validation split, or leave "
                    "the variants with layer_weights=fitted out"
                )
            write_json(path, weights.fit(known))
        found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def forget(self, phase: str) -> None:
        """Read earlier results anew when another phase begins: more of them may be there."""
        if phase != self._phase:
            self._phase = phase
            self._items.clear()
            self._averages.clear()
            for name in ("_masks", "layer_weights"):
                vars(self).pop(name, None)

    def items(self, condition: str) -> dict[str, Item]:
        """Id → usable item of a condition, in the order of the plan. Only once the condition is done."""
        if condition not in self._items:
            found = {item.id: item for item in read_items(self.folder, condition)}
            self._items[condition] = {name: found[name] for name in self.plan if name in found}
        return self._items[condition]


def item_id(name: str, number: int) -> str:
    """A file name for a piece's window or a class's sample; a digest keeps apart what would look the same."""
    readable = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in name)
    if readable != name:
        readable = f"{readable[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return f"{readable}-{number}"


def _head(name: str, condition: str, given: items.Material) -> Row:
    """What ``item.json`` begins with."""
    return {
        "id": name,
        "condition": condition,
        "piece": given.section.piece.name,
        "start": given.section.start,
        "seconds": given.section.seconds,
        "prompt": given.prompt,
        "words": list(given.words),
    }


def _named(pieces: Sequence[Piece], name: str) -> Piece:
    return next(piece for piece in pieces if piece.name == name)


def _listed(excluded: Mapping[tuple[str, str], str]) -> list[Row]:
    return [{"word": word, "target": kind, "reason": reason} for (word, kind), reason in excluded.items()]


def _diagnosis(maps: Any) -> Row:
    from aiba_eval.diagnostics import diagnose

    return diagnose(maps).as_dict()
