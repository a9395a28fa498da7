"""The plugin manager: finds plugins through the entry-point group ``aiba``, reports those that fail, and keeps the rest.

``AIBA_PLUGINS`` overrides the entry points: a comma-separated list of module paths (empty: no plugin but the core's own
kernels). Tests use it; so can a user who wants to keep a broken plugin out.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pluggy

from aiba_hooks import specs

GROUP = "aiba"
#: torch's own kernels belong to the core and are there whatever else is installed
DEFAULT_PLUGINS = (
    "aiba_hooks.kernels.sdpa",
    "aiba_hooks.kernels.multihead_attention",
    "aiba_hooks.kernels.flex",
)


class PluginWarning(UserWarning):
    """A plugin was left out; the message names it and its error."""


class PluginManager:
    """pluggy's manager plus a record of what failed. ``failures`` maps a plugin's name to its exception."""

    def __init__(self) -> None:
        self.pluggy = pluggy.PluginManager("aiba")
        self.pluggy.add_hookspecs(specs)
        self.failures: dict[str, Exception] = {}

    def load(self) -> None:
        for path in DEFAULT_PLUGINS:
            self.add(path, lambda path=path: importlib.import_module(path))  # type: ignore[misc]
        override = os.environ.get("AIBA_PLUGINS")
        if override is not None:
            for path in filter(None, (part.strip() for part in override.split(","))):
                self.add(path, lambda path=path: importlib.import_module(path))  # type: ignore[misc]
            return
        for entry in importlib.metadata.entry_points(group=GROUP):
            self.add(entry.name, entry.load)

    def add(self, name: str, load: Callable[[], Any]) -> None:
        """Import and register one plugin; a failure is recorded under its name and warned about, never fatal."""
        plugin = None
        try:
            plugin = load()
            self.pluggy.register(plugin, name=name)
            unknown = [n for n in dir(plugin) if n.startswith("aiba_") and self._is_misspelt(plugin, n)]
            if unknown:
                known = ", ".join(sorted(n for n in vars(specs) if n.startswith("aiba_")))
                raise pluggy.PluginValidationError(plugin, f"unknown hook {unknown[0]!r}; the hooks are {known}")
        except Exception as error:
            if plugin is not None and self.pluggy.is_registered(plugin):
                self.pluggy.unregister(plugin)
            self._failed(name, error)

    def collect(self, hook: str) -> list[Any]:
        """The concatenated results of a list-valued hook, latest plugin first; one that raises is reported and left out."""
        found: list[Any] = []
        for impl in reversed(getattr(self.pluggy.hook, hook).get_hookimpls()):
            try:
                found.extend(impl.function())
            except Exception as error:
                self._failed(impl.plugin_name, error)
        return found

    def _is_misspelt(self, plugin: Any, name: str) -> bool:
        return self.pluggy.parse_hookimpl_opts(plugin, name) is not None and not hasattr(specs, name)

    def _failed(self, name: str, error: Exception) -> None:
        self.failures[name] = error
        warnings.warn(
            f"AIBA plugin {name!r} was left out: {type(error).__name__}: {error}", PluginWarning, stacklevel=3
        )


@cache
def manager() -> PluginManager:
    """The process-wide manager, loaded on first use (``manager.cache_clear()`` reads the entry points again)."""
    loaded = PluginManager()
    loaded.load()
    return loaded
