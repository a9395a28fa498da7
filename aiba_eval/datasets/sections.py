"""Windows of a piece in which instruments sound: what is silent is left out of the scores, and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .pieces import Piece

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from aiba_eval.grid import MelGrid

#: Below this level against the loudest instrument of a section, in decibels, an instrument is silent there.
FLOOR_DB = -40.0


@dataclass(frozen=True)
class Section:
    """A window of a piece.

    Attributes
    ----------
    piece
        Where it is from.
    start, seconds
        Where it begins and how long it is.
    sounding
        Instruments to score here.
    silent
        Instruments of the piece that are silent here: not to be scored, nor named in the prompt.
    """

    piece: Piece
    start: float
    seconds: float
    sounding: tuple[str, ...]
    silent: tuple[str, ...]

    def mix(self, sample_rate: int | None = None) -> NDArray[np.float32]:
        """The mix of this window, float32 [n]."""
        return self.piece.mix(self.start, self.seconds, sample_rate)

    def powers(self, grid: MelGrid) -> dict[str, NDArray[np.float32]]:
        """Power mels of the sounding instruments on a grid, by word, as `aiba_eval.templates` takes them."""
        rate = self.piece.sample_rate
        return {word: grid.power(self.piece.stem(word, self.start, self.seconds), rate) for word in self.sounding}


def sections(piece: Piece, seconds: float, *, hop: float | None = None, floor_db: float = FLOOR_DB) -> list[Section]:
    """Cut a piece into windows, and tell in each which instruments sound.

    An instrument with stems sounds where the mean square of its samples exceeds that of the window's loudest instrument
    times 10^(floor_db / 10); with notes, where one is held at any time. What is shorter than a window at the end is left
    out. A window in which nothing sounds has an empty `sounding`: it is returned, so that it can be counted.

    Parameters
    ----------
    piece
        With stems or notes.
    seconds
        Length of a window.
    hop
        From one window's start to the next; None for windows that adjoin.
    floor_db
        Negative.

    Returns
    -------
    list of Section

    Raises
    ------
    ValueError
        If a length is not positive, the floor not negative, or the piece is shorter than one window.
    DamagedAudio
        If a file cannot be decoded.
    """
    step = seconds if hop is None else hop
    if seconds <= 0 or step <= 0 or floor_db >= 0:
        raise ValueError(
            f"need positive lengths and a negative floor, got {seconds} s, hop {step} s, floor {floor_db} dB"
        )
    slack = 0.5 / piece.sample_rate
    if piece.seconds + slack < seconds:
        raise ValueError(f"{piece.name} has {piece.seconds:.3f} s, less than one window of {seconds:.3f} s")
    found = []
    for index in range(int((piece.seconds + slack - seconds) / step) + 1):
        start = index * step
        if piece.stems:
            power = {
                word: float(np.mean(piece.stem(word, start, seconds).astype(float) ** 2)) for word in piece.instruments
            }
            floor = max(power.values()) * 10 ** (floor_db / 10)
            sounding = [word for word in piece.instruments if power[word] > max(floor, 1e-10)]
        else:
            held = {note.instrument for note in piece.notes if note.start < start + seconds and note.end > start}
            sounding = sorted(held)
        silent = tuple(word for word in piece.instruments if word not in sounding)
        found.append(Section(piece, start, seconds, tuple(sounding), silent))
    return found


def excluded(found: Iterable[Section]) -> Counter[str]:
    """In how many sections each instrument was left out because it is silent: say it beside every mean."""
    return Counter(word for section in found for word in section.silent)
