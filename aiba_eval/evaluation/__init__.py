"""Evaluations: many items, every score beside its references, in a folder that can be left and come back to.

>>> from aiba_eval.evaluation import Configuration, evaluate_on
>>> run = evaluate_on("demo:unet", Configuration(seconds=2.56, draws=1), max_pieces=2, out="my-run")  # doctest: +SKIP
>>> run.scores().groupby("metric").value.mean()  # doctest: +SKIP
"""

from __future__ import annotations

from .configuration import ABLATIONS, CannotEvaluate, Configuration, Variant
from .executing import DiskFull
from .running import evaluate, evaluate_on
from .runs import Item, NotARun, Run

__all__ = [
    "ABLATIONS",
    "CannotEvaluate",
    "Configuration",
    "DiskFull",
    "Item",
    "NotARun",
    "Run",
    "Variant",
    "evaluate",
    "evaluate_on",
]
