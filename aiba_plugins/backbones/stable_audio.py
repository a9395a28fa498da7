"""Stable Audio Open (diffusers ``StableAudioPipeline``): a diffusion transformer on a waveform latent.

Geometry, from ``diffusers/pipelines/stable_audio`` and ``diffusers/models/transformers/stable_audio_transformer.py``: the
latent is [B, C, time], one column for every ``vae.hop_length`` samples; its channels are no frequencies. One global token
(timing and noise level) stands before the columns. The whole window is always generated (1024 columns, 47.55 s) and the
decoded audio cropped to ``audio_start_in_s`` .. ``audio_end_in_s``. The keys of every cross-attention are the T5 tokens, padded
to the tokenizer's maximum with zeros that nothing masks, then one key each for ``seconds_start`` and ``seconds_total``. One
forward holds the unconditional rows first; without a negative prompt all their keys are zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aiba_hooks import Backbone, Conditioning, Lattice, MethodCall, SiteCall, Step, TokenStream, hookimpl
from aiba_plugins.backbones.latents import scheduler_sigma, time_lattice


class StableAudio(Backbone):
    """diffusers' StableAudioPipeline and subclasses of it."""

    name = "stable-audio"
    denoiser_names = ("transformer",)
    prompt_method = "prepare_latents"  # the last to run before denoising, and the one that knows how many waveforms
    observed_methods = ("encode_prompt", "encode_duration")

    def matches(self, target: Any) -> bool:
        return any(cls.__name__ == "StableAudioPipeline" for cls in type(target).__mro__)

    def conditioning_from(self, target: Any, calls: Sequence[MethodCall]) -> Conditioning | None:
        last = {call.name: call for call in calls}
        if not {"encode_prompt", "encode_duration"} <= last.keys():
            return None  # not encoded inside the block
        encoded, timed = last["encode_prompt"], last["encode_duration"].arguments
        prompt = encoded.arguments["prompt"]
        if prompt is None:  # embeddings were given: there is no text to align
            prompts: tuple[str, ...] = ("",) * int(timed["batch_size"])
            text = TokenStream.opaque("t5", prompts, encoded.result.shape[1])
        else:
            prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
            length = target.tokenizer.model_max_length
            text = TokenStream.from_tokenizer(
                "t5", target.tokenizer, prompts, padding="max_length", max_length=length, truncation=True
            )
        seconds = TokenStream.opaque("seconds", prompts, 2, role="duration")
        return Conditioning(
            prompts,
            int(calls[-1].arguments["num_waveforms_per_prompt"] or 1),
            bool(encoded.arguments["do_classifier_free_guidance"]),
            (text.join(seconds, argument="encoder_hidden_states"),),
            (float(timed["audio_start_in_s"]), float(timed["audio_end_in_s"])),
        )

    def step(self, target: Any, arguments: Mapping[str, Any]) -> Step:
        return Step(arguments["timestep"], scheduler_sigma(target.scheduler))

    def lattice(self, site: SiteCall) -> Lattice:
        columns = int(site.arguments["hidden_states"].shape[-1])
        vae = site.target.vae
        window = site.conditioning.window if site.conditioning is not None else None
        seconds = vae.hop_length / vae.config.sampling_rate
        return time_lattice(columns, seconds, prefix=site.queries - columns, window=window)


@hookimpl
def aiba_backbones() -> list[Backbone]:
    return [StableAudio()]
