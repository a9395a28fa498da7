"""Kernel: where an attention function is bound, how to read its arguments, how to ask it again."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiba_hooks.calls import AttentionCall


class Kernel:
    """An attention function (or several bindings of one).

    A subclass gives ``name``, ``bindings`` and ``read``. It re-implements no softmax: attention is linear in the values,
    so the function itself, called with selector columns instead of values, returns pooled attention.

    Attributes
    ----------
    name : what sites and reports call it
    bindings : ``"module:attribute"`` (``"module:Class.method"``) of every place where the function is looked up. A module
        that is not imported is skipped: what is not imported cannot be called.
    signature : a Python signature, for builtins that have none
    """

    name: str = "kernel"
    bindings: tuple[str, ...] = ()
    signature: inspect.Signature | None = None

    def places(self, modules: Sequence[Any]) -> Iterator[tuple[Any, Any, Any]]:
        """Every ``(namespace, name, function)`` where the kernel is looked up: an attribute of a module or class, or an item
        of a dict (a registry). Default: ``bindings``. Names that hold one of these functions by value are found without this.

        Parameters
        ----------
        modules : the torch modules of the target, for kernels that live in the files which define their classes
        """
        for binding in self.bindings:
            path, _, attribute = binding.partition(":")
            namespace: Any = sys.modules.get(path)
            *outer, name = attribute.split(".")
            for part in outer:
                namespace = getattr(namespace, part, None)
            function = getattr(namespace, name, None)
            if namespace is not None and function is not None:
                yield namespace, name, function

    def read(self, function: Callable[..., Any], arguments: Mapping[str, Any], output: Any) -> AttentionCall | None:
        """Normalise one invocation, or None if this call is no softmax attention.

        Parameters
        ----------
        function : the original function, to be asked again
        arguments : its bound arguments, defaults filled in
        output : what the model's own call returned
        """
        raise NotImplementedError

    def bind(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Bind a call by signature: callers pass anything by position or by keyword."""
        signature = self.signature or self._signature(function)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    @cached_property
    def _signatures(self) -> dict[Any, inspect.Signature]:
        return {}

    def _signature(self, function: Callable[..., Any]) -> inspect.Signature:
        found = self._signatures.get(function)
        if found is None:
            found = self._signatures[function] = inspect.signature(function)
        return found

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"
