"""Training clips: random subsets of one piece's instruments, mixed as audio, with a prompt that names them.

Stems are packed once (``prepare.py``) and then lie on the training device as a whole; a batch is a gather, a sum and one
transform. Every draw comes from a generator seeded by (seed, step): a resumed run sees what an uninterrupted one would.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from aiba_plugins.demo import vocabulary

SAMPLE_RATE, HOP, WINDOW, BINS = 16000, 160, 1024, 64
LOG_FLOOR = 1e-5
#: a stem plays in a window whose power is within 30 dB of its loudest window
ACTIVE = 1e-3
#: how many instruments a clip holds: 1 to 4
SIZES = (0.32, 0.28, 0.25, 0.15)


class LogMel(torch.nn.Module):
    """AudioLDM2's front end: magnitudes through 64 slaney filters, natural log, one column per hop."""

    def __init__(self) -> None:
        super().__init__()
        from librosa.filters import mel

        filters = mel(sr=SAMPLE_RATE, n_fft=WINDOW, n_mels=BINS, fmin=0, fmax=8000)
        self.register_buffer("filters", torch.from_numpy(filters))
        self.register_buffer("window", torch.hann_window(WINDOW))

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        """[batch, samples] to [batch, samples / hop, 64]."""
        pad = (WINDOW - HOP) // 2
        audio = torch.nn.functional.pad(audio[:, None], (pad, pad), mode="reflect")[:, 0]
        stft = torch.stft(audio, WINDOW, HOP, window=self.window, center=False, return_complex=True)
        return torch.log((self.filters @ stft.abs()).clamp_min(LOG_FLOOR)).transpose(1, 2)


def normalise(audio: torch.Tensor) -> torch.Tensor:
    """Mean removed, peak 0.5, as AudioLDM2 prepares audio."""
    audio = audio - audio.mean(-1, keepdim=True)
    return 0.5 * audio / audio.abs().amax(-1, keepdim=True).clamp_min(1e-6)


#: how often a prompt leaves out one of several instruments. The more often, the less a model takes a word's absence for the
#: instrument's, and the less leaving out a word changes
UNNAMED = 0.05


