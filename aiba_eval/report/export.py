"""Results in other formats: CSV, LaTeX and netCDF. What ``aiba export`` does.

**CSV**: ``scores.csv`` has one row per item, variant, level, target, word and metric; ``summary.csv``, ``contrasts.csv`` and
``controls.csv`` hold what ``summary.json`` does. An undefined number is an empty cell.

**LaTeX**: every table of :func:`aiba_eval.report.writing.all_tables` by itself, and ``tables.tex``, a document that shows all of them.

**netCDF** (version 3 with 64-bit offsets, by SciPy): ``scores.nc`` is an array of every metric and reference over (pair, variant, level,
target, metric), where a pair is a word in an item; ``summary.nc`` the means over (variant, level, target, word, metric). NaN where nothing
was measured. The format has no compression, no groups and no 64-bit integers: levels are 32-bit ones. With ``maps``,
``maps/ITEM.nc`` holds an item's arrays on the grid.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from aiba_eval.evaluation import Run
from aiba_eval.outputs import OutputFolder, write_csv
from aiba_eval.report.entries import REFERENCES, Entries
from aiba_eval.report.writing import Written, all_tables, open_run
from aiba_eval.run import Progress

if TYPE_CHECKING:
    import xarray

Format = Literal["csv", "latex", "netcdf"]
FORMATS: tuple[Format, ...] = ("csv", "latex", "netcdf")
#: of a summary's rows, in its own columns
_MEANS = ("value", "low", "high", "n")
_COMPARED = ("reference_value", "difference", "difference_low", "difference_high", "ratio", "p", "p_corrected")


class CannotExport(ValueError):
    """There is nothing to export in that way. The message says what to do."""


def write_export(
    run: Run | str | Path,
    form: Format,
    *,
    out: str | Path | None = None,
    maps: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write a run's results in another format.

    Parameters
    ----------
    run : Run or path
    form : {"csv", "latex", "netcdf"}
    out : path, optional
        Default ``export-FORMAT`` in the run's folder. An earlier export's files are replaced, and nothing else.
    maps : bool
        With ``netcdf``: the maps on the grid of every item too.
    progress : callable, optional

    Returns
    -------
    Written

    Raises
    ------
    CannotExport
        The format is unknown, maps were asked for in another one than netCDF, or nothing was scored yet.
    NotARun
        No evaluation has written there.
    FolderInUse
        ``out`` holds something else.
    """
    if form not in FORMATS:
        raise CannotExport(f"the format is one of {', '.join(FORMATS)}, got {form!r}")
    if maps and form != "netcdf":
        raise CannotExport(f"maps are arrays: export them with the format netcdf, not {form}")
    opened = open_run(run)
    entries = Entries(opened)
    if entries.scores is None and not entries.means:
        raise CannotExport(f"{opened.path} has no scores yet: run `aiba evaluate` there again, to its end")
    folder = OutputFolder(opened.path / f"export-{form}" if out is None else out, "export", overwrite=True)
    tables = all_tables(entries)
    if form == "csv":
        _csv(entries, folder)
    elif form == "latex":
        names = []
        for table in tables:
            names.append(f"{table.name}.tex")
            folder.file(names[-1]).write_text(table.latex(), encoding="utf-8")
        folder.file("tables.tex").write_text(_document(names), encoding="utf-8")
    else:
        _netcdf(entries, folder, maps, progress)
    notes = [f"no {part}: {reason}" for part, reason in entries.missing.items()]
    folder.finish({"run": opened.path.name, "format": form, "notes": notes})
    return Written(folder.path, folder.files, tables if form == "latex" else [], notes)


def _csv(entries: Entries, folder: OutputFolder) -> None:
    if entries.scores is not None:
        write_csv(folder.file("scores.csv"), entries.scores.to_dict("records"), list(entries.scores.columns))
    if entries.means:
        write_csv(folder.file("summary.csv"), entries.run.summary())
        write_csv(folder.file("contrasts.csv"), entries.contrasts)
        write_csv(folder.file("controls.csv"), entries.controls)


def _document(names: Sequence[str]) -> str:
    inputs = "\n".join(rf"\input{{{name}}}" for name in names)
    return (
        "\\documentclass{article}\n\\usepackage{booktabs}\n\\usepackage[margin=2cm]{geometry}\n"
        f"\\begin{{document}}\n{inputs}\n\\end{{document}}\n"
    )


# ---- netCDF


def _netcdf(entries: Entries, folder: OutputFolder, maps: bool, progress: Progress | None) -> None:
    if entries.scores is not None and len(entries.scores):
        _write(scores_dataset(entries), folder.file("scores.nc"))
    if entries.means:
        _write(summary_dataset(entries), folder.file("summary.nc"))
    for done, item in enumerate(entries.items if maps else ()):
        if progress is not None:
            progress("writing maps", done, len(entries.items))
        about = {"item": item.id, "piece": item.piece, "prompt": item.prompt, "start": item.start}
        _write(item.fields.load().assign_attrs(about), folder.file(f"maps/{item.path.name}.nc"))


