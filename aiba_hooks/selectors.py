"""Selector columns: which keys a group pools, and with what weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aiba_hooks.errors import DegeneratePooling

if TYPE_CHECKING:
    from aiba_hooks.calls import AttentionCall
    from aiba_hooks.checks import Check

#: poolings that are one column each, because they are linear in the probabilities
LINEAR = ("sum", "mean", "weighted")
POOLINGS = (*LINEAR, "max", "logmean")
#: of the probability before the logarithm: the smallest normal float32, so that an exact zero stays finite
LOG_FLOOR = 1.1754944e-38


def refuse_degenerate(groups: Mapping[str, Sequence[int]], keys: int, pooling: str, site: str) -> None:
    """Raise where one word's group holds every key: each row of a softmax sums to 1, so its sum is 1 for every query."""
    for name, positions in groups.items():
        if pooling in ("sum", "mean") and len(positions) == keys and not name.startswith("("):
            value = "1" if pooling == "sum" else f"1/{keys}"
            raise DegeneratePooling(
                f"{site}: {name!r} covers all {keys} keys, so pooling={pooling!r} gives {value} for every query whatever the "
                "model does. Choose fewer words, or pooling='max' or 'logmean'"
            )


def columns(
    rows: Sequence[Mapping[str, Sequence[int]]],
    names: Sequence[str],
    keys: int,
    pooling: str,
    relevance: Mapping[str, float] | None = None,
) -> Tensor:
    """Selectors [rows, Tk, groups] for the linear poolings.

    Parameters
    ----------
    rows : per batch row, key positions by group
    names : the groups, one column each; a row without a group gets zeros
    pooling : ``"sum"`` selects with 1; ``"mean"`` (the paper's Eqs. 4, 7) with 1/n over the n keys of a word;
        ``"weighted"`` (Eq. 6) with w/n, w = softmax of ``relevance`` over the words that the row has. Groups in
        parentheses are always sums.
    """
    selector = torch.zeros(len(rows), keys, len(names))
    for row, groups in enumerate(rows):
        total = sum(math.exp(value) for word, value in (relevance or {}).items() if word in groups)
        for column, name in enumerate(names):
            positions = list(groups.get(name, ()))
            if not positions:
                continue
            weight = 1.0 if pooling == "sum" or name.startswith("(") else 1.0 / len(positions)
            if pooling == "weighted" and relevance is not None and name in relevance:
                weight *= math.exp(relevance[name]) / total
            selector[row, positions, column] = weight
    return selector


def pool_nonlinear(
    call: AttentionCall,
    rows: Sequence[Mapping[str, Sequence[int]]],
    names: Sequence[str],
    pooling: str,
    reduce: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Check]:
    """Max (Eq. 5) or log-mean over each group's keys, from single keys asked a few at a time.

    Returns
    -------
    pooled : [batch, ..., Tq, groups] float32, heads as ``reduce`` leaves them; groups in parentheses are sums
    check : of the call
    """
    device = call.value.device
    member = torch.zeros(len(rows), call.keys, len(names), dtype=torch.bool)
    for row, groups in enumerate(rows):
        for column, name in enumerate(names):
            member[row, list(groups.get(name, ())), column] = True
    member = member.to(device)
    summed = torch.tensor([name.startswith("(") for name in names], device=device)
    result: Tensor | None = None
    check: Check | None = None
    for positions, answer, found in call.single_keys():
        check = found or check
        rates = reduce(answer).float()  # [batch, (heads), Tq, m]
        inside = member[:, positions]  # [batch, m, groups]
        inside = inside.reshape(inside.shape[0], *(1,) * (rates.ndim - 2), *inside.shape[1:])
        if result is None:
            start = float("-inf") if pooling == "max" else 0.0
            result = torch.where(summed, 0.0, start).expand(*rates.shape[:-1], len(names)).clone()
        total = torch.where(inside, rates[..., None], 0.0).sum(-2)
        if pooling == "max":
            top = torch.where(inside, rates[..., None], float("-inf")).amax(-2)
            result = torch.where(summed, result + total, torch.maximum(result, top))
        else:
            logs = torch.where(inside, rates[..., None].clamp_min(LOG_FLOOR).log(), 0.0).sum(-2)
            result = result + torch.where(summed, total, logs)
    assert result is not None
    assert check is not None
    if pooling == "logmean":
        counts = member.sum(1).clamp_min(1)  # [batch, groups]
        counts = torch.where(summed, torch.ones_like(counts), counts)
        result = result / counts.reshape(counts.shape[0], *(1,) * (result.ndim - 2), counts.shape[-1])
    return result, check


def means(rows: Sequence[Mapping[str, Sequence[int]]], names: Sequence[str], length: int) -> Tensor:
    """Columns [rows, length, groups] that take the mean over each group's positions, words and others alike."""
    weights = torch.zeros(len(rows), length, len(names))
    for row, groups in enumerate(rows):
        for column, name in enumerate(names):
            positions = list(groups.get(name, ()))
            weights[row, positions, column] = 1.0 / max(len(positions), 1)
    return weights


def received(call: AttentionCall, reduce: Callable[[Tensor], Tensor]) -> tuple[Tensor, Check]:
    """Attention that each key receives: the mean over queries of its column, [batch, (heads), Tk] float32."""
    return _by_keys(call, lambda answer: reduce(answer).float().mean(-2))


def every_key(call: AttentionCall, reduce: Callable[[Tensor], Tensor]) -> tuple[Tensor, Check]:
    """Every probability, [batch, (heads), Tq, Tk] as ``reduce`` leaves it."""
    return _by_keys(call, reduce)


def largest(call: AttentionCall, reduce: Callable[[Tensor], Tensor]) -> tuple[Tensor, Check]:
    """The largest probability over all keys (Eq. 5), [batch, (heads), Tq, 1]."""
    tops, check = _by_keys(call, lambda answer: reduce(answer).amax(-1, keepdim=True))
    return tops.amax(-1, keepdim=True), check


def _by_keys(call: AttentionCall, part_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Check]:
    """The parts of an answer to every key, a few keys at a time, along the last axis; and the check."""
    parts: list[Tensor] = []
    check: Check | None = None
    for _, answer, found in call.single_keys():
        check = found or check
        parts.append(part_of(answer))
    assert check is not None
    return torch.cat(parts, -1), check
