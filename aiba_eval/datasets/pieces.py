"""A piece of music with its instruments apart, whatever dataset it came from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class DamagedAudio(OSError):
    """An audio file cannot be decoded; the message names it."""


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


@dataclass(frozen=True)
class Piece:
    """One piece: a mix and the stems it is made of.

    Attributes
    ----------
    name
        `Track00001`.
    split
        `train`, `validation`, `test`, … or None where the dataset has no splits.
    path
        Its folder.
    mix_path
        Its mix.
    sample_rate
        Of the files, in hertz.
    seconds
        Length of the mix.
    licence, source
        As the dataset states them; "unknown" where it does not.
    stems
        Every stem with audio, sorted by name.
    """

    name: str
    split: str | None
    path: Path
    mix_path: Path
    sample_rate: int
    seconds: float
    licence: str
    source: str
    stems: tuple[Stem, ...] = field(repr=False)

    @property
    def instruments(self) -> tuple[str, ...]:
        """The instruments' words, each once, sorted."""
        return tuple(sorted({stem.instrument for stem in self.stems}))

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
        return self._read(self.mix_path, start, seconds, sample_rate)

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
            If the piece has no such instrument, or the window does not lie inside it.
        DamagedAudio
            If a file cannot be decoded.
        """
        paths = [stem.path for stem in self.stems if stem.instrument == instrument]
        if not paths:
            raise ValueError(f"{self.name} has no {instrument!r}; it has {', '.join(self.instruments)}")
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
    problems
        Every file or folder that was left out, with the reason.
    """

    def __init__(self, pieces: Sequence[Piece], problems: Sequence[Problem] = ()) -> None:
        self._pieces = tuple(pieces)
        self.problems = tuple(problems)

    @overload
    def __getitem__(self, index: int) -> Piece: ...

    @overload
    def __getitem__(self, index: slice) -> Pieces: ...

    def __getitem__(self, index: int | slice) -> Piece | Pieces:
        if isinstance(index, slice):
            return Pieces(self._pieces[index], self.problems)
        return self._pieces[index]

    def __len__(self) -> int:
        return len(self._pieces)

    def __repr__(self) -> str:
        return f"<{len(self)} pieces, {sum(p.seconds for p in self) / 60:.1f} min, {len(self.problems)} problems>"

    def counts(self) -> Counter[str]:
        """How many pieces each instrument plays in."""
        return Counter(instrument for piece in self for instrument in piece.instruments)


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
