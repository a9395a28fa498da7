"""Compiled models: finding what is compiled, and what of it can be captured compiled (:mod:`aiba_hooks.serving`). What
cannot runs eagerly while it is captured."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from aiba_hooks.fastpaths import modules_of
from aiba_hooks.interception import classes_of

#: Dynamo puts what it compiled among the globals of the code that it compiled
_DYNAMO = "__compiled_fn"


class CompiledModelWarning(UserWarning):
    """A compiled model runs eagerly while it is captured, in its first forward or in all of them; the message says why."""


class _Shared:
    """One locked, reference-counted use of a context that is process-wide: the first to enter makes it, the last leaves it."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._users = 0
        self._held: Any = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._held = self._make()
                self._held.__enter__()
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._held.__exit__(None, None, None)
                    self._held = None


#: Dynamo keeps ``recompile_limit`` variants of a code, and past them runs it eagerly, or fails under ``fullgraph=True``. Tapped variants
#: come on top of the model's own: while one capture needs them, so many times as many are allowed
VARIANTS = 8


def _more_variants() -> Any:
    config = torch._dynamo.config
    return config.patch(recompile_limit=VARIANTS * config.recompile_limit)


force_eager = _Shared(lambda: torch.compiler.set_stance("force_eager"))
more_variants = _Shared(_more_variants)


def compiled_parts(target: Any, root: nn.Module, modules: Sequence[nn.Module]) -> list[str]:
    """Names of the compiled modules at, below or wrapped around ``root``, however they were compiled; ``modules`` are those inside it."""
    found = []
    if any(map(_is_compiled, (root, *modules))):  # names are spelled out only where there is something to name
        for name, module in root.named_modules():
            if _is_compiled(module):
                found.append(name.removeprefix("_orig_mod.").removeprefix("_orig_mod") or type(unwrap(module)).__name__)
    if not found and isinstance(target, nn.Module) and is_optimized(target):
        found.append(type(unwrap(target)).__name__)
    return list(dict.fromkeys(found))


def _is_compiled(module: nn.Module) -> bool:
    own = vars(module)
    return (
        own.get("_compiled_call_impl") is not None
        or hasattr(own.get("forward") or type(module).forward, "_torchdynamo_orig_callable")
        or is_optimized(module)
    )


def compiled_functions(modules: Sequence[nn.Module]) -> list[str]:
    """Compiled functions in the files that define the classes of ``modules``. Call it once kernels are intercepted:
    a compiled kernel is asked as it is, and does not count."""
    found = []
    for path, space in _files(modules):
        for name, value in space.items():
            compiled = callable(value) and hasattr(value, "_torchdynamo_orig_callable") and not isinstance(value, type)
            if compiled and not name.startswith(_DYNAMO):
                found.append(f"{path}.{name}")
    return found


def compiled_files(modules: Sequence[nn.Module]) -> list[str]:
    """Files that define the classes of ``modules`` and of which some code was compiled, through whatever object."""
    return [path for path, space in _files(modules) if any(name.startswith(_DYNAMO) for name in space)]


def _files(modules: Sequence[nn.Module]) -> list[tuple[str, dict[str, Any]]]:
    paths = {cls.__module__ for cls in classes_of(modules)}
    return [(path, vars(sys.modules[path])) for path in sorted(paths) if path in sys.modules]


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile(module)``: its hooks run, the wrapper's may not."""
    while is_optimized(module):
        module = module._orig_mod
    return module


def refusal(target: Any, given: nn.Module, root: nn.Module, named: list[str]) -> str | None:
    """Why a compiled model cannot be captured compiled, so that it has to run eagerly; None if it can.

    Parameters
    ----------
    target : of the capture
    given : its denoiser as it is called
    root : the module inside ``given``
    named : what is compiled, as ``compiled_parts`` and ``compiled_functions`` found it; empty if only ``compiled_files`` did
    """
    if not named:
        return "code there was compiled, through an object that the capture was not given"
    if is_optimized(target) and unwrap(target) is not root:
        return "its denoiser is a part of what was compiled"
    if any(isinstance(m, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) for m in modules_of(root)):
        return "nn.MultiheadAttention has fast paths that are not F.scaled_dot_product_attention"
    if any(_replays_graphs(function) for function in _entries(target, given, root)):
        return "it replays CUDA graphs, which call no function (mode='reduce-overhead' and 'max-autotune')"
    if getattr(getattr(torch._dynamo.eval_frame, "_stance", None), "stance", "") == "fail_on_recompile":
        return 'torch.compiler.set_stance("fail_on_recompile") forbids to compile it with taps'
    return None


def _entries(target: Any, given: nn.Module, root: nn.Module) -> Iterator[Any]:
    """What torch.compile returned, of the model and of its parts."""
    yield from (target, given)
    for module in modules_of(root):
        yield from (module, getattr(module, "_compiled_call_impl", None), vars(module).get("forward"))


def _replays_graphs(function: Any) -> bool:
    config = None if function is None else vars(function).get("get_compiler_config")
    if config is None:
        return False
    settings = config() or {}
    inductor = sys.modules.get("torch._inductor.config")
    return bool(settings.get("triton.cudagraphs", inductor is not None and inductor.triton.cudagraphs))


def warn(names: list[str], reason: str | None, stacklevel: int, later: bool = False) -> None:
    """Say that eager runs: in all forwards for a ``reason`` (``later``: in those from now on), in the first one without."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    if reason is None:
        text = (
            "inside the capture the first forward runs eagerly, and the next ones compiled, once more, with taps at the "
            "chosen sites"
        )
    else:
        when = "from the next forward to the end of" if later else "inside"
        text = (
            f"{reason}; {when} the capture every compiled function of the process runs eagerly (outputs are those of the "
            "eager model), and compiled again afterwards"
        )
    warnings.warn(f"{shown} compiled with torch.compile: {text}", CompiledModelWarning, stacklevel=stacklevel)


def is_optimized(module: Any) -> bool:
    """Whether this is what ``torch.compile(module)`` returned."""
    return type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod")
