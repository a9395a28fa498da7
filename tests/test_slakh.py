"""The reader of Slakh's layout: irregular sets, damaged files, hostile metadata, and the set that ships."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from aiba_eval.datasets import DamagedAudio, freedoom_root, slakh

RATE = 16_000
SECONDS = 2.0
BASS = {"inst_class": "Bass", "is_drum": False, "program_num": 33, "audio_rendered": True, "integrated_loudness": -13.0}
DRUMS = {"inst_class": "Drums", "is_drum": True, "program_num": 128, "audio_rendered": True}
PIANO = {"inst_class": "Piano", "is_drum": False, "program_num": 0, "audio_rendered": True}


def tone(hertz: float, seconds: float = SECONDS) -> np.ndarray:
    return (0.2 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def make_piece(folder: Path, stems: dict[str, dict[str, Any]], *, suffix: str = "flac", **metadata: Any) -> Path:
    """A piece whose stems are tones of 100, 200, … Hz and whose mix is their sum."""
    (folder / "stems").mkdir(parents=True)
    waves = {name: tone(100 * (i + 1)) for i, name in enumerate(stems)}
    for name, wave in waves.items():
        soundfile.write(folder / "stems" / f"{name}.{suffix}", wave, RATE)
    soundfile.write(folder / f"mix.{suffix}", sum(waves.values()), RATE)
    (folder / "metadata.yaml").write_text(yaml.safe_dump({"audio_dir": "stems", "stems": stems, **metadata}))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A redux set with one regular piece in `train` and one in `test`."""
    base = tmp_path / "slakh2100_flac_redux"
    make_piece(base / "train" / "Track00001", {"S00": BASS, "S03": DRUMS, "S04": PIANO})
    make_piece(base / "test" / "Track00002", {"S00": BASS, "S01": BASS})
    return tmp_path


def reasons(pieces: Any) -> str:
    return "\n".join(str(problem) for problem in pieces.skipped)


# --- what a regular set gives


def test_pieces_and_splits(root: Path) -> None:
    pieces = slakh.pieces(root)
    assert [(piece.name, piece.split) for piece in pieces] == [("Track00001", "train"), ("Track00002", "test")]
    assert pieces.skipped == ()
    assert slakh.splits(root) == ("train", "test")
    assert [piece.name for piece in slakh.pieces(root, split="test")] == ["Track00002"]
    assert [piece.name for piece in slakh.pieces(root / "slakh2100_flac_redux", "train")] == ["Track00001"]
    assert pieces[0].instruments == ("bass", "drums", "piano")
    assert pieces[0].seconds == SECONDS
    assert pieces[0].licence == "unknown"
    assert pieces.counts() == {"bass": 2, "drums": 1, "piano": 1}


def test_unknown_split_and_root_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no split 'validation'; it has train, test"):
        slakh.pieces(root, split="validation")
    with pytest.raises(FileNotFoundError, match=r"no Slakh layout under .*elsewhere"):
        slakh.pieces(tmp_path / "elsewhere")


def test_reading_a_window(root: Path) -> None:
    piece = slakh.pieces(root)[0]
    mix = piece.mix()
    assert mix.dtype == np.float32
    assert mix.shape == (round(SECONDS * RATE),)
    window = piece.mix(start=0.5, seconds=0.25)
    np.testing.assert_array_equal(window, mix[8000:12000])
    np.testing.assert_allclose(sum(piece.stem(word) for word in piece.instruments), mix, atol=3 / 32768)


def test_stems_of_one_instrument_are_added(root: Path) -> None:
    piece = slakh.pieces(root)[1]
    np.testing.assert_allclose(piece.stem("bass"), tone(100) + tone(200), atol=2 / 32768)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100])
def test_resampling_keeps_the_pitch_and_the_exact_length(root: Path, rate: int) -> None:
    piece = slakh.pieces(root)[0]
    audio = piece.stem("bass", start=0.3, seconds=1.0, sample_rate=rate)
    assert audio.dtype == np.float32
    assert audio.shape == (rate,)
    assert np.argmax(np.abs(np.fft.rfft(audio))) == 100
    assert piece.mix(seconds=0.333, sample_rate=rate).shape == (round(0.333 * rate),)


@pytest.mark.parametrize(("start", "seconds"), [(-0.1, 1.0), (1.5, 1.0), (2.0, None), (0.0, 0.0), (5.0, 1.0)])
def test_a_window_outside_the_piece_is_refused(root: Path, start: float, seconds: float | None) -> None:
    with pytest.raises(ValueError, match=r"Track00001 has 2.000 s"):
        slakh.pieces(root)[0].mix(start, seconds)


