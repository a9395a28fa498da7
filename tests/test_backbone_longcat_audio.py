"""LongCat-AudioDiT: guidance in two forwards a step, the conditional one first."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aiba_hooks import NothingCaptured, UnknownWord, capture
from aiba_hooks.errors import BackboneMismatch
from aiba_hooks.testing import check_backbone
from aiba_plugins.backbones.longcat_audio import LongCatAudio
from tests import tiny
from tests.tiny import generate

CROSS = "blocks.1.cross_attn"


@pytest.fixture(scope="module")
def pipe():
    return tiny.longcat()


def run(pipe, prompt="a bass and drums", **options):
    return generate(pipe, prompt, **{"audio_duration_s": 0.002, "guidance_scale": 3.0, "output_type": "pt", **options})


def test_it_conforms(pipe):
    report = check_backbone(
        LongCatAudio(),
        pipe,
        lambda prompt: run(pipe, prompt),
        prompt="a bass and drums",
        other_prompt="soft piano with guitar",
        words=["bass", "drums"],
        latent_axes=[1],
    )
    assert report == {"sites": 2, "lattices": [(24,)], "check": report["check"], "steps": 2}
    assert report["check"] < 1e-5


def test_a_wrong_order_of_passes_is_caught(pipe):
    from aiba_hooks.testing import ConformanceError

    class Reversed(LongCatAudio):
        branches = ("unconditional", "conditional")

    with pytest.raises(ConformanceError, match="are the same for"):
        check_backbone(
            Reversed(),
            pipe,
            lambda prompt: run(pipe, prompt),
            prompt="a bass and drums",
            other_prompt="soft piano with guitar",
            words=["bass"],
            latent_axes=[1],
        )


def test_two_forwards_are_one_step(pipe):
    """The unconditional keys are zeros before the text projection: one key, so that attention differs by position alone."""
    forwards = []
    handle = pipe.transformer.register_forward_pre_hook(lambda m, a: forwards.append(m))
    with capture(pipe, branch="both") as cap:
        run(pipe, steps=3)
    handle.remove()
    array = cap.maps[CROSS]
    assert len(forwards) == 6
    assert array.sizes["step"] == 3
    np.testing.assert_allclose(array.timestep, [0, 1 / 3, 2 / 3], atol=1e-6)
    np.testing.assert_allclose(
        array.sigma, [1, 2 / 3, 1 / 3], atol=1e-6
    )  # this scheduler's sigmas are the signal's share
    with capture(pipe, steps=[1]) as one:
        run(pipe, steps=3)
    np.testing.assert_array_equal(one.maps[CROSS].isel(step=0), array.sel(branch="conditional").isel(step=1))
    with capture(pipe, branch="unconditional") as other:
        run(pipe, steps=3)
    np.testing.assert_array_equal(other.maps[CROSS], array.sel(branch="unconditional"))
    with pytest.raises(NothingCaptured, match="branch='unconditional' is not in this forward"):
        with capture(pipe, branch="unconditional"):
            run(pipe, guidance_scale=1.0)


def test_the_lattice_and_the_groups(pipe):
    with capture(pipe) as cap:
        audio = run(pipe, ["a bass and drums", 'Soft  "PIANO"'])
    array = cap.maps[CROSS]
    assert audio.shape[-1] == 48
    assert (array.sizes["time"], array.attrs["seconds_per_column"]) == (24, pytest.approx(2 / 24000))
    # the pipeline encodes prompts in lower case, without quotation marks
    assert list(array.prompt.values) == ["a bass and drums", "soft piano"]
    assert list(array.word.values) == ["a", "bass", "and", "drums", "soft", "piano", "(special)", "(padding)"]
    np.testing.assert_allclose(array.sum("word"), 1, atol=1e-5)
    # pads are masked here
    np.testing.assert_array_equal(array.sel(word="(padding)").isel(prompt=1), 0)


def test_prompts_keep_their_own_rows(pipe):
    prompts = ["a bass and drums", "piano"]
    latents = torch.randn(2, 24, 8, generator=torch.Generator().manual_seed(3))
    with capture(pipe, steps=[0]) as cap:
        run(pipe, prompts, latents=latents.clone())
    for row, prompt in enumerate(prompts):
        with capture(pipe, steps=[0]) as alone:
            run(pipe, prompt, latents=latents[row : row + 1].clone())
        expected = alone.maps[CROSS].isel(prompt=0)
        np.testing.assert_allclose(cap.maps[CROSS].isel(prompt=row).sel(word=expected.word), expected, atol=2e-5)


def test_a_negative_prompt_is_not_the_prompt(pipe):
    with capture(pipe, words=["bass"], branch="both") as cap:
        run(pipe, negative_prompt="soft piano with guitar")  # as many tokens
    assert list(cap.maps[CROSS].prompt.values) == ["a bass and drums"]
    longer = {"negative_prompt": "low quality music in the song"}
    with capture(pipe, words=["bass"]) as cap:
        run(pipe, **longer)
    assert cap.maps[CROSS].sizes["step"] == 2
    with (
        pytest.raises(BackboneMismatch, match="9 keys|7 keys in the unconditional forward, 5 before"),
        capture(pipe, branch="both"),
    ):
        run(pipe, **longer)
    with (
        pytest.raises(BackboneMismatch, match="negative prompt of another length"),
        capture(pipe, branch="unconditional"),
    ):
        run(pipe, **longer)
    with capture(pipe, branch="unconditional", keep="full") as cap:
        run(pipe, **longer)
    assert cap.maps[CROSS].sizes["key"] == 7


def test_outputs_and_words(pipe):
    plain = run(pipe)
    with capture(pipe, kinds=("cross", "self")):
        assert torch.equal(run(pipe), plain)
    with pytest.raises(UnknownWord, match="'violin' is not in the prompt 'a bass'"), capture(pipe, words=["violin"]):
        run(pipe, "a bass")
