"""One generation under capture, and everything that is made of it: what ``aiba run`` does.

DIR/audio.wav      what the model returned, float32
DIR/maps.zarr      AttentionMaps of every cross-attention site
DIR/figures/       profile.png (the paper's Fig. 2) and overlay-WORD.png (its Fig. 3)
DIR/scores.csv     every word that names an instrument against knowledge bands, beside its references
DIR/run.json       configuration, versions, seed, files
"""

from __future__ import annotations

import importlib.metadata
import inspect
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from aiba_eval import figures, references, templates
from aiba_eval.grid import MelGrid, project
from aiba_eval.loading import Loaded, few_threads, load, sampling_rate
from aiba_eval.outputs import OutputFolder, write_csv
from aiba_eval.probe import normalise
from aiba_eval.scoring import Row, score
from aiba_hooks.words import check_words, distinct_words

if TYPE_CHECKING:
    from xarray import DataArray

    from aiba_hooks import AttentionMaps

#: told what is being done, how much of it is done, and how much there is (None: not known)
Progress = Callable[[str, int, int | None], None]

#: what pipelines call the length of their audio, in seconds
DURATION_ARGUMENTS = ("audio_length_in_s", "audio_end_in_s", "audio_duration_in_s", "audio_duration", "duration")


class CannotGenerate(Exception):
    """A pipeline cannot do what is asked, or returned audio that nothing can be made of. The message says what to do."""


@dataclass(frozen=True)
class Generation:
    """Audio and the maps that were captured while it was made.

    Attributes
    ----------
    prompt : str
    audio : float32, shape (samples,) or (channels, samples)
    sample_rate : int
    maps : AttentionMaps
    arguments : what the pipeline was called with, beside the prompt and the generator
    """

    prompt: str
    audio: NDArray[np.float32]
    sample_rate: int
    maps: AttentionMaps
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class RunResult:
    """What :func:`run` made.

    Attributes
    ----------
    out : its folder
    generation : audio and maps
    projected : the maps on the mel grid, dims (prompt, word, time, mel)
    scores : rows of :func:`aiba_eval.score`, each with the mask it was scored against
    notes : what a reader of the scores has to know
    files : what was written, relative to ``out``
    record : the contents of run.json
    """

    out: Path
    generation: Generation
    projected: DataArray
    scores: list[Row]
    notes: list[str]
    files: list[str]
    record: dict[str, Any] = field(repr=False)


