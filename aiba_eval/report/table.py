"""Tables as data, written as Markdown, LaTeX (booktabs) and plain rows; the page renders them itself."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

MINUS, DASH = "−", "–"


@dataclass(frozen=True)
class Number:
    """A figure with its interval, if it has one; NaN where it is undefined.

    Attributes
    ----------
    value, low, high : the figure and the ends of its interval
    digits : after the point
    signed : write a plus too
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    digits: int = 3
    signed: bool = False

    def __str__(self) -> str:
        return f"{self.centre} [{self.ends}]" if self.ends else self.centre

    @property
    def centre(self) -> str:
        """The figure alone."""
        return fixed(self.value, self.digits, signed=self.signed)

    @property
    def ends(self) -> str:
        """The interval, or nothing where there is none."""
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return ""
        return (
            f"{fixed(self.low, self.digits, signed=self.signed)}, {fixed(self.high, self.digits, signed=self.signed)}"
        )


Cell = str | Number
Kind = Literal["group", "main", "reference"]


@dataclass(frozen=True)
class Line:
    """A row: a heading over those below it (one cell), a figure of the model, or one of a reference."""

    kind: Kind
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes
    ----------
    name : part of file names and of its address on the page
    title : what it shows
    columns : headings; the first column holds text, the others figures
    lines : rows, top to bottom
    notes : what to know before reading it
    """

    name: str
    title: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = field(default=())

    def markdown(self) -> str:
        """With every text escaped: what is in a name is not markup."""
        rows = [[_markdown_cell(cell) for cell in line.cells] for line in self.lines]
        out = [f"**{_markdown(self.title)}**", "", _pipes([_markdown(c) for c in self.columns])]
        out.append("|" + "|".join(["---", *["---:"] * (len(self.columns) - 1)]) + "|")
        for line, cells in zip(self.lines, rows, strict=True):
            if line.kind == "group":
                cells = [f"**{cells[0]}**", *[""] * (len(self.columns) - 1)]
            elif line.kind == "reference":
                cells = [f"&emsp;{cells[0]}", *cells[1:]]
            out.append(_pipes(cells))
        return "\n".join([*out, *(["", *(f"- {_markdown(note)}" for note in self.notes)] if self.notes else []), ""])

    def latex(self) -> str:
        """A ``table`` environment that needs the package booktabs."""
        width = len(self.columns)
        out = [r"\begin{table}[t]", r"\centering", rf"\caption{{{latex_text(self.title)}}}"]
        out += [rf"\label{{tab:{re.sub('[^a-z0-9-]', '-', self.name.lower())}}}", r"\small"]
        out += [rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}", r"\toprule"]
        out += [" & ".join(latex_text(c) for c in self.columns) + r" \\", r"\midrule"]
        for number, line in enumerate(self.lines):
            if line.kind == "group":
                space = [r"\addlinespace"] if number else []
                out += [*space, rf"\multicolumn{{{width}}}{{l}}{{\textbf{{{latex_text(str(line.cells[0]))}}}}} \\"]
                continue
            first = ("" if line.kind == "main" else r"\quad ") + latex_text(str(line.cells[0]))
            out.append(" & ".join([first, *map(_latex_cell, line.cells[1:])]) + r" \\")
        out += [r"\bottomrule", r"\end{tabular}"]
        out += (
            [rf"\par\smallskip\raggedright\footnotesize {' '.join(map(latex_text, self.notes))}"] if self.notes else []
        )
        return "\n".join([*out, r"\end{table}", ""])

    def rows(self) -> list[dict[str, Any]]:
        """One dict per row with the keys ``group``, ``kind``, the columns, and ``COLUMN low`` and ``COLUMN high`` where
        there are intervals."""
        found, group = [], ""
        for line in self.lines:
            if line.kind == "group":
                group = str(line.cells[0])
                continue
            row: dict[str, Any] = {"group": group, "kind": line.kind}
            for column, cell in zip(self.columns, line.cells, strict=True):
                if isinstance(cell, Number):
                    row[column] = cell.value
                    if cell.ends:
                        row |= {f"{column} low": cell.low, f"{column} high": cell.high}
                else:
                    row[column] = cell
            found.append(row)
        return found


def number(value: Any) -> float:
    """A figure from JSON, where null stands for NaN."""
    return math.nan if value is None else float(value)


def fixed(value: float, digits: int = 2, *, signed: bool = False) -> str:
    """``value`` with so many digits after the point, a dash if it is not finite, and a true minus sign."""
    if not math.isfinite(value):
        return DASH
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "×": r"$\times$",
    "σ": r"$\sigma$",
    "ρ": r"$\rho$",
    MINUS: "$-$",
    DASH: "--",
    "…": r"\ldots{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def latex_text(text: str) -> str:
    """``text`` as LaTeX shows it, on one line: every special character is escaped."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def _latex_cell(cell: Cell) -> str:
    if isinstance(cell, Number) and cell.ends:
        return rf"{latex_text(cell.centre)} {{\scriptsize [{latex_text(cell.ends)}]}}"
    return latex_text(str(cell))


def _markdown_cell(cell: Cell) -> str:
    return str(cell) if isinstance(cell, Number) else _markdown(cell)


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", " ".join(text.split()))


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
