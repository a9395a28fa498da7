"""`aiba bench`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from aiba_eval.cli.options import Device, Dtype, DtypeOption, Json, Overwrite
from aiba_eval.cli.show import Report, expected_errors


def bench(
    model: Annotated[
        list[str] | None,
        typer.Option(help="A denoiser of random weights; repeat for more. Default: audioldm2, stable-audio."),
    ] = None,
    contestant: Annotated[
        list[str] | None,
        typer.Option(help="A way of watching; repeat for more. Default: words, tokens, all, paper, paper-all."),
    ] = None,
    growth: Annotated[
        bool, typer.Option("--growth", help="Measure how cost grows instead, on one model (stable-audio-small).")
    ] = False,
    axis: Annotated[
        list[str] | None,
        typer.Option(help="growth: words, tokens, steps, length or batch; repeat for more. Default: all."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a forward; half of an even number is unconditional.")] = 2,
    length: Annotated[float | None, typer.Option(min=0.1, help="Seconds of audio. Default: the model's own.")] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Keys of the text. Default: the model's own.")] = None,
    words: Annotated[int, typer.Option(min=1, help="Words asked for.")] = 2,
    steps: Annotated[int, typer.Option(min=2, help="Forwards of a run; the first is timed apart.")] = 4,
    rounds: Annotated[int | None, typer.Option(min=1, help="Timed rounds. Default: 7, with --growth 3.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch. Default: as torch has them.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the denoisers with torch.compile.")] = False,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("aiba-bench"),
    overwrite: Overwrite = False,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
    json: Json = False,
) -> None:
    """Race capture against the bare model and against what people use: time and memory, on random weights."""
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # torch's profiler, which counts memory, says when it starts and stops
    report = Report(json)
    with expected_errors(report):
        from aiba_eval.bench import suite

        where: dict[str, Any] = {
            "threads": threads,
            "device": device,
            "dtype": dtype.value,
            "out": out,
            "overwrite": overwrite,
        }
        with report.progress() as progress:
            if growth:
                if model is not None and len(model) > 1:
                    raise suite.CannotBench(f"--growth measures one model, got {', '.join(model)}: name one")
                name = model[0] if model else "stable-audio-small"
                found = suite.benchmark_growth(name, axes=axis, rounds=rounds or 3, progress=progress, **where)
            else:
                found = suite.benchmark(
                    model or suite.MODELS,
                    contestant or suite.CONTESTANTS,
                    batch=batch,
                    length=length,
                    tokens=tokens,
                    words=words,
                    steps=steps,
                    rounds=rounds or 7,
                    compiled=compiled,
                    progress=progress,
                    **where,
                )
        _show(report, found.document, found.out, found.files)


_RATIOS = ("ratio", "processor_ratio", "whole_ratio")
#: what a terminal has room for: heading → column
_BRIEF = {
    "": "name",
    "forward": "forward",
    "ratio": "ratio",
    "processor": "processor_ratio",
    "with reading": "whole_ratio",
    "peak extra": "peak",
    "retained": "held",
    "maps": "maps",
}


def _show(report: Report, document: Mapping[str, Any], out: Path, files: list[str]) -> None:
    if report.json:
        report.document({"out": out, "files": files, **document})
        return
    from aiba_eval.bench import results

    for race in document.get("races", ()):
        report.say(results.heading(race))
        table = _table("", _BRIEF)
        for row in race["contestants"]:
            cells = dict(zip(results.COLUMNS, results.cells(race, row), strict=True))
            if "not_run" in row:
                report.say(f"{cells['name']} was {cells['forward']}")
                continue
            # medians only; quartiles are in table.md
            table.add_row(
                *(escape(cells[column].partition(" (" if column in _RATIOS else " ±")[0]) for column in _BRIEF.values())
            )
        report.out.print(table)
    if "rows" in document:
        table = _table(
            f"{document['model']}: growth",
            ("axis", "value", "steps", "forward, bare", "extra, processor", "retained", "full maps"),
        )
        for row in document["rows"]:
            steps = "averaged" if row["curve"] == "words-reduced" else "kept"
            times = (f"{1e3 * row[part]['median']:.4g} ms" for part in ("bare", "extra_processor"))
            table.add_row(
                row["axis"], f"{row['value']:g}", steps, *times, *map(results.size, (row["held"], row["full"]))
            )
        report.out.print(table)
    if "startup" in document:
        startup = document["startup"]
        named = {"importing capture, beyond torch": startup["import"]}
        named |= {f"entering a capture of {name}": found for name, found in startup["enter"].items()}
        for name, found in named.items():
            report.say(f"{name}: {1e3 * found['median']:.3g} ms, of processor time {1e3 * found['processor']:.3g} ms")
    report.say(f"\nWritten to {out.resolve()}:")
    for name in files:
        report.say(f"  {name}")


def _table(title: str, headings: Iterable[str]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", padding=(0, 1), pad_edge=False
    )
    for index, name in enumerate(headings):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    return table
