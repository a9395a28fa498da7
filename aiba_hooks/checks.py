"""CheckLog: check columns and row sums of the calls that were asked again, reduced for all sites of a forward together.

A call costs two narrow copies; the comparisons run once per forward, over all sites of one shape at a time. Nothing is read
from the device before the block ends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: bytes of columns that wait for the end of a forward, by type of device; past them they are reduced at once. What waits saves
#: launches, of which a CPU has none
WAITING = {"cpu": 2**17}
WAITING_ELSEWHERE = 8 * 2**20

_Key = tuple[str, int]


def deviation(answer: Tensor, output: Tensor) -> Tensor:
    """Largest |answer − output| relative to the largest |output|, []; entries that the model itself made non-finite do not
    count."""
    return deviations(answer.reshape(1, -1), output.reshape(1, -1))[0]


def deviations(answers: Tensor, outputs: Tensor) -> Tensor:
    """The same for every row: [n, entries] twice to [n] float32."""
    if outputs.dtype != torch.float64:
        answers, outputs = answers.float(), outputs.float()
    broken = ~torch.isfinite(outputs)
    difference = (answers - outputs).abs_().masked_fill_(broken, 0).amax(1)
    scale = outputs.abs().masked_fill_(broken, 0).amax(1)
    return relative(difference, scale)


def relative(difference: Tensor, scale: Tensor) -> Tensor:
    """A largest deviation relative to the largest output; what is no number counts as infinite."""
    return (torch.nan_to_num(difference, nan=math.inf) / scale.clamp_min(1e-6)).float()


def sum_range(sums: Tensor) -> Tensor:
    """Row sums [n, entries] as their smallest and largest finite one and the number of the others, [n, 3] float32."""
    finite = torch.isfinite(sums)
    low = torch.where(finite, sums, math.inf).amin(1)
    high = torch.where(finite, sums, -math.inf).amax(1)
    return torch.stack([low, high, (~finite).sum(1).to(low.dtype)], 1)


class Check(NamedTuple):
    """What one call's check came back with, not yet compared.

    Attributes
    ----------
    kind : what ``found`` is. ``"columns"``: the check column as it came back and the model's own, [2, ...]; ``"extremes"``:
        the largest deviation and the largest output, [2]; ``"error"``: the relative deviation itself, []
    """

    kind: str
    found: Tensor

    @property
    def error(self) -> Tensor:
        """The relative deviation, []."""
        if self.kind == "columns":
            return deviation(*self.found)
        return relative(*self.found) if self.kind == "extremes" else self.found


@dataclass
class _Waiting:
    keys: list[_Key] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)


class CheckLog:
    """What the calls of a capture were found to be off by, on the device until it is read.

    Attributes
    ----------
    allowed : site → the tolerance of its check
    """

    def __init__(self) -> None:
        self.allowed: dict[_Key, float] = {}
        # (kind of check, or "sums"; shape, dtype, device) → what waits
        self._waiting: dict[tuple[Any, ...], _Waiting] = {}
        self._bytes = 0
        self._slots: dict[torch.device, tuple[Tensor, int]] = {}
        # sites that were reduced together → their errors [n], or their row sums [n, 3]
        self._errors: dict[tuple[_Key, ...], Tensor] = {}
        self._sums: dict[tuple[_Key, ...], Tensor] = {}

    def note(self, key: _Key, check: Check) -> None:
        """The check of one call."""
        self._wait(check.kind, key, check.found)

    def slot(self, device: torch.device) -> Tensor:
        """Two zeros [2] on a device, for a kernel that leaves its extremes there: one allocation serves many calls."""
        buffer, used = self._slots.get(device, (None, 0))
        if buffer is None or used == len(buffer):
            buffer, used = torch.zeros(256, 2, device=device), 0
        self._slots[device] = (buffer, used + 1)
        return buffer[used]

    def sums(self, key: _Key, sums: Tensor) -> None:
        """Row sums of one call; kept until the forward ends, so they should be no view of something large."""
        self._wait("sums", key, sums)

    def _wait(self, kind: str, key: _Key, tensor: Tensor) -> None:
        waiting = self._waiting.setdefault((kind, tensor.shape, tensor.dtype, tensor.device), _Waiting())
        waiting.keys.append(key)
        waiting.tensors.append(tensor)
        self._bytes += tensor.nbytes
        if self._bytes > WAITING.get(tensor.device.type, WAITING_ELSEWHERE):
            self.flush()

    def flush(self) -> None:
        """Reduce what waits: once per forward."""
        if not self._waiting:
            return
        waiting, self._waiting, self._bytes = self._waiting, {}, 0
        self._slots.clear()
        with torch.inference_mode(False), torch.no_grad():
            for (kind, *_), group in waiting.items():
                keys, stacked = tuple(group.keys), torch.stack(group.tensors)
                if kind == "sums":
                    now = sum_range(stacked.flatten(1))
                    known = self._sums.get(keys)
                    if known is not None:
                        low, high = torch.minimum(known[:, 0], now[:, 0]), torch.maximum(known[:, 1], now[:, 1])
                        now = torch.stack([low, high, known[:, 2] + now[:, 2]], 1)
                    self._sums[keys] = now
                    continue
                if kind == "columns":
                    found = deviations(stacked[:, 0].flatten(1), stacked[:, 1].flatten(1))
                elif kind == "extremes":
                    found = relative(stacked[:, 0], stacked[:, 1])
                else:
                    found = stacked.float()
                known = self._errors.get(keys)
                self._errors[keys] = found if known is None else torch.maximum(known, found)

    def errors(self) -> Iterator[tuple[_Key, float]]:
        """Site and its largest relative deviation, read from the device."""
        self.flush()
        worst: dict[_Key, float] = {}
        for keys, found in self._errors.items():
            for key, error in zip(keys, found.tolist(), strict=True):
                worst[key] = max(error, worst.get(key, 0.0))
        yield from worst.items()

    def row_sums(self) -> Iterator[tuple[_Key, tuple[float, float], int]]:
        """Site, its smallest and largest row sum (crossed where there is no finite one), and the rows without one."""
        self.flush()
        merged: dict[_Key, tuple[float, float, int]] = {}
        for keys, found in self._sums.items():
            for key, (low, high, broken) in zip(keys, found.tolist(), strict=True):
                before = merged.get(key, (math.inf, -math.inf, 0))
                merged[key] = (min(before[0], low), max(before[1], high), before[2] + int(broken))
        for key, (low, high, broken) in merged.items():
            yield key, (low, high), broken
