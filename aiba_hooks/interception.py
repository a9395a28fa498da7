"""Interception: replaces functions and methods where they are looked up, counts who needs it, and puts them back.

A wrapper is installed once for the process and shared by all captures; whether a call is seen is decided per context
(``ContextVar``), so two threads that run two pipelines each see only their own calls."""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from aiba_hooks import compiled

if TYPE_CHECKING:
    from aiba_hooks.kernel import Kernel


class Listener(Protocol):
    """Who is told of intercepted calls, after the model's own ran.

    ``observe`` returns None, or the output that the model is to get instead and what that changes in it.
    """

    listening: bool

    def observe(self, function: Callable[..., Any], args: Any, kwargs: Any, output: Any) -> Edited | None: ...


@dataclass
class Edited:
    """An edited output: the change to the normalised output [batch, heads, Tq, dim], and the way back to the kernel's format."""

    change: Any
    restore: Callable[[Any], Any]
    original: Any


#: the captures of this context, outermost first
ACTIVE: ContextVar[tuple[Any, ...]] = ContextVar("aiba_active", default=())
#: set while an interceptor runs: a registry or dispatcher that reaches SDPA is seen once, by the outermost. While the model's
#: own call runs, it collects the kernels that this call reaches, as (function, args, kwargs); then it is a tuple of them
_BUSY: ContextVar[list[Any] | tuple[Any, ...] | None] = ContextVar("aiba_busy", default=None)


def intercepting() -> bool:
    """True inside an intercepted kernel: what runs now is the kernel's own, or an ask."""
    return _BUSY.get() is not None


def listeners() -> list[Any]:
    """Who is told of a call made here and now, outermost first; none inside an intercepted kernel."""
    if _BUSY.get() is not None:
        return []
    return [listener for listener in ACTIVE.get() if listener.listening]


def reached() -> tuple[Any, ...]:
    """Inside ``observe``: intercepted kernels that the model's own call went on to, as (function, args, kwargs)."""
    return tuple(_BUSY.get() or ())


@contextmanager
def busy() -> Iterator[None]:
    """What runs inside is not told to anyone."""
    token = _BUSY.set(())
    try:
        with unwatched():
            yield
    finally:
        _BUSY.reset(token)


class Watcher(TorchFunctionMode):
    """A mode that only looks. Code that behaves differently under a mode runs ``unwatched``."""


@contextmanager
def unwatched() -> Iterator[None]:
    """Suspend our own modes in this thread; anyone else's stay, and so do ours below them."""
    suspended = []
    while isinstance(mode := _get_current_function_mode(), Watcher):
        mode.__exit__(None, None, None)
        suspended.append(mode)
    try:
        yield
    finally:
        for mode in reversed(suspended):
            mode.__enter__()


@dataclass
class _Patch:
    namespace: Any
    name: Any
    original: Any
    replacement: Any
    own: bool  # the attribute was in the namespace itself (else it was inherited and is deleted on restoring)
    users: int = 0


