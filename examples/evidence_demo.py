"""Evidence for the embedded trained models, on held-out pieces.

    python examples/evidence_demo.py --stems STEMS --out evidence.json                 # everything
    python examples/evidence_demo.py --stems STEMS --out evidence.json --only contrasts generation

**Clips.** Per held-out piece two windows of 2.56 s (seeded), in each two to four of the instruments that play there, mixed
as audio, mean removed, peak 0.5. Tunes of the test split occur in no other split.

**Masks.** Dominance: cells of the (128, 64) mel grid where the instrument's share of the summed stem powers exceeds 0.5 and
the sum is within 40 dB of its maximum. A pair of clip and word is scored if its mask covers 2 to 90 % of the grid.

**Maps.** The clip's latent is noised to a timestep, the denoiser runs once per draw of noise on the prompt that names the
instruments in random order; the word's cross-attention is averaged over heads, the word-aligned sites of a set and 4 draws,
and projected onto the grid.

**Contrast.** Word swap: AP(map of w, mask of w) minus the mean over the other words w′ in the prompt of AP(map of w′, mask
of w). Pairs are averaged within a piece and the piece is the unit; intervals are BCa over pieces. The noise level and the set
of sites are chosen on the validation split among the declared ones, and reported on the test split.

**References.** Chance (area of the mask), mix energy, class prior (mean mask of the class over training clips, constant in
time), oracle projection, and the same pipeline with 20 re-initialisations of everything but the VAE.

**Generation.** 20 seeds per instrument, 20 steps, guidance 2.5, 5 s: median spectral centroids, and a classifier trained on
single training stems alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aiba_eval import references, templates
from aiba_eval.datasets import Piece, slakh
from aiba_eval.grid import MelGrid, project
from aiba_eval.metrics import average_precision
from aiba_eval.probe import add_noise, encode_audioldm2, normalise, predict_audioldm2
from aiba_hooks import capture
from aiba_plugins.demo import parts, trained, vocabulary

SECONDS, WINDOWS, DRAWS, LEVELS = 2.56, 2, 4, (300, 500, 700, 800, 900)
#: word-aligned sites by lattice (time × frequency of a 2.56 s clip); one set is chosen together with the level
SITES: dict[str, dict[str, tuple[str, ...]]] = {
    "unet": {"all": ("*",), "32x8": ("down_blocks.1.*", "up_blocks.1.*")},
    "dit": {"all": ("*",)},
}
GRID = MelGrid(128, 64, duration=SECONDS)
REINITIALISATIONS, SEEDS, FEW_PIECES = 20, 20, 10
AREAS = (0.02, 0.9)
CENTROID_ORDER = ("bass", "piano", "drums")
CLASSES = 5


@dataclass(frozen=True)
class Clip:
    """One window of one piece."""

    piece: str
    instruments: tuple[str, ...]  # in the order of the prompt
    mix: np.ndarray
    masks: dict[str, np.ndarray]

    @property
    def prompt(self) -> str:
        return f"{', '.join(self.instruments[:-1])} and {self.instruments[-1]}"


def clips(pieces: list[Piece], seed: int, windows: int = WINDOWS) -> list[Clip]:
    """Windows of pieces with two to four instruments each."""
    found = []
    for number, piece in enumerate(pieces):
        rng = np.random.default_rng((seed, number))
        rate = piece.sample_rate
        names = [name for name in piece.instruments if name in vocabulary.INSTRUMENTS]
        for _ in range(windows):
            start = float(rng.integers(int((piece.seconds - SECONDS) * 100))) / 100
            parts_of = {name: piece.stem(name, start, SECONDS) for name in names}
            playing = [name for name, wave in parts_of.items() if (wave**2).mean() > 1e-6]
            if len(playing) < 2:
                continue
            chosen = [str(name) for name in rng.permutation(playing)[:4]]
            power = {name: GRID.power(parts_of[name], rate) for name in chosen}
            masks = {name: templates.dominance_mask(power, name) for name in chosen}
            mix = normalise(np.sum([parts_of[name] for name in chosen], axis=0))
            found.append(Clip(piece.name, tuple(chosen), mix, masks))
    return found


def predict_dit(pipe: Any, latents: torch.Tensor, timestep: torch.Tensor, conditioning: Any) -> torch.Tensor:
    """One forward of the transformer on an unfolded latent."""
    return pipe.unfold(pipe.predict(pipe.fold(latents), timestep, conditioning))


#: projected maps: (sites, level) to one mapping of words per clip
Maps = dict[tuple[str, int], list[dict[str, np.ndarray]]]


def word_maps(
    kind: str,
    pipe: Any,
    given: list[Clip],
    levels: tuple[int, ...],
    sites: tuple[str, ...] | None = None,
    draws: int = DRAWS,
    size: int = 16,
) -> Maps:
    """Projected cross-attention of every word, per set of sites (default all declared ones) and level."""
    predict = predict_audioldm2 if kind == "unet" else predict_dit
    patterns = {name: SITES[kind][name] for name in sites or SITES[kind]}
    maps: Maps = {(name, level): [] for name in patterns for level in levels}
    with torch.no_grad():
        for first in range(0, len(given), size):
            batch = given[first : first + size]
            clean = torch.cat([encode_audioldm2(pipe, clip.mix, 16000) for clip in batch])
            with capture(pipe) as captured:
                conditioning = pipe.encode_prompt(
                    prompt=[clip.prompt for clip in batch],
                    device="cpu",
                    num_waveforms_per_prompt=1,
                    do_classifier_free_guidance=False,
                )
                for level in levels:
                    for draw in range(draws):
                        generator = torch.Generator().manual_seed(1000 * draw + first)
                        noise = torch.randn(clean.shape, generator=generator)
                        predict(pipe, add_noise(pipe, clean, noise, level), torch.tensor(level), conditioning)
            for (name, level), of_clips in maps.items():
                number = levels.index(level)
                steps = slice(number * draws, (number + 1) * draws)
                cut = {site: array.isel(step=steps) for site, array in captured.maps.items()}
                projected = project(cut, GRID, layers=patterns[name])
                for row, clip in enumerate(batch):
                    one = projected.isel(prompt=row)
                    of_clips.append({word: one.sel(word=word).values for word in clip.instruments})
    return maps


def contrast(given: list[Clip], maps: list[dict[str, np.ndarray]]) -> dict[str, list[dict[str, float]]]:
    """Per class and for ``"all"``: one entry per piece with the means of AP, its swap and the mask's area."""
    rows: dict[str, dict[str, list[tuple[float, float, float]]]] = defaultdict(lambda: defaultdict(list))
    for clip, of_word in zip(given, maps, strict=True):
        for name in clip.instruments:
            mask = clip.masks[name]
            if not AREAS[0] < mask.mean() < AREAS[1]:
                continue
            own = average_precision(of_word[name], mask)
            swapped = np.mean([average_precision(of_word[o], mask) for o in clip.instruments if o != name])
            for group in (name, "all"):
                rows[group][clip.piece].append((own, own - float(swapped), float(mask.mean())))
    return {
        group: [dict(zip(("ap", "word_swap", "chance"), np.mean(v, axis=0).tolist())) for v in by_piece.values()]
        for group, by_piece in rows.items()
    }


