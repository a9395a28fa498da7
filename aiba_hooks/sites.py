"""Sites: which module is calling, and what its projections read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from aiba_hooks.fastpaths import without_hooks
from aiba_hooks.tagging import Source, Tag

#: path components that wrappers insert and that say nothing about the model
_WRAPPER_COMPONENTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_MODULE_WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}


@dataclass
class Site:
    """One place where attention was seen.

    Attributes
    ----------
    name : dotted module name relative to the denoiser; ``#0``, ``#1`` appended where one forward calls a kernel more than once
    kernel : which kernel ran
    tag : ``"cross"``, ``"self"``, ``"joint"`` or ``"unknown"``, with ``tag.stream`` and ``tag.evidence``
    query_shape, key_shape : [batch, heads, tokens, head_dim] as last seen
    calls : kernel calls seen
    captured : whether maps of it are kept
    reason : why not, or what is kept
    check : largest error of the check column, relative to the largest output
    nonfinite : rows (queries of one head or head mean) whose probabilities are not finite: overflow, or a mask over every key
    row_sum : smallest and largest sum over all groups of a query; 1 but for masked rows, dropout and attention sinks
    """

    name: str
    kernel: str
    tag: Tag
    query_shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    calls: int = 0
    captured: bool = False
    reason: str = ""
    check: float | None = None
    row_sum: tuple[float, float] | None = None
    nonfinite: int = 0
    module: Any = field(default=None, repr=False, compare=False)

    @property
    def evidence(self) -> str:
        """What the tag was concluded from."""
        return self.tag.evidence

    @property
    def stream(self) -> str | None:
        """Token stream that the keys come from."""
        return self.tag.stream

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Query and key shape."""
        return self.query_shape, self.key_shape

    @property
    def label(self) -> str:
        """The name, or words for the empty name of the root."""
        return self.name or "(the module itself)"

    def describe(self) -> str:
        """Name, tag, sizes and kernel in one line."""
        stream = f" ({self.tag.stream})" if self.tag.stream else ""
        return f"{self.label}: {self.tag.kind}{stream}, {self.query_shape[-2]}×{self.key_shape[-2]}, {self.kernel}"

    def __str__(self) -> str:
        return f"{self.describe()}; {'captured' if self.captured else f'not captured: {self.reason}'}"


def site_names(root: nn.Module) -> dict[int, str]:
    """id(module) → dotted name below ``root``, without the components that wrappers insert."""
    names: dict[int, str] = {}
    waiting = [("", root)]
    while waiting:
        name, module = waiting.pop()
        if id(module) in names:
            continue
        names[id(module)] = name
        wraps = type(module).__name__ in _MODULE_WRAPPERS
        for child_name, child in reversed(module._modules.items()):
            if child is not None:
                hidden = child_name in _WRAPPER_COMPONENTS or (wraps and child_name == "module")
                waiting.append((name if hidden else f"{name}.{child_name}" if name else child_name, child))
    return names


def calling_module(names: Mapping[int, str], depth: int) -> tuple[str, Any] | None:
    """The innermost module of ``names`` whose code is running: ``(name, module)``.

    Frames are read rather than forward hooks set on every module: a hook costs every module on every forward, the walk
    costs a few frames per attention call.
    """
    frame = sys._getframe(depth)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, nn.Module):
                name = names.get(id(first))
                if name is not None:
                    return name, first
        frame = frame.f_back  # type: ignore[assignment]
    return None


def attention_like(root: nn.Module, names: Mapping[int, str]) -> Iterator[tuple[str, str]]:
    """Modules that look like attention by class name: only to say in a message what was expected to be seen."""
    for module in root.modules():
        name = names[id(module)]
        kind = type(module).__name__
        if "attention" in kind.lower() or kind.lower().endswith("attn"):
            yield name, kind


class _Memory:
    """Which memory a tensor lies in, without keeping it: a view of the same data from the same place is the same memory.

    The weak reference keeps nothing but the storage's identity from being used again, so that what is allocated where a freed
    tensor lay is told apart from it.
    """

    __slots__ = ("_storage", "key")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self.key: tuple[int, int] = (self._storage.cdata, tensor.storage_offset())


@dataclass
class _Read:
    """What a projection read and made."""

    read: _Memory
    shape: tuple[int, ...]
    made: _Memory


class SourceWatch:
    """Remembers which tensors the projections of a site read, for tags. Used during the first forward only. It holds none of them."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._read: dict[int, _Read] = {}
        self.ran: set[int] = set()
        unhooked = without_hooks(modules)
        self._handles = [
            module.register_forward_hook(self._hook)
            for module in modules
            if not any(child is not None for child in module._modules.values())
            and _is_projection(module)
            and id(module) not in unhooked
        ]
        self.enabled = False
        #: told of every projection that ran, with what it read: ``(module, input)``
        self.on_read: Callable[[nn.Module, torch.Tensor], None] | None = None

    def _hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.enabled and args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
            if _has_memory(args[0]) and _has_memory(output):
                self._read[id(module)] = _Read(_Memory(args[0]), tuple(args[0].shape), _Memory(output))
            self.ran.add(id(module))
            if self.on_read is not None:
                self.on_read(module, args[0])

    def sources(self, site: nn.Module, arguments: Mapping[str, Any]) -> list[Source]:
        """Distinct tensors that the projections below ``site`` read, in reading order; those of other sites are forgotten."""
        below = {id(module): name for name, module in site.named_modules()}
        self._read = {key: value for key, value in self._read.items() if key in below}
        produced = {read.made.key for read in self._read.values()}
        named = {_Memory(value).key: name for name, value in reversed(list(arguments.items())) if _has_data(value)}
        found: dict[tuple[int, int], Source] = {}
        for module, read in self._read.items():
            key = read.read.key
            if key in produced:
                continue  # the output of another projection of this site (a low-rank adapter's second half)
            if key in found:
                found[key].projection += f", {below[module]}"
            else:
                found[key] = Source(read.shape, below[module] or type(site).__name__, named.get(key))
        return list(found.values())

    def forget(self) -> None:
        """Drop what is held."""
        self._read.clear()

    def close(self) -> None:
        """Remove the hooks."""
        self.forget()
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _is_projection(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim >= 2 and not isinstance(module, nn.Embedding)


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether it has one memory and a shape: sparse and nested tensors have not."""
    return tensor.layout is torch.strided and not tensor.is_nested


def _has_data(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and _has_memory(value) and value.numel() > 0
