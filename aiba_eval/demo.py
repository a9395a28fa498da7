"""The main job from end to end on what ships with the package: what ``aiba demo`` does.

1. Generate from a few prompts under capture: audio, maps, the paper's Figures 2 and 3.
2. Probe the model on real mixes whose stems are known (:mod:`aiba_eval.probe`), and score each instrument's word against
   the cells that its own stem dominates and against knowledge bands, beside what blind maps get.

    DIR/MODEL/generated/N-PROMPT/   audio.wav, maps.zarr, profile.png, overlay-WORD.png
    DIR/MODEL/pieces/TRACK/         maps.zarr, profile.png, overlay-WORD.png
    DIR/scores.csv                  one row per model, piece, instrument, mask and metric
    DIR/summary.csv                 means over pieces
    DIR/demo.json                   configuration, versions, summary, files
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aiba_eval import references, templates
from aiba_eval.effects import listed
from aiba_eval.grid import MelGrid, project
from aiba_eval.loading import Loaded
from aiba_eval.loading import models as registered
from aiba_eval.outputs import OutputFolder, write_csv
from aiba_eval.probe import Encode, Predict, normalise, probe
from aiba_eval.run import (
    FLAT_IN_FREQUENCY,
    Generation,
    Progress,
    as_loaded,
    band_labels,
    band_templates,
    draw,
    file_name,
    generate,
    grid_of,
    instrument_of,
    quiet,
    random_weights,
    versions,
    words_of,
    write_audio,
)
from aiba_eval.scoring import MINIMUM_PIECES, Row, score, summarise

if TYPE_CHECKING:
    from xarray import DataArray

    from aiba_eval.datasets import Piece
    from aiba_hooks import AttentionMaps

PROMPTS = ("a bass and drums", "a piano and strings", "a solo flute")
#: instruments that a prompt can name; the others stay part of the mix and of its masks
UNNAMED = frozenset({"other", "effects", "ethnic"})
#: the paper's
METRICS = ("average_precision", "iou_area", "profile_pearson", "pointing_game")


@dataclass(frozen=True)
class Probed:
    """One piece, probed.

    Attributes
    ----------
    piece : its name
    prompt : names its instruments
    maps : of the prompt's instruments, at every noise level
    projected : by noise level (timestep), on the mel grid
    mix : waveform, at the piece's own rate
    sample_rate : hertz
    energy : (time, mel), the mix's
    dominance : by instrument, the cells that its stems dominate
    """

    piece: str
    prompt: str
    maps: AttentionMaps
    projected: Mapping[int, DataArray]
    mix: NDArray[np.float32]
    sample_rate: int
    energy: NDArray[np.float64]
    dominance: Mapping[str, NDArray[np.bool_]]


@dataclass(frozen=True)
class DemoResult:
    """What :func:`demo` made.

    Attributes
    ----------
    out : its folder
    scores : one row per piece, instrument, mask and metric
    summary : means over pieces, one row per reference, as :func:`aiba_eval.scoring.summarise` gives them
    notes : what a reader of the scores has to know
    files : what was written, relative to ``out``
    record : the contents of demo.json
    """

    out: Path
    scores: list[Row]
    summary: list[Row]
    notes: list[str]
    files: list[str]
    record: dict[str, Any] = field(repr=False)


def default_models() -> list[str]:
    """The trained demo models that are registered, else ``demo:random``."""
    names = [model.name for model in registered() if model.name.startswith("demo:") and model.trained]
    return names or ["demo:random"]


def demo(
    models: str | Loaded | Any | None = None,
    *,
    out: str | Path = "aiba-demo",
    pieces: Sequence[Piece] | None = None,
    prompts: Sequence[str] = PROMPTS,
    seed: int = 0,
    steps: int = 8,
    guidance: float = 2.5,
    duration: float = 5.12,
    timesteps: Sequence[int] = (300, 800),
    draws: int = 1,
    max_pieces: int | None = None,
    seconds: float = 10.24,
    overwrite: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> DemoResult:
    """Generate, capture, draw, probe real mixes and score against their stems.

    Parameters
    ----------
    models : str, Loaded or pipeline, or a list of them, optional
        Default :func:`default_models`. The same prompts, pieces and noise for each.
    out : path
        Folder to write. An earlier demo's is replaced unless ``overwrite`` is False; any other must be empty.
    pieces : sequence of Piece, optional
        Default the test split of the set that ships with the package.
    prompts : sequence of str
        To generate from.
    seed : int
        Of every draw of noise.
    steps, guidance, duration
        Of the generations.
    timesteps, draws
        Of the probes, as in :func:`aiba_eval.probe.probe`.
    max_pieces : int
        Probe so many pieces at most; default all.
    seconds : float
        Probe so much of each piece at most, from its beginning.
    device, dtype, progress
        As in :func:`aiba_eval.run.run`.

    Raises
    ------
    CannotLoad, CannotProbe, FolderInUse, CannotGenerate, aiba_hooks.AibaError
    """
    tell = progress or quiet
    chosen = list(pieces) if pieces is not None else shipped_pieces()
    if not chosen:
        raise ValueError("no pieces to probe: pieces is empty")
    folder = OutputFolder(out, "demo", overwrite=overwrite)
    wanted = default_models() if models is None else models if isinstance(models, list | tuple) else [models]
    if not wanted:
        raise ValueError("no models to show: models is empty")
    chosen = chosen[:max_pieces]
    rows: list[Row] = []
    notes: list[str] = []
    described = {}
    for one in wanted:
        loaded = as_loaded(one, device=device, dtype=dtype, progress=tell)
        if loaded.name in described:
            raise ValueError(f"{loaded.name} is given twice: its outputs would overwrite each other")
        under = file_name(loaded.name)
        for number, prompt in enumerate(prompts, 1):
            made = generate(
                loaded.pipeline, prompt, seed=seed, steps=steps, guidance=guidance, duration=duration, progress=tell
            )
            _write_generation(folder, f"{under}/generated/{number}-{file_name(prompt)}", made)
        probed = []
        for done, piece in enumerate(chosen):
            tell(f"probing real mixes with {loaded.name}", done, len(chosen))
            probed.append(
                probe_piece(loaded.pipeline, piece, seconds=seconds, timesteps=timesteps, draws=draws, seed=seed)
            )
        rows += [{"model": loaded.name, **row} for row in score_pieces(probed, progress=tell)]
        for done, item in enumerate(probed):
            tell("drawing", done, len(probed))
            _write_piece(folder, f"{under}/pieces/{item.piece}", item, in_full=done == 0)
        notes += _notes(loaded, probed)
        described[loaded.name] = {
            "pipeline": type(loaded.pipeline).__name__,
            "trained": loaded.trained,
            "device": loaded.device,
            "dtype": loaded.dtype,
        }
    tell("means over pieces", 0, None)
    # a piece's words are averaged for "all"
    every = [*rows, *({**row, "word": "all"} for row in rows)]
    summary = summarise(every, by=("model", "mask", "word", "timestep", "metric"))
    write_csv(folder.file("scores.csv"), rows)
    write_csv(folder.file("summary.csv"), summary)
    notes = [*dict.fromkeys(notes), *_about_scores(len(chosen), summary)]
    record = {
        "models": described,
        "seed": seed,
        "generated": {"prompts": list(prompts), "steps": steps, "guidance": guidance, "duration": duration},
        "probed": {
            "pieces": [{"piece": item.piece, "prompt": item.prompt} for item in probed],
            "timesteps": list(timesteps),
            "draws": draws,
            "seconds": seconds,
        },
        "summary": summary,
        "notes": notes,
        "versions": versions(),
    }
    folder.finish(record)
    return DemoResult(folder.path, rows, summary, notes, [*folder.files, folder.manifest.name], record)


def shipped_pieces(split: str | None = "test") -> list[Piece]:
    """Pieces of the stem set that ships with the package: one split, or all pieces where it has no such split."""
    from aiba_eval.datasets import freedoom_root, slakh

    root = freedoom_root()
    return list(slakh.pieces(root, split if split in slakh.splits(root) else None))


def probe_piece(
    pipeline: Any,
    piece: Piece,
    *,
    seconds: float = 10.24,
    timesteps: Sequence[int] = (300, 800),
    draws: int = 1,
    seed: int = 0,
    grid: MelGrid | None = None,
    encode: Encode | None = None,
    predict: Predict | None = None,
) -> Probed:
    """Probe one piece with a prompt that names its instruments, and find what its stems dominate.

    Parameters
    ----------
    pipeline, timesteps, draws, seed, encode, predict
        As in :func:`aiba_eval.probe.probe`.
    piece : Piece
    seconds : float
        So much of it at most, from its beginning.
    grid : MelGrid, optional
        Default ``MelGrid(128, 64)``; its span becomes that of what is probed.

    Raises
    ------
    ValueError
        The piece has no instrument that a prompt can name.
    """
    named = [word for word in piece.instruments if word not in UNNAMED]
    if not named:
        raise ValueError(f"{piece.name} has no instrument that a prompt can name, only {', '.join(piece.instruments)}")
    length = min(seconds, piece.seconds)
    mix = piece.mix(seconds=length)
    prompt = prompt_of(named)
    maps = probe(
        pipeline,
        mix,
        piece.sample_rate,
        prompt,
        words=named,
        timesteps=timesteps,
        draws=draws,
        seed=seed,
        encode=encode,
        predict=predict,
    )
    projected = {t: project(at_timestep(maps, t), grid) for t in timesteps}
    span = grid_of(projected[timesteps[0]], grid)
    stems = {word: span.power(piece.stem(word, seconds=length), piece.sample_rate) for word in piece.instruments}
    return Probed(
        piece.name,
        prompt,
        maps,
        projected,
        mix,
        piece.sample_rate,
        references.mix_energy(normalise(mix), piece.sample_rate, span),
        {word: templates.dominance_mask(stems, word) for word in named},
    )


def at_timestep(maps: Mapping[str, DataArray], timestep: int) -> dict[str, DataArray]:
    """The steps of a probe's maps at one noise level."""
    # rounded: some denoisers take the timestep as a share of the range
    return {s: a.isel(step=np.flatnonzero(np.rint(a["timestep"].values) == timestep)) for s, a in maps.items()}


