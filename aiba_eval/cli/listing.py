"""What ``aiba plugins`` lists."""

from __future__ import annotations

import importlib.metadata
import warnings
from typing import Any

#: what a plugin can offer: the key in the listing, the hook
OFFERS = {
    "backbones": "aiba_backbones",
    "kernels": "aiba_kernels",
    "models": "aiba_models",
    "datasets": "aiba_datasets",
}


def list_plugins() -> dict[str, Any]:
    """Registered plugins with what each offers by name, and those that failed.

    Returns
    -------
    dict
        ``plugins``: name, module, distribution (None if it came from no entry point), backbones, kernels, models (name,
        summary, trained), datasets (name, summary, licence). ``failures``: name, error.
    """
    from aiba_hooks.plugins import GROUP, PluginWarning, manager

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)  # listed below
        loaded = manager()
    failures = {name: f"{type(error).__name__}: {error}" for name, error in loaded.failures.items()}
    sources = {
        entry.name: f"{entry.dist.name} {entry.dist.version}"
        for entry in importlib.metadata.entry_points(group=GROUP)
        if entry.dist is not None
    }
    found: dict[str, dict[str, Any]] = {
        name: {
            "name": name,
            "module": getattr(plugin, "__name__", type(plugin).__name__),
            "distribution": sources.get(name),
        }
        | {kind: [] for kind in OFFERS}
        for name, plugin in loaded.pluggy.list_name_plugin()
        if plugin is not None
    }
    for kind, hook in OFFERS.items():
        for implementation in getattr(loaded.pluggy.hook, hook).get_hookimpls():
            try:
                offered = list(implementation.function())
            except Exception as error:  # whatever a plugin raises: it is listed as failed, the others are not
                failures[implementation.plugin_name] = f"{type(error).__name__}: {error}"
                continue
            # one adapter may read several forms of a function: it is named once
            held = found[implementation.plugin_name][kind]
            for item in offered:
                if _describe(kind, item) not in held:
                    held.append(_describe(kind, item))
    return {
        "plugins": list(found.values()),
        "failures": [{"name": name, "error": error} for name, error in sorted(failures.items())],
    }


def _describe(kind: str, item: Any) -> Any:
    if kind == "models":
        return {"name": item.name, "summary": item.summary, "trained": item.trained}
    if kind == "datasets":
        return {"name": item.name, "summary": item.summary, "licence": item.licence}
    return str(item.name)
