"""Which items a page shows: the whole range of scores, and every word."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from aiba_eval.report.entries import Entries

if TYPE_CHECKING:
    from aiba_eval.evaluation import Item


def margins(entries: Entries) -> dict[str, float]:
    """Item → mean over its words and levels of average precision less chance, of the primary variant and target."""
    scores = entries.scores
    if scores is None or not len(scores) or entries.primary is None:
        return {}
    own = scores[
        (scores["variant"] == entries.variants[0])
        & (scores["target"] == entries.primary)
        & (scores["metric"] == "average_precision")
    ]
    mean = (own["value"] - own["chance"]).groupby(own["item"]).mean()
    return {str(name): float(value) for name, value in mean.items() if math.isfinite(value)}


def choose(entries: Entries, count: int) -> list[Item]:
    """``count`` items, evenly spaced over the ranking by :func:`margins` from the best to the worst, changed where needed so that
    every word is heard; best first. Items without a score come last.

    Raises
    ------
    ValueError
        ``count`` is below 1.
    """
    if count < 1:
        raise ValueError(f"a page needs at least one item, got {count}")
    margin = margins(entries)
    ranked = sorted(entries.items, key=lambda item: (-margin.get(item.id, -math.inf), item.id))
    if count >= len(ranked):
        return ranked
    scored = [item for item in ranked if item.id in margin] or ranked
    pool = scored if len(scored) >= count else ranked
    chosen = [pool[i] for i in np.rint(np.linspace(0, len(pool) - 1, count)).astype(int)]
    for item in pool:  # the best that has a word not yet heard replaces one that nobody would miss
        heard = _words(chosen)
        if item in chosen or set(item.words) <= heard:
            continue
        spare = [k for k, one in enumerate(chosen) if set(one.words) <= _words(chosen[:k] + chosen[k + 1 :])]
        if spare:
            chosen[spare[len(spare) // 2]] = item  # from the middle: the best and the worst stay
    return sorted(chosen, key=ranked.index)


def _words(items: Sequence[Item]) -> set[str]:
    return {word for item in items for word in item.words}
