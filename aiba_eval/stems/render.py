"""Rendering a set: each part of each piece alone, and the mix as their sum, in Slakh's layout.

    out/NOTICE                                    licences of the music and of the sounds
    out/settings.json                             what the audio depends on
    out/index.json                                for mirdata
    out/slakh2100_flac_redux/<split>/TrackNNNNN/  metadata.yaml, all_src.mid, mix.flac, MIDI/Sxx.mid, stems/Sxx.flac

The same inputs, settings and library versions give the same bytes. A piece is written into a folder of another name,
which is renamed when it is whole: a run that is stopped goes on where it was. One run at a time may write to a
folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pretty_midi
import pyloudnorm
import soundfile
import soxr
import yaml

from aiba_eval.datasets import slakh

from . import midi, synth, tunes
from . import sources as music
from .errors import MalformedMidi, StemsError

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOP = slakh.FOLDERS[0]
PARTIAL = ".partial-"
RENDER_RATE = 44_100  # always: a soundfont's samples are not band-limited by the synthesiser, so 16 kHz would alias
SAMPLE_RATES = (16_000, 44_100)
LOUDNESS = -13.0  # LUFS of each stem, as in Slakh
SILENCE = -70.0  # LUFS below which a stem counts as silent, the absolute gate of BS.1770
PEAK = 10 ** (-1 / 20)  # of the mix and of each stem


@dataclass(frozen=True)
class Progress:
    """What `render` tells its callback after each piece.

    Attributes
    ----------
    done, total
        Pieces dealt with so far, and how many there are.
    name
        Its folder, `Track00001`.
    label
        Where it comes from, `freedoom/freedoom1.wad/D_E1M1`.
    state
        "rendered", "kept" (finished by an earlier run) or "skipped".
    reason
        Why it was skipped, else empty.
    """

    done: int
    total: int
    name: str
    label: str
    state: Literal["rendered", "kept", "skipped"]
    reason: str = ""


@dataclass(frozen=True)
class RenderSummary:
    """What `render` did.

    Attributes
    ----------
    root
        The set's folder.
    rendered, kept
        Pieces rendered by this run, and by earlier ones.
    skipped
        (label, reason) of every piece left out.
    seconds, stem_seconds
        Length of all mixes, and of all stems.
    splits
        Pieces in each split.
    tunes
        Different tunes among the pieces.
    """

    root: Path
    rendered: int
    kept: int
    skipped: tuple[tuple[str, str], ...]
    seconds: float
    stem_seconds: float
    splits: dict[str, int]
    tunes: int


@dataclass(frozen=True)
class _Candidate:
    """A piece that may be rendered: its number is its place among all pieces of the sources."""

    name: str
    source: music.Midi
    score: midi.Score
    tune: str
    split: str

    @property
    def folder(self) -> str:
        return f"{TOP}/{self.split}/{self.name}"


@dataclass(frozen=True)
class _Settings:
    engine: synth.Engine
    sample_rate: int
    max_seconds: float | None
    start_seconds: float | Literal["busiest"]
    balance: Literal["slakh", "midi"]
    require: tuple[frozenset[str], ...]
    instruments: Mapping[str, frozenset[str]]  # by a piece's label; a piece that is not here keeps all of its own
    min_notes: int
    bits: int


class _Skip(Exception):
    """A piece is left out; the message says why."""


def render(
    out: str | Path,
    *,
    sources: str | music.Source | Sequence[str | music.Source] = ("freedoom", "freedm"),
    engine: str | synth.Engine = "fluidsynth",
    soundfont: str | Path | None = None,
    sample_rate: int = 44_100,
    max_seconds: float | None = None,
    start_seconds: float | Literal["busiest"] = 0.0,
    max_pieces: int | None = None,
    only: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    require: Sequence[str] = (),
    balance: Literal["slakh", "midi"] = "slakh",
    min_notes: int = 8,
    bits: int = 16,
    jobs: int | None = None,
    cache: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> RenderSummary:
    """Render a multi-stem set from MIDI; go on where an earlier run was stopped.

    Parameters
    ----------
    out
        The set's folder; made if it is not there.
    sources
        Names from `SOURCES`, or `Source.folder(path, licence=…)` for MIDI files of your own.
    engine
        "fluidsynth", "tinysoundfont", or anything with the methods of `Engine`.
    soundfont
        An `.sf2` or `.sf3` file; None takes a known one.
    sample_rate
        16000 or 44100 hertz. Parts are always rendered at 44.1 kHz and resampled.
    max_seconds
        At most so much of each piece; None renders it whole, with 2 s in which its last notes die away.
    start_seconds
        Where in a piece to begin; "busiest" looks for the `max_seconds` in which most instruments play
        (`midi.busiest`).
    max_pieces
        Stop when the set has so many.
    only
        Render these pieces and no others, named by their labels: `freedoom/freedoom1.wad/D_E1M1`. A mapping from labels
        to instrument words also leaves the pieces' other instruments out. Pieces that are not rendered still count
        towards what is the same tune.
    require
        Instrument words (`slakh.WORDS`) that a piece must have, each a single one or alternatives: `"guitar|piano"`.
    balance
        "slakh" brings each stem to −13 LUFS, as Slakh does; "midi" leaves the loudness that the piece gives it.
    min_notes
        Parts with fewer notes than this, in what is rendered, are left out.
    bits
        Resolution of the samples. Below 16 they are multiples of a larger step, which FLAC stores in that many bits
        less: a set to be shipped gets smaller by that much noise.
    jobs
        Parts rendered at the same time; None is one per processor.
    cache
        Where fetched packages are kept; None is `~/.cache/aiba/packages`.
    progress
        Called after each piece.

    Returns
    -------
    RenderSummary
        What was rendered, kept and skipped.

    Raises
    ------
    MissingDependency
        If a program, a soundfont or a package is missing; the message holds the command that installs it.
    StemsError
        If `out` holds a set rendered with other settings, or a setting makes no sense.
    MalformedWad
        If a source's WAD is damaged. A MIDI file that is damaged is skipped.
    """
    root = Path(out)
    settings = _Settings(
        engine=synth.engine(engine, soundfont) if isinstance(engine, str) else engine,
        sample_rate=sample_rate,
        max_seconds=None if max_seconds is None else float(max_seconds),
        start_seconds=start_seconds,
        balance=balance,
        require=_requirements(require),
        instruments={label: _words(only[label]) for label in only} if isinstance(only, Mapping) else {},
        min_notes=min_notes,
        bits=bits,
    )
    _check(settings)
    found = [music.find(source) for source in ([sources] if isinstance(sources, (str, music.Source)) else sources)]
    store = Path(cache) if cache is not None else music.default_cache()
    candidates, skipped = _candidates(found, store)
    wanted = _choose(candidates, only)

    root.mkdir(parents=True, exist_ok=True)
    _same_settings(root, settings, candidates)
    _write(root / "NOTICE", _notices(found, store, settings.engine))
    for stale in root.glob(PARTIAL + "*"):
        if stale.is_dir():
            shutil.rmtree(stale)
        else:
            stale.unlink()

    states: Counter[str] = Counter()
    finished: list[_Candidate] = []
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        for done, candidate in enumerate(wanted, 1):
            if max_pieces is not None and len(finished) >= max_pieces:
                break
            reason = ""
            if (root / candidate.folder).is_dir():
                state: Literal["rendered", "kept", "skipped"] = "kept"
            else:
                try:
                    _render_piece(root, candidate, settings, pool)
                    state = "rendered"
                except _Skip as skip:
                    state, reason = "skipped", str(skip)
                    skipped.append((candidate.source.name, reason))
            if state != "skipped":
                finished.append(candidate)
            states[state] += 1
            if progress:
                progress(Progress(done, len(wanted), candidate.name, candidate.source.name, state, reason))
    _write(root / "index.json", json.dumps(_index(root), indent=1, sort_keys=True) + "\n")
    lengths = [_lengths(root / candidate.folder) for candidate in finished]
    return RenderSummary(
        root=root,
        rendered=states["rendered"],
        kept=states["kept"],
        skipped=tuple(skipped),
        seconds=sum(seconds for seconds, _ in lengths),
        stem_seconds=sum(seconds * stems for seconds, stems in lengths),
        splits=dict(sorted(Counter(candidate.split for candidate in finished).items())),
        tunes=len({candidate.tune for candidate in finished}),
    )


def _check(settings: _Settings) -> None:
    if settings.sample_rate not in SAMPLE_RATES:
        raise StemsError(f"sample_rate is one of {', '.join(map(str, SAMPLE_RATES))}, not {settings.sample_rate}")
    if settings.max_seconds is not None and not 1.0 <= settings.max_seconds <= midi.LONGEST:
        raise StemsError(f"max_seconds is between 1 and {midi.LONGEST:.0f}, not {settings.max_seconds}")
    if not 8 <= settings.bits <= 16:
        raise StemsError(f"bits is between 8 and 16, not {settings.bits}")
    if settings.balance not in ("slakh", "midi"):
        raise StemsError(f"balance is 'slakh' or 'midi', not {settings.balance!r}")
    start = settings.start_seconds
    if start == "busiest":
        if settings.max_seconds is None:
            raise StemsError("start_seconds='busiest' needs max_seconds: the length of the window to look for")
    elif not isinstance(start, (int, float)) or start < 0:
        raise StemsError(f"start_seconds is 'busiest' or not below 0, not {start!r}")


def _requirements(require: Sequence[str]) -> tuple[frozenset[str], ...]:
    return tuple(_words(words.split("|")) for words in ([require] if isinstance(require, str) else require))


def _words(words: Sequence[str]) -> frozenset[str]:
    unknown = sorted(set(words) - set(slakh.WORDS))
    if unknown:
        raise StemsError(f"{unknown[0]!r} is no instrument; there are {', '.join(slakh.WORDS)}")
    return frozenset(words)


def _candidates(found: Sequence[music.Source], cache: Path) -> tuple[list[_Candidate], list[tuple[str, str]]]:
    """Every piece of the sources with its number, tune and split; and (label, reason) of those that cannot be read."""
    pieces: list[tuple[int, music.Midi, midi.Score]] = []
    skipped: list[tuple[str, str]] = []
    for number, piece in enumerate(music.read(found, cache), 1):
        try:
            pieces.append((number, piece, midi.read(piece.data)))
        except MalformedMidi as error:
            skipped.append((piece.name, str(error)))
    if not pieces:
        raise StemsError(f"none of the {len(skipped)} MIDI files of {', '.join(s.name for s in found)} can be read")
    firsts = tunes.cluster([tunes.runs(score) for _, _, score in pieces])
    digests: dict[int, list[str]] = {}
    for first, (_, piece, _) in zip(firsts, pieces):
        digests.setdefault(first, []).append(piece.md5)
    return [
        _Candidate(f"Track{number:05d}", piece, score, min(digests[first]), tunes.split_of(digests[first]))
        for first, (number, piece, score) in zip(firsts, pieces)
    ], skipped


def _choose(candidates: list[_Candidate], only: Collection[str] | None) -> list[_Candidate]:
    if only is None:
        return candidates
    unknown = sorted(set(only) - {candidate.source.name for candidate in candidates})
    if unknown:
        raise StemsError(f"only: no piece {unknown[0]!r}; labels look like {candidates[0].source.name!r}")
    return [candidate for candidate in candidates if candidate.source.name in only]


def _same_settings(root: Path, settings: _Settings, candidates: list[_Candidate]) -> None:
    """Write `settings.json`, or refuse a folder in which pieces were rendered with other settings."""
    digest = hashlib.md5("".join(candidate.source.md5 for candidate in candidates).encode()).hexdigest()
    values: dict[str, Any] = {
        "engine": settings.engine.name,
        "soundfont": settings.engine.soundfont,
        "sample_rate": settings.sample_rate,
        "max_seconds": settings.max_seconds,
        "start_seconds": settings.start_seconds,
        "balance": settings.balance,
        "min_notes": settings.min_notes,
        "bits": settings.bits,
        "instruments": {label: sorted(words) for label, words in sorted(settings.instruments.items())},
        "require": [sorted(words) for words in settings.require],
        "music_md5": digest,
    }
    path = root / "settings.json"
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StemsError(f"{path} is not JSON: render into another folder") from error
        for name, value in values.items():
            if before.get(name) != value:
                raise StemsError(
                    f"{root} was rendered with {name} = {before.get(name)!r}, not {value!r}: "
                    "use another folder, or delete this one"
                )
    elif (root / TOP).exists():
        raise StemsError(f"{root} holds a set without settings.json, which was not rendered here: use another folder")
    _write(path, json.dumps(values, indent=1, sort_keys=True) + "\n")


def _notices(found: Sequence[music.Source], cache: Path, engine: synth.Engine) -> str:
    """The text of `NOTICE`."""
    sections = [
        "This folder holds audio that was rendered from music of the sources below with the soundfont below.\n"
        "It may be passed on under their licences only, together with this file.\n"
    ]
    for source in found:
        sections.append(f"Music: {source.package} ({source.licence})\n\n{music.notice(source, cache)}")
    sections.append(f"Sounds: {engine.soundfont} ({engine.licence})\n\n{engine.notice}")
    return f"\n{'=' * 100}\n\n".join(sections)


def _render_piece(root: Path, candidate: _Candidate, settings: _Settings, pool: ThreadPoolExecutor) -> None:
    """Write one piece, all or nothing.

    Raises
    ------
    _Skip
        If it lacks what is required of it.
    """
    chosen = settings.instruments.get(candidate.source.name)
    score = candidate.score if chosen is None else midi.only(candidate.score, chosen)
    start, seconds = _window(score, settings)
    score = midi.cut(score, start, seconds)
    parts = [part for part, count in score.parts().items() if count >= settings.min_notes]
    required = settings.require + tuple(frozenset([word]) for word in sorted(chosen or ()))
    _has_required(parts, required, settings)

    partial = root / f"{PARTIAL}{candidate.name}"
    partial.mkdir()
    try:
        (partial / "MIDI").mkdir()
        (partial / "stems").mkdir()
        whole = settings.max_seconds is None and start == 0 and chosen is None
        (partial / "all_src.mid").write_bytes(candidate.source.data if whole else midi.write(score, parts, fade=0.0))
        names = [f"S{number:02d}" for number in range(len(parts))]
        for name, part in zip(names, parts):
            (partial / "MIDI" / f"{name}.mid").write_bytes(midi.write(score, [part]))

        def sound(name: str) -> NDArray[np.float32]:
            audio = settings.engine.render(partial / "MIDI" / f"{name}.mid", RENDER_RATE)
            count = round(seconds * RENDER_RATE)
            audio = np.pad(audio[:count], (0, max(0, count - len(audio))))
            return _resample(audio, settings.sample_rate)

        levels, stems, mix, gain = _mix(list(pool.map(sound, names)), settings)
        _has_required([part for part, stem in zip(parts, stems) if stem is not None], required, settings)
        for name, stem in zip(names, stems):
            if stem is not None:
                _write_flac(partial / "stems" / f"{name}.flac", stem, settings.sample_rate)
        _write_flac(partial / "mix.flac", mix, settings.sample_rate)
        metadata = _metadata(candidate, settings, start, len(mix) / settings.sample_rate, gain)
        metadata["stems"] = {
            name: _stem_metadata(part, level, stem is not None, settings.engine)
            for name, part, level, stem in zip(names, parts, levels, stems)
        }
        (partial / "metadata.yaml").write_text(yaml.safe_dump(metadata, allow_unicode=True), encoding="utf-8")
        final = root / candidate.folder
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _window(score: midi.Score, settings: _Settings) -> tuple[float, float]:
    """Where to cut a piece: (start, length) in seconds."""
    if settings.start_seconds == "busiest":
        start = midi.busiest(score, settings.max_seconds or 0.0)
    else:
        start = float(settings.start_seconds)
    if start >= score.length:
        raise _Skip(f"ends after {score.length:.1f} s, before start_seconds = {start:g}")
    seconds = score.length + midi.TAIL - start
    if settings.max_seconds is not None:
        seconds = min(seconds, settings.max_seconds)
    return start, seconds


def _has_required(parts: Sequence[midi.Part], required: Sequence[frozenset[str]], settings: _Settings) -> None:
    words = {part.instrument for part in parts}
    for group in required:
        if not group & words:
            raise _Skip(f"has no {' or '.join(sorted(group))}")
    if len(parts) < 2:
        raise _Skip(f"has {len(parts)} part(s) with at least {settings.min_notes} notes that can be heard")


def _resample(audio: NDArray[np.float32], sample_rate: int) -> NDArray[np.float32]:
    if sample_rate == RENDER_RATE:
        return audio
    return soxr.resample(audio, RENDER_RATE, sample_rate).astype(np.float32, copy=False)


def _mix(
    audio: list[NDArray[np.float32]], settings: _Settings
) -> tuple[list[float], list[NDArray[np.int16] | None], NDArray[np.int16], float]:
    """Balance the stems and add them up.

    The stems are rounded first and the mix is the sum of what was rounded: the files add up exactly.

    Parameters
    ----------
    audio
        One float32 [n] per stem.

    Returns
    -------
    levels
        Loudness of each stem before the balance, in LUFS.
    stems
        int16 [n], None for a silent one.
    mix
        int16 [n].
    gain
        The factor on every stem that brings the highest peak to −1 dB.
    """
    levels = [_loudness(stem, settings.sample_rate) for stem in audio]
    balanced: list[NDArray[np.float32] | None] = []
    for stem, level in zip(audio, levels):
        factor = 10 ** ((LOUDNESS - level) / 20) if settings.balance == "slakh" else 1.0
        balanced.append(stem * np.float32(factor) if level > SILENCE else None)
    heard = [stem for stem in balanced if stem is not None]
    if not heard:
        raise _Skip("cannot be heard")
    # a stem may be louder than the mix, where others cancel it
    peak = max(float(np.abs(wave).max()) for wave in (*heard, np.sum(heard, axis=0)))
    gain = PEAK / peak
    step = 1 << (16 - settings.bits)
    stems = [
        None if stem is None else (np.rint(stem * (gain * 32768 / step)) * step).astype(np.int16) for stem in balanced
    ]
    mix: NDArray[np.int16] = np.asarray(
        sum(stem.astype(np.int32) for stem in stems if stem is not None), dtype=np.int16
    )
    return levels, stems, mix, gain


def _loudness(audio: NDArray[np.float32], sample_rate: int) -> float:
    """Integrated loudness after ITU-R BS.1770-4, in LUFS; −inf for silence."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the logarithm of zero, for a silent stem
        return float(pyloudnorm.Meter(sample_rate).integrated_loudness(audio.astype(np.float64)))


