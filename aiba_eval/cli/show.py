"""Reports for people and for programs, progress, and errors that have a remedy."""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from aiba_eval.comparing import Comparison
    from aiba_eval.demo import DemoResult
    from aiba_eval.diagnostics import Diagnosis
    from aiba_eval.evaluation import Run
    from aiba_eval.run import RunResult

Progress = Callable[[str, int, int | None], None]
Row = Mapping[str, Any]

#: what a score table shows of each metric's references, with its heading
BESIDE = {
    "chance": "chance",
    "mix_energy": "mix energy",
    "class_prior": "class prior",
    "oracle_projection": "oracle",
}


class Report:
    """Where a command's output goes: tables on stdout, or one JSON document; progress and errors on stderr."""

    def __init__(self, json: bool) -> None:
        self.json = json
        self.out = Console(highlight=False)
        self.err = Console(stderr=True, highlight=False)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A bar with the time left, on a terminal; otherwise one line when something new begins."""
        with _quiet_libraries():
            if not self.err.is_terminal:
                yield _Lines(self.err)
                return
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                SpinnerColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as Bars

            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            with Bars(*columns, console=self.err, transient=True) as bars:
                yield _Bar(bars)

    def document(self, value: Any) -> None:
        """Print the JSON document."""
        from aiba_eval.outputs import dump_json

        print(dump_json(value))

    def error(self, message: str) -> None:
        """Say what went wrong, on stderr; with --json on stdout too, so that there is always one document."""
        print(f"aiba: {message}", file=sys.stderr)
        if self.json:
            self.document({"error": message})

    def say(self, text: str) -> None:
        """A paragraph of the report."""
        self.out.print(escape(text), soft_wrap=True)

    def plugins(self, listing: Mapping[str, Any]) -> None:
        """`aiba plugins`."""
        if self.json:
            self.document(listing)
            return
        table = _table()
        for heading in ("", "name", "from"):
            table.add_column(heading, overflow="fold", no_wrap=heading == "name")
        kinds = ("backbones", "kernels", "models", "datasets")
        described = []
        for kind in kinds:
            heading = kind
            for plugin in listing["plugins"]:
                for offer in plugin[kind]:
                    name = offer["name"] if isinstance(offer, Mapping) else offer
                    table.add_row(heading, *map(escape, (name, plugin["distribution"] or plugin["module"])))
                    heading = ""
                    if isinstance(offer, Mapping):
                        described.append(f"{name}: {offer['summary']}")
            table.add_section()
        self.out.print(table)
        for line in described:
            self.say(line)
        for plugin in listing["plugins"]:
            if not any(plugin[kind] for kind in kinds):
                self.say(f"offers nothing: {plugin['name']}")
        for failure in listing["failures"]:
            self.say(f"failed to load: {failure['name']}: {failure['error']}")

    def run(self, result: RunResult) -> None:
        """`aiba run`."""
        if self.json:
            self.document({"out": result.out, "files": result.files, **result.record, "scores": result.scores})
            return
        if result.scores:
            self.out.print(_run_table(result.scores))
        self._close(result)

    def diagnosis(self, result: Diagnosis) -> None:
        """`aiba diagnose`."""
        if self.json:
            self.document(result.as_dict())
            return
        if result.sites:
            self.out.print(_sites_table(result))
        for finding in result.findings:
            self.say(f"{finding.severity}: {finding.name}")
            self.say(f"  {finding.sentence}")
        for name, reason in result.not_checked.items():
            self.say(f"not checked: {name}\n  {reason}")

    def comparison(self, result: Comparison) -> None:
        """`aiba compare`."""
        if self.json:
            self.document({"out": result.out, "files": result.files, **result.as_dict()})
            return
        rows = result.table()
        title = "Average precision against what each stem dominates, 95 % intervals over pieces"
        self.out.print(_comparison_table(rows, _CONTRASTS, title))
        effects = [row for row in rows if "present_mass" in row]
        if effects:
            self.out.print(
                _comparison_table(
                    effects,
                    _MASSES,
                    "Present beside absent words (AUROC of effect mass, of gain in fit), and neutral edits",
                )
            )
        if result.tests:
            self.out.print(_tests_table(result))
        if result.fresh:
            self.out.print(_fresh_table(result))
        self._close(result)

    def demo(self, result: DemoResult) -> None:
        """`aiba demo`."""
        if self.json:
            self.document({"out": result.out, "files": result.files, **result.record})
            return
        for model in dict.fromkeys(row["model"] for row in result.summary):
            self.out.print(_demo_table(model, [row for row in result.summary if row["model"] == model]))
        self._close(result)

    def evaluations(self, runs: Mapping[str, Run]) -> None:
        """`aiba evaluate` and `aiba reproduce`: a run for each part."""
        if self.json:
            documents = {part: _evaluation_document(run) for part, run in runs.items()}
            self.document(documents.get("", documents))
            return
        for part, run in runs.items():
            for table in evaluation_tables(run, part):
                self.out.print(table)
            for note in run.record["notes"]:
                self.say(f"• {note}")
            self.say(f"Written to {run.path.resolve()}; `aiba report {run.path}` makes a page of it")

    def stems(self, summary: Any) -> None:
        """`aiba stems render`."""
        if self.json:
            self.document(dataclasses.asdict(summary))
            return
        splits = ", ".join(f"{count} {name}" for name, count in summary.splits.items())
        self.say(
            f"{summary.rendered} pieces rendered, {summary.kept} kept from before, {len(summary.skipped)} skipped: "
            f"{summary.seconds / 60:.1f} min of {summary.tunes} tunes ({splits})"
        )
        self.say(f"in {summary.root}")

    def _close(self, result: RunResult | DemoResult | Comparison) -> None:
        for note in result.notes:
            self.say(f"• {note}")
        if result.out is None:
            return
        self.say(f"\nWritten to {result.out.resolve()}:")
        for line in _folded(result.files):
            self.say(f"  {line}")


class _Bar:
    """Progress on a terminal: one bar, which starts again when something else begins."""

    def __init__(self, bars: Any) -> None:
        self.bars = bars
        self.what = ""
        self.task: Any = None

    def __call__(self, what: str, done: int, total: int | None) -> None:
        if what != self.what:
            if self.task is not None:
                self.bars.remove_task(self.task)
            self.task = self.bars.add_task(escape(what), total=total)
            self.what = what
        self.bars.update(self.task, completed=done, total=total)


class _Lines:
    """Progress into a file or pipe: a line for each thing that begins."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.what = ""

    def __call__(self, what: str, done: int, total: int | None) -> None:
        if what != self.what:
            self.console.print(escape(f"{what} …"), soft_wrap=True)
            self.what = what


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep other libraries' own remarks out of the report: they are about their own development."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


