"""Evidence for effect maps and attention of the embedded pair, on held-out pieces of a rendered stem set.

    python examples/evidence_effects.py --stems STEMS --out sweep --split validation --timesteps 300 400 500 600 700 800 900 \\
        --reinitialisations 0
    python examples/evidence_effects.py --stems STEMS --out evidence-effects --sweep sweep --page docs/results-effects.md
    python examples/evidence_effects.py --stems STEMS --out trial --pieces 4 --reinitialisations 1 --draws 1

`aiba_eval.compare` measures (its module says what each figure is); this script chooses the material, and holds the figures of the
diffusion transformer against what has to be shown:

at low noise             word swap and piece swap of the effect maps: intervals above 0, values at least .19 and .03
at high noise (t = 800)  presence at least .75, by effect mass in nats of log-mel or in power
at both                  neutral edits below a quarter of a present word's effect mass
everywhere               outside the distribution over 20 fresh initialisations

Low noise is t = 300, and beside it t = 600: there the sum of the transformer's word swap and piece swap was largest on the
validation split (the first command; both go on where they stopped). Swaps are held against two dominance masks: cells down to 40 dB
below the loudest of the mix, and down to 60 dB.

The folder holds what `aiba compare` writes, and `evidence.json` and `evidence.md`: the page.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from aiba_eval.clips import TARGETS
from aiba_eval.comparing import Comparison, compare_on
from aiba_eval.outputs import write_json
from aiba_plugins.demo import trained

LOW, MIDDLE, HIGH = LEVELS = 300, 600, 800
MODELS = ("demo:unet", "demo:dit")
DOMINANCE = ("dominance", "dominance_60")
#: (model, map, level, target, measure) → what it has to be: (at least, interval above) or at most
AT_LEAST = {
    ("demo:dit", "effect", level, target, measure): (least, 0.0)
    for level in (LOW, MIDDLE)
    for target in DOMINANCE
    for measure, least in (("word_swap", 0.19), ("piece_swap", 0.03))
} | {("demo:dit", "effect", HIGH, "", measure): (0.75, None) for measure in ("presence", "power_presence")}
AT_MOST = {("demo:dit", "effect", level, "", "neutral_share"): 0.25 for level in LEVELS}
MEASURES = (
    "score",
    "ratio",
    "word_swap",
    "piece_swap",
    "presence",
    "presence_by_word",
    "power_presence",
    "power_presence_by_word",
    "fit_presence",
    "fit_presence_by_word",
    "neutral_share",
    "agreement_swap",
)
#: measures that are shown beside fresh initialisations
BESIDE_FRESH = tuple(measure for measure in MEASURES if measure not in ("score", "ratio", "agreement_swap"))


def requirements(result: Comparison) -> list[dict[str, Any]]:
    """Every figure that has to be shown, with its interval, its fresh distribution, and whether it is there."""
    names = ("model", "map", "level", "target", "measure")
    fresh = {tuple(row[name] for name in names): row for row in result.fresh}
    measured = {row["level"] for row in result.rows}
    found = []
    for key in (*AT_LEAST, *AT_MOST):
        model, kind, level, target, measure = key
        if level not in measured:
            continue
        row = result.find(measure, model=model, map=kind, level=level, target=target)
        if key in AT_LEAST:
            least, above = AT_LEAST[key]
            wanted = f"at least {least:g}" + ("" if above is None else f", interval above {above:g}")
            met = row["value"] >= least and (above is None or row["low"] > above)
        else:
            wanted, met = f"below {AT_MOST[key]:g}", row["value"] < AT_MOST[key]
        beside = fresh.get(key)
        found.append(
            {
                **{name: row[name] for name in (*names, "value", "low", "high", "pieces")},
                "wanted": wanted,
                "met": bool(met),
                "fresh": [] if beside is None else [min(beside["fresh"]), max(beside["fresh"])],
                "outside_fresh": None if beside is None else beside["outside"],
            }
        )
    return found


def decimal(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def spread(row: dict[str, Any]) -> str:
    """A value with its interval, if it has one."""
    bounded = row["low"] is not None and math.isfinite(row["low"])  # JSON has null for NaN
    ends = f" [{decimal(row['low'])}, {decimal(row['high'])}]" if bounded else ""
    return decimal(row["value"]) + ends


def against(row: dict[str, Any]) -> str:
    return f" ({row['target']})" if row["target"] else ""


def asked(shown: list[dict[str, Any]]) -> list[str]:
    """What has to be shown, and whether it is."""
    lines = ["| figure | wanted | value | fresh | |", "|---|---|---|---|---|"]
    for row in shown:
        name = f"{row['model']} {row['map']} t = {row['level']} {row['measure']}{against(row)}"
        fresh = " to ".join(map(decimal, row["fresh"])) or "not measured"
        state = "shown" if row["met"] and row["outside_fresh"] else "not shown"
        lines.append(f"| {name} | {row['wanted']} | {spread(row)}, n = {row['pieces']} | {fresh} | {state} |")
    return lines


def swept(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Word swap and piece swap of the transformer's effect maps at every level of a sweep."""
    lines = ["| t | target | word swap | piece swap |", "|---|---|---|---|"]
    of = [
        r
        for r in rows
        if (r["model"], r["map"], r["word"]) == (MODELS[1], "effect", "all") and r["target"] in DOMINANCE
    ]
    found = {(r["level"], r["target"], r["measure"]): r for r in of}
    for level, target in dict.fromkeys((r["level"], r["target"]) for r in of):
        cells = [spread(found[level, target, measure]) for measure in ("word_swap", "piece_swap")]
        lines.append(f"| {level} | {target} | {' | '.join(cells)} |")
    return lines