def _write_flac(path: Path, audio: NDArray[np.int16], sample_rate: int) -> None:
    soundfile.write(path, audio, sample_rate, format="FLAC", subtype="PCM_16", compression_level=1.0)


def _metadata(candidate: _Candidate, settings: _Settings, start: float, seconds: float, gain: float) -> dict[str, Any]:
    """Slakh's keys, then this renderer's. No dates, no paths: the same input gives the same bytes."""
    piece = candidate.source
    return {
        "UUID": piece.md5,
        "audio_dir": "stems",
        "midi_dir": "MIDI",
        "lmd_midi_dir": piece.name,
        "normalized": settings.balance == "slakh",
        "normalization_factor": LOUDNESS,
        "target_peak": -1.0,
        "overall_gain": round(gain, 6),
        "source_package": piece.source.package,
        "source_license": piece.source.licence,
        "source_label": piece.label,
        "soundfont": settings.engine.soundfont,
        "soundfont_license": settings.engine.licence,
        "engine": settings.engine.name,
        "start_seconds": round(start, 6),
        "seconds": round(seconds, 6),
        "tune": candidate.tune,
    }


def _stem_metadata(part: midi.Part, level: float, heard: bool, engine: synth.Engine) -> dict[str, Any]:
    return {
        "audio_rendered": heard,
        "inst_class": part.inst_class,
        "integrated_loudness": round(level, 4) if heard else None,
        "is_drum": part.is_drum,
        "midi_program_name": "Drums" if part.is_drum else pretty_midi.program_to_instrument_name(part.program),
        "midi_saved": True,
        "plugin_name": engine.soundfont,
        "program_num": part.program,
    }


