"""Reports of evaluation runs: a page to listen and look, the paper's tables and figures, and exports.

* :func:`write_report`: what ``aiba report`` does.
* :func:`write_export`: what ``aiba export`` does.
* :func:`table1`, :func:`table3`, :func:`tables`: the paper's tables of :class:`Entries`, a run's figures by what they are of.

Names are imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiba_eval.report.entries import Entries
    from aiba_eval.report.export import write_export
    from aiba_eval.report.paper import table1, table3, tables
    from aiba_eval.report.table import Table
    from aiba_eval.report.writing import Written, write_report

__all__ = ["Entries", "Table", "Written", "table1", "table3", "tables", "write_export", "write_report"]

_EXPORTS = {
    "Entries": "entries",
    "Table": "table",
    "Written": "writing",
    "table1": "paper",
    "table3": "paper",
    "tables": "paper",
    "write_export": "export",
    "write_report": "writing",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
