"""Rendering stem sets: sources, MIDI, tunes, and the set on disk.

A small synthesiser of sines stands in for the real ones, so that nothing has to be installed; it is linear and dry as they are.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import stat
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import mido
import numpy as np
import pytest
import soundfile
import yaml

from aiba_eval.datasets import slakh
from aiba_eval.stems import (
    MalformedMidi,
    MalformedWad,
    MissingDependency,
    Progress,
    RenderSummary,
    Source,
    StemsError,
    midi,
    render,
    sources,
    synth,
    tunes,
)

RATE = 16_000
BEAT = 480


class Sines:
    """An engine of decaying sines; drums are bursts. Counts what it renders."""

    name = "sines 1"
    soundfont = "sines"
    licence = "CC0-1.0"
    notice = "No rights are reserved in these sines.\n"

    def __init__(self) -> None:
        self.rendered = 0

    def render(self, path: Path, sample_rate: int) -> np.ndarray:
        self.rendered += 1
        score = midi.read(path.read_bytes())
        audio = np.zeros(round((score.length + 0.5) * sample_rate), dtype=np.float32)
        for note in score.notes:
            first = round(score.seconds(note.start) * sample_rate)
            time = np.arange(round((score.seconds(note.end) - score.seconds(note.start)) * sample_rate)) / sample_rate
            if note.program == midi.DRUM_PROGRAM:
                wave = np.random.default_rng(note.pitch).standard_normal(len(time)) * np.exp(-40 * time)
            else:
                wave = np.sin(2 * np.pi * 440 * 2 ** ((note.pitch - 69) / 12) * time) * np.exp(-4 * time)
            audio[first : first + len(time)] += (wave * note.velocity / 1000)[: len(audio) - first]
        return audio


def melody(seed: int, length: int = 120) -> list[int]:
    """A random walk, which no other seed's resembles."""
    chance = random.Random(seed)
    pitches = [60]
    while len(pitches) < length:
        pitches.append(min(84, max(40, pitches[-1] + chance.choice([-7, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 7]))))
    return pitches


def song(
    pitches: Iterable[int],
    *,
    programs: tuple[int, ...] = (0, 33),
    drums: bool = True,
    transpose: int = 0,
    tempo: int = 500_000,
    step: int = BEAT // 2,
) -> bytes:
    """One track per program with the melody (octaves apart), and a drum track."""
    pitches = list(pitches)
    file = mido.MidiFile(ticks_per_beat=BEAT)
    head = mido.MidiTrack([mido.MetaMessage("set_tempo", tempo=tempo)])
    file.tracks.append(head)
    for channel, program in enumerate(programs):
        track = mido.MidiTrack([mido.Message("program_change", channel=channel, program=program)])
        for pitch in pitches:
            note = pitch + transpose - 12 * (channel % 2)
            track.append(mido.Message("note_on", channel=channel, note=note, velocity=90))
            track.append(mido.Message("note_off", channel=channel, note=note, time=step))
        file.tracks.append(track)
    if drums:
        track = mido.MidiTrack()
        for index in range(len(pitches)):
            track.append(mido.Message("note_on", channel=9, note=36 + 2 * (index % 2), velocity=100))
            track.append(mido.Message("note_off", channel=9, note=36 + 2 * (index % 2), time=step))
        file.tracks.append(track)
    return save(file)


def save(file: mido.MidiFile) -> bytes:
    buffer = io.BytesIO()
    file.save(file=buffer)
    return buffer.getvalue()


def track(*messages: mido.Message | mido.MetaMessage) -> midi.Score:
    """A score from one track of messages with relative times."""
    file = mido.MidiFile(type=0, ticks_per_beat=BEAT)
    file.tracks.append(mido.MidiTrack(messages))
    return midi.read(save(file))


