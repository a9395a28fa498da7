"""Reader of Slakh's layout: Slakh2100-redux, BabySlakh, and what `aiba_eval.stems` renders.

    slakh2100_flac_redux/<split>/Track00001/{all_src.mid,metadata.yaml,mix.flac,MIDI/S00.mid,stems/S00.flac}
    babyslakh_16k/Track00001/{…,mix.wav,stems/S00.wav}                               (no splits)

The files are trusted more than the metadata: BabySlakh says `audio_rendered: false` of stems that are there, stem
numbers have gaps, `audio_dir` differs between releases and `integrated_loudness` may be absent. What cannot be used
is reported in `Pieces.problems` and left out; no file in a dataset makes reading it fail.

Names in the metadata come from outside: one that leads out of the piece's folder (an absolute path, "..", a link) is
refused.

References
----------
Manilow et al., "Cutting music source separation some Slakh", WASPAA 2019. Classes: slakh-utils,
`midi_inst_values/general_midi_inst_0based.txt`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .pieces import Piece, Pieces, Problem, Stem

FOLDERS = ("slakh2100_flac_redux", "babyslakh_16k")
SPLITS = ("train", "validation", "test", "omitted")
AUDIO = (".flac", ".wav")
METADATA_BYTES = 1 << 20

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


def pieces(root: str | Path, split: str | None = None, *, partial: bool = False) -> Pieces:
    """Find the pieces of a dataset.

    Each file's header and last sample are read, so that cut-off files are found here and not in the middle of a run.

    Parameters
    ----------
    root
        The dataset's folder, or the folder that holds it.
    split
        One of `splits(root)`; None reads them all.
    partial
        Keep a piece although a stem that should be there cannot be read. Its stems then no longer add up to its mix, so
        masks made from them are wrong: by default such a piece is left out.

    Returns
    -------
    Pieces
        The usable pieces, sorted by split and name; `problems` tells what was left out.

    Raises
    ------
    FileNotFoundError
        If there is no such layout under `root`.
    ValueError
        If there is no such split.
    """
    base = _base(Path(root))
    known = splits(base)
    if split is not None and split not in known:
        raise ValueError(f"{base} has no split {split!r}; it has {', '.join(known) or 'no splits'}")
    found: list[Piece] = []
    problems: list[Problem] = []
    for name in known or (None,):
        if split not in (None, name):
            continue
        for folder in _tracks(base / name if name else base):
            piece, trouble = _piece(folder, name)
            problems += trouble
            if piece and (partial or not trouble):
                found.append(piece)
    return Pieces(found, problems)


def _base(root: Path) -> Path:
    """The folder that holds the splits or, without splits, the tracks."""
    for base in (root, *(root / name for name in FOLDERS)):
        if _tracks(base) or any(_tracks(base / split) for split in SPLITS):
            return base
    raise FileNotFoundError(
        f"no Slakh layout under {root}: expected {FOLDERS[0]}/<split>/Track…/ or {FOLDERS[1]}/Track…/ there"
    )


def _tracks(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("Track*") if path.is_dir())


def _piece(folder: Path, split: str | None) -> tuple[Piece | None, list[Problem]]:
    """Read one track. A None means that nothing of it can be used."""
    try:
        metadata = _metadata(folder)
        audio_dir = _inside(folder, str(metadata.get("audio_dir", "stems")), "audio_dir")
        midi_dir = _inside(folder, str(metadata.get("midi_dir", "MIDI")), "midi_dir")
        mix_path = _audio(folder, folder, "mix")
        if mix_path is None:
            raise ValueError("mix.flac or mix.wav is missing")
        sample_rate, frames = _header(mix_path)
    except (ValueError, OSError) as error:
        return None, [Problem(folder, str(error))]
    if not audio_dir.is_dir():
        audio_dir = folder / "stems"  # the metadata may name the renderer's folder: trust the files

    stems: list[Stem] = []
    problems: list[Problem] = []
    for name, entry in _entries(metadata, problems, folder):
        try:
            stem = _stem(folder, audio_dir, midi_dir, name, entry)
            if stem is None:
                if entry.get("audio_rendered", True):
                    raise ValueError(f"stem {name!r} should be in {audio_dir.name}/ and is missing")
                continue
            rate, _ = _header(stem.path)
            if rate != sample_rate:
                raise ValueError(f"stem {name!r} has {rate} Hz, its mix {sample_rate} Hz")
            stems.append(stem)
        except (ValueError, OSError) as error:
            problems.append(Problem(folder, str(error)))
    if not stems:
        return None, [*problems, Problem(folder, "none of its stems can be used")]
    piece = Piece(
        name=folder.name,
        split=split,
        path=folder,
        mix_path=mix_path,
        sample_rate=sample_rate,
        seconds=frames / sample_rate,
        licence=str(metadata.get("source_license") or "unknown"),
        source=str(metadata.get("source_package") or metadata.get("lmd_midi_dir") or "unknown"),
        stems=tuple(stems),
    )
    return piece, problems


def _metadata(folder: Path) -> dict[str, Any]:
    import yaml

    path = _inside(folder, "metadata.yaml", "file")
    if not path.is_file():
        raise ValueError("metadata.yaml is missing")
    if path.stat().st_size > METADATA_BYTES:
        raise ValueError(f"metadata.yaml has {path.stat().st_size} bytes, over the limit of {METADATA_BYTES}")
    try:
        metadata = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"metadata.yaml is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata.yaml holds a {type(metadata).__name__}, not a mapping")
    return metadata


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
    _inside(folder, name, "stem")
    path = _audio(folder, audio_dir, name)
    midi = _inside(folder, f"{midi_dir.relative_to(folder).as_posix()}/{name}.mid", "stem")
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


def _audio(folder: Path, parent: Path, name: str) -> Path | None:
    for suffix in AUDIO:
        path = _inside(folder, f"{parent.relative_to(folder).as_posix()}/{name}{suffix}", "stem")
        if path.is_file():
            return path
    return None


def _inside(folder: Path, name: str, what: str) -> Path:
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


def _header(path: Path) -> tuple[int, int]:
    """(sample rate, frames), after decoding the last sample: a file that was cut off still has a whole header."""
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            rate, frames = file.samplerate, file.frames
            file.seek(max(0, frames - 1))
            whole = frames > 0 and len(file.read(1)) == 1
    except (soundfile.SoundFileError, OSError) as error:
        raise ValueError(f"{path.name} cannot be decoded: {error}") from error
    if not whole:
        raise ValueError(f"{path.name} is empty or cut off")
    return rate, frames
