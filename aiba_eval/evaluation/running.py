"""Run an evaluation: plan, do what is not done, count what failed, sum up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiba_eval.evaluation import scores
from aiba_eval.evaluation.configuration import CannotEvaluate, Configuration
from aiba_eval.evaluation.executing import DiskFull, Executor, here, on_dask
from aiba_eval.evaluation.runs import ITEMS, RESULTS, SCORES, SUMMARY, Run, read_about, read_items
from aiba_eval.evaluation.summary import summary_of
from aiba_eval.evaluation.workshop import LAYER_WEIGHTS, TRAINING, Source, Workshop
from aiba_eval.loading import Loaded, weights_digest
from aiba_eval.outputs import OutputFolder, write_json
from aiba_eval.run import Progress, as_loaded, quiet, random_weights, versions
from aiba_eval.scoring import MINIMUM_PIECES
from aiba_hooks import UnknownSplit

if TYPE_CHECKING:
    from aiba_eval.datasets import Piece

Row = dict[str, Any]


def evaluate(
    model: str | Loaded | Any,
    pieces: Sequence[Piece],
    configuration: Configuration | None = None,
    *,
    training: Sequence[Piece] | None = None,
    validation: Sequence[Piece] = (),
    out: str | Path = "aiba-evaluation",
    overwrite: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    dask: str | None = None,
    dataset: str = "",
    progress: Progress | None = None,
) -> Run:
    """Evaluate a model's attention, every score beside its references; goes on where it was stopped.

    Parameters
    ----------
    model : str, Loaded or pipeline
        As in :func:`aiba_eval.run.run`; a name or folder where ``dask`` is given.
    pieces : sequence of Piece
        Held out from what the model was trained on. In the protocol ``generate`` they name the classes.
    configuration : Configuration, optional
    training : sequence of Piece, optional
        For class priors and profiles. Default: for each piece, the others.
    validation : sequence of Piece
        For layer weights, where a variant asks for these.
    out : path
        The run's folder. What is finished there under the same configuration, weights and versions is kept.
    overwrite : bool
        Begin anew in the folder of another evaluation.
    device, dtype, progress
        As in :func:`aiba_eval.run.run`.
    dask : str, optional
        ``"local:N"`` or a scheduler's address: spread items over workers.
    dataset : str
        What the pieces are called, for the record.

    Returns
    -------
    Run

    Raises
    ------
    CannotEvaluate
        Nothing could be evaluated, or the request does not fit.
    DiskFull
        There is no room; what is finished is kept.
    CannotLoad, aiba_eval.outputs.FolderInUse
        As in :func:`aiba_eval.run.run`.
    """
    config = Configuration() if configuration is None else configuration
    tell = progress or quiet
    _check(config, pieces, validation)
    loaded = as_loaded(model, device=device, dtype=dtype, progress=tell)
    record: Row = {
        "model": {
            "name": loaded.name,
            "pipeline": type(loaded.pipeline).__name__,
            "weights": weights_digest(loaded.pipeline),
            "device": loaded.device.partition(":")[0],
            "dtype": loaded.dtype,
        },
        **config.as_dict(),
        "pieces": [piece.identity for piece in pieces],
        "training": None if training is None else [piece.identity for piece in training],
        "validation": [piece.identity for piece in validation] if config.fits else [],
        "versions": versions(),
    }
    folder = OutputFolder(out, "evaluate", overwrite=overwrite, configuration=record)
    source: Loaded | Source = loaded
    if dask is not None and loaded.origin != "given":
        source = Source(loaded.name, loaded.device, loaded.dtype)
    workshop = Workshop(
        folder.path, config, source, list(pieces), None if training is None else list(training), list(validation)
    )
    if source is loaded:
        workshop.loaded = loaded
    for name in (ITEMS, SCORES, RESULTS, SUMMARY, *([LAYER_WEIGHTS] if config.fits else [])):
        folder.file(name)
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        execute = here(workshop) if dask is None else stack.enter_context(on_dask(workshop, dask))
        for what, tasks in workshop.phases():
            if tasks and tasks[0].startswith(f"{SCORES}/"):
                _forget_stale_scores(workshop)
            failed |= _phase(workshop, execute, what, tasks, tell)
    tell("summing up", 0, None)
    skipped = _skipped(folder.path, workshop)
    if not workshop.items("own"):
        reason = next(iter({**failed, **skipped}.values()), "there are no pieces")
        raise CannotEvaluate(
            f"nothing could be evaluated: {reason}" + (f" ({len(failed)} tasks failed)" if failed else "")
        )
    table = _results(workshop)
    write_json(folder.file(SUMMARY), summary_of(workshop, table))
    folder.finish(
        {
            "conditions": list(config.conditions),
            "dataset": dataset,
            "trained": loaded.trained,
            "failed": failed,
            "skipped": skipped,
            "excluded": _excluded(workshop),
            "notes": _notes(config, loaded, workshop, failed, skipped),
        }
    )
    return Run.open(folder.path)


def evaluate_on(
    model: str | Loaded | Any,
    configuration: Configuration | None = None,
    *,
    dataset: str = "slakh",
    root: str | Path | None = None,
    split: str = "test",
    training: str | None = "train",
    validation: str | None = "validation",
    max_pieces: int | None = None,
    **options: Any,
) -> Run:
    """:func:`evaluate` on a dataset: what ``aiba evaluate`` does.

    Parameters
    ----------
    model, configuration
        As in :func:`evaluate`.
    dataset : str
        A dataset's name; see ``aiba plugins``.
    root : path, optional
        Folder of your copy; default the set that ships with the package.
    split, training, validation : str
        Splits to evaluate, for priors, and for layer weights. A dataset without splits is taken whole; a missing training or validation
        split is none.
    max_pieces : int, optional
        So many pieces at most of each split, the first by name.
    options
        Of :func:`evaluate`.

    Raises
    ------
    CannotEvaluate
        There is no such dataset, folder or split, or as :func:`evaluate`.
    """
    from aiba_eval.datasets import freedoom_root, open_dataset

    where = freedoom_root() if root is None else Path(root)

    def read(name: str | None) -> Any:
        try:
            return open_dataset(dataset, where, split=name)
        except UnknownSplit:
            raise
        except (FileNotFoundError, ValueError) as error:
            raise CannotEvaluate(str(error)) from error

    try:
        pieces = read(split)
    except UnknownSplit as error:
        if error.known or split != "test":  # the default
            raise CannotEvaluate(str(error)) from error
        pieces = read(None)
    further: dict[str, Any] = {"training": None, "validation": ()}
    for kind, name in (("training", training), ("validation", validation)):
        if name is None or name == split:
            continue
        try:
            found = read(name)
        except UnknownSplit:
            continue
        if len(found):
            further[kind] = list(found)[:max_pieces]
    return evaluate(model, list(pieces)[:max_pieces], configuration, dataset=dataset, **further, **options)


def _check(config: Configuration, pieces: Sequence[Piece], validation: Sequence[Piece]) -> None:
    names = [piece.name for piece in pieces]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise CannotEvaluate(f"two pieces are called {twice!r}: give pieces of one split or dataset")
    if not pieces and not (config.generates and config.words):
        raise CannotEvaluate("there are no pieces to evaluate: check the dataset's folder and its split")
    if config.fits and (config.generates or not validation):
        raise CannotEvaluate(
            "a variant has layer_weights=fitted, which needs the protocol 'probe' and validation pieces: give a validation split, or "
            "leave that variant out"
        )


def _phase(workshop: Workshop, execute: Executor, what: str, tasks: Sequence[str], tell: Progress) -> dict[str, str]:
    """Do the tasks that are not done; task → why it failed."""
    waiting = [task for task in tasks if not workshop.done(task)]
    done, failed = len(tasks) - len(waiting), {}
    tell(what, done, len(tasks))
    for outcome in execute(waiting):
        if outcome.full:
            raise DiskFull(
                f"no room left in {workshop.folder} ({outcome.error}): {done} of {len(tasks)} tasks of {what!r} are kept. Free some "
                f"space ({_free(workshop.folder)} left) and give the same command again: it goes on there"
            )
        if outcome.error:
            failed[outcome.task] = outcome.error
        done += 1
        tell(what, done, len(tasks))
    workshop.forget(f"after {what}")
    return failed


def _forget_stale_scores(workshop: Workshop) -> None:
    """Scores depend on which other items there are: remove those of an attempt in which some had failed."""
    for condition in workshop.configuration.conditions:
        basis = sorted(
            [*workshop.items(condition), *(f"{TRAINING}/{item.id}" for item in read_items(workshop.folder, TRAINING))]
        )
        known = workshop.folder / SCORES / condition / "basis.json"
        if known.is_file() and json.loads(known.read_text(encoding="utf-8")) == basis:
            continue
        shutil.rmtree(known.parent, ignore_errors=True)
        known.parent.mkdir(parents=True)
        write_json(known, basis)


def _free(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB"


def _results(workshop: Workshop) -> Any:
    """All scores in the order of the plan, as one Parquet file."""
    import pandas

    parts = []
    for condition in workshop.configuration.conditions:
        for name in workshop.plan:
            path = workshop.folder / SCORES / condition / f"{name}.parquet"
            if path.is_file():
                parts.append(pandas.read_parquet(path))
    whole = pandas.concat([part for part in parts if len(part)] or [scores.frame([])], ignore_index=True)
    partial = workshop.folder / f".{RESULTS}.partial"
    whole.to_parquet(partial, index=False)
    partial.replace(workshop.folder / RESULTS)
    return whole


def _skipped(folder: Path, workshop: Workshop) -> dict[str, str]:
    """Task → why nothing of it could be used."""
    found = {}
    for path in sorted((folder / ITEMS).glob("*/*/item.json")):
        about = read_about(path.parent)
        if "skipped" in about and path.parent.parent.name != TRAINING:
            found[f"{about['condition']}/{about['id']}"] = str(about["skipped"])
    return found


def _excluded(workshop: Workshop) -> list[Row]:
    """How many items lack a target of a word, and why: to be said beside every mean."""
    counts: dict[tuple[str, str, str], int] = {}
    for item in workshop.items("own").values():
        for one in item.about.get("excluded", []):
            key = (one["target"], one["word"], one["reason"])
            counts[key] = counts.get(key, 0) + 1
        for word in item.about.get("silent", []):
            key = ("all", word, "the instrument is silent in the window")
            counts[key] = counts.get(key, 0) + 1
    return [{"target": t, "word": w, "reason": r, "items": count} for (t, w, r), count in sorted(counts.items())]


def _notes(
    config: Configuration, loaded: Loaded, workshop: Workshop, failed: Mapping[str, str], skipped: Mapping[str, str]
) -> list[str]:
    known = workshop.items("own")
    units = len({item.piece for item in known.values()})
    unit = "seeds" if config.generates else "pieces"
    notes = [random_weights(loaded.name)] if loaded.trained is False else []
    notes.append(f"{len(known)} items of {units} {unit}; the {unit[:-1]} is the unit")
    first = next(iter(known.values()))
    if not first.fields.attrs.get("frequency_resolved", True):
        notes.append(
            "the attention has no frequency axis: its maps are constant in frequency, and the oracle is the time-only one"
        )
    if units < MINIMUM_PIECES:
        notes.append(f"fewer than {MINIMUM_PIECES} {unit}: no intervals and no tests")
    if config.windows > 1:
        notes.append("contrasts are of the first window of a piece that has the word")
    without = {name: reason for item in known.values() for name, reason in item.about.get("without", {}).items()}
    notes += [f"variant {name!r} has no maps: {reason}" for name, reason in without.items()]
    if failed:
        notes.append(
            f"{len(failed)} tasks failed and are tried again by the same command: {next(iter(failed.values()))}"
        )
    if skipped:
        notes.append(f"{len(skipped)} items were left out: {next(iter(skipped.values()))}")
    return notes
