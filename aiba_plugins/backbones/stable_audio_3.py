"""Stable Audio 3 (diffusers ``StableAudio3Pipeline`` and its two variants): a diffusion transformer with differential attention.

From ``diffusers/models/transformers/transformer_stable_audio3.py``: where ``use_differential`` is set, each attention layer
calls its kernel twice and subtracts, ``Attn(Q1, K1, V) − Attn(Q2, K2, V)``, without a factor: its map is signed and its rows
sum to 0. The memory tokens stand before the latent's columns (``vae.downsampling_ratio`` samples each, times the patch size);
channels are no frequencies. The keys are the text, padded to at most 256 tokens, every pad replaced by one learned embedding
and unmasked, then one key for the duration. One forward holds the unconditional rows (the negative or the empty prompt,
with the same duration key) first; from audio and for inpainting there is no guidance. The audio is trimmed to ``duration``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aiba_hooks import Backbone, Conditioning, Lattice, MethodCall, SiteCall, Step, TokenStream, hookimpl
from aiba_plugins.backbones.latents import scheduler_sigma, time_lattice


class StableAudio3(Backbone):
    """diffusers' StableAudio3Pipeline, StableAudio3AudioToAudioPipeline, StableAudio3InpaintPipeline and their subclasses."""

    name = "stable-audio-3"
    denoiser_names = ("transformer",)
    prompt_method = (
        "encode_duration"  # runs between the prompt and the negative prompt, which encode_prompt encodes too
    )
    observed_methods = ("encode_prompt",)

    def matches(self, target: Any) -> bool:
        names = {f"StableAudio3{variant}Pipeline" for variant in ("", "AudioToAudio", "Inpaint")}
        return any(cls.__name__ in names for cls in type(target).__mro__)

    def conditioning_from(self, target: Any, calls: Sequence[MethodCall]) -> Conditioning | None:
        last = {call.name: call for call in calls}
        if "encode_prompt" not in last:
            return None  # not encoded inside the block
        encoded, timed = last["encode_prompt"], last["encode_duration"].arguments
        prompt, length = encoded.arguments["prompt"], int(encoded.result[0].shape[1])
        if encoded.arguments.get("prompt_embeds") is not None:  # there is no text to align
            prompts: tuple[str, ...] = ("",) * int(timed["batch_size"])
            text = TokenStream.opaque("t5gemma", prompts, length)
        else:
            prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
            text = TokenStream.from_tokenizer(
                "t5gemma", target.tokenizer, prompts, padding="max_length", max_length=length, truncation=True
            )
        duration = TokenStream.opaque("duration", prompts, 1, role="duration")
        return Conditioning(
            prompts,
            int(timed["num_waveforms_per_prompt"]),
            bool(getattr(target, "do_classifier_free_guidance", False)),
            (text.join(duration, argument="encoder_hidden_states"),),
            (0.0, float(timed["duration"])),
        )

    def step(self, target: Any, arguments: Mapping[str, Any]) -> Step:
        return Step(arguments["timestep"], scheduler_sigma(target.scheduler))

    def signs(self, site: SiteCall) -> Sequence[float] | None:
        return (1.0, -1.0) if getattr(site.module, "use_differential", False) else None

    def lattice(self, site: SiteCall) -> Lattice:
        patch = int(site.target.transformer.config.patch_size)
        columns = int(site.arguments["hidden_states"].shape[-1]) // patch
        vae = site.target.vae
        window = site.conditioning.window if site.conditioning is not None else None
        seconds = patch * vae.downsampling_ratio / vae.config.sampling_rate
        return time_lattice(columns, seconds, prefix=site.queries - columns, window=window)


@hookimpl
def aiba_backbones() -> list[Backbone]:
    return [StableAudio3()]
