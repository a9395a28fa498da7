"""torch.nn.attention.flex_attention, eager and compiled.

Compiled code calls no Python function, but ``torch.compile(flex_attention)`` is itself one: it is found wherever a module
global or an attribute of the target's modules holds it, intercepted there, and asked again as it was called. It is
specialised on what it was called with, so an ask must look the same to it or it would be compiled again: the values have the
strides of the model's own, the grad and inference modes are those of the model's call, and ``return_lse`` and the rest stay
as they were."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any

from aiba_hooks.kernel import Kernel
from aiba_hooks.specs import hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from aiba_hooks.calls import AttentionCall

_HOME = "torch.nn.attention.flex_attention"


class FlexAttention(Kernel):
    """flex attention with its ``score_mod``, ``block_mask``, scale and grouping. Layout [batch, heads, tokens, head_dim].

    ``functools.partial`` and ``torch.compile`` of it, in any order, are the same kernel.
    """

    name = "flex_attention"
    bindings = (f"{_HOME}:flex_attention",)

    def places(self, modules: Sequence[Any]) -> Iterator[tuple[Any, Any, Any]]:
        from aiba_hooks.interception import original_of

        yield from super().places(modules)
        if _HOME not in sys.modules:
            return
        flex = original_of(sys.modules[_HOME].flex_attention)
        derived = {id(f): f for f in map(original_of, _wrapping(modules)) if _derives(f, flex)}
        # a registry of our own: whoever holds one of them by value is found by their identity
        registry = dict(enumerate(derived.values()))
        for key, function in registry.items():
            yield registry, key, function

    def read(self, function: Callable[..., Any], arguments: Mapping[str, Any], output: Any) -> AttentionCall | None:
        import torch

        from aiba_hooks.calls import AttentionCall

        query, key, value = arguments["query"], arguments["key"], arguments["value"]
        final = output[0] if isinstance(output, tuple) else output
        if final.is_cuda and replays_graphs(function):
            raise RuntimeError(
                "this compiled flex_attention replays CUDA graphs: asked again, it would overwrite the model's own output. "
                "Compile it without them (mode='max-autotune-no-cudagraphs', or the default) while it is captured"
            )
        if key.shape[0] != query.shape[0]:  # one batch row of keys for all queries
            key, value = (tensor.expand(query.shape[0], -1, -1, -1) for tensor in (key, value))
        if value.dtype.itemsize == 1:  # 8-bit floats cannot be indexed, nor hold weights such as 1/n
            value = value.to(query.dtype)
        inference = torch.is_inference_mode_enabled()
        # where no tensor needs a gradient none is recorded; elsewhere an ask is compiled once more, without
        harmless = torch.is_grad_enabled() and not any(t.requires_grad for t in (query, key, value))

        def again(values: Tensor) -> Tensor:
            watching, outside = not torch.is_grad_enabled(), not torch.is_inference_mode_enabled()
            values = _like(values, value)
            with torch.inference_mode(inference), torch.set_grad_enabled(harmless or not watching):
                answer = function(**{**arguments, "key": key, "value": values})
            answer = answer[0] if isinstance(answer, tuple) else answer
            if inference and outside:
                return answer.clone()  # an inference tensor cannot be added to
            return answer.detach() if watching else answer

        return AttentionCall(
            kernel=self.name,
            query=query,
            key=key,
            value=value,
            output=final,
            again=again,
            restore=lambda edited: (edited, *output[1:]) if isinstance(output, tuple) else edited,
        )


#: exact types of what may wrap a function
_WRAPS = {staticmethod, functools.partial, FunctionType}


def _wrapping(modules: Sequence[Any]) -> list[Any]:
    """Functions that wrap another, and partials, among globals of imported modules and attributes of the target's modules."""
    from aiba_hooks.interception import classes_of, loaded_modules

    spaces = [getattr(module, "__dict__", {}) for module in (*loaded_modules(), *modules)]
    spaces += map(vars, classes_of(modules))
    found = []
    for space in spaces:
        # by exact type: asking a lazily imported name for an attribute would import it. What wraps a function is a closure, and of
        # tens of thousands of functions few are
        for value in [
            v for v in list(space.values()) if type(v) in _WRAPS and (type(v) is not FunctionType or v.__closure__)
        ]:
            held = value.__func__ if type(value) is staticmethod else value
            if type(held) is functools.partial or (type(held) is FunctionType and hasattr(held, "__wrapped__")):
                found.append(held)
    return found


def _derives(function: Any, flex: Any) -> bool:
    """Whether ``function`` is ``flex`` under ``torch.compile`` or ``functools.partial`` with keywords."""
    from aiba_hooks.interception import original_of

    found = function
    while True:
        if type(found) is functools.partial and not found.args:
            found = original_of(found.func)
        elif type(found) is FunctionType and "_torchdynamo_orig_callable" in vars(found):
            found = vars(found)["_torchdynamo_orig_callable"]
            # torch.compile gives what is no function one of its own
            found = original_of(found if type(found) is not FunctionType else getattr(found, "__wrapped__", found))
        else:
            return found is flex and function is not flex


def replays_graphs(function: Any) -> bool:
    """Whether a compiled function was compiled to record and replay CUDA graphs (``mode="reduce-overhead"``)."""
    config = getattr(function, "get_compiler_config", None)
    return bool(((config and config()) or {}).get("triton.cudagraphs"))


def _like(values: Tensor, model: Tensor) -> Tensor:
    """``values`` laid out as the model's own, and an inference tensor if those are."""
    import torch

    strides = model.stride() if _distinct(model) else values.stride()
    if values.stride() == strides and values.is_inference() == model.is_inference():
        return values
    with torch.inference_mode(model.is_inference()):
        return torch.empty_strided(values.shape, strides, dtype=values.dtype, device=values.device).copy_(values)


def _distinct(tensor: Tensor) -> bool:
    """Whether no two elements share memory, by the strides alone: expanded and unfolded values cannot hold selectors."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return False
            reach += stride * (size - 1)
    return True


@hookimpl
def aiba_kernels() -> list[Kernel]:
    return [FlexAttention()]
