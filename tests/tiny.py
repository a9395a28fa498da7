"""Pipelines of the real classes, tiny, with random weights and no download: one builder per backbone under test."""

from __future__ import annotations

import torch

from aiba_plugins.demo.random_audioldm2 import t5_tokenizer


def finished(pipe):
    """Eval mode (constructors leave train mode), no progress bar."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_audio(scheduler="cosine", *, columns=64, strides=(4, 4, 4), rate=4000, length=24):
    """StableAudioPipeline: 6 heads with 3 key-value heads, ``columns`` latent columns of prod(strides) samples."""
    from diffusers import (
        AutoencoderOobleck,
        CosineDPMSolverMultistepScheduler,
        EDMDPMSolverMultistepScheduler,
        StableAudioDiTModel,
        StableAudioPipeline,
        StableAudioProjectionModel,
    )
    from transformers import T5Config, T5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = StableAudioDiTModel(
            sample_size=columns,
            in_channels=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=6,
            num_key_value_attention_heads=3,
            out_channels=8,
            cross_attention_dim=24,
            time_proj_dim=8,
            global_states_input_dim=48,
            cross_attention_input_dim=24,
        )
        vae = AutoencoderOobleck(
            encoder_hidden_size=6,
            downsampling_ratios=list(strides),
            decoder_channels=3,
            decoder_input_channels=8,
            audio_channels=2,
            channel_multiples=[1, 2, 2, 2, 2][: len(strides)],
            sampling_rate=rate,
        )
        t5 = T5EncoderModel(T5Config(vocab_size=1000, d_model=24, d_ff=37, d_kv=8, num_heads=1, num_layers=1))
        projection = StableAudioProjectionModel(text_encoder_dim=24, conditioning_dim=24, min_value=0, max_value=512)
    options = {"prediction_type": "v_prediction", "sigma_data": 1.0, "sigma_schedule": "exponential"}
    schedulers = {"cosine": CosineDPMSolverMultistepScheduler, "edm": EDMDPMSolverMultistepScheduler}
    return finished(
        StableAudioPipeline(
            vae=vae,
            text_encoder=t5,
            projection_model=projection,
            tokenizer=t5_tokenizer(length),
            transformer=transformer,
            scheduler=schedulers[scheduler](sigma_min=0.3, sigma_max=500, **options),
        )
    )


def generate(pipe, prompt, *, steps=2, seed=0, **options):
    """Audio of a pipeline call with a fixed seed."""
    return pipe(
        prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), **options
    ).audios
