"""diffusers' attention dispatcher, with whichever backend it dispatches to.

``diffusers.models.attention_dispatch.dispatch_attention_fn`` (diffusers 0.39 to 0.42): query [B, Tq, H, D], key and value
[B, Tk, Hk, D], output [B, Tq, H, D]. The model files import it by name. Backends that end in SDPA, flex or FlashAttention are
seen here only: the outermost interceptor wins."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from aiba_hooks.kernel import Kernel
from aiba_hooks.specs import hookimpl
from aiba_plugins.kernels import sage_attention
from aiba_plugins.kernels.arguments import call, first, like, refuse

if TYPE_CHECKING:
    from torch import Tensor

    from aiba_hooks.calls import AttentionCall

#: backends that are torch's SDPA
_SDPA = {"native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math"}


class DispatchedAttention(Kernel):
    """The dispatcher of diffusers' newer models. The kernel's name says which backend ran: ``diffusers:native``."""

    name = "diffusers"
    bindings = ("diffusers.models.attention_dispatch:dispatch_attention_fn",)

    def read(self, function: Callable[..., Any], arguments: Mapping[str, Any], output: Any) -> AttentionCall | None:
        from aiba_hooks.calls import AttentionCall
        from aiba_hooks.dense import Softmax

        backend = _backend(function, arguments)
        name = f"{self.name}:{backend}"
        if arguments.get("parallel_config") is not None:
            refuse(
                name,
                "context-parallel attention (parallel_config), where each device holds a part of the sequence,",
                "Run the model without enable_parallelism while it is captured",
            )
        # attention_kwargs are handed to the backend over the arguments proper
        options = dict(arguments.get("attention_kwargs") or {})
        dropout = options.pop("dropout_p", arguments["dropout_p"])

        def again(values: Tensor) -> Tensor:
            answer = call(
                function, arguments, value=values.transpose(1, 2), dropout_p=0.0, attention_kwargs=options or None
            )
            return first(answer).transpose(1, 2)

        query, key, mask = arguments["query"], arguments["key"], arguments.get("attn_mask")
        plain = backend in _SDPA and not options and (mask is None or mask.ndim == 4)
        formula = None
        if plain and query.shape[2] % key.shape[2] == 0:
            scale = arguments.get("scale")
            scale = query.shape[3] ** -0.5 if scale is None else scale
            formula = Softmax(mask, bool(arguments.get("is_causal")), scale)

        def narrow(start: int, stop: int) -> AttentionCall:
            rows = slice(start, stop)
            some = {side: arguments[side][rows] for side in ("query", "key", "value")}
            some["attn_mask"] = mask[rows] if mask is not None and mask.shape[0] > 1 else mask
            made = self.read(function, {**arguments, **some}, first(output)[rows])
            assert made is not None
            return made

        return AttentionCall(
            kernel=name,
            query=arguments["query"].transpose(1, 2),
            key=arguments["key"].transpose(1, 2),
            value=arguments["value"].transpose(1, 2),
            output=first(output).transpose(1, 2),
            again=again,
            dropout=float(dropout),
            tolerance=sage_attention.TOLERANCE if "sage" in backend else None,
            restore=lambda edited: like(output, edited.transpose(1, 2)),
            formula=formula,
            narrow=narrow if plain else None,
        )


def _backend(function: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """Which backend this call went to: its own, else the one that is active."""
    backend = arguments.get("backend")
    registry = getattr(sys.modules.get(function.__module__), "_AttentionBackendRegistry", None)
    if backend is None and registry is not None:
        backend, _ = registry.get_active_backend()
    return str(getattr(backend, "value", backend))


@hookimpl
def aiba_kernels() -> list[Kernel]:
    return [DispatchedAttention()]