@pytest.fixture
def music(tmp_path: Path) -> Source:
    """Four tunes of about three seconds, one of them in two arrangements, and a file that is no MIDI."""
    folder = tmp_path / "music"
    folder.mkdir()
    for name, seed in (("a", 1), ("b", 2), ("c", 3), ("d", 4)):
        (folder / f"{name}.mid").write_bytes(song(melody(seed), step=60))
    (folder / "b-for-organ.mid").write_bytes(song(melody(2), programs=(19, 32, 48), transpose=3, step=60))
    (folder / "broken.mid").write_bytes(b"MThd but nothing else")
    return Source.folder(folder, licence="CC0-1.0", notice="These tunes are anybody's.")


def render_music(out: Path, music: Source, **options: object) -> RenderSummary:
    options = {"engine": Sines(), "sample_rate": RATE, "jobs": 2} | options
    return render(out, sources=[music], **options)  # type: ignore[arg-type]


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# --- WAD


def wad(lumps: dict[str, bytes], magic: bytes = b"IWAD") -> bytes:
    body, directory = b"", b""
    for name, data in lumps.items():
        directory += struct.pack("<ii8s", 12 + len(body), len(data), name.encode())
        body += data
    return struct.pack("<4sii", magic, len(lumps), 12 + len(body)) + body + directory


def test_a_wads_music(tmp_path: Path) -> None:
    path = tmp_path / "a.wad"
    tune = song(melody(1))
    path.write_bytes(wad({"PLAYPAL": b"\0" * 10, "D_E1M1": tune, "D_MUS": b"MUS\x1a", "D_LONGNA": tune, "EMPTY": b""}))
    assert dict(sources.wad_lumps(path))["PLAYPAL"] == b"\0" * 10
    assert sources.wad_music(path) == [("D_E1M1", tune), ("D_LONGNA", tune)]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"IWAD", "4 bytes are too few"),
        (b"PK\3\4" + b"\0" * 20, "not with IWAD or PWAD"),
        (struct.pack("<4sii", b"IWAD", -1, 12), "directory of -1 lumps"),
        (struct.pack("<4sii", b"IWAD", 1, 12), "directory of 1 lumps at 12"),
        (struct.pack("<4sii", b"PWAD", 2**30, 12), "does not lie inside"),
        (struct.pack("<4sii", b"IWAD", 0, -5), "directory of 0 lumps at -5"),
        (
            struct.pack("<4sii", b"IWAD", 1, 12) + struct.pack("<ii8s", 12, 17, b"D_E1M1"),
            "lump D_E1M1 (17 bytes at 12)",
        ),
        (struct.pack("<4sii", b"IWAD", 1, 12) + struct.pack("<ii8s", -1, 4, b"D_E1M1"), "lump D_E1M1 (4 bytes at -1)"),
        (struct.pack("<4sii", b"IWAD", 1, 12) + struct.pack("<ii8s", 0, -4, b"D_E1M1"), "lump D_E1M1 (-4 bytes at 0)"),
    ],
)
def test_a_malformed_wad_says_what_is_wrong(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "bad.wad"
    path.write_bytes(data)
    with pytest.raises(MalformedWad) as caught:
        sources.wad_lumps(path)
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_folder_of_wads_and_midi_without_copies(tmp_path: Path) -> None:
    (tmp_path / "x.mid").write_bytes(song(melody(1)))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "same.mid").write_bytes(song(melody(1)))
    (tmp_path / "y.wad").write_bytes(wad({"D_A": song(melody(2)), "D_B": song(melody(1))}))
    source = Source.folder(tmp_path, licence="CC0-1.0")
    assert [piece.label for piece in sources.read([source], tmp_path)] == ["sub/same.mid", "y.wad/D_A"]


# --- MIDI


def test_parts_hold_every_note_once() -> None:
    score = midi.read(song(melody(5), programs=(0, 33, 33, 48)))
    parts = score.parts()
    assert [(part.instrument, count) for part, count in parts.items()] == [
        ("piano", 120),
        ("bass", 120),
        ("bass", 120),
        ("strings", 120),
        ("drums", 120),
    ]
    alone = [note for part in parts for note in midi.read(midi.write(score, [part])).notes]
    assert sorted(alone) == sorted(score.notes)
    assert sorted(midi.read(midi.write(score, parts)).notes) == sorted(score.notes)


