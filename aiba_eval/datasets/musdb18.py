"""Reader of MUSDB18-HQ: recorded songs in four stems.

    {train,test}/<Artist - Title>/{mixture,bass,drums,other,vocals}.wav

Stereo, 44.1 kHz; `Piece` reads it as mono. `other` is whatever is neither bass, drums nor vocals: it belongs to the masks'
sum and is no word for a prompt. The compressed MUSDB18 (`.stem.mp4`) is another release: decode it to this layout first.

Splits are those of the `musdb` package: 14 named songs of the folder `train` are `validation`, the other 86 `train`.

46 songs come from MedleyDB: do not train on the one set and test on the other.

References
----------
Rafii et al., "MUSDB18-HQ", 2019, doi 10.5281/zenodo.3338373. Validation songs: sigsep-mus-db, `configs/mus.yaml`.
Errata: the dataset's page at sigsep.
"""

from __future__ import annotations

from pathlib import Path

from aiba_hooks.datasets import Dataset
from aiba_hooks.specs import hookimpl

from .files import assemble, check_split, find_audio, folders, header
from .pieces import Piece, Pieces, Problem, Stem

FOLDERS = ("musdb18hq", "MUSDB18-HQ", "musdb18-hq")
STEMS = ("bass", "drums", "other", "vocals")
SPLITS = ("train", "validation", "test")

VALIDATION = frozenset(
    {
        "ANiMAL - Rockshow",
        "Actions - One Minute Smile",
        "Alexander Ross - Goodbye Bolero",
        "Clara Berry And Wooldog - Waltz For My Victims",
        "Fergessen - Nos Palpitants",
        "James May - On The Line",
        "Johnny Lokke - Promises & Lies",
        "Leaf - Summerghost",
        "Meaxic - Take A Step",
        "Patrick Talbot - A Reason To Leave",
        "Skelpolu - Human Mistakes",
        "Traffic Experiment - Sirens",
        "Triviul - Angelsaint",
        "Young Griffo - Pennies",
    }
)

#: What is known to be wrong with a song. It stays, with a caveat: only parts of it are concerned.
ERRATA = {
    "Al James - Schoolboy Facination": "vocals mixed into other",
    "BKS - Bulldozer": "cowbell mixed into other at 1:12",
    "Chris Durban - Celebrate": "other instruments bleed into vocals",
    "Detsky Sad - Walkie Talkie": "other mixed into drums",
    "Enda Reilly - Cur An Long Ag Seol": "speech at the start of other",
    "Hop Along - Sister Cities": "other instruments bleed into vocals",
    "Leaf - Wicked": "guitar mixed into drums at 2:20 and into vocals at 3:02",
    "PR - Oh No": "the stems do not add up to the mix in the left channel",
}


def splits(root: str | Path) -> tuple[str, ...]:
    """The splits that have songs under `root`."""
    songs = _songs(_base(Path(root)))
    return tuple(split for split in SPLITS if songs[split])


def pieces(root: str | Path, split: str | None = None, *, partial: bool = False) -> Pieces:
    """Find the songs.

    Parameters
    ----------
    root
        The folder with `train` and `test`, or the folder that holds it.
    split
        One of `splits(root)`; None reads them all.
    partial
        Keep a song although one of its four stems is missing or damaged. Masks of the others are wrong then.

    Returns
    -------
    Pieces
        Sorted by split and name. `skipped` tells what was left out: songs that cannot be read, and stems that are
        silent throughout, of songs that stay.

    Raises
    ------
    FileNotFoundError
        If there is no such layout under `root`.
    ValueError
        If there is no such split.
    """
    base = _base(Path(root))
    songs = _songs(base)
    check_split(split, [name for name in SPLITS if songs[name]], base)
    chosen = SPLITS if split is None else (split,)
    return Pieces.gathered(_song(folder, name, partial) for name in chosen for folder in songs[name])


@hookimpl
def aiba_datasets() -> list[Dataset]:
    return [
        Dataset(
            name="musdb18",
            summary="MUSDB18-HQ: 150 songs in bass, drums, vocals and other",
            licence="academic use only; some songs CC BY-NC-SA: do not publish excerpts without looking",
            open=pieces,
        )
    ]


def _base(root: Path) -> Path:
    for base in (root, *(root / name for name in FOLDERS)):
        if any((base / name).is_dir() and folders(base / name) for name in ("train", "test")):
            return base
    raise FileNotFoundError(
        f"no MUSDB18-HQ under {root}: expected train/ and test/ with folders of mixture.wav, "
        f"{', '.join(f'{stem}.wav' for stem in STEMS)} (MUSDB18's .stem.mp4 files have to be decoded first)"
    )


def _songs(base: Path) -> dict[str, list[Path]]:
    train, test = ([*folders(base / name)] if (base / name).is_dir() else [] for name in ("train", "test"))
    return {
        "train": [song for song in train if song.name not in VALIDATION],
        "validation": [song for song in train if song.name in VALIDATION],
        "test": test,
    }


def _song(folder: Path, split: str, partial: bool) -> tuple[Piece | None, list[Problem]]:
    try:
        mix_path = find_audio(folder, folder, "mixture")
        if mix_path is None:
            raise ValueError("mixture.wav is missing")
        header(mix_path)
    except (ValueError, OSError) as error:
        return None, [Problem(folder, str(error))]
    stems: list[Stem] = []
    problems: list[Problem] = []
    for name in STEMS:
        try:
            path = find_audio(folder, folder, name)
            if path is None:
                raise ValueError(f"{name}.wav is missing")
            stems.append(Stem(name, name, name, None, name == "drums", path, None))
        except (ValueError, OSError) as error:
            problems.append(Problem(folder, str(error)))
    return assemble(
        folder,
        name=folder.name,
        split=split,
        mix_path=mix_path,
        stems=stems,
        licence="academic use only",
        source="MUSDB18-HQ",
        caveats=[ERRATA[folder.name]] if folder.name in ERRATA else [],
        problems=problems,
        partial=partial,
    )
