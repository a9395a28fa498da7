"""ACE-Step 1.5: lyrics, timbre and text in one packed sequence of keys; guidance within an interval."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aiba_hooks import UnknownWord, capture
from aiba_hooks.testing import check_backbone
from aiba_plugins.backbones.ace_step import AceStep
from tests import tiny
from tests.tiny import generate

CROSS = "layers.1.cross_attn"


@pytest.fixture(scope="module")
def pipe():
    return tiny.ace_step()


def run(pipe, prompt="a bass and drums", **options):
    return generate(pipe, prompt, **{"audio_duration": 1.0, "lyrics": "la la", "guidance_scale": 3.0, **options})


def test_it_conforms(pipe):
    report = check_backbone(
        AceStep(),
        pipe,
        lambda prompt: run(pipe, prompt),
        prompt="a bass and drums",
        other_prompt="soft piano with guitar",
        words=["bass", "drums"],
        latent_axes=[1],
    )
    assert report == {"sites": 2, "lattices": [(13,)], "check": report["check"], "steps": 2}
    assert report["check"] < 1e-5


def test_two_frames_at_25_hz_are_one_column(pipe):
    assert pipe.latents_per_second == 25
    with capture(pipe, words=["bass"]) as cap:
        run(pipe, audio_duration=4.0)
    array = cap.maps[CROSS]
    assert (array.sizes["time"], array.attrs["seconds_per_column"]) == (50, pytest.approx(1 / 12.5))
    with capture(pipe, words=["bass"]) as cap:
        run(pipe)  # 25 frames: the last column is half audio
    assert cap.maps[CROSS].sizes["time"] == 13


def keys_of(pipe, **options):
    """What the denoiser was given as keys, and the parts it was packed from."""
    seen = {}
    handles = [
        pipe.condition_encoder.register_forward_hook(
            lambda m, a, k, out: seen.update(inputs=k, packed=out), with_kwargs=True
        ),
        pipe.condition_encoder.lyric_encoder.register_forward_hook(lambda m, a, out: seen.update(lyrics=out)),
        pipe.condition_encoder.timbre_encoder.register_forward_hook(lambda m, a, out: seen.update(timbre=out[0])),
        pipe.condition_encoder.text_projector.register_forward_hook(lambda m, a, out: seen.update(text=out)),
    ]
    with capture(pipe) as cap:
        run(pipe, **options)
    for handle in handles:
        handle.remove()
    return seen, cap


def test_every_key_has_the_group_of_what_it_was_packed_from(pipe):
    """Two prompts and lyrics of different lengths, so that pads exist; each packed key is found among the unpacked ones."""
    seen, cap = keys_of(pipe, prompt=["a bass and drums", "piano"], lyrics=["la la la", "soft"])
    stream = cap.conditionings[-1].streams[0]
    packed, mask = seen["packed"]
    assert stream.length == packed.shape[1]
    for row in range(2):
        roles = np.array(stream.roles[row])
        assert [role == "padding" for role in roles] == [not valid for valid in mask[row].tolist()]
        valid = {
            "lyrics": seen["inputs"]["lyric_attention_mask"][row],
            "text": seen["inputs"]["text_attention_mask"][row],
        }
        lyrics, text = seen["lyrics"][row][valid["lyrics"]], seen["text"][row][valid["text"]]
        torch.testing.assert_close(packed[row][torch.from_numpy(roles == "lyrics")], lyrics)
        torch.testing.assert_close(packed[row][torch.from_numpy(roles == "timbre")], seen["timbre"][row])
        is_text = torch.from_numpy(np.isin(roles, ["word", "other", "special"]))
        torch.testing.assert_close(packed[row][is_text], text)
    array = cap.maps[CROSS]
    groups = ["(other)", "(special)", "(padding)", "(lyrics)", "(timbre)"]
    assert list(array.word.values) == ["a", "bass", "and", "drums", "piano", *groups]
    np.testing.assert_allclose(array.sum("word"), 1, atol=1e-5)
    assert float(array.sel(word="(padding)").isel(prompt=1).min()) > 0  # unmasked


def test_only_the_prompts_own_tokens_are_its_words(pipe):
    """The template says "Fill the audio semantic mask based on the given conditions", "Caption" and "Metas"."""
    with capture(pipe, words=["the", "given"]) as cap:
        run(pipe, "the given bass")
    stream = cap.conditionings[-1].streams[0]
    spelt = [token for token, word in zip(stream.tokens[0], stream.words[0], strict=True) if word == 0]
    assert spelt == ["▁the"]
    with pytest.raises(UnknownWord, match="Its words are: a, bass, and, drums"), capture(pipe, words=["Caption"]):
        run(pipe)


def test_branches(pipe):
    """The conditional rows come first; the unconditional keys are one learned embedding, so that attention is 1/Tk."""
    with capture(pipe, branch="both", keep="full") as cap:
        run(pipe)
    array = cap.maps[CROSS]
    np.testing.assert_allclose(array.sel(branch="unconditional"), 1 / array.sizes["key"], atol=1e-7)
    assert float(array.sel(branch="conditional").std("key").mean()) > 1e-5


def test_guidance_within_an_interval(pipe):
    with capture(pipe, branch="both", words=["bass"]) as cap:
        run(pipe, steps=4, cfg_interval_start=0.0, cfg_interval_end=0.4)
    array = cap.maps[CROSS].isel(prompt=0, time=0).sel(word="bass")
    assert array.sel(branch="conditional").notnull().all()
    guided = 1 - array.timestep.values <= 0.4
    assert guided.any() and not guided.all()
    np.testing.assert_array_equal(array.sel(branch="unconditional").notnull(), guided)
    np.testing.assert_allclose(array.sigma, array.timestep, atol=1e-6)


def test_key_value_heads_are_shared_without_being_repeated(pipe):
    with capture(pipe, heads="all", words=["bass"]) as cap:
        run(pipe)
    site = next(site for site in cap.sites if site.name == CROSS)
    assert (site.query_shape[1], site.key_shape[1]) == (4, 2)
    assert cap.maps[CROSS].sizes["head"] == 4


def test_a_third_kind_of_forward_is_refused(pipe):
    with pytest.raises(NotImplementedError, match="audio_cover_strength"), capture(pipe):
        run(pipe, audio_codes="<|audio_code_1|>" * 13, audio_cover_strength=0.5)


def test_outputs_and_rows(pipe):
    prompts = ["a bass and drums", "piano"]
    plain = run(pipe, prompts, lyrics=["la", "la"])
    with capture(pipe, kinds=("cross", "self")) as cap:
        assert torch.equal(run(pipe, prompts, lyrics=["la", "la"]), plain)
    array = cap.maps[CROSS]
    assert list(array.prompt.values) == prompts
    assert array.sel(word="piano").isel(prompt=0).isnull().all()
    assert array.sel(word="piano").isel(prompt=1).notnull().all()
    assert "forward" not in vars(pipe.condition_encoder)
