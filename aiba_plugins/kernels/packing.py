"""Packed sequences: several laid along one axis, as variable-length kernels take them, and the same ones padded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a packed axis lie. Made and used on the device: nothing is read back.

    Attributes
    ----------
    index : [sequences, longest] position on the packed axis; ``total`` where a sequence has ended
    total : length of the packed axis
    """

    index: Tensor
    total: int

    @classmethod
    def of(cls, starts: Tensor, lengths: Tensor, longest: int, total: int) -> Packing:
        """Sequences that start at ``starts`` [sequences] and have ``lengths`` [sequences] tokens."""
        import torch

        offset = torch.arange(longest, device=starts.device)
        position = starts.long()[:, None] + offset
        return cls(torch.where(offset < lengths[:, None], position, total), total)

    def pad(self, packed: Tensor) -> Tensor:
        """[total, ...] as [sequences, longest, ...], zero where a sequence has ended."""
        ended = self.index == self.total
        padded = packed[self.index.clamp(max=self.total - 1)]
        return padded.masked_fill(ended.reshape(*ended.shape, *(1,) * (packed.ndim - 1)), 0)

    def pack(self, padded: Tensor) -> Tensor:
        """[sequences, longest, ...] as [total, ...], zero where no sequence lies."""
        # padding is written to one row more, which is dropped
        packed = padded.new_zeros(self.total + 1, *padded.shape[2:])
        packed[self.index.flatten()] = padded.flatten(0, 1)
        return packed[: self.total]
