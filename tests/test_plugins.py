"""The registry: entry points, override, and plugins that fail."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import types

import pytest

from aiba_hooks import Backbone, hookimpl
from aiba_hooks.plugins import PluginManager, PluginWarning, manager


@pytest.fixture
def fresh(monkeypatch):
    """A manager that loads the modules given, by the environment override."""

    def load(*modules):
        for module in modules:
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setenv("AIBA_PLUGINS", ",".join(module.__name__ for module in modules))
        found = PluginManager()
        found.load()
        return found

    return load


def plugin(name, **hooks):
    module = types.ModuleType(name)
    for hook, function in hooks.items():
        function.__name__ = hook
        setattr(module, hook, hookimpl(function))
    return module


def test_our_own_plugins_come_through_entry_points():
    names = {entry.name for entry in importlib.metadata.entry_points(group="aiba")}
    assert {"audioldm2", "demo"} <= names
    loaded = dict(manager().pluggy.list_name_plugin())
    assert names <= set(loaded)
    assert [backbone.name for backbone in manager().collect("aiba_backbones")].count("audioldm2") == 1
    assert "sdpa" in {kernel.name for kernel in manager().collect("aiba_kernels")}


def test_the_environment_override_replaces_the_entry_points(fresh):
    class Mine(Backbone):
        name = "mine"

    found = fresh(plugin("my_plugin", aiba_backbones=lambda: [Mine()]))
    assert [b.name for b in found.collect("aiba_backbones")] == ["mine"]
    assert {k.name for k in found.collect("aiba_kernels")} >= {"sdpa"}, "the core's own kernels are always there"
    assert fresh().collect("aiba_backbones") == []


def test_later_plugins_are_asked_first(fresh):
    first, second = Backbone(), Backbone()
    found = fresh(plugin("one", aiba_backbones=lambda: [first]), plugin("two", aiba_backbones=lambda: [second]))
    assert found.collect("aiba_backbones") == [second, first]


def test_a_plugin_that_does_not_import_is_reported_and_the_rest_is_kept(tmp_path, monkeypatch):
    (tmp_path / "broken_plugin.py").write_text("import a_library_that_is_not_there\n")
    (tmp_path / "good_plugin.py").write_text(
        "from aiba_hooks import hookimpl, Backbone\n@hookimpl\ndef aiba_backbones():\n    return [Backbone()]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("AIBA_PLUGINS", "broken_plugin, good_plugin")
    found = PluginManager()
    with pytest.warns(
        PluginWarning, match="'broken_plugin' was left out: ModuleNotFoundError: .*a_library_that_is_not_there"
    ):
        found.load()
    assert isinstance(found.failures["broken_plugin"], ModuleNotFoundError)
    assert len(found.collect("aiba_backbones")) == 1


def test_a_hook_that_raises_is_reported_and_the_rest_is_kept(fresh):
    good = Backbone()
    found = fresh(plugin("good", aiba_backbones=lambda: [good]), plugin("bad", aiba_backbones=lambda: 1 / 0))
    with pytest.warns(PluginWarning, match="'bad' was left out: ZeroDivisionError"):
        assert found.collect("aiba_backbones") == [good]


def test_a_misspelt_hook_is_reported_with_the_names_that_exist(fresh):
    with pytest.warns(
        PluginWarning, match="unknown hook 'aiba_backbone'; the hooks are aiba_backbones, aiba_datasets, aiba_kernels"
    ):
        found = fresh(plugin("misspelt", aiba_backbone=lambda: []))
    assert "misspelt" in found.failures
    assert not found.pluggy.has_plugin("misspelt")


def test_importing_the_core_and_listing_plugins_takes_no_torch():
    code = (
        "import sys; from aiba_hooks.plugins import manager; m = manager();"
        "[m.collect(h) for h in ('aiba_kernels', 'aiba_backbones', 'aiba_models', 'aiba_datasets')];"
        "print(sorted({'torch', 'xarray', 'diffusers', 'transformers', 'librosa'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_core_adds_little_to_importing_torch():
    code = "import torch, sys; before = set(sys.modules); from aiba_hooks import capture, intervene; print(len(set(sys.modules) - before), 'xarray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, xarray = done.stdout.split()
    assert xarray == "False"
    assert int(count) < 60  # aiba_hooks, pluggy, and what they need of the standard library


def test_the_name_capture_is_the_function_however_it_is_imported():
    code = "import aiba_hooks.capturing, aiba_hooks; assert callable(aiba_hooks.capture); from aiba_hooks import *; capture"
    subprocess.run([sys.executable, "-c", code], check=True)
