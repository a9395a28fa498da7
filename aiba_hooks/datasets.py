"""Dataset: a kind of dataset that can be named on the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal


class UnknownSplit(ValueError):
    """A dataset has no such split; the message names those that it has.

    Attributes
    ----------
    known : the splits that it has, empty for a dataset without splits
    """

    def __init__(self, where: object, split: str, known: Sequence[str]) -> None:
        super().__init__(where, split, known)  # all of them, so that it can be pickled
        self.known = tuple(known)

    def __str__(self) -> str:
        where, split, _ = self.args
        return f"{where} has no split {split!r}; it has {', '.join(self.known) or 'no splits'}"


@dataclass(frozen=True)
class Dataset:
    """How one kind of dataset is read from the user's own copy. Nothing is downloaded.

    Attributes
    ----------
    name : what commands and configurations call it (``"musdb18"``)
    summary : one line: what it reads, in which layout
    licence : one line on the terms of the music, for whoever publishes results or examples
    open : ``open(root, split=None)`` gives the pieces in a folder: a sequence of ``aiba_eval.datasets.Piece`` with an
        attribute ``skipped`` that says what was left out and why. ``split`` is one that the dataset has, or None for all;
        an unknown one raises :class:`UnknownSplit`, a wrong folder ``FileNotFoundError``
    truth : what says where an instrument is: ``"stems"`` (its own audio, so that every mask can be made) or ``"notes"``
        (when it plays: knowledge bands and activity only)
    """

    name: str
    summary: str
    licence: str
    open: Callable[..., Sequence[Any]]
    truth: Literal["stems", "notes"] = "stems"
