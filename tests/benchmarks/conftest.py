"""Subjects for the benchmarks. ``pytest tests/benchmarks --benchmark-min-rounds=20`` measures; the ordinary suite takes few rounds."""

from __future__ import annotations

import pytest

from aiba_eval.bench.subjects import Setting, Subject


@pytest.fixture(scope="session")
def tiny():
    """The small transformer on half a second: what is left of a forward is mostly calls."""
    return Subject(Setting("stable-audio-small", seconds=0.5, tokens=16))


@pytest.fixture(scope="session", params=["audioldm2", "stable-audio"])
def full_size(request):
    """A full-size model without weights: it can be entered, not run."""
    return Subject(Setting(request.param, device="meta"))


@pytest.fixture
def few(benchmark):
    """Benchmark a function a few times, or as often as pytest's options say."""

    def measure(function, **options):
        return benchmark.pedantic(function, **{"rounds": 5, "iterations": 1, "warmup_rounds": 1, **options})

    return measure