def prompt_of(instruments: Sequence[str]) -> str:
    """A prompt that names instruments: ``"bass, drums and piano"``."""
    return f"a solo {instruments[0]}" if len(instruments) == 1 else listed(instruments)


def score_pieces(probed: Sequence[Probed], *, progress: Progress | None = None) -> list[Row]:
    """Every instrument of every piece against what its stems dominate and against knowledge bands.

    The reference ``class_prior`` is the mean dominance mask of the instrument over the *other* pieces, constant in
    time: it knows that "bass is low", and neither the model nor this audio. It is undefined for an instrument of one
    piece only.

    Returns
    -------
    list of dict
        As :func:`aiba_eval.score`, with ``piece``, ``timestep`` and ``mask`` ("dominance", "band:paper",
        "band:measured").
    """
    rows: list[Row] = []
    for done, item in enumerate(probed):
        (progress or quiet)("scoring against stems", done, len(probed))
        priors = {}
        for word in item.dominance:
            others = [other.dominance[word] for other in probed if other is not item and word in other.dominance]
            if others:
                priors[word] = references.class_prior(others)
        for timestep, projected in item.projected.items():
            bands = band_templates(projected, grid_of(projected))
            for mask, masks in {"dominance": item.dominance, **{f"band:{p}": m for p, m in bands.items()}}.items():
                beside = {"piece": item.piece, "timestep": timestep, "mask": mask}
                scored = score(projected, masks, mix=item.energy, priors=priors, metrics=METRICS)
                rows += [{**beside, **row} for row in scored]
    return rows