@contextmanager
def expected_errors(report: Report) -> Iterator[None]:
    """End with a message and exit code 2 on errors that say what to do; any other keeps its traceback."""
    try:
        yield
    except Exception as error:
        message = _remedy(error)
        if message is None:
            raise
        report.error(message)
        raise typer.Exit(2) from None


def _remedy(error: Exception) -> str | None:
    """The message of an error that a user can act upon."""
    if isinstance(error, ModuleNotFoundError):
        if "pip install" in str(error):
            return str(error)
        if error.name is None or error.name.split(".")[0] not in _EXTRAS:
            return None
        extra = _EXTRAS[error.name.split(".")[0]]
        return f'this command needs {error.name}, which is not installed: pip install "aiba[{extra}]"'
    names = {cls.__name__ for cls in type(error).__mro__}
    return str(error) if names & _EXPECTED else None


# by name: comparing classes would import what raises them
_EXPECTED = {
    "AibaError",
    "CannotBench",
    "CannotCompare",
    "CannotEvaluate",
    "CannotExport",
    "CannotGenerate",
    "CannotLoad",
    "CannotProbe",
    "CannotReinitialise",
    "DamagedAudio",
    "DiskFull",
    "FolderInUse",
    "NotARun",
    "StemsError",
}
_EXTRAS = {
    "diffusers": "diffusers",
    "transformers": "diffusers",
    "accelerate": "diffusers",
    "jinja2": "eval",
    "librosa": "eval",
    "matplotlib": "eval",
    "pandas": "eval",
    "pyarrow": "eval",
    "sklearn": "eval",
    "scipy": "eval",
    "soundfile": "eval",
    "soxr": "eval",
    "yaml": "eval",
    "zarr": "eval",
}


def _table(title: str | None = None) -> Table:
    return Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", padding=(0, 1), pad_edge=False
    )


def _run_table(rows: Sequence[Row]) -> Table:
    shown = [row for row in rows if row["metric"] == "average_precision"]
    correlation = {(r["word"], r["mask"]): r for r in rows if r["metric"] == "profile_pearson"}
    beside = [name for name in BESIDE if any(name in row for row in shown)]
    table = _table("Average precision of word maps against knowledge bands")
    for heading in ("word", "band"):
        table.add_column(heading, no_wrap=True)
    for heading in ("area", "AP", *(BESIDE[name] for name in beside), "profile r"):
        table.add_column(heading, justify="right", min_width=max(map(len, heading.split())))
    for row in shown:
        profile = correlation[row["word"], row["mask"]]["value"]
        mask = f"{row['mask'].removeprefix('band:')} {row['low_hz']:g}–{row['high_hz']:g} Hz"
        numbers = [row["mask_area"], row["value"], *(row[name] for name in beside), profile]
        table.add_row(escape(row["word"]), mask, *map(_number, numbers))
    return table


