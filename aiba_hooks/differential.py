"""Differential attention: several kernel calls of one site enter its output with signs that no kernel can see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aiba_hooks.calls import AttentionCall
from aiba_hooks.checks import deviation
from aiba_hooks.errors import CheckColumnError


class DifferentialCheck:
    """Holds the signs that a backbone declares, and checks in the first forward that a site's output projection reads
    Σ sign·output. ``signs`` maps a site's module name to them."""

    def __init__(self) -> None:
        self.signs: dict[str, tuple[float, ...]] = {}
        self.errors: dict[str, tuple[Tensor, float]] = {}
        self._owner: dict[int, str] = {}
        self._outputs: dict[str, list[AttentionCall]] = {}

    def declare(self, name: str, module: Any, signs: Sequence[float] | None) -> None:
        """Note a site's signs; its own submodules are where the output projection is looked for."""
        if signs is None or name in self.signs:
            return
        self.signs[name] = tuple(float(sign) for sign in signs)
        self._owner.update({id(part): name for part in module.modules()})

    def note(self, name: str, call: AttentionCall) -> None:
        """One of the site's calls has run."""
        if name in self.signs:
            self._outputs.setdefault(name, []).append(call)

    def projection_read(self, module: nn.Module, tensor: Tensor) -> None:
        """A projection has run: if its site's calls are complete and it reads as many numbers, compare."""
        name = self._owner.get(id(module))
        if name is None or len(self._outputs.get(name, ())) != len(self.signs[name]):
            return
        calls = self._outputs[name]
        batch, heads, queries, dim = calls[0].output.shape
        if tensor.shape != (batch, queries, heads * dim):
            return
        with torch.no_grad():
            total = sum(
                (s * c.output for s, c in zip(self.signs[name], calls, strict=True)), torch.zeros_like(calls[0].output)
            )
            error = deviation(total.transpose(1, 2).flatten(2), tensor)
        self.errors[name] = (error, calls[0].allowed)
        self._outputs.pop(name)

    def verify(self) -> None:
        """Raise where the declared signs are not what the model does, or could not be compared with it."""
        for name, signs in self.signs.items():
            if name not in self.errors:
                seen = len(self._outputs.get(name, ()))
                raise CheckColumnError(
                    f"{name}: signs {signs} are declared, but no projection of the site was seen to read their sum "
                    f"({seen} calls waiting): are there as many calls as signs?"
                )
            error, allowed = self.errors[name]
            if float(error) > allowed:
                raise CheckColumnError(
                    f"{name}: its output projection reads something else than the sum of its calls with signs {signs}: off by "
                    f"{float(error):.3g} of the largest value, allowed {allowed:.3g}"
                )
