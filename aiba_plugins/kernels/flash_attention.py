"""FlashAttention 2 (package ``flash_attn``), 3 (module ``flash_attn_interface``) and 4 (``flash_attn.cute``).

One reader for all of them, by the names of their arguments:

- ``q`` [B, Tq, H, D], ``k`` and ``v`` [B, Tk, Hk, D] (``flash_attn_func``), or packed ``kv`` [B, Tk, 2, Hk, D], ``qkv``
  [B, T, 3, H, D], or, in version 3, ``qkv`` [B, T, H + 2 Hk, D] with ``num_heads_q``;
- variable lengths: the same without B, sequences laid end to end as ``cu_seqlens`` [sequences + 1] says. Maps are those of each
  sequence, padded to the longest.

Causal masks are aligned to the bottom right, a query without keys gives zeros: what the kernel does is what is captured, for it
is the kernel that is asked."""

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

_MODULES = (
    "flash_attn",
    "flash_attn.flash_attn_interface",
    "flash_attn_interface",
    "flash_attn.cute",
    "flash_attn.cute.interface",
)
_FUNCTIONS = (
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
)


class FlashAttention(Kernel):
    """Every function of FlashAttention that computes attention of given queries, keys and values."""

    name = "flash_attention"
    bindings = tuple(f"{module}:{function}" for module in _MODULES for function in _FUNCTIONS)

    def read(self, function: Callable[..., Any], arguments: Mapping[str, Any], output: Any) -> AttentionCall | None:
        from aiba_hooks.calls import AttentionCall

        name = f"{self.name}:{function.__name__}"
        self._refuse(name, arguments)
        query, key, value = _unpack(arguments)
        queries, keys = _packing(arguments, "q", query), _packing(arguments, "k", key)
        result = _heads_first(first(output), queries)
        # the kernel multiplies 8-bit values by a scale [B, Hk]; selectors have none
        scale = arguments.get("v_descale")
        if scale is not None:
            scale = scale.to(result.dtype).repeat_interleave(result.shape[1] // scale.shape[1], 1)[..., None, None]
            result = result / scale

        def again(values: Tensor) -> Tensor:
            values = values.transpose(1, 2).to(value.dtype)
            changes = _repack(arguments, query, key, values if keys is None else keys.pack(values))
            answer = call(function, arguments, **changes, dropout_p=0.0, return_attn_probs=False, v_descale=None)
            return _heads_first(first(answer), queries)

        def restore(edited: Tensor) -> Any:
            edited = (edited if scale is None else edited * scale).transpose(1, 2)
            return like(output, edited if queries is None else queries.pack(edited))

        return AttentionCall(
            kernel=name,
            query=_heads_first(query, queries),
            key=_heads_first(key, keys),
            # 8-bit floats are for kernels to read: columns are filled in the output's dtype
            value=_heads_first(value.to(result.dtype) if value.element_size() == 1 else value, keys),
            output=result,
            again=again,
            dropout=float(arguments.get("dropout_p") or 0.0),
            restore=restore,
        )

    def _refuse(self, name: str, arguments: Mapping[str, Any]) -> None:
        if arguments.get("qv") is not None:
            refuse(name, "attention whose scores read the values (qv)", "Run the model without absorbed values")
        for table in ("block_table", "page_table"):
            if arguments.get(table) is not None:
                refuse(name, f"a paged key-value cache ({table})", "Run the model with a contiguous cache, or without")
        if arguments.get("seqused_q") is not None and arguments.get("cu_seqlens_q") is None:
            refuse(name, "a batch whose outputs are written in part (seqused_q)", "Pass packed queries (cu_seqlens_q)")


class FlashCache(Kernel):
    """``flash_attn_with_kvcache`` appends to the cache that it is given: asked again, it would append again."""

    name = "flash_attention"
    bindings = tuple(f"{module}:flash_attn_with_kvcache" for module in _MODULES)

    def read(self, function: Callable[..., Any], arguments: Mapping[str, Any], output: Any) -> AttentionCall | None:
        refuse(
            f"{self.name}:{function.__name__}",
            "attention that writes into a key-value cache",
            "Run the model without this cache (use_cache=False), or with its SDPA implementation, while it is captured",
        )


def _unpack(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [B, T, heads, D], or [total, heads, D] of packed sequences."""
    if "qkv" in arguments:
        qkv, heads = arguments["qkv"], arguments.get("num_heads_q")
        if heads is not None and qkv.ndim == 4:
            shared = (qkv.shape[-2] - heads) // 2
            return qkv.split([heads, shared, shared], dim=-2)
        return qkv.unbind(-3)
    if "kv" in arguments:
        key, value = arguments["kv"].unbind(-3)
        return arguments["q"], key, value
    return arguments["q"], arguments["k"], arguments["v"]


def _repack(arguments: Mapping[str, Any], query: Tensor, key: Tensor, values: Tensor) -> dict[str, Tensor]:
    """The arguments that hold the values, with others in their place."""
    import torch

    if "qkv" in arguments:
        if arguments["qkv"].ndim == 4 and arguments.get("num_heads_q") is not None:
            return {"qkv": torch.cat([query, key, values], -2)}
        return {"qkv": torch.stack([query, key, values], -3)}
    if "kv" in arguments:
        return {"kv": torch.stack([key, values], -3)}
    return {"v": values}


def _packing(arguments: Mapping[str, Any], side: str, tensor: Tensor) -> Packing | None:
    """How the sequences of ``tensor`` are packed, if they are. ``side``: ``"q"`` or ``"k"``."""
    starts = arguments.get(f"cu_seqlens_{side}", arguments.get("cu_seqlens"))
    if starts is None:
        return None
    used = arguments.get(f"seqused_{side}")  # the kernel writes no output past it
    lengths = starts.diff() if used is None else used
    longest = arguments.get(f"max_seqlen_{side}", arguments.get("max_seqlen"))
    longest = int(lengths.max()) if longest is None else int(longest)
    return Packing.of(starts[:-1], lengths, longest, tensor.shape[0])


def _heads_first(tensor: Tensor, packing: Packing | None) -> Tensor:
    """[B, T, heads, D], or [total, heads, D] packed, as [B, heads, T, D]."""
    return (tensor if packing is None else packing.pad(tensor)).transpose(1, 2)


@hookimpl
def aiba_kernels() -> list[Kernel]:
    return [FlashAttention(), FlashCache()]
