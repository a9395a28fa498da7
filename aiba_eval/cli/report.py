"""``aiba report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aiba_eval.cli.options import Json, RunFolder
from aiba_eval.cli.show import Report, expected_errors

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from aiba_eval.report import Table, Written


def report(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; an earlier report's is replaced. Default: report, in RUN.")
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="So many items on the page, from the best to the worst.")] = 8,
    figures: Annotated[bool, typer.Option(help="Draw the paper's Figures 2 to 4 of these items too.")] = True,
    against: Annotated[
        Path | None, typer.Option(help="Another run over the same items, such as another model's, for Figure 4.")
    ] = None,
    json: Json = False,
) -> None:
    """Make an evaluation's report: one HTML page to listen and look, the paper's tables and figures."""
    shown = Report(json)
    with expected_errors(shown):
        from aiba_eval.report import write_report

        with shown.progress() as progress:
            written = write_report(run, out=out, items=items, figures=figures, against=against, progress=progress)
        if json:
            shown.document(document(written))
            return
        first = written.tables[0].name.rpartition("-")[0] if written.tables else ""
        for table in written.tables:
            if first and table.name.startswith(f"{first}-"):
                shown.out.print(rich_table(table))
        close(shown, written)
        shown.say(f"Open {(written.out / written.files[0]).resolve()}")


def document(written: Written) -> dict[str, object]:
    """What --json prints."""
    return {
        "out": written.out,
        "files": written.files,
        "notes": written.notes,
        "tables": {table.name: {"title": table.title, "rows": table.rows()} for table in written.tables},
    }


def rich_table(table: Table) -> RichTable:
    """A table of the report on a terminal."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table as RichTable

    made = RichTable(
        box=box.SIMPLE_HEAD, title=escape(table.title), title_justify="left", title_style="bold", pad_edge=False
    )
    for number, column in enumerate(table.columns):
        made.add_column(escape(column), justify="right" if number else "left", no_wrap=True)
    for line in table.lines:
        cells = [escape(cell if isinstance(cell, str) else cell.centre) for cell in line.cells]
        if line.kind == "group":
            made.add_row(f"[bold]{cells[0]}[/bold]")
        else:
            made.add_row(f"{'' if line.kind == 'main' else '  '}{cells[0]}", *cells[1:])
    return made


def close(shown: Report, written: Written) -> None:
    """Notes, and what was written where."""
    for note in written.notes:
        shown.say(f"• {note}")
    shown.say(f"Written to {written.out.resolve()}: {len(written.files)} files")
