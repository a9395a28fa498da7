"""Kernel: where an attention function is bound, how to read its arguments, how to ask it again."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from inspect import Parameter
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
        names, positional, defaults = self._parameters(function)
        # Signature.bind costs as much as a kernel's launch; what is unusual is left to it
        if len(args) + len(kwargs) > 0 and len(args) <= positional and names.keys() >= kwargs.keys():
            given = dict(zip(names, args, strict=False))
            if given.keys().isdisjoint(kwargs):
                arguments = {**names, **defaults, **given, **kwargs}
                if len(defaults.keys() | given.keys() | kwargs.keys()) == len(names):
                    return arguments
        bound = (self.signature or self._signature(function)).bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def _parameters(self, function: Callable[..., Any]) -> tuple[dict[str, Any], int, dict[str, Any]]:
        """Names of the parameters, how many of them may be given by position, and the defaults. No names where the function
        takes any number of arguments, or some by position only."""
        found = self._tables.get(function)
        if found is None:
            parameters = (self.signature or self._signature(function)).parameters
            kinds = [parameter.kind for parameter in parameters.values()]
            found = {}, 0, {}
            if all(kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY) for kind in kinds):
                defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
                found = dict.fromkeys(parameters), kinds.count(Parameter.POSITIONAL_OR_KEYWORD), defaults
            self._tables[function] = found
        return found

    @cached_property
    def _tables(self) -> dict[Any, tuple[dict[str, Any], int, dict[str, Any]]]:
        return {}

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
