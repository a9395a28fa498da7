"""The conformance kits pass what is right and name what is wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from aiba_hooks import Lattice
from aiba_hooks.kernels.sdpa import ScaledDotProductAttention
from aiba_hooks.testing import ConformanceError, check_backbone, check_kernel
from aiba_plugins.backbones.audioldm2 import AudioLDM2
from tests.conftest import generate
from tests.test_values import Misread

PROMPTS = {"prompt": "a bass and drums", "other_prompt": "soft piano with guitar", "words": ["bass", "drums"]}


def run(pipe):
    return lambda prompt: generate(pipe, prompt, steps=2, seconds=1.28, guidance_scale=2.5)


def test_the_built_in_backbone_conforms(pipe):
    report = check_backbone(AudioLDM2(), pipe, run(pipe), **PROMPTS)
    assert report["sites"] == 16
    assert report["lattices"] == [(16, 8), (8, 4), (4, 2)]
    assert report["steps"] == 2
    assert report["check"] < 1e-5


class WrongAxes(AudioLDM2):
    def lattice(self, site):
        right = super().lattice(site)
        return Lattice(
            right.shape[::-1],
            ("frequency", "time"),
            seconds_per_column=1.28 / right.shape[0],
            frequency_edges=right.frequency_edges,
        )


class WrongOrder(AudioLDM2):
    branches = ("conditional", "unconditional")


class WrongDuration(AudioLDM2):
    def lattice(self, site):
        right = super().lattice(site)
        return Lattice(right.shape, seconds_per_column=0.08, frequency_edges=right.frequency_edges)


class NotMine(AudioLDM2):
    def matches(self, target):
        return False


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (WrongAxes, "a bump at .* axes, prefix or shape are wrong"),
        (WrongOrder, "are the same for|depend on the prompt"),
        (WrongDuration, "lattices disagree on the duration"),
        (NotMine, "does not recognise AudioLDM2Pipeline"),
    ],
)
def test_a_wrong_backbone_is_named(pipe, backbone, message):
    with pytest.raises(ConformanceError, match=message):
        check_backbone(backbone(), pipe, run(pipe), **PROMPTS)


def sdpa_inputs(dtype=torch.float32):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    mask = torch.zeros(2, 1, 6, 9)
    mask[..., 7:] = float("-inf")
    return [x.to(dtype) for x in (q, k, v, mask)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sdpa_conforms(dtype):
    q, k, v, mask = sdpa_inputs(dtype)
    scores = q.double() @ k.repeat_interleave(2, 1).double().transpose(-1, -2) * 0.3
    expected = torch.softmax(scores + mask.double(), -1).to(dtype)
    report = check_kernel(
        ScaledDotProductAttention(),
        lambda: F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True),
        probabilities=expected,
    )
    assert report["calls"] == 1
    assert report["row_sum_max"] == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("mistake", ["wrong scale", "rolled keys", "swapped heads", "lost mask"])
def test_a_kernel_that_misreads_is_named(mistake):
    q, k, v, mask = sdpa_inputs()
    adapter = Misread()
    adapter.mistake = mistake
    with pytest.raises(ConformanceError, match="scale, mask, key order or heads are misread"):
        check_kernel(adapter, lambda: F.scaled_dot_product_attention(q, k, v, mask, scale=0.6, enable_gqa=True))


def test_a_kernel_that_is_bound_nowhere_or_not_called_is_named():
    q = sdpa_inputs()[0]

    class Nowhere(ScaledDotProductAttention):
        bindings = ("a_library_that_is_not_there:attention",)

    with pytest.raises(ConformanceError, match="bound nowhere"):
        check_kernel(Nowhere(), lambda: None)
    with pytest.raises(ConformanceError, match="did not see the call"):
        check_kernel(ScaledDotProductAttention(), lambda: torch.softmax(q, -1))


def test_a_kernel_that_asks_with_dropout_is_named():
    q, k, v, _ = sdpa_inputs()

    class Dropping(ScaledDotProductAttention):
        def read(self, function, arguments, output):
            dropped = dict(arguments)
            call = super().read(function, dropped, output)
            again = call.again
            object.__setattr__(call, "again", lambda values: F.dropout(again(values), 0.0) + torch.rand(1) * 0)
            return call

    with pytest.raises(ConformanceError, match="moved the random generator"):
        check_kernel(Dropping(), lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
