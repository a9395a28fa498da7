"""Figures of the embedded pair on held-out pieces, and that a run survives being killed: docs/results.md is what this writes.

    python examples/evidence_evaluation.py --stems STEMS --out evidence-evaluation --page docs/results.md

STEMS is a rendered set with splits (`aiba stems render`). Three parts, each of which goes on where it was stopped:

unet, dit     `aiba evaluate` of both models: test pieces, priors of the training split, layer weights of the validation split, all
              ablations and controls, 20 fresh initialisations of each
killed        60 pieces; a process is killed ten times at random and started again; results are compared byte for byte with those of
              a run that was left alone, and with those of two dask workers
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from aiba_eval.datasets import slakh
from aiba_eval.evaluation import ABLATIONS, Configuration, Run, Variant, evaluate, evaluate_on
from aiba_eval.outputs import write_json

MODELS = {"unet": "demo:unet", "dit": "demo:dit"}
SECONDS, LEVELS, DRAWS, FRESH = 2.56, (300, 800), 4, 20
KILLED, KILLS = 60, 10
REFERENCES = {
    "chance": "chance",
    "mix_energy": "mix energy",
    "class_prior": "class prior",
    "prior_times_mix": "prior × mix",
    "oracle_projection": "oracle",
    "other_word": "other word",
    "other_piece": "other piece",
    "time_shift": "time shift",
}


def configuration(fresh: int) -> Configuration:
    """Of both models' runs."""
    return Configuration(
        seconds=SECONDS,
        timesteps=LEVELS,
        draws=DRAWS,
        variants={"default": Variant(), **ABLATIONS},
        prompt_swap=True,
        absent=True,
        neutral=True,
        noise_seeds=2,
        reinitialisations=fresh,
        keep_maps=False,
    )


# ---- killing


def quick() -> Configuration:
    """Of the run that is killed: what matters is that every item is whole."""
    return Configuration(seconds=SECONDS, timesteps=(800,), draws=1, metrics=("average_precision",), resamples=999)


def killed_pieces(stems: Path) -> list[Any]:
    """Pieces of all splits."""
    found = [piece for split in ("test", "validation", "train") for piece in slakh.pieces(stems, split)]
    return found[:KILLED]


def run_quick(stems: Path, out: Path, dask: str | None = None) -> Run:
    """The run that is killed, left alone, or done by workers."""
    return evaluate("demo:dit", killed_pieces(stems), quick(), out=out, device="cpu", dask=dask)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a run but its manifest."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "evaluate.json")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def survives(stems: Path, out: Path) -> dict[str, Any]:
    """Kill a run ten times at random moments, and compare."""
    done = out / "killed.json"
    if done.is_file():
        found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return found
    began = time.perf_counter()
    run_quick(stems, out / "left-alone")
    whole = time.perf_counter() - began
    command = [sys.executable, __file__, "--stems", str(stems), "--out", str(out), "--only-killed"]
    rng, kept = random.Random(0), []
    while len(kept) < KILLS:
        child = subprocess.Popen(command)
        try:
            child.wait(12 + rng.uniform(0, whole / 8))  # start-up, then somewhere in the work
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            kept.append(len(list((out / "killed" / "items").glob("*/*/item.json"))))
        else:
            print("it came to its end before the kill: begin anew with a longer run", file=sys.stderr)
            break
    run = run_quick(stems, out / "killed")
    alone = digests(out / "left-alone")
    run_quick(stems, out / "workers", dask="local:2")
    found = {
        "pieces": len(run.record["configuration"]["pieces"]),
        "items": len(run.items),
        "kills": len(kept),
        "items after each kill": kept,
        "files": len(alone),
        "killed is identical": digests(out / "killed") == alone,
        "workers are identical": digests(out / "workers") == alone,
        "seconds": whole,
    }
    write_json(done, found)
    return found


# ---- the page


def number(value: float | None, signed: bool = False) -> str:
    """Three decimals; a dash where there is none."""
    if value is None or value != value:
        return "–"
    return (
        f"{value:{'+' if signed else ''}.3f}".replace("-", "−").replace("0.", ".", 1)
        if abs(value) < 1
        else f"{value:.3f}"
    )