def test_an_absent_instrument_is_named(root: Path) -> None:
    with pytest.raises(ValueError, match=r"has no 'flute'; it has bass, drums, piano"):
        slakh.pieces(root)[0].stem("flute")


def test_a_shorter_stem_is_silent_after_its_end(root: Path) -> None:
    piece = slakh.pieces(root)[0]
    soundfile.write(piece.path / "stems" / "S00.flac", tone(100, 1.0), RATE)
    bass = slakh.pieces(root)[0].stem("bass")
    assert bass.shape == piece.mix().shape
    assert not bass[RATE:].any()


def test_stereo_files_become_mono(root: Path) -> None:
    folder = slakh.pieces(root)[0].path
    soundfile.write(folder / "stems" / "S00.flac", np.stack([tone(100), np.zeros_like(tone(100))], axis=1), RATE)
    np.testing.assert_allclose(slakh.pieces(root)[0].stem("bass"), tone(100) / 2, atol=2 / 32768)


# --- irregularities of the real releases


def test_babyslakh_has_wav_files_no_splits_and_wrong_flags(tmp_path: Path) -> None:
    base = tmp_path / "babyslakh_16k"
    unrendered = {**BASS, "audio_rendered": False}
    del unrendered["integrated_loudness"]
    make_piece(base / "Track00001", {"S01": unrendered, "S07": DRUMS}, suffix="wav")
    pieces = slakh.pieces(tmp_path)
    assert reasons(pieces) == ""
    assert pieces[0].split is None
    assert pieces[0].instruments == ("bass", "drums")
    assert [stem.name for stem in pieces[0].stems] == ["S01", "S07"]
    assert slakh.splits(tmp_path) == ()
    with pytest.raises(ValueError, match="has no split 'test'; it has no splits"):
        slakh.pieces(tmp_path, split="test")


def test_another_audio_dir(root: Path) -> None:
    base = root / "slakh2100_flac_redux" / "train"
    moved = make_piece(base / "Track00003", {"S00": BASS, "S01": DRUMS}, midi_dir="midi")
    (moved / "stems").rename(moved / "audio")
    (moved / "metadata.yaml").write_text(
        (moved / "metadata.yaml").read_text().replace("audio_dir: stems", "audio_dir: audio")
    )
    make_piece(base / "Track00004", {"S00": BASS, "S01": DRUMS}, audio_dir="/mnt/render/audio".strip("/"))
    pieces = slakh.pieces(root, "train")
    assert reasons(pieces) == ""
    assert [piece.instruments for piece in pieces[1:]] == [("bass", "drums"), ("bass", "drums")]


def test_a_stem_that_was_never_rendered_is_no_problem(root: Path) -> None:
    base = root / "slakh2100_flac_redux" / "train"
    folder = make_piece(base / "Track00003", {"S00": BASS, "S01": {**PIANO, "audio_rendered": False}})
    (folder / "stems" / "S01.flac").unlink()
    pieces = slakh.pieces(root, "train")
    assert reasons(pieces) == ""
    assert pieces[1].instruments == ("bass",)


def test_classes_keep_slakhs_names(root: Path) -> None:
    stems = {
        "S00": {"inst_class": "Strings (continued)", "program_num": 49, "is_drum": False},
        "S01": {"inst_class": "Strings (continued)", "program_num": 53, "is_drum": False},
        "S02": {"inst_class": "Sound Effects", "program_num": 99, "is_drum": False},
        "S03": {"inst_class": "Sound effects", "program_num": 122, "is_drum": False},
        "S04": {"inst_class": "Theremin", "is_drum": False},
        "S05": {"program_num": 73},
    }
    make_piece(root / "slakh2100_flac_redux" / "test" / "Track00009", stems)
    piece = slakh.pieces(root, "test")[1]
    assert [(stem.inst_class, stem.instrument) for stem in piece.stems] == [
        ("Strings (continued)", "strings"),
        ("Strings (continued)", "choir"),
        ("Sound Effects", "synth"),
        ("Sound effects", "effects"),
        ("Theremin", "other"),
        ("Pipe", "flute"),
    ]


