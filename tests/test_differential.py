"""Differential attention: declared signs, checked where the output projection reads."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aiba_hooks import Backbone, Conditioning, Lattice, TokenStream, capture
from aiba_hooks.errors import CheckColumnError
from aiba_plugins.demo.random_audioldm2 import t5_tokenizer

PROMPT = "soft bass and drums"


class Differential(nn.Module):
    """Σ wᵢ·Attn(Qᵢ, Kᵢ, V) and an output projection; the first weight is 1."""

    def __init__(self, weights=(1.0, -1.0), heads=2, width=16, scaled=False):
        super().__init__()
        self.weights, self.heads, self.scaled = weights, heads, scaled
        self.to_q = nn.Linear(width, width * len(weights), bias=False)
        self.to_kv = nn.Linear(width, width * (len(weights) + 1), bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, x, context):
        def heads(t):
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        queries = self.to_q(x).chunk(len(self.weights), -1)
        *keys, value = self.to_kv(context).chunk(len(self.weights) + 1, -1)
        out = sum(
            weight * F.scaled_dot_product_attention(heads(q), heads(k), heads(value))
            for weight, q, k in zip(self.weights, queries, keys, strict=True)
        )
        out = out.transpose(1, 2).flatten(2)
        return x + self.to_out(out * 0.5 if self.scaled else out)


class Denoiser(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.blocks = nn.ModuleList([Differential(**options), Differential(**options)])

    def forward(self, hidden_states, encoder_hidden_states):
        for block in self.blocks:
            hidden_states = block(hidden_states, encoder_hidden_states)
        return hidden_states


def pipeline(**options):
    torch.manual_seed(0)
    return SimpleNamespace(transformer=Denoiser(**options), tokenizer=t5_tokenizer(12), encode_prompt=lambda: None)


class Signed(Backbone):
    name = "signed"
    declared = (1.0, -1.0)

    def conditioning(self, target, arguments, result):
        text = TokenStream.from_tokenizer("t5", target.tokenizer, (PROMPT,), padding="max_length", max_length=12)
        return Conditioning((PROMPT,), 1, False, (text,))

    def signs(self, site):
        return self.declared

    def lattice(self, site):
        return Lattice(shape=(site.queries,), axes=("time",))


def run(pipe, seeds=(0,), steps=2):
    with torch.no_grad():
        for seed in seeds:
            pipe.encode_prompt()
            generator = torch.Generator().manual_seed(seed)
            for _ in range(steps):
                pipe.transformer(
                    torch.randn(1, 10, 16, generator=generator), torch.randn(1, 12, 16, generator=generator)
                )


def declaring(*signs):
    backbone = Signed()
    backbone.declared = signs
    return backbone


@pytest.mark.parametrize("weights", [(1.0, -1.0), (1.0, -0.8), (1.0, -0.5, 0.25)])
def test_the_map_of_a_site_is_the_signed_sum_of_its_calls(weights):
    pipe = pipeline(weights=weights)
    with capture(pipe, backbone=declaring(*weights), heads="all") as cap:
        run(pipe, seeds=(0, 1))
    signed = cap.maps["blocks.1"]
    terms = [cap.maps[f"blocks.1#{i}"] for i in range(len(weights))]
    assert len(cap.maps) == 2 * (1 + len(weights))
    assert signed.sizes["prompt"] == 2  # two runs in one capture
    np.testing.assert_allclose(signed, sum(w * t.values for w, t in zip(weights, terms, strict=True)), atol=1e-6)
    np.testing.assert_allclose(signed.sum("word"), sum(weights), atol=1e-5)
    assert signed.attrs["site"] == "blocks.1"
    assert signed.attrs["signs"] == list(weights)


@pytest.mark.parametrize(
    "options", [{"reduce_steps": "uniform"}, {"keep": "full"}, {"pooling": "mean", "words": ["bass"]}]
)
def test_in_every_linear_form(options):
    pipe = pipeline()
    with capture(pipe, backbone=Signed(), **options) as cap:
        run(pipe)
    np.testing.assert_allclose(
        cap.maps["blocks.0"], cap.maps["blocks.0#0"].values - cap.maps["blocks.0#1"].values, atol=1e-6
    )


@pytest.mark.parametrize("pooling", ["max", "logmean"])
def test_poolings_that_are_not_linear_are_refused(pooling):
    pipe = pipeline()
    with pytest.raises(ValueError, match="a signed sum of calls"), capture(pipe, backbone=Signed(), pooling=pooling):
        run(pipe)


@pytest.mark.parametrize("signs", [(1.0, 1.0), (-1.0, 1.0), (1.0, -0.9), (1.0, 0.0)])
def test_wrong_signs_are_caught(signs):
    pipe = pipeline()
    with pytest.raises(CheckColumnError, match="its output projection reads something else"):
        with capture(pipe, backbone=declaring(*signs)):
            run(pipe)


@pytest.mark.parametrize(
    ("signs", "weights"), [((1.0,), (1.0, -1.0)), ((1.0, -1.0, 1.0), (1.0, -1.0)), ((1.0, -1.0), (1.0,))]
)
def test_a_wrong_number_of_signs_is_caught(signs, weights):
    pipe = pipeline(weights=weights)
    with pytest.raises(
        CheckColumnError, match="output projection reads something else|are there as many calls as signs"
    ):
        with capture(pipe, backbone=declaring(*signs)):
            run(pipe)


def test_a_factor_that_nobody_declared_is_caught():
    pipe = pipeline(scaled=True)
    with pytest.raises(CheckColumnError, match="off by"), capture(pipe, backbone=Signed()):
        run(pipe)


def test_an_error_in_the_body_is_not_masked():
    pipe = pipeline()
    with pytest.raises(KeyError, match="mine"), capture(pipe, backbone=declaring(1.0, 1.0)):
        run(pipe)
        raise KeyError("mine")


def test_the_output_is_the_same():
    pipe = pipeline()
    outputs = []
    handle = pipe.transformer.register_forward_hook(lambda m, a, output: outputs.append(output))
    run(pipe, steps=1)
    with capture(pipe, backbone=Signed()):
        run(pipe, steps=1)
    handle.remove()
    assert torch.equal(*outputs)