class Stems:
    """The packed stems of one split.

    Attributes
    ----------
    audio : int16 [rows, samples], one row per piece and instrument, on the training device
    rows : (piece, instrument) of each row
    """

    def __init__(self, path: str | Path, device: str = "cpu") -> None:
        with safe_open(str(path), "pt") as file:
            about = json.loads(file.metadata()["about"])
            self.audio = file.get_tensor("audio").to(device)
            self.scale = file.get_tensor("scale").to(device)
            power = file.get_tensor("power").double().numpy()
        self.device = device
        self.rows: list[tuple[str, str]] = [tuple(row) for row in about["rows"]]
        self.columns = np.array(about["columns"])
        self._total = np.concatenate([np.zeros((len(power), 1)), power.cumsum(1)], 1)
        self._loudest: dict[int, np.ndarray] = {}
        self.pieces: dict[str, dict[str, int]] = {}
        for index, (piece, instrument) in enumerate(self.rows):
            if instrument in vocabulary.INSTRUMENTS:
                self.pieces.setdefault(piece, {})[instrument] = index
        self.by_instrument = {
            name: [parts[name] for parts in self.pieces.values() if name in parts]
            for name in vocabulary.INSTRUMENTS
            if any(name in parts for parts in self.pieces.values())
        }

    def active(self, row: int, start: int, columns: int) -> bool:
        """Whether a row plays in a window."""
        if columns not in self._loudest:
            self._loudest[columns] = (self._total[:, columns:] - self._total[:, :-columns]).max(1)
        power = self._total[row, start + columns] - self._total[row, start]
        return bool(power > ACTIVE * self._loudest[columns][row] and power / columns > 1e-7)

    def draw(self, rng: np.random.Generator, columns: int) -> tuple[list[int], int]:
        """Rows that play in one window, the one that it was chosen for first, and the column at which it starts.

        An instrument is drawn first, with the square root of its frequency; then a piece that has it, a window in which it
        plays, and what else plays there.
        """
        names = list(self.by_instrument)
        odds = np.sqrt([len(self.by_instrument[name]) for name in names])
        while True:
            anchor = int(rng.choice(self.by_instrument[names[rng.choice(len(names), p=odds / odds.sum())]]))
            last = self.columns[anchor] - columns
            if last <= 0:
                continue
            start = int(rng.integers(last))
            if self.active(anchor, start, columns):
                break
        others = [r for r in self.pieces[self.rows[anchor][0]].values() if r != anchor]
        others = [r for r in others if self.active(r, start, columns)]
        return [anchor, *(int(r) for r in rng.permutation(others))], start

    def batch(
        self, rng: np.random.Generator, size: int, columns: int, subsets: int = 1
    ) -> tuple[torch.Tensor, list[list[str]]]:
        """``size`` normalised mixes [size, columns × hop] and the instruments in each; every window that is drawn gives
        ``subsets`` mixes of some of its instruments."""
        mixes = torch.zeros(size, columns * HOP, device=self.device)
        instruments: list[list[str]] = []
        while len(instruments) < size:
            playing, start = self.draw(rng, columns)
            seen: set[frozenset[int]] = set()
            for _ in range(min(subsets, size - len(instruments))):
                count = 1 + int(rng.choice(len(SIZES), p=SIZES))
                rows = playing[:count] if not seen else [int(r) for r in rng.permutation(playing)[:count]]
                if frozenset(rows) in seen:
                    continue
                seen.add(frozenset(rows))
                gains = 10 ** (rng.uniform(-6, 6, len(rows)) / 20)
                for row, gain in zip(rows, gains, strict=True):
                    part = self.audio[row, start * HOP : (start + columns) * HOP]
                    mixes[len(instruments)].add_(part.float() * self.scale[row], alpha=float(gain))
                instruments.append([self.rows[row][1] for row in rows])
        return normalise(mixes), instruments


def prompt(rng: np.random.Generator, instruments: list[str], unnamed: float = UNNAMED) -> str:
    """A prompt for these instruments: random order, words and phrasing; with probability ``unnamed`` one of several is left
    out, sometimes words are added that mean nothing for the sound."""

    def pick(options: tuple[str, ...]) -> str:
        return options[int(rng.integers(len(options)))]

    named = [str(name) for name in rng.permutation(instruments)]
    if len(named) > 1 and rng.random() < unnamed:
        named = named[1:]
    phrases = []
    for name in named:
        words = vocabulary.INSTRUMENTS[name]
        phrase = words[0] if rng.random() < 0.7 else pick(words)
        if rng.random() < 0.1:
            phrase = f"{pick(vocabulary.NEUTRAL)} {phrase}"
        if rng.random() < 0.25:
            phrase = f"{pick(vocabulary.ARTICLES)} {phrase}"
        phrases.append(phrase)
    joiner = "and" if rng.random() < 0.7 else pick(vocabulary.JOINERS)
    text = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} {joiner} {phrases[-1]}"
    form = rng.random()
    if form < 0.15:
        text = f"{pick(vocabulary.ARTICLES)} {pick(vocabulary.NOUNS)} {pick(('with', 'of', 'for', 'by'))} {text}"
    elif form < 0.25:
        text = f"{text} {pick(vocabulary.VERBS)}"
    elif form < 0.3:
        text = f"{text} in {pick(vocabulary.ARTICLES)} {pick(vocabulary.NEUTRAL)} {pick(vocabulary.NOUNS)}"
    elif form < 0.33:  # a word that the vocabulary spells in letters
        letters = "".join(pick(tuple("abcdefghijklmnopqrstuvwxyz")) for _ in range(int(rng.integers(3, 7))))
        text = f"{text} {letters}"
    return text
