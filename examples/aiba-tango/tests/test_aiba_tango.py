"""The plugin, found through its entry point, on a model of Tango's shape."""

import ast

import aiba_tango
import numpy as np
import pytest
import torch
from tango_model import build, scheduler
from transformers.audio_utils import hertz_to_mel, mel_to_hertz

from aiba_hooks import NothingCaptured, UnknownWord, capture
from aiba_hooks.testing import check_backbone

FINEST = "up_blocks.3.attentions.0.transformer_blocks.0.attn2"
COARSEST = "mid_block.attentions.0.transformer_blocks.0.attn2"
PROMPT = "a deep hammering bass, and drums"


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return build()


def generate(model, *prompts, steps=1, guidance=3, samples=1):
    torch.manual_seed(0)
    return model.inference(
        list(prompts), scheduler(), num_steps=steps, guidance_scale=guidance, num_samples_per_prompt=samples
    )


def words_of(array):
    return [str(word) for word in array.word.values]


def test_the_module_imports_nothing_heavy():
    with open(aiba_tango.__file__, encoding="utf-8") as file:
        body = ast.parse(file.read()).body
    names = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in body if isinstance(node, ast.ImportFrom)}
    assert names == {"aiba_hooks"}


def test_it_conforms(model):
    report = check_backbone(
        aiba_tango.TangoBackbone(),
        model,
        lambda prompt: generate(model, prompt),
        prompt="a bass and drums",
        other_prompt="a flute and piano",
        words=["bass", "drums"],
    )
    assert report["lattices"] == [(256, 16), (128, 8), (64, 4), (32, 2)]
    assert report["sites"] == 10


def test_maps_are_labelled(model):
    with capture(model, words=["hammering", "drums"], layers=[FINEST, COARSEST]) as cap:
        generate(model, PROMPT, steps=2)
    fine, coarse = cap.maps[FINEST], cap.maps[COARSEST]
    assert fine.attrs["backbone"] == "tango"
    assert (fine.attrs["tag"], fine.attrs["stream"]) == ("cross", "t5")
    assert dict(fine.sizes) == {"prompt": 1, "step": 2, "word": 4, "time": 256, "frequency": 16}
    assert words_of(fine) == ["hammering", "drums", "(other)", "(special)"]
    np.testing.assert_allclose(fine.time.values[[0, -1]], [0.02, 10.22])
    np.testing.assert_allclose(coarse.time.values[[0, -1]], [0.16, 10.08])
    highest = hertz_to_mel(8000.0, mel_scale="slaney")  # an independent implementation of the scale
    expected = mel_to_hertz(np.array([highest / 2, highest]), mel_scale="slaney")
    np.testing.assert_allclose(coarse.frequency_high.values, expected)
    assert fine.timestep.values.tolist() == [500, 0]
    kept = scheduler().alphas_cumprod[[500, 0]].double().numpy()
    np.testing.assert_allclose(fine.sigma.values, np.sqrt((1 - kept) / kept), rtol=1e-5)


@pytest.mark.parametrize("guidance", [3, 1])
def test_a_word_is_the_sum_of_its_tokens(model, guidance):
    pieces = model.tokenizer.tokenize(PROMPT)
    start, end = pieces.index("▁deep") + 1, pieces.index("▁bass")
    assert end - start > 3, "hammering is spelt in letters"
    with capture(model, words=["hammering"], layers=FINEST) as pooled:
        generate(model, PROMPT, guidance=guidance)
    with capture(model, keep="full", layers=FINEST) as full:
        generate(model, PROMPT, guidance=guidance)
    keys = full.maps[FINEST]
    assert keys.sizes["key"] == len(pieces) + 1, "every piece, and the end of the sequence"
    expected = keys.isel(key=slice(start, end)).sum("key")
    np.testing.assert_allclose(pooled.maps[FINEST].sel(word="hammering").values, expected.values, atol=1e-6)


def test_both_branches_exist_with_guidance_only(model):
    with capture(model, words=["bass"], branch="both", layers=COARSEST) as cap:
        generate(model, PROMPT)
    assert cap.maps[COARSEST].branch.values.tolist() == ["unconditional", "conditional"]
    with pytest.raises(NothingCaptured, match="'unconditional' is not in this forward"):
        with capture(model, branch="unconditional", layers=COARSEST):
            generate(model, PROMPT, guidance=1)


def test_several_samples_of_several_prompts(model):
    prompts = ["a deep bass", "a soft flute with drums"]
    with capture(model, words=["bass", "flute"], layers=FINEST) as cap:
        captured = generate(model, *prompts, samples=2)
    array = cap.maps[FINEST]
    assert array.prompt.values.tolist() == [prompts[0], prompts[0], prompts[1], prompts[1]]
    absent = np.isnan(array.isel(step=0, time=0, frequency=0).transpose("word", "prompt").values)
    assert absent[words_of(array).index("bass")].tolist() == [False, False, True, True]
    assert absent[words_of(array).index("flute")].tolist() == [True, True, False, False]
    assert not np.allclose(array[0].sel(word="bass"), array[1].sel(word="bass")), "two samples, two maps"
    assert torch.equal(captured, generate(model, *prompts, samples=2))


def test_several_samples_without_guidance(model):
    """``encode_text`` is not told how many: the denoiser's batch says."""
    with capture(model, layers=FINEST) as cap:
        captured = generate(model, PROMPT, guidance=1, samples=2)
    assert cap.maps[FINEST].waveform.values.tolist() == [0, 1]
    assert torch.equal(captured, generate(model, PROMPT, guidance=1, samples=2))


def test_what_is_not_there_is_an_error(model):
    with pytest.raises(NothingCaptured, match=COARSEST):
        with capture(model, layers="down_blocks.3.*"):
            generate(model, PROMPT)
    with pytest.raises(NothingCaptured, match="did not run inside"):
        with capture(model):
            pass
    with pytest.raises(UnknownWord, match="harp"):
        with capture(model, words=["harp"]):
            generate(model, PROMPT)
