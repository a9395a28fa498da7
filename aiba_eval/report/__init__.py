"""Reports of evaluation runs: a page to listen and look, the paper's tables and figures, and exports.

* :func:`write_report`: what ``aiba report`` does.
* :func:`write_export`: what ``aiba export`` does.
* :func:`table1`, :func:`table3`, :func:`tables`: the paper's tables of :class:`Entries`, a run's figures by what they are of.
"""

from aiba_eval.report.entries import Entries
from aiba_eval.report.export import write_export
from aiba_eval.report.paper import table1, table3, tables
from aiba_eval.report.table import Table
from aiba_eval.report.writing import Written, write_report

__all__ = ["Entries", "Table", "Written", "table1", "table3", "tables", "write_export", "write_report"]
