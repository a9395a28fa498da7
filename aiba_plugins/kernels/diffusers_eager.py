"""diffusers' eager processors, which compute probabilities: ``Attention.get_attention_scores``.

``AttnProcessor``, ``AttnAddedKVProcessor``, ``CustomDiffusionAttnProcessor``, ``IPAdapterAttnProcessor``, their sliced forms, and
the processors of attention-control pipelines call it with query [B·H, Tq, D] and key [B·H, Tk, D], and multiply its result
[B·H, Tq, Tk] with the values. A call here has the module's heads on an axis of their own."""

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


class EagerScores(Kernel):
    """Probabilities as the model makes them. Sliced attention is put together to one call per forward.

    A sliced processor asks for a few of the B·H rows at a time, to need less memory. Its slices are kept until the last one
    (views of the query and key, which are alive anyway), and the call that they make together computes slice by slice too.
    One object serves one capture, so that slices of two captures never mix.
    """

    name = "diffusers:get_attention_scores"
    bindings = (
        "diffusers.models.attention_processor:Attention.get_attention_scores",
        "diffusers.models.attention:AttentionModuleMixin.get_attention_scores",
    )

    # said here, because attention-control code puts functions of (*args) in its place
    signature = inspect.Signature(
        [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", "query", "key")]
        + [Parameter("attention_mask", Parameter.POSITIONAL_OR_KEYWORD, default=None)]
    )

    def __init__(self) -> None:
        self._slices: dict[int, list[_Slice]] = {}

    def read(self, function: Callable[..., Any], arguments: Mapping[str, Any], output: Any) -> AttentionCall | None:
        from aiba_hooks.calls import AttentionCall

        module = arguments["self"]
        if getattr(getattr(module, "processor", None), "slice_size", None) is None:
            return AttentionCall.from_probabilities(self.name, _unfold(output, module.heads))
        return self._sliced(function, arguments, output)

    def _sliced(
        self, function: Callable[..., Any], arguments: Mapping[str, Any], output: Tensor
    ) -> AttentionCall | None:
        module, query = arguments["self"], arguments["query"]
        start, rows = _place(query)
        slices = self._slices.setdefault(id(module), [])
        if start == 0:
            slices.clear()  # left over from a forward that failed
        seen = sum(len(part.query) for part in slices)
        if start != seen or start + len(query) > rows:
            raise RuntimeError(
                f"{self.name}: slices of {type(module.processor).__name__} came out of order: one starts at row {start} of "
                f"{rows} after {seen} rows. Turn slicing off (pipe.disable_attention_slicing()) while it is captured"
            )
        slices.append(_Slice(query, arguments["key"], arguments["attention_mask"], output[..., 0].clone()))
        if start + len(query) < rows:
            return None
        del self._slices[id(module)]
        return _stitch(self.name, function, module, slices)


class _Slice:
    """One slice of the B·H rows: views of the query and key, the mask, and the probabilities of the first key."""

    def __init__(self, query: Tensor, key: Tensor, mask: Tensor | None, first: Tensor) -> None:
        self.query, self.key, self.mask, self.first = query, key, mask, first


def _stitch(name: str, function: Callable[..., Any], module: Any, slices: list[_Slice]) -> AttentionCall:
    """One call [B, H, ...] of all slices. Its values are a stand-in that selects the first key, so that the check column
    compares what is computed again with what every slice returned."""
    import torch

    from aiba_hooks.calls import AttentionCall

    heads, sizes = module.heads, [len(part.query) for part in slices]
    first = _unfold(torch.cat([part.first for part in slices]), heads)  # [B, H, Tq]
    keys = slices[0].key.shape[-2]
    value = first.new_zeros(*first.shape[:2], keys, min(keys, 64))
    value[..., 0, 0] = 1
    output = first.new_zeros(*first.shape, value.shape[-1])
    output[..., 0] = first

    def again(values: Tensor) -> Tensor:
        parts = values.flatten(0, 1).split(sizes)
        answers = [
            function(module, part.query, part.key, part.mask) @ columns
            for part, columns in zip(slices, parts, strict=True)
        ]
        return _unfold(torch.cat(answers), heads)

    # query and key are stand-ins of the right shape (head_dim 0)
    return AttentionCall(name, output[..., :0], value[..., :0], value, output, again)


def _place(query: Tensor) -> tuple[int, int]:
    """Where a slice starts and how many rows there are: it is a view of the whole query, which has a memory of its own."""
    row = query.stride(0)
    return query.storage_offset() // row, query.untyped_storage().nbytes() // (row * query.element_size())


def _unfold(tensor: Tensor, heads: int) -> Tensor:
    """[B·H, ...] as [B, H, ...]; as one head each where the rows are no multiple of the module's heads."""
    if tensor.shape[0] % heads:
        return tensor[:, None]
    return tensor.unflatten(0, (-1, heads))


@hookimpl
def aiba_kernels() -> list[Kernel]:
    return [EagerScores()]
