"""Tags come from what was seen, never from names or flags."""

from __future__ import annotations

import weakref
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aiba_hooks import Tag, capture
from aiba_hooks.tagging import from_lengths
from tests.conftest import generate
from tests.test_values import Attention

EVERY = ("cross", "self", "joint", "unknown")


def test_audioldm2s_96_attention_modules(pipe):
    with capture(pipe.unet, keep="full", kinds=EVERY) as cap:
        generate(pipe, "a bass and drums", steps=1)
    kinds = Counter((site.name.rsplit(".", 1)[1], site.tag.kind) for site in cap.sites)
    # 48 attn1; a third of the 48 attn2 have no encoder states and are self-attention, whatever they are called
    assert kinds == {("attn1", "self"): 48, ("attn2", "self"): 16, ("attn2", "cross"): 32}
    streams = Counter(site.tag.stream for site in cap.sites if site.tag == "cross")
    assert streams == {"encoder_hidden_states": 16, "encoder_hidden_states_1": 16}
    site = next(s for s in cap.sites if s.name == "down_blocks.1.attentions.2.transformer_blocks.0.attn2")
    assert "to_k, to_v read encoder_hidden_states_1" in site.evidence


def test_the_backbone_names_both_text_streams(pipe):
    with capture(pipe, keep="full") as cap:
        generate(pipe, "a bass and drums", steps=1)
    streams = Counter(array.attrs["stream"] for array in cap.maps.values())
    assert streams == {"gpt2": 16, "t5": 16}
    t5 = next(array for array in cap.maps.values() if array.attrs["stream"] == "t5")
    assert t5.dims == ("prompt", "step", "key", "time", "frequency")
    assert list(t5.token.values[0]) == ["▁a", "▁bass", "▁and", "▁drums", "</s>"]
    assert list(t5.role.values[0]) == ["word"] * 4 + ["special"]
    np.testing.assert_allclose(t5.sum("key"), 1, atol=1e-5)


def test_both_streams_of_one_length_are_told_apart(pipe):
    prompt = "a b bass drums c"  # 8 T5 tokens beside 8 GPT-2 embeddings
    with capture(pipe, keep="full") as cap:
        generate(pipe, prompt, steps=1)
    assert {array.sizes["key"] for array in cap.maps.values()} == {8}
    assert Counter(array.attrs["stream"] for array in cap.maps.values()) == {"gpt2": 16, "t5": 16}