def _write_generation(folder: OutputFolder, under: str, made: Generation) -> None:
    write_audio(folder.file(f"{under}/audio.wav"), made.audio, made.sample_rate)
    made.maps.save(folder.file(f"{under}/maps.zarr"))
    projected = project(made.maps)
    instruments = [word for word in words_of(projected) if instrument_of(word)]
    bands = band_labels(band_templates(projected, grid_of(projected)))
    draw(folder, under, projected, made.audio, made.sample_rate, bands, words=instruments, title=made.prompt)


def _write_piece(folder: OutputFolder, under: str, item: Probed, *, in_full: bool) -> None:
    item.maps.save(folder.file(f"{under}/maps.zarr"))
    timestep, projected = max(item.projected.items())  # at high noise the model listens to the words most
    bands = band_labels(band_templates(projected, grid_of(projected)))
    draw(
        folder,
        under,
        projected,
        item.mix,
        item.sample_rate,
        {"its stem dominates": item.dominance, **bands},
        masks=item.dominance,
        mask_label="cells that the instrument's own stem dominates (more than half of the power)",
        words=None if in_full else (),
        title=f"{item.piece}, probed at t = {timestep} with the prompt {item.prompt!r}",
    )


def _notes(loaded: Loaded, probed: Sequence[Probed]) -> list[str]:
    notes = [random_weights(loaded.name)] if loaded.trained is False else []
    if not all(maps.attrs["frequency_resolved"] for item in probed for maps in item.projected.values()):
        notes.append(f"{loaded.name}: {FLAT_IN_FREQUENCY}")
    return notes


def _about_scores(pieces: int, summary: Sequence[Row]) -> list[str]:
    notes = [
        f"means over {pieces} pieces; n is how many have the word. Fewer than {MINIMUM_PIECES} say little about a class"
    ]
    precise = [row for row in summary if row["metric"] == "average_precision" and row["reference"] == "chance"]
    without = sum(row["without_value"] for row in precise if row["word"] != "all")
    if without:
        notes.append(f"{without} average precisions are undefined; scores.csv says why")
    notes.append(
        "swap: at the highest noise, less what the other words' maps get on the same mask; above 0 where a map knows its word. Bands are fixed in hertz "
        "and the same at all times; dominance masks come from the pieces' own stems"
    )
    return notes
