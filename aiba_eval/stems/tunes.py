"""Which pieces are the same tune, and the split each tune belongs to.

A tune may occur twice: in two packages, transposed, for other instruments, as a variant. If one version is learned
from and another tested on, the test measures memory. So pieces that share enough of their melodies form one tune, and
a tune is never divided between splits.

Each part's top line becomes a sequence of intervals, which transposition, tempo and instrument leave alone, and a
piece the set of its runs of `LENGTH` intervals. A run with fewer than `VARIETY` different intervals is left out:
repeated notes, trills and scales occur everywhere. Two pieces are the same tune if they share `SHARED` runs or more,
and these are at least `THRESHOLD` of the smaller set.

Over the 188 pieces of the five known sources the pairs above the threshold are those whose titles or composers say
so (Simutrans' main theme and its three reprises, 0.085–0.164; two more pairs, 0.122 and 0.080), the highest pair of
pieces that have nothing to do with each other is at 0.062, and 99 of 100 pairs are below 0.01. A copy transposed, at
another tempo and for other instruments is at 1, one with a tenth of its notes changed near 0.4.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations, pairwise

from .midi import DRUM_PROGRAM, Score

LENGTH = 8
VARIETY = 4
SHARED = 12
THRESHOLD = 0.07

Run = tuple[int, ...]


def runs(score: Score) -> frozenset[Run]:
    """The runs of `LENGTH` intervals, in semitones, in the top lines of a piece's parts."""
    lines: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)
    for note in score.notes:
        if note.program != DRUM_PROGRAM:
            line = lines[note.channel, note.program]
            beat = round(24 * note.start / score.ticks_per_beat)  # notes of a played chord are not struck at once
            line[beat] = max(note.pitch, line.get(beat, 0))
    found: set[Run] = set()
    for line in lines.values():
        pitches = [line[beat] for beat in sorted(line)]
        intervals = [b - a for a, b in pairwise(pitches)]
        found.update(tuple(intervals[i : i + LENGTH]) for i in range(len(intervals) - LENGTH + 1))
    return frozenset(run for run in found if len(set(run)) >= VARIETY)


def similarity(a: frozenset[Run], b: frozenset[Run]) -> float:
    """Share of the smaller set's runs that the other has, 0–1; 0 if they share fewer than `SHARED`."""
    shared = len(a & b)
    return shared / min(len(a), len(b)) if shared >= SHARED else 0.0


def cluster(pieces: Sequence[frozenset[Run]], threshold: float = THRESHOLD) -> list[int]:
    """For each piece the index of the first piece of its tune; likeness is passed on from pair to pair."""
    holders: dict[Run, list[int]] = defaultdict(list)
    for index, piece in enumerate(pieces):
        for run in piece:
            holders[run].append(index)
    shared: Counter[tuple[int, int]] = Counter()
    for indices in holders.values():
        shared.update(combinations(indices, 2))

    first = list(range(len(pieces)))

    def root(index: int) -> int:
        while first[index] != index:
            index = first[index]
        return index

    for (a, b), count in shared.items():
        if count >= SHARED and similarity(pieces[a], pieces[b]) >= threshold:
            a, b = sorted((root(a), root(b)))
            first[b] = a
    return [root(index) for index in range(len(pieces))]


def split_of(digests: Sequence[str]) -> str:
    """The split of a tune: 60 % train, 20 % validation, 20 % test by the smallest of its pieces' MD5 digests.

    It depends on the tune alone, so a piece is in the same split of every set that it is rendered into, unless a set
    adds another version of its tune.
    """
    number = int(min(digests)[:8], 16) % 10
    return "train" if number < 6 else "validation" if number < 8 else "test"
