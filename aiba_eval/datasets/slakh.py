"""Reader of Slakh's layout: Slakh2100 (original splits and redux), BabySlakh, and what `aiba_eval.stems` renders.

    slakh2100_flac/<split>/Track00001/{all_src.mid,metadata.yaml,mix.flac,MIDI/S00.mid,stems/S00.flac}
    slakh2100_flac_redux/<split>/Track00001/…                                        (a fourth split: omitted)
    babyslakh_16k/Track00001/{…,mix.wav,stems/S00.wav}                               (no splits)

The files are trusted more than the metadata: BabySlakh says `audio_rendered: false` of stems that are there, stem
numbers have gaps, `audio_dir` differs between releases and `integrated_loudness` may be absent. What cannot be used
is reported in `Pieces.skipped` and left out; no file in a dataset makes reading it fail.

**Duplicates.** Slakh2100 renders some MIDI files several times, 146 of them in more than one of its original splits. Of
the 2100 tracks, redux keeps the first of each file: 1289 for training, 270 for validation, 151 for test. The same rule is
applied here to every layout, by the `UUID` of the metadata (the MIDI file's MD5), so that the original release and redux
give the same pieces. The split `omitted` holds nothing but duplicates and is given only when it is asked for.

References
----------
Manilow et al., "Cutting music source separation some Slakh", WASPAA 2019. Classes: slakh-utils,
`midi_inst_values/general_midi_inst_0based.txt`; duplicates: its `splits/redux.json`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aiba_hooks.datasets import Dataset
from aiba_hooks.specs import hookimpl

from .files import METADATA_BYTES, assemble, check_split, find_audio, header, inside, read_yaml
from .pieces import Piece, Pieces, Problem, Stem

FOLDERS = ("slakh2100_flac_redux", "slakh2100_flac", "babyslakh_16k")
SPLITS = ("train", "validation", "test", "omitted")

# Slakh's class of a General MIDI program, by the first program above the class. The names are Slakh's, quirks included:
# "Sound Effects" are GM's synth effects, "Sound effects" its noises.
CLASSES = (
    (8, "Piano"),
    (16, "Chromatic Percussion"),
    (24, "Organ"),
    (32, "Guitar"),
    (40, "Bass"),
    (48, "Strings"),
    (56, "Strings (continued)"),
    (64, "Brass"),
    (72, "Reed"),
    (80, "Pipe"),
    (88, "Synth Lead"),
    (96, "Synth Pad"),
    (104, "Sound Effects"),
    (112, "Ethnic"),
    (119, "Percussive"),
    (128, "Sound effects"),
)

# The word for a class in a prompt. A class that is not here is "other".
INSTRUMENTS = {
    "Piano": "piano",
    "Chromatic Percussion": "bells",
    "Organ": "organ",
    "Guitar": "guitar",
    "Bass": "bass",
    "Strings": "strings",
    "Strings (continued)": "strings",
    "Brass": "brass",
    "Reed": "reed",
    "Pipe": "flute",
    "Synth Lead": "synth",
    "Synth Pad": "synth",
    "Sound Effects": "synth",
    "Ethnic": "ethnic",
    "Percussive": "percussion",
    "Sound effects": "effects",
    "Drums": "drums",
}

# Programs that sound like nothing else in their class: timpani among the strings, voices and a hit among the ensembles.
PROGRAMS = {47: "percussion", 52: "choir", 53: "choir", 54: "choir", 55: "effects"}

WORDS = tuple(sorted({*INSTRUMENTS.values(), *PROGRAMS.values(), "other"}))


def inst_class(program: int, is_drum: bool) -> str:
    """Slakh's class of a General MIDI program (0–127); `Drums` for a drum kit.

    >>> inst_class(33, False), inst_class(0, True)
    ('Bass', 'Drums')
    """
    if is_drum:
        return "Drums"
    for end, name in CLASSES:
        if 0 <= program < end:
            return name
    raise ValueError(f"General MIDI programs are 0–127, not {program}")


def instrument(name: str, program: int | None = None, is_drum: bool = False) -> str:
    """The word for a stem of class `name`; `program` refines it where the class is too wide.

    >>> instrument("Strings (continued)", 48), instrument("Strings (continued)", 52)
    ('strings', 'choir')
    """
    if is_drum:
        return "drums"
    if program in PROGRAMS and name in ("Strings", "Strings (continued)"):
        return PROGRAMS[program]
    return INSTRUMENTS.get(name, "other")


def splits(root: str | Path) -> tuple[str, ...]:
    """The splits of the dataset under `root`, in Slakh's order; empty for a layout without splits."""
    base = _base(Path(root))
    return tuple(split for split in SPLITS if _tracks(base / split))


def pieces(root: str | Path, split: str | None = None, *, partial: bool = False, duplicates: bool = False) -> Pieces:
    """Find the pieces of a dataset.

    Each file's header and last sample are read, so that cut-off files are found here and not in the middle of a run.

    Parameters
    ----------
    root
        The dataset's folder, or the folder that holds it.
    split
        One of `splits(root)`; None reads them all but `omitted`.
    partial
        Keep a piece although a stem that should be there cannot be read. Its stems then no longer add up to its mix, so
        masks made from them are wrong: by default such a piece is left out.
    duplicates
        Keep tracks whose MIDI file an earlier track has, as the original release does.

    Returns
    -------
    Pieces
        The usable pieces, sorted by split and name; `skipped` tells what was left out.

    Raises
    ------
    FileNotFoundError
        If there is no such layout under `root`.
    ValueError
        If there is no such split, or more than one such dataset under `root`.
    """
    base = _base(Path(root))
    known = splits(base)
    check_split(split, known, base)
    tracks = {name: _tracks(base / name if name else base) for name in known or (None,)}
    earlier = {} if duplicates else _earlier([track for some in tracks.values() for track in some])

    def read(folder: Path, name: str | None) -> tuple[Piece | None, list[Problem]]:
        if folder in earlier and name != "omitted":
            first = earlier[folder]
            return None, [Problem(folder, f"the same MIDI file as {first.name} in {first.parent.name}")]
        return _piece(folder, name, partial)

    # the omitted tracks are duplicates: only where they are asked for
    unwanted = "omitted" if split is None and not duplicates else ""
    chosen = {name: some for name, some in tracks.items() if name != unwanted and split in (None, name)}
    return Pieces.gathered(read(folder, name) for name, some in chosen.items() for folder in some)


