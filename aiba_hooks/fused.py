"""Fused pooling: one kernel launch instead of asking the model's own kernel, where that is possible and pays.

For calls whose formula is known (:class:`aiba_hooks.dense.Softmax`) a Triton kernel streams over the keys with an online
softmax, pools them over groups, takes the head mean and compares the check column, and never holds heads × queries × keys.
Asking the kernel remains the reference and the fallback; the environment variable ``AIBA_FUSED`` chooses:

- ``auto`` (the default): fused on CUDA where Triton is installed;
- ``never``: ask, always;
- ``always``: fused wherever the formula is known, also on the CPU, which takes Triton's interpreter
  (``TRITON_INTERPRET=1``, set before Triton is imported); an error where Triton is missing.

It is read whenever a site is first reached in a pipeline call."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aiba_hooks.checks import Check

if TYPE_CHECKING:
    from aiba_hooks.calls import AttentionCall

VARIABLE = "AIBA_FUSED"
CHOICES = ("auto", "never", "always")
LOG2_E = 1.4426950408889634

#: groups at a time: an accumulator of queries × groups lies in registers
GROUPS = 64
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_broken: list[str] = []  # why the kernel could not be launched here, once it could not


def choice() -> str:
    """``AIBA_FUSED``, checked.

    Raises
    ------
    ValueError
    """
    chosen = os.environ.get(VARIABLE, "auto")
    if chosen not in CHOICES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(CHOICES)}; got {chosen!r}")
    return chosen


def serves(call: AttentionCall, chosen: str) -> bool:
    """Whether a call is pooled by the fused kernel."""
    if chosen == "never" or call.query.dtype not in _DTYPES or call.reproduction is not None or not call.known:
        return False
    if chosen == "always" and not call.query.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"{VARIABLE}=always, but this call is on {call.query.device}: set TRITON_INTERPRET=1 before Triton is imported, "
            f"which runs the kernel there slowly, or {VARIABLE}=auto"
        )
    return chosen == "always" or (call.query.is_cuda and not _broken and _installed())


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _kernels() -> Any:
    from aiba_hooks import triton_kernels

    return triton_kernels


def gave_up(error: Exception, chosen: str) -> None:
    """Ask the kernel instead from here on, with a warning; under ``always`` the error is raised again."""
    if chosen == "always":
        raise error
    _broken.append(str(error))
    warnings.warn(
        f"fused pooling could not be launched and is not used in this process ({type(error).__name__}: {error}). The maps "
        f"are the same; each call takes longer. {VARIABLE}=never does without it from the start",
        RuntimeWarning,
        stacklevel=2,
    )


def pool(call: AttentionCall, selector: Tensor, mean: bool, slot: Tensor | None = None) -> tuple[Tensor, Check]:
    """Attention pooled over groups of keys, for a call that :func:`serves`.

    Parameters
    ----------
    selector : [batch or 1, Tk, groups] float32, contiguous
    mean : of the heads, or every head
    slot : two zeros [2] that become the check's

    Returns
    -------
    pooled : [batch, Tq, groups], or [batch, heads, Tq, groups]; float32
    check : its largest deviation and the largest output
    """
    launch = _Launch(call)
    slot = torch.zeros(2, device=call.query.device) if slot is None else slot
    count = selector.shape[-1]
    parts = []
    for start in range(0, count, GROUPS):
        some = selector if count <= GROUPS else selector[..., start : start + GROUPS].contiguous()
        parts.append(launch.pool(some, mean, slot if start == 0 else None))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)), Check("extremes", slot)


def received(call: AttentionCall, mean: bool, slot: Tensor | None = None) -> tuple[Tensor, Check]:
    """Attention that each key receives, as :func:`aiba_hooks.dense.received` gives it, for a call that :func:`serves`."""
    launch = _Launch(call)
    slot = torch.zeros(2, device=call.query.device) if slot is None else slot
    return launch.receive(launch.normalise(slot), mean), Check("extremes", slot)


class _Launch:
    """What the launches for one call share."""

    def __init__(self, call: AttentionCall) -> None:
        formula = call.formula
        assert formula is not None
        # the last axis is read as contiguous; of values and outputs, only column 0 is read
        self.query = call.query if call.query.stride(3) == 1 else call.query.contiguous()
        self.key = call.key if call.key.stride(3) == 1 else call.key.contiguous()
        self.value, self.output = call.value, call.output
        self.batch, self.heads, self.queries, dim = call.query.shape
        self.keys = call.key.shape[2]
        self.scale = formula.scale * LOG2_E
        self.mask, kind, self.mask_strides = self.query, 0, (0, 0, 0, 0)
        if formula.mask is not None:
            mask = formula.mask.expand(self.batch, self.heads, self.queries, self.keys)
            kind = 1 if mask.dtype == torch.bool else 2
            self.mask = mask.view(torch.uint8) if kind == 1 else mask
            self.mask_strides = mask.stride()
        exact = self.query.dtype == torch.float32
        block = max(16, 1 << (dim - 1).bit_length())
        size = 32 if exact or block > 128 else 64
        self.options: dict[str, Any] = {
            "REPEAT": self.heads // call.key.shape[1],
            "MASK": kind,
            "CAUSAL": formula.causal,
            "DIM": dim,
            "BM": size,
            "BN": size,
            "BD": block,
            "PRECISION": "ieee" if exact else "tf32",
            "WIDEN": self.query.dtype == torch.bfloat16 and not self.query.is_cuda,
            "num_warps": 4,
            "num_stages": 2,
        }

    def together(self, blocks: int) -> int:
        """Heads that one program sums: as many as leave every multiprocessor two programs."""
        if not self.query.is_cuda:
            return self.heads
        wanted = -(-2 * _multiprocessors(self.query.device.index) // (blocks * self.batch))
        return max(1, self.heads // wanted)

    def pool(self, selector: Tensor, mean: bool, slot: Tensor | None) -> Tensor:
        groups = selector.shape[-1]
        blocks = -(-self.queries // self.options["BM"])
        each = self.together(blocks) if mean else 1
        parts = -(-self.heads // each)
        made = self.query.new_empty(self.batch, parts, self.queries, groups, dtype=torch.float32)
        self._rows((blocks, parts, self.batch), each, 1 / self.heads if mean else 1.0, selector, made, None, slot)
        return (made[:, 0] if parts == 1 else made.sum(1)) if mean else made

    def normalise(self, slot: Tensor | None) -> Tensor:
        """Normalisers of every row [batch, heads, Tq], base 2."""
        made = self.query.new_empty(self.batch, self.heads, self.queries, dtype=torch.float32)
        blocks = -(-self.queries // self.options["BM"])
        self._rows((blocks, self.heads, self.batch), 1, 1.0, None, None, made, slot)
        return made

    def _rows(
        self,
        grid: tuple[int, int, int],
        each: int,
        weight: float,
        selector: Tensor | None,
        pooled: Tensor | None,
        normaliser: Tensor | None,
        slot: Tensor | None,
    ) -> None:
        nothing = self.query  # a pointer that is not followed
        groups = 1 if selector is None else selector.shape[-1]
        with _on(self.query):
            _kernels().pool[grid](
                self.query,
                self.key,
                self.value,
                self.output,
                nothing if selector is None else selector,
                self.mask,
                nothing if pooled is None else pooled,
                nothing if normaliser is None else normaliser,
                nothing if slot is None else slot,
                *self.query.stride()[:3],
                *self.key.stride()[:3],
                *self.value.stride()[:3],
                *self.output.stride()[:3],
                0 if selector is None or selector.shape[0] == 1 else self.keys * groups,
                *self.mask_strides,
                self.heads,
                self.queries,
                self.keys,
                groups,
                self.scale,
                weight,
                HEADS=each,
                POOL=pooled is not None,
                NORMALISER=normaliser is not None,
                CHECK=slot is not None,
                BG=max(16, 1 << (groups - 1).bit_length()),
                **self.options,
            )

    def receive(self, normaliser: Tensor, mean: bool) -> Tensor:
        blocks = -(-self.keys // self.options["BN"])
        each = self.together(blocks) if mean else 1
        parts = -(-self.heads // each)
        made = self.query.new_empty(self.batch, parts, self.keys, dtype=torch.float32)
        with _on(self.query):
            _kernels().receive[blocks, parts, self.batch](
                self.query,
                self.key,
                self.mask,
                normaliser,
                made,
                *self.query.stride()[:3],
                *self.key.stride()[:3],
                *self.mask_strides,
                self.heads,
                self.queries,
                self.keys,
                self.scale,
                1 / (self.queries * self.heads) if mean else 1 / self.queries,
                HEADS=each,
                **self.options,
            )
        return (made[:, 0] if parts == 1 else made.sum(1)) if mean else made


class _Here:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _on(tensor: Tensor) -> Any:
    """Triton launches on the current device."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _Here()
    return torch.cuda.device(tensor.device)


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)
