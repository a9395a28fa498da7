"""What readers share: paths that stay inside, audio that is whole and sounds, metadata, and a piece made of them.

Names in a dataset's metadata come from outside: one that leads out of the piece's folder (an absolute path, "..", a link)
is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from aiba_hooks import UnknownSplit

from .pieces import Note, Piece, Problem, Stem

AUDIO = (".flac", ".wav")
METADATA_BYTES = 1 << 20
#: Peak below which a file is silent: −80 dB of full scale, three times the last bit of 16.
SILENCE = 1e-4
_BLOCK = 1 << 16


def inside(folder: Path, name: str, what: str) -> Path:
    """`folder / name`, refusing whatever leaves the folder.

    Raises
    ------
    ValueError
        Naming the value: an absolute path (POSIX or Windows), a "..", or a link that leads out.
    """
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if "\0" in name or posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise ValueError(f"{what} {name!r} leads out of the piece's folder")
    path = folder / posix
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{what} {name!r} leads out of the piece's folder through a link")
    return path


def find_audio(folder: Path, parent: Path, name: str, what: str = "stem") -> Path | None:
    """The file `parent/name` with one of the suffixes of `AUDIO`, if it is there; `parent` lies in `folder`."""
    for suffix in AUDIO:
        path = inside(folder, f"{parent.relative_to(folder).as_posix()}/{name}{suffix}", what)
        if path.is_file():
            return path
    return None


def folders(base: Path) -> list[Path]:
    """Folders in `base`, sorted by name; those whose name begins with a dot are left out."""
    return sorted(path for path in base.iterdir() if path.is_dir() and not path.name.startswith("."))


def check_split(split: str | None, known: Sequence[str], where: Path) -> None:
    """Refuse a split that the dataset does not have, naming those it has.

    Raises
    ------
    UnknownSplit
    """
    if split is not None and split not in known:
        raise UnknownSplit(where, split, known)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping, read without building objects.

    Raises
    ------
    ValueError
        If it is missing, too large, no YAML, or holds anything else.
    """
    import yaml

    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    if path.stat().st_size > METADATA_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, over the limit of {METADATA_BYTES}")
    try:
        metadata = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"{path.name} holds a {type(metadata).__name__}, not a mapping")
    return metadata


def header(path: Path) -> tuple[int, int]:
    """(sample rate, frames), after decoding the last sample: a file that was cut off still has a whole header.

    Raises
    ------
    ValueError
        If the file cannot be decoded, is empty or was cut off.
    """
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            rate, frames = file.samplerate, file.frames
            file.seek(max(0, frames - 1))
            whole = frames > 0 and len(file.read(1)) == 1
    except (soundfile.SoundFileError, OSError) as error:
        raise ValueError(f"{path.name} cannot be decoded: {error}") from error
    if not whole or _shorter_than_it_says(path):
        raise ValueError(f"{path.name} is empty or cut off")
    return rate, frames


def _shorter_than_it_says(path: Path) -> bool:
    """Whether a RIFF file ends before the end that its header states: libsndfile reads what is left without a word."""
    with path.open("rb") as file:
        start = file.read(8)
    stated = int.from_bytes(start[4:], "little")
    # 0 and 2³² − 1 are written by programs that do not know the length beforehand
    return start[:4] == b"RIFF" and 0 < stated < (1 << 32) - 1 and path.stat().st_size < stated + 8


def is_silent(path: Path) -> bool:
    """Whether no sample exceeds `SILENCE`. Reads up to the first that does.

    Raises
    ------
    ValueError
        If the file cannot be decoded up to there.
    """
    import soundfile

    try:
        return not any(
            np.abs(block).max(initial=0) > SILENCE for block in soundfile.blocks(path, _BLOCK, dtype="float32")
        )
    except (soundfile.SoundFileError, OSError) as error:
        raise ValueError(f"{path.name} cannot be decoded: {error}") from error


def assemble(
    folder: Path,
    *,
    name: str,
    split: str | None,
    mix_path: Path | None,
    stems: Iterable[Stem],
    licence: str,
    source: str,
    notes: Sequence[Note] = (),
    caveats: Sequence[str] = (),
    problems: Sequence[Problem] = (),
    partial: bool = False,
) -> tuple[Piece | None, list[Problem]]:
    """A piece of files that were looked at, and what is wrong with it.

    A stem that cannot be read falsifies the masks of all others, because they are shares of the sum: the piece is left
    out, unless `partial`. A stem that is silent throughout falsifies nothing: it is left out and reported, the piece
    stays.

    Parameters
    ----------
    folder
        Named in reports.
    mix_path
        None if the stems' sum is the mix.
    stems
        Stems whose files exist, and were not looked into.
    problems
        Found by the reader before: each counts as a stem that cannot be read.

    Returns
    -------
    (Piece or None, list of Problem)
    """
    broken, silent = list(problems), []
    good: list[Stem] = []
    rate: int | None = None
    length = 0
    try:
        if mix_path is not None:
            rate, length = header(mix_path)
            if is_silent(mix_path):
                raise ValueError(f"{mix_path.name} is silent")
    except ValueError as error:
        return None, [*broken, Problem(folder, str(error))]
    for stem in stems:
        try:
            own_rate, frames = header(stem.path)
            if rate is None:
                rate = own_rate
            if own_rate != rate:
                other = "its mix" if mix_path is not None else "the others"
                raise ValueError(f"stem {stem.name!r} has {own_rate} Hz, {other} {rate} Hz")
            if is_silent(stem.path):
                silent.append(Problem(folder, f"stem {stem.name!r} ({stem.instrument}) is silent"))
                continue
        except ValueError as error:
            broken.append(Problem(folder, str(error)))
            continue
        if mix_path is None:
            length = max(length, frames)
        good.append(stem)
    if not good and not notes:
        return None, [*broken, *silent, Problem(folder, "none of its stems can be used")]
    if rate is None or (broken and not partial):
        return None, [*broken, *silent]
    piece = Piece(
        name=name,
        split=split,
        path=folder,
        mix_path=mix_path,
        sample_rate=rate,
        seconds=length / rate,
        licence=licence,
        source=source,
        stems=tuple(sorted(good, key=lambda stem: stem.name)),
        notes=tuple(sorted(notes, key=lambda note: note.start)),
        caveats=tuple(caveats),
    )
    return piece, [*broken, *silent]
