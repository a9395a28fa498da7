"""torch's Transformer layers stand aside for whoever watches; a capture must not be the reason, or outputs would move.

``nn.TransformerEncoderLayer`` leaves its fast path where it or any module in it has a forward hook, and it,
``nn.MultiheadAttention`` and ``nn.TransformerEncoder`` leave theirs under any torch-function mode
(``torch/nn/modules/transformer.py``, ``activation.py``). A capture watches with both. So: no hooks inside such layers (their
kernels know what query and key are), the forward of a layer that is itself the target is wrapped rather than hooked, and
the coverage audit looks away inside torch's own modules, where nothing is left for it to find."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from aiba_hooks.interception import PATCHES, unwatched

_Undo = Callable[[], Any]


def watch_forward(
    root: nn.Module, modules: Sequence[nn.Module], before: Callable[..., Any], after: Callable[..., Any]
) -> Iterator[_Undo]:
    """Call ``before(module, args, kwargs)`` and ``after(module, args, output)`` around every forward of ``root``, also if it
    fails, on whichever path torch takes by itself. ``modules`` are ``modules_of(root)``. Yields what undoes each step."""
    kinds = {type(module) for module in modules}
    for cls in (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder):
        if any(issubclass(kind, cls) for kind in kinds):
            key = PATCHES.acquire(cls, "forward", cls.forward, _look_away(cls.forward))
            yield functools.partial(PATCHES.release, key)
    if id(root) not in without_hooks(modules):
        yield root.register_forward_pre_hook(before, with_kwargs=True).remove
        yield root.register_forward_hook(after, always_call=True).remove
        return
    yield from watch_method(root, "forward", root, before, after)


def watch_method(
    owner: nn.Module, name: str, root: nn.Module, before: Callable[..., Any], after: Callable[..., Any]
) -> Iterator[_Undo]:
    """Call ``before(root, args, kwargs)`` and ``after(root, args, output)`` around ``owner.name(...)``, also if it fails.
    Yields what undoes each step."""
    observer = (before, after)
    function = getattr(owner, name)
    key = PATCHES.acquire(owner, name, function, _observed(function, root))
    observers = vars(owner)[name].observers  # another capture's may be installed already
    observers.append(observer)
    yield functools.partial(PATCHES.release, key)
    yield functools.partial(observers.remove, observer)


def modules_of(root: nn.Module) -> list[nn.Module]:
    """``list(root.modules())``, in its order; a large model is entered faster without the names that torch spells out."""
    found: dict[int, nn.Module] = {}
    waiting = [root]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting.extend(child for child in reversed(module._modules.values()) if child is not None)
    return list(found.values())


def without_hooks(modules: Sequence[nn.Module]) -> set[int]:
    """Ids of those of ``modules`` that must have no hooks."""
    if not any(issubclass(kind, nn.TransformerEncoderLayer) for kind in set(map(type, modules))):
        return set()
    layers = (m for m in modules if isinstance(m, nn.TransformerEncoderLayer) and _is_torchs(m))
    return {id(module) for layer in layers for module in layer.modules()}


def _is_torchs(module: nn.Module) -> bool:
    """Whether the attention below one of torch's Transformer modules is torch's own."""
    if isinstance(module, nn.TransformerEncoderLayer):
        return isinstance(module.self_attn, nn.MultiheadAttention)
    # an encoder's nested path is for torch's own layers only
    return isinstance(module, nn.MultiheadAttention) or getattr(module, "use_nested_tensor", False)


def _look_away(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def unwatched_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not _is_torchs(self):
            return forward(self, *args, **kwargs)
        with unwatched():
            return forward(self, *args, **kwargs)

    return unwatched_forward


def _observed(forward: Callable[..., Any], root: nn.Module) -> Callable[..., Any]:
    observers: list[Any] = []

    @functools.wraps(forward)
    def observed(*args: Any, **kwargs: Any) -> Any:
        called = list(observers)
        output = None
        try:
            for before, _ in called:
                before(root, args, kwargs)
            output = forward(*args, **kwargs)
        finally:
            for _, after in called:
                after(root, args, output)
        return output

    observed.observers = observers  # type: ignore[attr-defined]
    return observed
