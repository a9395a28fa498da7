"""What the page holds of one item: audio, spectrogram, maps, outlines, labels.

Maps are stored divided by their mean, so that 1 is what evenly spread attention would be, at eight bits a cell
(:mod:`aiba_eval.report.packing`). Variants are on the run's own grid. Single sites are projected one by one onto a raster of
at most :data:`RASTER` cells, and steps of a generation are thinned to :data:`STEPS`; where :data:`BUDGET` would still be exceeded the
raster becomes coarser, then steps and at last sites are left out. The view's ``note`` says what was done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aiba_eval.demo import at_timestep
from aiba_eval.figures import FLOOR_DB, TICKS_HZ, relative
from aiba_eval.grid import LOG_FLOOR, MelGrid, project
from aiba_eval.report import packing
from aiba_eval.report.entries import REFERENCES, Entries

if TYPE_CHECKING:
    import xarray

    from aiba_eval.evaluation import Item

Floats = NDArray[np.float64]

#: (time, mel) cells of a single site's map, first choice first
RASTERS = ((64, 64), (64, 32), (32, 32), (32, 16))
RASTER = RASTERS[0]
#: steps of a generation that are kept, beside their mean
STEPS = 8
#: bytes of single sites' maps of one item, before base64
BUDGET = 1_500_000
#: columns of the spectrogram
COLUMNS = 512


def grid_of(arrays: xarray.Dataset) -> MelGrid:
    """The grid that an item's arrays lie on, from their coordinates and attributes."""
    known = {**arrays.attrs, **(arrays["projected"].attrs if "projected" in arrays else {})}
    times = np.asarray(arrays["time"].values, float)
    if times.size > 1:
        width = float(times[1] - times[0])
    else:
        width = float(known.get("seconds_per_column", 1.0))
    fmax = float(known.get("fmax", 8000.0))
    return MelGrid(
        time=times.size,
        mel=arrays.sizes["mel"],
        duration=width * times.size,
        start=float(times[0]) - width / 2,
        fmin=float(known.get("fmin", 0.0)),
        fmax=fmax,
        scale=known.get("mel_scale", "slaney"),
        sample_rate=max(16_000, round(2 * fmax)),
    )


def view_of(entries: Entries, item: Item) -> dict[str, Any]:
    """Everything that the page's script needs of one item, as plain JSON values.

    A part that the run did not keep is None, with its reason in ``missing``.
    """
    arrays = entries.arrays(item)
    grid = grid_of(arrays)
    missing: dict[str, str] = {}
    sound, spectrogram = _sound(item, grid, missing)
    if spectrogram is None:
        spectrogram = _decibels(arrays["mix"].values)
    sites = _sites(entries, item, grid, missing)
    return {
        "id": item.id,
        "prompt": item.prompt,
        "words": list(item.words),
        "start": grid.start,
        "duration": grid.duration,
        "rows": grid.mel,
        "ticks": _ticks(grid),
        "audio": sound,
        "spectrogram": packing.images(spectrogram),
        "levels": [entries.at(int(level)) for level in arrays["level"].values] if "level" in arrays.coords else [],
        "variants": _variants(item, arrays),
        "sites": sites,
        "targets": _targets(item, arrays),
        "energy": _profiles(np.maximum(arrays["mix"].values.astype(float) - np.log(LOG_FLOOR), 0)),
        "missing": missing,
    }


def item_facts(entries: Entries, item: Item) -> dict[str, Any]:
    """Mean average precision of an item and of its references over its words, per level: for the list of items."""
    scores = entries.scores
    if scores is None or not len(scores):
        return {}
    own = scores[
        (scores["item"] == item.id)
        & (scores["variant"] == entries.variants[0])
        & (scores["target"] == entries.primary)
        & (scores["metric"] == "average_precision")
    ]
    if not np.isfinite(own["value"].to_numpy(float)).any():
        return {}
    means = own[["value", *(name for name in REFERENCES if name in own)]].mean()
    return {str(name): float(value) for name, value in means.items() if np.isfinite(value)}


# ---- parts


def _sound(item: Item, grid: MelGrid, missing: dict[str, str]) -> tuple[str | None, Floats | None]:
    """The audio, and its spectrogram in decibels below the maximum, finer in time than the grid."""
    try:
        samples, rate = item.audio
    except (FileNotFoundError, RuntimeError) as error:  # soundfile's error for a damaged file is a RuntimeError
        missing["audio"] = f"the run holds no audio of this item ({error.__class__.__name__})"
        return None, None
    mono = samples if samples.ndim == 1 else samples.mean(axis=1)
    fine = MelGrid(**{**vars(grid), "time": max(COLUMNS, grid.time)})
    return packing.flac(mono, rate), _decibels(fine.spectrogram(mono, rate))


def _decibels(log_mel: NDArray[Any]) -> Floats:
    """Natural logarithm of magnitudes to decibels below their maximum, down to the floor."""
    decibels = (log_mel.astype(float) - log_mel.max()) * (20 / np.log(10))
    return np.asarray(np.maximum(decibels, -FLOOR_DB))


def _variants(item: Item, arrays: xarray.Dataset) -> dict[str, Any] | None:
    if "projected" not in arrays:
        return None
    chosen = arrays["projected"].sel(word=list(item.words))
    values = np.stack([[[_relative(w) for w in level] for level in variant] for variant in chosen.values])
    return {"names": [str(name) for name in arrays["variant"].values], **packing.images(values)}


