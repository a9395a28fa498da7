"""Captured maps are the model's own probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from aiba_hooks import AttentionMaps, CheckColumnError, Kernel, capture
from aiba_hooks.calls import AttentionCall
from aiba_hooks.kernels.sdpa import ScaledDotProductAttention
from aiba_hooks.plugins import manager
from tests.conftest import generate


class EagerProcessor(AttnProcessor):
    """diffusers' eager processor, noting the probabilities of the module it runs in."""

    store: dict = {}
    names: dict = {}

    def __call__(self, attn, *args, **kwargs):
        scores = attn.get_attention_scores

        def noted(query, key, mask=None):
            probabilities = scores(query, key, mask)
            heads = attn.heads
            shape = (-1, heads, *probabilities.shape[1:])
            self.store.setdefault(self.names[id(attn)], []).append(probabilities.detach().reshape(shape).clone())
            return probabilities

        attn.get_attention_scores = noted
        try:
            return super().__call__(attn, *args, **kwargs)
        finally:
            del attn.get_attention_scores


@pytest.fixture
def eager(pipe):
    """Probabilities of every attention of the U-Net by diffusers' eager processor: name -> [per forward [B, H, Tq, Tk]]."""

    def run(call):
        original = pipe.unet.attn_processors
        processor = EagerProcessor()
        EagerProcessor.store = {}
        EagerProcessor.names = {id(m): n for n, m in pipe.unet.named_modules()}
        pipe.unet.set_attn_processor(processor)
        try:
            call()
        finally:
            pipe.unet.set_attn_processor(dict(original))
        return EagerProcessor.store

    return run


def test_full_maps_of_every_site_equal_the_eager_probabilities_head_by_head(pipe, eager):
    def call():
        generate(pipe, "a bass and drums", steps=2)

    with capture(pipe.unet, keep="full", kinds=("cross", "self"), heads="all") as cap:
        call()
    expected = eager(call)
    assert len(expected) == 96
    assert set(cap.maps) == set(expected)
    for name, array in cap.maps.items():
        assert array.dims == ("call", "batch", "head", "query", "key")
        np.testing.assert_allclose(array.values, torch.stack(expected[name]).numpy(), atol=1e-5)


def test_pooled_maps_are_the_eager_probabilities_summed_over_the_words_tokens(pipe, eager):
    prompt = "a kazoo and drums"  # kazoo is spelt in letters: several tokens

    def call():
        generate(pipe, prompt, steps=2)

    with capture(pipe, words=["kazoo", "drums"]) as cap:
        call()
    tokens = pipe.tokenizer_2.convert_ids_to_tokens(pipe.tokenizer_2(prompt).input_ids)
    expected = eager(call)
    kazoo = [i for i, token in enumerate(tokens) if token in ("k", "a", "z", "o") or token == "▁"]
    assert len(kazoo) > 3
    groups = {"kazoo": kazoo, "drums": [tokens.index("▁drums")], "(special)": [tokens.index("</s>")]}
    for name, array in cap.maps.items():
        assert list(array.word.values) == ["kazoo", "drums", "(other)", "(special)"]
        eager_maps = torch.stack(expected[name])[:, 1].mean(1)  # [step, Tq, Tk] of the conditional row
        for word, keys in groups.items():
            ours = array.sel(word=word).isel(prompt=0)
            theirs = eager_maps[..., keys].sum(-1).reshape(2, ours.sizes["time"], ours.sizes["frequency"])
            np.testing.assert_allclose(ours.values, theirs.numpy(), atol=1e-5)
        np.testing.assert_allclose(array.sum("word").values, 1, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "max", "logmean", "weighted"])
def test_poolings_equal_the_eager_ones(pipe, eager, pooling):
    prompt = "a kazoo and drums"

    def call():
        generate(pipe, prompt, steps=1)

    words = {"kazoo": 1.0, "drums": 2.0}
    with capture(pipe, words=words if pooling == "weighted" else list(words), pooling=pooling) as cap:
        call()
    tokens = pipe.tokenizer_2.convert_ids_to_tokens(pipe.tokenizer_2(prompt).input_ids)
    keys = [i for i, token in enumerate(tokens) if token in ("k", "a", "z", "o") or token == "▁"]
    expected = eager(call)
    name, array = next(iter(cap.maps.items()))
    probabilities = expected[name][0][1].mean(0)[:, keys]  # [Tq, tokens of the word]
    weight = np.exp(1.0) / (np.exp(1.0) + np.exp(2.0))
    theirs = {
        "mean": probabilities.mean(-1),
        "max": probabilities.amax(-1),
        "logmean": probabilities.log().mean(-1),
        "weighted": probabilities.mean(-1) * weight,
    }[pooling]
    ours = array.sel(word="kazoo").isel(prompt=0, step=0)
    np.testing.assert_allclose(ours.values, theirs.reshape(ours.shape).numpy(), atol=1e-5)


