"""Joint attention: text and audio in one sequence, laid out by the backbone's segments."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aiba_hooks import AttentionMaps, Backbone, Conditioning, Lattice, NothingCaptured, Segment, TokenStream, capture
from aiba_hooks.errors import LatticeMismatch, UnknownWord
from aiba_plugins.demo.random_audioldm2 import t5_tokenizer
from tests.tiny import draw_zeros

PROMPT = "soft bass and drums"
WORDS = ["soft", "bass", "and", "drums"]
AUDIO = 20


class FluxAudio:
    """A pipeline of TangoFlux's shape around diffusers' own Flux transformer: keys [text, duration, audio], the text padded and
    unmasked, one forward of [unconditional, conditional] rows; 645 latent frames are 30 s there."""

    def __init__(self):
        from diffusers import FluxTransformer2DModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embedding = nn.Embedding(1000, 16)
            self.duration = nn.Linear(1, 16)
            self.transformer = FluxTransformer2DModel(
                in_channels=8,
                num_layers=1,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=16,
                pooled_projection_dim=16,
                guidance_embeds=False,
                axes_dims_rope=(4, 6, 6),
            ).eval()
            draw_zeros(self.transformer)
        self.tokenizer = t5_tokenizer(12)

    def encode_prompt(self, prompts, guided, num_waveforms_per_prompt=1):
        def embed(texts):
            ids = self.tokenizer(
                texts, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
            ).input_ids
            return self.embedding(ids).repeat_interleave(num_waveforms_per_prompt, 0)

        text = embed(list(prompts))
        return torch.cat([embed([""] * len(prompts)), text]) if guided else text

    @torch.no_grad()
    def __call__(self, *prompts, guidance_scale=3.0, seconds=1.0, steps=2, waveforms=1, latents=None):
        guided = guidance_scale > 1
        text = self.encode_prompt(prompts, guided, waveforms)
        keys = torch.cat([text, self.duration(torch.full((len(text), 1, 1), seconds))], 1)
        if latents is None:
            latents = torch.randn(len(prompts) * waveforms, AUDIO, 8, generator=torch.Generator().manual_seed(0))
        for step in range(steps):
            both = torch.cat([latents, latents]) if guided else latents
            prediction = self.transformer(
                hidden_states=both,
                encoder_hidden_states=keys,
                pooled_projections=text.mean(1),
                timestep=torch.tensor([1 - step / steps]),
                img_ids=torch.arange(AUDIO)[:, None].expand(AUDIO, 3).float(),
                txt_ids=torch.zeros(keys.shape[1], 3),
                return_dict=False,
            )[0]
            if guided:
                without, with_text = prediction.chunk(2)
                prediction = without + guidance_scale * (with_text - without)
            latents = latents - prediction / steps
        return latents


class JointBackbone(Backbone):
    """What a joint model needs beyond any other: its segments."""

    name = "joint"

    def conditioning(self, target, arguments, result):
        prompts = tuple(arguments["prompts"])
        text = TokenStream.from_tokenizer(
            "t5", target.tokenizer, prompts, padding="max_length", max_length=12, truncation=True
        )
        seconds = TokenStream.opaque("seconds", prompts, 1, role="duration")
        return Conditioning(
            prompts, arguments["num_waveforms_per_prompt"], bool(arguments["guided"]), (text.join(seconds),)
        )

    def segments(self, site):
        text = site.arguments["encoder_hidden_states"].shape[1]
        return [Segment(text, "t5"), Segment(site.keys - text)]

    def lattice(self, site):
        return Lattice(shape=(site.queries,), axes=("time",), seconds_per_column=30 / 645)


SITES = ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn"]


@pytest.fixture(scope="module")
def flux():
    return FluxAudio()


def joint(pipe, *prompts, backbone=None, run=None, **options):
    with capture(pipe, kinds=("joint",), backbone=backbone or JointBackbone(), **options) as cap:
        pipe(*(prompts or (PROMPT,)), **(run or {}))
    return cap


def probabilities(pipe, monkeypatch, *prompts, **run):
    """Softmax of every attention of the first forward, from the queries and keys that the dispatcher is handed."""
    from diffusers.models.transformers import transformer_flux

    original, seen = transformer_flux.dispatch_attention_fn, []

    def recorded(query, key, value, **options):
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
        seen.append(scores.softmax(-1))
        return original(query, key, value, **options)

    with monkeypatch.context() as patch:
        patch.setattr(transformer_flux, "dispatch_attention_fn", recorded)
        pipe(*(prompts or (PROMPT,)), **run)
    return seen[: len(SITES)]


def test_double_and_single_blocks_are_joint(flux):
    cap = joint(flux)
    assert [(site.name, str(site.tag), site.stream) for site in cap.sites] == [(name, "joint", "t5") for name in SITES]
    assert all("33 keys as t5 13 + audio 20" in site.tag.evidence for site in cap.sites)
    assert list(cap.maps) == SITES
    array = cap.maps[SITES[1]]
    assert array.dims == ("prompt", "step", "word", "time")
    assert array.sizes["time"] == AUDIO
    assert list(array.word.values) == [*WORDS, "(special)", "(padding)", "(duration)", "(audio)"]
    np.testing.assert_allclose(array.sum("word"), 1, atol=1e-5)
    assert all(site.check < 1e-5 for site in cap.sites)


def test_word_maps_are_the_audio_to_text_block_and_from_text_the_other(flux, monkeypatch):
    expected = probabilities(flux, monkeypatch)
    cap = joint(flux, steps=[0], heads="all", branch="both")
    full = joint(flux, steps=[0], heads="all", branch="both", keep="full")
    for name, softmax in zip(SITES, expected, strict=True):
        array = cap.maps[name].isel(prompt=0, step=0)
        back = cap.maps.from_text[name].isel(prompt=0, step=0)
        assert list(array.branch.values) == ["unconditional", "conditional"]
        assert "(audio)" not in back.word
        groups = {word: [i] for i, word in enumerate(WORDS)} | {
            "(special)": [4], "(padding)": list(range(5, 12)), "(duration)": [12], "(audio)": list(range(13, 33)),
        }  # fmt: skip
        for word, keys in groups.items():
            of_audio = softmax[:, :, 13:, keys].sum(-1)
            np.testing.assert_allclose(array.sel(word=word).transpose("branch", "head", "time"), of_audio, atol=1e-6)
            if word != "(audio)":
                of_text = softmax[:, :, keys, 13:].mean(2)
                np.testing.assert_allclose(back.sel(word=word).transpose("branch", "head", "time"), of_text, atol=1e-6)
        assert (
            list(full.maps[name].role.values[0])
            == ["word"] * 4 + ["special"] + ["padding"] * 7 + ["duration"] + ["audio"] * 20
        )
        whole = full.maps[name].isel(prompt=0, step=0).transpose("branch", "head", "time", "key")
        np.testing.assert_allclose(whole, softmax[:, :, 13:], atol=1e-6)


def test_words_spelt_in_letters_are_averaged_over_their_queries(flux, monkeypatch):
    prompt = "kazoo bass"  # six tokens: the boundary and five letters
    expected = probabilities(flux, monkeypatch, prompt, guidance_scale=1.0)[1][0].mean(0)
    cap = joint(flux, prompt, steps=[0], run={"guidance_scale": 1.0})
    array, back = (maps[SITES[1]].isel(prompt=0, step=0).sel(word="kazoo") for maps in (cap.maps, cap.maps.from_text))
    np.testing.assert_allclose(array, expected[13:, :6].sum(-1), atol=1e-6)
    np.testing.assert_allclose(back, expected[:6, 13:].mean(0), atol=1e-6)


@pytest.mark.parametrize("pooling", ["max", "logmean", "mean"])
def test_other_poolings(flux, monkeypatch, pooling):
    softmax = probabilities(flux, monkeypatch, "kazoo bass", guidance_scale=1.0)[0][0].mean(0)[13:, :6]
    expected = {"max": softmax.amax(-1), "logmean": softmax.log().mean(-1), "mean": softmax.mean(-1)}[pooling]
    cap = joint(flux, "kazoo bass", steps=[0], words=["kazoo"], pooling=pooling, run={"guidance_scale": 1.0})
    np.testing.assert_allclose(cap.maps[SITES[0]].isel(prompt=0, step=0).sel(word="kazoo"), expected, atol=1e-5)


def test_prompts_and_waveforms_keep_their_rows(flux):
    prompts = [PROMPT, "piano"]
    latents = torch.randn(4, AUDIO, 8, generator=torch.Generator().manual_seed(1))
    cap = joint(flux, *prompts, steps=[0], run={"waveforms": 2, "latents": latents})
    array = cap.maps[SITES[2]]
    assert list(array.prompt.values) == [PROMPT, PROMPT, "piano", "piano"]
    for row in range(4):
        alone = joint(flux, prompts[row // 2], steps=[0], run={"latents": latents[row : row + 1]})
        for maps, other in ((cap.maps, alone.maps), (cap.maps.from_text, alone.maps.from_text)):
            expected = other[SITES[2]].isel(prompt=0)
            np.testing.assert_allclose(maps[SITES[2]].isel(prompt=row).sel(word=expected.word), expected, atol=2e-5)


def test_outputs_reduction_and_saving(flux, tmp_path):
    plain = flux(PROMPT, steps=3)
    with capture(flux, kinds=("joint",), backbone=JointBackbone(), words=["bass"]) as cap:
        assert torch.equal(flux(PROMPT, steps=3), plain)
    reduced = joint(flux, words=["bass"], reduce_steps="uniform", run={"steps": 3})
    for maps, other in ((cap.maps, reduced.maps), (cap.maps.from_text, reduced.maps.from_text)):
        np.testing.assert_allclose(maps[SITES[0]].mean("step"), other[SITES[0]], atol=1e-6)
    cap.maps.save(tmp_path / "maps.zarr")
    loaded = AttentionMaps.load(tmp_path / "maps.zarr")
    np.testing.assert_array_equal(loaded.from_text[SITES[0]], cap.maps.from_text[SITES[0]])


def test_what_is_missing_is_named(flux):
    with pytest.raises(NothingCaptured, match=r"tagged joint, not in kinds=\('cross',\)"):
        with capture(flux, backbone=JointBackbone()):
            flux(PROMPT)
    with pytest.raises(UnknownWord, match="'violin' is not in the prompt"):
        joint(flux, words=["violin"])

    class Short(JointBackbone):
        def segments(self, site):
            return [Segment(12, "t5"), Segment(20)]

    with pytest.raises(LatticeMismatch, match=r"t5 12 \+ audio 20 = 32, but there are 33"):
        joint(flux, backbone=Short())

    class TwoLatents(JointBackbone):
        def segments(self, site):
            return [Segment(13), Segment(20)]

    with pytest.raises(LatticeMismatch, match="exactly one segment has to be the latent's"):
        joint(flux, backbone=TwoLatents())


class ConcatenatingBlock(nn.Module):
    """Self-attention over one sequence, fused projection."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads = heads

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ConcatenatingDiT(nn.Module):
    """Make-An-Audio 2's sequence: [time, global text, text, audio], 80 mel bins as channels."""

    def __init__(self):
        super().__init__()
        self.proj_in, self.time = nn.Linear(8, 16), nn.Linear(1, 16)
        self.blocks = nn.ModuleList(ConcatenatingBlock(16, 2) for _ in range(2))
        self.proj_out = nn.Linear(16, 8)

    def forward(self, x, timestep, clap, context):
        tokens = torch.cat([self.time(timestep[:, None, None]), clap[:, None], context, self.proj_in(x)], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.proj_out(tokens[:, -x.shape[1] :])


class MelAudio:
    def __init__(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embedding, self.transformer = nn.Embedding(1000, 16), ConcatenatingDiT().eval()
        self.tokenizer = t5_tokenizer(12)

    def encode_prompt(self, prompts, guided=False, num_waveforms_per_prompt=1):
        ids = self.tokenizer(list(prompts), padding="max_length", max_length=12, truncation=True, return_tensors="pt")
        return self.embedding(ids.input_ids)

    @torch.no_grad()
    def __call__(self, *prompts, **_):
        context = self.encode_prompt(prompts)
        latents = torch.randn(len(prompts), AUDIO, 8, generator=torch.Generator().manual_seed(0))
        return self.transformer(latents, torch.tensor([0.5]).expand(len(prompts)), context.mean(1), context)


class ConcatenatingBackbone(JointBackbone):
    def conditioning(self, target, arguments, result):
        prompts = tuple(arguments["prompts"])
        text = TokenStream.from_tokenizer(
            "t5", target.tokenizer, prompts, padding="max_length", max_length=12, truncation=True
        )
        before = TokenStream.opaque("time", prompts, 1, role="prefix"), TokenStream.opaque("clap", prompts, 1)
        return Conditioning(prompts, 1, False, (text, *before))

    def segments(self, site):
        return [Segment(1, "time"), Segment(1, "clap"), Segment(12, "t5"), Segment(site.keys - 14)]


def test_text_concatenated_before_the_audio():
    pipe = MelAudio()
    inputs = {}
    handle = pipe.transformer.blocks[1].qkv.register_forward_hook(lambda m, a, output: inputs.update(qkv=output))
    plain = pipe(PROMPT, "piano")
    handle.remove()
    q, k, _ = inputs["qkv"].unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    softmax = torch.softmax(q @ k.transpose(-1, -2) * 8**-0.5, -1).mean(1)
    with capture(pipe, kinds=("joint",), backbone=ConcatenatingBackbone()) as cap:
        assert torch.equal(pipe(PROMPT, "piano"), plain)
    array, back = cap.maps["blocks.1"].isel(step=0), cap.maps.from_text["blocks.1"].isel(step=0)
    assert [site.tag.kind for site in cap.sites] == ["joint", "joint"]
    groups = ["(other)", "(special)", "(padding)", "(prefix)", "(audio)"]
    assert list(array.word.values) == [*WORDS, "piano", *groups]
    np.testing.assert_allclose(array.sum("word"), 1, atol=1e-5)
    for row, word, key in ((0, "bass", 3), (0, "drums", 5), (1, "piano", 2), (0, "(prefix)", 0), (0, "(other)", 1)):
        np.testing.assert_allclose(array.isel(prompt=row).sel(word=word), softmax[row, 14:, key], atol=1e-6)
        np.testing.assert_allclose(back.isel(prompt=row).sel(word=word), softmax[row, key, 14:], atol=1e-6)
    np.testing.assert_allclose(array.isel(prompt=0).sel(word="(audio)"), softmax[0, 14:, 14:].sum(-1), atol=1e-6)


def test_segments_of_a_site_whose_queries_are_the_latent_alone():
    """Keys [text, audio], queries audio: nothing of the queries is cut away, and there are no maps from the text."""

    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q, self.to_k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, hidden_states, encoder_hidden_states):
            keys = self.to_k(torch.cat([encoder_hidden_states, hidden_states], 1))[:, None]
            return F.scaled_dot_product_attention(self.to_q(hidden_states)[:, None], keys, keys)[:, 0]

    class Memory(JointBackbone):
        def conditioning(self, target, arguments, result):
            text = TokenStream.from_tokenizer("t5", target.tokenizer, (PROMPT,), padding="max_length", max_length=12)
            return Conditioning((PROMPT,), 1, False, (text,))

    torch.manual_seed(0)
    pipe = SimpleNamespace(transformer=Denoiser(), tokenizer=t5_tokenizer(12), encode_prompt=lambda: None)
    with capture(pipe, kinds=("joint",), backbone=Memory()) as cap, torch.no_grad():
        pipe.encode_prompt()
        pipe.transformer(torch.randn(1, AUDIO, 8), torch.randn(1, 12, 8))
    (array,) = cap.maps.values()
    assert array.sizes["time"] == AUDIO
    assert len(cap.maps.from_text) == 0
    np.testing.assert_allclose(array.sum("word"), 1, atol=1e-5)
