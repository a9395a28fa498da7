"""Clips of music whose instruments are known apart: what models are compared on.

A clip is a window of a piece in which two or more instruments play; some of these are summed to a mix and named by its prompt.
What each word is scored against is made of the stems:

``dominance``
    Cells where the instrument holds more than half of the power, down to 40 dB below the loudest cell of the mix
    (:func:`aiba_eval.templates.dominance_mask`).
``dominance_60``
    The same down to 60 dB. Log-mels, which is what models are trained on, show that as well: quiet cymbals over a loud bass.
``energy``
    Cells where it sounds, whatever else does (:func:`aiba_eval.templates.energy_mask`).
``share``
    Its share of the power (:func:`aiba_eval.templates.soft_share`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aiba_eval import templates
from aiba_eval.effects import listed
from aiba_eval.grid import MelGrid
from aiba_eval.probe import normalise

if TYPE_CHECKING:
    from aiba_eval.datasets import Piece

TARGETS = ("dominance", "dominance_60", "energy", "share")
#: mean square below which an instrument does not play in a window: −60 dB of full scale
SILENCE = 1e-6
#: windows drawn for each that is wanted, since instruments rest
TRIES = 8


@dataclass(frozen=True)
class Clip:
    """A window of a piece, mixed from two or more of its instruments.

    Attributes
    ----------
    piece : its name
    start : seconds into the piece
    words : the instruments in it, in the order of the prompt
    absent : instruments that the piece does not have
    mix : float32 (samples,), mean removed, peak 0.5
    sample_rate : hertz
    targets : target → word → (time, mel): a share in [0, 1] for ``share``, else a boolean mask
    """

    piece: str
    start: float
    words: tuple[str, ...]
    absent: tuple[str, ...]
    mix: NDArray[np.float32]
    sample_rate: int
    targets: Mapping[str, Mapping[str, NDArray[Any]]] = field(repr=False)

    @property
    def prompt(self) -> str:
        """The words as a list in English."""
        return listed(self.words)


def make_clips(
    pieces: Sequence[Piece],
    words: Sequence[str],
    grid: MelGrid,
    *,
    seconds: float = 2.56,
    windows: int = 1,
    most: int = 4,
    absent: int = 3,
    seed: int = 0,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> tuple[list[Clip], dict[str, str]]:
    """Windows of pieces, each a mix of two to ``most`` of the instruments that play there, with their targets.

    Parameters
    ----------
    pieces : sequence of Piece
    words : sequence of str
        Instruments that may be named; others are left out of the mix.
    grid : MelGrid
        Of ``seconds``.
    seconds, windows, most, absent, seed
        As in :func:`aiba_eval.compare`. A piece's draws depend on the seed and on its name, not on the other pieces.
    progress : callable, optional

    Returns
    -------
    clips : list of Clip
    skipped : dict of piece to reason
    """
    clips, skipped = [], {}
    for done, piece in enumerate(pieces):
        if progress is not None:
            progress("reading clips", done, len(pieces))
        found, reason = _clips_of(piece, words, grid, seconds, windows, most, absent, seed)
        clips += found
        if not found:
            skipped[piece.name] = reason
    return clips, skipped


def _clips_of(
    piece: Piece, words: Sequence[str], grid: MelGrid, seconds: float, windows: int, most: int, absent: int, seed: int
) -> tuple[list[Clip], str]:
    names = sorted({stem.instrument for stem in piece.stems} & set(words))
    if piece.seconds < seconds:
        return [], f"{piece.seconds:.2f} s long, shorter than a clip of {seconds:g} s"
    if len(names) < 2:
        return [], f"fewer than two named instruments ({', '.join(piece.instruments)})"
    rng = np.random.default_rng((seed, int.from_bytes(hashlib.sha256(piece.name.encode()).digest()[:4], "big")))
    rate = piece.sample_rate
    others = [word for word in words if word not in piece.instruments]
    whole = {name: piece.stem(name) for name in names}
    length = round(seconds * rate)
    steps = max(1, int((piece.seconds - seconds) * 100) + 1)
    clips: list[Clip] = []
    for _ in range(TRIES * windows):
        if len(clips) == windows:
            break
        first = round(int(rng.integers(steps)) / 100 * rate)
        parts = {name: _cut(wave, first, length) for name, wave in whole.items()}
        playing = [name for name, wave in parts.items() if (wave**2).mean() > SILENCE]
        if len(playing) < 2:
            continue
        chosen = [str(name) for name in rng.permutation(playing)[:most]]
        missing = [str(name) for name in rng.permutation(others)[:absent]]
        power = {name: grid.power(parts[name], rate) for name in chosen}
        targets: dict[str, dict[str, NDArray[Any]]] = {
            "dominance": {name: templates.dominance_mask(power, name) for name in chosen},
            "dominance_60": {name: templates.dominance_mask(power, name, floor_db=-60.0) for name in chosen},
            "energy": {name: templates.energy_mask(power[name]) for name in chosen},
            "share": {name: templates.soft_share(power, name) for name in chosen},
        }
        mix = normalise(np.sum([parts[name] for name in chosen], axis=0))
        clips.append(Clip(piece.name, first / rate, tuple(chosen), tuple(missing), mix, rate, targets))
    return clips, f"fewer than two instruments play in any of {TRIES * windows} windows of {seconds:g} s"


def _cut(wave: NDArray[np.float32], first: int, length: int) -> NDArray[np.float32]:
    part = wave[first : first + length]
    return np.pad(part, (0, length - len(part)))
