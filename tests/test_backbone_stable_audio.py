"""Stable Audio Open through diffusers: the real classes and strides, tiny widths."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aiba_hooks import BackboneMismatch, DegeneratePooling, NothingCaptured, UnknownWord, capture, intervene
from aiba_hooks.testing import check_backbone
from aiba_plugins.backbones.latents import time_lattice
from aiba_plugins.backbones.stable_audio import StableAudio
from tests import tiny
from tests.tiny import generate

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchsde.*")
CROSS = "transformer_blocks.0.attn2"
GROUPS = ["(special)", "(padding)", "(duration)"]


@pytest.fixture(scope="module")
def pipe():
    return tiny.stable_audio()


@pytest.fixture(scope="module")
def full_size():
    """The published window: 1024 columns of 2048 samples at 44.1 kHz, 128 tokens."""
    return tiny.stable_audio(columns=1024, strides=(2, 4, 4, 8, 8), rate=44100, length=128)


def test_the_papers_setting(full_size):
    """8.0 s are columns 0..171 of 1024 at 21.533 Hz, no frequency axis; 1025 queries, 1025 keys in self and 130 in cross."""
    with capture(full_size) as cap:
        audio = generate(full_size, "a bass and drums", steps=1, audio_end_in_s=8.0, output_type="np")
    assert audio.shape == (1, 2, 352800)
    shapes = {(str(site.tag), site.query_shape[2], site.key_shape[2]) for site in cap.sites}
    assert shapes == {("self", 1025, 1025), ("cross", 1025, 130)}
    array = cap.maps[CROSS]
    assert array.dims == ("prompt", "step", "word", "time")
    assert array.sizes["time"] == 172
    assert 1 / array.attrs["seconds_per_column"] == pytest.approx(21.533, abs=5e-4)
    np.testing.assert_allclose(array.time, (np.arange(172) + 0.5) * 2048 / 44100)
    assert list(array.word.values) == ["a", "bass", "and", "drums", *GROUPS]
    assert "frequency" not in array.coords


def test_the_papers_recipe_is_flat_by_construction(full_size):
    """What made its Stable Audio maps flat: pooling over every key, the unconditional half, pads that nothing masks."""
    with capture(full_size, keep="full", branch="both", steps=[0]) as cap:
        generate(full_size, "a bass and drums", steps=2, audio_end_in_s=8.0)
    full = cap.maps[CROSS].isel(prompt=0, step=0)
    assert full.sizes["key"] == 130
    # the mean over all keys is 1/Tk for every query, whatever the model does
    conditional = full.sel(branch="conditional")
    np.testing.assert_allclose(conditional.mean("key"), 1 / 130, atol=1e-7)
    assert float(conditional.std("key").mean()) > 1e-5
    with pytest.raises(DegeneratePooling, match="1/Tk for every query"):
        capture(full_size, pooling="mean")
    # the unconditional keys are all zeros
    np.testing.assert_allclose(full.sel(branch="unconditional"), 1 / 130, atol=1e-9)
    # a pad's key is zero, so that its logit is 0 whatever the query: one probability for all pads, and most of the mass
    with capture(full_size, words=["bass"], heads="all", steps=[0]) as pooled:
        generate(full_size, "a bass and drums", steps=2, audio_end_in_s=8.0)
    with capture(full_size, keep="full", heads="all", steps=[0]) as cap:
        generate(full_size, "a bass and drums", steps=2, audio_end_in_s=8.0)
    per_head = cap.maps[CROSS].isel(prompt=0, step=0)
    pads = per_head.isel(key=slice(5, 128))
    np.testing.assert_allclose(pads, np.broadcast_to(pads.isel(key=[0]), pads.shape), atol=1e-8)
    padding = pooled.maps[CROSS].sel(word="(padding)").isel(prompt=0, step=0)
    np.testing.assert_allclose(padding, pads.sum("key"), atol=1e-5)
    assert float(padding.mean()) > 0.9


def test_query_0_is_the_global_token_and_is_dropped(pipe):
    with capture(pipe.transformer, keep="full", kinds=("cross", "self")) as cap:
        generate(pipe, "a bass", steps=1, guidance_scale=1.0)
    raw = cap.maps[CROSS].isel(call=0, batch=0)
    with capture(pipe, keep="full") as cap:
        generate(pipe, "a bass", steps=1, guidance_scale=1.0)
    placed = cap.maps[CROSS].isel(prompt=0, step=0)
    assert (raw.sizes["query"], placed.sizes["time"]) == (65, 64)
    np.testing.assert_array_equal(placed.transpose("time", "key"), raw.isel(query=slice(1, None)))


def test_maps_are_the_softmax_with_shared_key_value_heads(pipe):
    seen = {}
    module = pipe.transformer.get_submodule(CROSS)
    handles = [
        part.register_forward_hook(lambda m, a, output, name=name: seen.setdefault(name, output))
        for name, part in (("q", module.to_q), ("k", module.to_k))
    ]
    with capture(pipe, keep="full", steps=[0], branch="both", heads="all") as cap:
        generate(pipe, "a bass and drums", steps=2)
    for handle in handles:
        handle.remove()
    query = seen["q"].unflatten(-1, (6, 8)).transpose(1, 2)
    key = seen["k"].unflatten(-1, (3, 8)).transpose(1, 2).repeat_interleave(2, 1)
    expected = torch.softmax(query @ key.transpose(-1, -2) * 8**-0.5, -1)[:, :, 1:]
    array = cap.maps[CROSS].isel(prompt=0, step=0).transpose("branch", "head", "time", "key")
    assert list(array.branch.values) == ["unconditional", "conditional"]
    np.testing.assert_allclose(array, expected.numpy(), atol=1e-6)


def test_it_conforms(pipe):
    report = check_backbone(
        StableAudio(),
        pipe,
        lambda prompt: generate(pipe, prompt, guidance_scale=3.0, audio_end_in_s=0.9),
        prompt="a bass and drums",
        other_prompt="soft piano with guitar",
        words=["bass", "drums"],
    )
    assert report["sites"] == 2
    assert report["lattices"] == [(56,)]
    assert report["check"] < 1e-5


def test_the_window_is_cropped_as_the_audio_is(pipe):
    """64 columns of 16 ms; time 0 is the first sample returned."""
    with capture(pipe, words=["bass"]) as cap:
        generate(pipe, "a bass", steps=1)
    whole = cap.maps[CROSS]
    assert whole.sizes["time"] == 64
    with capture(pipe, words=["bass"]) as cap:
        audio = generate(pipe, "a bass", steps=1, audio_start_in_s=0.1, audio_end_in_s=0.5)
    part = cap.maps[CROSS]
    assert audio.shape[-1] == 1600
    assert part.sizes["time"] == 25
    assert part.time.values[0] == pytest.approx(0.004)
    assert 0 < part.time.values[-1] < 0.4


@pytest.mark.parametrize(
    ("window", "first", "columns"),
    [
        ((0, 8.0), 0.5, 172),
        ((0, 0.01), 0.5, 1),
        ((0, 99.0), 0.5, 1024),
        ((40.0, 47.5), 861.5, 162),
        ((47.53, 47.55), 1023.5, 1),
    ],
)
def test_columns_of_a_window(window, first, columns):
    rate = 44100 / 2048
    lattice = time_lattice(1024, 1 / rate, prefix=1, window=window)
    placed = lattice.place(np.arange(1025))  # token i lies in column i − 1
    assert len(placed) == columns == len(lattice.coords()["time"][1])
    np.testing.assert_allclose((lattice.coords()["time"][1] + window[0]) * rate, placed - 0.5)
    assert placed[0] - 0.5 == first


def test_branches_are_told_apart(pipe):
    def run(branch, **options):
        with capture(pipe, branch=branch) as cap:
            generate(pipe, "a bass", steps=2, **options)
        return cap.maps[CROSS]

    both = run("both", negative_prompt="low quality")
    assert both.dims == ("branch", "prompt", "step", "word", "time")
    np.testing.assert_array_equal(both.sel(branch="conditional"), run("conditional", negative_prompt="low quality"))
    np.testing.assert_array_equal(both.sel(branch="unconditional"), run("unconditional", negative_prompt="low quality"))
    assert float(abs(both.sel(branch="conditional") - both.sel(branch="unconditional")).max()) > 1e-4
    # 26 keys: 2 words of one token each, </s>, 21 pads, 2 for the duration
    flat = run("unconditional").isel(prompt=0, step=0, time=0)
    np.testing.assert_allclose(flat.values * 26, [1, 1, 1, 21, 2], atol=1e-5)
    with pytest.raises(NothingCaptured, match="branch='unconditional' is not in this forward"):
        run("unconditional", guidance_scale=1.0)
    assert run("conditional", guidance_scale=1.0).sizes["prompt"] == 1


@pytest.mark.parametrize("negative", [None, ["low quality", "low quality", "low quality"]])
def test_several_prompts_and_waveforms_each_have_their_own_row(pipe, negative):
    prompts = ["a bass and drums", "piano", "soft drums with a kazoo"]
    latents = torch.randn(6, 8, 64, generator=torch.Generator().manual_seed(3))
    with capture(pipe, steps=[0]) as cap:
        generate(pipe, prompts, latents=latents.clone(), num_waveforms_per_prompt=2, negative_prompt=negative)
    array = cap.maps[CROSS]
    assert list(array.prompt.values) == [prompt for prompt in prompts for _ in range(2)]
    assert list(array.waveform.values) == [0, 1] * 3
    for row in range(6):
        with capture(pipe, steps=[0]) as alone:
            generate(
                pipe,
                prompts[row // 2],
                latents=latents[row : row + 1].clone(),
                negative_prompt=negative and negative[0],
            )
        expected, part = alone.maps[CROSS].isel(prompt=0), array.isel(prompt=row)
        for word in array.word.values:
            if word in expected.word:
                np.testing.assert_allclose(part.sel(word=word), expected.sel(word=word), atol=2e-5)
            else:
                assert part.sel(word=word).isnull().all()


@pytest.mark.parametrize("scheduler", ["cosine", "edm"])
def test_steps_carry_the_schedulers_noise_level(scheduler):
    """The timestep is the preconditioned noise, not the noise: 2·atan(σ)/π, or ln(σ)/4."""
    pipe = tiny.stable_audio(scheduler)
    with capture(pipe, words=["bass"]) as cap:
        generate(pipe, "a bass", steps=4)
        generate(pipe, "a bass", steps=2)
    array = cap.maps[CROSS].isel(prompt=0)
    sigmas = np.geomspace(500, 0.3, 4)
    np.testing.assert_allclose(array.sigma, sigmas, rtol=1e-4)
    expected = np.arctan(sigmas) * 2 / np.pi if scheduler == "cosine" else np.log(sigmas) / 4
    np.testing.assert_allclose(array.timestep, expected, rtol=1e-4)
    with capture(pipe, words=["bass"], steps=[-1]) as cap:
        generate(pipe, "a bass", steps=4)
    assert list(cap.maps[CROSS].step.values) == [3]


def test_outputs_are_the_same_and_everything_is_put_back(pipe):
    before = sorted(vars(pipe))
    plain = generate(pipe, "a bass")
    with capture(pipe, kinds=("cross", "self")) as cap:
        assert torch.equal(generate(pipe, "a bass"), plain)
    assert sorted(vars(pipe)) == before
    assert {site.tag.kind for site in cap.sites if site.captured} == {"cross", "self"}
    with intervene(pipe, reweight={"bass": 0.0}):
        assert not torch.equal(generate(pipe, "a bass"), plain)
    assert torch.equal(generate(pipe, "a bass"), plain)


def test_words_that_are_not_there(pipe):
    with pytest.raises(UnknownWord) as error, capture(pipe, words=["violin"]):
        generate(pipe, "a bass", steps=1)
    assert str(error.value) == "'violin' is not in the prompt 'a bass'. Its words are: a, bass"
    with pytest.raises(UnknownWord, match="the tokenizer cut it off"), capture(pipe, words=["violin"]):
        generate(pipe, " ".join(["loud"] * 40) + " violin", steps=1)


def test_prompts_given_as_embeddings_have_no_words(pipe):
    with torch.no_grad():
        embeds = pipe.encode_prompt("a bass", "cpu", False)
    options = {"prompt_embeds": embeds, "steps": 1, "guidance_scale": 1.0}
    with capture(pipe, keep="full") as cap:
        generate(pipe, None, **options)
    assert cap.maps[CROSS].sizes["key"] == 26
    with pytest.raises(UnknownWord, match="Its words are: none"), capture(pipe, words=["bass"]):
        generate(pipe, None, **options)


def test_a_denoiser_run_before_the_prompt_is_refused(pipe):
    arguments = {}
    handle = pipe.transformer.register_forward_pre_hook(lambda m, a, k: arguments.update(a=a, k=k), with_kwargs=True)
    generate(pipe, "a bass", steps=1)
    handle.remove()
    with pytest.raises(BackboneMismatch, match="the prompt is unknown"), capture(pipe):
        pipe.transformer(*arguments["a"], **arguments["k"])
    with pytest.raises(BackboneMismatch, match="the prompt is unknown"), capture(pipe):
        pipe.prepare_latents(1, 8, 64, torch.float32, "cpu", None)  # a part of what the pipeline runs
        pipe.transformer(*arguments["a"], **arguments["k"])