def test_a_channel_that_changes_its_program_is_two_parts() -> None:
    score = track(
        mido.Message("control_change", control=7, value=90),
        mido.Message("program_change", program=24),
        mido.Message("note_on", note=60),
        mido.Message("program_change", program=73, time=100),  # the guitar's note is still sounding
        mido.Message("note_off", note=60, time=10),
        mido.Message("note_on", note=62),
        mido.Message("note_off", note=62, time=50),
    )
    guitar, flute = score.parts()
    assert (guitar.instrument, flute.instrument) == ("guitar", "flute")
    assert [(n.start, n.end, n.pitch) for n in midi.read(midi.write(score, [guitar])).notes] == [(0, 110, 60)]
    written = mido.MidiFile(file=io.BytesIO(midi.write(score, [flute])))
    assert [m.program for m in written.tracks[0] if m.type == "program_change"] == [73]
    assert [m.value for m in written.tracks[0] if m.is_cc(7)] == [90]


def test_hanging_repeated_and_empty_notes() -> None:
    score = track(
        mido.Message("note_on", note=60),
        mido.Message("note_on", note=60, time=10),
        mido.Message("note_off", note=60, time=10),
        mido.Message("note_on", note=64),
        mido.Message("note_off", note=64),
        mido.Message("note_on", note=67, velocity=0, time=20),
    )
    assert [(note.start, note.end, note.pitch) for note in score.notes] == [(0, 20, 60), (10, 21, 60), (20, 21, 64)]


def test_the_tempo_map_goes_both_ways() -> None:
    score = track(
        mido.MetaMessage("set_tempo", tempo=1_000_000),
        mido.Message("note_on", note=60),
        mido.MetaMessage("set_tempo", tempo=250_000, time=2 * BEAT),
        mido.Message("note_off", note=60, time=4 * BEAT),
    )
    assert score.length == pytest.approx(3.0)
    assert score.seconds(3 * BEAT) == pytest.approx(2.25)
    for tick in range(0, 6 * BEAT, 7):
        assert score.tick(score.seconds(tick)) == tick


def test_a_meaningless_key_signature_is_read() -> None:
    data = song(melody(1))
    at = data.index(b"\xff\x51")
    length = struct.unpack(">I", data[at - 5 : at - 1])[0]
    data = data[: at - 5] + struct.pack(">I", length + 6) + data[at - 1 : at] + b"\xff\x59\x02\x01\xff\0" + data[at:]
    with pytest.raises(mido.midifiles.KeySignatureError):
        mido.MidiFile(file=io.BytesIO(data))
    assert midi.read(data).notes == midi.read(song(melody(1))).notes


@pytest.mark.parametrize("data", [b"", b"MThd", b"RIFF" + b"\0" * 100, song([])[:-4], song([], drums=False)])
def test_what_is_no_midi_is_one_kind_of_error(data: bytes) -> None:
    with pytest.raises(MalformedMidi):
        midi.read(data)


def test_a_file_that_claims_days_is_refused() -> None:
    file = mido.MidiFile(type=0, ticks_per_beat=1)
    on, off = mido.Message("note_on", note=60), mido.Message("note_off", note=60, time=1_000_000)
    file.tracks.append(mido.MidiTrack([on, off]))
    with pytest.raises(MalformedMidi, match="lasts 500000 s, over the limit of 3600"):
        midi.read(save(file))


