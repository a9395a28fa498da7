"""What a captured forward costs over a bare one, on a model so small that calls are most of it."""

from __future__ import annotations

import time

import pytest

from aiba_eval.bench.contestants import contestants
from aiba_eval.bench.memory import measured
from aiba_eval.bench.subjects import BenchBackbone, Setting, Subject
from aiba_hooks import capture
from aiba_hooks.interception import ACTIVE


@pytest.mark.benchmark(group="forward of a tiny transformer")
@pytest.mark.parametrize("name", ["bare", "words", "words-reduced", "tokens", "all", "paper", "paper-all"])
def test_forward(few, tiny, name):
    with contestants()[name].watch(tiny) as watch:
        tiny.encode()
        tiny.forward(0)  # the first looks at every site
        few(lambda: tiny.forward(1))
    maps = watch.read()
    # two blocks: the cross-attention of both, and the self-attention where it is asked for
    assert len(maps) == {"bare": 0, "all": 4, "paper-all": 4}.get(name, 2)


def test_a_call_outside_every_capture_is_the_models_own(tiny):
    import torch

    assert not ACTIVE.get()
    before = torch.nn.functional.scaled_dot_product_attention
    with capture(tiny, words=tiny.asked, backbone=BenchBackbone()):
        tiny.encode()
        tiny.forward(0)
        assert torch.nn.functional.scaled_dot_product_attention is not before
    assert torch.nn.functional.scaled_dot_product_attention is before


def test_a_captured_call_takes_no_more_than_milliseconds(tiny):
    """A bound that a busy machine keeps: the least processor time of several forwards, for each of two captured calls."""

    def best(count=8):
        times = []
        for step in range(count):
            start = time.process_time()
            tiny.forward(step)
            times.append(time.process_time() - start)
        return min(times)

    bare = best()
    with capture(tiny, words=tiny.asked, backbone=BenchBackbone()):
        tiny.encode()
        tiny.forward(0)
        captured = best()
    assert (captured - bare) / 2 < 0.02, (captured, bare)


def test_nothing_grows_with_steps_where_they_are_averaged(tiny):
    def held_after(steps):
        with capture(tiny, words=tiny.asked, backbone=BenchBackbone(), reduce_steps="uniform") as cap:

            def forwards():
                tiny.encode()
                for step in range(steps):
                    tiny.forward(step)

            _, memory = measured(forwards)
        return cap.held_bytes, memory.host_held

    (few_counted, few_held), (many_counted, many_held) = held_after(2), held_after(12)
    assert few_counted == many_counted
    assert many_held - few_held <= 10 * 16  # a timestep for each step


def test_a_steady_forward_leaves_only_its_maps_behind(tiny):
    """Exact: what one more step retains is queries × columns of two sites, float32, and a timestep."""
    with capture(tiny, words=tiny.asked, backbone=BenchBackbone()):
        tiny.encode()
        tiny.forward(0)
        tiny.forward(1)
        _, memory = measured(lambda: tiny.forward(2) is None)
    queries, columns = tiny.shape.columns + 1, 2 + 4
    maps = 2 * 4 * queries * columns
    assert maps <= memory.host_held <= maps + 256


def test_a_steady_forward_needs_little_more_than_a_bare_one(tiny):
    """Beyond its maps, the peak of a captured forward is that of the bare one and a few tensors of one call."""
    tiny.forward(0)
    _, bare = measured(lambda: tiny.forward(1) is None)
    with capture(tiny, words=tiny.asked, backbone=BenchBackbone()):
        tiny.encode()
        tiny.forward(0)
        _, captured = measured(lambda: tiny.forward(1) is None)
    queries, keys, heads, width = tiny.shape.columns + 1, 18, 6, 64
    of_one_call = 4 * 2 * heads * width * (2 * queries + 2 * keys)  # the answer, its float32 copy; selectors, twice
    assert captured.host_peak - bare.host_peak <= of_one_call + 2**14


def test_selectors_are_gone_when_a_forward_needs_the_most():
    """Where feed-forward layers take the most memory, as in full-size transformers, the peak grows by maps alone."""
    subject = Subject(Setting("stable-audio-small", seconds=6.0))
    subject.forward(0)
    _, bare = measured(lambda: subject.forward(1) is None)
    with capture(subject, words=subject.asked, backbone=BenchBackbone()) as cap:
        subject.encode()
        subject.forward(0)
        before = cap.held_bytes
        _, captured = measured(lambda: subject.forward(1) is None)
    selector = 4 * 6 * 130 * 64  # of one call: heads × keys × as wide as the values
    maps = cap.held_bytes - before
    assert captured.host_peak - bare.host_peak <= maps + 2**15 < selector
