"""Readers on fixtures in each dataset's own layout, irregularities included; datasets as plugins; sections."""

from __future__ import annotations

import csv
import pickle
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from aiba_eval import MelGrid, datasets, templates
from aiba_eval.datasets import (
    DamagedAudio,
    Piece,
    Pieces,
    Problem,
    excluded,
    medleydb,
    musdb18,
    musicnet,
    sections,
    slakh,
    stem_folder,
)
from aiba_eval.datasets.files import SILENCE
from aiba_hooks import Dataset, UnknownSplit, hookimpl
from aiba_hooks.plugins import manager

RATE = 16_000


def tone(hertz: float, seconds: float = 1.0, rate: int = RATE) -> np.ndarray:
    return (0.2 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write(path: Path, wave: np.ndarray, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate)
    return path


def names(pieces: Any) -> list[str]:
    return [piece.name for piece in pieces]


def reasons(pieces: Any) -> str:
    return "\n".join(str(problem) for problem in pieces.skipped)


def cut_off(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def overwrite(path: Path) -> None:
    path.write_bytes(b"this is no audio")


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE = [cut_off, overwrite, empty, Path.unlink]


# --- Slakh2100: the original splits, and duplicates (the rest is in test_slakh.py)


def slakh_track(folder: Path, uuid: str | None) -> None:
    stems = {"S00": {"inst_class": "Bass", "program_num": 33, "is_drum": False}}
    write(folder / "stems" / "S00.flac", tone(100))
    write(folder / "mix.flac", tone(100))
    head = {} if uuid is None else {"UUID": uuid}
    (folder / "metadata.yaml").write_text(yaml.safe_dump({**head, "audio_dir": "stems", "stems": stems}))


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """The original release: one MIDI file three times, over two splits, and one file twice in `train`."""
    base = tmp_path / "slakh2100_flac"
    for split, number, uuid in (
        ("train", 1, "a" * 32),
        ("train", 2, "b" * 32),
        ("train", 49, "b" * 32),
        ("validation", 1501, "a" * 32),
        ("validation", 1502, None),
        ("test", 1876, "a" * 32),
        ("test", 1877, "c" * 32),
        ("test", 1878, None),
    ):
        slakh_track(base / split / f"Track{number:05}", uuid)
    return tmp_path


def test_the_original_slakh_gives_what_redux_gives(original: Path) -> None:
    pieces = slakh.pieces(original)
    assert slakh.splits(original) == ("train", "validation", "test")
    assert names(pieces) == ["Track00001", "Track00002", "Track01502", "Track01877", "Track01878"]
    assert len(pieces.skipped) == 3
    assert "Track01876: the same MIDI file as Track00001 in train" in reasons(pieces)
    # the first of a file may be in another split than the one that is read
    assert names(slakh.pieces(original, "test")) == ["Track01877", "Track01878"]
    assert len(slakh.pieces(original, "test").skipped) == 1
    assert len(slakh.pieces(original, duplicates=True)) == 8
    assert slakh.pieces(original, duplicates=True).skipped == ()


def test_omitted_tracks_are_read_only_when_asked_for(original: Path) -> None:
    redux = original / "slakh2100_flac_redux"
    (original / "slakh2100_flac").rename(redux)
    (redux / "omitted").mkdir()
    for split, number in (("train", "00049"), ("validation", "01501"), ("test", "01876")):
        (redux / split / f"Track{number}").rename(redux / "omitted" / f"Track{number}")
    pieces = slakh.pieces(original)
    assert names(pieces) == ["Track00001", "Track00002", "Track01502", "Track01877", "Track01878"]
    assert pieces.skipped == ()
    assert names(slakh.pieces(original, "omitted")) == ["Track00049", "Track01501", "Track01876"]
    assert len(slakh.pieces(original, duplicates=True)) == 8


def test_two_slakhs_in_one_folder_are_not_guessed_between(original: Path) -> None:
    slakh_track(original / "slakh2100_flac_redux" / "train" / "Track00001", "a" * 32)
    with pytest.raises(ValueError, match="holds slakh2100_flac_redux and slakh2100_flac: give the folder of one"):
        slakh.pieces(original)
    assert len(slakh.pieces(original / "slakh2100_flac_redux")) == 1


def test_a_silent_stem_is_left_out_and_its_piece_stays(original: Path) -> None:
    folder = original / "slakh2100_flac" / "test" / "Track01877"
    metadata = yaml.safe_load((folder / "metadata.yaml").read_text())
    metadata["stems"]["S01"] = {"inst_class": "Piano", "program_num": 0, "is_drum": False}
    (folder / "metadata.yaml").write_text(yaml.safe_dump(metadata))
    write(folder / "stems" / "S01.flac", np.zeros(RATE, np.float32))
    pieces = slakh.pieces(original / "slakh2100_flac", "test")
    assert pieces[0].instruments == ("bass",)
    assert "stem 'S01' (piano) is silent" in reasons(pieces)
    write(folder / "stems" / "S01.flac", np.r_[np.zeros(RATE - 1), 3 * SILENCE])
    assert slakh.pieces(original / "slakh2100_flac", "test")[0].instruments == ("bass", "piano")
    write(folder / "mix.flac", np.zeros(RATE, np.float32))
    pieces = slakh.pieces(original / "slakh2100_flac", "test")
    assert names(pieces) == ["Track01878"]
    assert "mix.flac is silent" in reasons(pieces)


# --- MUSDB18-HQ


def song(folder: Path, *, silent: str = "") -> None:
    """Stereo at 44.1 kHz; the sum of four stems is the mixture."""
    waves = {
        stem: np.stack([tone(hertz, 0.5, 44_100), 0.5 * tone(hertz, 0.5, 44_100)], axis=1) * (stem != silent)
        for stem, hertz in (("bass", 80), ("drums", 300), ("other", 900), ("vocals", 2000))
    }
    for stem, wave in waves.items():
        write(folder / f"{stem}.wav", wave, 44_100)
    write(folder / "mixture.wav", sum(waves.values()), 44_100)


@pytest.fixture
def musdb(tmp_path: Path) -> Path:
    for split, name in (
        ("train", "A Classic Education - NightOwl"),
        ("train", "ANiMAL - Rockshow"),
        ("train", "Leaf - Wicked"),
        ("test", "Al James - Schoolboy Facination"),
        ("test", "Jokers, Jacks & Kings - Sea Of Leaves"),
    ):
        song(tmp_path / "musdb18hq" / split / name)
    (tmp_path / "musdb18hq" / "test" / ".DS_Store").write_bytes(b"")
    return tmp_path


def test_musdb18_and_its_validation_list(musdb: Path) -> None:
    pieces = musdb18.pieces(musdb)
    assert [(piece.split, piece.name) for piece in pieces] == [
        ("train", "A Classic Education - NightOwl"),
        ("train", "Leaf - Wicked"),
        ("validation", "ANiMAL - Rockshow"),
        ("test", "Al James - Schoolboy Facination"),
        ("test", "Jokers, Jacks & Kings - Sea Of Leaves"),
    ]
    assert pieces.skipped == ()
    assert names(musdb18.pieces(musdb / "musdb18hq", "validation")) == ["ANiMAL - Rockshow"]
    assert len(musdb18.VALIDATION) == 14
    piece = pieces[0]
    assert piece.instruments == ("bass", "drums", "other", "vocals")
    assert piece.sample_rate == 44_100
    np.testing.assert_allclose(sum(piece.stem(word) for word in piece.instruments), piece.mix(), atol=3 / 32768)
    np.testing.assert_allclose(piece.stem("bass"), 0.75 * tone(80, 0.5, 44_100), atol=2 / 32768)
    assert [bool(piece.caveats) for piece in pieces] == [False, True, False, True, False]
    assert "guitar mixed into drums" in pieces[1].caveats[0]


def test_musdb18_never_guesses(musdb: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no split 'valid'; it has train, validation, test"):
        musdb18.pieces(musdb, "valid")
    (musdb / "musdb18hq" / "train" / "ANiMAL - Rockshow").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"no split 'validation'; it has train, test"):
        musdb18.pieces(musdb, "validation")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no MUSDB18-HQ under .*mixture.wav.*stem.mp4"):
        musdb18.pieces(tmp_path / "empty")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["mixture.wav", "drums.wav"])
def test_a_damaged_song_is_reported_and_left_out(musdb: Path, name: str, damage: Any) -> None:
    folder = musdb / "musdb18hq" / "train" / "Leaf - Wicked"
    damage(folder / name)
    pieces = musdb18.pieces(musdb, "train")
    assert names(pieces) == ["A Classic Education - NightOwl"]
    assert [problem.path for problem in pieces.skipped] == [folder]
    assert name in reasons(pieces)
    assert len(musdb18.pieces(musdb, "train", partial=True)) == (1 if name == "mixture.wav" else 2)


def test_a_song_without_vocals_stays(musdb: Path) -> None:
    song(musdb / "musdb18hq" / "test" / "PR - Happy Daze", silent="vocals")
    pieces = musdb18.pieces(musdb, "test")
    assert pieces[2].instruments == ("bass", "drums", "other")
    assert "stem 'vocals' (vocals) is silent" in reasons(pieces)
    with pytest.raises(ValueError, match="has no 'vocals'; it has bass, drums, other"):
        pieces[2].stem("vocals")


# --- MedleyDB


def multitrack(group: Path, name: str, instruments: list[Any], *, metadata: Path | None = None, **fields: Any) -> Path:
    folder = group / name
    stems = {}
    for i, instrument in enumerate(instruments, 1):
        file = f"{name}_STEM_{i:02}.wav"
        write(folder / f"{name}_STEMS" / file, tone(100 * i))
        write(folder / f"{name}_RAW" / f"{name}_RAW_{i:02}_01.wav", tone(100 * i))
        raw = {"R01": {"filename": f"{name}_RAW_{i:02}_01.wav", "instrument": "electric bass"}}
        stems[f"S{i:02}"] = {"component": "", "filename": file, "instrument": instrument, "raw": raw}
    write(folder / f"{name}_MIX.wav", sum(tone(100 * i) for i in range(1, len(instruments) + 1)))
    document = {
        "has_bleed": "no",
        "mix_filename": f"{name}_MIX.wav",
        "stem_dir": f"{name}_STEMS",
        "raw_dir": f"{name}_RAW",
        "origin": "Weathervane Music",
        "stems": stems,
        "version": 1.2,
        **fields,
    }
    place = folder if metadata is None else metadata
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{name}_METADATA.yaml").write_text(yaml.safe_dump(document))
    return folder


@pytest.fixture
def medley(tmp_path: Path) -> Path:
    """V1 has its metadata beside the audio, V2 apart."""
    root = tmp_path / "MedleyDB"
    v1 = ["electric bass", "drum set", "clean electric guitar", "acoustic guitar", "male singer", "fx/processed sound"]
    multitrack(root / "V1", "AClassicEducation_NightOwl", v1)
    multitrack(root / "V1", "MusicDelta_Bleeding", ["drum set", "piano"], has_bleed="yes")
    mixed = ["electric bass", ["violin", "viola"], ["flute", "violin"], "Main System"]
    multitrack(root / "V2", "Allegria_MendelssohnMovement1", mixed, metadata=root / "Metadata")
    return tmp_path


def test_medleydb_maps_its_instruments(medley: Path) -> None:
    pieces = medleydb.pieces(medley)
    assert [(piece.name, piece.split) for piece in pieces] == [
        ("AClassicEducation_NightOwl", "V1"),
        ("Allegria_MendelssohnMovement1", "V2"),
    ]
    assert pieces[0].instruments == ("bass", "drums", "guitar", "other", "vocals")
    assert pieces[1].instruments == ("bass", "other", "strings")
    assert [stem.inst_class for stem in pieces[1].stems] == [
        "electric bass",
        "violin, viola",
        "flute, violin",
        "Main System",
    ]
    np.testing.assert_allclose(pieces[0].stem("guitar"), tone(300) + tone(400), atol=2 / 32768)
    assert pieces[0].source == "Weathervane Music"
    assert set(medleydb.INSTRUMENTS.values()) <= {*slakh.WORDS, "vocals"}
    assert len(medleydb.INSTRUMENTS) == len(", ".join(medleydb._NAMES.values()).split(", "))  # none under two words
    assert medleydb.splits(medley) == ("V1", "V2")
    assert names(medleydb.pieces(medley / "MedleyDB", "V2")) == ["Allegria_MendelssohnMovement1"]
    with pytest.raises(ValueError, match="no split 'test'; it has V1, V2"):
        medleydb.pieces(medley, "test")


def test_bleed_excludes_a_multitrack_or_flags_it(medley: Path) -> None:
    assert "MusicDelta_Bleeding: its stems bleed into each other" in reasons(medleydb.pieces(medley))
    pieces = medleydb.pieces(medley, "V1", bleed=True)
    assert [(piece.name, piece.caveats) for piece in pieces] == [
        ("AClassicEducation_NightOwl", ()),
        ("MusicDelta_Bleeding", ("stems bleed into each other",)),
    ]
    assert pieces.skipped == ()
    path = medley / "MedleyDB" / "V1" / "MusicDelta_Bleeding" / "MusicDelta_Bleeding_METADATA.yaml"
    text = path.read_text()
    for written, bleeds in (
        ("yes", True),
        ("no", False),
        ("'no'", False),
    ):  # YAML 1.1 reads plain yes and no as booleans
        path.write_text(text.replace("has_bleed: 'yes'", f"has_bleed: {written}"))
        assert len(medleydb.pieces(medley, "V1")) == (1 if bleeds else 2)
    path.write_text(text.replace("has_bleed: 'yes'", "has_bleed: maybe"))
    assert "has_bleed is 'maybe'" in reasons(medleydb.pieces(medley, "V1"))


def test_medleydb_without_splits_and_with_metadata_elsewhere(tmp_path: Path) -> None:
    multitrack(tmp_path / "Audio", "A_B", ["piano"], metadata=tmp_path / "repository")
    assert "A_B_METADATA.yaml is missing: put the medleydb repository's Metadata/" in reasons(medleydb.pieces(tmp_path))
    pieces = medleydb.pieces(tmp_path, metadata=tmp_path / "repository")
    assert [(piece.name, piece.split) for piece in pieces] == [("A_B", None)]
    assert medleydb.splits(tmp_path) == ()
    with pytest.raises(FileNotFoundError, match=r"no MedleyDB under .*<id>_MIX.wav"):
        medleydb.pieces(tmp_path / "repository")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, damage) for name in ("_MIX.wav", "_STEMS/{}_STEM_02.wav") for damage in DAMAGE),
        *(("_METADATA.yaml", damage) for damage in (overwrite, empty, Path.unlink)),  # half of a YAML file may be YAML
    ],
)
def test_a_damaged_multitrack_is_reported_and_left_out(medley: Path, name: str, damage: Any) -> None:
    track = "AClassicEducation_NightOwl"
    folder = medley / "MedleyDB" / "V1" / track
    damage(folder / (track + name.format(track)))
    pieces = medleydb.pieces(medley)
    assert names(pieces) == ["Allegria_MendelssohnMovement1"]
    assert [problem.path for problem in pieces.skipped].count(folder) == 1
    assert Path(name.format(track)).name in reasons(pieces)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"stem_dir": "../other"}, "stem_dir '../other' leads out"),
        ({"mix_filename": "/etc/passwd"}, "mix_filename '/etc/passwd' leads out"),
        ({"stems": {"S01": {"filename": "../../x.wav", "instrument": "piano"}}}, "leads out"),
        ({"stems": {"S01": {"filename": "A_B_STEM_01.wav", "instrument": []}}}, r"has no instrument, but []"),
        ({"stems": {"S01": "piano"}}, "is str, not a mapping"),
        ({"stems": None}, "`stems` in the metadata is NoneType"),
    ],
)
def test_medleydb_metadata_that_make_no_sense(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    multitrack(tmp_path, "A_B", ["piano"], **fields)
    pieces = medleydb.pieces(tmp_path)
    assert len(pieces) == 0
    assert reason in reasons(pieces)


# --- MusicNet

HEADER = ["start_time", "end_time", "instrument", "note", "start_beat", "end_beat", "note_value"]
LABELS = [
    [0, 22_050, 44, 36, 0.0, 1.0, "Quarter"],
    [11_025, 33_075, 41, 72, 0.5, 1.5, "Quarter"],
    [33_075, 44_100, 1, 60, 1.5, 2.0, "Eighth"],
    [33_075, 39_000, 1, 64, 1.5, 1.8, "Eighth"],
]


def recording(
    root: Path, split: str, number: str, labels: list[list[Any]] = LABELS, header: list[str] = HEADER
) -> None:
    write(root / f"{split}_data" / f"{number}.wav", tone(200, 1.0, 44_100), 44_100)
    path = root / f"{split}_labels" / f"{number}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *labels])


@pytest.fixture
def chamber(tmp_path: Path) -> Path:
    root = tmp_path / "musicnet"
    recording(root, "train", "1727")
    recording(root, "test", "2303")
    (tmp_path / "musicnet_metadata.csv").write_text(
        "id,composer,composition,movement,ensemble,source,transcriber,catalog_name,seconds\n"
        "1727,Schubert,Piano Quintet in A major,2. Andante,Piano Quintet,European Archive,x,OP114,447\n"
    )
    return tmp_path


def test_musicnet_serves_notes_and_no_stems(chamber: Path) -> None:
    pieces = musicnet.pieces(chamber)
    assert [(piece.name, piece.split) for piece in pieces] == [("1727", "train"), ("2303", "test")]
    piece = pieces[0]
    assert pieces.skipped == ()
    assert piece.source == "Schubert: Piano Quintet in A major, 2. Andante"
    assert pieces[1].source == "MusicNet"
    assert piece.instruments == ("piano", "strings")  # programs are counted from 1: 44 is the contrabass
    assert piece.stems == ()
    assert piece.mix(seconds=0.5).shape == (22_050,)
    assert piece.notes[1] == ("strings", 0.25, 0.75, 72)
    times = [0.0, 0.2, 0.6, 0.75, 0.999, 1.0]
    assert piece.sounding("strings", times).tolist() == [True, True, True, False, False, False]
    assert piece.sounding("piano", times).tolist() == [False, False, False, True, True, False]
    with pytest.raises(ValueError, match="1727 has notes and no stems: use sounding"):
        piece.stem("piano")
    with pytest.raises(ValueError, match="has no 'flute'; it has piano, strings"):
        piece.sounding("flute", times)
    with pytest.raises(ValueError, match=r"no split 'validation'; it has train, test"):
        musicnet.pieces(chamber, "validation")
    with pytest.raises(FileNotFoundError, match="no MusicNet"):
        musicnet.pieces(chamber / "elsewhere")


def test_musicnet_activity_on_the_grid(chamber: Path) -> None:
    piece = musicnet.pieces(chamber)[0]
    grid = MelGrid(time=20, duration=1.0)
    centres = (np.arange(20) + 0.5) / 20
    mask = templates.active_band_mask("piano", piece.sounding("piano", centres), grid, "measured")
    assert not mask[:15].any()
    np.testing.assert_array_equal(mask[15:], templates.band_mask("piano", grid, "measured")[15:])


@pytest.mark.parametrize(
    ("labels", "header", "reason"),
    [
        ([], HEADER, "holds no notes"),
        ([[10, 5, 1, 60, 0, 1, "Q"]], HEADER, "start 10, end 5, note 60"),
        ([[0, 5, 1, 128, 0, 1, "Q"]], HEADER, "note 128"),
        ([[0, 5, 0, 60, 0, 1, "Q"]], HEADER, "General MIDI programs are 0–127, not -1"),
        ([["zero", 5, 1, 60, 0, 1, "Q"]], HEADER, "malformed"),
        ([[0, 5]], HEADER, "malformed"),
        (LABELS, ["start", *HEADER[1:]], "has no columns start_time"),
        ([[0, 44_100 * 60, 1, 60, 0, 1, "Q"]], HEADER, "notes until 60.0 s, the audio ends at 1.0 s: cut off?"),
    ],
)
def test_labels_that_make_no_sense(chamber: Path, labels: list[Any], header: list[str], reason: str) -> None:
    recording(chamber / "musicnet", "train", "1727", labels, header)
    pieces = musicnet.pieces(chamber)
    assert names(pieces) == ["2303"]
    assert len(pieces.skipped) == 1
    assert reason in reasons(pieces)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("train_data/1727.wav", damage) for damage in DAMAGE),
        *(
            ("train_labels/1727.csv", damage) for damage in (overwrite, empty, Path.unlink)
        ),  # half of a table is a table
    ],
)
def test_a_damaged_recording_is_reported_and_left_out(chamber: Path, name: str, damage: Any) -> None:
    damage(chamber / "musicnet" / name)
    pieces = musicnet.pieces(chamber)
    assert names(pieces) == ["2303"]
    assert Path(name).name in reasons(pieces)


