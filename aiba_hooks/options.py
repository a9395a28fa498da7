"""What a capture was asked for, checked when it is made."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiba_hooks import selectors
from aiba_hooks.errors import DegeneratePooling
from aiba_hooks.tagging import KINDS

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Options:
    """The arguments of :func:`aiba_hooks.capture`, in one form each.

    Attributes
    ----------
    words : None for every word
    relevance : word → value, where ``words`` was a mapping
    branches : one or both guidance branches
    reduced : whether steps are averaged as they come
    step_weights : their weights, None for equal ones
    budget : bytes

    The others are those of ``capture``.
    """

    words: list[str] | None
    relevance: dict[str, float] | None
    kinds: tuple[str, ...]
    layers: list[str]
    steps: list[int] | slice | None
    branches: tuple[str, ...]
    heads: str
    keep: str
    pooling: str
    reduced: bool
    step_weights: list[float] | None
    budget: int

    @classmethod
    def read(
        cls,
        *,
        words: Sequence[str] | Mapping[str, float] | None = None,
        kinds: Sequence[str] = ("cross",),
        layers: str | Sequence[str] = "*",
        steps: Sequence[int] | slice | None = None,
        branch: str = "conditional",
        heads: str = "mean",
        keep: str = "pooled",
        pooling: str = "sum",
        reduce_steps: bool | str | Sequence[float] = False,
        budget: str | int = "2GiB",
    ) -> Options:
        """Check the arguments of ``capture``.

        Raises
        ------
        ValueError, DegeneratePooling
        """
        _one_of("branch", branch, ("conditional", "unconditional", "both"))
        _one_of("heads", heads, ("mean", "all"))
        _one_of("keep", keep, ("pooled", "full"))
        _one_of("pooling", pooling, selectors.POOLINGS)
        kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        if not kinds:
            raise ValueError("kinds is empty: choose from " + ", ".join(KINDS))
        for kind in kinds:
            _one_of("kinds", kind, KINDS)
        relevance = {str(k): float(v) for k, v in words.items()} if isinstance(words, Mapping) else None
        named = [words] if isinstance(words, str) else None if words is None else [str(word) for word in words]
        if named is not None and not named:
            raise ValueError("words is an empty list: name words of the prompt, or pass None for every word")
        if pooling == "weighted" and relevance is None:
            raise ValueError(
                "pooling='weighted' needs words as a mapping of word to relevance: words={'bass': 1.0, ...}"
            )
        if keep == "pooled" and pooling == "mean" and named is None:
            raise DegeneratePooling(
                "pooling='mean' without words is the mean over all keys, which is 1/Tk for every query whatever the model "
                "does. Name words: words=['bass'], or use pooling='max' or 'logmean'"
            )
        return cls(
            words=named,
            relevance=relevance,
            kinds=kinds,
            layers=[layers] if isinstance(layers, str) else list(layers),
            steps=_steps(steps),
            branches=("conditional", "unconditional") if branch == "both" else (branch,),
            heads=heads,
            keep=keep,
            pooling=pooling,
            reduced=reduce_steps is not False,
            step_weights=_step_weights(reduce_steps),
            budget=parse_bytes(budget),
        )


def _steps(steps: Sequence[int] | slice | None) -> list[int] | slice | None:
    if steps is None or isinstance(steps, slice):
        return steps
    if isinstance(steps, int) or not all(isinstance(step, int) for step in steps):
        raise ValueError(f"steps must be a list of indices, a slice or None, got {steps!r}")
    if not steps:
        raise ValueError("steps is an empty list: nothing would be captured")
    return list(steps)


def _step_weights(reduce_steps: bool | str | Sequence[float]) -> list[float] | None:
    if isinstance(reduce_steps, str) and reduce_steps != "uniform":
        raise ValueError(f"reduce_steps must be False, 'uniform' or a sequence of weights, got {reduce_steps!r}")
    if isinstance(reduce_steps, (bool, str)):
        return None
    weights = [float(weight) for weight in reduce_steps]
    if not weights or min(weights) < 0 or not sum(weights) > 0:
        raise ValueError("reduce_steps weights must be non-negative and not all zero")
    return weights


def parse_bytes(budget: str | int) -> int:
    """``"2GiB"``, ``"500 MB"`` or a number of bytes, as bytes."""
    if isinstance(budget, (int, float)) and not isinstance(budget, bool):
        if not budget > 0 or math.isinf(budget):
            raise ValueError(f"budget must be a positive number of bytes, got {budget!r}")
        return int(budget)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(budget))
    if match is None or match.group(2).lower() not in _UNITS or float(match.group(1)) <= 0:
        raise ValueError(f"budget must be bytes or a size such as '500MB' or '2GiB', got {budget!r}")
    return int(float(match.group(1)) * _UNITS[match.group(2).lower()])


def _one_of(name: str, value: Any, options: Iterable[str]) -> None:
    options = tuple(options)
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}; got {value!r}")
