"""Music whose instruments are known apart: readers, and the small set that ships with the package.

>>> from aiba_eval.datasets import freedoom_root, slakh
>>> pieces = slakh.pieces(freedoom_root(), split="test")
>>> piece = pieces[0]
>>> mix = piece.mix(seconds=1.0)  # float32, mono
>>> bass = piece.stem("bass", seconds=1.0)
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from . import slakh
from .pieces import DamagedAudio, Piece, Pieces, Problem, Stem

__all__ = ["DamagedAudio", "Piece", "Pieces", "Problem", "Stem", "freedoom_root", "slakh"]


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