def rarity(p: float | None) -> str:
    """A p-value."""
    return "< .001" if p is not None and p < 0.0005 else number(p)


def ends(row: dict[str, Any], signed: bool = False) -> str:
    """A value with its interval."""
    value = number(row["value"], signed)
    return (
        value if row["low"] != row["low"] else f"{value} [{number(row['low'], signed)}, {number(row['high'], signed)}]"
    )


def score_table(run: Run, target: str, word: str = "all") -> list[str]:
    """Average precision of the default variant beside every reference."""
    rows = [
        row
        for row in run.summary()
        if row["variant"] == "default"
        and row["metric"] == "average_precision"
        and row["target"] == target
        and row["word"] == word
    ]
    lines = []
    for level in LEVELS:
        at = {row["reference"]: row for row in rows if row["level"] == level}
        if at:
            own = next(iter(at.values()))
            beside = [number(at[name]["reference_value"]) if name in at else "–" for name in REFERENCES]
            lines.append(
                f"| {run.record['configuration']['model']['name']} | {level} | {ends(own)} | {' | '.join(beside)} |"
            )
    return lines


def page(runs: dict[str, Run], killed: dict[str, Any] | None) -> str:
    """docs/results.md."""
    first = next(iter(runs.values()))
    pieces = len({item.piece for item in first.items})
    config = first.record["configuration"]
    heading = f"| model | t | AP | {' | '.join(REFERENCES.values())} |\n|---|---|---|{'---|' * len(REFERENCES)}"
    text = [
        "# Results of the embedded pair",
        "",
        "Written by [`examples/evidence_evaluation.py`](../examples/evidence_evaluation.py); do not edit.",
        "",
        f"Attention of `demo:unet` and `demo:dit` ([demo models](demo-models.md)) on {pieces} held-out pieces of a set that `aiba stems "
        f"render` made of freely licensed MIDI: windows of {SECONDS:g} s of the pieces' own mixes, noise levels {LEVELS[0]} and "
        f"{LEVELS[1]}, {DRAWS} draws each, seed {config['seed']}, every site. The piece is the unit; 95 % BCa intervals; priors and profiles "
        "of the training split. These are small models on rendered music: the figures say what the evaluation shows, not what large "
        "models do.",
        "",
        f"Measured on {platform.machine()}, one core, torch {config['versions']['torch']}. Weights: "
        + ", ".join(
            f"`{run.record['configuration']['model']['name']}` {run.record['configuration']['model']['weights']}"
            for run in runs.values()
        )
        + ".",
    ]
    for target in ("dominance", "energy", "band:measured"):
        text += ["", f"## Average precision against {target}", "", heading]
        text += [line for run in runs.values() for line in score_table(run, target)]
    text += [
        "",
        "## Contrasts against dominance",
        "",
        "| map | t | word swap | p | piece swap | p |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs.values():
        found: dict[tuple[str, Any], dict[str, Any]] = {}
        for row in run.contrasts():
            if row["target"] == "dominance" and (row["map"] in ("model", "oracle_projection") or run is first):
                name = (
                    row["map"]
                    if row["map"] not in ("model", "oracle_projection")
                    else f"{config_name(run)} {row['map']}"
                )
                level = "" if row["level"] != row["level"] else row["level"]
                found.setdefault((name.replace("_", " "), level), {})[row["contrast"]] = row
        for (name, level), both in found.items():
            cells = [
                f"{ends(both[k], True)} | {rarity(both[k]['p'])}" if k in both else " | "
                for k in ("word_swap", "piece_swap")
            ]
            text.append(f"| {name} | {level} | {' | '.join(cells)} |")
    text += [
        "",
        "## Controls",
        "",
        "| model | control | measure | t | own | under control | difference | p | n |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs.values():
        for row in run.controls():
            span = f"{number(row['difference'], True)} [{number(row['low'], True)}, {number(row['high'], True)}]"
            text.append(
                f"| {config_name(run)} | {row['name'].replace('_', ' ')} | {row['measure'].replace('_', ' ')} | {row['level']} | "
                f"{number(row['observed'])} | {number(row['control'])} | {span} | {rarity(row['p'])} | {row['count']} |"
            )
    text += [
        "",
        "For `reinitialised` the brackets are the differences from the largest and the smallest of the fresh models: a figure counts where "
        "both lie above 0.",
        "",
        "## Ablations",
        "",
        "Average precision against dominance; one change to the default each.",
        "",
        "| variant | "
        + " | ".join(f"{config_name(run)} t = {level}" for run in runs.values() for level in LEVELS)
        + " |",
        "|---|" + "---|" * (len(runs) * len(LEVELS)),
    ]
    for variant in config["variants"]:
        cells = []
        for run in runs.values():
            for level in LEVELS:
                row = next(
                    (
                        r
                        for r in run.summary()
                        if (r["variant"], r["metric"], r["target"], r["word"], r["level"])
                        == (variant, "average_precision", "dominance", "all", level)
                    ),
                    None,
                )
                cells.append(ends(row) if row else "–")
        text.append(f"| {variant} | {' | '.join(cells)} |")
    text += ["", "## By class", "", "Against dominance, at the higher noise; classes of at least 10 pieces.", ""]
    text += [
        f"| model | class | pieces | AP | {' | '.join(list(REFERENCES.values())[:3])} |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs.values():
        for word in sorted({row["word"] for row in run.summary()} - {"all"}):
            at = {
                row["reference"]: row
                for row in run.summary()
                if (row["word"], row["level"], row["target"], row["metric"])
                == (word, LEVELS[1], "dominance", "average_precision")
            }
            own = next(iter(at.values()), None)
            if own and own["n"] >= 10:
                beside = [number(at[name]["reference_value"]) if name in at else "–" for name in list(REFERENCES)[:3]]
                text.append(f"| {config_name(run)} | {word} | {own['n']} | {ends(own)} | {' | '.join(beside)} |")
    if killed is not None:
        text += [
            "",
            "## Killed and resumed",
            "",
            f"A run over {killed['pieces']} pieces ({killed['items']} usable windows) was killed {killed['kills']} times at random "
            f"(items finished after each kill, those of the priors with them: {', '.join(map(str, killed['items after each kill']))}; a number "
            "that stands still is a kill at start-up or in scoring) and started again each time. "
            f"Its {killed['files']} files are {'byte for byte those' if killed['killed is identical'] else 'NOT those'} of a run that was "
            f"left alone; those of two dask workers are {'too' if killed['workers are identical'] else 'NOT'}.",
        ]
    text += [
        "",
        "## Notes",
        "",
        *(f"- {config_name(run)}: {note}" for run in runs.values() for note in run.record["notes"]),
    ]
    return "\n".join(text) + "\n"


def config_name(run: Run) -> str:
    """The model's name."""
    return str(run.record["configuration"]["model"]["name"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stems", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; a stopped run goes on there")
    parser.add_argument("--page", type=Path, default=None, help="write the page there")
    parser.add_argument("--models", default="unet,dit")
    parser.add_argument("--pieces", type=int, default=None, help="so many at most of each split")
    parser.add_argument("--reinitialisations", type=int, default=FRESH)
    parser.add_argument("--without-killing", action="store_true")
    parser.add_argument("--only-killed", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_killed:
        run_quick(options.stems, options.out / "killed")
        return
    began = time.perf_counter()

    def tell(what: str, done: int, total: int | None) -> None:
        if total and (done % 10 == 0 or done == total):
            print(f"{time.perf_counter() - began:7.0f} s  {what} {done}/{total}", file=sys.stderr, flush=True)

    runs = {
        name: evaluate_on(
            MODELS[name],
            configuration(options.reinitialisations),
            root=options.stems,
            max_pieces=options.pieces,
            out=options.out / name,
            device="cpu",
            progress=tell,
        )
        for name in options.models.split(",")
    }
    killed = None if options.without_killing else survives(options.stems, options.out)
    text = page(runs, killed)
    (options.out / "results.md").write_text(text, encoding="utf-8")
    if options.page is not None:
        options.page.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
