"""Calls whose formula is known: softmax(scale · query·keyᵀ + mask). Single keys of them need not be asked a few at a time.

A kernel shows as many keys per ask as its values are wide, so every key of 1024 at a head dimension of 32 are 34 calls. Where
an adapter declares the formula, a block of queries against all keys gives the same numbers in one pass. That repeats the
kernel's softmax, so the check column is more than a formality here: it is multiplied with the very same probabilities, and
compared with the model's own output at every query of every head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from aiba_hooks.calls import AttentionCall
    from aiba_hooks.checks import Check

#: bytes of probabilities at a time: what a core's cache holds, and what fills a GPU
BLOCK = {"cpu": 2**20, "cuda": 2**26}
#: queries at a time, at the least: a product of few rows is slow, rather one head than few queries
FEWEST = 32

_Visit = Callable[[int, slice, slice, Tensor], None]


class Softmax(NamedTuple):
    """The formula of a call, where it is softmax(scale · query·keyᵀ + mask) over the keys and nothing besides.

    Attributes
    ----------
    mask : [batch or 1, heads or 1, Tq or 1, Tk or 1], bool (True attends) or added to the scores; None
    causal : query i sees keys 0 to i
    scale : of the scores
    """

    mask: Tensor | None
    causal: bool
    scale: float


def blocks(call: AttentionCall, span: slice | None = None) -> Iterator[tuple[int, slice, slice, Tensor]]:
    """Probabilities of a few queries of a few heads at a time, float32 (float64 of float64).

    Parameters
    ----------
    span : the queries to go through, all by default

    Yields
    ------
    row, heads, queries : of which
    probabilities : [heads, queries, Tk], until the next block; 0 for a query that may see no key, as SDPA has it
    """
    formula = call.formula
    assert formula is not None
    query, key = call.query, call.key
    batch, heads, queries, _ = query.shape
    begin, end = (0, queries) if span is None else (span.start, span.stop)
    keys, repeat = key.shape[2], heads // key.shape[1]
    dtype = _precision(query)
    count, together = _block(end - begin, keys, heads, query.device)
    # fresh memory for each block would take longer to page in than to fill
    memories = query.new_empty(2, together * count * keys, dtype=dtype)
    mask = None if formula.mask is None else formula.mask.expand(batch, heads, queries, keys)
    for row in range(batch):
        turned = key[row].to(dtype).transpose(1, 2)
        if repeat > 1:
            turned = turned.repeat_interleave(repeat, 0)
        for start in range(begin, end, count):
            stop = min(end, start + count)
            for first in range(0, heads, together):
                some = slice(first, min(heads, first + together))
                shape = (some.stop - first, stop - start, keys)
                scores, rates = (memory[: math.prod(shape)].view(shape) for memory in memories)
                torch.bmm(query[row, some, start:stop].to(dtype) * formula.scale, turned[some], out=scores)
                if mask is not None:
                    part = mask[row, some, start:stop]
                    if part.dtype == torch.bool:
                        scores.masked_fill_(~part, float("-inf"))
                    else:
                        scores += part
                if formula.causal:
                    later = torch.ones(stop - start, keys, dtype=torch.bool, device=scores.device).triu_(start + 1)
                    scores.masked_fill_(later, float("-inf"))
                torch.softmax(scores, -1, out=rates)
                if mask is not None:
                    rates.masked_fill_((scores == float("-inf")).all(-1, keepdim=True), 0)
                yield row, some, slice(start, stop), rates


def _precision(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _block(queries: int, keys: int, heads: int, device: torch.device) -> tuple[int, int]:
    """Queries and heads at a time."""
    entries = max(BLOCK.get(device.type, BLOCK["cuda"]) // 4 // keys, 1)
    count = max(min(queries, max(entries, FEWEST)), 1)
    return count, min(heads, max(entries // count, 1))


def _sweep(call: AttentionCall, visit: _Visit) -> Check:
    """Show every block to ``visit``, and check that it makes the model's own output."""
    repeat = call.query.shape[1] // call.value.shape[1]
    column = call.value[..., 0].to(_precision(call.query))
    if repeat > 1:
        column = column.repeat_interleave(repeat, 1)
    made = column.new_empty(call.query.shape[:3])
    with torch.autocast(call.query.device.type, enabled=False):
        for row, heads, queries, rates in blocks(call):
            visit(row, heads, queries, rates)
            made[row, heads, queries] = torch.bmm(rates, column[row, heads, :, None]).squeeze(-1)
    return call.check(made)


