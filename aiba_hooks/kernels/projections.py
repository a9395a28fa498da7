"""What the functions behind ``nn.MultiheadAttention`` do inside, made again from their arguments: the projections before
attention for the maps, and what comes after it for the check and for edits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aiba_hooks.calls import AttentionCall
from aiba_hooks.checks import deviation
from aiba_hooks.interception import original_of
from aiba_hooks.tagging import Tag

#: queries per sequence at which an encoder layer's output is made again; its feed-forward is twice its projections
CHECKED_QUERIES = 64
#: of the encoder layer's final output, where attention is one summand of several: tighter than the kernels' own. Rounding
#: reaches 3.3e-3 and 2.0e-2 (weights three times the usual); keys rolled by one give 2.5e-2 in float32 as in bfloat16, so a
#: misread call is certain to be seen in float32 (a scale 10 % off: 5e-3 against 2e-4) and not in bfloat16
LAYER_TOLERANCE = {torch.float16: 8e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Heads:
    """Projected query, key and value, and how they attend.

    Attributes
    ----------
    query, key, value : [batch, heads, tokens, head_dim]
    mask : broadcastable to [batch, heads, Tq, Tk]; bool (True attends) or added to the scores
    causal : SDPA's ``is_causal``
    exists : [batch, 1, Tq, 1] bool, queries that are there; None: all
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    causal: bool = False
    exists: Tensor | None = None

    def attend(self, values: Tensor) -> Tensor:
        """Values [batch, heads, Tk, head_dim] to [batch, heads, Tq, head_dim]."""
        attention = original_of(F.scaled_dot_product_attention)
        mask = self.mask
        if mask is not None and mask.is_floating_point():
            mask = mask.to(self.query.dtype)
        answer = attention(self.query, self.key, values.to(self.query.dtype), attn_mask=mask, is_causal=self.causal)
        return answer if self.exists is None else answer.masked_fill(~self.exists, 0)

    def at(self, queries: Tensor) -> Heads:
        """The same for some queries only: [n] positions."""
        mask = self.mask
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., queries, :]
        exists = None if self.exists is None else self.exists[:, :, queries]
        return replace(self, query=self.query[:, :, queries], mask=mask, exists=exists)


# ---- F.multi_head_attention_forward