def test_a_cut_begins_in_the_state_of_its_time() -> None:
    score = track(
        mido.MetaMessage("set_tempo", tempo=1_000_000),
        mido.Message("control_change", control=7, value=10),
        mido.Message("control_change", control=101, value=0),
        mido.Message("control_change", control=100, value=0),
        mido.Message("control_change", control=6, value=12),
        mido.Message("program_change", program=33),
        mido.Message("note_on", note=40),
        mido.Message("control_change", control=7, value=99, time=BEAT),
        mido.Message("note_on", channel=9, note=49),
        mido.MetaMessage("set_tempo", tempo=500_000, time=BEAT),
        mido.Message("note_off", note=40, time=2 * BEAT),
        mido.Message("note_off", channel=9, note=49),
        mido.Message("note_on", note=43),
        mido.Message("note_off", note=43, time=8 * BEAT),
    )
    cut = midi.cut(score, 2.5, 2.0)
    # the bass that sounds is struck again, the cymbal is not; the last note ends with the window
    assert [(n.pitch, cut.seconds(n.start), cut.seconds(n.end)) for n in cut.notes] == [(40, 0.0, 0.5), (43, 0.5, 2.0)]
    controls = [m for tick, m in cut.events if tick == 0 and m.type == "control_change"]
    assert [(m.control, m.value) for m in controls] == [(101, 0), (100, 0), (6, 12), (7, 99)]
    assert [m.tempo for _, m in cut.events if m.type == "set_tempo"] == [500_000]
    assert [m.program for _, m in cut.events if m.type == "program_change"] == [33]


def test_the_busiest_window_is_where_most_instruments_play() -> None:
    file = mido.MidiFile(ticks_per_beat=BEAT)
    for channel, (program, first, beats) in enumerate([(0, 0, 40), (33, 10, 20), (48, 16, 10), (73, 38, 2)]):
        change = mido.Message("program_change", channel=channel, program=program)
        on = mido.Message("note_on", channel=channel, note=60, time=first * BEAT)
        off = mido.Message("note_off", channel=channel, note=60, time=beats * BEAT)
        file.tracks.append(mido.MidiTrack([change, on, off]))
    score = midi.read(save(file))  # two beats a second: all three long ones play from 8 s to 13 s
    assert midi.busiest(score, 4.0) == 8.0
    assert midi.busiest(score, 30.0) == 0.0
    assert midi.busiest(midi.only(score, ["piano", "flute"]), 2.0) == 18.0


# --- tunes


def test_variants_of_a_tune_are_one_tune() -> None:
    tune = melody(1)
    chance = random.Random(0)
    ornamented = [pitch + chance.choice([-1, 1]) if chance.random() < 0.1 else pitch for pitch in tune]
    variants = [
        song(tune),
        song(tune, transpose=-5),
        song(tune, programs=(73,), drums=False),
        song(tune, tempo=300_000, step=BEAT),
        song(tune[:60]),
        song(melody(50, 60) + tune[20:]),
        song(ornamented),
    ]
    others = [song(melody(seed)) for seed in range(100, 130)]
    runs = [tunes.runs(midi.read(data)) for data in variants + others]
    firsts = tunes.cluster(runs)
    assert firsts[: len(variants)] == [0] * len(variants)
    assert firsts[len(variants) :] == list(range(len(variants), len(runs)))
    assert tunes.similarity(runs[0], runs[1]) == 1.0


def test_what_occurs_everywhere_makes_no_tune() -> None:
    trill, scale = [60, 62] * 60, [60 + i % 20 for i in range(120)]
    runs = [tunes.runs(midi.read(song(pitches))) for pitches in (trill, trill[:80], scale, [60] * 120)]
    assert tunes.cluster(runs) == [0, 1, 2, 3]


def test_likeness_is_passed_on() -> None:
    a, b = melody(1), melody(2)
    pieces = [tunes.runs(midi.read(song(pitches))) for pitches in (a, b, a[:90] + b[:90])]
    assert tunes.similarity(pieces[0], pieces[1]) == 0.0
    assert tunes.cluster(pieces) == [0, 0, 0]


def test_splits_are_60_20_20_and_a_tunes_own() -> None:
    digests = [hashlib.md5(str(i).encode()).hexdigest() for i in range(5000)]
    counts = {split: [tunes.split_of([d]) for d in digests].count(split) / 5000 for split in slakh.SPLITS[:3]}
    assert counts == pytest.approx({"train": 0.6, "validation": 0.2, "test": 0.2}, abs=0.03)
    assert tunes.split_of(digests[:9]) == tunes.split_of(digests[8::-1]) == tunes.split_of([min(digests[:9])])


