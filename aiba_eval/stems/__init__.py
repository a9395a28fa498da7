"""Multi-stem music in Slakh's layout, rendered from freely licensed MIDI.

>>> from aiba_eval.stems import render
>>> summary = render("music", sample_rate=16000, max_seconds=60, require=("bass", "drums"))  # doctest: +SKIP

`sources` finds the music, `midi` splits a piece into parts, `tunes` tells which pieces are the same tune, `synth` makes
sound of a part, `render` writes the set. `aiba_eval.datasets.slakh` reads it.
"""

from __future__ import annotations

from .errors import MalformedMidi, MalformedWad, MissingDependency, StemsError

try:
    from .render import Progress, RenderSummary, render
    from .sources import SOURCES, Source
    from .synth import Engine
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"rendering stems needs {error.name}: pip install 'aiba[stems]'", name=error.name, path=error.path
    ) from error

__all__ = [
    "SOURCES",
    "Engine",
    "MalformedMidi",
    "MalformedWad",
    "MissingDependency",
    "Progress",
    "RenderSummary",
    "Source",
    "StemsError",
    "render",
]
