"""xFormers' memory-efficient attention: ``xformers.ops.memory_efficient_attention`` and its forward-only forms.

Layouts: [B, T, D] (one head, or heads folded into the batch), [B, T, H, D], and grouped [B, T, G, H, D], where key and value
are usually expanded over the H heads of a group. Biases are passed on as they are: tensors, and every class of
``xformers.ops.fmha.attn_bias``. The block-diagonal ones say where packed sequences lie; maps are then those of each sequence,
padded to the longest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from aiba_hooks.kernel import Kernel
from aiba_hooks.specs import hookimpl
from aiba_plugins.kernels.arguments import call, first, like, refuse
from aiba_plugins.kernels.packing import Packing

if TYPE_CHECKING:
    from torch import Tensor

    from aiba_hooks.calls import AttentionCall

_MODULES = ("xformers.ops", "xformers.ops.fmha")
_FUNCTIONS = (
    "memory_efficient_attention",
    "memory_efficient_attention_forward",
    "memory_efficient_attention_forward_requires_grad",
)


class MemoryEfficientAttention(Kernel):
    """xFormers, whichever of its operators it dispatches to."""

    name = "xformers"
    bindings = tuple(f"{module}:{function}" for module in _MODULES for function in _FUNCTIONS)

    def read(self, function: Callable[..., Any], arguments: Mapping[str, Any], output: Any) -> AttentionCall | None:
        from aiba_hooks.calls import AttentionCall

        query, key, value, bias = (arguments[name] for name in ("query", "key", "value", "attn_bias"))
        if hasattr(bias, "block_tables"):
            refuse(
                self.name, f"a paged key-value cache ({type(bias).__name__})", "Run the model with a contiguous cache"
            )
        queries, keys = (_packing(bias, side, tensor) for side, tensor in (("q", query), ("k", key)))
        key, lean = _unexpanded(key), _unexpanded(value)

        def again(values: Tensor) -> Tensor:
            values = values.transpose(1, 2)
            if keys is not None:
                values = keys.pack(values)[None]
            if value.ndim == 3:
                values = values[:, :, 0]
            elif value.ndim == 5:
                # the operators for groups want values that are expanded over the heads of a group, not copied
                values = values.unflatten(2, lean.shape[2:4]).expand(-1, -1, -1, value.shape[3], -1)
            return _heads_first(first(call(function, arguments, value=values, p=0.0)), queries)

        def restore(edited: Tensor) -> Any:
            edited = edited.transpose(1, 2)
            edited = edited if queries is None else queries.pack(edited)[None]
            return like(output, edited.reshape(first(output).shape))

        return AttentionCall(
            kernel=self.name,
            query=_heads_first(query, queries),
            key=_heads_first(key, keys),
            value=_heads_first(lean, keys),
            output=_heads_first(first(output), queries),
            again=again,
            dropout=float(arguments["p"]),
            restore=restore,
        )


class PartialAttention(Kernel):
    """``memory_efficient_attention_partial`` sees some of the keys; what they weigh is decided when parts are merged."""

    name = "xformers"
    bindings = tuple(f"{module}:memory_efficient_attention_partial" for module in _MODULES)

    def read(self, function: Callable[..., Any], arguments: Mapping[str, Any], output: Any) -> AttentionCall | None:
        refuse(
            f"{self.name}:{function.__name__}",
            "attention over a part of the keys, merged with others afterwards,",
            "Run the model with memory_efficient_attention over all keys while it is captured",
        )


def _unexpanded(tensor: Tensor) -> Tensor:
    """Keys or values without the expansion over the heads of a group: [B, T, G, 1, D]."""
    return tensor[:, :, :, :1] if tensor.ndim == 5 and tensor.stride(3) == 0 else tensor


def _packing(bias: Any, side: str, tensor: Tensor) -> Packing | None:
    """Where the packed sequences of ``tensor`` [1, total, ...] lie, by a block-diagonal bias. ``side``: ``"q"`` or ``"k"``."""
    import torch

    info = getattr(bias, f"{side}_seqinfo", None)
    if info is None:
        return None
    # start and end of each sequence; the keys of some biases have gaps between them
    spans = torch.tensor(list(info.intervals()), device=tensor.device)
    lengths = spans[:, 1] - spans[:, 0]
    longest = max(end - start for start, end in info.intervals())
    return Packing.of(spans[:, 0], lengths, longest, tensor.shape[1])


def _heads_first(tensor: Tensor, packing: Packing | None) -> Tensor:
    """Any layout as [B, heads, T, D]; groups and their heads are one axis."""
    if tensor.ndim == 3:
        tensor = tensor[:, :, None]
    if tensor.ndim == 5:
        tensor = tensor.flatten(2, 3)
    return (tensor if packing is None else packing.pad(tensor[0])).transpose(1, 2)


@hookimpl
def aiba_kernels() -> list[Kernel]:
    return [MemoryEfficientAttention(), PartialAttention()]