def _sites_table(result: Diagnosis) -> Table:
    """The conditional maps, one site per row; what all names end in is said once, in the title."""
    shown = [site for site in result.sites if site.branch != "unconditional"] or list(result.sites)
    ending = _common_ending([site.name for site in shown])
    table = _table(f"Sites with maps (… stands for {ending})" if ending else "Sites with maps")
    table.add_column("site", overflow="fold")
    table.add_column("lattice", no_wrap=True)
    for heading in ("entropy", "padding", "special", "over time", "over frequency", "between words"):
        table.add_column(heading, justify="right", min_width=max(map(len, heading.split())))
    for site in shown:
        name = f"{site.name.removesuffix(ending)}…" if ending else site.name or "(the module itself)"
        numbers = (
            site.padding_mass,
            site.special_mass,
            site.time_variation,
            site.frequency_variation,
            site.word_difference,
        )
        lattice = " × ".join(map(str, site.lattice)) or "–"
        entropy = f"{site.entropy:.3f}" if math.isfinite(site.entropy) else "–"
        table.add_row(escape(name), lattice, entropy, *map(_number, numbers))
    return table


def _common_ending(names: Sequence[str]) -> str:
    """The longest run of dotted parts, with its dot, that several names end in."""
    if len(names) < 2:
        return ""
    shared: list[str] = []
    for parts in zip(*(reversed(name.split(".")[1:]) for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.insert(0, parts[0])
    return "".join(f".{part}" for part in shared)


def _demo_table(model: str, summary: Sequence[Row]) -> Table:
    shown = [row for row in summary if row["metric"] == "average_precision"]
    levels = sorted({row["timestep"] for row in shown})
    table = _table(f"{escape(model)}: average precision on real mixes at noise levels t, mean over n pieces")
    table.add_column("mask, word", no_wrap=True)
    for heading in ("n", *(f"t={level}" for level in levels), "swap", *BESIDE.values()):
        table.add_column(heading, justify="right", min_width=max(map(len, heading.split())))
    groups: dict[str, dict[str, dict[tuple[int, str], Row]]] = {}
    for row in shown:
        of_mask = groups.setdefault(row["mask"], {})
        of_mask.setdefault(row["word"], {})[row["timestep"], row["reference"]] = row
    for mask, words in groups.items():
        table.add_row(f"[bold]{mask}[/bold]")
        # the mean over words first, then the most frequent
        for word in sorted(words, key=lambda word: (word != "all", -_any(words[word])["n"], word)):
            rows = words[word]
            numbers = [rows[level, "chance"]["value"] if (level, "chance") in rows else math.nan for level in levels]
            swap = rows.get((levels[-1], "other_word"), {}).get("difference", math.nan)
            beside = [next((r["reference_value"] for (_, of), r in rows.items() if of == n), math.nan) for n in BESIDE]
            cells = (*map(_number, numbers), _signed(swap), *map(_number, beside))
            table.add_row(f" {escape(word)}", str(_any(rows)["n"]), *cells)
        table.add_section()
    return table


#: measures of `aiba compare` and their headings: of maps against masks, and of the sizes of effects
_CONTRASTS = {"score": "AP", "ratio": "÷ chance", "word_swap": "word swap", "piece_swap": "piece swap"}
_MASSES = {
    "presence": "presence",
    "fit_presence": "by fit",
    "neutral_share": "neutral ÷ present",
}


def _comparison_table(rows: Sequence[Row], measures: Mapping[str, str], title: str) -> Table:
    """Maps down, measures across; the interval under each value."""
    table = _table(title)
    table.add_column("map", no_wrap=True)
    for heading in measures.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        kind = row["map"] if row["level"] is None else f"{row['map']} t={row['level']}"
        values = {m: row[m] if m != "ratio" else (row[m][0], math.nan, math.nan) for m in measures if m in row}
        cells = [_with_ends(*values[m]) if m in values else "–" for m in measures]
        table.add_row(escape("\n".join(filter(None, (row["model"], kind)))), *cells)
    return table


def _tests_table(result: Comparison) -> Table:
    first, second = map(escape, result.models)
    table = _table(f"{first} less {second}: paired permutation tests over pieces, corrected by Holm's method")
    for heading in ("map", "t", "measure", "difference", "p", "p (Holm)"):
        table.add_column(heading, justify="left" if heading in ("map", "measure") else "right")
    for test in result.tests:
        numbers = (
            _with_ends(test["difference"], test["low"], test["high"]),
            f"{test['p']:.4f}",
            f"{test['p_holm']:.4f}",
        )
        table.add_row(test["map"], str(test["level"]), test["measure"].replace("_", " "), *numbers)
    return table


def _fresh_table(result: Comparison) -> Table:
    table = _table("Beside fresh initialisations of the same model")
    for heading in ("map", "t", "measure", "value", "fresh", "p"):
        table.add_column(heading, justify="left" if heading in ("map", "measure") else "right", overflow="fold")
    for row in result.fresh:
        if row["measure"] not in (*_CONTRASTS, *_MASSES):
            continue  # in results.json
        ends = f"{_number(min(row['fresh']))} to {_number(max(row['fresh']))}"
        value = f"{_number(row['value'])}{'' if row['outside'] else ' (within)'}"
        name = escape(f"{row['model']}\n{row['map']}")
        table.add_row(name, str(row["level"]), row["measure"].replace("_", " "), value, ends, f"{row['p']:.3f}")
    return table


def _evaluation_document(run: Run) -> dict[str, Any]:
    return {
        "out": run.path,
        **run.record,
        "summary": run.summary(),
        "contrasts": run.contrasts(),
        "controls": run.controls(),
    }


def evaluation_tables(run: Run, part: str = "") -> Iterator[Table]:
    """Scores beside references, contrasts and controls of an evaluation."""
    units = "seeds" if run.configuration["protocol"] == "generate" else "pieces"
    summary = [row for row in run.summary() if row["word"] == "all" and row["metric"] == "average_precision"]
    counts = sorted({row["n"] for row in summary})
    over = f"{counts[0]}–{counts[-1]}" if len(counts) > 1 else str(counts[0] if counts else 0)
    table = _table(f"{part}: average precision, means over {over} {units}".removeprefix(": "))
    beside = {**BESIDE, "other_word": "other word", "other_piece": "other piece"}
    several = len({row["variant"] for row in summary}) > 1
    table.add_column("variant: target" if several else "target", overflow="fold", no_wrap=not several)
    for heading in ("t", "AP", *beside.values()):
        table.add_column(heading, justify="right", no_wrap=heading in ("t", "AP"))
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in summary:
        groups.setdefault((row["variant"], row["target"], row["level"]), {})[row["reference"]] = row
    for (variant, target, level), rows in groups.items():
        own = _any(rows)
        references = [_number(rows[name]["reference_value"]) if name in rows else "" for name in beside]
        value = _with_ends(own["value"], own["low"], own["high"])
        table.add_row(f"{escape(variant)}: {target}" if several else target, str(level), value, *references)
    yield table
    contrasts = [row for row in run.contrasts() if row["target"] == run.contrasts()[0]["target"]]
    if contrasts:
        table = _table(f"Contrasts against {contrasts[0]['target']}")
        kinds = {row["contrast"]: row["contrast"].replace("_", " ") for row in contrasts}
        for heading in ("map", "level", *(column for name in kinds.values() for column in (name, "p"))):
            table.add_column(heading, justify="left" if heading == "map" else "right")
        by_map: dict[tuple[str, str], dict[str, Row]] = {}
        for row in contrasts:
            level = "" if math.isnan(row["level"]) else str(row["level"])
            by_map.setdefault((row["map"].replace("_", " "), level), {})[row["contrast"]] = row
        for (name, level), found in by_map.items():
            cells = []
            for kind in kinds:
                one = found.get(kind)
                cells += [_with_ends(one["value"], one["low"], one["high"]), _number(one["p"])] if one else ["", ""]
            table.add_row(name, level, *cells)
        yield table
    if run.controls():
        table = _table("Controls")
        for heading in ("control", "measure", "level", "own", "under control", "p", "n"):
            table.add_column(heading, justify="left" if heading in ("control", "measure") else "right")
        for row in run.controls():
            shown = map(_number, (row["observed"], row["control"], row["p"]))
            table.add_row(row["name"].replace("_", " "), row["measure"], str(row["level"]), *shown, str(row["count"]))
        yield table


def _with_ends(value: float, low: float, high: float) -> str:
    """A value with its interval in the line below."""
    if not math.isfinite(low):
        return _number(value)
    return f"{_number(value)}\n\\[{_number(low)}, {_number(high)}]"


def _any(rows: Mapping[Any, Row]) -> Row:
    return next(iter(rows.values()))


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−") if math.isfinite(value) else "–"


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "−") if math.isfinite(value) else "–"


def _folded(files: Sequence[str]) -> list[str]:
    """File names by folder, one line each."""
    folders: dict[str, list[str]] = {}
    for name in files:
        parent, _, leaf = name.rpartition("/")
        folders.setdefault(parent, []).append(leaf)
    return [
        f"{parent + '/' if parent else ''}{{{', '.join(names)}}}"
        if len(names) > 1
        else f"{parent + '/' if parent else ''}{names[0]}"
        for parent, names in folders.items()
    ]
