"""What ``aiba report`` writes: the page, the paper's tables and figures, in one folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aiba_eval.evaluation import Run
from aiba_eval.outputs import OutputFolder
from aiba_eval.report.drawing import draw
from aiba_eval.report.entries import Entries
from aiba_eval.report.page import ITEMS, html_table, page
from aiba_eval.report.paper import contrast_table, control_table, tables
from aiba_eval.report.selection import choose
from aiba_eval.report.table import Table
from aiba_eval.run import Progress

PAGE = "report.html"


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes
    ----------
    out : the folder
    files : names below it, the page or main table first
    tables : the tables, as data
    notes : what a reader has to know
    """

    out: Path
    files: list[str]
    tables: list[Table]
    notes: list[str]


def write_report(
    run: Run | str | Path,
    *,
    out: str | Path | None = None,
    items: int = ITEMS,
    figures: bool = True,
    against: Run | str | Path | None = None,
    progress: Progress | None = None,
) -> Written:
    """Make a run's report: one HTML page that needs nothing else, tables as Markdown, LaTeX and HTML, figures.

    Parameters
    ----------
    run : Run or path
        Complete or not: what is not there yet is said on the page.
    out : path, optional
        Default ``report`` in the run's folder. An earlier report's files are replaced, and nothing else.
    items : int
        How many items the page shows, from the best to the worst; at least 1.
    figures : bool
        Draw Figures 2 to 4 of these items too.
    against : Run or path, optional
        Another run over the same items, such as another model's, for Figure 4.
    progress : callable, optional
        Told what is done, how much of it and how much there is.

    Returns
    -------
    Written

    Raises
    ------
    NotARun
        No evaluation has written there.
    FolderInUse
        ``out`` holds something else.
    ValueError
        ``items`` is below 1.
    """
    opened = open_run(run)
    if items < 1:
        raise ValueError(f"a report shows at least one item, got {items}")
    entries = Entries(opened)
    other = None if against is None else Entries(open_run(against))
    folder = OutputFolder(opened.path / "report" if out is None else out, "report", overwrite=True)
    text = page(entries, items=items, progress=progress)
    folder.file(PAGE).write_text(text, encoding="utf-8")
    found = all_tables(entries)
    for table in found:
        folder.file(f"tables/{table.name}.md").write_text(table.markdown(), encoding="utf-8")
        folder.file(f"tables/{table.name}.tex").write_text(table.latex(), encoding="utf-8")
        folder.file(f"tables/{table.name}.html").write_text(html_table(table), encoding="utf-8")
    if figures:
        draw(entries, choose(entries, items), folder, against=other, progress=progress)
    notes = [str(note) for note in opened.record.get("notes") or ()]
    notes += [f"no {part}: {reason}" for part, reason in entries.missing.items()]
    if other is not None and not {one.id for one in other.items} & {item.id for item in choose(entries, items)}:
        notes.append(f"{other.run.path} has none of the items that were drawn: Figure 4 is without it")
    folder.finish({"run": opened.path.name, "items": items, "notes": notes})
    return Written(folder.path, folder.files, found, notes)


def open_run(run: Run | str | Path) -> Run:
    """A run by its folder."""
    return Run.open(run) if isinstance(run, (str, Path)) else run


def all_tables(entries: Entries) -> list[Table]:
    """The paper's tables, contrasts and controls, as far as there are any."""
    further = (contrast_table(entries), control_table(entries))
    return [*tables(entries), *(table for table in further if table is not None)]