def test_audioldms_cross_attention_flag_lies():
    """AudioLDM conditions through class labels: its attn2 get no encoder states, yet is_cross_attention is True."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=32,
        in_channels=4,
        out_channels=4,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(16, 32),
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=16,
        class_embeddings_concat=True,
    ).eval()
    lying = [m for n, m in unet.named_modules() if n.endswith("attn2") and m.is_cross_attention]
    assert lying
    with torch.no_grad(), capture(unet, keep="full", kinds=EVERY) as cap:
        unet(torch.randn(2, 4, 16, 16), 3, encoder_hidden_states=None, class_labels=torch.randn(2, 16))
    assert {site.tag.kind for site in cap.sites} == {"self"}
    assert any(site.name.endswith("attn2") for site in cap.sites)


def test_equal_lengths_with_two_sources_are_cross():
    module = Attention().eval()
    x = torch.randn(1, 6, 32)
    with torch.no_grad(), capture(module, keep="full", kinds=EVERY) as cap:
        module(x, torch.randn(1, 6, 32))
    assert cap.sites[0].tag == "cross"
    assert "another tensor of the same length" in cap.sites[0].evidence
    with torch.no_grad(), capture(module, keep="full", kinds=EVERY) as cap:
        module(x, x)
    assert cap.sites[0].tag == "self"


class Joint(nn.Module):
    """SD3-class joint attention: two streams with projections of their own, concatenated."""

    def __init__(self):
        super().__init__()
        self.to_qkv, self.add_qkv = nn.Linear(32, 96), nn.Linear(32, 96)

    def forward(self, audio, text):
        q, k, v = torch.cat([self.add_qkv(text), self.to_qkv(audio)], 1).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("lengths", [(5, 7), (6, 6)])
def test_two_concatenated_streams_are_joint(lengths):
    module = Joint().eval()
    audio, text = (torch.randn(1, length, 32) for length in lengths)
    with torch.no_grad(), capture(module, keep="full", kinds=EVERY) as cap:
        module(audio, text)
    assert cap.sites[0].tag == "joint"


def test_a_low_rank_adapter_does_not_look_like_a_second_source():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.down, self.up = nn.Linear(32, 32), nn.Linear(32, 4), nn.Linear(4, 32)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    module = Attention()
    module.to_k = Adapted()
    with torch.no_grad(), capture(module.eval(), keep="full", kinds=EVERY) as cap:
        module(torch.randn(1, 6, 32))
    assert cap.sites[0].tag == "self"


class Freed(Attention):
    """What its projections read is freed at once, and what is read next may be put in the same place."""

    def forward(self, x, context):
        q, k, v = (
            layer(source + 1).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, source in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_what_lies_where_a_freed_tensor_lay_is_another_source():
    x, context = torch.randn(2, 64, 32), torch.randn(2, 64, 32)
    with capture(Freed(), keep="full", kinds=EVERY) as cap:
        cap.target(x, context)
    (site,) = cap.sites
    assert site.tag == "cross"
    assert "to_q read [2, 64, 32]; to_k read [2, 64, 32]" in site.evidence


def test_a_projection_may_read_what_has_no_one_memory():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.attention = nn.Linear(32, 32), Attention()

        def forward(self, x, weights):
            return self.attention(x) + self.gate(weights).to_dense().sum()

    model = Gate()
    with torch.no_grad(), capture(model, keep="full", kinds=EVERY) as cap:
        model(torch.randn(2, 16, 32), torch.eye(32).to_sparse())
    assert [site.tag.kind for site in cap.sites] == ["self"]


def test_watching_the_first_forward_keeps_no_tensor_of_the_models():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
            self.attention = Attention()
            self.alive = []

        def forward(self, x):
            made = []
            for layer in self.layers:
                x = layer(x)
                made.append(weakref.ref(x))
            self.alive = [reference() is not None for reference in made]
            return self.attention(x)

    model = Deep()
    with capture(model, keep="full", kinds=EVERY):
        model(torch.randn(2, 16, 32))
    assert model.alive == [False, False, False, True]


def test_without_projections_only_lengths_are_left_and_equal_ones_are_unknown():
    class Bare(nn.Module):
        def forward(self, q, k):
            return F.scaled_dot_product_attention(q, k, k)

    q = torch.randn(1, 2, 6, 8)
    with capture(Bare(), keep="full", kinds=EVERY) as cap:
        cap._denoiser(q, q)
    assert cap.sites[0].tag == "unknown"
    with capture(Bare(), keep="full", kinds=EVERY) as cap:
        cap._denoiser(q, torch.randn(1, 2, 5, 8))
    assert cap.sites[0].tag == "cross"
    assert "lengths only" in cap.sites[0].evidence


def test_the_papers_cross_ratio_is_an_option_of_the_length_rule():
    assert from_lengths(800, 16, cross_ratio=0.5) == "cross"
    assert from_lengths(800, 700, cross_ratio=0.5) == "unknown"
    assert from_lengths(800, 700) == "cross"


def test_a_tag_is_a_string_with_evidence():
    tag = Tag("cross", "t5", "seen")
    assert tag == "cross"
    assert (tag.kind, tag.stream, tag.evidence) == ("cross", "t5", "seen")
    with pytest.raises(ValueError, match="a tag is one of"):
        Tag("text")


def test_a_module_that_attends_twice_has_two_sites():
    class Twice(Attention):
        def forward(self, x, context):
            return super().forward(x, context) - super().forward(x, context.flip(1))

    module = Twice().eval()
    with torch.no_grad(), capture(module, keep="full", layers="") as cap:
        module(torch.randn(1, 4, 32), torch.randn(1, 5, 32))
    assert list(cap.maps) == ["#0", "#1"]
    np.testing.assert_allclose(cap.maps["#0"].values, cap.maps["#1"].values[..., ::-1], atol=1e-6)
