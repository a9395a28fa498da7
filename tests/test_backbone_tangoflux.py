"""TangoFlux: joint attention over [text, duration, audio], an inference class around a model class."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from aiba_hooks import NothingCaptured, capture
from aiba_hooks.plugins import manager
from aiba_plugins.demo.random_audioldm2 import t5_tokenizer
from tests.tiny import draw_zeros

COLUMNS, SECONDS = 24, 3.0
SITES = ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]


class TangoFlux(nn.Module):
    """What a caller of the package's class sees: its parts, its methods with their arguments, and how it calls the
    transformer. The package itself fetches weights when it is built."""

    def __init__(self):
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
        from transformers import T5Config, T5EncoderModel

        super().__init__()
        self.tokenizer = t5_tokenizer(32)
        self.audio_seq_len, self.max_duration, self.max_text_seq_len = COLUMNS, SECONDS, 16
        self.noise_scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
        self.text_encoder = T5EncoderModel(
            T5Config(vocab_size=len(self.tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        )
        self.fc = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.duration = nn.Linear(1, 16)
        self.transformer = FluxTransformer2DModel(
            in_channels=8,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=False,
            axes_dims_rope=(4, 6, 6),
        )
        draw_zeros(self.transformer)

    def encode_text_classifier_free(self, prompt, num_samples_per_prompt=1):
        embeds, mask = self._embed(prompt, padding=True, max_length=self.tokenizer.model_max_length)
        null, null_mask = self._embed([""], padding="max_length", max_length=embeds.shape[1])
        every = [null, embeds], [null_mask, mask]
        return tuple(torch.cat([t.repeat_interleave(num_samples_per_prompt, 0) for t in kind]) for kind in every)

    def encode_text(self, prompt):
        return self._embed(prompt, padding=True, max_length=self.max_text_seq_len)

    def _embed(self, prompt, **options):
        batch = self.tokenizer(prompt, truncation=True, return_tensors="pt", **options)
        embeds = self.text_encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
        return embeds, batch.attention_mask == 1

    def encode_duration(self, duration):
        return self.duration(duration.view(-1, 1, 1).float())

    @torch.no_grad()
    def inference_flow(
        self, prompt, num_inference_steps=50, guidance_scale=3, duration=10, seed=0, num_samples_per_prompt=1
    ):
        torch.manual_seed(seed)
        prompt = prompt if isinstance(prompt, list) else [prompt]
        timed = self.encode_duration(torch.tensor([duration]))
        if guided := guidance_scale > 1:
            text, mask = self.encode_text_classifier_free(prompt, num_samples_per_prompt=num_samples_per_prompt)
        else:
            text, mask = self.encode_text(prompt)
        pooled = (text * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        keys = torch.cat([text, timed.repeat(len(text), 1, 1)], 1)
        self.noise_scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_inference_steps, num_inference_steps))
        latents = torch.randn(num_samples_per_prompt, self.audio_seq_len, 8)
        for t in self.noise_scheduler.timesteps:
            prediction = self.transformer(
                hidden_states=torch.cat([latents] * 2) if guided else latents,
                timestep=torch.tensor([t / 1000]),
                guidance=None,
                pooled_projections=self.fc(pooled),
                encoder_hidden_states=keys,
                txt_ids=torch.zeros(keys.shape[1], 3),
                img_ids=torch.arange(self.audio_seq_len)[:, None].repeat(1, 3).float(),
                return_dict=False,
            )[0]
            if guided:
                without, with_text = prediction.chunk(2)
                prediction = without + guidance_scale * (with_text - without)
            latents = self.noise_scheduler.step(prediction, t, latents).prev_sample
        return latents


class TangoFluxInference:
    def __init__(self):
        from diffusers import AutoencoderOobleck

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.vae = AutoencoderOobleck(
                encoder_hidden_size=4,
                downsampling_ratios=[2, 4],
                channel_multiples=[1, 2],
                decoder_channels=4,
                decoder_input_channels=8,
                sampling_rate=64,
            ).eval()
            self.model = TangoFlux().eval()

    def generate(self, prompt, steps=25, duration=10, guidance_scale=4.5):
        with torch.no_grad():
            latents = self.model.inference_flow(
                prompt, duration=duration, num_inference_steps=steps, guidance_scale=guidance_scale
            )
            wave = self.vae.decode(latents.transpose(2, 1)).sample.cpu()[0]
        return wave[:, : int(duration * self.vae.config.sampling_rate)]


@pytest.fixture(scope="module")
def pipe():
    return TangoFluxInference()


def run(pipe, prompt="soft bass and drums", **options):
    return pipe.generate(prompt, **{"steps": 2, "duration": 3.0, **options})


def test_both_classes_are_recognised(pipe):
    for target in (pipe, pipe.model):
        assert [b.name for b in manager().collect("aiba_backbones") if b.matches(target)] == ["tangoflux"]


def test_word_maps_are_the_audio_to_text_block(pipe, monkeypatch):
    from diffusers.models.transformers import transformer_flux

    original, seen = transformer_flux.dispatch_attention_fn, []

    def recorded(query, key, value, **options):
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
        seen.append(scores.softmax(-1).mean(1))
        return original(query, key, value, **options)

    with monkeypatch.context() as patch:
        patch.setattr(transformer_flux, "dispatch_attention_fn", recorded)
        plain = run(pipe)
    with capture(pipe, kinds=("joint",), branch="both") as cap:
        assert torch.equal(run(pipe), plain)
    assert [str(site.tag) for site in cap.sites] == ["joint", "joint"]
    keys = {"soft": 0, "bass": 1, "and": 2, "drums": 3, "(special)": 4, "(duration)": 5}
    for name, softmax in zip(SITES, seen, strict=False):
        array, back = (maps[name].isel(prompt=0, step=0) for maps in (cap.maps, cap.maps.from_text))
        assert list(array.word.values) == [*keys, "(audio)"]
        np.testing.assert_allclose(array.sum("word"), 1, atol=1e-5)
        for word, key in keys.items():
            both = array.sel(word=word).transpose("branch", "time")
            np.testing.assert_allclose(both, softmax[:, 6:, key], atol=1e-6)
            np.testing.assert_allclose(back.sel(word=word).transpose("branch", "time"), softmax[:, key, 6:], atol=1e-6)


def test_steps_have_their_noise_levels_and_columns_their_seconds(pipe):
    with capture(pipe, kinds=("joint",)) as cap:
        run(pipe, duration=2.0, steps=4)
    array = cap.maps[SITES[0]]
    np.testing.assert_allclose(array.sigma, [1, 0.75, 0.5, 0.25], atol=1e-6)
    np.testing.assert_allclose(array.timestep, [1000, 750, 500, 250], atol=1e-3)
    # 8 samples of 64 Hz a column: 2 s are the first 16 of 24
    assert (array.sizes["time"], array.attrs["seconds_per_column"]) == (16, 0.125)
    assert array.time.values[0] == 0.0625


def test_several_samples_of_a_prompt_and_no_guidance(pipe):
    model = pipe.model
    with capture(model, kinds=("joint",)) as cap:
        model.inference_flow("a bass", num_inference_steps=2, duration=3.0, num_samples_per_prompt=3)
    array = cap.maps[SITES[1]]
    assert array.sizes["prompt"] == 3
    assert array.attrs["seconds_per_column"] == SECONDS / COLUMNS
    assert not np.allclose(array[0], array[1])
    with capture(model, kinds=("joint",)) as cap:
        model.inference_flow("a bass", num_inference_steps=2, duration=3.0, guidance_scale=1.0)
    assert cap.maps[SITES[1]].sizes["prompt"] == 1
    with pytest.raises(NothingCaptured, match="unconditional"):
        with capture(model, kinds=("joint",), branch="unconditional"):
            model.inference_flow("a bass", num_inference_steps=1, duration=3.0, guidance_scale=1.0)


def test_cross_attention_asked_of_it_names_the_remedy(pipe):
    with pytest.raises(NothingCaptured, match=r"tagged joint, not in kinds=\('cross',\)"):
        with capture(pipe):
            run(pipe)