def _lengths(folder: Path) -> tuple[float, int]:
    """(seconds, number of stems) of a finished piece."""
    info = soundfile.info(folder / "mix.flac")
    return info.frames / info.samplerate, sum(1 for _ in (folder / "stems").iterdir())


def _index(root: Path) -> dict[str, Any]:
    """The set's index as mirdata's `slakh` loader reads it: every file with its MD5."""

    def entry(path: Path) -> list[str | None]:
        if not path.is_file():
            return [None, None]
        return [path.relative_to(root).as_posix(), hashlib.md5(path.read_bytes()).hexdigest()]

    tracks: dict[str, Any] = {}
    multitracks: dict[str, Any] = {}
    for folder in _pieces(root):
        metadata = entry(folder / "metadata.yaml")
        names = [path.stem for path in sorted((folder / "MIDI").iterdir())]
        for name in names:
            tracks[f"{folder.name}-{name}"] = {
                "audio": entry(folder / "stems" / f"{name}.flac"),
                "midi": entry(folder / "MIDI" / f"{name}.mid"),
                "metadata": metadata,
            }
        multitracks[folder.name] = {
            "tracks": [f"{folder.name}-{name}" for name in names],
            "midi": entry(folder / "all_src.mid"),
            "mix": entry(folder / "mix.flac"),
            "metadata": metadata,
        }
    # mirdata's loader takes the layout from the version's name
    return {"version": "2100-redux-like", "tracks": tracks, "multitracks": multitracks}


def _pieces(root: Path) -> Iterator[Path]:
    for split in slakh.SPLITS:
        yield from sorted((root / TOP / split).glob("Track*"))


def _write(path: Path, text: str) -> None:
    """Replace a file at once: a reader sees the old or the new one."""
    partial = path.with_name(PARTIAL + path.name)
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
