"""The AudioLDM2 backbone: geometry, batches, branches, steps, words."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from aiba_hooks import BackboneMismatch, NothingCaptured, UnknownWord, capture, mel_edges
from aiba_plugins.backbones.audioldm2 import AudioLDM2
from tests.conftest import generate

T5 = "up_blocks.2.attentions.2.transformer_blocks.0.attn2"


@pytest.mark.parametrize(("seconds", "columns"), [(8.0, 200), (0.64, 16), (0.7, 18), (2.5, 63)])
def test_the_lattice_of_every_site_is_read_off_the_running_model(pipe, seconds, columns):
    with capture(pipe, words=["bass"], steps=[0]) as cap:
        generate(pipe, "a bass", steps=1, seconds=seconds)
    found = {}
    for name, array in cap.maps.items():
        found.setdefault(name.split(".attentions")[0], set()).add((array.sizes["time"], array.sizes["frequency"]))
        assert array.attrs["seconds_per_column"] * array.sizes["time"] >= columns * 0.04 - 1e-9
        assert array.frequency_low.values[0] == 0
        assert array.frequency_high.values[-1] == pytest.approx(8000)
        assert np.all(np.diff(array.frequency) > 0)
        assert array.time.values[0] == pytest.approx(array.attrs["seconds_per_column"] / 2)

    def level(k):
        return {(-(-columns // 2**k), 16 // 2**k)}

    assert found == {
        "down_blocks.1": level(1),
        "up_blocks.2": level(1),
        "down_blocks.2": level(2),
        "up_blocks.1": level(2),
        "down_blocks.3": level(3),
        "mid_block": level(3),
        "up_blocks.0": level(3),
    }
    assert cap.maps[T5].attrs["seconds_per_column"] == pytest.approx(0.08)


def test_the_papers_setting_has_16_positions_on_three_lattices(pipe):
    with capture(pipe, words=["bass"]) as cap:
        generate(pipe, "a bass", steps=1, seconds=8.0)
    sizes = [(a.sizes["time"], a.sizes["frequency"]) for a in cap.maps.values()]
    assert sorted(set(sizes)) == [(25, 2), (50, 4), (100, 8)]
    assert [sizes.count(s) for s in ((100, 8), (50, 4), (25, 2))] == [5, 5, 6]


def test_several_prompts_and_waveforms_each_have_their_own_row(pipe):
    prompts = ["a bass and drums", "piano", "soft drums with a kazoo"]
    single = []
    latents = torch.randn(6, 8, 16, 16, generator=torch.Generator().manual_seed(3))
    for i, prompt in enumerate(prompts):
        with capture(pipe, words=None) as cap:
            generate(pipe, prompt, steps=2, latents=latents[2 * i : 2 * i + 1].clone(), guidance_scale=2.0)
        single.append(cap.maps[T5])
    with capture(pipe) as cap:
        generate(pipe, prompts, steps=2, latents=latents.clone(), num_waveforms_per_prompt=2, guidance_scale=2.0)
    array = cap.maps[T5]
    assert array.sizes["prompt"] == 6
    words = ["a", "bass", "and", "drums", "piano", "soft", "with", "kazoo", "(special)", "(padding)"]
    assert list(array.word.values) == words
    # the pipeline may re-sort (and repeat) its waveforms by CLAP score: rows follow the audio and say where they come from
    for row in range(6):
        part = array.isel(prompt=row)
        source = prompts.index(str(part.prompt.values))
        own = set(prompts[source].replace("a kazoo", "kazoo a").split())
        for word in words[:-2]:
            assert bool(np.isnan(part.sel(word=word)).all()) == (word not in own), (row, word)
        if int(part.waveform) == 0:
            expected = single[source].isel(prompt=0)
            for word in own:
                np.testing.assert_allclose(part.sel(word=word), expected.sel(word=word), atol=2e-5)
        np.testing.assert_allclose(part.sum("word", skipna=True), 1, atol=1e-5)


def test_rows_follow_the_returned_audio(pipe, monkeypatch):
    """score_waveforms re-sorts; the maps are re-sorted with it."""
    latents = torch.randn(3, 8, 16, 16, generator=torch.Generator().manual_seed(3))
    options = {"steps": 1, "num_waveforms_per_prompt": 3, "guidance_scale": 2.0}
    with capture(pipe, words=["bass"]) as cap:
        audio = generate(pipe, "a bass", latents=latents.clone(), **options)
    for row, waveform in enumerate(cap.maps[T5].waveform.values):
        with capture(pipe, words=["bass"]) as alone:
            one = generate(
                pipe, "a bass", steps=1, guidance_scale=2.0, latents=latents[waveform : waveform + 1].clone()
            )
        np.testing.assert_allclose(audio[row], one[0], atol=1e-4)
        np.testing.assert_allclose(cap.maps[T5].values[row], alone.maps[T5].values[0], atol=2e-5)


def test_branches_are_told_apart(pipe):
    def run(branch, **options):
        with capture(pipe, words=["bass"], branch=branch) as cap:
            generate(pipe, "a bass", steps=2, **options)
        return cap.maps[T5]

    conditional, unconditional, both = run("conditional"), run("unconditional"), run("both")
    assert both.dims == ("branch", "prompt", "step", "word", "time", "frequency")
    np.testing.assert_array_equal(both.sel(branch="conditional"), conditional)
    np.testing.assert_array_equal(both.sel(branch="unconditional"), unconditional)
    # the empty prompt keeps one token, </s> in place of the first word: all its attention is there
    assert float(unconditional.sel(word="bass").max()) == 0
    assert 0 < float(conditional.sel(word="bass").mean()) < 1
    with pytest.raises(NothingCaptured, match="branch='unconditional' is not in this forward"):
        run("unconditional", guidance_scale=1.0)
    np.testing.assert_allclose(run("conditional", guidance_scale=1.0).sizes["prompt"], 1)


def test_steps_carry_index_timestep_and_sigma(pipe):
    with capture(pipe, words=["bass"]) as cap:
        generate(pipe, "a bass", steps=4)
    array = cap.maps[T5]
    np.testing.assert_array_equal(array.timestep, pipe.scheduler.timesteps.numpy())
    alphas = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps].numpy()
    np.testing.assert_allclose(array.sigma, np.sqrt((1 - alphas) / alphas), rtol=1e-5)
    for chosen, expected in (([1, -1], [1, 3]), (slice(1, None, 2), [1, 3]), (slice(-2, None), [2, 3]), ([0], [0])):
        with capture(pipe, words=["bass"], steps=chosen) as part:
            generate(pipe, "a bass", steps=4)
        assert list(part.maps[T5].step.values) == expected
        np.testing.assert_array_equal(part.maps[T5], array.sel(step=expected))


@pytest.mark.parametrize("call", ["positional", "keyword", "tensor"])
def test_the_step_clock_reads_the_timestep_however_it_is_passed(pipe, call):
    with torch.no_grad(), capture(pipe, words=["bass"]) as cap:
        embeds, mask, generated = pipe.encode_prompt("a bass", "cpu", 1, False)
        sample = torch.randn(1, 8, 16, 16)
        conditions = {
            "encoder_hidden_states": generated,
            "encoder_hidden_states_1": embeds,
            "encoder_attention_mask_1": mask,
        }
        if call == "positional":
            pipe.unet(sample, 300, **conditions)
        elif call == "keyword":
            pipe.unet(sample=sample, timestep=300, **conditions)
        else:
            pipe.unet(sample, torch.tensor([300]), **conditions)
    assert list(cap.maps[T5].timestep.values) == [300]


def test_layers_take_one_pattern_or_several(pipe):
    with capture(pipe, words=["bass"], layers=["mid*", "up_blocks.2.*"]) as cap:
        generate(pipe, "a bass", steps=1)
    assert {name.split(".")[0] for name in cap.maps} == {"mid_block", "up_blocks"}
    assert len(cap.maps) == 4


def test_words(pipe):
    prompt = "Bass, a kazoo & DRUMS; bass!"
    with capture(pipe) as cap:
        generate(pipe, prompt, steps=1)
    every = cap.maps[T5]
    assert list(every.word.values) == ["Bass", "a", "kazoo", "DRUMS", "(other)", "(special)"]
    with capture(pipe, words=["bass", "bass#0", "bass#1", "drums", "a kazoo"]) as cap:
        generate(pipe, prompt, steps=1)
    array = cap.maps[T5]
    assert list(array.word.values)[:5] == ["bass", "bass#0", "bass#1", "drums", "a kazoo"]
    np.testing.assert_allclose(array.sel(word="bass"), every.sel(word="Bass"), atol=1e-6)
    np.testing.assert_allclose(
        array.sel(word="bass"), array.sel(word="bass#0").values + array.sel(word="bass#1").values, atol=1e-6
    )
    np.testing.assert_allclose(
        array.sel(word="a kazoo"), every.sel(word="a").values + every.sel(word="kazoo").values, atol=1e-6
    )


def test_a_word_that_is_not_in_the_prompt_lists_the_words_that_are(pipe):
    with pytest.raises(UnknownWord) as error, capture(pipe, words=["bass", "violin"]):
        generate(pipe, "a Bass and drums", steps=1)
    assert str(error.value) == "'violin' is not in the prompt 'a Bass and drums'. Its words are: a, Bass, and, drums"


def test_a_word_that_the_tokenizer_cut_off(pipe):
    prompt = " ".join(["loud"] * 80) + " violin"
    with pytest.raises(UnknownWord, match="the tokenizer cut it off"), capture(pipe, words=["violin"]):
        generate(pipe, prompt, steps=1)


@pytest.mark.parametrize("heads", ["mean", "all"])
def test_a_backbone_that_miscounts_waveforms_is_refused(pipe, heads):
    """Two samples must never pass for one sample with its heads folded into the batch."""

    class Miscounting(AudioLDM2):
        def conditioning(self, target, arguments, result):
            return dataclasses.replace(super().conditioning(target, arguments, result), waveforms=1)

    with pytest.raises(
        BackboneMismatch, match="the denoiser's batch is 2 and the kernel's 2, but 1 prompts × 1 waveforms"
    ):
        with capture(pipe, words=["bass"], heads=heads, backbone=Miscounting()):
            generate(pipe, "a bass", steps=1, guidance_scale=1.0, num_waveforms_per_prompt=2)


def test_a_backbone_may_leave_the_waveforms_to_the_batch(pipe):
    class Open(AudioLDM2):
        def conditioning(self, target, arguments, result):
            return dataclasses.replace(super().conditioning(target, arguments, result), waveforms=None)

    maps = []
    for backbone in (AudioLDM2(), Open()):
        with capture(pipe, words=["bass"], backbone=backbone) as cap:
            generate(pipe, ["a bass", "bass drums"], steps=1, num_waveforms_per_prompt=2)
        maps.append(cap.maps[T5])
    assert maps[1].identical(maps[0])


def test_prompts_given_as_embeddings_have_no_words(pipe):
    with torch.no_grad():
        embeds, mask, generated = pipe.encode_prompt("a bass", "cpu", 1, False)
    options = {
        "prompt_embeds": embeds,
        "generated_prompt_embeds": generated,
        "attention_mask": mask,
        "guidance_scale": 1.0,
    }
    with capture(pipe, keep="full") as cap:
        generate(pipe, None, steps=1, **options)
    assert cap.maps[T5].sizes["key"] == embeds.shape[1]
    with pytest.raises(UnknownWord, match="Its words are: none"), capture(pipe, words=["bass"]):
        generate(pipe, None, steps=1, **options)


def test_two_calls_in_one_capture_are_joined_along_prompt(pipe):
    with capture(pipe) as cap:
        generate(pipe, "a bass", steps=2)
        generate(pipe, "drums", steps=2)
    array = cap.maps[T5]
    assert list(array.prompt.values) == ["a bass", "drums"]
    assert list(array.word.values) == ["a", "bass", "drums", "(special)"]
    assert np.isnan(array.sel(word="drums").isel(prompt=0)).all()
    assert not np.isnan(array.sel(word="drums").isel(prompt=1)).any()


def test_provenance(pipe):
    with capture(pipe, words=["bass"]) as cap:
        generate(pipe, "a bass", steps=1, seed=7)
    attrs = cap.maps[T5].attrs
    assert attrs["seed"] == 7
    assert (attrs["model"], attrs["backbone"], attrs["tag"], attrs["stream"]) == (
        "AudioLDM2Pipeline", "audioldm2", "cross", "t5",
    )  # fmt: skip
    assert "torch=2." in attrs["versions"]
    assert "encoder_hidden_states_1" in attrs["evidence"]


@pytest.mark.parametrize("scale", ["slaney", "htk"])
def test_mel_band_edges_are_librosas(scale):
    import librosa

    edges = mel_edges(64, 20.0, 8000.0, scale)
    low, high = librosa.hz_to_mel([20.0, 8000.0], htk=scale == "htk")
    np.testing.assert_allclose(librosa.hz_to_mel(edges, htk=scale == "htk"), np.linspace(low, high, 65), atol=1e-9)
    with pytest.raises(ValueError, match="scale must be"):
        mel_edges(64, 0, 8000, "bark")
    with pytest.raises(ValueError, match="0 <= fmin < fmax"):
        mel_edges(64, 8000, 0)
