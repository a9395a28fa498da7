"""The report as one HTML file: no network, nothing beside it, and nothing in it that a prompt could turn into code.

Every text is escaped by Jinja's autoescape; data for the script lie in JSON blocks with ``<``, ``>`` and ``&`` written as escapes; the
page's own policy (Content-Security-Policy) allows one script and one style sheet, by their digests, and images and audio only
from the page itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from aiba_eval.outputs import jsonable
from aiba_eval.report.entries import REFERENCES, TARGETS, Entries
from aiba_eval.report.paper import contrast_table, control_table, part_of_name, tables
from aiba_eval.report.selection import choose
from aiba_eval.report.strips import headline, item_group, summary_groups
from aiba_eval.report.table import Number, Table, fixed
from aiba_eval.report.views import item_facts, view_of
from aiba_eval.run import Progress

if TYPE_CHECKING:
    from aiba_eval.evaluation import Item

#: items of a page
ITEMS = 8
_SEVERITIES = ("problem", "warning", "info")


def page(entries: Entries, *, items: int = ITEMS, progress: Progress | None = None) -> str:
    """The whole page. The same run gives the same text.

    Parameters
    ----------
    entries : of the run
    items : how many items to show, chosen by :func:`aiba_eval.report.selection.choose`
    progress : told of every item
    """
    shown = choose(entries, items)
    views = []
    for done, item in enumerate(shown):
        if progress is not None:
            progress("putting items on the page", done, len(shown))
        views.append(_view(entries, item))
    paper = tables(entries)
    primary = {table.name for table in paper if f"-{part_of_name(str(entries.primary))}-" in table.name}
    style, script = _asset("report.css"), _asset("report.js")
    return (
        _environment()
        .get_template("report.html")
        .render(
            model=entries.model,
            configuration=_settings(entries),
            about=_about(entries),
            versions=entries.versions,
            notes=[str(note) for note in entries.run.record.get("notes") or ()],
            complete=bool(entries.run.record.get("complete")),
            missing=entries.missing,
            headline=headline(entries),
            primary=TARGETS.get(str(entries.primary), entries.primary),
            groups=summary_groups(entries),
            paper=[table for table in paper if table.name in primary],
            further=[table for table in paper if table.name not in primary],
            contrasts=contrast_table(entries),
            controls=control_table(entries),
            views=views,
            count=len(entries.items),
            failed=entries.failed,
            skipped=entries.skipped,
            excluded=entries.excluded,
            references=REFERENCES,
            targets=TARGETS,
            style=Markup(style),
            script=Markup(script),
            policy=policy(style, script),
            fixed=fixed,
            is_number=lambda cell: isinstance(cell, Number),
        )
    )


def policy(style: str, script: str) -> str:
    """The page's Content-Security-Policy."""
    return (
        f"default-src 'none'; script-src 'sha256-{_digest(script)}'; style-src 'sha256-{_digest(style)}'; "
        "img-src data:; media-src data:; base-uri 'none'; form-action 'none'"
    )


def json_block(value: Any) -> Markup:
    """JSON that may stand inside a script element: nothing in it can end that element or begin a comment."""
    text = json.dumps(jsonable(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def html_table(table: Table) -> str:
    """A table of the paper as HTML, escaped, without style."""
    template = (
        _environment().get_template("table.html").make_module({"is_number": lambda cell: isinstance(cell, Number)})
    )
    return str(template.table(table))  # type: ignore[attr-defined]


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("aiba_eval.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["json_block"] = json_block
    return environment


def _asset(name: str) -> str:
    text = (resources.files("aiba_eval.report") / "templates" / name).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")  # what a browser hashes


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _view(entries: Entries, item: Item) -> dict[str, Any]:
    """An item as the template needs it, with the data for the script."""
    diagnosis = item.diagnosis or {}
    findings = sorted(
        diagnosis.get("findings") or (),
        key=lambda finding: _SEVERITIES.index(finding["severity"]) if finding["severity"] in _SEVERITIES else 9,
    )
    return {
        "id": item.id,
        "title": ", ".join(item.words) if entries.generates else item.piece,
        "detail": item.piece.replace("-", " ") if entries.generates else f"{item.start:.1f} s",
        "names": "" if entries.generates else ", ".join(item.words),
        "start": item.start,
        "seconds": item.seconds,
        "prompt": item.prompt,
        "words": list(item.words),
        "facts": item_facts(entries, item),
        "findings": findings,
        "not_checked": diagnosis.get("not_checked") or {},
        "diagnosed": bool(diagnosis),
        "group": item_group(entries, item.id),
        "data": view_of(entries, item),
    }


def _about(entries: Entries) -> dict[str, Any]:
    configuration = entries.run.configuration
    pieces = {item.piece for item in entries.items}
    dataset = configuration.get("dataset") or entries.run.record.get("dataset")
    return {
        "generates": entries.generates,
        "dataset": str(dataset) if dataset else "",
        "pieces": len(pieces),
        "items": len(entries.items),
        "path": entries.run.path.name,
    }


def _settings(entries: Entries) -> list[tuple[str, str]]:
    """The configuration as (name, text), long lists shortened; versions and the model stand elsewhere."""
    found = []
    for name, value in entries.run.configuration.items():
        if name in ("versions", "model"):
            continue
        found.append((str(name).replace("_", " "), _brief(value)))
    return found


def _brief(value: Any, most: int = 12) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_brief(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        shown = ", ".join(_brief(each) for each in value[:most])
        return f"{shown} … ({len(value)} in all)" if len(value) > most else shown
    return "none" if value is None else str(value)


__all__ = ["ITEMS", "html_table", "json_block", "page", "policy"]
