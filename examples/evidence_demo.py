"""Evidence for the embedded trained models, on held-out pieces of a rendered stem set.

    python examples/evidence_demo.py --stems STEMS --out evidence                    # everything; goes on where it stopped
    python examples/evidence_demo.py --stems STEMS --out evidence --only generation

**Attention.** `aiba_eval.compare` without effect maps (its module says what each figure is): clips of 2.56 s, two to four instruments
mixed and named in random order, cross-attention averaged over heads, all word-aligned sites and 4 draws of noise, against dominance
masks. Tunes of the test split occur in no other split. The noise level is the U-Net's best word swap on the validation
split among :data:`LEVELS`; the test split is measured there alone, beside 20 fresh initialisations.

**Generation.** 20 seeds per instrument, 20 steps, guidance 2.5, 5 s: median spectral centroids, and a classifier trained on
single training stems alone.

**Speed.** 5 s of audio, 20 steps with guidance, with and without capture.

The folder holds `evidence.json` and what `aiba compare` writes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aiba_eval.comparing import compare_on
from aiba_eval.datasets import slakh
from aiba_eval.grid import MelGrid
from aiba_eval.outputs import write_json
from aiba_eval.probe import normalise
from aiba_hooks import capture
from aiba_plugins.demo import trained, vocabulary

MODELS = {"unet": "demo:unet", "dit": "demo:dit"}
LEVELS = (300, 500, 700, 800, 900)
WINDOWS, DRAWS = 2, 4
REINITIALISATIONS, SEEDS = 20, 20
CENTROID_ORDER = ("bass", "piano", "drums")
CLASSES = 5


def attention(pipes: dict[str, Any], stems: Path, out: Path, reinitialisations: int) -> dict[str, Any]:
    """Choose the level on validation; measure on test, beside references and fresh initialisations."""
    options: dict[str, Any] = {"labels": tuple(MODELS.values()), "stems": stems, "effects": False, "progress": told()}
    validation = compare_on(
        *pipes.values(), split="validation", timesteps=LEVELS, draws=2, out=out / "validation", **options
    )
    by_level = {
        level: validation.find("word_swap", model=MODELS["unet"], map="attention", level=level)["value"]
        for level in LEVELS
    }
    best = max(by_level, key=by_level.__getitem__)
    test = compare_on(
        *pipes.values(),
        split="test",
        timesteps=(best,),
        draws=DRAWS,
        windows=WINDOWS,
        reinitialisations=reinitialisations,
        out=out / "test",
        **options,
    )
    print(test)
    return {"validation_word_swap": by_level, "level": best, **test.as_dict()}


def told() -> Any:
    """Progress on stderr."""
    began = time.perf_counter()

    def tell(what: str, done: int, total: int | None) -> None:
        print(f"{time.perf_counter() - began:7.0f} s  {what} {done}/{total or '?'}", file=sys.stderr, flush=True)

    return tell


def centroid(audio: np.ndarray) -> float:
    """Power-weighted mean frequency in hertz."""
    import librosa

    power = np.abs(librosa.stft(audio, n_fft=1024, hop_length=160)) ** 2
    frequencies = np.fft.rfftfreq(1024, 1 / 16000)
    return float((power.sum(1) * frequencies).sum() / max(power.sum(), 1e-12))


def features(audio: np.ndarray) -> np.ndarray:
    """Timbre of a clip, whatever its level: log-mel statistics over time, spread of each band and onset strength."""
    mel = MelGrid(128, 64).spectrogram(normalise(audio), 16000)
    mel = mel - mel.max()
    rise = np.maximum(np.diff(mel, axis=0), 0)
    bands = rise.reshape(len(rise), 8, 8).mean(2)
    return np.concatenate([mel.mean(0), mel.std(0), np.percentile(mel, 90, axis=0), bands.mean(0), bands.std(0)])


def single_stems(stems: Path, split: str, names: tuple[str, ...], per_stem: int, seed: int) -> tuple[Any, Any]:
    """Features and labels of 5 s clips of single stems."""
    values, labels = [], []
    rng = np.random.default_rng(seed)
    for piece in slakh.pieces(stems, split):
        for name in sorted(set(piece.instruments) & set(names)):
            for _ in range(per_stem):
                start = float(rng.integers(int((piece.seconds - 5) * 100))) / 100
                part = piece.stem(name, start, 5.0)
                if (part**2).mean() > 1e-6:
                    values.append(features(part))
                    labels.append(name)
    return np.array(values), np.array(labels)


def generation(pipe: Any, stems: Path, seeds: int) -> dict[str, Any]:
    """Does generated audio follow the prompt?"""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    counts = slakh.pieces(stems, "train").counts()
    names = tuple(name for name, _ in counts.most_common() if name in vocabulary.INSTRUMENTS)[:CLASSES]
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.05, max_iter=2000, class_weight="balanced"))
    classifier.fit(*single_stems(stems, "train", names, 6, seed=4))
    held_out, labels = single_stems(stems, "test", names, 3, seed=5)
    real = float(np.mean([(classifier.predict(held_out[labels == n]) == n).mean() for n in names]))
    centroids, confusion = {}, {}
    for name in dict.fromkeys((*names, *CENTROID_ORDER)):
        made = []
        for first in range(0, seeds, 5):
            generators = [torch.Generator().manual_seed(seed) for seed in range(first, min(first + 5, seeds))]
            made += list(
                pipe(
                    [name] * len(generators),
                    audio_length_in_s=5.0,
                    num_inference_steps=20,
                    guidance_scale=2.5,
                    generator=generators,
                ).audios
            )
        centroids[name] = [centroid(audio) for audio in made]
        heard = classifier.predict(np.array([features(audio) for audio in made]))
        confusion[name] = {other: int((heard == other).sum()) for other in names}
    right = [confusion[name][name] / seeds for name in names]
    return {
        "classes": names,
        "classifier_on_real_test_stems": real,
        "accuracy": float(np.mean(right)),
        "confusion": {name: confusion[name] for name in names},
        "median_centroid": {name: float(np.median(of)) for name, of in centroids.items()},
        "centroids": centroids,
        "centroids_ordered": bool(np.all(np.diff([np.median(centroids[n]) for n in CENTROID_ORDER]) > 0)),
    }


def speed(pipe: Any) -> dict[str, float]:
    """Seconds for 5 s of audio with and without capture."""
    found = {}
    for name in ("plain", "captured"):
        options = {"audio_length_in_s": 5.0, "num_inference_steps": 20, "guidance_scale": 2.5}
        began = time.perf_counter()
        if name == "plain":
            pipe("a bass and drums", **options)
        else:
            with capture(pipe, words=["bass", "drums"]):
                pipe("a bass and drums", **options)
        found[name] = time.perf_counter() - began
    return {**found, "threads": torch.get_num_threads()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stems", type=Path, required=True, help="folder of a dataset in Slakh's layout")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write; parts that are not run again are kept"
    )
    parser.add_argument("--weights", type=Path, default=trained.WEIGHTS)
    parser.add_argument("--only", nargs="+", choices=("attention", "generation", "speed"), default=None)
    parser.add_argument("--reinitialisations", type=int, default=REINITIALISATIONS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    wanted = options.only or ("attention", "generation", "speed")
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "evidence.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    pipes = {kind: trained.load(kind, options.weights) for kind in MODELS}
    for kind, pipe in pipes.items():
        pipe.set_progress_bar_config(disable=True)
        for part in ("generation", "speed"):
            if part in wanted:
                made = generation(pipe, options.stems, options.seeds) if part == "generation" else speed(pipe)
                found.setdefault(kind, {})[part] = made
                write_json(file, found)
                print(kind, part, json.dumps({k: v for k, v in made.items() if k != "centroids"}, indent=1), flush=True)
    if "attention" in wanted:
        found["attention"] = attention(pipes, options.stems, options.out, options.reinitialisations)
        write_json(file, found)


if __name__ == "__main__":
    main()