def test_self_attention_pools_to_received_attention_or_eq_5(pipe, eager):
    def call():
        generate(pipe, "a bass", steps=1)

    with capture(pipe, kinds=("self",)) as received:
        call()
    with capture(pipe, kinds=("self",), pooling="max") as best:
        call()
    expected = eager(call)
    assert len(received.maps) == 64
    for name in received.maps:
        probabilities = expected[name][0][1].mean(0)
        ours = received.maps[name].sel(word="(received)").isel(prompt=0, step=0)
        np.testing.assert_allclose(ours.values.ravel(), probabilities.mean(0).numpy(), atol=1e-5)
        ours = best.maps[name].sel(word="(max)").isel(prompt=0, step=0)
        np.testing.assert_allclose(ours.values.ravel(), probabilities.amax(-1).numpy(), atol=1e-5)


def test_reduced_steps_equal_the_weighted_mean_of_single_steps(pipe):
    with capture(pipe, words=["bass"]) as steps:
        generate(pipe, "a bass", steps=3)
    with capture(pipe, words=["bass"], reduce_steps="uniform") as uniform:
        generate(pipe, "a bass", steps=3)
    weights = [0.5, 0.0, 1.5]
    with capture(pipe, words=["bass"], reduce_steps=weights) as weighted:
        generate(pipe, "a bass", steps=3)
    for name, array in steps.maps.items():
        assert uniform.maps[name].dims == ("prompt", "word", "time", "frequency")
        np.testing.assert_allclose(uniform.maps[name], array.mean("step"), atol=1e-6)
        np.testing.assert_allclose(weighted.maps[name], np.average(array, axis=1, weights=weights), atol=1e-6)
    assert uniform.held_bytes * 3 == steps.held_bytes


# ---- the check column


class Misread(Kernel):
    """An SDPA adapter with one mistake."""

    name = "sdpa"
    bindings = ScaledDotProductAttention.bindings
    signature = ScaledDotProductAttention.signature
    mistake = ""

    def read(self, function, arguments, output):
        arguments = dict(arguments)
        if self.mistake == "wrong scale":
            arguments["scale"] = 2.0 * arguments["query"].shape[-1] ** -0.5
        if self.mistake == "rolled keys":
            arguments["key"] = arguments["key"].roll(1, -2)
        if self.mistake == "swapped heads":
            arguments["query"] = arguments["query"].flip(1)
        if self.mistake == "lost mask":
            arguments["attn_mask"] = None
        return ScaledDotProductAttention().read(function, arguments, output)


class Attention(nn.Module):
    def __init__(self, dim=32, heads=4):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context
        q, k, v = (
            layer(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, source in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("mistake", ["wrong scale", "rolled keys", "swapped heads", "lost mask", ""])
def test_the_check_column_catches_an_adapter_that_misreads_the_call(monkeypatch, mistake):
    adapter = Misread()
    adapter.mistake = mistake
    monkeypatch.setattr(manager(), "collect", lambda hook: [adapter] if hook == "aiba_kernels" else [])
    torch.manual_seed(0)
    module = Attention()
    mask = torch.zeros(1, 1, 1, 9)
    mask[..., 6:] = float("-inf")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)  # neither flat nor one-hot: both would hide a wrong scale
    x, context = torch.randn(2, 7, 32), torch.randn(2, 9, 32)
    if not mistake:
        with capture(module, keep="full") as cap:
            module(x, context, mask)
        assert cap.sites[0].check < 1e-5
        return
    with (
        pytest.raises(CheckColumnError, match=r"\(sdpa\): asked again, the kernel differs"),
        capture(module, keep="full"),
    ):
        module(x, context, mask)


def test_row_sums_do_not_catch_what_the_check_column_does():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    output = F.scaled_dot_product_attention(q, k, v)
    wrong = AttentionCall("wrong", q, k, v, output, lambda s: F.scaled_dot_product_attention(q, k.roll(1, -2), s))
    pooled, error = wrong.ask(torch.ones(1, 5, 1))
    np.testing.assert_allclose(pooled.numpy(), 1, atol=1e-6)
    assert error > wrong.allowed


@pytest.mark.parametrize("value_dim", [1, 2, 8, 64])
def test_more_groups_than_the_head_dimension_are_several_asks(value_dim):
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 11, 16), torch.randn(2, 3, 13, 16)
    v = torch.randn(2, 3, 13, value_dim)
    asked = []

    def again(values):
        assert values.shape == v.shape
        asked.append(1)
        return F.scaled_dot_product_attention(q, k, values)

    call = AttentionCall("sdpa", q, k, v, F.scaled_dot_product_attention(q, k, v), again)
    expected = torch.softmax(q @ k.transpose(-1, -2) / 4, -1)
    selectors = torch.rand(1, 13, 10)
    pooled, error = call.ask(selectors)
    np.testing.assert_allclose(pooled, expected @ selectors, atol=1e-6)
    assert error < 1e-5
    full = torch.cat([part for _, part, _ in call.ask_keys()], -1)
    np.testing.assert_allclose(full, expected, atol=1e-6)
    assert len(asked) == -(-11 // value_dim) + -(-14 // value_dim)


def test_saved_maps_load_as_they_were(pipe, tmp_path):
    with capture(pipe, words=["bass"]) as cap:
        generate(pipe, "a bass and drums")
    for path in (tmp_path / "maps.zarr", tmp_path / "maps.zarr.zip"):
        cap.maps.save(path)
        loaded = AttentionMaps.load(path)
        assert list(loaded) == list(cap.maps)
        for name, array in cap.maps.items():
            assert loaded[name].identical(array), name