def read_functional(name: str, arguments: Mapping[str, Any], output: Any) -> AttentionCall:
    """[tokens, batch, channels], or [tokens, channels]."""
    query, key, final = arguments["query"], arguments["key"], output[0]
    count, static = arguments["num_heads"], arguments["static_k"]
    batch = query.shape[1] if query.dim() == 3 else 1
    extra = (arguments["bias_k"] is not None) + bool(arguments["add_zero_attn"])
    keys = (key.shape[0] if static is None else static.shape[1]) + extra

    def project_out(attended: Tensor, bias: Tensor | None) -> Tensor:
        joined = attended.permute(2, 0, 1, 3).flatten(2)
        return F.linear(joined, arguments["out_proj_weight"], bias).reshape(final.shape)

    return _Reading(
        name=name,
        shape=(batch, count, query.shape[0], query.shape[-1] // count),
        keys=keys,
        heads=cache(lambda: _project(arguments, extra)),
        final=final,
        error=lambda heads: deviation(project_out(heads.attend(heads.value), arguments["out_proj_bias"]), final),
        restore=lambda heads, change: (final + project_out(change, None), *output[1:]),
        tag=key_source(query, key, arguments["value"]) if static is None else None,
        dropout=float(arguments["dropout_p"]) if arguments["training"] else 0.0,
    ).call()


def _project(arguments: Mapping[str, Any], extra: int) -> Heads:
    """Query, key and value as ``F.multi_head_attention_forward`` projects them, with the keys that it appends."""
    inputs = [t if t.dim() == 3 else t.unsqueeze(1) for t in (arguments[name] for name in ("query", "key", "value"))]
    if arguments["use_separate_proj_weight"]:
        weights = [arguments[f"{name}_proj_weight"] for name in "qkv"]
    else:
        weights = arguments["in_proj_weight"].chunk(3)
    packed = arguments["in_proj_bias"]
    biases = packed.chunk(3) if packed is not None else (None, None, None)
    batch, count = inputs[0].shape[1], arguments["num_heads"]

    def split(tensor: Tensor) -> Tensor:
        return tensor.reshape(tensor.shape[0], batch, count, -1).permute(1, 2, 0, 3)

    query = split(F.linear(inputs[0], weights[0], biases[0]))
    sides = []
    for side, (name, static) in enumerate((("bias_k", "static_k"), ("bias_v", "static_v")), start=1):
        if arguments[static] is not None:
            tensor = arguments[static].unflatten(0, (batch, count))
        else:
            tensor = F.linear(inputs[side], weights[side], biases[side])
            if arguments[name] is not None:
                tensor = torch.cat([tensor, arguments[name].expand(-1, batch, -1)])
            tensor = split(tensor)
        sides.append(F.pad(tensor, (0, 0, 0, 1)) if arguments["add_zero_attn"] else tensor)
    mask, causal = _merged_mask(arguments, batch, extra, query.dtype)
    return Heads(query, sides[0], sides[1], mask, causal)


def _merged_mask(
    arguments: Mapping[str, Any], batch: int, extra: int, dtype: torch.dtype
) -> tuple[Tensor | None, bool]:
    """``(mask added to the scores, whether the hint is_causal stands for it)``. The appended keys are never masked."""
    mask, padding = arguments["attn_mask"], arguments["key_padding_mask"]
    if arguments["is_causal"] and padding is None and not arguments["need_weights"]:
        return None, True  # torch drops the mask and trusts the hint here, and only here
    merged = None
    if mask is not None:
        mask = _additive(mask, dtype)
        merged = mask if mask.dim() == 2 else mask.unflatten(0, (batch, -1))
    if padding is not None:
        padding = _additive(padding, dtype).reshape(batch, 1, 1, -1)
        merged = padding if merged is None else merged + padding
    if merged is None:
        return None, False
    if merged.dim() == 2:
        merged = merged[None, None]
    return (F.pad(merged, (0, extra)) if extra else merged), False


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask (True is hidden) as what it adds to the scores; a float one as it is."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


# ---- the fast paths


def read_native(name: str, arguments: Mapping[str, Any], output: Any) -> AttentionCall:
    """[batch, tokens, channels], or nested."""
    inputs = [arguments[name] for name in ("query", "key", "value")]
    count, final = arguments["num_head"], output[0]

    def error(heads: Heads) -> Tensor:
        attended = heads.attend(heads.value).transpose(1, 2).flatten(2)
        made = F.linear(attended, arguments["proj_weight"], arguments["proj_bias"])
        return deviation(_where(heads.exists, made), _padded(final))

    def restore(heads: Heads, change: Tensor) -> Any:
        made = F.linear(change.transpose(1, 2).flatten(2), arguments["proj_weight"])
        return final + _nested_like(final, made), *output[1:]

    return _Reading(
        name=name,
        shape=(inputs[0].size(0), count, _longest(inputs[0]), arguments["embed_dim"] // count),
        keys=_longest(inputs[1]),
        heads=cache(lambda: _project_native(inputs, arguments, count)),
        final=final,
        error=error,
        restore=restore,
        tag=key_source(*inputs),
    ).call()


def read_layer(name: str, arguments: Mapping[str, Any], output: Any) -> AttentionCall:
    """[batch, tokens, channels], or nested."""
    source, count, tokens = arguments["src"], arguments["num_heads"], _longest(arguments["src"])

    def project() -> Heads:
        entering = _norm(source, arguments, 1) if arguments["norm_first"] else source
        return _project_native([entering] * 3, arguments, count)

    def error(heads: Heads) -> Tensor:
        chosen = torch.linspace(0, tokens - 1, min(tokens, CHECKED_QUERIES), device=output.device).round().long()
        some = heads.at(chosen)
        made = _rest_of_layer(_padded(source)[:, chosen], some.attend(some.value), arguments)
        return deviation(_where(some.exists, made), _padded(output)[:, chosen])

    def restore(heads: Heads, change: Tensor) -> Any:
        attended, entered = heads.attend(heads.value), _padded(source)
        plain, edited = (_rest_of_layer(entered, x, arguments) for x in (attended, attended + change))
        return output + _nested_like(output, edited - plain)

    return _Reading(
        name=name,
        shape=(source.size(0), count, tokens, arguments["embed_dim"] // count),
        keys=tokens,
        heads=cache(project),
        final=output,
        error=error,
        restore=restore,
        tag=Tag("self", evidence="nn.TransformerEncoderLayer attends to its own input"),
        tolerance=LAYER_TOLERANCE.get(output.dtype),
        inside="self_attn",
    ).call()


def _rest_of_layer(source: Tensor, attended: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """What an encoder layer does after attention: source [batch, n, channels] and attended [batch, heads, n, head_dim] to the
    layer's output [batch, n, channels]."""
    first = arguments["norm_first"]
    joined = attended.transpose(1, 2).flatten(2)
    state = source + F.linear(joined, arguments["proj_weight"], arguments["proj_bias"])
    if not first:
        state = _norm(state, arguments, 1)
    entering = _norm(state, arguments, 2) if first else state
    # the same operator as in the layer: on CUDA its GELU is not F.gelu's
    hidden = torch._addmm_activation(
        arguments["ffn_bias_1"], entering.flatten(0, 1), arguments["ffn_weight_1"].t(), use_gelu=arguments["use_gelu"]
    )
    state = state + F.linear(hidden, arguments["ffn_weight_2"], arguments["ffn_bias_2"]).reshape(state.shape)
    return state if first else _norm(state, arguments, 2)


def _norm(tensor: Tensor, arguments: Mapping[str, Any], which: int) -> Tensor:
    weight, bias = arguments[f"norm_weight_{which}"], arguments[f"norm_bias_{which}"]
    return F.layer_norm(tensor, (arguments["embed_dim"],), weight, bias, arguments["eps"])


def _project_native(inputs: list[Tensor], arguments: Mapping[str, Any], count: int) -> Heads:
    """Query, key and value [batch, tokens, channels] (or nested) as the fast paths project them."""
    weights, biases = arguments["qkv_weight"].chunk(3), arguments["qkv_bias"].chunk(3)
    query, key, value = (
        F.linear(_padded(tensor), weight, bias).unflatten(-1, (count, -1)).transpose(1, 2)
        for tensor, weight, bias in zip(inputs, weights, biases, strict=True)
    )
    if inputs[0].is_nested:  # torch takes no mask beside nested tensors
        there = [_exists(tensor) for tensor in inputs[:2]]
        return Heads(query, key, value, there[1][:, None, None, :], exists=there[0][:, None, :, None])
    mask, kind = arguments["mask"], arguments["mask_type"]
    if mask is None:
        return Heads(query, key, value)
    attends = ~mask.to(torch.bool)  # the fast paths hide whatever is not zero, floats too
    # mask types of torch/nn/modules/activation.py, merge_masks: 0 [Tq, Tk], 1 [batch, Tk], 2 [batch, heads, Tq, Tk]
    return Heads(
        query, key, value, attends[None, None] if kind == 0 else attends[:, None, None] if kind == 1 else attends
    )


def _padded(tensor: Tensor) -> Tensor:
    return torch.nested.to_padded_tensor(tensor, 0.0) if tensor.is_nested else tensor


def _lengths(tensor: Tensor) -> list[int]:
    return [row.shape[0] for row in tensor.unbind()]


def _longest(tensor: Tensor) -> int:
    return max(_lengths(tensor)) if tensor.is_nested else tensor.shape[1]


def _exists(tensor: Tensor) -> Tensor:
    """[batch, longest] of a nested tensor: True up to each row's length."""
    lengths = torch.tensor(_lengths(tensor), device=tensor.device)
    return torch.arange(_longest(tensor), device=tensor.device) < lengths[:, None]


def _where(exists: Tensor | None, made: Tensor) -> Tensor:
    """[batch, Tq, channels], 0 at queries that do not exist."""
    return made if exists is None else made.masked_fill(~exists[:, 0], 0)


def _nested_like(final: Tensor, padded: Tensor) -> Tensor:
    """[batch, longest, channels] as ragged as the model's own output."""
    if not final.is_nested:
        return padded
    return torch.nested.as_nested_tensor([row[:length] for row, length in zip(padded, _lengths(final), strict=True)])


def key_source(query: Tensor, key: Tensor, value: Tensor) -> Tag:
    """Self where key or value is the query's own tensor, else cross: what the projections read, known from the call itself."""
    if _same(query, key):
        return Tag("self", evidence="nn.MultiheadAttention was given one tensor as query and key")
    if _same(query, value):
        # positions were added to query or key
        return Tag("self", evidence="nn.MultiheadAttention was given one tensor as query and value")
    return Tag("cross", evidence="nn.MultiheadAttention was given another tensor as key than as query")


def _same(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    if one.is_nested or other.is_nested:
        return False
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


@dataclass(frozen=True)
class _Reading:
    """What one of the three functions was called with, as far as the maps need it.

    Attributes
    ----------
    shape : batch, heads, Tq, head_dim
    keys : Tk
    heads : projects; called once, where the call was chosen
    final : the model's own output
    error : relative deviation [] of the output made again
    restore : what an edit of the attended values [batch, heads, Tq, head_dim] makes of the function's return value
    """

    name: str
    shape: tuple[int, int, int, int]
    keys: int
    heads: Callable[[], Heads]
    final: Tensor
    error: Callable[[Heads], Tensor]
    restore: Callable[[Heads, Tensor], Any]
    tag: Tag | None
    dropout: float = 0.0
    tolerance: float | None = None
    inside: str | None = None

    def call(self) -> AttentionCall:
        """With stand-ins, which have shapes but no memory: calls that nobody chose cost no projection."""
        nothing = torch.zeros((), dtype=self.final.dtype, device=self.final.device)
        batch, count, _, width = self.shape
        key = nothing.expand(batch, count, self.keys, width)

        def prepare() -> AttentionCall:
            heads = self.heads()
            return replace(call, query=heads.query, key=heads.key, value=heads.value, prepare=None)

        def reproduction() -> Tensor:
            # under dropout the model's own output is a random draw
            return torch.zeros_like(nothing).float() if self.dropout else self.error(self.heads())

        call = AttentionCall(
            self.name,
            nothing.expand(self.shape),
            key,
            key,
            nothing.expand(self.shape),
            lambda values: self.heads().attend(values),
            dropout=self.dropout,
            tolerance=self.tolerance,
            reproduction=reproduction,
            restore=lambda edited: self.restore(self.heads(), edited),  # the stand-in for the output is 0
            tag=self.tag,
            inside=self.inside,
            prepare=prepare,
        )
        return call
