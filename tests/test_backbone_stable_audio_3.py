"""Stable Audio 3: memory tokens, a duration key, learned pads; differential attention by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aiba_hooks import UnknownWord, capture
from aiba_hooks.errors import CheckColumnError
from aiba_hooks.testing import check_backbone
from aiba_plugins.backbones.stable_audio_3 import StableAudio3
from tests import tiny
from tests.tiny import generate

CROSS = "transformer_blocks.1.cross_attn"
GROUPS = ["(special)", "(padding)", "(duration)"]


@pytest.fixture(scope="module")
def pipe():
    return tiny.stable_audio_3()


def run(pipe, prompt="a bass and drums", **options):
    return generate(pipe, prompt, **{"duration": 6.0, "guidance_scale": 3.0, **options})


@pytest.mark.parametrize("differential", [True, False])
def test_it_conforms(differential):
    pipe = tiny.stable_audio_3(differential)
    report = check_backbone(
        StableAudio3(),
        pipe,
        lambda prompt: run(pipe, prompt),
        prompt="a bass and drums",
        other_prompt="soft piano with guitar",
        words=["bass", "drums"],
    )
    assert report["sites"] == (6 if differential else 2)  # each site's signed map, and its two terms
    assert report["lattices"] == [(24,)]
    assert report["check"] < 1e-5


def projected(pipe, name, **options):
    """Both attentions of a site in the first forward, from its own projections and norms: [rows, heads, queries, keys]."""
    module = pipe.transformer.get_submodule(name)
    seen = {}
    handles = [
        part.register_forward_hook(lambda m, a, output, part=part: seen.setdefault(part, output))
        for part in (module.to_q, module.to_kv)
    ]
    run(pipe, **options)
    for handle in handles:
        handle.remove()
    (q1, q2), (k1, k2, _) = seen[module.to_q].chunk(2, -1), seen[module.to_kv].chunk(3, -1)
    maps = []
    for q, k in ((q1, k1), (q2, k2)):
        q = module.q_norm(q.unflatten(-1, (module.heads, -1))).transpose(1, 2)
        k = module.k_norm(k.unflatten(-1, (module.heads, -1))).transpose(1, 2)
        maps.append(torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1))
    return maps


def test_the_map_is_the_first_attention_minus_the_second(pipe):
    with torch.no_grad():
        first, second = projected(pipe, CROSS)
    with capture(pipe, keep="full", heads="all", steps=[0], branch="both") as cap:
        run(pipe)
    for name, expected in ((CROSS, first - second), (f"{CROSS}#0", first), (f"{CROSS}#1", second)):
        array = cap.maps[name].isel(prompt=0, step=0).transpose("branch", "head", "time", "key")
        assert list(array.branch.values) == ["unconditional", "conditional"]
        np.testing.assert_allclose(array, expected[:, :, 3:].numpy(), atol=1e-6)  # 3 memory tokens
    signed = cap.maps[CROSS]
    np.testing.assert_allclose(signed.sum("key"), 0, atol=1e-6)
    assert float(signed.min()) < 0 < float(signed.max())
    assert signed.attrs["signs"] == [1.0, -1.0]
    assert "signs" not in cap.maps[f"{CROSS}#0"].attrs


def test_word_maps_are_signed_sums_too(pipe):
    with capture(pipe) as cap:
        run(pipe)
    array = cap.maps[CROSS]
    assert list(array.word.values) == ["a", "bass", "and", "drums", *GROUPS]
    np.testing.assert_allclose(array, cap.maps[f"{CROSS}#0"].values - cap.maps[f"{CROSS}#1"].values, atol=1e-7)
    np.testing.assert_allclose(cap.maps[f"{CROSS}#0"].sum("word"), 1, atol=1e-5)


class Swapped(StableAudio3):
    def signs(self, site):
        return (1.0, 1.0)


class Factor(StableAudio3):
    def signs(self, site):
        return (1.0, -0.8)


class Three(StableAudio3):
    def signs(self, site):
        return (1.0, -1.0, 1.0)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (
            Swapped,
            r"_attn: its output projection reads something else than the sum of its calls with signs \(1.0, 1.0\)",
        ),
        (Factor, r"signs \(1.0, -0.8\): off by"),
        (Three, r"signs \(1.0, -1.0, 1.0\) are declared, but no projection .* \(2 calls waiting\)"),
    ],
)
def test_wrong_signs_are_caught_at_the_output_projection(pipe, backbone, message):
    with pytest.raises(CheckColumnError, match=message), capture(pipe, backbone=backbone()):
        run(pipe)


def test_without_differential_attention_there_are_no_signs():
    pipe = tiny.stable_audio_3(differential=False)
    with capture(pipe) as cap:
        run(pipe)
    assert CROSS in cap.maps and f"{CROSS}#0" not in cap.maps
    np.testing.assert_allclose(cap.maps[CROSS].sum("word"), 1, atol=1e-5)


def test_pads_are_one_learned_key_that_nothing_masks(pipe):
    with capture(pipe, keep="full", heads="all", steps=[0]) as cap:
        run(pipe)
    first = cap.maps[f"{CROSS}#0"].isel(prompt=0, step=0)
    pads = first.isel(key=slice(5, 24))
    assert first.sizes["key"] == 25
    np.testing.assert_allclose(pads, np.broadcast_to(pads.isel(key=[0]), pads.shape), atol=1e-7)
    assert float(pads.min()) > 0


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ({"duration": 6.0}, 24),
        (
            {"duration": 2.6},
            10,
        ),  # 11 columns are generated; the last would begin within the audio, its centre lies after it
        ({"duration": 2.0, "silence_padding_duration": 1.0}, 8),
    ],
)
def test_the_lattice_is_cropped_to_the_duration(pipe, options, columns):
    with capture(pipe, words=["bass"]) as cap:
        audio = run(pipe, **options, output_type="np")
    array = cap.maps[CROSS]
    assert array.sizes["time"] == columns
    np.testing.assert_allclose(array.time, (np.arange(columns) + 0.5) * 0.25)
    assert abs(audio.shape[-1] / 16 - columns * 0.25) <= 0.125


def test_patches_make_longer_columns():
    pipe = tiny.stable_audio_3(patch=2, memory=0)
    with capture(pipe, words=["bass"]) as cap:
        run(pipe)
    assert cap.maps[CROSS].sizes["time"] == 12
    assert cap.maps[CROSS].attrs["seconds_per_column"] == 0.5


def test_the_negative_prompt_is_not_the_prompt(pipe):
    with capture(pipe, words=["bass"], branch="both") as cap:
        run(pipe, negative_prompt="low quality")
    assert list(cap.maps[CROSS].prompt.values) == ["a bass and drums"]
    with capture(pipe, words=["bass"]) as cap:
        run(pipe, guidance_scale=1.0)
    assert cap.maps[CROSS].sizes["prompt"] == 1
    with pytest.raises(UnknownWord, match="Its words are: a, bass, and, drums"), capture(pipe, words=["quality"]):
        run(pipe, negative_prompt="low quality")


def test_several_prompts_and_waveforms_each_have_their_own_row(pipe):
    prompts = ["a bass and drums", "piano"]
    latents = torch.randn(4, 8, 24, generator=torch.Generator().manual_seed(3))
    with capture(pipe, steps=[0]) as cap:
        run(pipe, prompts, latents=latents.clone(), num_waveforms_per_prompt=2)
    array = cap.maps[CROSS]
    assert list(array.prompt.values) == [prompt for prompt in prompts for _ in range(2)]
    for row in range(4):
        with capture(pipe, steps=[0]) as alone:
            run(pipe, prompts[row // 2], latents=latents[row : row + 1].clone())
        expected = alone.maps[CROSS].isel(prompt=0)
        np.testing.assert_allclose(array.isel(prompt=row).sel(word=expected.word), expected, atol=2e-5)


def test_steps_and_outputs(pipe):
    plain = run(pipe, steps=3)
    with capture(pipe, words=["bass"], kinds=("cross", "self")) as cap:
        assert torch.equal(run(pipe, steps=3), plain)
    array = cap.maps[CROSS]
    np.testing.assert_allclose(array.sigma, pipe.scheduler.sigmas[:-1], rtol=1e-6)
    assert array.sigma.values[0] == 1
    np.testing.assert_allclose(array.timestep, array.sigma, rtol=1e-6)
    own = cap.maps["transformer_blocks.0.self_attn"]
    np.testing.assert_allclose(
        own, cap.maps["transformer_blocks.0.self_attn#0"].values - cap.maps["transformer_blocks.0.self_attn#1"].values,
        atol=1e-7,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("StableAudio3AudioToAudioPipeline", {"init_noise_level": 0.7}),
        ("StableAudio3InpaintPipeline", {"mask_start_seconds": 1.0, "mask_end_seconds": 2.0}),
    ],
)
def test_its_variants_from_audio(pipe, variant, options):
    import diffusers

    other = tiny.finished(getattr(diffusers, variant)(**pipe.components))
    audio = torch.randn(1, 2, 96, generator=torch.Generator().manual_seed(0))

    def make(prompt):
        return generate(other, prompt, duration=6.0, audio=audio, **options)

    report = check_backbone(
        StableAudio3(),
        other,
        make,
        prompt="a bass and drums",
        other_prompt="soft piano with guitar",
        words=["bass", "drums"],
    )
    assert report["lattices"] == [(24,)]
    with capture(other, words=["bass"]) as cap:
        make("a bass")
    assert cap.backbone.name == "stable-audio-3"
    assert cap.maps[CROSS].sigma.values[0] == pytest.approx(options.get("init_noise_level", 1.0), abs=0.05)
