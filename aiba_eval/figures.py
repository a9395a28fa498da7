"""Figures of attention on the mel grid: the frequency profile against its template, the overlay on the spectrogram, and two
models beside each other.

The maps show attention divided by its own mean over the grid, so that 1 is what evenly spread attention would be, and
keep a minimum range around 1: a map that is flat looks flat. Colours mean the same in every figure of one set: the
limits are shared, and the figure says so.

matplotlib's object interface only: nothing here touches pyplot's state or needs a display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aiba_eval import metrics
from aiba_eval.grid import MelGrid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

#: where hertz are written on a mel axis
TICKS_HZ = (0, 125, 250, 500, 1000, 2000, 3000, 4000, 6000, 8000, 12000, 16000, 24000)
#: decibels below the loudest cell at which the spectrogram's colours end
FLOOR_DB = 80.0
#: attention within this of its mean is not stretched to the whole colour scale
LEAST_RANGE = 0.1

ATTENTION = "#c2410c"
#: a target that changes over time is an area; bands, which do not, are outlines: areas over one another cannot be read
AREA: dict[str, Any] = {"fill": True, "color": "#2563eb", "alpha": 0.2}
OUTLINES: tuple[dict[str, Any], ...] = (
    {"color": "#15803d", "linewidth": 1.4, "linestyle": "--"},
    {"color": "#7e22ce", "linewidth": 1.4, "linestyle": ":"},
)
TEXT = {"title": 11, "label": 9, "tick": 8}


def profile_figure(
    heats: Mapping[str, ArrayLike],
    targets: Mapping[str, Mapping[str, ArrayLike]],
    *,
    grid: MelGrid | None = None,
    mix: ArrayLike | None = None,
    title: str = "",
) -> Figure:
    """The frequency profile of each word's attention against its templates (the paper's Fig. 2).

    One panel per word: attention averaged over time and divided by its mean, as a line; each template's share of time
    per mel row, as an outline if it is the same at all times (a band), else as an area. Beside each template the
    correlation r of the two profiles, and that of the mix's energy, which has read no text. The panels share their axes.

    Parameters
    ----------
    heats : mapping of word to array_like, shape (time, mel)
        Projected maps.
    targets : mapping of label to mapping of word to array_like, shape (time, mel)
        Templates or masks; a word that a mapping lacks is drawn without it.
    grid : MelGrid, optional
        Default ``MelGrid()``.
    mix : array_like, shape (time, mel), optional
        Energy of the mix (:func:`aiba_eval.references.mix_energy`).
    title : str
        What was listened to: a prompt, a piece.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        No words, or an array of another shape than the grid's.
    """
    grid = MelGrid() if grid is None else grid
    if not heats:
        raise ValueError("nothing to draw: heats holds no words")
    maps = {word: _on_grid(heat, grid, f"the map of {word!r}") for word, heat in heats.items()}
    energy = None if mix is None else _on_grid(mix, grid, "mix")
    figure = _figure(8.5, 1.0 + 1.75 * len(maps))
    panels = figure.subplots(len(maps), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    edges = np.arange(grid.mel + 1.0)
    low, high = 1 - LEAST_RANGE, 1 + LEAST_RANGE
    bands = [label for label, per_word in targets.items() if all(map(_constant_in_time, per_word.values()))]
    styles = {label: OUTLINES[bands.index(label) % len(OUTLINES)] if label in bands else AREA for label in targets}
    for axes, (word, heat) in zip(panels, maps.items()):
        profile = relative(heat).mean(axis=0)
        low, high = min(low, float(np.nanmin(profile))), max(high, float(np.nanmax(profile)))
        axes.axhline(1.0, color="0.75", linewidth=0.8, zorder=1)
        axes.stairs(
            profile, edges, baseline=None, color=ATTENTION, linewidth=1.8, zorder=4, label=f"attention to {word!r}"
        )
        share = axes.twinx()
        share.set(ylim=(0, 1.05), yticks=(0, 0.5, 1))
        share.tick_params(labelsize=TEXT["tick"], colors="0.35")
        share.set_ylabel("share of time", fontsize=TEXT["tick"], color="0.35")
        axes.set_zorder(share.get_zorder() + 1)
        axes.patch.set_visible(False)
        handles = list(axes.get_legend_handles_labels()[0])
        for label, per_word in targets.items():
            if word in per_word:
                target = _on_grid(per_word[word], grid, f"{label!r} of {word!r}")
                text = f"{label}\n{_correlations(heat, target, energy)}"
                handles.append(share.stairs(target.mean(axis=0), edges, label=text, **styles[label]))
        axes.set_title(word, loc="left", fontsize=TEXT["title"], fontweight="bold")
        axes.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(1.12, 1.04),
            frameon=False,
            fontsize=TEXT["tick"],
            borderpad=0,
        )
        axes.tick_params(labelsize=TEXT["tick"])
        axes.margins(x=0)
    margin = 0.05 * (high - low)
    panels[0].set_ylim(low - margin, high + margin)
    _hertz(panels[-1], grid, "x")
    panels[-1].set_xlabel(f"Hz (mel scale, {grid.scale})", fontsize=TEXT["label"])
    figure.supylabel("attention ÷ its mean (line)", fontsize=TEXT["label"], color=ATTENTION)
    _headline(figure, title)
    return figure


def overlay_figure(
    mel: ArrayLike,
    heat: ArrayLike,
    *,
    grid: MelGrid | None = None,
    word: str = "",
    limits: tuple[float, float] | None = None,
    shared_by: Sequence[str] = (),
    mask: ArrayLike | None = None,
    mask_label: str = "mask",
    title: str = "",
) -> Figure:
    """Mel spectrogram, overlay and heat map side by side (the paper's Fig. 3).

    Parameters
    ----------
    mel : array_like, shape (time, mel)
        Log-mel as :meth:`MelGrid.spectrogram` returns it, natural logarithm; shown in decibels below its maximum.
    heat : array_like, shape (time, mel)
        Projected map of the word; shown divided by its mean.
    grid : MelGrid, optional
        With its duration, so that the axis is in seconds; default ``MelGrid()``, whose columns are counted.
    word : str
    limits : (float, float), optional
        Ends of the attention's colour scale; default :func:`shared_limits` of this map alone.
    shared_by : sequence of str
        The words whose figures use these limits: written under the colour bar.
    mask : array_like of bool, shape (time, mel), optional
        Outlined on the overlay and the heat map.
    mask_label : str
        What the outline is.
    title : str
        What was listened to: a prompt, a piece.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        An array of another shape than the grid's.
    """
    grid = MelGrid() if grid is None else grid
    spectrogram = _decibels(_on_grid(mel, grid, "mel"))
    attention = relative(_on_grid(heat, grid, "heat"))
    low, high = limits if limits is not None else shared_limits({word: np.asarray(heat)})
    figure = _figure(12.5, 3.9)
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    end = grid.start + grid.duration if grid.duration is not None else grid.time
    extent = (grid.start if grid.duration is not None else 0, end, 0, grid.mel)
    image: dict[str, Any] = {"origin": "lower", "aspect": "auto", "extent": extent, "interpolation": "nearest"}
    levels = {"vmin": -FLOOR_DB, "vmax": 0}
    colours = {"cmap": "viridis", "vmin": low, "vmax": high}

    shown = panels[0].imshow(spectrogram.T, cmap="magma", **levels, **image)
    panels[1].imshow(spectrogram.T, cmap="gray", **levels, **image)
    panels[1].imshow(attention.T, alpha=0.5, **colours, **image)
    heated = panels[2].imshow(attention.T, **colours, **image)

    headings = ("mel spectrogram", f"attention to {word!r} over it", f"attention to {word!r}")
    for axes, heading in zip(panels, headings):
        axes.set_title(heading, fontsize=TEXT["title"])
        axes.set_xlabel("time (s)" if grid.duration is not None else "column", fontsize=TEXT["label"])
        axes.tick_params(labelsize=TEXT["tick"])
    panels[0].set_ylabel(f"Hz (mel scale, {grid.scale})", fontsize=TEXT["label"])
    _hertz(panels[0], grid, "y")
    _colour_bar(figure, shown, panels[0], "dB below the maximum")
    shared = [name for name in shared_by if name != word]
    note = f"scale shared with {', '.join(map(repr, shared[:3]))}{' …' if len(shared) > 3 else ''}" if shared else ""
    _colour_bar(figure, heated, panels[2], "\n".join(filter(None, ("attention ÷ its mean", note))))
    if mask is not None:
        outline = _on_grid(mask, grid, "mask")
        if outline.any() and not outline.all():
            times = np.linspace(extent[0], extent[1], 2 * grid.time + 1)[1::2]
            rows = np.arange(grid.mel) + 0.5
            for axes in panels[1:]:
                axes.contour(times, rows, outline.T, levels=[0.5], colors="white", linewidths=0.6)
            figure.supxlabel(f"white outline: {mask_label}", fontsize=TEXT["tick"], x=0.99, ha="right")
    _headline(figure, title)
    return figure


def side_by_side_figure(
    mel: ArrayLike,
    masks: Mapping[str, ArrayLike],
    columns: Mapping[str, Mapping[str, ArrayLike]],
    *,
    grid: MelGrid | None = None,
    title: str = "",
) -> Figure:
    """The same words in the maps of several models: one row per word, one column per kind of map (the paper's Fig. 4).

    First the mix's mel spectrogram and the word's mask, then every map, divided by its mean. The words of a column share its
    colour scale, which is written under it; a column that is flat looks flat.

    Parameters
    ----------
    mel : array_like, shape (time, mel)
        Log-mel of the mix, natural logarithm.
    masks : mapping of word to array_like of bool, shape (time, mel)
        Their order is that of the rows.
    columns : mapping of label to mapping of word to array_like, shape (time, mel)
    grid : MelGrid, optional
        Default ``MelGrid()``.
    title : str

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        No words or columns, a column without a word, or an array of another shape than the grid's.
    """
    grid = MelGrid() if grid is None else grid
    if not masks or not columns:
        raise ValueError(f"nothing to draw: {len(masks)} words and {len(columns)} columns")
    missing = [(label, word) for label, heats in columns.items() for word in masks if word not in heats]
    if missing:
        raise ValueError(f"the column {missing[0][0]!r} has no map of {missing[0][1]!r}")
    spectrogram = _decibels(_on_grid(mel, grid, "mel"))
    figure = _figure(2.1 * (2 + len(columns)), 1.1 + 1.75 * len(masks))
    panels = figure.subplots(len(masks), 2 + len(columns), sharex=True, sharey=True, squeeze=False)
    end = grid.start + grid.duration if grid.duration is not None else grid.time
    extent = (grid.start if grid.duration is not None else 0, end, 0, grid.mel)
    image: dict[str, Any] = {"origin": "lower", "aspect": "auto", "extent": extent, "interpolation": "nearest"}
    for row, (word, mask) in zip(panels, masks.items(), strict=True):
        row[0].imshow(spectrogram.T, cmap="magma", vmin=-FLOOR_DB, vmax=0, **image)
        row[1].imshow(_on_grid(mask, grid, f"the mask of {word!r}").T, cmap="gray", vmin=0, vmax=1, **image)
        row[0].set_ylabel(f"{word}\nHz", fontsize=TEXT["label"])
    for place, (label, heats) in enumerate(columns.items(), 2):
        low, high = shared_limits({word: heats[word] for word in masks})
        for row, word in zip(panels, masks, strict=True):
            heat = relative(_on_grid(heats[word], grid, f"{label!r} of {word!r}"))
            row[place].imshow(heat.T, cmap="viridis", vmin=low, vmax=high, **image)
        panels[-1, place].set_xlabel(f"÷ mean: {low:.2g} to {high:.2g}", fontsize=TEXT["tick"])
    for axes, heading in zip(panels[0], ("mix", "mask", *columns), strict=True):
        axes.set_title(heading.replace(" ", "\n"), fontsize=TEXT["label"])
    for axes in panels.flat:
        axes.tick_params(labelsize=TEXT["tick"])
    panels[-1, 0].set_xlabel("time (s)" if grid.duration is not None else "column", fontsize=TEXT["label"])
    _hertz(panels[0, 0], grid, "y")
    _headline(figure, title)
    return figure


#: what a contrast is called on a figure, and what a map that knows nothing has
CONTRASTS = {
    "above_chance": ("AP − chance", 0.0),
    "word_swap": ("word swap (AP)", 0.0),
    "piece_swap": ("piece swap (AP)", 0.0),
    "presence": ("presence (AUROC)", 0.5),
}
MODELS = ("#1d4ed8", "#c2410c")


def contrast_figure(
    rows: Sequence[Mapping[str, Any]], models: Sequence[str], fresh: Sequence[Mapping[str, Any]] = ()
) -> Figure:
    """Contrasts of two models with their intervals, and where fresh initialisations lie.

    One panel for each of :data:`CONTRASTS`; in it one pair of bars per kind of map and noise level, from what a map that knows
    nothing has; lines are 95 % intervals, grey boxes the range over fresh initialisations.

    Parameters
    ----------
    rows, fresh
        Of :class:`aiba_eval.comparing.Comparison`.
    models : labels of the models

    Raises
    ------
    ValueError
        There is no row to draw.
    """
    shown = [
        row for row in rows if row["word"] == "all" and row["target"] in ("", "dominance") and row["level"] is not None
    ]
    held = [m for m in CONTRASTS if any(row["measure"] == m and np.isfinite(row["value"]) for row in shown)]
    if not held:
        raise ValueError("nothing to draw: no row has a contrast")
    # a tick label under every pair of bars
    most = max(len({(row["map"], row["level"]) for row in shown if row["measure"] == measure}) for measure in held)
    figure = _figure(max(3.1, 0.4 + 0.62 * most) * len(held), 3.8)
    panels = figure.subplots(1, len(held), squeeze=False)[0]
    width = 0.8 / len(models)
    same = ("model", "map", "level", "target", "measure")
    for axes, measure in zip(panels, held, strict=True):
        of = [row for row in shown if row["measure"] == measure]
        places = list(dict.fromkeys((row["map"], row["level"]) for row in of))
        heading, base = CONTRASTS[measure]
        axes.axhline(base, color="0.4", linewidth=0.8)
        for number, (model, colour) in enumerate(zip(models, MODELS, strict=False)):
            chosen = [row for row in of if row["model"] == model]
            at = np.array(
                [places.index((row["map"], row["level"])) + (number - (len(models) - 1) / 2) * width for row in chosen]
            )
            values, low, high = (np.array([float(row[k]) for row in chosen]) for k in ("value", "low", "high"))
            axes.bar(at, values - base, width * 0.92, bottom=base, color=colour, alpha=0.75, label=model)
            axes.vlines(at, low, high, color="black", linewidth=1.2)
            for x, row in zip(at, chosen, strict=True):
                drawn = [f["fresh"] for f in fresh if all(f[k] == row[k] for k in same)]
                if drawn:
                    box = (x - width * 0.3, min(drawn[0]), width * 0.6, max(max(drawn[0]) - min(drawn[0]), 1e-4))
                    axes.add_patch(_rectangle(*box))
        axes.set_title(heading, fontsize=TEXT["title"])
        axes.set_xticks(range(len(places)), [f"{kind}\nt = {level}" for kind, level in places])
        axes.tick_params(labelsize=TEXT["tick"])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False, fontsize=TEXT["tick"])
    note = "lines: 95 % intervals over pieces"
    figure.supxlabel(
        f"{note}; grey: fresh initialisations" if fresh else note, fontsize=TEXT["tick"], x=0.99, ha="right"
    )
    return figure


def site_figure(profiles: Sequence[Mapping[str, Any]], models: Sequence[str]) -> Figure:
    """Entropy over words and mass on what is no word, site by site: one row per model, one line per noise level.

    Parameters
    ----------
    profiles
        Of :class:`aiba_eval.comparing.Comparison`.
    models : labels of the models

    Raises
    ------
    ValueError
        There is no site to draw.
    """
    if not profiles:
        raise ValueError("nothing to draw: no model has attention sites")
    figure = _figure(9.5, 0.8 + 2.3 * len(models))
    panels = figure.subplots(len(models), 2, sharey="col", squeeze=False)
    levels = sorted({row["level"] for row in profiles})
    styles = ("-", "--", ":", "-.")
    for (entropy, mass), model, colour in zip(panels, models, MODELS, strict=False):
        for number, level in enumerate(levels):
            of = [row for row in profiles if row["model"] == model and row["level"] == level]
            sites = range(len(of))
            line: dict[str, Any] = {"linestyle": styles[number % len(styles)], "marker": ".", "linewidth": 1.4}
            entropy.plot(sites, [row["entropy"] for row in of], color=colour, label=f"t = {level}", **line)
            for key, name, shade in (
                ("padding_mass", "padding", "#7e22ce"),
                ("special_mass", "special tokens", "#15803d"),
            ):
                mass.plot(sites, [row[key] for row in of], color=shade, label=f"{name}, t = {level}", **line)
        entropy.set_title(f"{model}: entropy over words", fontsize=TEXT["label"], loc="left")
        mass.set_title(f"{model}: mass on sinks", fontsize=TEXT["label"], loc="left")
        for axes in (entropy, mass):
            axes.set_xlabel("attention site, in order", fontsize=TEXT["tick"])
            axes.tick_params(labelsize=TEXT["tick"])
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend(frameon=False, fontsize=TEXT["tick"], loc="best")
        entropy.axhline(1.0, color="0.6", linewidth=0.8)
        entropy.set_ylim(min(0.9, *(0.98 * row["entropy"] for row in profiles if np.isfinite(row["entropy"]))), 1.01)
        mass.set_ylim(-0.02, 1.02)
    return figure


def _rectangle(x: float, y: float, width: float, height: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor="0.6", edgecolor="0.3", alpha=0.7, linewidth=0.6, zorder=3)


def shared_limits(heats: Mapping[str, ArrayLike]) -> tuple[float, float]:
    """Ends of one colour scale for several maps, each divided by its mean; at least 1 ± 0.1."""
    low, high = 1 - LEAST_RANGE, 1 + LEAST_RANGE
    for heat in heats.values():
        values = relative(np.asarray(heat, float))
        if np.isfinite(values).any():
            low, high = min(low, float(np.nanmin(values))), max(high, float(np.nanmax(values)))
    return low, high


def relative(heat: ArrayLike) -> Floats:
    """A map divided by its mean: 1 everywhere for evenly spread attention, and for a map that is zero."""
    values = np.asarray(heat, float)
    mean = float(np.nanmean(values)) if np.isfinite(values).any() else 0.0
    return values / mean if mean > 0 else np.ones_like(values)


def save(figure: Figure, path: str | Path, *, dpi: int = 110) -> Path:
    """Write a figure; the same figure gives the same bytes.

    Parameters
    ----------
    figure : Figure
    path : path
        Its suffix decides the format: .png, .svg, .pdf.
    dpi : int
        Dots per inch of a .png.
    """
    path = Path(path)
    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix, {"Software": None})
    figure.savefig(path, dpi=dpi, metadata=undated)
    return path


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _on_grid(values: ArrayLike, grid: MelGrid, what: str) -> Floats:
    array = np.asarray(values, float)
    if array.shape != grid.shape:
        raise ValueError(f"{what} has shape {array.shape}, the grid is {grid.shape} (time, mel)")
    return array


def _constant_in_time(target: ArrayLike) -> bool:
    values = np.asarray(target)
    return bool((values == values[:1]).all())


def _decibels(log_mel: Floats) -> Floats:
    """Natural logarithm of magnitudes to decibels below their maximum."""
    return np.asarray((log_mel - log_mel.max()) * (20 / np.log(10)))


def _hertz(axes: Axes, grid: MelGrid, axis: str) -> None:
    """Ticks in hertz where they lie on the mel axis, none closer to the one before than a sixteenth of it."""
    kept: list[float] = []
    for hz in (hz for hz in TICKS_HZ if grid.fmin <= hz <= grid.fmax):
        if not kept or grid.hz_to_row(hz) - grid.hz_to_row(kept[-1]) >= grid.mel / 16:
            kept.append(hz)
    labels = [f"{hz / 1000:g}k" if hz >= 1000 else f"{hz:g}" for hz in kept]
    rows = [float(grid.hz_to_row(hz)) for hz in kept]
    if axis == "x":
        axes.set_xticks(rows, labels)
        axes.set_xlim(0, grid.mel)
    else:
        axes.set_yticks(rows, labels)
        axes.set_ylim(0, grid.mel)


def _correlations(heat: Floats, target: Floats, energy: Floats | None) -> str:
    text = f"r = {_number(metrics.profile_pearson(heat, target))}" if np.isfinite(heat).all() else "r undefined"
    if energy is None:
        return text
    return f"{text}, mix energy {_number(metrics.profile_pearson(energy, target))}"


def _number(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−") if np.isfinite(value) else "undefined"


def _headline(figure: Figure, title: str) -> None:
    if title:
        figure.suptitle(title, fontsize=TEXT["title"], x=0.01, ha="left")


def _colour_bar(figure: Figure, image: Any, axes: Axes, label: str) -> None:
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=28)
    bar.set_label(label, fontsize=TEXT["tick"])
    bar.ax.tick_params(labelsize=TEXT["tick"])
