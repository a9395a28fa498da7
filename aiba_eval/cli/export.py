"""``aiba export``."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from aiba_eval.cli.options import Json, RunFolder
from aiba_eval.cli.report import close, document
from aiba_eval.cli.show import Report, expected_errors


class Format(enum.StrEnum):
    """--format"""

    csv = "csv"
    latex = "latex"
    netcdf = "netcdf"


def export(
    run: RunFolder,
    form: Annotated[Format, typer.Option("--format", help="csv, latex (booktabs) or netcdf.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write; an earlier export's is replaced. Default: export-FORMAT, in RUN."),
    ] = None,
    maps: Annotated[bool, typer.Option("--maps", help="With netcdf: every item's maps on the grid too.")] = False,
    json: Json = False,
) -> None:
    """Write an evaluation's scores and means in another format."""
    shown = Report(json)
    with expected_errors(shown):
        from aiba_eval.report import write_export

        with shown.progress() as progress:
            written = write_export(run, form.value, out=out, maps=maps, progress=progress)
        if json:
            shown.document({**document(written), "format": form.value})
            return
        close(shown, written)