# --- the set on disk


def test_the_set_reads_back(tmp_path: Path, music: Source) -> None:
    told: list[Progress] = []
    summary = render_music(tmp_path / "set", music, progress=told.append)
    pieces = slakh.pieces(tmp_path / "set")
    assert pieces.skipped == ()
    assert (summary.rendered, summary.kept, len(pieces), summary.tunes) == (5, 0, 5, 4)
    assert [label for label, _ in summary.skipped] == ["music/broken.mid"]
    assert summary.seconds == pytest.approx(sum(piece.seconds for piece in pieces))
    assert summary.splits == {s: sum(p.split == s for p in pieces) for s in slakh.splits(tmp_path / "set")}
    assert [(p.done, p.total, p.state) for p in told] == [(i, 5, "rendered") for i in range(1, 6)]
    by_source = {yaml.safe_load((p.path / "metadata.yaml").read_text())["source_label"]: p for p in pieces}
    organ = by_source["b-for-organ.mid"]
    assert organ.instruments == ("bass", "drums", "organ", "strings")
    assert (organ.licence, organ.source) == ("CC0-1.0", "music")
    assert organ.split == by_source["b.mid"].split
    assert all(stem.midi is not None for piece in pieces for stem in piece.stems)
    # whole pieces keep their file and have two seconds for their last notes
    assert (organ.path / "all_src.mid").read_bytes() == song(melody(2), programs=(19, 32, 48), transpose=3, step=60)
    assert organ.seconds == pytest.approx(120 * 60 / BEAT * 0.5 + 2.0)


@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize("balance", ["slakh", "midi"])
@pytest.mark.parametrize("bits", [16, 11])
def test_stems_add_up_to_the_mix_exactly(tmp_path: Path, music: Source, rate: int, balance: str, bits: int) -> None:
    render_music(tmp_path, music, sample_rate=rate, balance=balance, bits=bits, max_pieces=1, max_seconds=2)
    (piece,) = slakh.pieces(tmp_path)
    mix, _ = soundfile.read(piece.mix_path, dtype="int16")
    stems = [soundfile.read(stem.path, dtype="int16")[0] for stem in piece.stems]
    np.testing.assert_array_equal(np.sum(stems, axis=0), mix)
    assert mix.shape == (2 * rate,)
    assert not (mix % 2 ** (16 - bits)).any()
    assert max(np.abs(wave.astype(int)).max() for wave in [mix, *stems]) == pytest.approx(
        32768 * 10 ** (-1 / 20), abs=2 ** (17 - bits) * len(stems)
    )


def test_slakhs_balance_makes_stems_equally_loud(tmp_path: Path, music: Source) -> None:
    import pyloudnorm

    levels = {}
    for balance in ("slakh", "midi"):
        render_music(tmp_path / balance, music, balance=balance, max_pieces=1)
        (piece,) = slakh.pieces(tmp_path / balance)
        meter = pyloudnorm.Meter(RATE)
        levels[balance] = [meter.integrated_loudness(piece.stem(word).astype(float)) for word in piece.instruments]
    assert np.ptp(levels["slakh"]) < 0.1
    assert np.ptp(levels["midi"]) > 1.0


