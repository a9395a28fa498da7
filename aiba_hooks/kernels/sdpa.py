"""torch.nn.functional.scaled_dot_product_attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import TYPE_CHECKING, Any

from aiba_hooks.kernel import Kernel
from aiba_hooks.specs import hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from aiba_hooks.calls import AttentionCall

_OPTIONAL = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


class ScaledDotProductAttention(Kernel):
    """SDPA, whichever backend it dispatches to. Layout [..., heads, tokens, head_dim]."""

    name = "sdpa"
    bindings = ("torch.nn.functional:scaled_dot_product_attention",)
    # a builtin without an inspectable signature
    signature = inspect.Signature(
        [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in ("query", "key", "value")]
        + [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=value) for name, value in _OPTIONAL.items()]
    )

    def read(self, function: Callable[..., Any], arguments: Mapping[str, Any], output: Any) -> AttentionCall | None:
        query, key, value = arguments["query"], arguments["key"], arguments["value"]
        options = {name: arguments[name] for name in _OPTIONAL}
        options["dropout_p"] = 0.0  # asking with dropout would move the generator, and so the model
        dropout = float(arguments["dropout_p"])
        if query.ndim == key.ndim == value.ndim == 4 and query.shape[0] == key.shape[0] == value.shape[0]:
            return _batched(function, (query, key, value, output), options, dropout)
        from aiba_hooks.calls import AttentionCall

        leading = value.shape[:-2]

        def again(values: Tensor) -> Tensor:
            return _to_four(function(query, key, values.reshape(*leading, *values.shape[-2:]), **options))

        return AttentionCall(
            kernel=self.name,
            query=_to_four(query),
            key=_to_four(key),
            value=_to_four(value),
            output=_to_four(output),
            again=again,
            dropout=dropout,
            restore=lambda edited: edited.reshape(output.shape),
        )


def _batched(
    function: Callable[..., Any],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    options: Mapping[str, Any],
    dropout: float,
) -> AttentionCall:
    """A call of four axes, the usual one: its formula is known, and its rows of the batch stand alone."""
    from aiba_hooks.calls import AttentionCall
    from aiba_hooks.dense import Softmax

    query, key, value, output = tensors
    mask, scale = options["attn_mask"], options["scale"]
    plain = not any(tensor.is_nested for tensor in tensors) and (mask is None or mask.ndim <= 4)
    formula = None
    if plain and query.shape[1] % key.shape[1] == 0 and value.shape[1] == key.shape[1]:
        four = None if mask is None else mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
        formula = Softmax(four, bool(options["is_causal"]), query.shape[3] ** -0.5 if scale is None else scale)

    def narrow(start: int, stop: int) -> AttentionCall:
        rows = slice(start, stop)
        some = options
        if mask is not None and mask.ndim == 4 and mask.shape[0] > 1:
            some = {**options, "attn_mask": mask[rows]}
        return _batched(function, (query[rows], key[rows], value[rows], output[rows]), some, dropout)

    return AttentionCall(
        kernel=ScaledDotProductAttention.name,
        query=query,
        key=key,
        value=value,
        output=output,
        again=lambda values: function(query, key, values, **options),
        dropout=dropout,
        restore=lambda edited: edited,
        formula=formula,
        narrow=narrow if plain else None,
    )


def _to_four(tensor: Tensor) -> Tensor:
    """[T, D], [B, T, D], [B, H, T, D] or more leading axes, as [batch, heads, tokens, dim]."""
    if tensor.ndim == 4:
        return tensor
    if tensor.ndim < 4:
        return tensor.reshape(tensor.shape[0] if tensor.ndim == 3 else 1, 1, *tensor.shape[-2:])
    return tensor.reshape(tensor.shape[0], -1, *tensor.shape[-2:])


@hookimpl
def aiba_kernels() -> list[Kernel]:
    return [ScaledDotProductAttention()]
