"""Reader of MedleyDB, versions 1 and 2: recorded multitracks with named instruments.

    {Audio,V1,V2}/<id>/{<id>_METADATA.yaml,<id>_MIX.wav,<id>_STEMS/<id>_STEM_01.wav,<id>_RAW/…}

The metadata of version 2 come apart from its audio, as `Metadata/<id>_METADATA.yaml` of the `medleydb` repository: they are
looked for beside the audio, then in `Metadata/` at the root, then in the folder `metadata`.

**Bleed.** In 93 of 330 multitracks the microphones of one instrument heard others (`has_bleed: 'yes'`). What a stem
dominates is not known there: they are left out and reported, unless `bleed=True`, and then carry a caveat. The label is one
for all stems of a piece, and misses some.

**Instruments.** 94 names map to the words that the Slakh reader uses, and `vocals`. A stem with several instruments is theirs
if they are one word's (violin and viola: strings), else `other`, as are `Main System` and `Unlabeled`.

There are no official splits. `V1` and `V2` are given as splits where the audio lies in such folders. Split by artist. Many of
these pieces are in MUSDB18 as well.

References
----------
Bittner et al., "MedleyDB", ISMIR 2014; "MedleyDB 2.0", ISMIR 2016 late-breaking.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aiba_hooks.datasets import Dataset
from aiba_hooks.specs import hookimpl

from .files import assemble, check_split, folders, inside, read_yaml
from .pieces import Piece, Pieces, Problem, Stem

SPLITS = ("V1", "V2")
FOLDERS = ("MedleyDB", "medleydb", "MedleyDB_V1", "MedleyDB_V2")

_NAMES = {
    "bass": "double bass, electric bass, bass guitar, fretless bass",
    "bells": "celesta, chimes, glockenspiel, marimba, vibraphone, xylophone",
    "brass": "brass section, cornet, euphonium, french horn, french horn section, horn section, trombone, trombone section, "
    "trumpet, trumpet section, tuba",
    "choir": "choir, female choir, male choir",
    "drums": "bass drum, cymbal, drum machine, drum set, high hat, kick drum, snare drum, toms",
    "ethnic": "bagpipe, banjo, dilruba, erhu, guzheng, liuqin, oud, sitar, yangqin, zhongruan",
    "flute": "bamboo flute, dizi, flute, flute section, panpipes, piccolo, recorder",
    "guitar": "acoustic guitar, clean electric guitar, distorted electric guitar, lap steel guitar, slide guitar",
    "organ": "accordion, concertina, electronic organ, harmonica, melodica, pipe organ",
    "percussion": "auxiliary percussion, bongo, castanet, claps, conga, cowbell, darbuka, doumbek, gong, gu, guiro, maracas, "
    "shaker, sleigh bells, snaps, tabla, tambourine, timpani, triangle",
    "piano": "electric piano, harpsichord, piano, tack piano, toy piano",
    "reed": "alto saxophone, baritone saxophone, bass clarinet, bassoon, clarinet, clarinet section, english horn, oboe, "
    "soprano saxophone, tenor saxophone",
    "strings": "cello, cello section, harp, string section, viola, viola section, violin, violin section",
    "synth": "synthesizer",
    "vocals": "beatboxing, female rapper, female screamer, female singer, female speaker, male rapper, male screamer, "
    "male singer, male speaker, vocalists",
}
#: The word for an instrument's name in MedleyDB. A name that is not here is "other".
INSTRUMENTS: Mapping[str, str] = {name: word for word, names in _NAMES.items() for name in names.split(", ")}


def instrument(names: str | list[str]) -> str:
    """The word for a stem: of its instrument, or of all of them where they share one.

    >>> instrument("clean electric guitar"), instrument(["violin", "viola"]), instrument(["violin", "flute"])
    ('guitar', 'strings', 'other')
    """
    words = {
        INSTRUMENTS.get(str(name).strip().lower(), "other") for name in ([names] if isinstance(names, str) else names)
    }
    return words.pop() if len(words) == 1 else "other"


def splits(root: str | Path) -> tuple[str, ...]:
    """`V1` and `V2`, as far as the audio lies in folders of these names."""
    return tuple(name for name, _ in _groups(Path(root)) if name is not None)


def pieces(
    root: str | Path,
    split: str | None = None,
    *,
    bleed: bool = False,
    partial: bool = False,
    metadata: str | Path | None = None,
) -> Pieces:
    """Find the multitracks.

    Parameters
    ----------
    root
        The folder with `Audio`, `V1` or `V2`, the folder that holds it, or one with multitracks.
    split
        One of `splits(root)`; None reads them all.
    bleed
        Keep multitracks whose stems bleed into each other, with a caveat.
    partial
        Keep a multitrack although one of its stems is missing or damaged. Masks of the others are wrong then.
    metadata
        A folder of `<id>_METADATA.yaml` files, where they are neither beside the audio nor in `Metadata/`.

    Returns
    -------
    Pieces
        Sorted by split and name; `skipped` tells what was left out, bleeding multitracks included.

    Raises
    ------
    FileNotFoundError
        If there is no such layout under `root`.
    ValueError
        If there is no such split.
    """
    base = Path(root)
    groups = _groups(base)
    check_split(split, [name for name, _ in groups if name is not None], base)

    def places(group: Path) -> list[Path]:
        return [group.parent / "Metadata", group.parent.parent / "Metadata"] if metadata is None else [Path(metadata)]

    return Pieces.gathered(
        _multitrack(folder, name, places(group), bleed, partial)
        for name, group in groups
        if split in (None, name)
        for folder in _multitracks(group)
    )


@hookimpl
def aiba_datasets() -> list[Dataset]:
    return [
        Dataset(
            name="medleydb",
            summary="MedleyDB 1 and 2: recorded multitracks with named instruments; those with bleed are left out",
            licence="CC BY-NC-SA 4.0; access on request",
            open=pieces,
        )
    ]


def _multitracks(group: Path) -> list[Path]:
    """Folders that are multitracks by their stems or their mix, so that one with half of it missing is reported."""
    return [
        folder
        for folder in folders(group)
        if (folder / f"{folder.name}_STEMS").is_dir() or (folder / f"{folder.name}_MIX.wav").is_file()
    ]


def _groups(root: Path) -> list[tuple[str | None, Path]]:
    """(split or None, folder of multitracks)."""
    for base in (root, *(root / name for name in FOLDERS)):
        if not base.is_dir():
            continue
        candidates = [(None, base), (None, base / "Audio"), *((split, base / split) for split in SPLITS)]
        groups = [(split, group) for split, group in candidates if group.is_dir() and _multitracks(group)]
        if groups:
            return groups
    raise FileNotFoundError(
        f"no MedleyDB under {root}: expected Audio/, V1/ or V2/ with folders <id>/ of <id>_MIX.wav and <id>_STEMS/"
    )


def _multitrack(
    folder: Path, split: str | None, places: list[Path], bleed: bool, partial: bool
) -> tuple[Piece | None, list[Problem]]:
    name = folder.name
    try:
        file = f"{name}_METADATA.yaml"
        path = inside(folder, file, "file")
        others = [place / file for place in places if (place / file).is_file()]
        if not path.is_file() and not others:
            raise ValueError(f"{file} is missing: put the medleydb repository's Metadata/ beside the audio")
        metadata = read_yaml(path if path.is_file() else others[0])
        bleeds = _yes(metadata.get("has_bleed"))
        if bleeds and not bleed:
            return None, [Problem(folder, "its stems bleed into each other (has_bleed)")]
        mix_path = inside(folder, str(metadata.get("mix_filename") or f"{name}_MIX.wav"), "mix_filename")
        if not mix_path.is_file():
            raise ValueError(f"{mix_path.name} is missing")
        stem_dir = inside(folder, str(metadata.get("stem_dir") or f"{name}_STEMS"), "stem_dir")
    except (ValueError, OSError) as error:
        return None, [Problem(folder, str(error))]
    stems: list[Stem] = []
    problems: list[Problem] = []
    for key, entry in _entries(metadata, problems, folder):
        try:
            path = inside(folder, f"{stem_dir.relative_to(folder).as_posix()}/{entry.get('filename')}", "stem")
            if not path.is_file():
                raise ValueError(f"stem {key!r} ({path.name}) is missing")
            names = entry.get("instrument")
            if not isinstance(names, str | list) or not names:
                raise ValueError(f"stem {key!r} has no instrument, but {names!r}")
            word = instrument(names)
            written = names if isinstance(names, str) else ", ".join(str(n) for n in names)
            stems.append(Stem(key, word, written, None, word == "drums", path, None))
        except (ValueError, OSError) as error:
            problems.append(Problem(folder, str(error)))
    return assemble(
        folder,
        name=name,
        split=split,
        mix_path=mix_path,
        stems=stems,
        licence="CC BY-NC-SA 4.0",
        source=str(metadata.get("origin") or "MedleyDB"),
        caveats=["stems bleed into each other"] if bleeds else [],
        problems=problems,
        partial=partial,
    )


def _yes(value: Any) -> bool:
    """'yes' and 'no', or what YAML 1.1 makes of them without quotes."""
    if value in (True, "yes"):
        return True
    if value in (False, "no"):
        return False
    raise ValueError(f"has_bleed is {value!r}, neither 'yes' nor 'no'")


def _entries(
    metadata: Mapping[str, Any], problems: list[Problem], folder: Path
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    entries = metadata.get("stems")
    if not isinstance(entries, dict):
        problems.append(Problem(folder, f"`stems` in the metadata is {type(entries).__name__}, not a mapping"))
        return
    for key, entry in sorted(entries.items(), key=lambda item: str(item[0])):
        if isinstance(entry, dict):
            yield str(key), entry
        else:
            problems.append(Problem(folder, f"stem {key!r} in the metadata is {type(entry).__name__}, not a mapping"))