def test_the_class_table() -> None:
    words = [slakh.instrument(slakh.inst_class(p, False), p) for p in range(128)]
    first = {0: "piano", 8: "bells", 16: "organ", 24: "guitar", 32: "bass", 40: "strings", 48: "strings", 56: "brass"}
    first |= {64: "reed", 72: "flute", 80: "synth", 88: "synth", 104: "ethnic", 112: "percussion", 119: "effects"}
    assert {p: words[p] for p in first} == first
    assert set(words) <= set(slakh.WORDS)
    assert "other" not in words
    assert slakh.instrument(slakh.inst_class(5, True), 5, True) == "drums"
    for program in (-1, 128):
        with pytest.raises(ValueError, match=f"not {program}"):
            slakh.inst_class(program, False)


# --- damage is reported, skipped and counted


def cut_off(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def overwrite(path: Path) -> None:
    path.write_bytes(b"this is no audio")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(
            (name, damage)
            for name in ("mix.flac", "stems/S03.flac")
            for damage in (cut_off, overwrite, empty, Path.unlink)
        ),
        *(("metadata.yaml", damage) for damage in (overwrite, empty, Path.unlink)),  # half of a YAML file may be YAML
    ],
)
def test_a_damaged_file_costs_one_piece(root: Path, name: str, damage: Any) -> None:
    folder = root / "slakh2100_flac_redux" / "train" / "Track00001"
    damage(folder / name)
    pieces = slakh.pieces(root)
    assert [piece.name for piece in pieces] == ["Track00002"]
    assert len(pieces.skipped) == 1
    assert pieces.skipped[0].path == folder
    assert Path(name).stem in pieces.skipped[0].reason


def test_partial_keeps_a_piece_with_a_damaged_stem(root: Path) -> None:
    overwrite(root / "slakh2100_flac_redux" / "train" / "Track00001" / "stems" / "S03.flac")
    pieces = slakh.pieces(root, partial=True)
    assert [piece.instruments for piece in pieces] == [("bass", "piano"), ("bass",)]
    assert "S03.flac cannot be decoded" in reasons(pieces)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1, 2]", "holds a list, not a mapping"),
        ("stems: [S00]", "`stems` in metadata.yaml is list"),
        ("stems: {S00: 3}", "stem 'S00' in metadata.yaml is int"),
        ("stems: {}", "none of its stems"),
        ("a: [", "is not YAML"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
        ("stems: {S00: {is_drum: false}}", "neither inst_class nor program_num"),
        ("x: " + "y" * slakh.METADATA_BYTES, "over the limit"),
        ("[" * 5000, "is not YAML"),
    ],
)
def test_metadata_that_makes_no_sense(root: Path, text: str, reason: str) -> None:
    (root / "slakh2100_flac_redux" / "train" / "Track00001" / "metadata.yaml").write_text(text)
    pieces = slakh.pieces(root)
    assert [piece.name for piece in pieces] == ["Track00002"]
    assert reason in reasons(pieces)


def test_sample_rates_must_agree(root: Path) -> None:
    soundfile.write(root / "slakh2100_flac_redux" / "train" / "Track00001" / "stems" / "S00.flac", tone(100), 8_000)
    assert "'S00' has 8000 Hz, its mix 16000 Hz" in reasons(slakh.pieces(root))


def test_damage_after_the_scan_names_the_file(root: Path) -> None:
    piece = slakh.pieces(root)[0]
    overwrite(piece.mix_path)
    with pytest.raises(DamagedAudio, match=r"mix.flac cannot be decoded"):
        piece.mix()


# --- names from the metadata stay inside the piece's folder

OUTSIDE = ["../secret", "/etc", "stems/../../secret", "..\\secret", "C:\\secret", "\\\\host\\share", "\0", ".."]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("key", ["audio_dir", "midi_dir"])
def test_a_folder_outside_is_refused(root: Path, key: str, name: str) -> None:
    make_piece(root / "slakh2100_flac_redux" / "train" / "Track00005", {"S00": BASS, "S01": DRUMS}, **{key: name})
    pieces = slakh.pieces(root)
    assert "Track00005" not in [piece.name for piece in pieces]
    assert f"{key} {name!r} leads out of the piece's folder" in reasons(pieces)


@pytest.mark.parametrize("name", ["../../Track00002/stems/S00", "/etc/passwd", "..\\S00"])
def test_a_stem_outside_is_refused(root: Path, name: str) -> None:
    folder = root / "slakh2100_flac_redux" / "train" / "Track00001"
    (folder / "metadata.yaml").write_text(yaml.safe_dump({"stems": {"S00": BASS, name: DRUMS}}))
    pieces = slakh.pieces(root)
    assert "Track00001" not in [piece.name for piece in pieces]
    assert f"stem {name!r} leads out of the piece's folder" in reasons(pieces)


