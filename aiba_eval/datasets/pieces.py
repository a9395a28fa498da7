"""A piece of music with its instruments apart, whatever dataset it came from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, overload

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


#: Seconds within which notes of one instrument are one onset.
CHORD = 0.03


class DamagedAudio(OSError):
    """An audio or MIDI file cannot be decoded; the message names it."""


@dataclass(frozen=True)
class Problem:
    """Something in a dataset that could not be used."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Stem:
    """One recorded part of a piece.

    Attributes
    ----------
    name
        The dataset's own name for it, `S03`.
    instrument
        The word for it in a prompt, `guitar`.
    inst_class
        The dataset's own class, as written there: `Strings (continued)`.
    program
        General MIDI program from 0, or None where the dataset does not say.
    is_drum
        Whether it is a drum kit.
    path
        Its audio.
    midi
        Its notes, or None where there is no such file.
    """

    name: str
    instrument: str
    inst_class: str
    program: int | None
    is_drum: bool
    path: Path
    midi: Path | None


class Note(NamedTuple):
    """One played note of a piece whose instruments are not recorded apart.

    Attributes
    ----------
    instrument
        The word for who plays it.
    start, end
        In seconds from the beginning of the mix.
    pitch
        MIDI note number; 69 is 440 Hz.
    """

    instrument: str
    start: float
    end: float
    pitch: int


@dataclass(frozen=True)
class Piece:
    """One piece: a mix and the stems it is made of, or the notes where there are no stems.

    Attributes
    ----------
    name
        `Track00001`.
    split
        `train`, `validation`, `test`, … or None where the dataset has no splits.
    path
        Its folder.
    mix_path
        Its mix, or None where the dataset has none: then it is the sum of the stems.
    sample_rate
        Of the files, in hertz.
    seconds
        Length of the mix.
    licence, source
        As the dataset states them; "unknown" where it does not.
    stems
        Every stem with audio, sorted by name; empty where the dataset has none.
    notes
        Every note, sorted by start, where the dataset has notes in place of stems.
    caveats
        What is known to be wrong with the piece and did not exclude it: bleed, errata.
    """

    name: str
    split: str | None
    path: Path
    mix_path: Path | None
    sample_rate: int
    seconds: float
    licence: str
    source: str
    stems: tuple[Stem, ...] = field(repr=False)
    notes: tuple[Note, ...] = field(default=(), repr=False)
    caveats: tuple[str, ...] = ()

    @property
    def instruments(self) -> tuple[str, ...]:
        """The instruments' words, each once, sorted."""
        return tuple(sorted({stem.instrument for stem in self.stems} | {note.instrument for note in self.notes}))

    @property
    def identity(self) -> str:
        """Split, name and the size of its audio in bytes: what tells a piece from another of its name."""
        files = [stem.path for stem in self.stems] or ([self.mix_path] if self.mix_path is not None else [])
        return f"{self.split or ''}/{self.name} {sum(path.stat().st_size for path in files)}"

    def mix(
        self, start: float = 0.0, seconds: float | None = None, sample_rate: int | None = None
    ) -> NDArray[np.float32]:
        """Read the mix.

        Parameters
        ----------
        start
            Where to begin, in seconds.
        seconds
            How much to read; None reads to the end.
        sample_rate
            Resample to this many hertz; None keeps the file's rate.

        Returns
        -------
        float32 [n]
            Mono, full scale ±1, n = round(seconds · sample_rate).

        Raises
        ------
        ValueError
            If the window does not lie inside the piece.
        DamagedAudio
            If the file cannot be decoded.
        """
        if self.mix_path is not None:
            return self._read(self.mix_path, start, seconds, sample_rate)
        return self._sum([stem.path for stem in self.stems], start, seconds, sample_rate)

    def stem(
        self, instrument: str, start: float = 0.0, seconds: float | None = None, sample_rate: int | None = None
    ) -> NDArray[np.float32]:
        """Read one instrument: the sum of all its stems, on the same time axis and scale as `mix`.

        Parameters
        ----------
        instrument
            One of `instruments`.
        start, seconds, sample_rate
            As for `mix`.

        Returns
        -------
        float32 [n]
            Mono, as long as `mix` returns for the same window.

        Raises
        ------
        ValueError
            If the piece has no such instrument or no stems at all, or the window does not lie inside it.
        DamagedAudio
            If a file cannot be decoded.
        """
        if not self.stems:
            raise ValueError(f"{self.name} has notes and no stems: use sounding() and knowledge bands")
        paths = [stem.path for stem in self.stems if stem.instrument == instrument]
        if not paths:
            raise ValueError(f"{self.name} has no {instrument!r}; it has {', '.join(self.instruments)}")
        return self._sum(paths, start, seconds, sample_rate)

    def sounding(self, instrument: str, times: ArrayLike) -> NDArray[np.bool_]:
        """Whether a note of an instrument is held at given times: start <= t < end of any.

        Parameters
        ----------
        instrument
            One of `instruments`.
        times
            Seconds from the beginning of the mix, [n].

        Returns
        -------
        bool [n]

        Raises
        ------
        ValueError
            If the piece has no such instrument, or stems in place of notes.
        """
        if not self.notes:
            raise ValueError(f"{self.name} has stems and no notes: where {instrument!r} sounds is in stem()")
        spans = np.array([(note.start, note.end) for note in self.notes if note.instrument == instrument])
        if not len(spans):
            raise ValueError(f"{self.name} has no {instrument!r}; it has {', '.join(self.instruments)}")
        at = np.asarray(times, float)
        # notes held = notes begun − notes ended
        begun = np.searchsorted(np.sort(spans[:, 0]), at, side="right")
        return begun > np.searchsorted(np.sort(spans[:, 1]), at, side="right")

    def onsets(self, instrument: str) -> NDArray[np.float64]:
        """When notes of an instrument begin: of `notes`, or of the MIDI files of its stems.

        Onsets within `CHORD` of the one before are one onset: notes of a chord are not struck at once.

        Parameters
        ----------
        instrument
            One of `instruments`.

        Returns
        -------
        float64 [n]
            Seconds from the beginning of the mix, ascending; none at or after its end.

        Raises
        ------
        ValueError
            If the piece has no such instrument, or a stem of it no MIDI file.
        DamagedAudio
            If a MIDI file cannot be read.
        ModuleNotFoundError
            If a MIDI file has to be read without `pip install 'aiba[stems]'`.
        """
        if instrument not in self.instruments:
            raise ValueError(f"{self.name} has no {instrument!r}; it has {', '.join(self.instruments)}")
        starts = [note.start for note in self.notes if note.instrument == instrument]
        for stem in self.stems:
            if stem.instrument == instrument:
                starts += _midi_onsets(self.name, stem)
        kept: list[float] = []
        for start in sorted(starts):
            if start < self.seconds and (not kept or start - kept[-1] > CHORD):
                kept.append(start)
        return np.array(kept)

    def _sum(
        self, paths: Sequence[Path], start: float, seconds: float | None, sample_rate: int | None
    ) -> NDArray[np.float32]:
        parts = [self._read(path, start, seconds, sample_rate) for path in paths]
        return np.sum(parts, axis=0, dtype=np.float32)

    def _read(self, path: Path, start: float, seconds: float | None, sample_rate: int | None) -> NDArray[np.float32]:
        length = self.seconds - start if seconds is None else seconds
        # half a sample of slack: a window that ends where the piece ends may be a rounding error beyond it
        slack = 0.5 / self.sample_rate
        if start < 0 or length <= 0 or start + length > self.seconds + slack:
            raise ValueError(
                f"{self.name} has {self.seconds:.3f} s: no window of {length:.3f} s begins at {start:.3f} s in it"
            )
        if sample_rate is not None and sample_rate <= 0:
            raise ValueError(f"sample_rate is in hertz and positive, not {sample_rate}")
        audio = _decode(path, round(start * self.sample_rate), round(length * self.sample_rate))
        if sample_rate is None or sample_rate == self.sample_rate:
            return audio
        import soxr

        audio = soxr.resample(audio, self.sample_rate, sample_rate).astype(np.float32, copy=False)
        return _fit(audio, round(length * sample_rate))


