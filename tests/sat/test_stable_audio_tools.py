"""stable-audio-tools' own model and sampler under capture, and the same weights in diffusers."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from stable_audio_tools.inference.generation import generate_diffusion_cond

from aiba_hooks import NothingCaptured, UnknownWord, capture, intervene
from aiba_hooks.testing import check_backbone
from aiba_plugins.backbones.stable_audio_tools import StableAudioTools

CROSS = "model.transformer.layers.0.cross_attn"
GROUPS = ["(special)", "(padding)", "(duration)"]


def generate(model, *prompts, steps=2, seed=7, cfg_scale=3.0, negative=None, **options):
    def rows(texts):
        return [{"prompt": text, "seconds_start": 0, "seconds_total": 1} for text in texts]

    if model.diffusion_objective == "v":
        options = {"sampler_type": "dpmpp-2m-sde", "sigma_min": 0.3, "sigma_max": 500, **options}
    return generate_diffusion_cond(
        model,
        steps=steps,
        cfg_scale=cfg_scale,
        conditioning=rows(prompts),
        negative_conditioning=None if negative is None else rows(negative),
        batch_size=len(prompts),
        sample_size=4096,
        seed=seed,
        device="cpu",
        **options,
    )


@pytest.fixture(scope="module")
def model(build):
    return build()


def test_it_conforms(model):
    report = check_backbone(
        StableAudioTools(),
        model,
        lambda prompt: generate(model, prompt),
        prompt="a bass and drums",
        other_prompt="soft piano with guitar",
        words=["bass", "drums"],
        latent="x",
    )
    assert report["sites"] == 2
    assert report["lattices"] == [(64,)]
    assert report["check"] < 1e-5


def test_the_backbone_is_found_and_every_key_has_a_group(model):
    with capture(model) as cap:
        generate(model, "a bass and drums")
    assert cap.backbone.name == "stable-audio-tools"
    array = cap.maps[CROSS]
    assert list(array.word.values) == ["a", "bass", "and", "drums", *GROUPS]
    np.testing.assert_allclose(array.sum("word"), 1, atol=1e-5)
    assert array.dims == ("prompt", "step", "word", "time")
    assert array.attrs["seconds_per_column"] == pytest.approx(64 / 4000)
    assert {str(site.tag) for site in cap.sites} == {"self", "cross"}


def test_the_conditional_rows_come_first(model):
    with capture(model, branch="both", keep="full", steps=[0]) as cap:
        generate(model, "a bass and drums")
    array = cap.maps[CROSS]
    # no negative prompt: all the unconditional keys are zeros, so attention is one over their number
    np.testing.assert_allclose(array.sel(branch="unconditional"), 1 / 26, atol=1e-7)
    assert float(array.sel(branch="conditional").std("key").mean()) > 1e-4


def test_a_negative_prompt_is_not_the_prompt(model):
    with capture(model, words=["bass"]) as cap:
        generate(model, "a bass", negative=["low quality"])
    assert list(cap.maps[CROSS].prompt.values) == ["a bass"]


def test_noise_levels_are_the_samplers(model, build):
    with capture(model, words=["bass"]) as cap:
        generate(model, "a bass", steps=3)
    sigma = cap.maps[CROSS].sigma.values
    np.testing.assert_allclose(sigma, [500, np.sqrt(500 * 0.3), 0.3][: len(sigma)], rtol=1e-3)
    flow = build("rectified_flow")
    with capture(flow, words=["bass"]) as cap:
        generate(flow, "a bass", steps=2, sampler_type="euler", sigma_max=1.0)
    np.testing.assert_array_equal(cap.maps[CROSS].sigma, cap.maps[CROSS].timestep)
    assert cap.maps[CROSS].sigma.values[0] == 1


def test_guidance_only_within_its_interval(model, build):
    flow = build("rectified_flow")
    with capture(flow, branch="both", words=["bass"]) as cap:
        generate(flow, "a bass", steps=4, sampler_type="euler", sigma_max=1.0, cfg_interval=(0.6, 1.0))
    array = cap.maps[CROSS]
    assert array.sel(branch="conditional").notnull().all()
    assert list(array.sel(branch="unconditional", word="bass").isel(time=0, prompt=0).notnull().values) == [
        sigma >= 0.6 for sigma in array.sigma.values
    ]
    with pytest.raises(NothingCaptured, match="branch='unconditional' is not in this forward"):
        with capture(model, branch="unconditional"):
            generate(model, "a bass", cfg_scale=1.0)


def test_prompts_keep_their_own_rows(model):
    prompts = ["a bass and drums", "piano"]
    with capture(model) as cap:
        generate(model, *prompts)
    both = cap.maps[CROSS]
    assert list(both.prompt.values) == prompts
    for row, own in enumerate((["a", "bass", "and", "drums"], ["piano"])):
        part = both.isel(prompt=row)
        assert [w for w in both.word.values[:-3] if part.sel(word=w).notnull().all()] == own
    with pytest.raises(UnknownWord, match="'violin' is not in the prompt"), capture(model, words=["violin"]):
        generate(model, "a bass")


def test_outputs_do_not_change_and_edits_do_change_them(model):
    plain = generate(model, "a bass and drums")
    with capture(model):
        assert torch.equal(generate(model, "a bass and drums"), plain)
    assert "forward" not in vars(model.conditioner)
    assert "get_conditioning_inputs" not in vars(model)
    with intervene(model, reweight={"bass": 0.0}):
        assert not torch.equal(generate(model, "a bass and drums"), plain)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """flash-attn 2's signature and layout, in torch: its kernels need a GPU."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).float() * q.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.float()).to(q.dtype)