def test_a_silent_part_has_no_audio(tmp_path: Path, music: Source) -> None:
    class Mute(Sines):
        def render(self, path: Path, sample_rate: int) -> np.ndarray:
            return super().render(path, sample_rate) * (path.stem != "S01")

    render_music(tmp_path, music, engine=Mute(), max_pieces=1)
    (piece,) = slakh.pieces(tmp_path)
    assert slakh.pieces(tmp_path).skipped == ()
    assert [stem.name for stem in piece.stems] == ["S00", "S02"]
    metadata = yaml.safe_load((piece.path / "metadata.yaml").read_text())
    assert metadata["stems"]["S01"]["audio_rendered"] is False
    assert not (piece.path / "stems" / "S01.flac").exists()


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path, music: Source) -> None:
    render_music(tmp_path / "one", music, jobs=1)
    render_music(tmp_path / "two", music, jobs=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_licences_and_index(tmp_path: Path, music: Source) -> None:
    render_music(tmp_path, music)
    notice = (tmp_path / "NOTICE").read_text()
    assert "These tunes are anybody's." in notice
    assert "No rights are reserved in these sines." in notice
    index = json.loads((tmp_path / "index.json").read_text())
    assert len(index["multitracks"]) == 5
    named = [file for track in index["tracks"].values() for file in track.values()]
    named += [piece[key] for piece in index["multitracks"].values() for key in ("midi", "mix", "metadata")]
    for path, digest in named:
        assert hashlib.md5((tmp_path / path).read_bytes()).hexdigest() == digest
    for text in (path.read_text() for path in tmp_path.rglob("*") if path.suffix in (".yaml", ".json")):
        assert str(tmp_path) not in text


def test_a_finished_piece_is_not_rendered_again(tmp_path: Path, music: Source) -> None:
    first = render_music(tmp_path, music, max_pieces=2)
    engine = Sines()
    again = render_music(tmp_path, music, max_pieces=2, engine=engine)
    assert (first.rendered, again.rendered, again.kept, engine.rendered) == (2, 0, 2, 0)
    assert again.seconds == first.seconds
    rest = render_music(tmp_path, music, engine=engine)
    assert (rest.rendered, rest.kept) == (3, 2)


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, music: Source) -> None:
    render_music(tmp_path / "whole", music)
    script = textwrap.dedent(f"""
        import os, signal
        from tests.test_stems import Sines, Source, render_music
        class Killed(Sines):
            def render(self, path, sample_rate):
                if self.rendered == 7:  # in the middle of the third piece
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().render(path, sample_rate)
        music = Source.folder({str(music.root)!r}, licence="CC0-1.0", notice="These tunes are anybody's.")
        render_music({str(tmp_path / "set")!r}, music, engine=Killed(), jobs=1)
    """)
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    left = [path.name for path in (tmp_path / "set").iterdir() if path.name.startswith(".partial")]
    assert left == [".partial-Track00003"]
    assert len(slakh.pieces(tmp_path / "set")) == 2
    summary = render_music(tmp_path / "set", music)
    assert (summary.kept, summary.rendered) == (2, 3)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_an_engine_that_fails_leaves_nothing_half_written(tmp_path: Path, music: Source) -> None:
    class Fails(Sines):
        def render(self, path: Path, sample_rate: int) -> np.ndarray:
            raise StemsError("the engine broke")

    with pytest.raises(StemsError, match="the engine broke"):
        render_music(tmp_path, music, engine=Fails())
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "music") == ["NOTICE", "settings.json"]


def test_what_a_killed_run_left_is_cleared(tmp_path: Path, music: Source) -> None:
    (tmp_path / "set" / ".partial-Track00001" / "stems").mkdir(parents=True)
    (tmp_path / "set" / ".partial-index.json").write_text("{")
    summary = render_music(tmp_path / "set", music)
    assert summary.rendered == 5
    assert not [path for path in (tmp_path / "set").iterdir() if path.name.startswith(".")]


def test_sources_without_a_readable_file(tmp_path: Path) -> None:
    (tmp_path / "music").mkdir()
    with pytest.raises(StemsError, match=r"nothing under .*music matches \*\*/\*.mid"):
        render_music(tmp_path / "set", Source.folder(tmp_path / "music", licence="CC0-1.0"))
    (tmp_path / "music" / "broken.mid").write_bytes(b"MThd")
    with pytest.raises(StemsError, match="none of the 1 MIDI files of music can be read"):
        render_music(tmp_path / "set", Source.folder(tmp_path / "music", licence="CC0-1.0"))