def _relative(heat: NDArray[Any]) -> Floats:
    """Divided by its mean; NaN throughout where there is no map."""
    return relative(heat) if np.isfinite(heat).any() else np.full(heat.shape, np.nan)


def _targets(item: Item, arrays: xarray.Dataset) -> dict[str, dict[str, str]]:
    """Target → word → its mask; what is no mask (a share) is left out."""
    found: dict[str, dict[str, str]] = {}
    for name in arrays["target"].values if "truth" in arrays else ():
        for word in item.words:
            mask = arrays["truth"].sel(target=name, word=word).values
            if np.isfinite(mask).all() and np.isin(mask, (0, 1)).all():
                found.setdefault(str(name), {})[word] = packing.bits(mask > 0.5)
    return found


def _profiles(energy: Floats) -> dict[str, list[float]]:
    """Profiles of the mix's energy, each divided by its maximum."""

    def of(axis: int) -> list[float]:
        profile = energy.mean(axis=axis)
        return [round(float(v), 4) for v in profile / (profile.max() or 1)]

    return {"frequency": of(0), "time": of(1)}


def _ticks(grid: MelGrid) -> list[list[Any]]:
    """[row from below, text] of hertz to write on the axis."""
    kept: list[float] = []
    for hz in (hz for hz in TICKS_HZ if grid.fmin <= hz <= grid.fmax):
        if not kept or grid.hz_to_row(hz) - grid.hz_to_row(kept[-1]) >= grid.mel / 12:
            kept.append(hz)
    return [[round(float(grid.hz_to_row(hz)), 3), f"{hz / 1000:g}k" if hz >= 1000 else f"{hz:g}"] for hz in kept]


# ---- single sites


def _sites(entries: Entries, item: Item, grid: MelGrid, missing: dict[str, str]) -> dict[str, Any] | None:
    """Maps (site, level, word, time, mel), all sites' mean first; of a generation the mean over steps comes first."""
    maps = item.maps
    if maps is None:
        missing["sites"] = "the run did not keep the maps of single layers (it was made without keep_maps)"
        return None
    held = {name: array for name, array in maps.items() if set(item.words) & _words(array)}
    if not held:
        missing["sites"] = "no layer has a map of a word"
        return None
    at, labels = _levels(entries, held)
    note = []
    names = list(held)
    raster, kept, names = _within_budget(len(at), names, len(item.words), entries.generates)
    if kept < len(at):
        chosen = [0, *np.unique(np.linspace(1, len(at) - 1, kept - 1).round().astype(int))] if kept > 1 else [0]
        note.append(f"{len(chosen)} of {len(at)} step positions")
        at, labels = [at[i] for i in chosen], [labels[i] for i in chosen]
    if len(names) < len(held):
        note.append(f"{len(names)} of {len(held)} layers")
    small = MelGrid(**{**vars(grid), "time": min(raster[0], grid.time), "mel": min(raster[1], grid.mel)})
    values = np.full((1 + len(names), len(at), len(item.words), *small.shape), np.nan)
    lattices = []
    for s, name in enumerate([None, *names]):
        lattice: Sequence[int] = ()
        for k, step in enumerate(at):
            chosen_sites = step if name is None else {name: step[name]}
            one = project(chosen_sites, small).isel(prompt=0)
            lattice = one.attrs["finest_lattice"]
            for w, word in enumerate(item.words):
                if word in one["word"].values:
                    values[s, k, w] = _relative(one.sel(word=word).values)
        lattices.append(" × ".join(map(str, lattice)))
    note.insert(0, f"Single layers are shown on {small.time} × {small.mel} cells (time × frequency)")
    if entries.generates:
        note.append("steps are a sample of the generation's")
    return {
        "names": ["all layers, averaged", *names],
        "lattices": lattices,
        "levels": labels,
        "note": ", ".join(note) + ".",
        **packing.images(values),
    }


def _levels(
    entries: Entries, maps: Mapping[str, xarray.DataArray]
) -> tuple[list[dict[str, xarray.DataArray]], list[str]]:
    """The maps at each position of the level slider, and what the position is called."""
    if not entries.generates:
        return [at_timestep(maps, level) for level in entries.levels], [entries.at(level) for level in entries.levels]
    first = next(iter(maps.values()))
    at, labels = [dict(maps)], ["mean over steps"]
    if "step" in first.dims:
        count = first.sizes["step"]
        for step in np.unique(np.linspace(0, count - 1, min(STEPS, count)).round().astype(int)):
            at.append({name: array.isel(step=[step]) for name, array in maps.items()})
            labels.append(f"step {step + 1} of {count}")
    return at, labels


def _within_budget(levels: int, sites: list[str], words: int, thin: bool) -> tuple[tuple[int, int], int, list[str]]:
    """The finest raster that fits; on the coarsest, how many levels (if these may be thinned) and which sites are kept."""
    for raster in RASTERS:
        if (1 + len(sites)) * levels * words * raster[0] * raster[1] <= BUDGET:
            return raster, levels, sites
    image = words * RASTERS[-1][0] * RASTERS[-1][1]
    if thin:
        levels = max(2, min(levels, BUDGET // ((1 + len(sites)) * image)))
    fit = max(1, BUDGET // (levels * image) - 1)
    return RASTERS[-1], levels, sites[:: -(-len(sites) // fit)]


def _words(array: xarray.DataArray) -> set[str]:
    return {str(word) for word in array["word"].values} if "word" in array.dims else set()
