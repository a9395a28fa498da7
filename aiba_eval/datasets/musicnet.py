"""Reader of MusicNet: recorded chamber music with every note labelled, and no stems.

    musicnet/{train,test}_data/<id>.wav, {train,test}_labels/<id>.csv, [musicnet_metadata.csv]

It tells *when* an instrument plays and at which pitch, not what it sounds like. So it serves knowledge bands limited to the
times of activity (`templates.active_band_mask`) and temporal metrics; dominance and energy masks and soft shares need
stems. `Piece.stem` refuses, `Piece.sounding` and `Piece.notes` answer.

Labels are samples at 44.1 kHz, instruments General MIDI programs counted from 1. They were aligned by dynamic time warping:
about 4 % of notes are wrong by the authors' estimate, and onsets are off by tens of milliseconds, too much for onset metrics.

References
----------
Thickstun et al., "Learning Features of Music from Scratch", ICLR 2017.
"""

from __future__ import annotations

import csv
from pathlib import Path

from aiba_hooks.datasets import Dataset
from aiba_hooks.specs import hookimpl

from . import slakh
from .files import assemble, check_split, header
from .pieces import Note, Piece, Pieces, Problem

FOLDERS = ("musicnet",)
SPLITS = ("train", "test")
LABEL_RATE = 44_100
#: Labels may end this much after the audio, in seconds, before a recording counts as cut off.
SLACK = 1.0
_COLUMNS = ("start_time", "end_time", "instrument", "note")


def splits(root: str | Path) -> tuple[str, ...]:
    """`train` and `test`, as far as they are there."""
    base = _base(Path(root))
    return tuple(split for split in SPLITS if (base / f"{split}_data").is_dir())


def pieces(root: str | Path, split: str | None = None) -> Pieces:
    """Find the recordings.

    Parameters
    ----------
    root
        The folder with `train_data` and `train_labels`, or the folder that holds it.
    split
        One of `splits(root)`; None reads them all.

    Returns
    -------
    Pieces
        Sorted by split and number, with `notes` and without `stems`; `skipped` tells what was left out.

    Raises
    ------
    FileNotFoundError
        If there is no such layout under `root`.
    ValueError
        If there is no such split.
    """
    base = _base(Path(root))
    check_split(split, splits(base), base)
    found: list[Piece] = []
    skipped: list[Problem] = []
    sources = _sources(base, skipped)
    for name in splits(base) if split is None else (split,):
        audio = {path.stem: path for path in (base / f"{name}_data").glob("*.wav")}
        labels = {path.stem: path for path in (base / f"{name}_labels").glob("*.csv")}
        for number in sorted({*audio, *labels}):
            try:
                if number not in audio:
                    raise ValueError(f"{name}_data/{number}.wav is missing")
                if number not in labels:
                    raise ValueError(f"{name}_labels/{number}.csv is missing")
                rate, frames = header(audio[number])
                notes = _notes(labels[number], frames / rate)
            except (ValueError, OSError) as error:
                skipped.append(Problem(base / f"{name}_data" / f"{number}.wav", str(error)))
                continue
            piece, trouble = assemble(
                base / f"{name}_data",
                name=number,
                split=name,
                mix_path=audio[number],
                stems=(),
                notes=notes,
                licence="CC BY 4.0",
                source=sources.get(number, "MusicNet"),
            )
            skipped += trouble
            found += [piece] if piece is not None else []
    return Pieces(found, skipped)


@hookimpl
def aiba_datasets() -> list[Dataset]:
    return [
        Dataset(
            name="musicnet",
            summary="MusicNet: 330 chamber-music recordings with note labels and no stems: bands and activity only",
            licence="CC BY 4.0",
            open=pieces,
            truth="notes",
        )
    ]


def _base(root: Path) -> Path:
    for base in (root, *(root / name for name in FOLDERS)):
        if any((base / f"{split}_data").is_dir() for split in SPLITS):
            return base
    raise FileNotFoundError(
        f"no MusicNet under {root}: expected train_data/, train_labels/, test_data/ and test_labels/ (the release in files, "
        "not musicnet.h5 or musicnet.npz)"
    )


def _notes(path: Path, seconds: float) -> list[Note]:
    """The labels, in seconds.

    Raises
    ------
    ValueError
        If a line is malformed, there is none, or they end well after the audio.
    """
    notes = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"{path.name} has no columns {', '.join(missing)}")
            for line in reader:
                start, end, program, pitch = (int(line[column]) for column in _COLUMNS)
                if not 0 <= start < end or not 0 <= pitch < 128:
                    raise ValueError(f"start {start}, end {end}, note {pitch}")
                word = slakh.instrument(slakh.inst_class(program - 1, False), program - 1)
                notes.append(Note(word, start / LABEL_RATE, end / LABEL_RATE, pitch))
    except (ValueError, TypeError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path.name} is malformed: {error}") from error
    if not notes:
        raise ValueError(f"{path.name} holds no notes")
    last = max(note.end for note in notes)
    if last > seconds + SLACK:
        raise ValueError(f"{path.name} has notes until {last:.1f} s, the audio ends at {seconds:.1f} s: cut off?")
    return notes


def _sources(base: Path, skipped: list[Problem]) -> dict[str, str]:
    """Composer and composition by number, where the metadata file is there."""
    for path in (base / "musicnet_metadata.csv", base.parent / "musicnet_metadata.csv"):
        if path.is_file():
            try:
                with path.open(newline="", encoding="utf-8-sig") as file:
                    return {
                        line["id"]: f"{line['composer']}: {line['composition']}, {line['movement']}"
                        for line in csv.DictReader(file)
                    }
            except (KeyError, UnicodeDecodeError, csv.Error) as error:
                skipped.append(Problem(path, f"malformed ({error}): recordings are not named"))
    return {}
