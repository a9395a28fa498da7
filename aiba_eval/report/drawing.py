"""The paper's Figures 2 to 4 of a run's items, by :mod:`aiba_eval.figures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aiba_eval import figures
from aiba_eval.grid import LOG_FLOOR
from aiba_eval.outputs import OutputFolder
from aiba_eval.report.entries import TARGETS, Entries
from aiba_eval.report.views import grid_of
from aiba_eval.run import Progress, file_name

if TYPE_CHECKING:
    import xarray

    from aiba_eval.evaluation import Item

Maps = Mapping[str, NDArray[Any]]


def draw(
    entries: Entries,
    items: Sequence[Item],
    folder: OutputFolder,
    *,
    against: Entries | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Figures of the primary variant: profiles (Fig. 2) and overlays (Fig. 3) at the last level, and all levels side by side,
    with those of another run over the same items (Fig. 4).

    Parameters
    ----------
    entries, items : of the run
    folder : where ``figures/ITEM/…png`` are written
    against : another run, such as a diffusion transformer's
    progress : told of every item

    Returns
    -------
    list of str
        Names of the files.
    """
    names: list[str] = []
    for done, item in enumerate(items):
        if progress is not None:
            progress("drawing figures", done, len(items))
        arrays = entries.arrays(item)
        if "projected" not in arrays:
            continue
        grid, level = grid_of(arrays), int(arrays["level"].values[-1])
        heats = heats_of(item, arrays, level)
        if not heats:
            continue
        title = f"{entries.model['name']}, {item.id}, {entries.at(level)}: {item.prompt!r}"
        mel = arrays["mix"].values
        under = f"figures/{item.path.name}"
        masks = {target: masks_of(item, arrays, target) for target in entries.targets}
        # one area and the bands: more could not be told apart
        templates = [t for t in entries.targets if t == entries.primary or t.startswith("band:")]
        bands = {_label(target): masks[target] for target in templates if masks[target]}
        energy = np.maximum(mel.astype(float) - np.log(LOG_FLOOR), 0)
        profile = figures.profile_figure(heats, bands, grid=grid, mix=energy, title=title)
        names.append(f"{under}/profile.png")
        figures.save(profile, folder.file(names[-1]))
        outlines = masks.get(str(entries.primary), {})
        limits = figures.shared_limits(heats)
        for word, heat in heats.items():
            overlay = figures.overlay_figure(
                mel,
                heat,
                grid=grid,
                word=word,
                limits=limits,
                shared_by=list(heats),
                mask=outlines.get(word),
                mask_label=TARGETS.get(str(entries.primary), "mask"),
                title=title,
            )
            names.append(f"{under}/overlay-{file_name(word, names)}.png")
            figures.save(overlay, folder.file(names[-1]))
        columns = columns_of(entries, item)
        other = None if against is None else next((one for one in against.items if one.id == item.id), None)
        if against is not None and other is not None:
            columns |= columns_of(against, other)
        shared = {word: mask for word, mask in outlines.items() if all(word in heats for heats in columns.values())}
        if shared and len(columns) > 1:
            beside = figures.side_by_side_figure(mel, shared, columns, grid=grid, title=f"{item.id}: {item.prompt!r}")
            names.append(f"{under}/side-by-side.png")
            figures.save(beside, folder.file(names[-1]))
    return names


def heats_of(item: Item, arrays: xarray.Dataset, level: int) -> dict[str, NDArray[Any]]:
    """Word → map of the primary variant, of the words that have one."""
    chosen = arrays["projected"].isel(variant=0).sel(level=level)
    found = {word: chosen.sel(word=word).values for word in item.words}
    return {word: heat for word, heat in found.items() if np.isfinite(heat).any()}


def masks_of(item: Item, arrays: xarray.Dataset, target: str) -> dict[str, NDArray[np.bool_]]:
    """Word → mask of one target; what is no mask is left out."""
    found = {}
    for word in item.words if target in arrays["target"].values else ():
        values = arrays["truth"].sel(target=target, word=word).values
        if np.isfinite(values).all() and np.isin(values, (0, 1)).all():
            found[word] = values > 0.5
    return found


def columns_of(entries: Entries, item: Item) -> dict[str, Maps]:
    """Model and level → maps of an item."""
    arrays = entries.arrays(item)
    name = entries.model["name"]
    # the figure breaks its headings at spaces
    levels = {int(level): entries.at(int(level)).replace(" ", "\u00a0") for level in arrays["level"].values}
    return {f"{name} {label}": heats_of(item, arrays, level) for level, label in levels.items()}


def _label(target: str) -> str:
    return f"{target.removeprefix('band:')} band" if target.startswith("band:") else target