def test_flash_attention_taken_by_value_is_seen(model, monkeypatch):
    """The model holds ``flash_attn_func`` by name, and hands it [batch, tokens, heads, dim] in half precision."""
    import stable_audio_tools.models.transformer as transformer

    with capture(model) as cap:
        generate(model, "a bass and drums")
    expected = cap.maps[CROSS]
    library = types.ModuleType("flash_attn")
    library.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", library)
    monkeypatch.setattr(transformer, "flash_attn_func", flash_attn_func)
    with capture(model) as cap:
        generate(model, "a bass and drums")
    assert {site.kernel for site in cap.sites} == {"flash_attention:flash_attn_func"}
    assert transformer.flash_attn_func is flash_attn_func
    np.testing.assert_allclose(cap.maps[CROSS], expected, atol=2e-3)


def test_differential_layers_are_signed(build):
    model = build(attn_kwargs={"differential": True, "qk_norm": "ln"})
    with capture(model) as cap:
        generate(model, "a bass and drums")
    signed = cap.maps[CROSS]
    np.testing.assert_allclose(signed.sum("word"), 0, atol=1e-5)
    np.testing.assert_allclose(signed, cap.maps[f"{CROSS}#0"].values - cap.maps[f"{CROSS}#1"].values, atol=1e-6)


