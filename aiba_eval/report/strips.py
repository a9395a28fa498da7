"""Scores drawn among their references: where each mark lies. The template draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from aiba_eval.report.entries import ALL, DEFAULT, METRICS, REFERENCES, SIGNED, TARGETS, Entries, Entry, Key
from aiba_eval.report.table import fixed


@dataclass(frozen=True)
class Mark:
    """A reference: its name in the record and in words, its figure, and its place in per cent of the axis."""

    name: str
    label: str
    value: float
    place: float


@dataclass(frozen=True)
class Strip:
    """One score on an axis.

    Attributes
    ----------
    label, detail : what it is of: a word, a level
    value, low, high : places in per cent; None where there is none
    text : the score with its interval
    marks : the references
    spoken : all of it in a sentence
    """

    label: str
    detail: str
    value: float | None
    low: float | None
    high: float | None
    text: str
    marks: tuple[Mark, ...]
    spoken: str


@dataclass(frozen=True)
class Group:
    """Strips that share an axis.

    Attributes
    ----------
    title : the metric and what it is measured against
    ticks : (place in per cent, text)
    strips : top to bottom
    open : whether the page shows it at once
    """

    title: str
    ticks: tuple[tuple[float, str], ...]
    strips: tuple[Strip, ...]
    open: bool = False


def strip(
    label: str, detail: str, metric: str, value: float, low: float, high: float, beside: Mapping[str, float]
) -> Strip:
    """Places of a score and its references on the axis of its metric."""
    signed = metric in SIGNED
    text = fixed(value)
    if math.isfinite(low) and math.isfinite(high):
        text += f" [{fixed(low)}, {fixed(high)}]"
    marks = tuple(
        Mark(name, REFERENCES[name], beside[name], place)
        for name in REFERENCES
        if name in beside and (place := _place(beside[name], signed)) is not None
    )
    said = ", ".join(f"{mark.label} {fixed(mark.value)}" for mark in marks)
    what = f"{label}, {detail}" if detail else label
    spoken = f"{what}: {METRICS.get(metric, metric)} {text}" + (f"; {said}" if said else "")
    return Strip(label, detail, _place(value, signed), _place(low, signed), _place(high, signed), text, marks, spoken)


def summary_groups(entries: Entries) -> list[Group]:
    """Every metric against the primary target, and average precision against the others: all words, then each class."""
    primary = entries.primary
    if primary is None:
        return []
    wanted = [(primary, metric) for metric in sorted(entries.metrics, key=lambda name: name != "average_precision")]
    others = [target for target in entries.targets if target != primary]
    wanted += [(target, metric) for target in others for metric in ("average_precision", "share_spearman")]
    found: list[Group] = []
    for target, metric in wanted:
        strips = []
        for word in [ALL, *_words(entries, target)]:
            for level in entries.levels:
                entry = entries.means.get(Key(DEFAULT, level, target, word, metric))
                if entry is not None and math.isfinite(entry.value):
                    strips.append(_mean(entries, entry, word, level, metric))
        if strips:
            found.append(Group(_title(metric, target), _ticks(metric), tuple(strips), open=not found))
    return found


def headline(entries: Entries) -> list[tuple[str, Entry]]:
    """(level in words, average precision over all words) against the primary target."""
    keys = [Key(DEFAULT, level, str(entries.primary), ALL, "average_precision") for level in entries.levels]
    return [(entries.at(key.level), entries.means[key]) for key in keys if key in entries.means]


def item_group(entries: Entries, item: str) -> Group | None:
    """Average precision of one item's words against the primary target; None where it has no score."""
    scores = entries.scores
    if scores is None or not len(scores):
        return None
    own = scores[
        (scores["item"] == item)
        & (scores["variant"] == entries.variants[0])
        & (scores["target"] == entries.primary)
        & (scores["metric"] == "average_precision")
    ]
    strips = []
    for row in own.sort_values("word", kind="stable").to_dict("records"):
        if math.isfinite(row["value"]):
            beside = {name: float(row[name]) for name in REFERENCES if name in row}
            detail = "" if entries.generates else entries.at(int(row["level"]))
            strips.append(
                strip(str(row["word"]), detail, "average_precision", row["value"], math.nan, math.nan, beside)
            )
    if not strips:
        return None
    return Group(_title("average_precision", str(entries.primary)), _ticks("average_precision"), tuple(strips), True)


def _mean(entries: Entries, entry: Entry, word: str, level: int, metric: str) -> Strip:
    label = "all words" if word == ALL else word
    detail = ", ".join(filter(None, ("" if entries.generates else entries.at(level), f"n = {entry.n}")))
    return strip(label, detail, metric, entry.value, entry.low, entry.high, entry.references)


def _words(entries: Entries, target: str) -> list[str]:
    return list(dict.fromkeys(word for level in entries.levels for word in entries.words(target, level)))


def _title(metric: str, target: str) -> str:
    return f"{METRICS.get(metric, metric)} against {TARGETS.get(target, target)}"


def _ticks(metric: str) -> tuple[tuple[float, str], ...]:
    at = (-1.0, -0.5, 0.0, 0.5, 1.0) if metric in SIGNED else (0.0, 0.25, 0.5, 0.75, 1.0)
    return tuple((_place(value, metric in SIGNED) or 0.0, fixed(value, 2).rstrip("0").rstrip(".")) for value in at)


def _place(value: float, signed: bool) -> float | None:
    """Per cent of the axis, or None for what is undefined; what lies beyond an end is drawn at it."""
    if not math.isfinite(value):
        return None
    share = (value + 1) / 2 if signed else value
    return round(100 * min(max(share, 0.0), 1.0), 2)
