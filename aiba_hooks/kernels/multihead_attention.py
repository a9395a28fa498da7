"""The three functions behind ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``.

All of them project inside: they take what comes before the projections and give what comes after the last one. The maps are
those of the projections of the call's own arguments, made again where a call was chosen, and asked through
``F.scaled_dot_product_attention`` with the call's own mask; the check makes the final output again. Weights are arguments of
the calls, so no module's parameter is read (under CPU offload those are ``meta``). Edits add what they change, so that one
which changes nothing leaves the output as it is; weights that the model asked for stay those of the unedited attention.

Which function runs (``torch/nn/modules/activation.py``, ``transformer.py``):

- ``F.multi_head_attention_forward``: training, gradients, cross-attention, ``batch_first=False``, odd heads, float masks, ...
  With ``need_weights=True`` it multiplies a softmax of its own, else it calls SDPA: read here in both cases, because here
  it is known whether query and key are one tensor;
- ``torch._native_multi_head_attention``: self-attention in eval mode without gradients;
- ``torch._transformer_encoder_layer_fwd``: the whole encoder layer, likewise; nested tensors where ``nn.TransformerEncoder``
  was given padding.

Maps of nested tensors are padded to the longest sequence. Keys and queries past the end of theirs are 0: a row that does
not exist attends to nothing, as a fully masked row does in SDPA. NaN would spread into head means and column means.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import TYPE_CHECKING, Any

from aiba_hooks.kernel import Kernel
from aiba_hooks.specs import hookimpl

if TYPE_CHECKING:
    from aiba_hooks.calls import AttentionCall


class MultiHeadAttention(Kernel):
    """``F.multi_head_attention_forward``. Layout [tokens, batch, channels], or [tokens, channels].

    ``add_bias_kv`` and ``add_zero_attn`` each append one key: the maps show it, last.
    """

    name = "multi_head_attention"
    bindings = ("torch.nn.functional:multi_head_attention_forward",)

    def read(self, function: Callable[..., Any], arguments: Mapping[str, Any], output: Any) -> AttentionCall | None:
        from aiba_hooks.kernels.projections import read_functional

        return read_functional(self.name, arguments, output)


def _signature(required: str, **optional: Any) -> inspect.Signature:
    """Of a builtin that has none (``native_functions.yaml`` does)."""
    parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in required.split()]
    return inspect.Signature(
        [*parameters, *(Parameter(n, Parameter.POSITIONAL_OR_KEYWORD, default=d) for n, d in optional.items())]
    )


class NativeMultiHeadAttention(Kernel):
    """``torch._native_multi_head_attention``, the fast path of ``nn.MultiheadAttention``. Layout [batch, tokens, channels]."""

    name = "native_multi_head_attention"
    bindings = ("torch:_native_multi_head_attention",)
    signature = _signature(
        "query key value embed_dim num_head qkv_weight qkv_bias proj_weight proj_bias",
        mask=None,
        need_weights=True,
        average_attn_weights=True,
        mask_type=None,
    )

    def read(self, function: Callable[..., Any], arguments: Mapping[str, Any], output: Any) -> AttentionCall | None:
        from aiba_hooks.kernels.projections import read_native

        return read_native(self.name, arguments, output)


class TransformerEncoderLayer(Kernel):
    """``torch._transformer_encoder_layer_fwd``, the fast path of ``nn.TransformerEncoderLayer``. Layout [batch, tokens,
    channels]. The site is the layer's ``self_attn``, as on the slow path.

    The check makes the whole layer again, norms and feed-forward included, at ``CHECKED_QUERIES`` queries spread over each
    sequence (every key counts in each of them).
    """

    name = "transformer_encoder_layer"
    bindings = ("torch:_transformer_encoder_layer_fwd",)
    signature = _signature(
        "src embed_dim num_heads qkv_weight qkv_bias proj_weight proj_bias use_gelu norm_first eps norm_weight_1 norm_bias_1 "
        "norm_weight_2 norm_bias_2 ffn_weight_1 ffn_bias_1 ffn_weight_2 ffn_bias_2",
        mask=None,
        mask_type=None,
    )

    def read(self, function: Callable[..., Any], arguments: Mapping[str, Any], output: Any) -> AttentionCall | None:
        from aiba_hooks.kernels.projections import read_layer

        return read_layer(self.name, arguments, output)


@hookimpl
def aiba_kernels() -> list[Kernel]:
    return [MultiHeadAttention(), NativeMultiHeadAttention(), TransformerEncoderLayer()]