def test_other_settings_need_another_folder(tmp_path: Path, music: Source) -> None:
    render_music(tmp_path, music, max_pieces=1)
    with pytest.raises(StemsError, match="was rendered with balance = 'slakh', not 'midi'"):
        render_music(tmp_path, music, balance="midi")
    (tmp_path / "settings.json").unlink()
    with pytest.raises(StemsError, match="holds a set without settings.json"):
        render_music(tmp_path, music)


def test_require_only_and_windows(tmp_path: Path, music: Source) -> None:
    summary = render_music(tmp_path / "organ", music, require=("bass", "organ|flute"))
    assert summary.rendered == 1
    assert ("music/a.mid", "has no flute or organ") in summary.skipped

    only = {"music/a.mid": ["bass", "drums"], "music/b-for-organ.mid": ["organ", "strings"]}
    render_music(tmp_path / "only", music, only=only, max_seconds=1.5, start_seconds="busiest")
    pieces = slakh.pieces(tmp_path / "only")
    assert sorted(piece.instruments for piece in pieces) == [("bass", "drums"), ("organ", "strings")]
    assert {piece.seconds for piece in pieces} == {1.5}
    # the notes on disk are those of the window
    for piece in pieces:
        score = midi.read((piece.path / "all_src.mid").read_bytes())
        assert score.length <= 1.5
        assert sorted(score.notes) == sorted(n for s in piece.stems for n in midi.read(s.midi.read_bytes()).notes)

    late = render_music(tmp_path / "late", music, start_seconds=60.0)
    assert late.rendered == 0
    assert all("before start_seconds = 60" in reason or "MIDI" in reason for _, reason in late.skipped)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_rate": 8000}, "16000, 44100, not 8000"),
        ({"max_seconds": 0.1}, "not 0.1"),
        ({"start_seconds": -1}, "not -1"),
        ({"start_seconds": "busiest"}, "needs max_seconds"),
        ({"start_seconds": "loudest"}, "not 'loudest'"),
        ({"balance": "loud"}, "not 'loud'"),
        ({"bits": 24}, "not 24"),
        ({"require": ["kazoo"]}, "'kazoo' is no instrument; there are bass"),
        ({"only": ["music/z.mid"]}, "no piece 'music/z.mid'; labels look like 'music/a.mid'"),
        ({"engine": "kazoo"}, "no engine 'kazoo'; there are 'fluidsynth' and 'tinysoundfont'"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, music: Source, options: dict[str, object], message: str) -> None:
    with pytest.raises(StemsError) as caught:
        render_music(tmp_path / "set", music, **options)
    assert message in str(caught.value)
    assert not (tmp_path / "set").exists()


def test_an_unknown_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(StemsError, match="no source 'doom'; there are freedoom, freedm"):
        render(tmp_path, sources=["doom"], engine=Sines())
    assert sources.find("openttd-openmsx") is sources.SOURCES["openmsx"]


# --- what is missing is named, with the command that installs it


def script(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text("#!/bin/sh\n" + textwrap.dedent(text))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which programs are looked for before all others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_no_fluidsynth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingDependency, match="fluidsynth is missing: apt-get install fluidsynth fluid-soundfont-gm"):
        synth.engine("fluidsynth")


def test_no_soundfont(programs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script(programs, "fluidsynth", "echo FluidSynth runtime version 9.9.9")
    with pytest.raises(MissingDependency, match=r"no soundfont at .*my.sf2: apt-get install fluid-soundfont-gm"):
        synth.engine("fluidsynth", tmp_path / "my.sf2")
    monkeypatch.setattr(synth, "SOUNDFONTS", ())
    with pytest.raises(MissingDependency, match="no General MIDI soundfont is installed: apt-get install"):
        synth.engine("fluidsynth")
    (tmp_path / "my.sf2").touch()
    assert synth.engine("fluidsynth", tmp_path / "my.sf2").name == "fluidsynth 9.9.9"


def test_no_tinysoundfont(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="pip install --no-deps tinysoundfont"):
        synth.engine("tinysoundfont")


def test_fluidsynth_that_fails_says_why(programs: Path, tmp_path: Path) -> None:
    script(programs, "fluidsynth", "echo no such preset >&2; exit 3")
    (tmp_path / "my.sf2").touch()
    (tmp_path / "a.mid").touch()
    with pytest.raises(StemsError, match=r"could not render a.mid: no such preset"):
        synth.engine("fluidsynth", tmp_path / "my.sf2").render(tmp_path / "a.mid", RATE)


# stands in for a package that no machine has installed
DOOM = Source("aiba-doom", "aiba-doom", ("usr/share/games/aiba-doom/*.mid",), "BSD-3-Clause")


def test_no_apt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingDependency, match="apt-get is missing: apt-get install aiba-doom"):
        sources.locate(DOOM, tmp_path)


