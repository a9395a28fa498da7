"""The folder of an evaluation: what is in it, and how it is read.

RUN/evaluate.json            configuration, versions, digest of the weights, what failed, what was left out and why
RUN/items/CONDITION/ID/      one item, written elsewhere and renamed: it is whole or it is not there
    item.json                piece, window, prompt, words, diagnosis
    fields.zarr              maps on the grid, what they are scored against, log-mel of the audio
    maps.zarr                every site's maps (the condition ``own``, unless they were not to be kept)
    audio.flac               the mix or the generated audio, 16 bit (``own``)
RUN/scores/CONDITION/ID.parquet
RUN/results.parquet          all scores in order
RUN/summary.json             means over pieces with intervals beside their references, contrasts, controls
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas
    import xarray

    from aiba_hooks import AttentionMaps

Row = dict[str, Any]

MANIFEST = "evaluate.json"
ITEMS, SCORES = "items", "scores"
RESULTS, SUMMARY = "results.parquet", "summary.json"


class NotARun(ValueError):
    """A folder that no evaluation has written. The message names it."""


@dataclass(frozen=True)
class Item:
    """One item of a run: a window of a piece, or a generated sample.

    Attributes
    ----------
    id : its name; a file name
    condition : ``"own"``, or the control under which it was measured
    piece : unit of the statistics: the piece, or the seed
    start, seconds : the window
    prompt : what the model was given
    words : instruments that have maps
    path : its folder
    about : all that ``item.json`` holds
    """

    id: str
    condition: str
    piece: str
    start: float
    seconds: float
    prompt: str
    words: tuple[str, ...]
    path: Path
    about: Row

    @classmethod
    def read(cls, path: Path) -> Item:
        """Of its folder."""
        about = read_about(path)
        named = {name: about[name] for name in ("id", "condition", "piece", "start", "seconds", "prompt")}
        return cls(**named, words=tuple(about["words"]), path=path, about=about)

    @property
    def fields(self) -> xarray.Dataset:
        """``projected`` (variant, level, word, time, mel), ``truth`` (target, word, time, mel) and ``mix`` (time, mel, natural-log
        mel); coordinates in seconds and hertz. NaN where there is no such map or target."""
        import xarray

        found = xarray.open_zarr(self.path / "fields.zarr", consolidated=False, chunks=None)
        labels = {name: value for name, value in found.attrs.items() if name.startswith("labels:")}
        found = found.assign_coords({name.removeprefix("labels:"): value for name, value in labels.items()})
        return found.assign_attrs({name: value for name, value in found.attrs.items() if name not in labels})

    @property
    def maps(self) -> AttentionMaps | None:
        """Every site's maps at every step, or None if they were not kept."""
        from aiba_hooks import AttentionMaps

        path = self.path / "maps.zarr"
        return AttentionMaps.load(path) if path.exists() else None

    @property
    def audio(self) -> tuple[NDArray[np.float32], int]:
        """(samples, sample rate) of the mix or the generated audio.

        Raises
        ------
        FileNotFoundError
            The item has none: it belongs to a control.
        """
        import soundfile

        path = self.path / "audio.flac"
        if not path.is_file():
            raise FileNotFoundError(f"{self.condition}/{self.id} has no audio: only items of the condition 'own' have")
        samples, rate = soundfile.read(path, dtype="float32")
        return samples, int(rate)

    @property
    def diagnosis(self) -> Row:
        """What :func:`aiba_eval.diagnose` found in its maps; empty under a control."""
        return dict(self.about.get("diagnosis") or {})


@dataclass(frozen=True)
class Run:
    """The folder of an evaluation.

    Attributes
    ----------
    path : the folder
    record : its manifest
    """

    path: Path
    record: Row

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open a run, complete or not.

        Raises
        ------
        NotARun
            No evaluation has written there.
        """
        folder = Path(path).expanduser()
        try:
            record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise NotARun(f"{folder} has no {MANIFEST}: give a folder that `aiba evaluate` wrote") from None
        except (OSError, ValueError) as error:
            raise NotARun(f"{folder / MANIFEST} cannot be read ({error}): run `aiba evaluate` there again") from error
        if not isinstance(record, dict) or record.get("aiba") != "evaluate":
            raise NotARun(f"{folder / MANIFEST} is no manifest of `aiba evaluate`")
        return cls(folder, record)

    @property
    def configuration(self) -> Row:
        """What was asked for."""
        return dict(self.record.get("configuration", {}))

    @property
    def complete(self) -> bool:
        """Whether it came to its end."""
        return bool(self.record.get("complete"))

    @cached_property
    def items(self) -> list[Item]:
        """Finished items of the condition ``own``, in order."""
        return list(self.items_of("own"))

    def item(self, name: str) -> Item:
        """One of :attr:`items` by its id.

        Raises
        ------
        KeyError
            There is none of that name.
        """
        for item in self.items:
            if item.id == name:
                return item
        raise KeyError(f"no item {name!r}; there are {', '.join(item.id for item in self.items[:5])}, …")

    def items_of(self, condition: str) -> Iterator[Item]:
        """Finished items under a condition, in order of their ids."""
        yield from read_items(self.path, condition)

    def scores(self) -> pandas.DataFrame:
        """One row per condition, item, variant, level, target, word and metric, with a column per reference.

        Raises
        ------
        NotARun
            The run has not come so far.
        """
        import pandas

        self._needs(RESULTS)
        return pandas.read_parquet(self.path / RESULTS)

    def summary(self) -> list[Row]:
        """Means over pieces: :func:`aiba_eval.scoring.summarise` by variant, level, target, word and metric."""
        return self._summary["summary"]

    def contrasts(self) -> list[Row]:
        """Word swap and piece swap of the default variant and of every reference: ``map``, ``level``, ``target``, ``contrast``,
        ``word``, ``value``, ``low``, ``high``, ``p``, ``n``."""
        return self._summary["contrasts"]

    def controls(self) -> list[Row]:
        """:class:`aiba_eval.controls.Control` by ``measure`` and ``level``."""
        return self._summary["controls"]

    @cached_property
    def _summary(self) -> Row:
        self._needs(SUMMARY)
        found = json.loads((self.path / SUMMARY).read_text(encoding="utf-8"))
        # JSON has no NaN
        return {
            name: [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]
            for name, rows in found.items()
        }

    def _needs(self, name: str) -> None:
        if not (self.path / name).is_file():
            raise NotARun(
                f"{self.path} has no {name} yet: the evaluation is not complete. Run `aiba evaluate` there again"
            )


def read_items(folder: Path, condition: str) -> list[Item]:
    """Finished items under a condition, by id; what could not be used is left out."""
    found = []
    for path in sorted((folder / ITEMS / condition).glob("*/item.json")):
        # a name with a dot is being written
        if not path.parent.name.startswith(".") and "skipped" not in read_about(path.parent):
            found.append(Item.read(path.parent))
    return found


def read_about(path: Path) -> Row:
    """``item.json`` in an item's folder."""
    found: Row = json.loads((path / "item.json").read_text(encoding="utf-8"))
    return found