def beside_fresh(result: Comparison) -> list[str]:
    """Swaps, presence and neutral edits of both models beside what fresh initialisations have."""
    lines = ["| map | t | measure | value | fresh, lowest to highest | p | outside |", "|---|---|---|---|---|---|---|"]
    for row in result.fresh:
        if row["measure"] in BESIDE_FRESH and row["target"] in ("", *DOMINANCE):
            ends = f"{decimal(min(row['fresh']))} to {decimal(max(row['fresh']))}"
            lines.append(
                f"| {row['model']} {row['map']} | {row['level']} | {row['measure']}{against(row)} | {decimal(row['value'])} | {ends} "
                f"| {row['p']:.3f} | {'yes' if row['outside'] else 'no'} |"
            )
    return lines


def document(result: Comparison, shown: list[dict[str, Any]], sweep: Sequence[dict[str, Any]] = ()) -> str:
    """The page."""
    made = result.record["configuration"]
    fresh = ", ".join(f"{count} of `{label}`" for label, count in result.record["reinitialisations"].items())
    weights = ", ".join(f"`{label}` {of['weights']}" for label, of in made["models"].items())
    lines = [
        "# Effect maps and attention of the embedded pair",
        "",
        "Written by [`examples/evidence_effects.py`](../examples/evidence_effects.py); do not edit.",
        "",
        f"{len(result.record['clips'])} clips of {made['seconds']:g} s of {len(made['pieces'])} held-out pieces of a set that "
        "`aiba stems render` made of freely licensed MIDI; two to four instruments each, named by the prompt. "
        f"{made['draws']} draws of noise at every level, seed {made['seed']}; maps, targets and measures are those of "
        "[`compare`](comparing.md). The piece is the unit; 95 % BCa intervals. *Fresh* is the range over initialisations: "
        f"{fresh}. These are small models on rendered music: the figures say what the methods show, not what large models do.",
        "",
        f"Measured on {platform.machine()}, torch {torch.__version__}. Weights: {weights}.",
        "",
        "## Goals of the transformer's effect maps",
        "",
        *asked(shown),
    ]
    if sweep:
        lines += ["", "## Noise levels, on the validation split", "", *swept(sweep)]
    for target in TARGETS:
        lines += ["", f"## Against {target}", "", result.markdown(target=target, measures=MEASURES).rstrip()]
    if result.fresh:
        lines += ["", "## Beside fresh initialisations", "", *beside_fresh(result)]
    if result.tests:
        lines += [
            "",
            "## One model against the other",
            "",
            "| map | t | measure | difference | p | Holm |",
            "|---|---|---|---|---|---|",
        ]
    for test in result.tests:
        difference = spread({**test, "value": test["difference"]})
        lines.append(
            f"| {test['map']} | {test['level']} | {test['measure']} | {difference} | {test['p']:.4f} | {test['p_holm']:.4f} |"
        )
    return "\n".join([*lines, "", "## Notes", "", *(f"- {note}" for note in result.notes)]) + "\n"


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stems", type=Path, required=True, help="folder of a dataset in Slakh's layout")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; a stopped run goes on there")
    parser.add_argument("--weights", type=Path, default=trained.WEIGHTS, help="folder of the trained pipelines")
    parser.add_argument("--pieces", type=int, default=None, help="so many at most")
    parser.add_argument("--split", default="test", help="of the dataset")
    parser.add_argument("--timesteps", type=int, nargs="+", default=LEVELS, help="noise levels")
    parser.add_argument("--windows", type=int, default=1, help="clips of each piece")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reinitialisations", type=int, default=20)
    parser.add_argument("--fresh", nargs="+", choices=MODELS, default=MODELS, help="models to reinitialise")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--sweep", type=Path, default=None, help="folder of a run at many levels, to tell of on the page"
    )
    parser.add_argument("--page", type=Path, default=None, help="write the page there too")
    options = parser.parse_args(arguments)
    pipes = [trained.load(kind, options.weights) for kind in ("unet", "dit")]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        pipe.to(options.device)
    began = time.perf_counter()

    def progress(what: str, done: int, total: int | None) -> None:
        print(f"{time.perf_counter() - began:7.0f} s  {what} {done}/{total or '?'}", file=sys.stderr, flush=True)

    result = compare_on(
        *pipes,
        labels=MODELS,
        stems=options.stems,
        max_pieces=options.pieces,
        windows=options.windows,
        split=options.split,
        timesteps=tuple(options.timesteps),
        draws=options.draws,
        seed=options.seed,
        reinitialisations=dict.fromkeys(options.fresh, options.reinitialisations),
        batch=8,  # the quickest of 4, 8 and 16 on one CPU core
        out=options.out,
        progress=progress,
    )
    shown = requirements(result)
    write_json(options.out / "evidence.json", {"requirements": shown, **result.as_dict()})
    sweep = json.loads((options.sweep / "results.json").read_text(encoding="utf-8"))["rows"] if options.sweep else ()
    text = document(result, shown, sweep)
    (options.out / "evidence.md").write_text(text, encoding="utf-8")
    if options.page is not None:
        options.page.write_text(text, encoding="utf-8")
    print(text)
    return shown


if __name__ == "__main__":
    main()