def scores_dataset(entries: Entries) -> xarray.Dataset:
    """Scores over (pair, variant, level, target, metric): ``value``, a variable per reference, and ``mask_area`` without metric.

    Coordinates ``item``, ``piece`` and ``word`` run along ``pair``.
    """
    import xarray

    scores = entries.scores
    assert scores is not None
    pairs = list(dict.fromkeys(zip(scores["item"], scores["word"], strict=True)))
    pieces = dict(zip(scores["item"], scores["piece"], strict=True))
    axes = {name: list(dict.fromkeys(scores[name])) for name in ("variant", "level", "target", "metric")}
    places = [_places(list(zip(scores["item"], scores["word"], strict=True)), pairs)]
    places += [_places(list(scores[name]), values) for name, values in axes.items()]
    shape = (len(pairs), *(len(values) for values in axes.values()))
    data: dict[str, Any] = {}
    for column in ("value", *(name for name in REFERENCES if name in scores)):
        array = np.full(shape, np.nan)
        array[tuple(places)] = scores[column].to_numpy(float)
        data[column] = (("pair", *axes), array)
    area = np.full(shape[:-1], np.nan)
    area[tuple(places[:-1])] = scores["mask_area"].to_numpy(float)
    data["mask_area"] = (("pair", "variant", "level", "target"), area)
    return xarray.Dataset(
        data,
        coords={
            "item": ("pair", [str(item) for item, _ in pairs]),
            "piece": ("pair", [str(pieces[item]) for item, _ in pairs]),
            "word": ("pair", [str(word) for _, word in pairs]),
            "level": np.asarray(axes["level"], np.int32),
            **{name: [str(v) for v in axes[name]] for name in ("variant", "target", "metric")},
        },
        attrs=_attributes(entries),
    )


def summary_dataset(entries: Entries) -> xarray.Dataset:
    """Means over (variant, level, target, word, metric), and their comparisons over a further axis ``reference``."""
    import xarray

    rows = entries.run.summary()
    dims = ("variant", "level", "target", "word", "metric")
    axes = {name: list(dict.fromkeys(row[name] for row in rows)) for name in dims}
    names = list(dict.fromkeys(str(row["reference"]) for row in rows if row.get("reference")))
    shape = tuple(len(values) for values in axes.values())
    means = {name: np.full(shape, np.nan) for name in _MEANS}
    compared = {name: np.full((*shape, len(names)), np.nan) for name in _COMPARED}
    for row in rows:
        at = tuple(axes[name].index(row[name]) for name in dims)
        for name, array in means.items():
            array[at] = np.nan if row[name] is None else row[name]
        if row.get("reference"):
            for name, array in compared.items():
                array[(*at, names.index(row["reference"]))] = np.nan if row.get(name) is None else row[name]
    return xarray.Dataset(
        {
            **{name: (dims, array) for name, array in means.items()},
            **{name: ((*dims, "reference"), array) for name, array in compared.items()},
        },
        coords={
            **{name: [str(v) for v in axes[name]] for name in dims if name != "level"},
            "level": np.asarray(axes["level"], np.int32),
            "reference": names,
        },
        attrs=_attributes(entries),
    )


def _places(values: Sequence[Any], known: Sequence[Any]) -> np.ndarray:
    at = {value: index for index, value in enumerate(known)}
    return np.array([at[value] for value in values])


def _attributes(entries: Entries) -> dict[str, Any]:
    return {
        "model": str(entries.model["name"]),
        "protocol": str(entries.run.configuration.get("protocol", "")),
        "run": entries.run.path.name,
        "complete": int(bool(entries.run.record.get("complete"))),
    }


def _write(dataset: xarray.Dataset, path: Path) -> None:
    """netCDF 3: attributes it cannot hold become text, 64-bit integers and booleans 32-bit integers."""
    plain = dataset.copy()
    plain.attrs = _storable(dataset.attrs)
    for name in plain.variables:
        variable = plain[name]
        variable.attrs = _storable(variable.attrs)
        if variable.dtype == np.int64:
            plain[name] = variable.astype(np.int32)
    plain.to_netcdf(path, engine="scipy", format="NETCDF3_64BIT")


def _storable(attributes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in attributes.items():
        key = re.sub(r"\W", "_", str(name))
        if isinstance(value, (bool, np.bool_)):
            found[key] = int(value)
        elif isinstance(value, (int, float, str, np.generic)):
            found[key] = value
        elif isinstance(value, (list, tuple)) and value and all(isinstance(v, (int, float)) for v in value):
            found[key] = np.asarray(value, float)
        else:
            found[key] = str(value)
    return found
