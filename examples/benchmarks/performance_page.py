"""Write what `aiba bench` measured into docs/performance.md: the documents below docs/measurements, the tables between the
page's markers, and the figure. The page then shows what a file beside it holds, and a test says so.

    aiba bench --model audioldm2 --out unet
    aiba bench --growth --out grown
    python examples/benchmarks/performance_page.py cpu-audioldm2=unet growth=grown
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aiba_eval.bench import growth, results
from aiba_eval.outputs import write_json

DOCS = Path(__file__).resolve().parents[2] / "docs"


def rendered(document: dict[str, Any], name: str) -> str:
    """What the page shows of a document: tables of races, or the figure of growth."""
    if "races" in document:
        return results.markdown(document)
    base = ", ".join(f"{growth.LABELS[axis]} {value:g}" for axis, value in document["base"].items())
    return (
        f"![Retained memory and extra processor time along five axes](images/{name}.png)\n\n"
        f"{document['model']} ({document['summary']}), {document['device']}, {document['dtype']}; where an axis is not moved: {base}. "
        f"Measured on {results.on_what(document)}.{results.shared(document)}\n"
    )


def marked(page: str, name: str) -> re.Match[str]:
    """The part of the page that is a document's.

    Raises
    ------
    ValueError
        The page has no place for it.
    """
    found = re.search(rf"(?<=<!-- measured: {re.escape(name)} -->\n)(.*?)(?=<!-- end -->)", page, re.S)
    if found is None:
        raise ValueError(f"the page has no marker '<!-- measured: {name} -->' with '<!-- end -->' below it: add one")
    return found


def main(arguments: Sequence[str] | None = None, docs: Path = DOCS) -> Path:
    """Copy results into the documentation; the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results", nargs="+", metavar="NAME=FOLDER", help="a marker of the page, a folder of `aiba bench`"
    )
    page = docs / "performance.md"
    text = page.read_text(encoding="utf-8")
    for argument in parser.parse_args(arguments).results:
        name, _, folder = argument.partition("=")
        source = Path(folder)
        grown = source / "growth.json"
        file = grown if grown.exists() else source / "results.json"
        document = json.loads(file.read_text(encoding="utf-8"))
        place = marked(text, name)
        text = text[: place.start()] + rendered(document, name) + text[place.end() :]
        (docs / "measurements").mkdir(exist_ok=True)
        write_json(docs / "measurements" / f"{name}.json", document)
        if grown.exists():
            shutil.copyfile(source / "growth.png", docs / "images" / f"{name}.png")
    page.write_text(text, encoding="utf-8")
    return page


if __name__ == "__main__":
    print(main())
