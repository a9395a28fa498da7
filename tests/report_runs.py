"""Run folders for tests of the report: made of synthetic maps by the evaluation's own writers, with whatever names one likes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr

from aiba_eval import metrics, references
from aiba_eval.contrasts import cross_scores, word_swap
from aiba_eval.evaluation import Run
from aiba_eval.evaluation.items import fields, write_item
from aiba_eval.evaluation.scores import frame
from aiba_eval.grid import LOG_FLOOR, MelGrid
from aiba_eval.outputs import write_json
from aiba_eval.scoring import score, summarise
from aiba_eval.templates import GroundTruth
from aiba_hooks import AttentionMaps

GRID = MelGrid(64, 64, duration=2.0)
RATE = 16_000
LEVELS = (300, 800)
VARIANTS = ("default", "spatial max")
METRICS = ("average_precision", "iou", "precision", "recall", "f1", "profile_pearson", "pointing_game")
SITES = {"down.0.attn2": (16, 8), "mid.attn2": (8, 4), "up.0.attn2": (16, 8)}

#: texts that would run, or break out, if anything took them for markup
PROMPT = (
    '</script><script>window.injected = 1</script> "bass" & \'drums\' <img src=x onerror="window.injected=1"> <!-- '
    "{{ 7 * 7 }} https://example.org/x.js \u2028 \\"
)
HOSTILE = {
    "prompt": PROMPT,
    "piece": 'Track "<svg onload=window.injected=1>" \\input{x}',
    "words": ("bass<i>", 'dr"um&s'),
    "model": "model</title><script>window.injected=1</script>",
    "reason": "<b onclick=window.injected=1>cannot be decoded</b>",
    "variants": ("default", "<u>max</u> | _x_"),
}


def make_run(
    folder: Path,
    *,
    pieces: int = 4,
    protocol: str = "probe",
    maps: bool = True,
    audio: bool = True,
    scores: bool = True,
    controls: bool = True,
    hostile: bool = False,
    seed: int = 0,
) -> Run:
    """A run over ``pieces`` windows of noise and tones; the first is scored best, the last worst."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    generates = protocol == "generate"
    levels = (0,) if generates else LEVELS
    words = HOSTILE["words"] if hostile else ("bass", "drums")
    variants = HOSTILE["variants"] if hostile else VARIANTS
    targets = ("band:measured",) if generates else ("dominance", "band:measured")
    rows = []
    priors = {word: references.class_prior([_mask(k, w) for k in range(3)]) for w, word in enumerate(words)}
    for k in range(pieces):
        name = f"item-{k}-0"
        piece = f"seed-{k}" if generates else f"Track{k:02}"
        if hostile:
            piece = f"{HOSTILE['piece']} {k}"
        own = words[k % 2 :][:1] if generates else words[: 1 if k == pieces - 1 and pieces > 2 else 2]
        prompt = HOSTILE["prompt"] if hostile else f"a song with {' and '.join(own)}"
        clear = 0.9 - 0.8 * k / max(pieces - 1, 1)
        masks = {word: _mask(k, words.index(word)) for word in own}
        projected = np.stack(
            [
                [[clear * masks[w] + (1.2 - clear) * rng.random(GRID.shape) + 0.1 * v for w in own] for _ in levels]
                for v in range(len(variants))
            ]
        ).astype(np.float32)
        array = xr.DataArray(
            projected,
            dims=("variant", "level", "word", "time", "mel"),
            coords={
                "variant": list(variants),
                "level": list(levels),
                "word": list(own),
                "time": 2.0 * (np.arange(GRID.time) + 0.5) / GRID.time,
                "mel": np.arange(GRID.mel),
                "frequency": ("mel", GRID.frequencies),
            },
            attrs={
                "frequency_resolved": True,
                "finest_lattice": [16, 8],
                "mel_scale": "slaney",
                "fmin": 0.0,
                "fmax": 8000.0,
                "time_start": 0.0,
                "seconds_per_column": 2.0 / GRID.time,
            },
        )
        time = np.arange(2 * RATE) / RATE
        wave = (0.3 * np.sin(2 * np.pi * 110 * time) + 0.1 * rng.standard_normal(time.size)).astype(np.float32)
        mix = GRID.spectrogram(wave, RATE)
        truth = {"dominance": masks} if not generates else {}
        truth["band:measured"] = {word: _band(words.index(word)) for word in own}
        shares = {} if generates else {word: 0.9 * mask for word, mask in masks.items()}
        about = {
            "id": name,
            "condition": "own",
            "piece": piece,
            "start": 1.5 * k,
            "seconds": 2.0,
            "prompt": prompt,
            "words": list(own),
            "diagnosis": {
                "findings": [
                    {"name": "resolution-bound", "severity": "info", "sentence": "16 × 8 cells", "numbers": {}},
                    {
                        "name": "padding-sink",
                        "severity": "problem",
                        "sentence": f"<em>{prompt[:9]}</em>",
                        "numbers": {},
                    },
                ],
                "not_checked": {"prompt-insensitive": "needs a second capture"},
                "sites": [],
            },
        }
        write_item(
            folder / "items" / "own" / name,
            about,
            fields(array, GroundTruth(truth, shares, {}, {}), own, mix),
            maps=_maps(own, levels, prompt, rng) if maps else None,
            audio=wave if audio else None,
            sample_rate=RATE,
        )
        energy = mix.astype(float) - np.log(LOG_FLOOR)
        for v, variant in enumerate(variants):
            for at, level in enumerate(levels):
                for target in targets:
                    found = score(
                        array.isel(variant=v, level=at).expand_dims(prompt=[prompt]),
                        truth[target],
                        mix=energy,
                        priors=priors,
                        metrics=METRICS,
                    )
                    head = {"item": name, "piece": piece, "condition": "own", "variant": variant, "level": level}
                    rows += [{**row, **head, "target": target} for row in found]
    table = frame(rows if scores else [])
    if scores:
        table.to_parquet(folder / "results.parquet", index=False)
        by = ("variant", "level", "target", "word", "metric")
        records = table.to_dict("records")
        summary = summarise([{**row, "word": "all"} for row in records], by=by, resamples=99)
        summary += summarise([row for row in records if row["variant"] == "default"], by=by, resamples=99)
        write_json(
            folder / "summary.json",
            {
                "summary": summary,
                "contrasts": _contrasts(levels) if controls else [],
                "controls": [_CONTROL] if controls else [],
            },
        )
    write_json(
        folder / "evaluate.json",
        {
            "aiba": "evaluate",
            "complete": scores,
            "configuration": {
                "model": {"name": HOSTILE["model"] if hostile else "demo:fake", "pipeline": "Fake", "dtype": "float32"},
                "protocol": protocol,
                "timesteps": list(LEVELS),
                "variants": {name: {} for name in variants},
                "versions": {"aiba": "0.1.0"},
            },
            "trained": True,
            "failed": {"own/item-9-0": HOSTILE["reason"] if hostile else "the disk was away"},
            "skipped": {"own/item-8-0": "1.00 s long, shorter than a window of 2 s"},
            "excluded": [{"target": "band:paper", "word": words[1], "reason": "no band for it", "items": 3}],
            "notes": [f"{pieces} items"],
        },
    )
    return Run.open(folder)


