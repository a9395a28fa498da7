"""Compiled models. Compiled code calls no Python function that could be intercepted, so captured forwards run eagerly."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class CompiledModelWarning(UserWarning):
    """A compiled model was run eagerly while it was captured."""


class _ForceEager:
    """``torch.compiler.set_stance("force_eager")`` is process-wide: one locked, reference-counted use of it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._stance: Any = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._stance.__exit__(None, None, None)
                    self._stance = None


force_eager = _ForceEager()


def compiled_parts(target: Any, root: nn.Module) -> list[str]:
    """Names of the compiled modules at, below or wrapped around ``root``, however they were compiled."""
    found = []
    for name, module in root.named_modules():
        forward = vars(module).get("forward") or getattr(type(module), "forward", None)
        if (
            _is_optimized(module)
            or getattr(module, "_compiled_call_impl", None) is not None
            or hasattr(forward, "_torchdynamo_orig_callable")
        ):
            found.append(name.removeprefix("_orig_mod.").removeprefix("_orig_mod") or type(unwrap(module)).__name__)
    if not found and isinstance(target, nn.Module) and _is_optimized(target):
        found.append(type(unwrap(target)).__name__)
    return list(dict.fromkeys(found))


def compiled_functions(root: nn.Module) -> list[str]:
    """Compiled functions in the files that define the classes at or below ``root``. Call it once kernels are intercepted:
    a compiled kernel is asked as it is, and does not count."""
    files = {cls.__module__ for module in root.modules() for cls in type(module).__mro__}
    found = []
    for path in sorted(files):
        for name, value in vars(sys.modules.get(path, object)).items():
            if callable(value) and hasattr(value, "_torchdynamo_orig_callable") and not isinstance(value, type):
                found.append(f"{path}.{name}")
    return found


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile(module)``: its hooks run, the wrapper's may not."""
    while _is_optimized(module):
        module = module._orig_mod
    return module


def warn(names: list[str], stacklevel: int) -> None:
    """Say that eager ran."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    warnings.warn(
        f"{shown} compiled with torch.compile: inside the capture every compiled function of the process runs eagerly "
        "(outputs are those of the eager model), and compiled again afterwards",
        CompiledModelWarning,
        stacklevel=stacklevel,
    )


def _is_optimized(module: Any) -> bool:
    return type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod")