def converted(model, text_encoder):
    """The model's weights in diffusers' classes, by the renaming of diffusers' ``convert_stable_audio.py``."""
    from diffusers import (
        AutoencoderOobleck,
        CosineDPMSolverMultistepScheduler,
        StableAudioDiTModel,
        StableAudioPipeline,
        StableAudioProjectionModel,
    )
    from transformers import AutoTokenizer

    names = {
        "transformer.": "", "layers": "transformer_blocks", "self_attn": "attn1", "cross_attn.": "attn2.", "ff.ff": "ff.net",
        "pre_norm": "norm1", "cross_attend_norm": "norm2", "ff_norm": "norm3", "to_out": "to_out.0", "gamma": "weight",
        "beta": "bias", "project": "proj", "to_timestep_embed": "timestep_proj", "timestep_features": "time_proj",
        "to_global_embed": "global_proj", "to_cond_embed": "cross_attention_proj",
    }  # fmt: skip
    weights = {}
    for name, value in model.model.model.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        if name == "time_proj.weight":
            value = value.squeeze(1)
        parts = {"to_qkv": "qkv", "to_kv": "kv"}
        fused = next((part for part in parts if part in name), None)
        if fused is None:
            weights[name] = value
        else:
            for letter, chunk in zip(parts[fused], value.chunk(len(parts[fused])), strict=True):
                weights[name.replace(fused, f"to_{letter}")] = chunk
    transformer = StableAudioDiTModel(
        sample_size=64,
        in_channels=8,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        out_channels=8,
        cross_attention_dim=128,
        time_proj_dim=256,
        global_states_input_dim=256,
        cross_attention_input_dim=128,
    )
    known = transformer.state_dict()
    transformer.load_state_dict({name: value for name, value in weights.items() if name in known})
    projection = StableAudioProjectionModel(text_encoder_dim=128, conditioning_dim=128, min_value=0, max_value=512)
    renamed = {}
    for name, value in model.conditioner.conditioners.state_dict().items():
        for old, new in {
            "seconds_start": "start_number_conditioner",
            "seconds_total": "end_number_conditioner",
            "embedder.embedding": "time_positional_embedding",
        }.items():
            name = name.replace(old, new)
        renamed[name] = value
    projection.load_state_dict(renamed)
    coder = {"encoder_hidden_size": 6, "decoder_channels": 3, "decoder_input_channels": 8, "audio_channels": 2}
    pipe = StableAudioPipeline(
        transformer=transformer.eval(),
        projection_model=projection.eval(),
        text_encoder=model.conditioner.conditioners["prompt"].model,
        tokenizer=AutoTokenizer.from_pretrained(text_encoder),
        vae=AutoencoderOobleck(
            downsampling_ratios=[4, 4, 4], channel_multiples=[1, 2, 4], sampling_rate=4000, **coder
        ).eval(),
        scheduler=CosineDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_data=1.0),
    )
    return pipe


@torch.no_grad()
def test_the_same_weights_in_diffusers_give_the_same_maps(model, text_encoder):
    """One forward from the same latent and time, both branches, every word and group."""
    pipe = converted(model, text_encoder)
    latent = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0))
    time, prompt, end = torch.tensor([0.6]), "a bass and drums", 0.9

    with capture(model, branch="both") as here:
        rows = [{"prompt": prompt, "seconds_start": 0, "seconds_total": end}]
        inputs = model.get_conditioning_inputs(model.conditioner(rows, "cpu"))
        ours = model.model(latent, time, cfg_scale=6.0, **inputs)
    with capture(pipe, branch="both") as there:
        text = pipe.encode_prompt(prompt, "cpu", True)
        start, total = pipe.encode_duration(0.0, end, "cpu", False, 1)
        pipe.prepare_latents(1, 8, 64, text.dtype, "cpu", None, latents=latent, num_waveforms_per_prompt=1)
        keys = torch.cat([text, start, total], 1)
        whole = torch.cat([start, total], 2)
        from diffusers.models.embeddings import get_1d_rotary_pos_embed

        turns = get_1d_rotary_pos_embed(pipe.rotary_embed_dim, 65, use_real=True, repeat_interleave_real=False)
        theirs = pipe.transformer(
            torch.cat([latent] * 2),
            time,
            encoder_hidden_states=torch.cat([torch.zeros_like(keys), keys]),
            global_hidden_states=torch.cat([whole] * 2),
            rotary_embedding=turns,
            return_dict=False,
        )[0]
    unconditional, conditional = theirs.chunk(2)
    torch.testing.assert_close(unconditional + 6.0 * (conditional - unconditional), ours, atol=1e-3, rtol=1e-3)
    for layer in range(2):
        a = here.maps[f"model.transformer.layers.{layer}.cross_attn"]
        b = there.maps[f"transformer_blocks.{layer}.attn2"]
        kept = b.sizes["time"]  # diffusers crops to the requested seconds
        assert kept == 56
        for branch in ("conditional", "unconditional"):
            for word in a.word.values:
                np.testing.assert_allclose(
                    a.sel(branch=branch, word=word).values[..., :kept],
                    b.sel(branch=branch, word=word).values,
                    atol=1e-4,
                )
