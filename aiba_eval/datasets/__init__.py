"""Music whose instruments are known apart: readers, and the small set that ships with the package.

>>> from aiba_eval.datasets import freedoom_root, slakh
>>> pieces = slakh.pieces(freedoom_root(), split="test")
>>> piece = pieces[0]
>>> mix = piece.mix(seconds=1.0)  # float32, mono
>>> bass = piece.stem("bass", seconds=1.0)

Datasets are plugins (`aiba_datasets`): `available` lists them, `open_dataset` opens one by its name. Each of ours is also a
module of this package with a function `pieces` and options of its own.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import medleydb, musdb18, musicnet, slakh, stem_folder
from .pieces import DamagedAudio, Note, Piece, Pieces, Problem, Stem
from .sections import Section, excluded, sections

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiba_hooks import Dataset

__all__ = [
    "DamagedAudio",
    "Note",
    "Piece",
    "Pieces",
    "Problem",
    "Section",
    "Stem",
    "available",
    "excluded",
    "freedoom_root",
    "medleydb",
    "musdb18",
    "musicnet",
    "open_dataset",
    "sections",
    "slakh",
    "stem_folder",
]


def available() -> dict[str, Dataset]:
    """Every dataset that a plugin offers, by name; of two of one name that registered later."""
    from aiba_hooks.plugins import manager

    found: dict[str, Dataset] = {}
    for dataset in manager().collect("aiba_datasets"):  # latest plugin first
        found.setdefault(dataset.name, dataset)
    return found


def open_dataset(name: str, root: str | Path, *, split: str | None = None, **options: Any) -> Sequence[Piece]:
    """Open a copy of a dataset by the dataset's name.

    Parameters
    ----------
    name
        One of `available()`.
    root
        The folder of your copy.
    split
        A split that it has; None for all pieces.
    **options
        The reader's own, such as `bleed=True` of `medleydb`.

    Returns
    -------
    sequence of Piece
        With an attribute `skipped`: what was left out, and why.

    Raises
    ------
    ValueError
        If there is no such dataset or split; the message lists those there are.
    FileNotFoundError
        If `root` does not hold that dataset.
    """
    known = available()
    if name not in known:
        raise ValueError(f"no dataset {name!r}; known: {', '.join(sorted(known))}")
    return known[name].open(Path(root), split=split, **options)


def freedoom_root() -> Path:
    """Folder of the stem set that ships with the package; `slakh.pieces` reads it.

    Excerpts of 10.24 s from Freedoom's music, 16 kHz mono FLAC, in Slakh's layout. Its `NOTICE` holds the licences.

    Raises
    ------
    FileNotFoundError
        If the package was installed without its data, or into an archive that cannot be read as files.
    """
    root = Path(str(resources.files(__name__) / "freedoom"))
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: install AIBA unzipped and with its package data")
    return root
