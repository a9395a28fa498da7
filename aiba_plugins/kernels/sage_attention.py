"""SageAttention: attention with 8-bit queries and keys, and from version 2 on 8-bit (version 3: 4-bit) values.

Functions of the packages ``sageattention`` (1 and 2) and ``sageattn3``. Layout HND [B, H, T, D] or NHD [B, T, H, D]; the
variable-length function takes packed sequences [total, H, D]."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from aiba_hooks.kernel import Kernel
from aiba_hooks.specs import hookimpl
from aiba_plugins.kernels.arguments import call, first, like
from aiba_plugins.kernels.packing import Packing

if TYPE_CHECKING:
    from torch import Tensor

    from aiba_hooks.calls import AttentionCall

#: of the check column, relative: values of 8 bits have 3 or 4 bits of mantissa
TOLERANCE = 6e-2

_FUNCTIONS = (
    "sageattn",
    "sageattn_qk_int8_pv_fp16_triton",
    "sageattn_qk_int8_pv_fp16_cuda",
    "sageattn_qk_int8_pv_fp8_cuda",
    "sageattn_qk_int8_pv_fp8_cuda_sm90",
)


class SageAttention(Kernel):
    """SageAttention of whole batches. ``sageattn3_blackwell`` has no argument for the layout: it is HND."""

    name = "sage_attention"
    bindings = (
        *(f"{module}:{name}" for module in ("sageattention", "sageattention.core") for name in _FUNCTIONS),
        *(f"{module}:sageattn3_blackwell" for module in ("sageattn3", "sageattn3.api")),
    )

    def read(self, function: Callable[..., Any], arguments: Mapping[str, Any], output: Any) -> AttentionCall | None:
        from aiba_hooks.calls import AttentionCall

        tokens_first = arguments.get("tensor_layout") == "NHD"

        def place(tensor: Tensor) -> Tensor:
            return tensor.transpose(1, 2) if tokens_first else tensor

        def again(values: Tensor) -> Tensor:
            # versions 1 and 3 subtract the mean from the key in place: the model's own must not move a second time
            return place(first(call(function, arguments, k=arguments["k"].clone(), v=place(values))))

        return AttentionCall(
            kernel=f"{self.name}:{function.__name__}",
            query=place(arguments["q"]),
            key=place(arguments["k"]),
            value=place(arguments["v"]),
            output=place(first(output)),
            again=again,
            tolerance=TOLERANCE,
            restore=lambda edited: like(output, place(edited)),
        )


class PackedSageAttention(Kernel):
    """``sageattn_varlen``: maps are those of each sequence, padded to the longest."""

    name = "sage_attention"
    bindings = ("sageattention:sageattn_varlen", "sageattention.core:sageattn_varlen")

    def read(self, function: Callable[..., Any], arguments: Mapping[str, Any], output: Any) -> AttentionCall | None:
        from aiba_hooks.calls import AttentionCall

        queries, keys = (
            Packing.of(starts[:-1], starts.diff(), int(arguments[f"max_seqlen_{name}"]), arguments[name].shape[0])
            for name, starts in ((name, arguments[f"cu_seqlens_{name}"]) for name in ("q", "k"))
        )

        def again(values: Tensor) -> Tensor:
            packed = keys.pack(values.transpose(1, 2))
            return queries.pad(call(function, arguments, k=arguments["k"].clone(), v=packed)).transpose(1, 2)

        return AttentionCall(
            kernel=f"{self.name}:{function.__name__}",
            query=queries.pad(arguments["q"]).transpose(1, 2),
            key=keys.pad(arguments["k"]).transpose(1, 2),
            value=keys.pad(arguments["v"]).transpose(1, 2),
            output=queries.pad(output).transpose(1, 2),
            again=again,
            tolerance=TOLERANCE,
            restore=lambda edited: queries.pack(edited.transpose(1, 2)),
        )


@hookimpl
def aiba_kernels() -> list[Kernel]:
    return [SageAttention(), PackedSageAttention()]
