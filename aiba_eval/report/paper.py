"""The tables of the paper, in its manner, with the references beside each figure.

"The paper" is AIBA, arXiv 2509.20891. **Table 1** has a line per instrument class and the averages over classes; **Table 3** has
a line per ablation. Here every line of the model is followed by what maps get on the same masks that never saw the model. The
columns are the paper's metrics; the order of lines is this project's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aiba_eval import metrics
from aiba_eval.report.entries import ALL, BESIDE, DEFAULT, METRICS, REFERENCES, TARGETS, Entries, Entry, Key
from aiba_eval.report.table import Line, Number, Table, number

#: columns of both tables, as far as the run measured them
COLUMNS = ("precision", "recall", "f1", "iou", "average_precision", "profile_pearson", "pointing_game")
#: how cells are averaged over classes; see :func:`aiba_eval.metrics.averaged`
AVERAGES: Mapping[str, str] = {
    "micro": "micro (cells of all classes)",
    "macro": "macro (classes alike)",
    "positive-weighted": "positive-weighted (classes by their cells)",
}
_COUNTED = ("precision", "recall", "f1", "iou")


def table1(entries: Entries, target: str, level: int) -> Table:
    """Per class and over classes, at one noise level, against one kind of target.

    Means are over pieces, with their intervals. Averages over classes are of cells, counted over all pieces at the threshold 0.5.

    Raises
    ------
    ValueError
        The run has no scores against that target at that level.
    """
    columns = [name for name in COLUMNS if name in entries.metrics]
    lines: list[Line] = []
    words = entries.words(target, level)
    for word in [*words, ALL]:
        of = _of(entries, DEFAULT, level, target, word, columns)
        if not any(of.values()):
            continue
        count = max(entry.n for entry in of.values() if entry)
        unit = ("sample" if entries.generates else "piece") + ("s" if count > 1 else "")
        lines.append(Line("group", (f"{'all words' if word == ALL else word} ({count} {unit})",)))
        lines += _block(of, columns, "model")
    if not lines:
        raise ValueError(f"the run has no scores against {target!r} at level {level}")
    for label, averages in _averages(entries, target, level).items():
        lines.append(Line("group", (AVERAGES[label],)))
        for source, found in averages.items():
            cells = [Number(found[name]) if name in found else "" for name in columns]
            lines.append(Line("main" if source == "model" else "reference", (REFERENCES.get(source, source), *cells)))
    return Table(
        f"table1-{part_of_name(target)}-{level}",
        f"Table 1: {entries.model['name']}, {entries.at(level)}, against {TARGETS.get(target, target)}",
        ("Class", *(METRICS[name] for name in columns)),
        tuple(lines),
        _notes(entries, columns, averages=True),
    )


def table3(entries: Entries, target: str, level: int) -> Table:
    """The ablations: every variant over all classes, at one noise level, against one kind of target.

    A reference that is the same for every variant stands once, below the first; one that depends on the variant's own maps
    (chance at a threshold, the oracle at its layers' resolution) wherever it differs.

    Raises
    ------
    ValueError
        The run has no scores against that target at that level.
    """
    columns = [name for name in COLUMNS if name in entries.metrics]
    lines: list[Line] = []
    first: list[Line] = []
    for variant in entries.variants:
        of = _of(entries, variant, level, target, ALL, columns)
        if not any(of.values()):
            continue
        block = _block(of, columns, variant)
        shown = {str(line.cells[0]): tuple(map(str, line.cells)) for line in first}
        lines += [line for line in block if tuple(map(str, line.cells)) != shown.get(str(line.cells[0]))]
        first = first or block[1:]
    if not lines:
        raise ValueError(f"the run has no scores against {target!r} at level {level}")
    return Table(
        f"table3-{part_of_name(target)}-{level}",
        f"Table 3: ablations of {entries.model['name']}, {entries.at(level)}, against {TARGETS.get(target, target)}",
        ("Variant", *(METRICS[name] for name in columns)),
        tuple(lines),
        (*_notes(entries, columns), "A reference below a variant differs from that of the first."),
    )


def tables(entries: Entries) -> list[Table]:
    """Table 1 for every target and level, Table 3 likewise where the run has ablations; the primary target first."""
    found = []
    ablated = len({key.variant for key in entries.means}) > 1
    for target in entries.targets:
        for level in entries.levels:
            scored = {
                key.variant
                for key in entries.means
                if (key.level, key.target) == (level, target) and key.metric in COLUMNS
            }
            if scored:
                found.append(table1(entries, target, level))
            if ablated and len(scored) > 1:
                found.append(table3(entries, target, level))
    return found


def contrast_table(entries: Entries) -> Table | None:
    """Word swap and piece swap of the model and of its references; None where there are none."""
    kinds = list(dict.fromkeys(str(row["contrast"]) for row in entries.contrasts))
    lines: list[Line] = []
    for target in dict.fromkeys(str(row["target"]) for row in entries.contrasts):
        of = [row for row in entries.contrasts if str(row["target"]) == target]
        lines.append(Line("group", (TARGETS.get(target, target),)))
        for source, level, word in dict.fromkeys(map(_source, of)):
            label = REFERENCES.get(str(source), str(source))
            label += f", {entries.at(int(level))}" if math.isfinite(level) and not entries.generates else ""
            label += f", {word}" if word != ALL else ""
            cells: list[Number | str] = []
            for kind in kinds:
                row = next(
                    (r for r in of if (*_source(r), r["contrast"]) == (source, level, word, kind)),
                    None,
                )
                ends = (number(row["value"]), number(row["low"]), number(row["high"])) if row else (math.nan,) * 3
                cells += [Number(*ends, signed=True), _p(row["p"]) if row else ""]
            lines.append(Line("main" if source == "model" else "reference", (label, *cells)))
    if not lines:
        return None
    columns = tuple(part for kind in kinds for part in (kind.replace("_", " ").capitalize(), "p"))
    notes = (
        "By average precision. Word swap: this word's map, less the other words' maps of the same audio, on the same mask. "
        "Piece swap: this word's map, less the same word's maps from other pieces. 0 is what a map has that does not know.",
    )
    return Table("contrasts", "Contrasts", ("Map", *columns), tuple(lines), notes)


def control_table(entries: Entries) -> Table | None:
    """The model's controls; None where none was measured."""
    lines = []
    for row in entries.controls:
        ends = (number(row["difference"]), number(row["low"]), number(row["high"]))
        label = f"{str(row['name']).replace('_', ' ')}: {str(row['measure']).replace('_', ' ')}"
        label += f", {entries.at(int(row['level']))}" if math.isfinite(number(row.get("level"))) else ""
        figures = (Number(number(row["observed"])), Number(number(row["control"])), Number(*ends, signed=True))
        lines.append(Line("main", (label, *figures, _p(row["p"]), str(row["count"]))))
    if not lines:
        return None
    notes = tuple(dict.fromkeys(str(row["note"]) for row in entries.controls if row.get("note")))
    columns = ("Control", "Observed", "Under control", "Difference", "p", "n")
    return Table("controls", "Controls of the model", columns, tuple(lines), notes)


# ---- lines


def _of(
    entries: Entries, variant: str, level: int, target: str, word: str, columns: Sequence[str]
) -> dict[str, Entry | None]:
    return {name: entries.means.get(Key(variant, level, target, word, name)) for name in columns}


def _block(of: Mapping[str, Entry | None], columns: Sequence[str], label: str) -> list[Line]:
    """The model's line and one for each reference."""
    own = [Number(entry.value, entry.low, entry.high) if entry else Number(math.nan) for entry in map(of.get, columns)]
    lines = [Line("main", (label, *own))]
    for reference in BESIDE:
        beside = [entry.references.get(reference, math.nan) if entry else math.nan for entry in map(of.get, columns)]
        if np.isfinite(beside).any():
            lines.append(Line("reference", (REFERENCES[reference], *map(Number, beside))))
    return lines


def _notes(entries: Entries, columns: Sequence[str], *, averages: bool = False) -> tuple[str, ...]:
    unit = "generated samples (the unit is the seed)" if entries.generates else "pieces"
    notes = [
        f"Means over {unit}; in brackets 95 % BCa bootstrap intervals, where there are ten or more. "
        "A reference is averaged over those that have it."
    ]
    if "profile_pearson" in columns:
        notes.append("A correlation of profiles has no closed-form chance: smooth profiles correlate by accident.")
    if averages:
        notes.append("A class of fewer than ten has no interval: nothing follows from it alone.")
        notes.append(
            "Averages over classes count the cells of the map above half of its range, over all pieces; a reference that "
            "lacks a class is left out there."
        )
    return tuple(notes)


def _source(row: Mapping[str, Any]) -> tuple[str, float, str]:
    """Which map a contrast is of; the level is infinite where the map has none."""
    level = number(row["level"])
    return str(row["map"]), level if math.isfinite(level) else math.inf, str(row["word"])


def _p(value: object) -> str:
    p = number(value)
    return f"{p:.4f}" if math.isfinite(p) else ""


def part_of_name(target: str) -> str:
    """A target as part of a table's name: a run may come from a stranger, and the name becomes a file's."""
    return re.sub(r"[^\w-]+", "-", target)


# ---- averages over classes


def _averages(entries: Entries, target: str, level: int) -> dict[str, dict[str, dict[str, float]]]:
    """Average → source → metric → value, of counts of cells; sources that lack a class are left out."""
    counts = entries.counts.get((target, level))
    if not counts:
        return {}
    words = list(counts["model"])
    whole = {source: [of[word] for word in words] for source, of in counts.items() if set(of) == set(words)}
    # a map of the model's density whose cells lie anywhere: expected counts
    expected = []
    for tp, fp, fn, tn in whole["model"]:
        total, on, wanted = tp + fp + fn + tn, tp + fp, tp + fn
        off, empty = total - on, total - wanted
        expected.append(np.array([on * wanted, on * empty, off * wanted, off * empty]) / total)
    sources = {"model": whole["model"], "chance": expected, **{k: v for k, v in whole.items() if k != "model"}}
    averages = {source: metrics.averaged(np.array(rows)) for source, rows in sources.items()}
    return {label: {source: of[label] for source, of in averages.items()} for label in AVERAGES}