class Patches:
    """Reference-counted attribute replacements. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._table: dict[tuple[int, Any], _Patch] = {}

    def acquire(self, namespace: Any, name: Any, original: Any, replacement: Any) -> tuple[int, Any]:
        """Replace ``namespace.name`` (or count one more user of the replacement)."""
        key = (id(namespace), name)
        with self._lock:
            patch = self._table.get(key)
            if patch is None:
                own = name in _dict_of(namespace)
                _set(namespace, name, replacement)
                patch = self._table[key] = _Patch(namespace, name, original, replacement, own)
            patch.users += 1
        return key

    def release(self, key: tuple[int, Any]) -> None:
        """Give up one use; the last one restores what was there."""
        with self._lock:
            patch = self._table[key]
            patch.users -= 1
            if patch.users:
                return
            del self._table[key]
            current = _dict_of(patch.namespace).get(patch.name)
            if current is not patch.replacement:
                where = getattr(patch.namespace, "__name__", type(patch.namespace).__name__)
                warnings.warn(
                    f"{where}.{patch.name} was replaced by someone else while AIBA intercepted it; theirs is kept",
                    RuntimeWarning,
                    stacklevel=2,
                )
            elif patch.own:
                _set(patch.namespace, patch.name, patch.original)
            else:
                _delete(patch.namespace, patch.name)

    def replaced(self, namespace: Any, name: Any) -> bool:
        """Whether ``namespace.name`` is at present replaced by us."""
        return (id(namespace), name) in self._table


PATCHES = Patches()
_WRAPPERS: dict[
    int, tuple[Any, Any]
] = {}  # id(original) -> (original, wrapper); originals live as long as their module


def wrapper_of(original: Callable[..., Any]) -> Callable[..., Any]:
    """The one interceptor of ``original``: runs it untouched, then tells the listeners of this context."""
    known = _WRAPPERS.get(id(original))
    if known is not None and known[0] is original:
        return known[1]

    sdpa = compiled.is_sdpa(original)

    @functools.wraps(original)
    def intercepted(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return compiled.traced(original, sdpa, args, kwargs)
        active = ACTIVE.get()
        if not active:
            return original(*args, **kwargs)
        busy = _BUSY.get()
        if busy is not None:
            if type(busy) is list:
                busy.append((original, args, kwargs))
            return original(*args, **kwargs)
        listeners = [listener for listener in active if listener.listening]
        if not listeners:
            return original(*args, **kwargs)
        collected: list[Any] = []
        token = _BUSY.set(collected)
        try:
            with unwatched():  # compiled kernels are compiled anew under a mode
                output = original(*args, **kwargs)
                _BUSY.set(tuple(collected))
                # everyone sees the model's own output; what edits change is added up
                made = []
                for listener in listeners:
                    edit = listener.observe(original, args, kwargs, output)
                    if edit is not None:
                        made.append(edit)
                if made:
                    return made[0].restore(sum((edit.change for edit in made), made[0].original))
        finally:
            _BUSY.reset(token)
        return output

    # copied from a compiled function: whoever compiles a caller would compile past the interceptor
    for name in [name for name in vars(intercepted) if name.startswith("_torchdynamo")]:
        delattr(intercepted, name)
    _WRAPPERS[id(original)] = (original, intercepted)
    return intercepted


def all_wrappers() -> list[tuple[Any, Any]]:
    """``(original, wrapper)`` pairs made so far in this process."""
    return list(_WRAPPERS.values())


def original_of(function: Any) -> Any:
    """``function``, or what it wraps if it is one of our wrappers."""
    inner = getattr(function, "__wrapped__", None)
    known = _WRAPPERS.get(id(inner))
    return inner if known is not None and known[1] is function else function


def importers(functions: Iterable[Any], modules: Iterable[ModuleType]) -> Iterator[tuple[ModuleType, str, Any]]:
    """Module globals that hold one of ``functions`` by value (``from ... import scaled_dot_product_attention``)."""
    wanted = {id(function): function for function in functions}
    for module in modules:
        names = getattr(module, "__dict__", None)
        # looked through at once: there are a hundred thousand names, and next to none of them is wanted
        if not isinstance(names, dict) or wanted.keys().isdisjoint(map(id, list(names.values()))):
            continue
        for name, value in list(names.items()):
            if id(value) in wanted:
                yield module, name, value


def attributes(functions: Iterable[Any], modules: Iterable[Any]) -> Iterator[tuple[Any, str, Any]]:
    """Attributes of torch modules and their classes that hold one of ``functions`` by value."""
    wanted = {id(function): function for function in functions}
    modules = list(modules)
    for module in modules:
        if not wanted.keys().isdisjoint(map(id, vars(module).values())):
            yield from ((module, name, value) for name, value in vars(module).items() if id(value) in wanted)
    for cls in classes_of(modules):
        for name, value in vars(cls).items():
            if id(value) in wanted or (isinstance(value, staticmethod) and id(value.__func__) in wanted):
                yield cls, name, value


def intercept(
    kernels: Iterable[Kernel], target_modules: Iterable[Any], adapters: dict[Any, Kernel]
) -> Iterator[tuple[int, Any]]:
    """Install every binding of the kernels, and every name that holds one of their functions by value.

    Yields a key for ``PATCHES.release`` after each replacement, so that a failure halfway can be rolled back. ``adapters``
    is filled with the kernel that reads each original function.
    """
    wrappers: dict[int, tuple[Any, Any]] = {}
    modules = list(target_modules)
    for kernel in kernels:
        for namespace, name, value in list(kernel.places(modules)):
            original = original_of(value)
            wrapper = wrapper_of(original)
            adapters.setdefault(original, kernel)
            wrappers[id(original)] = (original, wrapper)
            yield PATCHES.acquire(namespace, name, original, wrapper)
    originals = [original for original, _ in wrappers.values()]
    by_wrapper = {id(wrapper): original for original, wrapper in wrappers.values()}
    everywhere = [*originals, *(wrapper for _, wrapper in wrappers.values())]
    places = [*importers(everywhere, loaded_modules()), *attributes(everywhere, modules)]
    for namespace, name, value in places:
        held = value.__func__ if isinstance(value, staticmethod) else value
        original = by_wrapper.get(id(held), held)
        _, wrapper = wrappers[id(original)]
        if held is wrapper and not PATCHES.replaced(namespace, name):
            continue  # imported by value during an earlier capture: it already is the interceptor
        # a builtin in a class is not bound to instances; our Python function would be
        unbound = isinstance(value, staticmethod) or (isinstance(namespace, type) and not hasattr(value, "__get__"))
        replacement: Any = staticmethod(wrapper) if unbound else wrapper
        yield PATCHES.acquire(namespace, name, value, replacement)


def classes_of(modules: Iterable[Any]) -> list[type]:
    """The classes of modules and what they inherit from, each once."""
    kinds = dict.fromkeys(map(type, modules))
    return list(dict.fromkeys(cls for kind in kinds for cls in kind.__mro__))


#: packages that make no attention of torch's: with them go most of the names that would be looked through
# fmt: off
_WITHOUT_TORCH = sys.stdlib_module_names | {
    "numpy", "scipy", "sympy", "mpmath", "pandas", "pyarrow", "xarray", "narwhals", "sklearn", "joblib", "numba",
    "llvmlite", "triton", "librosa", "matplotlib", "mpl_toolkits", "pyparsing", "fontTools", "PIL", "jinja2",
    "rich", "typer", "click", "tqdm", "pluggy", "attr", "attrs", "regex", "psutil", "dask", "distributed",
    "tornado", "toolz", "tlz", "trio", "anyio", "urllib3", "requests", "h11", "httpx", "httpx2", "httpcore",
    "httpcore2", "yaml", "huggingface_hub", "tokenizers", "safetensors", "filelock", "charset_normalizer",
    "packaging", "dateutil",
}
# fmt: on


def loaded_modules() -> list[ModuleType]:
    """Imported modules whose globals may hold a kernel; torch's own look theirs up by attribute."""
    return [module for name, module in list(sys.modules.items()) if module is not None and _may_hold(name)]


@functools.cache
def _may_hold(name: str) -> bool:
    return not name.startswith("torch.") and name.partition(".")[0] not in _WITHOUT_TORCH


def _dict_of(namespace: Any) -> Any:
    return namespace if isinstance(namespace, dict) else getattr(namespace, "__dict__", {})


def _set(namespace: Any, name: Any, value: Any) -> None:
    # instances of nn.Module are written past __setattr__, which would look for parameters and modules
    if isinstance(namespace, (ModuleType, type)):
        setattr(namespace, name, value)
    else:
        _dict_of(namespace)[name] = value


def _delete(namespace: Any, name: Any) -> None:
    if isinstance(namespace, (ModuleType, type)):
        delattr(namespace, name)
    else:
        del _dict_of(namespace)[name]
