"""Model: a pipeline that can be named on the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Model:
    """A named pipeline.

    Attributes
    ----------
    name : what ``aiba run NAME`` calls it (``"demo:random"``)
    summary : one line for ``aiba plugins``
    load : builds or loads the pipeline; called without arguments, only when it is wanted
    trained : False for random weights, whose maps mean nothing; whoever shows them has to say so
    """

    name: str
    summary: str
    load: Callable[[], Any]
    trained: bool = True
