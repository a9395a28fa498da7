"""AttentionCall: one kernel invocation, normalised, and what can be asked of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from aiba_hooks.tagging import Tag

#: error of the check column that a dtype's rounding explains, relative to the largest output of the call
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class AttentionCall:
    """One invocation of an attention kernel.

    Attributes
    ----------
    kernel : name of the kernel
    query : [batch, heads, Tq, head_dim]
    key : [batch, kv_heads, Tk, head_dim]
    value : [batch, kv_heads, Tk, value_dim]
    output : [batch, heads, Tq, value_dim], the model's own
    again : the kernel with other values: [batch, kv_heads, Tk, value_dim] to [batch, heads, Tq, value_dim], with the call's
        own mask, bias, causality, scale and grouping, and without dropout
    dropout : the model's own dropout probability; the check column means nothing where it is not 0
    tolerance : what the check column may differ by, relative to the largest output; None takes the dtype's
    reproduction : where ``output`` is not the model's own (kernels that show only what comes after their output projection):
        the relative deviation [] of the module's final output made again, instead of the check column
    restore : an output [batch, heads, Tq, value_dim] in the kernel's own return format, for edits; None if it cannot be edited
    tag : what the adapter knows about the source of the keys from the call itself, before any other evidence
    inside : where the call is made above the attention module that it stands for, the name of that module in the calling
        one: the site is then the same whichever path runs
    prepare : where query, key and value are stand-ins of the right shapes, the call with real ones; see ``prepared``
    """

    kernel: str
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    again: Callable[[Tensor], Tensor]
    dropout: float = 0.0
    tolerance: float | None = None
    reproduction: Callable[[], Tensor] | None = None
    restore: Callable[[Tensor], Any] | None = None
    tag: Tag | None = None
    inside: str | None = None
    prepare: Callable[[], AttentionCall] | None = None

    def prepared(self) -> AttentionCall:
        """The call with real tensors, once it was chosen: kernels that project inside spare the others the projections."""
        return self if self.prepare is None else self.prepare()

    @property
    def queries(self) -> int:
        """Tq."""
        return self.query.shape[-2]

    @property
    def keys(self) -> int:
        """Tk."""
        return self.key.shape[-2]

    @property
    def allowed(self) -> float:
        """Tolerance of the check column, relative."""
        return self.tolerance if self.tolerance is not None else TOLERANCE.get(self.output.dtype, 6e-2)

    def ask(self, selectors: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Attention pooled over groups of keys: the kernel, asked again with selector columns for values.

        Parameters
        ----------
        selectors : [batch or 1, Tk, groups], any real dtype
        reduce : applied to every answer before they are joined along the last axis (a head mean, say)

        Returns
        -------
        pooled : [batch, heads, Tq, groups] in the output's dtype, or what ``reduce`` makes of it
        error : [] the check column's largest deviation from the model's own output, relative to the largest output
        """
        selectors = selectors.to(self.value.dtype)

        def fill(columns: Tensor, start: int, stop: int) -> None:
            columns.copy_(selectors[:, None, :, start:stop].expand_as(columns))

        parts, errors = [], []
        for _, _, answer, error in self._asks(selectors.shape[-1], fill):
            parts.append(answer if reduce is None else reduce(answer))
            errors.append(error)
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)), errors[0]

    def ask_keys(self, positions: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Attention to single keys, a few at a time: the identity selector in chunks as wide as the values.

        Parameters
        ----------
        positions : [n] keys wanted, all by default

        Yields
        ------
        positions : [m] the keys of this chunk
        probabilities : [batch, heads, Tq, m]
        error : [] of the check column (0 but in the first chunk, which carries it)
        """
        if positions is None:
            positions = torch.arange(self.keys, device=self.value.device)
        wanted = positions

        def fill(columns: Tensor, start: int, stop: int) -> None:
            columns[:, :, wanted[start:stop], torch.arange(stop - start, device=columns.device)] = 1

        checked = None
        for start, stop, answer, error in self._asks(len(wanted), fill):
            checked = error if checked is None else checked
            if stop > start or not len(wanted):  # values of width 1 leave no room beside the check column
                yield wanted[start:stop], answer, checked
                checked = torch.zeros_like(checked)

    def _asks(self, count: int, fill: Callable[[Tensor, int, int], None]) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Ask for ``count`` columns in as many calls as their width allows: ``(start, stop, answer, error)``.

        Columns are as wide as the values, because fused kernels limit or specialise on the head dimension. Column 0 of
        the first call carries ``value[..., 0]``.
        """
        width = self.value.shape[-1]
        start, first = 0, True
        while first or start < count:
            offset = 1 if first else 0
            stop = min(count, start + width - offset)
            # a compiled kernel is specialised on the strides of its values
            columns = torch.zeros_like(self.value)
            if first:
                columns[..., 0] = self.value[..., 0]
            fill(columns[..., offset : offset + stop - start], start, stop)
            answer = self.again(columns)
            error = self._error(answer[..., 0]) if first else answer.new_zeros((), dtype=torch.float32)
            yield start, stop, answer[..., offset : offset + stop - start], error
            start, first = stop, False

    def _error(self, answer: Tensor) -> Tensor:
        return deviation(answer, self.output[..., 0]) if self.reproduction is None else self.reproduction()

    @classmethod
    def from_probabilities(cls, kernel: str, probabilities: Tensor, dropout: float = 0.0) -> AttentionCall:
        """A call of a function that returns its probabilities [batch, heads, Tq, Tk]: nothing to ask, nothing to check.

        Query and key are empty stand-ins of the right shape (head_dim 0).
        """
        batch, heads, queries, keys = probabilities.shape
        width = min(keys, 64)
        value = probabilities.new_zeros(batch, heads, keys, width)

        def again(values: Tensor) -> Tensor:
            return probabilities @ values

        return cls(
            kernel,
            probabilities.new_empty(batch, heads, queries, 0),
            probabilities.new_empty(batch, heads, keys, 0),
            value,
            probabilities.new_zeros(batch, heads, queries, width),
            again,
            dropout,
            reproduction=lambda: probabilities.new_zeros((), dtype=torch.float32),
        )


def deviation(answer: Tensor, output: Tensor) -> Tensor:
    """Largest |answer − output| relative to the largest |output|; entries that the model itself made non-finite do not count."""
    if output.dtype != torch.float64:
        answer, output = answer.float(), output.float()
    finite = torch.isfinite(output)
    difference = torch.where(finite, (answer - output).abs(), torch.zeros_like(output))
    scale = torch.where(finite, output.abs(), torch.zeros_like(output)).amax()
    return (torch.nan_to_num(difference.amax(), nan=math.inf) / scale.clamp_min(1e-6)).float()
