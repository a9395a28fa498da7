"""Reader of a plain folder of stems: your own recordings, or any dataset brought into this layout.

    [<split>/]<piece>/{bass,drums,electric guitar,…}.wav, [mix.wav or mixture.wav]

A file's name is its instrument: `_` and `-` are blanks, case and a number at the end do not matter (`Guitar_2.wav` is a
second guitar). Without a mix, the sum of the stems is the mix. WAV or FLAC; all files of a piece at one sample rate. Folders
that hold pieces are splits, whatever their names.
"""

from __future__ import annotations

import re
from pathlib import Path

from aiba_hooks.datasets import Dataset
from aiba_hooks.specs import hookimpl

from .files import AUDIO, assemble, check_split, folders, inside
from .pieces import Piece, Pieces, Problem, Stem

MIXES = ("mix", "mixture")


def instrument(name: str) -> str:
    """The word that a file's name without its suffix stands for.

    >>> instrument("Electric-Guitar_02"), instrument("bass")
    ('electric guitar', 'bass')
    """
    words = re.sub(r"[\s_-]+", " ", name).strip().lower()
    return re.sub(r" ?\d+$", "", words) or words


def splits(root: str | Path) -> tuple[str, ...]:
    """Names of the folders that hold pieces; empty where pieces lie at the root."""
    return tuple(name for name in _groups(Path(root)) if name is not None)


def pieces(root: str | Path, split: str | None = None, *, partial: bool = False) -> Pieces:
    """Find the pieces.

    Parameters
    ----------
    root
        The folder of pieces, or of splits with pieces.
    split
        One of `splits(root)`; None reads them all.
    partial
        Keep a piece although one of its stems is damaged. Masks of the others are wrong then.

    Returns
    -------
    Pieces
        Sorted by split and name; `skipped` tells what was left out.

    Raises
    ------
    FileNotFoundError
        If there is no folder with audio files one or two levels below `root`.
    ValueError
        If there is no such split.
    """
    base = Path(root)
    groups = _groups(base)
    check_split(split, [name for name in groups if name is not None], base)
    chosen = {name: some for name, some in groups.items() if split in (None, name)}
    return Pieces.gathered(_piece(folder, name, partial) for name, some in chosen.items() for folder in some)


@hookimpl
def aiba_datasets() -> list[Dataset]:
    return [
        Dataset(
            name="stem-folder",
            summary="a folder per piece with one audio file per instrument, named after it, and optionally mix.wav",
            licence="yours",
            open=pieces,
        )
    ]


def _audio_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in AUDIO and not path.name.startswith("."))


def _groups(root: Path) -> dict[str | None, list[Path]]:
    """Pieces by split; None for those that lie at the root."""
    groups: dict[str | None, list[Path]] = {}
    for folder in folders(root) if root.is_dir() else []:
        if _audio_files(folder):
            groups.setdefault(None, []).append(folder)
        elif below := [piece for piece in folders(folder) if _audio_files(piece)]:
            groups[folder.name] = below
    if not groups:
        raise FileNotFoundError(
            f"no pieces under {root}: expected <piece>/<instrument>.wav, or <split>/<piece>/… there"
        )
    return groups


def _piece(folder: Path, split: str | None, partial: bool) -> tuple[Piece | None, list[Problem]]:
    mixes: list[Path] = []
    stems: list[Stem] = []
    problems: list[Problem] = []
    for path in _audio_files(folder):
        try:
            inside(folder, path.name, "file")
        except ValueError as error:
            problems.append(Problem(folder, str(error)))
            continue
        if path.stem.lower() in MIXES:
            mixes.append(path)
        else:
            word = instrument(path.stem)
            stems.append(Stem(path.name, word, path.stem, None, word == "drums", path, None))
    if len(mixes) > 1:
        return None, [Problem(folder, f"{' and '.join(path.name for path in mixes)}: which is the mix?")]
    return assemble(
        folder,
        name=folder.name,
        split=split,
        mix_path=mixes[0] if mixes else None,
        stems=stems,
        licence="unknown",
        source="unknown",
        problems=problems,
        partial=partial,
    )
