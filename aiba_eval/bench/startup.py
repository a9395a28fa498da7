"""Start-up: what importing the library and entering a capture take."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from aiba_eval.bench.subjects import BenchBackbone, Setting, Subject
from aiba_hooks import capture

_IMPORT = (
    "import torch, time; start = time.perf_counter(), time.process_time(); {statement}; "
    "print(time.perf_counter() - start[0], time.process_time() - start[1])"
)
#: seconds that passed, and seconds of processor time
Seconds = tuple[float, float]


def import_seconds(statement: str = "from aiba_hooks import capture", *, repeats: int = 5) -> list[Seconds]:
    """What an import takes beyond ``import torch``, each in a fresh process: seconds, and those of processor time.

    Parameters
    ----------
    statement : ``import aiba_hooks`` alone loads next to nothing: its names are loaded when they are asked for
    repeats : processes; the first may find nothing in the file cache

    Raises
    ------
    subprocess.CalledProcessError
        The import failed.
    """
    command = [sys.executable, "-c", _IMPORT.format(statement=statement)]
    found = []
    for _ in range(repeats):
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        passed, busy = map(float, printed.split())
        found.append((passed, busy))
    return found


class _Entered(Exception):
    """Leaves the block at once, without the error of a capture that saw nothing."""


def enter_seconds(subject: Subject, *, repeats: int = 5) -> list[Seconds]:
    """From the call of ``capture`` until its block begins. The subject may lie on the meta device: nothing runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        try:
            with capture(subject, words=subject.asked, backbone=BenchBackbone()):
                times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
                raise _Entered
        except _Entered:
            continue
    return times


def startup(
    models: Sequence[str], *, repeats: int = 5, progress: Callable[[str, int, int | None], None] | None = None
) -> dict[str, Any]:
    """Medians in seconds: the import beyond torch, and entering a capture of each model, built without weights.

    Returns
    -------
    dict
        ``import`` and ``enter`` (by model), each with ``seconds`` (all of them), ``median`` and ``processor``, the median of
        processor time.
    """
    say = progress or (lambda what, done, total: None)
    say("imports in fresh processes", 0, None)
    found: dict[str, Any] = {"import": _with_median(import_seconds(repeats=repeats)), "enter": {}}
    for name in models:
        say(f"{name}: entering a capture", 0, None)
        subject = Subject(Setting(name, device="meta"))
        found["enter"][name] = _with_median(enter_seconds(subject, repeats=repeats + 1)[1:])  # the first loads plugins
    return found


def _with_median(found: list[Seconds]) -> dict[str, Any]:
    passed, busy = zip(*found, strict=True)
    return {"seconds": list(passed), "median": statistics.median(passed), "processor": statistics.median(busy)}
