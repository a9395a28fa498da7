"""Run: one pipeline call inside a capture. Which step a forward is, and which of its rows are which guidance branch."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from aiba_hooks import interception
from aiba_hooks.backbone import Backbone, Conditioning, Step
from aiba_hooks.errors import BackboneMismatch


@dataclass
class Run:
    """One pipeline call.

    Attributes
    ----------
    conditioning : None without a backbone
    forwards : of the denoiser, so far
    steps : one entry per denoiser step
    order : denoiser rows in the order of the returned audio, if they are ranked
    seeds : of the generators of the first noise
    selected : the steps to keep, where they are known beforehand
    """

    conditioning: Conditioning | None = None
    forwards: int = 0
    steps: list[Step] = field(default_factory=list)
    order: list[int] | None = None
    seeds: list[int] | None = None
    selected: set[int] | None = None

    def settle_waveforms(self, backbone: Backbone, batch: int | None) -> None:
        """Where the backbone leaves the number of waveforms open, the batch that the denoiser is given tells it."""
        conditioning = self.conditioning
        if conditioning is None or conditioning.waveforms is not None:
            return
        held = conditioning.guided and backbone.batched and not backbone.branches_inside
        branches = len(backbone.branches) if held else 1
        per_prompt, rest = divmod(batch or 0, branches * len(conditioning.prompts))
        if rest or not per_prompt:
            raise BackboneMismatch(
                f"the denoiser's batch is {batch}, which {len(conditioning.prompts)} prompts × {branches} guidance "
                f"branches do not divide (backbone {backbone.name!r})"
            )
        self.conditioning = replace(conditioning, waveforms=per_prompt)

    def place(
        self, backbone: Backbone | None, target: Any, arguments: Mapping[str, Any]
    ) -> tuple[int, dict[str, tuple[int, int] | None]]:
        """Step index of the forward that begins, and which of its rows belong to which branch (None: all of them)."""
        conditioning = self.conditioning
        if backbone is None or conditioning is None:
            return self.forwards, {}
        if not backbone.guided(target, arguments, conditioning):
            return self.forwards, {"conditional": None}
        if backbone.batched:
            rows = conditioning.rows
            return self.forwards, {b: (i * rows, (i + 1) * rows) for i, b in enumerate(backbone.branches)}
        step, position = divmod(self.forwards, len(backbone.branches))
        return step, {backbone.branches[position]: None}

    def select(self, steps: list[int] | slice | None, total: int | None) -> None:
        """Resolve the steps asked for, once the number of steps is known (or known to be unknown).

        Raises
        ------
        ValueError
            They reach outside the run, or count from an end that is not known.
        """
        if steps is None:
            return
        if isinstance(steps, slice):
            bounds = (steps.start or 0, steps.stop or 0, steps.step or 1)
            if total is None and min(bounds) < 0:
                raise ValueError(f"steps={steps} counts from the end, but the number of steps is not known here")
            stop = total if total is not None else sys.maxsize
            self.selected = None if total is None else set(range(*steps.indices(stop)))
            return
        if total is None and min(steps) < 0:
            raise ValueError(f"steps={steps} counts from the end, but the number of steps is not known here")
        chosen = {step + total if step < 0 and total is not None else step for step in steps}
        if total is not None and not all(0 <= step < total for step in chosen):
            raise ValueError(f"steps={steps} reaches outside the {total} steps of this run")
        self.selected = chosen

    def wants(self, step: int, steps: list[int] | slice | None) -> bool:
        """Whether a step is one of those asked for."""
        if self.selected is not None:
            return step in self.selected
        if isinstance(steps, slice):
            start, stride = steps.start or 0, steps.step or 1
            inside = step >= start and (steps.stop is None or step < steps.stop)
            return inside and (step - start) % stride == 0
        return True


def owner_of(target: Any, name: str) -> Any:
    """The part of ``target`` that has the method ``name`` (dotted: of which part), or None."""
    *path, method = name.split(".")
    for part in path:
        target = getattr(target, part, None)
    return target if hasattr(target, method) else None


def observe_method(target: Any, name: str) -> tuple[int, str]:
    """Let the captures of ``target`` know when its method ``name`` returns; a key for ``PATCHES.release``."""
    owner, method = owner_of(target, name), name.rpartition(".")[2]
    original = getattr(owner, method)
    signature = inspect.signature(original)

    @functools.wraps(original)
    def observed(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        listeners = [c for c in interception.ACTIVE.get() if getattr(c, "target", None) is target]
        if listeners:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            for listener in listeners:
                listener.method_called(name, bound.arguments, result)
        return result

    return interception.PATCHES.acquire(owner, method, original, observed)


def batch_of(arguments: Mapping[str, Any]) -> int | None:
    """Batch size of a forward: that of its first tensor with more than two axes, the latent."""
    tensors = (v for v in arguments.values() if isinstance(v, Tensor) and not v.is_nested and v.ndim > 2)
    first = next(tensors, None)
    return None if first is None else int(first.shape[0])


def seeds_of(generator: Any) -> list[int] | None:
    """Seeds of one generator or several; None where there is none."""
    generators = generator if isinstance(generator, (list, tuple)) else [generator]
    seeds = [int(g.initial_seed()) for g in generators if isinstance(g, torch.Generator)]
    return seeds or None