class Pieces(Sequence[Piece]):
    """The pieces of a dataset that can be used, and what could not.

    Attributes
    ----------
    skipped
        Every file or folder that was left out, with the reason: `len(pieces.skipped)` counts them.
    """

    def __init__(self, pieces: Sequence[Piece], skipped: Sequence[Problem] = ()) -> None:
        self._pieces = tuple(pieces)
        self.skipped = tuple(skipped)

    @classmethod
    def gathered(cls, read: Iterable[tuple[Piece | None, Sequence[Problem]]]) -> Pieces:
        """What a reader made of each place, in order: the piece, if it can be used, and what is the matter there."""
        found: list[Piece] = []
        skipped: list[Problem] = []
        for piece, trouble in read:
            skipped += trouble
            found += [piece] if piece is not None else []
        return cls(found, skipped)

    @overload
    def __getitem__(self, index: int) -> Piece: ...

    @overload
    def __getitem__(self, index: slice) -> Pieces: ...

    def __getitem__(self, index: int | slice) -> Piece | Pieces:
        if isinstance(index, slice):
            return Pieces(self._pieces[index], self.skipped)
        return self._pieces[index]

    def __len__(self) -> int:
        return len(self._pieces)

    def __repr__(self) -> str:
        return f"<{len(self)} pieces, {sum(p.seconds for p in self) / 60:.1f} min, {len(self.skipped)} skipped>"

    def counts(self) -> Counter[str]:
        """How many pieces each instrument plays in."""
        return Counter(instrument for piece in self for instrument in piece.instruments)


def _midi_onsets(piece: str, stem: Stem) -> list[float]:
    if stem.midi is None:
        raise ValueError(
            f"stem {stem.name!r} of {piece} has no MIDI file: detect its onsets in stem({stem.instrument!r})"
        )
    from aiba_eval.stems import MalformedMidi, midi

    try:
        score = midi.read(stem.midi.read_bytes())
    except (MalformedMidi, OSError) as error:
        raise DamagedAudio(f"{stem.midi} cannot be read ({error}): fetch or render it again") from error
    return [score.seconds(note.start) for note in score.notes]


def _decode(path: Path, first: int, count: int) -> NDArray[np.float32]:
    """Mono float32 [count] from sample `first` on; a file that ends earlier is silent from there."""
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            file.seek(min(first, file.frames))
            channels = file.read(count, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise DamagedAudio(f"{path} cannot be decoded ({error}): fetch or render it again") from error
    return _fit(channels.mean(axis=1, dtype=np.float32), count)


def _fit(audio: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Cut or zero-pad at the end to [count]."""
    return np.pad(audio[:count], (0, max(0, count - len(audio))))
