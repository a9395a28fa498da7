"""Coverage audit: attention that no adapter caught. One first forward is compared with what torch itself runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from aiba_hooks.interception import Watcher, intercepting
from aiba_hooks.sites import attention_like, calling_module

_SOFTMAX = {"softmax", "_softmax", "log_softmax"}
_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum", "__matmul__", "mm", "addbmm"}
_REMEDY = "use an implementation that an adapter knows (torch's SDPA, say), or write a kernel adapter: docs/writing-a-kernel.md"


class CoverageWarning(UserWarning):
    """Some attention ran that no kernel adapter caught; the message names it."""


@dataclass(frozen=True)
class Uncovered:
    """Attention that was not intercepted.

    Attributes
    ----------
    name : dotted name of the module, relative to the denoiser
    module : its class
    reason : what was seen
    """

    name: str
    module: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name or '(the module itself)'} ({self.module}): {self.reason}"


class Audit(Watcher):
    """Watches for a softmax whose result is multiplied with something, outside every intercepted kernel."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names
        self._weights: Any = WeakIdKeyDictionary()
        self.eager: dict[str, str] = {}
        self.open = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling():
            # a compiled function of the model's is traced through this mode, and what follows would break its graph
            return func(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if self.open and not intercepting():
            self._note(getattr(func, "__name__", ""), args, result)
        return result

    def _note(self, name: str, args: Any, result: Any) -> None:
        if name in _SOFTMAX:
            if isinstance(result, torch.Tensor) and result.ndim >= 3:
                self._weights[result] = True
            return
        inputs = [a for a in _flat(args) if isinstance(a, torch.Tensor) and a in self._weights]
        if not inputs:
            return
        if name in _PRODUCTS:
            where = calling_module(self._names, 4)
            if where is not None:
                self.eager.setdefault(where[0], type(where[1]).__name__)
        elif isinstance(result, torch.Tensor) and result.numel() == inputs[0].numel():
            self._weights[result] = True  # dropout, a cast, a reshape

    def start(self) -> None:
        """Begin to watch, in this thread."""
        self.open = True
        self.__enter__()

    def stop(self) -> None:
        """Stop watching; does nothing a second time."""
        if self.open:
            self.open = False
            self.__exit__(None, None, None)
            self._weights.clear()


def uncovered(
    root: nn.Module, sites: Iterable[str], eager: Mapping[str, str], ran: Iterable[int], names: Mapping[int, str]
) -> list[Uncovered]:
    """What an audited forward leaves unexplained.

    Parameters
    ----------
    sites : names where an intercepted kernel was called
    eager : modules that multiplied a softmax, from :class:`Audit`
    ran : ids of the projections that ran
    names : of the modules below ``root``
    """
    known = set(sites)
    found = [
        Uncovered(name, kind, f"multiplies a softmax of its own; {_REMEDY}")
        for name, kind in eager.items()
        if name not in known
    ]
    listed = {entry.name for entry in found}
    projections = {names[key] for key in ran if key in names}
    candidates = [(name, kind) for name, kind in attention_like(root, names)]
    for name, kind in candidates:
        inner = any(other != name and _below(other, name) for other, _ in candidates)
        explained = any(_below(place, name) for place in known | listed)
        if not inner and not explained and any(_below(projection, name) for projection in projections):
            found.append(Uncovered(name, kind, f"ran, but called no kernel that an adapter knows; {_REMEDY}"))
    return found


def _below(name: str, parent: str) -> bool:
    return name == parent or not parent or name.startswith(f"{parent}.")


def _flat(values: Any) -> list[Any]:
    flat: list[Any] = []
    for value in values:
        flat.extend(value if isinstance(value, (list, tuple)) else (value,))
    return flat