def run(
    model: str | Loaded | Any,
    prompt: str,
    *,
    words: Sequence[str] | None = None,
    negative: str | None = None,
    seed: int = 0,
    steps: int | None = 50,
    guidance: float | None = 2.5,
    duration: float | None = 8.0,
    layers: str | Sequence[str] = "*",
    heads: Literal["mean", "all"] = "mean",
    spatial: Literal["mean", "max", "topk"] = "mean",
    step_weights: Literal["uniform", "late"] = "uniform",
    budget: str | int = "2GiB",
    out: str | Path = "aiba-run",
    overwrite: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> RunResult:
    """Generate audio from a prompt, capture its attention and write audio, maps, figures and scores.

    Parameters
    ----------
    model : str, Loaded or pipeline
        A name, folder or hub id (see :func:`aiba_eval.loading.load`), or a pipeline.
    prompt : str
    words : sequence of str, optional
        Words or phrases of the prompt to keep a map of; default every word.
    negative : str, optional
        Negative prompt.
    seed : int
        Of the initial noise, drawn on the CPU: the same on every device.
    steps, guidance, duration : optional
        Denoiser steps, guidance scale and seconds of audio; None leaves the pipeline's own default.
    layers, heads, budget
        As in :func:`aiba_hooks.capture`.
    spatial, step_weights
        As ``spatial`` and ``steps`` in :func:`aiba_eval.project`.
    out : path
        Folder to write; it must be empty or not there, or with ``overwrite`` an earlier run's.
    device, dtype
        As in :func:`aiba_eval.loading.load`; ignored if a pipeline is given.
    progress : callable, optional
        Called as ``progress(what, done, total)``.

    Returns
    -------
    RunResult

    Raises
    ------
    CannotLoad, FolderInUse, CannotGenerate, aiba_hooks.AibaError
        Each message says what to do.
    """
    tell = progress or quiet
    folder = OutputFolder(out, "run", overwrite=overwrite)
    # before anything is loaded
    if not distinct_words([prompt]):
        raise CannotGenerate(f"the prompt {prompt!r} has no words to map: describe the sound")
    check_words(list(words or ()), [prompt])
    loaded = as_loaded(model, device=device, dtype=dtype, progress=tell)
    made = generate(
        loaded.pipeline,
        prompt,
        words=words,
        negative=negative,
        seed=seed,
        steps=steps,
        guidance=guidance,
        duration=duration,
        layers=layers,
        heads=heads,
        budget=budget,
        progress=tell,
    )
    tell("writing", 0, None)
    write_audio(folder.file("audio.wav"), made.audio, made.sample_rate)
    made.maps.save(folder.file("maps.zarr"))
    projected = project(made.maps, spatial=spatial, steps=step_weights)
    rows, notes = score_bands(projected, made.audio, made.sample_rate)
    if loaded.trained is False:
        notes.insert(0, random_weights(loaded.name))
    bands = band_labels(band_templates(projected, grid_of(projected)))
    draw(folder, "figures", projected, made.audio, made.sample_rate, bands, title=_shorten(prompt, 110), progress=tell)
    write_csv(folder.file("scores.csv"), rows, SCORE_COLUMNS)
    record = {
        "model": loaded.name,
        "pipeline": type(loaded.pipeline).__name__,
        "trained": loaded.trained,
        "prompt": prompt,
        "words": list(words) if words is not None else None,
        "negative": negative,
        "seed": seed,
        "arguments": dict(made.arguments),
        "layers": layers,
        "heads": heads,
        "spatial": spatial,
        "step_weights": step_weights,
        "device": loaded.device,
        "dtype": loaded.dtype,
        "sites": list(made.maps),
        "sample_rate": made.sample_rate,
        "versions": versions(),
        "notes": notes,
    }
    folder.finish(record)
    return RunResult(folder.path, made, projected, rows, notes, [*folder.files, folder.manifest.name], record)


def as_loaded(
    model: str | Loaded | Any, *, device: str = "auto", dtype: str = "auto", progress: Progress | None = None
) -> Loaded:
    """``model`` as a :class:`~aiba_eval.loading.Loaded`, whether it is a name, one already, or a pipeline."""
    if isinstance(model, Loaded):
        return model
    if isinstance(model, str):
        (progress or quiet)(f"loading {model}", 0, None)
        return load(model, device=device, dtype=dtype)
    return Loaded(
        type(model).__name__, model, "given", None, str(getattr(model, "device", "")), str(getattr(model, "dtype", ""))
    )


def generate(
    pipeline: Any,
    prompt: str,
    *,
    words: Sequence[str] | None = None,
    negative: str | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    duration: float | None = None,
    layers: str | Sequence[str] = "*",
    kinds: Sequence[str] = ("cross",),
    pooling: Literal["sum", "mean", "weighted", "max", "logmean"] = "sum",
    heads: Literal["mean", "all"] = "mean",
    budget: str | int = "2GiB",
    progress: Progress | None = None,
) -> Generation:
    """Call a pipeline inside a capture. Arguments are passed by the names in its signature.

    Parameters
    ----------
    pipeline
        Any text-to-audio pipeline that a backbone recognises.
    prompt, words, negative, seed, steps, guidance, duration, layers, heads, budget, progress
        As in :func:`run`.
    kinds, pooling
        As in :func:`aiba_hooks.capture`.

    Raises
    ------
    CannotGenerate
        The pipeline has no argument for something asked for, or returned NaN.
    aiba_hooks.AibaError
        As :func:`aiba_hooks.capture`.
    """
    from aiba_hooks import capture

    arguments = arguments_for(pipeline, steps=steps, guidance=guidance, negative=negative, duration=duration)
    with capture(
        pipeline, words=words, layers=layers, kinds=kinds, pooling=pooling, heads=heads, budget=budget
    ) as captured:
        audio = call(pipeline, prompt, arguments, seed=seed, progress=progress)
    if not np.isfinite(audio).all():
        raise CannotGenerate(
            f"{type(pipeline).__name__} returned {int((~np.isfinite(audio)).sum())} NaN or infinite samples of "
            f"{audio.size}: its dtype may be too narrow for it; try --dtype float32"
        )
    return Generation(prompt, audio, sampling_rate(pipeline), captured.maps, arguments)


def arguments_for(
    pipeline: Any,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    negative: str | None = None,
    duration: float | None = None,
) -> dict[str, Any]:
    """What is asked for, by the names that the pipeline's signature has for it.

    Raises
    ------
    CannotGenerate
        The pipeline has no argument for something asked for.
    """
    accepted = inspect.signature(type(pipeline).__call__).parameters
    arguments: dict[str, Any] = {}
    asked = (
        ("steps", steps, ("num_inference_steps",)),
        ("guidance", guidance, ("guidance_scale",)),
        ("negative", negative, ("negative_prompt",)),
        ("duration", duration, DURATION_ARGUMENTS),
    )
    for option, value, names in asked:
        if value is None:
            continue
        name = next((n for n in names if n in accepted), None)
        if name is None:
            raise CannotGenerate(
                f"{type(pipeline).__name__} has no argument for {option} (none of {', '.join(names)}): leave {option} out"
            )
        arguments[name] = value
    return arguments


def call(
    pipeline: Any, prompt: str, arguments: Mapping[str, Any], *, seed: int = 0, progress: Progress | None = None
) -> NDArray[np.float32]:
    """Call a pipeline with seeded noise; its first audio."""
    import torch

    accepted = inspect.signature(type(pipeline).__call__).parameters
    steps = arguments.get("num_inference_steps")
    shown = _callback(accepted, f"generating {_shorten(prompt)!r}", steps, progress or quiet)
    given: dict[str, Any] = {"prompt": prompt, **arguments, **shown}
    if "generator" in accepted:
        given["generator"] = torch.Generator().manual_seed(seed)
    with few_threads(pipeline), _seeded(seed):
        audios = pipeline(**given).audios
    return np.asarray(audios[0].float().cpu() if hasattr(audios[0], "cpu") else audios[0], dtype=np.float32)


def _callback(accepted: Mapping[str, Any], what: str, steps: int | None, tell: Progress) -> dict[str, Any]:
    """The pipeline's own hook after each step, under either of the two names that diffusers has for it."""
    tell(what, 0, steps)
    if "callback_on_step_end" in accepted:

        def on_step_end(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            tell(what, step + 1, steps)
            return values

        return {"callback_on_step_end": on_step_end}
    if "callback" in accepted:

        def on_step(step: int, timestep: Any, latents: Any) -> None:
            tell(what, step + 1, steps)

        return {"callback": on_step, "callback_steps": 1} if "callback_steps" in accepted else {"callback": on_step}
    tell(what, 0, None)
    return {}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's own generators for what draws from them beside the given one, and leave them as found."""
    import torch

    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


# ---- scores against knowledge bands

SCORE_COLUMNS = (
    "prompt",
    "word",
    "instrument",
    "mask",
    "low_hz",
    "high_hz",
    "mask_area",
    "metric",
    "value",
    "chance",
    "mix_energy",
    "oracle_projection",
    "reason",
)


#: what has to be said of a latent with time tokens only
FLAT_IN_FREQUENCY = (
    "the model's latent has no frequency axis: its maps are constant in frequency, so bands score at chance"
)


def instrument_of(word: str) -> str | None:
    """The instrument class that a word of a prompt names (``"drum"`` → ``"drums"``), or None."""
    try:
        return templates.canonical(re.sub(r"#\d+$", "", word))
    except ValueError:
        return None


def words_of(projected: DataArray) -> list[str]:
    """The words of projected maps, without the groups in parentheses."""
    return [str(word) for word in projected["word"].values if not str(word).startswith("(")]


def grid_of(projected: DataArray, grid: MelGrid | None = None) -> MelGrid:
    """The grid with the span that the maps were placed on."""
    grid = MelGrid() if grid is None else grid
    step = float(projected.attrs["seconds_per_column"])
    return replace(grid, duration=step * projected.sizes["time"], start=float(projected.attrs["time_start"]))


def band_templates(projected: DataArray, grid: MelGrid) -> dict[str, dict[str, NDArray[np.bool_]]]:
    """Knowledge bands by preset, then by word of the maps; words that name no instrument have none."""
    found: dict[str, dict[str, NDArray[np.bool_]]] = {}
    for preset in templates.presets():
        masks = {}
        for word in words_of(projected):
            name = instrument_of(word)
            if name in templates.instruments(preset):
                masks[word] = templates.band_mask(str(name), grid, preset)
        if masks:
            found[preset] = masks
    return found


def band_labels(bands: Mapping[str, Mapping[str, NDArray[np.bool_]]]) -> dict[str, Mapping[str, NDArray[np.bool_]]]:
    """The same masks, under the labels that figures show."""
    return {f"{preset} band": masks for preset, masks in bands.items()}


def score_bands(
    projected: DataArray, audio: NDArray[np.float32], sample_rate: int, grid: MelGrid | None = None
) -> tuple[list[Row], list[str]]:
    """Scores of every word that names an instrument against its knowledge bands.

    The mask is a fixed band in hertz, the same at all times: it says whether attention lies where the instrument
    usually is, and nothing about when, or about this audio. The mix energy beside it is that of ``audio``.

    Returns
    -------
    rows : list of dict
        As :func:`aiba_eval.score`, with ``mask`` ("band:paper"), ``instrument``, ``low_hz`` and ``high_hz``.
    notes : list of str
    """
    grid = grid_of(projected, grid)
    energy = references.mix_energy(normalise(audio), sample_rate, grid)
    rows: list[Row] = []
    for preset, masks in band_templates(projected, grid).items():
        for row in score(projected, masks, mix=energy):
            instrument = str(instrument_of(row["word"]))
            low, high = templates.band(instrument, preset)
            rows.append({**row, "mask": f"band:{preset}", "instrument": instrument, "low_hz": low, "high_hz": high})
    notes = []
    unknown = [word for word in words_of(projected) if instrument_of(word) is None]
    if unknown:
        named = ", ".join(map(repr, unknown))
        notes.append(f"no score for {named}: no band preset knows such an instrument; maps and figures are there")
    if rows:
        notes.append(
            "masks are fixed bands in hertz, the same at all times, not the instruments of this audio: they cannot test timing"
        )
    if not projected.attrs["frequency_resolved"]:
        notes.append(FLAT_IN_FREQUENCY)
    return rows, notes


# ---- output shared with the demo


def random_weights(name: str) -> str:
    """The line that has to stand beside maps of an untrained model."""
    return (
        f"{name} has random weights: its maps mean nothing and its scores should sit near chance, leaning by accident"
    )


def write_audio(path: Path, audio: NDArray[np.float32], sample_rate: int) -> None:
    """A float32 WAV: nothing is clipped or rescaled."""
    import soundfile

    soundfile.write(path, audio.T if audio.ndim == 2 else audio, sample_rate, subtype="FLOAT")


def draw(
    folder: OutputFolder,
    under: str,
    projected: DataArray,
    audio: NDArray[np.float32],
    sample_rate: int,
    bands: Mapping[str, Mapping[str, NDArray[np.bool_]]],
    *,
    masks: Mapping[str, NDArray[np.bool_]] | None = None,
    mask_label: str = "mask",
    words: Sequence[str] | None = None,
    title: str = "",
    progress: Progress | None = None,
) -> list[str]:
    """Draw the profile of all words and an overlay of each into ``folder/under``; names of the files.

    Parameters
    ----------
    bands
        Templates for the profile, by label, then by word.
    masks
        Outlines for the overlays, by word.
    words
        Words to draw overlays of; default all of the maps'.
    title
        What was listened to.
    """
    grid = grid_of(projected)
    wave = normalise(audio)
    mel = grid.spectrogram(wave, sample_rate)
    shown = words_of(projected)
    heats = {word: projected.sel(word=word).isel(prompt=0).values for word in shown}
    energy = references.mix_energy(wave, sample_rate, grid)
    names = [f"{under}/profile.png"]
    profile = figures.profile_figure(heats, bands, grid=grid, mix=energy, title=title)
    figures.save(profile, folder.file(names[0]))
    limits = figures.shared_limits(heats)
    chosen = shown if words is None else list(words)
    for done, word in enumerate(chosen):
        (progress or quiet)("drawing", done, len(chosen))
        figure = figures.overlay_figure(
            mel,
            heats[word],
            grid=grid,
            word=word,
            limits=limits,
            shared_by=shown,
            mask=None if masks is None else masks.get(word),
            mask_label=mask_label,
            title=title,
        )
        names.append(f"{under}/overlay-{file_name(word, names)}.png")
        figures.save(figure, folder.file(names[-1]))
    return names


def file_name(text: str, taken: Sequence[str] = ()) -> str:
    """``text`` as part of a file name, different from those in ``taken``."""
    base = re.sub(r"[^\w]+", "-", text).strip("-")[:60] or "word"
    name, number = base, 2
    while any(f"-{name}." in other for other in taken):
        name, number = f"{base}-{number}", number + 1
    return name


def versions() -> dict[str, str]:
    """Versions of everything that numbers depend on; "none" where a package is missing."""
    found = {"python": platform.python_version()}
    for name in ("aiba", "torch", "diffusers", "transformers", "numpy", "xarray", "librosa", "scikit-learn"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _shorten(text: str, width: int = 40) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def quiet(what: str, done: int, total: int | None) -> None:
    """Progress for nobody."""
