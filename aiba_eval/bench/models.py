"""Denoisers to race: published configurations with random weights, and small ones of the same topology."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: AudioLDM2's mel front end: 100 frames a second, reduced by 4 in the latent; 64 bins, 16 in the latent
COLUMNS_PER_SECOND, BANDS, TOP_HERTZ = 25, 16, 8000.0
#: Stable Audio Open: one latent column for 2048 samples at 44.1 kHz; text keys, then two of timing
SAMPLES_PER_COLUMN, RATE, TIMING_KEYS = 2048, 44100, 2
#: embeddings that AudioLDM2's language model generates
GENERATED_KEYS = 8


@dataclass(frozen=True)
class Architecture:
    """A denoiser of a published configuration.

    Attributes
    ----------
    name : what ``aiba bench --model`` calls it
    summary : one sentence
    class_name : of diffusers
    configuration : arguments of the class
    kind : ``"audioldm2"``, ``"stable-audio"`` or ``"stable-diffusion"``: what its forward is given
    seconds : length of audio by default; for an image model the side of its square latent is fixed
    tokens : keys of the text stream by default
    """

    name: str
    summary: str
    class_name: str
    configuration: Mapping[str, Any]
    kind: str
    seconds: float
    tokens: int


_AUDIOLDM2 = {
    "sample_size": 256,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (128, 256, 384, 640),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
    "cross_attention_dim": [[None, 768, 1024]] * 4,
    "transformer_layers_per_block": 1,
}
_STABLE_AUDIO = {
    "sample_size": 1024,
    "in_channels": 64,
    "out_channels": 64,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "num_key_value_attention_heads": 12,
    "cross_attention_dim": 768,
    "cross_attention_input_dim": 768,
    "time_proj_dim": 256,
    "global_states_input_dim": 1536,
}
_STABLE_DIFFUSION = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            "audioldm2",
            "AudioLDM2's U-Net, 16 positions of three transformers, 8 heads",
            "AudioLDM2UNet2DConditionModel",
            _AUDIOLDM2,
            "audioldm2",
            10.24,
            16,
        ),
        Architecture(
            "stable-audio",
            "Stable Audio Open's transformer, 24 blocks, 24 query and 12 key-value heads of 64",
            "StableAudioDiTModel",
            _STABLE_AUDIO,
            "stable-audio",
            1024 * SAMPLES_PER_COLUMN / RATE,
            128,
        ),
        Architecture(
            "stable-diffusion",
            "Stable Diffusion 1's U-Net on 64×64 latents: no audio, but the model that other tools are made for",
            "UNet2DConditionModel",
            _STABLE_DIFFUSION,
            "stable-diffusion",
            0.0,
            77,
        ),
        Architecture(
            "audioldm2-small",
            "the same topology, a quarter of the channels",
            "AudioLDM2UNet2DConditionModel",
            {**_AUDIOLDM2, "block_out_channels": (32, 64, 96, 160), "cross_attention_dim": [[None, 64, 96]] * 4},
            "audioldm2",
            2.56,
            16,
        ),
        Architecture(
            "stable-audio-small",
            "2 blocks, 6 query and 3 key-value heads of 64",
            "StableAudioDiTModel",
            {
                **_STABLE_AUDIO,
                "num_layers": 2,
                "num_attention_heads": 6,
                "num_key_value_attention_heads": 3,
                "cross_attention_dim": 192,
                "cross_attention_input_dim": 96,
                "global_states_input_dim": 192,
            },
            "stable-audio",
            1024 * SAMPLES_PER_COLUMN / RATE,
            128,
        ),
        Architecture(
            "stable-diffusion-small",
            "the same topology, a tenth of the channels",
            "UNet2DConditionModel",
            {**_STABLE_DIFFUSION, "block_out_channels": (32, 64, 96, 96), "cross_attention_dim": 64},
            "stable-diffusion",
            0.0,
            77,
        ),
    )
}


def build(architecture: Architecture, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The denoiser in eval mode, with the same random weights at every call.

    Parameters
    ----------
    device : ``"meta"`` gives a model without weights, which can be entered but not run

    Raises
    ------
    ModuleNotFoundError
        diffusers is not installed.
    """
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{architecture.name} is a model of {error.name}: pip install "aiba[diffusers]"', name=error.name
        ) from error
    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []), torch.device(device):
        torch.manual_seed(0)
        model: nn.Module = getattr(diffusers, architecture.class_name)(**architecture.configuration)
    return (
        nn.Module.to(model, dtype).eval().requires_grad_(False)
    )  # diffusers' own warns of modules kept in float32, of which these have none


@dataclass(frozen=True)
class Shape:
    """What a forward is given: rows of the batch, latent columns, keys of the text stream."""

    rows: int
    columns: int
    tokens: int


def columns_of(architecture: Architecture, seconds: float) -> int:
    """Latent columns for so many seconds, as the pipeline rounds them; the side of the square for an image model."""
    if architecture.kind == "audioldm2":
        return 8 * math.ceil(seconds * COLUMNS_PER_SECOND / 8)  # three halvings
    if architecture.kind == "stable-audio":
        return max(1, round(seconds * RATE / SAMPLES_PER_COLUMN))
    return int(architecture.configuration["sample_size"])


def inputs_of(
    architecture: Architecture, shape: Shape, *, guided: bool, device: str, dtype: torch.dtype
) -> Callable[[int], dict[str, Any]]:
    """Arguments of the denoiser's forward at a step, as the pipeline passes them; drawn once, with a fixed seed."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    rows, configuration = shape.rows, architecture.configuration
    fixed: dict[str, Any] = {"return_dict": False}
    if architecture.kind == "audioldm2":
        generated, text = configuration["cross_attention_dim"][0][1:]
        mask = torch.ones(rows, shape.tokens, dtype=torch.long)
        if guided:
            mask[: rows // 2, 1:] = 0  # an empty negative prompt is one token, and padding
        fixed |= {
            "sample": draw(rows, 8, shape.columns, BANDS),
            "encoder_hidden_states": draw(rows, GENERATED_KEYS, generated),
            "encoder_hidden_states_1": draw(rows, shape.tokens, text),
            "encoder_attention_mask_1": mask.to(device),
        }
    elif architecture.kind == "stable-audio":
        from diffusers.models.embeddings import get_1d_rotary_pos_embed

        text = draw(rows, shape.tokens + TIMING_KEYS, configuration["cross_attention_input_dim"])
        if guided:
            text[: rows // 2] = 0  # without a negative prompt every key of the unconditional rows is zero
        half = configuration["attention_head_dim"] // 2
        rotary = get_1d_rotary_pos_embed(half, shape.columns + 1, use_real=True, repeat_interleave_real=False)
        fixed |= {
            "hidden_states": draw(rows, configuration["in_channels"], shape.columns),
            "encoder_hidden_states": text,
            "global_hidden_states": draw(rows, 1, configuration["global_states_input_dim"]),
            "rotary_embedding": tuple(part.to(device) for part in rotary),
        }
    else:
        fixed |= {
            "sample": draw(rows, configuration["in_channels"], shape.columns, shape.columns),
            "encoder_hidden_states": draw(rows, shape.tokens, configuration["cross_attention_dim"]),
        }

    def arguments(step: int) -> dict[str, Any]:
        if architecture.kind == "stable-audio":
            return {**fixed, "timestep": torch.full((1,), 1 / (step + 2), device=device, dtype=dtype)}
        return {**fixed, "timestep": torch.tensor(999 - step % 1000, device=device)}

    return arguments
