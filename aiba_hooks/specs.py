"""Every hook that AIBA calls. A plugin is a module (or object) with functions of these names marked ``@hookimpl``,
published under the entry-point group ``aiba``. Kernels and backbones are asked for when a capture is entered, models and
datasets when one is looked up by name: no hook is on the per-call path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pluggy import HookimplMarker, HookspecMarker

if TYPE_CHECKING:
    from aiba_hooks.backbone import Backbone
    from aiba_hooks.datasets import Dataset
    from aiba_hooks.kernel import Kernel
    from aiba_hooks.models import Model

hookspec = HookspecMarker("aiba")
hookimpl = HookimplMarker("aiba")


@hookspec
def aiba_kernels() -> Sequence[Kernel]:  # type: ignore[empty-body]
    """Kernels to intercept: attention functions, where they are bound and how to ask them again.

    Return a list of :class:`aiba_hooks.Kernel` instances. Return ``[]`` where the library that they wrap is not
    installed; do not import it here.
    """


@hookspec
def aiba_backbones() -> Sequence[Backbone]:  # type: ignore[empty-body]
    """Backbones: for one kind of pipeline, its denoiser, prompts, token streams, guidance branches and latent lattice.

    Return a list of :class:`aiba_hooks.Backbone` instances. The first whose ``matches(target)`` is true is used; plugins
    registered later are asked first, so a plugin can replace a built-in backbone.
    """


@hookspec
def aiba_models() -> Sequence[Model]:  # type: ignore[empty-body]
    """Named pipelines that ``aiba run NAME`` and ``aiba demo`` can load beside folders and hub ids.

    Return a list of :class:`aiba_hooks.Model`. ``load`` imports what it needs when it is called, not here.
    """


@hookspec
def aiba_datasets() -> Sequence[Dataset]:  # type: ignore[empty-body]
    """Datasets that can be opened by name: music whose instruments are known apart, in a layout of its own.

    Return a list of :class:`aiba_hooks.Dataset`. ``open`` imports what it needs when it is called, not here.
    """