def test_musicnet_metadata_may_be_broken(chamber: Path) -> None:
    (chamber / "musicnet_metadata.csv").write_text("number,who\n1727,Schubert\n")
    pieces = musicnet.pieces(chamber)
    assert len(pieces) == 2
    assert "musicnet_metadata.csv: malformed ('id')" in reasons(pieces)


# --- a plain folder of stems


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    write(tmp_path / "one" / "bass.wav", tone(100))
    write(tmp_path / "one" / "Electric-Guitar_1.wav", tone(300, 0.5))
    write(tmp_path / "one" / "electric guitar 2.flac", tone(500))
    write(tmp_path / "two" / "Drums.wav", tone(100))
    write(tmp_path / "two" / "mixture.wav", tone(100, 0.75))
    (tmp_path / "notes").mkdir()
    (tmp_path / "readme.txt").write_text("mine")
    return tmp_path


def test_a_folder_of_stems(plain: Path) -> None:
    pieces = stem_folder.pieces(plain)
    assert names(pieces) == ["one", "two"]
    assert pieces.skipped == ()
    one, two = pieces
    assert one.instruments == ("bass", "electric guitar")
    assert one.mix_path is None
    assert one.seconds == 1.0
    padded = np.pad(tone(300, 0.5), (0, RATE // 2))
    np.testing.assert_allclose(one.mix(), tone(100) + padded + tone(500), atol=3 / 32768)
    np.testing.assert_allclose(one.stem("electric guitar"), padded + tone(500), atol=3 / 32768)
    assert one.mix(0.25, 0.5, 8000).shape == (4000,)
    assert two.seconds == 0.75  # the mix decides
    assert two.stems[0].is_drum
    with pytest.raises(ValueError, match="no split 'test'; it has no splits"):
        stem_folder.pieces(plain, "test")
    with pytest.raises(FileNotFoundError, match="no pieces under .*<piece>/<instrument>.wav"):
        stem_folder.pieces(plain / "notes")
    with pytest.raises(FileNotFoundError):
        stem_folder.pieces(plain / "nowhere")


def test_folders_of_pieces_are_splits(plain: Path) -> None:
    write(plain / "held out" / "three" / "piano.wav", tone(400))
    pieces = stem_folder.pieces(plain)
    assert [(piece.name, piece.split) for piece in pieces] == [("three", "held out"), ("one", None), ("two", None)]
    assert stem_folder.splits(plain) == ("held out",)
    assert names(stem_folder.pieces(plain, "held out")) == ["three"]


def test_what_is_wrong_in_a_folder_is_reported(plain: Path, tmp_path: Path) -> None:
    write(plain / "one" / "organ.wav", tone(100, 1.0, 8000), 8000)
    write(plain / "two" / "mix.wav", tone(100))
    write(plain / "three" / "flute.wav", np.zeros(RATE, np.float32))
    write(plain / "four" / "flute.wav", tone(900))
    outside = write(plain.parent / f"{plain.name}-outside.wav", tone(50))
    (plain / "four" / "bass.wav").symlink_to(outside)
    pieces = stem_folder.pieces(plain)
    assert names(pieces) == []
    text = reasons(pieces)
    assert "one: stem 'organ.wav' has 8000 Hz, the others 16000 Hz" in text
    assert "two: mix.wav and mixture.wav: which is the mix?" in text
    assert "three: stem 'flute.wav' (flute) is silent" in text
    assert "three: none of its stems can be used" in text
    assert "four: file 'bass.wav' leads out of the piece's folder through a link" in text
    assert names(stem_folder.pieces(plain, partial=True)) == ["four", "one"]


# --- sections


def test_sections_leave_out_what_is_silent_and_count_it(tmp_path: Path) -> None:
    quiet = np.r_[tone(300), 1e-3 * tone(300), np.zeros(RATE, np.float32)]
    write(tmp_path / "piece" / "bass.wav", np.r_[tone(100, 2.0), np.zeros(RATE, np.float32)])
    write(tmp_path / "piece" / "flute.wav", quiet)
    piece = stem_folder.pieces(tmp_path)[0]
    found = sections(piece, 1.0)
    assert [(s.start, s.sounding, s.silent) for s in found] == [
        (0.0, ("bass", "flute"), ()),
        (1.0, ("bass",), ("flute",)),  # 60 dB below the bass
        (2.0, (), ("bass", "flute")),
    ]
    assert excluded(found) == {"bass": 1, "flute": 2}
    assert sections(piece, 1.0, floor_db=-80)[1].sounding == ("bass", "flute")
    assert [s.start for s in sections(piece, 1.0, hop=0.5)] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert len(sections(piece, 1.6)) == 1  # the rest is shorter than a window
    assert len(sections(piece, 3.0)) == 1
    grid = MelGrid(time=10, duration=1.0)
    assert set(found[1].powers(grid)) == {"bass"}
    np.testing.assert_array_equal(found[0].powers(grid)["bass"], grid.power(piece.stem("bass", 0.0, 1.0), RATE))
    np.testing.assert_array_equal(found[1].mix(), piece.mix(1.0, 1.0))
    with pytest.raises(ValueError, match=r"has 3.000 s, less than one window of 4.000 s"):
        sections(piece, 4.0)
    for bad in ({"seconds": 0.0}, {"seconds": 1.0, "hop": 0.0}, {"seconds": 1.0, "floor_db": 0.0}):
        with pytest.raises(ValueError, match="positive lengths and a negative floor"):
            sections(piece, **bad)


def test_sections_of_notes(chamber: Path) -> None:
    found = sections(musicnet.pieces(chamber)[0], 0.5)
    assert [(s.sounding, s.silent) for s in found] == [(("strings",), ("piano",)), (("piano", "strings"), ())]


def test_damage_after_the_scan_names_the_file(plain: Path) -> None:
    piece = stem_folder.pieces(plain)[0]
    overwrite(piece.stems[0].path)
    with pytest.raises(DamagedAudio, match="cannot be decoded"):
        sections(piece, 0.5)
    with pytest.raises(ValueError, match="has stems and no notes"):
        piece.sounding("bass", [0.0])


# --- onsets


def test_onsets_of_notes(chamber: Path) -> None:
    piece = musicnet.pieces(chamber)[0]
    np.testing.assert_allclose(piece.onsets("piano"), [0.75])  # a chord is one onset
    np.testing.assert_allclose(piece.onsets("strings"), [0.0, 0.25])
    with pytest.raises(ValueError, match="has no 'flute'"):
        piece.onsets("flute")


def test_onsets_of_midi_files(tmp_path: Path) -> None:
    import pretty_midi

    folder = tmp_path / "Track00001"
    slakh_track(folder, None)
    piece = slakh.pieces(tmp_path)[0]
    with pytest.raises(ValueError, match="stem 'S00' of Track00001 has no MIDI file"):
        piece.onsets("bass")
    score = pretty_midi.PrettyMIDI(initial_tempo=90)
    bass = pretty_midi.Instrument(33)
    for start in (0.2, 0.22, 0.5, 1.7):  # two struck together, and one after the end of the mix
        bass.notes.append(pretty_midi.Note(100, 40, start, start + 0.1))
    score.instruments.append(bass)
    (folder / "MIDI").mkdir()
    score.write(str(folder / "MIDI" / "S00.mid"))
    piece = slakh.pieces(tmp_path)[0]
    np.testing.assert_allclose(piece.onsets("bass"), [0.2, 0.5], atol=2e-3)
    overwrite(folder / "MIDI" / "S00.mid")
    with pytest.raises(DamagedAudio, match=r"S00.mid cannot be read"):
        piece.onsets("bass")


def test_onsets_of_the_shipped_set_are_those_heard() -> None:
    import librosa
    from mir_eval import onset

    right, late = [], []
    for piece in slakh.pieces(datasets.freedoom_root(), "test"):
        known = piece.onsets("drums")
        heard = librosa.onset.onset_detect(y=piece.stem("drums"), sr=piece.sample_rate, units="time", hop_length=160)
        right.append(onset.f_measure(known, heard)[0])
        late.append(onset.f_measure(known + 0.12, heard)[0])
    assert np.mean(right) > 0.75
    assert np.mean(late) < 0.5


# --- plugins


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The manager, as if nothing had been registered by hand, before and after."""
    manager.cache_clear()
    yield manager()
    manager.cache_clear()


def test_our_readers_are_plugins_and_open_by_name(fresh: Any, plain: Path, chamber: Path) -> None:
    known = datasets.available()
    assert set(known) >= {"slakh", "musdb18", "medleydb", "musicnet", "stem-folder"}
    assert all(isinstance(d, Dataset) and d.summary and d.licence for d in known.values())
    assert {name for name, d in known.items() if d.truth == "notes"} == {"musicnet"}
    pieces = datasets.open_dataset("stem-folder", str(plain))
    assert names(pieces) == names(stem_folder.pieces(plain))
    assert names(datasets.open_dataset("slakh", datasets.freedoom_root(), split="validation"))
    with pytest.raises(ValueError, match=r"no dataset 'slack'; known: medleydb, musdb18, musicnet, slakh, stem-folder"):
        datasets.open_dataset("slack", plain)


def test_a_reader_of_somebody_else(fresh: Any, tmp_path: Path) -> None:
    """One that is registered by hand, with a name of its own and one that replaces ours."""

    def opened(root: Path, split: str | None = None, takes: int = 1) -> Pieces:
        if split not in (None, "live"):
            raise UnknownSplit(root, split, ["live"])
        stem = datasets.Stem("guitar", "guitar", "guitar", None, False, root / "guitar.wav", None)
        piece = Piece("take", split, root, None, RATE, 1.0, "mine", "me", (stem,))
        return Pieces([piece] * takes, [Problem(root / "b.wav", "not tuned")])

    class Plugin(types.SimpleNamespace):
        @hookimpl
        def aiba_datasets(self) -> list[Dataset]:
            return [
                Dataset("rehearsals", "my rehearsal room", "mine", opened),
                Dataset("slakh", "another reader", "mine", opened),
            ]

    write(tmp_path / "guitar.wav", tone(300))
    fresh.add("rehearsals", Plugin)
    pieces = datasets.open_dataset("rehearsals", tmp_path, split="live", takes=2)
    assert len(pieces) == 2
    assert str(pieces.skipped[0]).endswith("b.wav: not tuned")
    assert sections(pieces[0], 0.5)[0].sounding == ("guitar",)
    assert datasets.available()["slakh"].summary == "another reader"
    with pytest.raises(UnknownSplit, match="it has live") as refused:
        datasets.open_dataset("rehearsals", tmp_path, split="studio")
    again = pickle.loads(pickle.dumps(refused.value))  # a worker's error comes to its client
    assert (str(again), again.known) == (str(refused.value), ("live",))