def received(call: AttentionCall, mean: bool) -> tuple[Tensor, Check]:
    """Attention that each key receives, the mean over queries of its column: [batch, Tk] of the head mean, or [batch, heads,
    Tk]."""
    batch, heads, queries, _ = call.query.shape
    total = call.query.new_zeros(batch, heads, call.keys, dtype=_precision(call.query))

    def visit(row: int, some: slice, _: slice, rates: Tensor) -> None:
        total[row, some] += rates.sum(1)

    check = _sweep(call, visit)
    total /= queries
    return (total.mean(1) if mean else total).float(), check


def pool(call: AttentionCall, selector: Tensor, mean: bool) -> tuple[Tensor, Check]:
    """Attention pooled over groups of keys with selector columns [batch or 1, Tk, groups], which may be any number: [batch, Tq,
    groups] of the head mean, or [batch, heads, Tq, groups]."""
    batch, heads, queries, _ = call.query.shape
    dtype = _precision(call.query)
    columns = selector.to(dtype).expand(batch, -1, -1)
    extent = (batch, queries, selector.shape[2]) if mean else (batch, heads, queries, selector.shape[2])
    pooled = torch.zeros(extent, device=call.query.device)

    def visit(row: int, some: slice, at: slice, rates: Tensor) -> None:
        if mean:
            pooled[row, at] += rates.sum(0) @ columns[row] / heads
        else:
            pooled[row, some, at] = (rates @ columns[row]).float()

    check = _sweep(call, visit)
    return pooled, check


def from_queries(call: AttentionCall, weights: Tensor, span: slice, mean: bool) -> Tensor:
    """What groups of queries attend to: columns weighted over the queries by [batch, Tq, groups], to [batch, Tk, groups] of
    the head mean, or [batch, heads, Tk, groups]. Only the queries in ``span`` are looked at: the others weigh nothing."""
    batch, heads, _, _ = call.query.shape
    weights = weights[:, span].to(_precision(call.query))
    made = weights.new_zeros(batch, heads, call.keys, weights.shape[2])
    with torch.autocast(call.query.device.type, enabled=False):
        for row, some, at, rates in blocks(call, span):
            made[row, some] += rates.transpose(1, 2) @ weights[row, at.start - span.start : at.stop - span.start]
    return (made.mean(1) if mean else made).float()


def every_key(call: AttentionCall, mean: bool) -> tuple[Tensor, Check]:
    """Every probability: [batch, Tq, Tk] of the head mean, or [batch, heads, Tq, Tk]."""
    batch, heads, queries, _ = call.query.shape
    extent = (batch, queries, call.keys) if mean else (batch, heads, queries, call.keys)
    full = torch.zeros(extent, device=call.query.device)

    def visit(row: int, some: slice, at: slice, rates: Tensor) -> None:
        if mean:
            full[row, at] += rates.sum(0) / heads
        else:
            full[row, some, at] = rates.float()

    check = _sweep(call, visit)
    return full, check


def largest(call: AttentionCall, mean: bool) -> tuple[Tensor, Check]:
    """The largest probability over all keys: [batch, Tq, 1] of the head mean, or [batch, heads, Tq, 1]."""
    batch, heads, queries, _ = call.query.shape
    tops = torch.empty((batch, queries, 1) if mean else (batch, heads, queries, 1), device=call.query.device)
    running: Tensor | None = None

    def visit(row: int, some: slice, at: slice, rates: Tensor) -> None:
        nonlocal running
        if not mean:
            tops[row, some, at] = rates.amax(-1, keepdim=True).float()
            return
        summed = rates.sum(0)
        running = summed if some.start == 0 or running is None else running.add_(summed)
        if some.stop == heads:  # the heads of these queries are complete
            tops[row, at] = (running.amax(-1, keepdim=True) / heads).float()

    check = _sweep(call, visit)
    return tops, check
