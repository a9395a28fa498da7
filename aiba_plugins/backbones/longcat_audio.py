"""LongCat-AudioDiT (diffusers ``LongCatAudioDiTPipeline``): a diffusion transformer whose guidance is two forwards a step.

From ``diffusers/pipelines/longcat_audio_dit``: the latent is [B, time, C], one column for every ``vae_scale_factor`` samples,
no token before them; its channels are no frequencies. The keys are the UMT5 tokens, padded to the longest prompt and masked. Each
step runs the conditional forward, then the unconditional one (zeros in place of the text, or the negative prompt), where
``guidance_scale`` is above 1. Prompts are lowercased and quotation marks dropped before they are encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aiba_hooks import Backbone, Conditioning, Lattice, MethodCall, SiteCall, Step, TokenStream, hookimpl
from aiba_plugins.backbones.latents import scheduler_sigma, time_lattice


class LongCatAudio(Backbone):
    """diffusers' LongCatAudioDiTPipeline and subclasses of it."""

    name = "longcat-audio"
    denoiser_names = ("transformer",)
    prompt_method = "prepare_latents"  # runs after encode_prompt has encoded the negative prompt too
    observed_methods = ("check_inputs", "encode_prompt")
    branches = ("conditional", "unconditional")
    batched = False

    def matches(self, target: Any) -> bool:
        return any(cls.__name__ == "LongCatAudioDiTPipeline" for cls in type(target).__mro__)

    def conditioning_from(self, target: Any, calls: Sequence[MethodCall]) -> Conditioning | None:
        begun = max((i for i, call in enumerate(calls) if call.name == "check_inputs"), default=0)
        encoded = next((call for call in calls[begun:] if call.name == "encode_prompt"), None)
        if encoded is None:
            return None  # not encoded inside the block
        prompt, length = encoded.arguments["prompt"], int(encoded.result[0].shape[1])
        prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
        text = TokenStream.from_tokenizer(
            "umt5",
            target.tokenizer,
            prompts,
            argument="encoder_hidden_states",
            padding="longest",
            max_length=length,
            truncation=True,
        )
        return Conditioning(prompts, 1, target.guidance_scale > 1.0, (text,))

    def step(self, target: Any, arguments: Mapping[str, Any]) -> Step:
        return Step(arguments["timestep"], scheduler_sigma(target.scheduler))

    def lattice(self, site: SiteCall) -> Lattice:
        return time_lattice(site.queries, site.target.vae_scale_factor / site.target.sample_rate)


@hookimpl
def aiba_backbones() -> list[Backbone]:
    return [LongCatAudio()]
