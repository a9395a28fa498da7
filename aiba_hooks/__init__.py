"""AIBA's core: see and steer what text-to-audio diffusion models attend to. Names are imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from aiba_hooks.specs import hookimpl, hookspec

if TYPE_CHECKING:
    from aiba_hooks.backbone import Backbone, Conditioning, MethodCall, Segment, SiteCall, Step
    from aiba_hooks.calls import AttentionCall
    from aiba_hooks.capturing import Capture, capture
    from aiba_hooks.datasets import Dataset, UnknownSplit
    from aiba_hooks.errors import (
        AibaError,
        BackboneMismatch,
        CaptureBudgetExceeded,
        CheckColumnError,
        DegeneratePooling,
        LatticeMismatch,
        NothingCaptured,
        UnknownBackbone,
        UnknownWord,
    )
    from aiba_hooks.interventions import Intervention, intervene
    from aiba_hooks.kernel import Kernel
    from aiba_hooks.lattice import Lattice
    from aiba_hooks.maps import AttentionMaps
    from aiba_hooks.mel import mel_edges
    from aiba_hooks.models import Model
    from aiba_hooks.sites import Site
    from aiba_hooks.tagging import Tag
    from aiba_hooks.words import TokenStream

# torch and xarray take seconds: `import aiba_hooks` and `aiba --help` do without them
_HOME = {
    "AibaError": "errors",
    "AttentionCall": "calls",
    "AttentionMaps": "maps",
    "Backbone": "backbone",
    "BackboneMismatch": "errors",
    "Capture": "capturing",
    "CaptureBudgetExceeded": "errors",
    "CheckColumnError": "errors",
    "Conditioning": "backbone",
    "Dataset": "datasets",
    "DegeneratePooling": "errors",
    "Kernel": "kernel",
    "Lattice": "lattice",
    "LatticeMismatch": "errors",
    "MethodCall": "backbone",
    "Model": "models",
    "NothingCaptured": "errors",
    "Segment": "backbone",
    "Site": "sites",
    "SiteCall": "backbone",
    "Step": "backbone",
    "Tag": "tagging",
    "TokenStream": "words",
    "UnknownBackbone": "errors",
    "UnknownSplit": "datasets",
    "UnknownWord": "errors",
    "capture": "capturing",
    "mel_edges": "mel",
    "intervene": "interventions",
    "Intervention": "interventions",
}

__all__ = [
    "AibaError",
    "AttentionCall",
    "AttentionMaps",
    "Backbone",
    "BackboneMismatch",
    "Capture",
    "CaptureBudgetExceeded",
    "CheckColumnError",
    "Conditioning",
    "Dataset",
    "DegeneratePooling",
    "Intervention",
    "Kernel",
    "Lattice",
    "LatticeMismatch",
    "MethodCall",
    "Model",
    "NothingCaptured",
    "Segment",
    "Site",
    "SiteCall",
    "Step",
    "Tag",
    "TokenStream",
    "UnknownBackbone",
    "UnknownSplit",
    "UnknownWord",
    "capture",
    "hookimpl",
    "hookspec",
    "intervene",
    "mel_edges",
]


def __getattr__(name: str) -> Any:

    if name in _HOME:
        value = getattr(importlib.import_module(f"aiba_hooks.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'aiba_hooks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
