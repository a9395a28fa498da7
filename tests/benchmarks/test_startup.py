"""What importing the library and entering a capture take. Promised: 0.3 s and 30 ms on a machine that does nothing else;
docs/performance.md has what was measured. The bounds here are those that a busy machine keeps."""

from __future__ import annotations

import subprocess
import sys

import pytest

from aiba_eval.bench.startup import enter_seconds, import_seconds
from aiba_eval.bench.subjects import BenchBackbone
from aiba_hooks import capture


@pytest.mark.benchmark(group="start-up")
def test_import(benchmark):
    ((_, busy),) = benchmark.pedantic(import_seconds, kwargs={"repeats": 1}, rounds=1)
    assert busy < 1.5


def test_importing_leaves_out_what_is_slow():
    """xarray and pandas take most of a second; they are imported when maps are read. So are plugins and their libraries."""
    code = "import torch, sys; before = set(sys.modules); from aiba_hooks import capture; print(*sorted({n.split('.')[0] for n in set(sys.modules) - before}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "aiba_hooks" in loaded
    assert not loaded & {"xarray", "pandas", "zarr", "diffusers", "transformers", "matplotlib", "scipy", "triton"}


@pytest.mark.benchmark(group="start-up")
def test_enter(few, full_size):
    enter_seconds(full_size, repeats=1)  # the first loads the plugins
    _, busy = few(lambda: enter_seconds(full_size, repeats=1)[0])
    assert busy < 0.5


class _Leave(Exception):
    pass


def test_entering_touches_no_weight(full_size):
    """A model on the meta device has none: reading one, or running a module, would raise."""
    with pytest.raises(_Leave), capture(full_size, words=full_size.asked, backbone=BenchBackbone()) as cap:
        raise _Leave
    assert cap.held_bytes == 0
    assert all(parameter.is_meta for parameter in full_size.denoiser.parameters())
