"""Maps in, judgements out: project attention onto a mel grid and score it beside what a blind map would get.

Names are imported when first used, so that ``import aiba_eval`` stays fast: neither torch nor librosa,
scikit-learn or xarray is loaded before something needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiba_eval import metrics, references, report, templates
    from aiba_eval.comparing import compare
    from aiba_eval.diagnostics import diagnose
    from aiba_eval.effects import effect_map
    from aiba_eval.grid import MelGrid, project
    from aiba_eval.recipe import paper_recipe
    from aiba_eval.scoring import score

__all__ = [
    "MelGrid",
    "compare",
    "diagnose",
    "effect_map",
    "metrics",
    "paper_recipe",
    "project",
    "references",
    "report",
    "score",
    "templates",
]

# public name -> the module that holds it; a name equal to its module is the module itself
_EXPORTS = {
    "MelGrid": "grid",
    "compare": "comparing",
    "diagnose": "diagnostics",
    "effect_map": "effects",
    "metrics": "metrics",
    "paper_recipe": "recipe",
    "project": "grid",
    "references": "references",
    "report": "report",
    "score": "scoring",
    "templates": "templates",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    source = _EXPORTS[name]
    module = import_module(f"{__name__}.{source}")
    value = module if name == source else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
