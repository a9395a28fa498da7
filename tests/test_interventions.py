"""Edits through the same interception: reweighting a word."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from aiba_hooks import NothingCaptured, UnknownWord, capture, intervene
from tests.conftest import generate, state
from tests.test_audioldm2 import T5

SITE = "down_blocks.1.attentions.2.transformer_blocks.0.attn2"


def denoise(pipe, prompt="a bass and drums", guided=False):
    with torch.no_grad():
        embeds, mask, generated = pipe.encode_prompt(prompt, "cpu", 1, guided)
        sample = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
        return pipe.unet(
            torch.cat([sample] * (2 if guided else 1)),
            300,
            encoder_hidden_states=generated,
            encoder_hidden_states_1=embeds,
            encoder_attention_mask_1=mask,
        ).sample


def test_a_factor_of_one_changes_nothing_and_others_change_the_output(pipe):
    plain = denoise(pipe)
    before = state(pipe)
    for factor, changes in ((1.0, False), (0.0, True), (3.0, True)):
        with intervene(pipe, reweight={"bass": factor}) as edit:
            edited = denoise(pipe)
        assert bool((edited - plain).abs().max() > 1e-6) == changes
        assert sum(site.captured for site in edit.sites) == 16
    assert state(pipe) == before
    assert torch.equal(denoise(pipe), plain)


def test_the_edited_attention_is_the_probabilities_times_the_factor(pipe):
    """At one site, by hand: (A·diag(c))·V through its own output projection."""
    unet = pipe.unet
    module = unet.get_submodule(SITE)
    seen = {}

    def note(name):
        return lambda m, args, kwargs, out: seen.setdefault(name, []).append((args, kwargs, out))

    handle = module.register_forward_hook(note("site"), with_kwargs=True)
    with capture(unet, keep="full", heads="all", layers=SITE) as cap:
        denoise(pipe)
    with intervene(pipe, reweight={"bass": 0.25, "(special)": 2.0}, layers=SITE):
        denoise(pipe)
    handle.remove()
    (_, kwargs, _), (_, _, edited) = seen["site"]
    context = kwargs["encoder_hidden_states"]
    tokens = pipe.tokenizer_2.convert_ids_to_tokens(pipe.tokenizer_2("a bass and drums").input_ids)
    factor = torch.ones(len(tokens))
    factor[tokens.index("▁bass")] = 0.25
    factor[tokens.index("</s>")] = 2.0
    probabilities = torch.from_numpy(cap.maps[SITE].values[0]) * factor  # [batch, head, query, key]
    value = module.to_v(context).unflatten(-1, (module.heads, -1)).transpose(1, 2)
    expected = module.to_out[0]((probabilities @ value).transpose(1, 2).flatten(2))
    np.testing.assert_allclose(edited.detach(), expected.detach(), atol=1e-5)


def test_only_the_conditional_rows_are_edited_unless_asked(pipe):
    plain = denoise(pipe, guided=True)
    with intervene(pipe, reweight={"bass": 0.0}):
        conditional = denoise(pipe, guided=True)
    # the empty prompt has its only token where the prompt has its first word
    with intervene(pipe, reweight={"a": 0.0}, branch="both"):
        both = denoise(pipe, guided=True)
    assert torch.equal(conditional[0], plain[0])
    assert not torch.equal(conditional[1], plain[1])
    assert not torch.equal(both[0], plain[0])


def test_layers_and_steps_choose_what_is_edited(pipe):
    plain = generate(pipe, "a bass and drums", steps=2)
    with intervene(pipe, reweight={"bass": 0.0}, layers="mid*", steps=[-1]) as edit:
        edited = generate(pipe, "a bass and drums", steps=2)
    assert [site.name for site in edit.sites if site.captured] == ["mid_block.attentions.2.transformer_blocks.0.attn2"]
    assert not np.array_equal(plain, edited)


def test_a_capture_inside_an_intervention_is_still_checked_and_edits_add_up(pipe):
    with intervene(pipe, reweight={"bass": 0.0}), capture(pipe, words=["bass"]) as cap:
        once = denoise(pipe)
    with intervene(pipe, reweight={"bass": 0.5}), intervene(pipe, reweight={"bass": 0.5}):
        twice = denoise(pipe)
    np.testing.assert_allclose(once, twice, atol=1e-5)  # −½ and −½
    assert all(site.check < 1e-5 for site in cap.sites if site.captured)
    assert T5 in cap.maps


def test_gradients_flow_through_an_edit(pipe):
    with intervene(pipe, reweight={"bass": 2.0}):
        embeds, _, generated = pipe.encode_prompt("a bass", "cpu", 1, False)
        embeds = embeds.detach().requires_grad_()
        out = pipe.unet(
            torch.randn(1, 8, 16, 16), 3, encoder_hidden_states=generated, encoder_hidden_states_1=embeds
        ).sample
    (gradient,) = torch.autograd.grad(out.sum(), embeds)
    assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reweight": {}}, ValueError, "reweight is empty"),
        ({"reweight": {"bass": float("nan")}}, ValueError, "must be a finite number"),
        ({"reweight": {"violin": 0.0}}, UnknownWord, "Its words are: a, bass, and, drums"),
        ({"reweight": {"bass": 0.0}, "layers": "nowhere"}, NothingCaptured, "nothing was edited"),
    ],
)
def test_bad_input(pipe, options, error, message):
    with pytest.raises(error, match=message), intervene(pipe, **options):
        denoise(pipe)
    assert F.scaled_dot_product_attention.__name__ == "scaled_dot_product_attention"
