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
        from aiba_hooks.calls import AttentionCall

        query, key, value = arguments["query"], arguments["key"], arguments["value"]
        options = {name: arguments[name] for name in _OPTIONAL}
        options["dropout_p"] = 0.0  # asking with dropout would move the generator, and so the model
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
            dropout=float(arguments["dropout_p"]),
            restore=lambda edited: edited.reshape(output.shape),
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