def _mask(piece: int, word: int) -> np.ndarray:
    """Where a word is: low or high rows, at times that depend on the piece."""
    mask = np.zeros(GRID.shape, bool)
    begin = 4 + 5 * (piece % 6)
    rows = slice(2, 14) if word == 0 else slice(30, 58)
    mask[begin : begin + 20, rows] = True
    return mask


def _band(word: int) -> np.ndarray:
    mask = np.zeros(GRID.shape, bool)
    mask[:, slice(2, 14) if word == 0 else slice(30, 58)] = True
    return mask


def _maps(words: tuple[str, ...], levels: tuple[int, ...], prompt: str, rng: np.random.Generator) -> AttentionMaps:
    arrays = {}
    steps = len(levels) if len(levels) > 1 else 12
    for name, (columns, bands) in SITES.items():
        edges = GRID.edges[:: GRID.mel // bands]
        arrays[name] = xr.DataArray(
            rng.random((1, steps, len(words) + 1, columns, bands)).astype(np.float32) + 0.1,
            dims=("prompt", "step", "word", "time", "frequency"),
            coords={
                "prompt": [prompt],
                "word": [*words, "(other)"],
                "time": 2.0 * (np.arange(columns) + 0.5) / columns,
                "timestep": ("step", np.array(levels if len(levels) > 1 else np.arange(steps)[::-1], float)),
                "frequency": (edges[1:] + edges[:-1]) / 2,
                "frequency_low": ("frequency", edges[:-1]),
                "frequency_high": ("frequency", edges[1:]),
            },
            attrs={"seconds_per_column": 2.0 / columns, "time_start": 0.0},
        )
    return AttentionMaps(arrays)


def _contrasts(levels: tuple[int, ...]) -> list[dict]:
    found = []
    for source, level in [*(("model", level) for level in levels), ("class_prior", None)]:
        of = {f"p{k}": cross_scores([_mask(k, 0), _mask(k, 1)], [_mask(k, 0), _mask(k, 1)]) for k in range(3)}
        contrast = word_swap(of, resamples=99)
        mean, low, high = contrast.interval
        head = {"map": source, "variant": "default", "level": level, "target": "dominance", "contrast": "word_swap"}
        found.append({**head, "word": "all", "value": mean, "low": low, "high": high, "p": contrast.p, "n": 3})
    return found


_CONTROL = {
    "name": "reinitialised",
    "measure": "word_swap",
    "level": 300,
    "observed": 0.19,
    "control": 0.02,
    "difference": 0.17,
    "low": 0.15,
    "high": 0.2,
    "p": 1 / 21,
    "count": 20,
    "note": "",
}

assert set(METRICS) <= set(metrics.METRICS)