def interval(values: list[float]) -> list[float]:
    """Mean and its 95 % BCa interval."""
    from scipy.stats import bootstrap

    if len(values) < 3 or np.ptp(values) == 0:
        return [float(np.mean(values)), float("nan"), float("nan")]
    found = bootstrap((np.array(values),), np.mean, n_resamples=5000, method="BCa", rng=np.random.default_rng(0))
    return [float(np.mean(values)), float(found.confidence_interval.low), float(found.confidence_interval.high)]


def beside(
    given: list[Clip], priors: dict[str, np.ndarray], lattice: tuple[int, int]
) -> dict[str, list[dict[str, Any]]]:
    """The contrasts of maps that never saw the model."""
    energy = [references.mix_energy(clip.mix, 16000, GRID) for clip in given]
    kinds = {
        "mix_energy": [dict.fromkeys(clip.instruments, e) for clip, e in zip(given, energy, strict=True)],
        "class_prior": [{name: priors[name] for name in clip.instruments} for clip in given],
        "oracle_projection": [
            {name: references.oracle_projection(clip.masks[name], lattice) for name in clip.instruments}
            for clip in given
        ],
    }
    return {kind: contrast(given, maps) for kind, maps in kinds.items()}


def table(of_group: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Figures of every group with enough pieces; AP over chance is the ratio of means."""
    found = {}
    for group, by_piece in sorted(of_group.items()):
        if len(by_piece) < FEW_PIECES:
            continue
        values = {key: [piece[key] for piece in by_piece] for key in by_piece[0]}
        chance = float(np.mean(values["chance"]))
        found[group] = {
            "pieces": len(by_piece),
            "ap": interval(values["ap"]),
            "chance": chance,
            "ap_over_chance": float(np.mean(values["ap"])) / chance,
            "ap_minus_chance": interval([a - c for a, c in zip(values["ap"], values["chance"], strict=True)]),
            "word_swap": interval(values["word_swap"]),
        }
    return found


def fresh(kind: str, pipe: Any, seed: int) -> Any:
    """The same pipeline with everything but VAE and vocoder re-initialised."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(10_000 + seed)
        made = (parts.audioldm2 if kind == "unet" else parts.mel_dit)(pipe.vae, pipe.vocoder)
    for part in made.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return made


def contrasts(kind: str, pipe: Any, stems: Path, reinitialisations: int) -> dict[str, Any]:
    """Choose the level on validation, report on test, beside references and re-initialisations."""
    validation = clips(list(slakh.pieces(stems, "validation")), seed=1)
    chosen_by = {
        key: float(np.mean([piece["word_swap"] for piece in contrast(validation, maps)["all"]]))
        for key, maps in word_maps(kind, pipe, validation, LEVELS, draws=2).items()
    }
    sites, best = max(chosen_by, key=chosen_by.__getitem__)
    test = clips(list(slakh.pieces(stems, "test")), seed=2)
    tables = {key: table(contrast(test, maps)) for key, maps in word_maps(kind, pipe, test, LEVELS).items()}
    training = clips(list(slakh.pieces(stems, "train")), seed=3, windows=1)
    masks: dict[str, list[np.ndarray]] = defaultdict(list)
    for clip in training:
        for name, mask in clip.masks.items():
            masks[name].append(mask)
    priors = {name: references.class_prior(of) for name, of in masks.items()}
    for clip in test:
        for name in clip.instruments:
            priors.setdefault(name, references.uniform(GRID))
    lattice = (32, 8) if kind == "unet" else (64, 1)
    null = []
    for seed in range(reinitialisations):
        maps = word_maps(kind, fresh(kind, pipe, seed), test, (best,), (sites,))[sites, best]
        null.append(float(np.mean([piece["word_swap"] for piece in contrast(test, maps)["all"]])))
    return {
        "validation_word_swap": {f"{name} {level}": value for (name, level), value in chosen_by.items()},
        "sites": sites,
        "level": best,
        "clips": len(test),
        "pieces": len({clip.piece for clip in test}),
        "by_level": {level: tables[sites, level] for level in LEVELS},
        "all_sites_by_level": {level: tables["all", level] for level in LEVELS},
        "references": {name: table(of) for name, of in beside(test, priors, lattice).items()},
        "reinitialised_word_swap": null,
    }


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
    parser.add_argument("--out", type=Path, required=True, help="JSON file; parts that are not run again are kept")
    parser.add_argument("--weights", type=Path, default=trained.WEIGHTS)
    parser.add_argument("--kinds", nargs="+", choices=("unet", "dit"), default=("unet", "dit"))
    parser.add_argument("--only", nargs="+", choices=("contrasts", "generation", "speed"), default=None)
    parser.add_argument("--reinitialisations", type=int, default=REINITIALISATIONS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    wanted = options.only or ("contrasts", "generation", "speed")
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    for kind in options.kinds:
        pipe = trained.load(kind, options.weights)
        pipe.set_progress_bar_config(disable=True)
        of_kind = found.setdefault(kind, {})
        if "contrasts" in wanted:
            of_kind["contrasts"] = contrasts(kind, pipe, options.stems, options.reinitialisations)
        if "generation" in wanted:
            of_kind["generation"] = generation(pipe, options.stems, options.seeds)
        if "speed" in wanted:
            of_kind["speed"] = speed(pipe)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
        print(kind, json.dumps({part: brief(part, of_kind[part]) for part in wanted}, indent=1), flush=True)


def brief(part: str, of: dict[str, Any]) -> Any:
    """What is printed of a part."""
    if part == "generation":
        keys = ("accuracy", "classifier_on_real_test_stems", "median_centroid", "centroids_ordered", "confusion")
        return {key: of[key] for key in keys}
    if part == "speed":
        return of
    rounded = {
        group: {key: np.round(value, 3).tolist() for key, value in row.items()}
        for group, row in of["by_level"][of["level"]].items()
    }
    null = of["reinitialised_word_swap"]
    return {
        "level": of["level"],
        "sites": of["sites"],
        "word_swap_by_level": {level: round(rows["all"]["word_swap"][0], 3) for level, rows in of["by_level"].items()},
        "at_level": rounded,
        "references": {
            n: {k: round(rows["all"][k][0], 3) for k in ("ap", "word_swap")} for n, rows in of["references"].items()
        },
        "reinitialised": [round(min(null), 3), round(max(null), 3)] if null else None,
    }


if __name__ == "__main__":
    main()
