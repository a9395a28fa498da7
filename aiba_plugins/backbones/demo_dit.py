"""The embedded diffusion transformer (``aiba_plugins.demo.mel_dit.MelDiTPipeline``): time tokens only.

Geometry: the latent's bands are folded into channels, so that a token is one column of ``vae_scale_factor`` mel columns;
one token with the noise level stands before them. Keys are the T5 tokens, padded to a fixed length with zeros that are
not masked. In one forward the unconditional rows come first; their keys are all zeros."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from aiba_hooks import Backbone, Conditioning, Lattice, SiteCall, TokenStream, hookimpl
from aiba_hooks.backbone import Step


class MelDiT(Backbone):
    """``MelDiTPipeline`` and subclasses of it."""

    name = "mel-dit"
    denoiser_names = ("transformer",)
    branches = ("unconditional", "conditional")

    def matches(self, target: Any) -> bool:
        return any(cls.__name__ == "MelDiTPipeline" for cls in type(target).__mro__)

    def conditioning(self, target: Any, arguments: Mapping[str, Any], result: Any) -> Conditioning:
        prompt = arguments["prompt"]
        prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
        text = TokenStream.from_tokenizer(
            "t5",
            target.tokenizer,
            prompts,
            argument="encoder_hidden_states",
            padding="max_length",
            max_length=target.tokenizer.model_max_length,
            truncation=True,
        )
        waveforms = int(arguments["num_waveforms_per_prompt"])
        return Conditioning(prompts, waveforms, bool(arguments["do_classifier_free_guidance"]), (text,))

    def step(self, target: Any, arguments: Mapping[str, Any]) -> Step:
        """The transformer is given the timestep as a share of the scheduler's range."""
        return Step(arguments["timestep"] * target.scheduler.config.num_train_timesteps)

    def sigma(self, target: Any, timestep: float) -> float | None:
        return super().sigma(target, round(timestep))

    def predict(self, target: Any, latents: Any, timestep: Any, conditioning: Any) -> Any:
        """One forward of the transformer on latents [batch, channels, time, bands], for probes and effect maps."""
        return target.unfold(target.predict(target.fold(latents), timestep, conditioning))

    def lattice(self, site: SiteCall) -> Lattice:
        columns = int(site.arguments["hidden_states"].shape[-1])
        vocoder = site.target.vocoder.config
        hop = float(np.prod(vocoder.upsample_rates)) / vocoder.sampling_rate
        return Lattice(
            shape=(columns,),
            axes=("time",),
            seconds_per_column=hop * site.target.vae_scale_factor,
            prefix=1,
        )


@hookimpl
def aiba_backbones() -> list[Backbone]:
    return [MelDiT()]
