"""AttentionCall: one kernel invocation, normalised, and what can be asked of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aiba_hooks.checks import Check
from aiba_hooks.dense import Softmax

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
    formula : the call in plain terms, where it is a softmax of query and key that the adapter knows exactly (4-dimensional
        arguments only); all keys are then read in one pass, and fused kernels may pool. None asks the kernel, always
    narrow : the same call of some rows of the batch, from start to stop; None where its rows do not stand alone
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
    formula: Softmax | None = None
    narrow: Callable[[int, int], AttentionCall] | None = None
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
        pooled, check = self.pool(selectors, reduce)
        return pooled, check.error

    def pool(
        self,
        selectors: Tensor,
        reduce: Callable[[Tensor], Tensor] | None = None,
        templates: list[Tensor] | None = None,
    ) -> tuple[Tensor, Check]:
        """As :meth:`ask`, with the check not yet compared.

        Parameters
        ----------
        templates : values of earlier calls with these selectors, laid out as this call's; empty the first time, and filled
            then. Only the check column of them is written again
        """
        parts, check = [], None
        width, count = self.value.shape[-1], selectors.shape[-1]
        templates = [] if templates is None else templates
        for number, (start, stop, offset) in enumerate(_spans(count, width)):
            if number == len(templates):
                # a compiled kernel is specialised on the strides of its values
                columns = torch.zeros_like(self.value)
                wanted = selectors[:, None, :, start:stop].to(columns.dtype)
                columns[..., offset : offset + stop - start] = wanted
                templates.append(columns)
            columns = templates[number]
            if number == 0:
                columns[..., 0] = self.value[..., 0]
            answer = self.again(columns)
            if number == 0:
                check = self.check(answer[..., 0])
            answer = answer[..., offset : offset + stop - start]
            parts.append(answer if reduce is None else reduce(answer))
        assert check is not None
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)), check

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
        for wanted, answer, check in self.single_keys(positions):
            error = answer.new_zeros((), dtype=torch.float32) if check is None else check.error
            yield wanted, answer, error

    def single_keys(self, positions: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor, Check | None]]:
        """As :meth:`ask_keys`, with the check of the first chunk not yet compared, and None after it."""
        if positions is None:
            positions = torch.arange(self.keys, device=self.value.device)
        check = None
        for start, stop, offset in _spans(len(positions), self.value.shape[-1]):
            columns, wanted = torch.zeros_like(self.value), positions[start:stop]
            if offset:
                columns[..., 0] = self.value[..., 0]
            columns[:, :, wanted, torch.arange(offset, offset + len(wanted), device=columns.device)] = 1
            answer = self.again(columns)
            if offset:
                check = self.check(answer[..., 0])
            if stop > start or not len(positions):  # values of width 1 leave no room beside the check column
                yield wanted, answer[..., offset : offset + stop - start], check
                check = None

    @property
    def known(self) -> bool:
        """Whether the formula can stand for the kernel: it is declared, and torch does not round float32 products to less, which
        kernels do each in their own way."""
        exact = self.query.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
        return self.formula is not None and exact

    @property
    def asks(self) -> int:
        """How many times the kernel would have to be asked for every key."""
        return -(-(self.keys + 1) // self.value.shape[-1])

    def check(self, answer: Tensor) -> Check:
        """The check column [batch, heads, Tq] as it came back, beside the model's own."""
        if self.reproduction is not None:
            return Check("error", self.reproduction())
        return Check("columns", torch.stack([answer, self.output[..., 0].to(answer.dtype)]))

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


def _spans(count: int, width: int) -> Iterator[tuple[int, int, int]]:
    """``(start, stop, offset)`` of ``count`` columns in as many asks as their width allows; column 0 of the first is the
    check's, so that its selectors begin at 1.

    Columns are as wide as the values, because fused kernels limit or specialise on the head dimension.
    """
    start, offset = 0, 1
    while offset or start < count:
        stop = min(count, start + width - offset)
        yield start, stop, offset
        start, offset = stop, 0
