"""Peak and retained memory of a piece of work, counted by torch's own allocators.

The resident size of a process says little here: torch and the C library keep freed blocks. What torch's CPU allocator gives
out is counted exactly by its profiler's memory events; a GPU's allocator keeps its own account. Memory of numpy and of
libraries' private workspaces is in neither.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Memory:
    """Bytes beyond what was allocated before: the most at any moment, and what was still held at the end."""

    host_peak: int
    host_held: int
    device_peak: int = 0
    device_held: int = 0

    def beyond(self, other: Memory) -> Memory:
        """What this work took more than other work did."""
        return Memory(
            self.host_peak - other.host_peak,
            self.host_held - other.host_held,
            self.device_peak - other.device_peak,
            self.device_held - other.device_held,
        )


def measured(work: Callable[[], T], device: str = "cpu") -> tuple[T, Memory]:
    """Do the work; what it returned, which counts as held, and the memory that it took.

    Only allocations of this thread are seen on the host, which is where torch's operators allocate. Results of earlier
    measured work have to be gone: they would count as freed.
    """
    from torch.autograd.profiler import profile  # torch.profiler.profile imports the compiler as it starts

    cuda = device.startswith("cuda")
    gc.collect()
    before = 0
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with profile(use_cpu=True, profile_memory=True) as profiler:
        result = work()
        if cuda:
            torch.cuda.synchronize(device)
    events: Any = profiler.kineto_results
    changes = [
        event
        for event in events.events()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    if not cuda:
        return result, Memory(peak, held)
    return result, Memory(
        peak, held, torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before
    )
