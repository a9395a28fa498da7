"""Write the model card of the embedded weights from what was recorded: training, digests, evidence.

    python examples/training/card.py --evidence evidence/evidence.json

It is called MODEL_CARD.md and lies beside the weights; no number in it is typed by hand.
"""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from pathlib import Path
from typing import Any

from aiba_plugins.demo import trained

TARGETS = ("dominance", "dominance_60")
REFERENCES = ("mix_energy", "class_prior", "prior_mix", "oracle_projection")

INTRODUCTION = """\
# Model card: demo:unet and demo:dit

Two small text-to-audio models that are trained for real, so that AIBA shows something true on a machine without a
connection. They share data, mel definition (AudioLDM2's: 16 kHz, 64 bins, hop 10 ms), mel VAE and vocoder; only the
denoiser and its text encoder differ:

- **demo:unet** is diffusers' `AudioLDM2Pipeline`: a U-Net with AudioLDM2's topology (no attention at the first level, three
  transformers per position), T5, a GPT-2 stream, CLAP. CLAP is tiny and random: it only feeds the GPT-2 stream.
- **demo:dit** is `MelDiTPipeline`: diffusers' `StableAudioDiTModel` on the same latent with its 16 bands folded into channels,
  so that its tokens are time columns and its attention has no frequency axis.

They are for demonstrating and testing attention analysis. They make short sketches of General MIDI instruments, not music.
"""