@pytest.mark.parametrize("name", ["stems", "stems/S00.flac", "mix.flac", "metadata.yaml"])
def test_a_link_that_leads_outside_is_refused(root: Path, tmp_path: Path, name: str) -> None:
    folder = root / "slakh2100_flac_redux" / "train" / "Track00001"
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside, target_is_directory=outside.is_dir())
    pieces = slakh.pieces(root)
    assert "Track00001" not in [piece.name for piece in pieces]
    assert "leads out of the piece's folder through a link" in reasons(pieces)


def test_a_link_inside_and_a_linked_set_are_read(root: Path, tmp_path: Path) -> None:
    folder = root / "slakh2100_flac_redux" / "train" / "Track00001"
    (folder / "stems").rename(folder / "audio")
    (folder / "stems").symlink_to("audio")
    (tmp_path / "link").symlink_to(root / "slakh2100_flac_redux")
    pieces = slakh.pieces(tmp_path / "link")
    assert reasons(pieces) == ""
    assert len(pieces) == 2


# --- the package


def test_importing_the_reader_is_cheap() -> None:
    code = (
        "import sys, numpy, aiba_eval; before = set(sys.modules); import aiba_eval.datasets, json; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert not loaded & {"librosa", "soundfile", "soxr", "scipy", "yaml", "mido", "torch"}


@pytest.fixture(scope="module")
def pieces() -> Any:
    return slakh.pieces(freedoom_root())


class TestShippedSet:
    """The set in the package: enough pieces, instruments that sound, stems that add up, licences, size."""

    def test_what_it_holds(self, pieces: Any) -> None:
        assert pieces.skipped == ()
        assert len(pieces) >= 12
        assert len(slakh.pieces(freedoom_root(), "test")) >= 10
        for piece in pieces:
            assert piece.sample_rate == 16_000
            assert piece.seconds == pytest.approx(10.24)
            assert {"bass", "drums"} < set(piece.instruments)
            assert {"guitar", "piano", "strings", "organ"} & set(piece.instruments)
            assert piece.source in ("freedoom", "freedm")
            assert piece.licence.startswith("BSD-3-Clause")

    def test_three_instruments_sound_in_each_piece(self, pieces: Any) -> None:
        # in at least a quarter of all tenths of a second no more than 30 dB below the mix
        for piece in pieces:
            floor = np.sqrt(np.mean(piece.mix() ** 2)) * 10 ** (-30 / 20)
            sounding = 0
            for word in piece.instruments:
                frames = piece.stem(word)[:163_200].reshape(-1, 1600)
                sounding += np.mean(np.sqrt(np.mean(frames**2, axis=1)) > floor) > 0.25
            assert sounding >= 3, piece.name

    def test_stems_add_up_to_the_mix(self, pieces: Any) -> None:
        for piece in pieces:
            total = np.sum([piece.stem(word) for word in piece.instruments], axis=0)
            np.testing.assert_allclose(total, piece.mix(), rtol=0, atol=1e-6)

    def test_bass_is_low_and_drums_reach_high(self, pieces: Any) -> None:
        frequencies = np.fft.rfftfreq(163_840, 1 / 16_000)
        for piece in pieces:
            centroid = {}
            for word in ("bass", "drums"):
                power = np.abs(np.fft.rfft(piece.stem(word))) ** 2
                share = np.cumsum(power) / power.sum()
                centroid[word] = frequencies[np.searchsorted(share, 0.95)]
            assert centroid["bass"] < centroid["drums"], piece.name

    def test_notice_and_size(self) -> None:
        notice = (freedoom_root() / "NOTICE").read_text(encoding="utf-8")
        for text in (
            "Contributors to the Freedoom project",
            "Redistributions in binary form must reproduce",
            "CREDITS",
            "Frank Wen",
            "Permission is hereby granted, free of charge",
        ):
            assert text in notice
        assert sum(path.stat().st_size for path in freedoom_root().rglob("*") if path.is_file()) < 6_000_000

    def test_the_script_names_the_same_pieces(self, pieces: Any) -> None:
        script = (Path(__file__).parent.parent / "examples" / "render_freedoom_set.py").read_text(encoding="utf-8")
        for piece in pieces:
            metadata = yaml.safe_load((piece.path / "metadata.yaml").read_text(encoding="utf-8"))
            assert f'"{metadata["lmd_midi_dir"]}"' in script