@hookimpl
def aiba_datasets() -> list[Dataset]:
    return [
        Dataset(
            name="slakh",
            summary="Slakh2100 (original or redux), BabySlakh, and sets that aiba stems renders: stems from MIDI",
            licence="Slakh2100: CC BY 4.0; a rendered set: as its NOTICE says",
            open=pieces,
        )
    ]


def _base(root: Path) -> Path:
    """The folder that holds the splits or, without splits, the tracks."""
    for bases in ((root,), [root / name for name in FOLDERS]):
        there = [base for base in bases if _tracks(base) or any(_tracks(base / split) for split in SPLITS)]
        if len(there) > 1:
            raise ValueError(
                f"{root} holds {' and '.join(base.name for base in there)}: give the folder of one of them"
            )
        if there:
            return there[0]
    raise FileNotFoundError(
        f"no Slakh layout under {root}: expected {FOLDERS[0]}/<split>/Track…/ or {FOLDERS[1]}/Track…/ there"
    )


def _tracks(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("Track*") if path.is_dir())


def _earlier(tracks: list[Path]) -> dict[Path, Path]:
    """For each track whose MIDI file another has, the first of them by name."""
    by_file: dict[str, list[Path]] = {}
    for track in sorted(tracks, key=lambda path: path.name):
        try:
            with (track / "metadata.yaml").open("rb") as file:
                uuid = re.search(rb"^UUID:[ \t]*(\S+)", file.read(METADATA_BYTES), re.M)
        except OSError:
            uuid = None  # reported when the track itself is read
        if uuid:
            by_file.setdefault(uuid[1].decode("ascii", "replace").strip("'\""), []).append(track)
    return {track: same[0] for same in by_file.values() for track in same[1:]}


def _piece(folder: Path, split: str | None, partial: bool) -> tuple[Piece | None, list[Problem]]:
    """Read one track. A None means that it is left out."""
    try:
        metadata = read_yaml(inside(folder, "metadata.yaml", "file"))
        audio_dir = inside(folder, str(metadata.get("audio_dir", "stems")), "audio_dir")
        midi_dir = inside(folder, str(metadata.get("midi_dir", "MIDI")), "midi_dir")
        mix_path = find_audio(folder, folder, "mix")
        if mix_path is None:
            raise ValueError("mix.flac or mix.wav is missing")
        header(mix_path)
    except (ValueError, OSError) as error:
        return None, [Problem(folder, str(error))]
    if not audio_dir.is_dir():
        audio_dir = folder / "stems"  # the metadata may name the renderer's folder: trust the files

    stems: list[Stem] = []
    problems: list[Problem] = []
    for name, entry in _entries(metadata, problems, folder):
        try:
            stem = _stem(folder, audio_dir, midi_dir, name, entry)
            if stem is not None:
                stems.append(stem)
            elif entry.get("audio_rendered", True):
                raise ValueError(f"stem {name!r} should be in {audio_dir.name}/ and is missing")
        except (ValueError, OSError) as error:
            problems.append(Problem(folder, str(error)))
    return assemble(
        folder,
        name=folder.name,
        split=split,
        mix_path=mix_path,
        stems=stems,
        licence=str(metadata.get("source_license") or "unknown"),
        source=str(metadata.get("source_package") or metadata.get("lmd_midi_dir") or "unknown"),
        problems=problems,
        partial=partial,
    )


def _entries(
    metadata: Mapping[str, Any], problems: list[Problem], folder: Path
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The stems that the metadata names, sorted; entries that are no mapping become problems."""
    entries = metadata.get("stems")
    if not isinstance(entries, dict):
        problems.append(Problem(folder, f"`stems` in metadata.yaml is {type(entries).__name__}, not a mapping"))
        return
    for name, entry in sorted(entries.items(), key=lambda item: str(item[0])):
        if isinstance(entry, dict):
            yield str(name), entry
        else:
            problems.append(Problem(folder, f"stem {name!r} in metadata.yaml is {type(entry).__name__}, not a mapping"))


def _stem(folder: Path, audio_dir: Path, midi_dir: Path, name: str, entry: Mapping[str, Any]) -> Stem | None:
    """The stem, or None where it has no audio file."""
    inside(folder, name, "stem")
    path = find_audio(folder, audio_dir, name)
    midi = inside(folder, f"{midi_dir.relative_to(folder).as_posix()}/{name}.mid", "stem")
    if path is None:
        return None
    number = entry.get("program_num")
    is_drum = bool(entry.get("is_drum", False)) or number == 128
    program = number if isinstance(number, int) and 0 <= number < 128 else None
    written = entry.get("inst_class")
    if written is None and program is None and not is_drum:
        raise ValueError(f"stem {name!r} has neither inst_class nor program_num: its instrument is unknown")
    kind = str(written) if written is not None else inst_class(program or 0, is_drum)
    return Stem(
        name=name,
        instrument=instrument(kind, program, is_drum or kind == "Drums"),
        inst_class=kind,
        program=program,
        is_drum=is_drum or kind == "Drums",
        path=path,
        midi=midi if midi.is_file() else None,
    )