def test_a_package_that_cannot_be_fetched(programs: Path, tmp_path: Path) -> None:
    script(programs, "apt-get", 'echo "E: Unable to locate package $2" >&2; exit 100')
    script(programs, "dpkg-deb", "exit 1")
    with pytest.raises(MissingDependency) as caught:
        sources.locate(DOOM, tmp_path / "cache")
    assert "Unable to locate package aiba-doom" in str(caught.value)
    assert "apt-get update && apt-get install aiba-doom" in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_fetched_package_is_read_and_kept(programs: Path, tmp_path: Path) -> None:
    (tmp_path / "tune.mid").write_bytes(song(melody(1), step=60))
    script(programs, "apt-get", 'echo "$1 $2" >> "$0.log"; : > "$2_1_all.deb"')
    script(
        programs,
        "dpkg-deb",
        f"""
        mkdir -p "$3/usr/share/games/aiba-doom" "$3/usr/share/doc/aiba-doom"
        cp {tmp_path}/tune.mid "$3/usr/share/games/aiba-doom/"
        echo "Copyright: the fixture" > "$3/usr/share/doc/aiba-doom/copyright"
        printf 'by nobody' | gzip -c > "$3/usr/share/doc/aiba-doom/CREDITS.gz"
        """,
    )
    for _ in range(2):
        render(tmp_path / "set", sources=[DOOM], engine=Sines(), sample_rate=RATE, cache=tmp_path / "cache")
    assert (programs / "apt-get.log").read_text() == "download aiba-doom\n"
    notice = (tmp_path / "set" / "NOTICE").read_text()
    assert "Copyright: the fixture" in notice
    assert "by nobody" in notice
    assert slakh.pieces(tmp_path / "set")[0].source == "aiba-doom"


# --- the real engines, where they are installed


def real_engine(name: str) -> synth.Engine:
    try:
        return synth.engine(name)
    except MissingDependency as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ["fluidsynth", "tinysoundfont"])
def test_a_real_engine_is_linear_and_repeatable(name: str, tmp_path: Path) -> None:
    engine = real_engine(name)
    score = midi.read(song(melody(1, 24), programs=(0, 33), step=120))

    def sound(parts: Iterable[midi.Part]) -> np.ndarray:
        path = tmp_path / "part.mid"
        path.write_bytes(midi.write(score, parts))
        return engine.render(path, 44_100)[: 3 * 44_100]

    together = sound(score.parts())
    apart = [sound([part]) for part in score.parts()]
    assert together.dtype == np.float32
    assert np.abs(together).max() > 0.01
    error = together - np.sum(apart, axis=0)
    assert np.sqrt(np.mean(error**2)) < 0.01 * np.sqrt(np.mean(together**2))
    np.testing.assert_array_equal(sound(score.parts()), together)


@pytest.mark.parametrize("name", ["fluidsynth", "tinysoundfont"])
def test_a_real_engine_renders_the_same_set_twice(name: str, tmp_path: Path, music: Source) -> None:
    engine = real_engine(name)
    for out in ("one", "two"):
        render_music(tmp_path / out, music, engine=engine, max_pieces=1, max_seconds=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert slakh.pieces(tmp_path / "one")[0].instruments == ("bass", "drums", "piano")