LIMITS = """\
## Limits

- Trained on General MIDI renderings with one soundfont: an instrument has the same few timbres in every piece, held-out ones
  included. Splits are by tune, so a held-out piece is a new tune with known timbres.
- Clips of 2.56 s: longer audio has no large-scale form. The vocoder has no discriminator: transients and noise are smeared.
- The vocabulary is about 80 words (`aiba_plugins.demo.vocabulary`); any other word is spelt in letters and means nothing.
- Scores on these models say how methods compare on them, and nothing about AudioLDM2 or Stable Audio.
- The music's licences are free ones, some of them copyleft; the weights hold no audio of it. See `NOTICE` of the stem set.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=trained.WEIGHTS)
    parser.add_argument(
        "--evidence", type=Path, default=None, help="the evidence.json that examples/evidence_demo.py wrote"
    )
    options = parser.parse_args()
    facts = json.loads((options.weights / "training.json").read_text())
    digests = json.loads((options.weights / trained.DIGESTS).read_text())
    evidence = json.loads(options.evidence.read_text()) if options.evidence else {}
    sections = [INTRODUCTION, data(facts["data"]), training(facts)]
    if evidence:
        sections += [scores(kind, evidence) for kind in ("unet", "dit")]
    sections += [LIMITS, files(digests)]
    (options.weights / "MODEL_CARD.md").write_text("\n".join(sections), encoding="utf-8")


def data(about: dict[str, Any]) -> str:
    """Which music, under which licences."""
    listed = [f"| {name} | {count} |" for name, count in sorted(about["licences"].items())]
    instruments = sorted(about["instruments"].items(), key=lambda item: -item[1])
    named = ", ".join(f"{name} {count}" for name, count in instruments)
    return "\n".join(
        [
            "## Data\n",
            f"{about['pieces']} pieces of game music, rendered from MIDI with FluidR3 GM (MIT), 60 s of each at most; training",
            "split only.\n",
            "| licence | pieces |",
            "|---|---|",
            *listed,
            f'\nPieces per instrument: {named}. "ethnic", "effects" and "other" stems are not used.\n',
        ]
    )


def training(facts: dict[str, Any]) -> str:
    """Steps, time and loss of every part."""
    rows, curves = [], []
    for part in ("vae", "vocoder", "unet", "dit"):
        if part not in facts:
            continue
        of = facts[part]
        first, last = of["loss_curve"][0], of["loss_curve"][-1]
        rows.append(
            f"| {part} | {of['parameters'] / 1e6:.2f} M | {of['steps']} | {spans(of['runs'])} | "
            f"{of['training_seconds'] / 60:.0f} min | {first[1]:.3f} → {last[1]:.3f} |"
        )
        points = of["loss_curve"][:: max(1, len(of["loss_curve"]) // 12)]
        curves.append(f"- {part}: " + ", ".join(f"{step}: {loss:.3f}" for step, loss in points))
    return "\n".join(
        [
            "## Training\n",
            "Two shared CPU cores, `examples/training/`, seed 0, AdamW, averaged weights (0.999); denoisers predict v, with one",
            "prompt in ten empty.\n",
            "| part | parameters | steps | clips a step, from step | time | loss, first 50 steps → last |",
            "|---|---|---|---|---|---|",
            *rows,
            "\nLoss by step:\n",
            *curves,
            "",
        ]
    )


def spans(runs: list[dict[str, Any]]) -> str:
    """Batch and clip length, how many mixes were made of every window, and from which step on."""

    def length(run: dict[str, Any]) -> str:
        return f"{run.get('columns', 25 * run['seconds']) / 25:g}"

    def what(run: dict[str, Any]) -> str:
        several = f", {run['subsets']} mixes of every window," if run.get("subsets", 1) > 1 else ""
        return f"{run['batch']} × {length(run)} s{several}"

    return "; ".join(f"{text} from {next(of)['from_step']}" for text, of in groupby(runs, what))


def figure(row: dict[str, Any]) -> str:
    """A value with its interval."""
    if row["low"] is None:
        return f"{row['value']:.3f}"
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def scores(kind: str, evidence: dict[str, Any]) -> str:
    """Contrasts, references and generation of one model."""
    lines = [f"## Scores of demo:{kind}\n"]
    if "attention" in evidence:
        lines += attention(f"demo:{kind}", evidence["attention"])
    of = evidence.get(kind, {})
    if "generation" in of:
        found = of["generation"]
        names = found["classes"]
        centroids = ", ".join(f"{name} {hz:.0f} Hz" for name, hz in found["median_centroid"].items())
        lines += [
            "Generated audio (20 seeds per instrument, 20 steps, guidance 2.5, 5 s), heard by a classifier trained on single",
            f"training stems (right on {found['classifier_on_real_test_stems']:.0%} of held-out real ones): "
            f"**{found['accuracy']:.0%}** named as prompted.\n",
            f"| prompt | {' | '.join(names)} |",
            "|---|" + "---|" * len(names),
        ]
        lines += [f"| {name} | {' | '.join(str(found['confusion'][name][n]) for n in names)} |" for name in names]
        lines.append(f"\nMedian spectral centroids: {centroids}.\n")
    if "speed" in of:
        lines.append(
            f"5 s of audio, 20 steps with guidance: {of['speed']['plain']:.1f} s, with capture {of['speed']['captured']:.1f} s "
            f"({of['speed']['threads']} CPU threads).\n"
        )
    return "\n".join(lines)


def attention(model: str, of: dict[str, Any]) -> list[str]:
    """Cross-attention of one model against dominance masks."""
    level, settings = of["level"], of["configuration"]
    rows = [row for row in of["rows"] if row["map"] in ("attention", *REFERENCES)]

    def row(measure: str, **where: Any) -> dict[str, Any]:
        wanted = {"measure": measure, "target": "dominance", **where}
        return next(r for r in rows if all(r[key] == value for key, value in wanted.items()))

    by_level = ", ".join(f"{key}: {value:.3f}" for key, value in of["validation_word_swap"].items())
    own = [
        r
        for r in rows
        if (r["model"], r["map"], r["target"], r["measure"]) == (model, "attention", "dominance", "score")
    ]
    lines = [
        "Cross-attention against dominance masks (more than half of the power, down to 40 dB below the loudest cell; in the last",
        f"column down to 60 dB; on a {settings['grid']['time']} × {settings['grid']['mel']} mel grid), {len(of['clips'])} clips of",
        f"{own[0]['pieces']} held-out pieces, timestep {level}, all word-aligned sites, {settings['draws']} noise draws, seed {settings['seed']}; "
        "unit = piece, 95 % BCa intervals;",
        f"AP / chance is a ratio of means. The level is demo:unet's best word swap on the validation split ({by_level}).",
        "Definitions: `aiba_eval/comparing.py`, `examples/evidence_demo.py`.\n",
        "| word | pieces | AP | chance | AP / chance | word swap | piece swap | word swap, 60 dB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for score in own:
        where = {"model": model, "map": "attention", "word": score["word"]}
        cells = [figure(row(name, **where)) for name in ("score", "chance", "ratio", "word_swap", "piece_swap")]
        cells.append(figure(row("word_swap", **where | {"target": "dominance_60"})))
        lines.append(f"| {score['word']} | {score['pieces']} | {' | '.join(cells)} |")
    lines += ["\n| reference, all words | AP | word swap | word swap, 60 dB |", "|---|---|---|---|"]
    for name in REFERENCES:
        owner = model if name == "oracle_projection" else ""
        where = {"model": owner, "map": name, "word": "all"}
        swaps = [figure(row("word_swap", **where | {"target": target})) for target in TARGETS]
        lines.append(f"| {name} | {figure(row('score', **where))} | {' | '.join(swaps)} |")
    fresh = {
        f["target"]: f["fresh"]
        for f in of["fresh"]
        if (f["model"], f["map"], f["measure"]) == (model, "attention", "word_swap")
    }
    if fresh:
        ends = [f"{min(fresh[target]):.3f} to {max(fresh[target]):.3f}" for target in TARGETS]
        lines.append(f"\nWord swap of {len(fresh[TARGETS[0]])} fresh initialisations: {ends[0]}; to 60 dB {ends[1]}.\n")
    return lines


def files(digests: dict[str, Any]) -> str:
    """SHA-256 of the weights; digests.json has every file."""
    rows = [
        f"| {name} | {about['bytes']} | `{about['sha256']}` |"
        for name, about in digests.items()
        if name.endswith(".safetensors")
    ]
    return "\n".join(["## Files\n", "| file | bytes | SHA-256 |", "|---|---|---|", *rows, ""])


if __name__ == "__main__":
    main()
