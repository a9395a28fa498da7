"""TangoFlux (the package ``tangoflux``): diffusers' Flux transformer on a waveform latent, with joint attention.

From ``tangoflux/model.py``: every block attends over [text, duration, audio]; the text is T5's, padded to the longest prompt and
not masked, and one token with the duration follows it. The latent is [B, ``audio_seq_len``, 64], one column for every
``vae.hop_length`` samples; its channels are no frequencies. All columns are always generated (645, 30 s) and the decoded audio cut
after the duration asked for. One forward holds the unconditional rows (the empty prompt) first. Flow matching: the
timestep given to the transformer is the share of the noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aiba_hooks import Backbone, Conditioning, Lattice, MethodCall, Segment, SiteCall, Step, TokenStream, hookimpl
from aiba_plugins.backbones.latents import time_lattice


class TangoFlux(Backbone):
    """``TangoFluxInference``, which loads the weights and has the autoencoder, and the model class ``TangoFlux`` in it."""

    name = "tangoflux"
    # of the model, or of the inference class's model
    prompt_method = tuple(
        f"{owner}{method}" for owner in ("", "model.") for method in ("encode_text_classifier_free", "encode_text")
    )
    observed_methods = ("encode_duration", "model.encode_duration")

    def matches(self, target: Any) -> bool:
        return any(cls.__name__ in ("TangoFluxInference", "TangoFlux") for cls in type(target).__mro__)

    def model(self, target: Any) -> Any:
        """The model class of a target."""
        return target.model if hasattr(target, "vae") else target

    def denoiser(self, target: Any) -> Any:
        return self.model(target).transformer

    def conditioning_from(self, target: Any, calls: Sequence[MethodCall]) -> Conditioning | None:
        encoded = calls[-1]
        guided = encoded.name.endswith("encode_text_classifier_free")
        prompt = encoded.arguments["prompt"]
        prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
        tokenizer = self.model(target).tokenizer
        length = tokenizer.model_max_length if guided else self.model(target).max_text_seq_len
        text = TokenStream.from_tokenizer(
            "t5", tokenizer, prompts, padding="longest", max_length=length, truncation=True
        )
        seconds = TokenStream.opaque("seconds", prompts, 1, role="duration")
        timed = next((call for call in reversed(calls) if call.name.endswith("encode_duration")), None)
        window = None
        if timed is not None:
            asked = min(float(timed.arguments["duration"].max()), float(self.model(target).max_duration))
            window = (0.0, asked)
        waveforms = int(encoded.arguments.get("num_samples_per_prompt", 1))
        return Conditioning(prompts, waveforms, guided, (text.join(seconds),), window)

    def step(self, target: Any, arguments: Mapping[str, Any]) -> Step:
        """The transformer is given the timestep over the scheduler's number of timesteps, which is σ."""
        model = self.model(target)
        return Step(arguments["timestep"] * model.noise_scheduler.config.num_train_timesteps, arguments["timestep"])

    def steps(self, target: Any) -> int | None:
        return len(self.model(target).noise_scheduler.timesteps)

    def segments(self, site: SiteCall) -> Sequence[Segment]:
        text = int(site.arguments["encoder_hidden_states"].shape[1])
        return [Segment(text, "t5"), Segment(site.keys - text)]

    def seconds_per_column(self, target: Any) -> float:
        """Of the autoencoder; without it the longest audio over its columns, as the configuration has them."""
        if hasattr(target, "vae"):
            return float(target.vae.hop_length) / float(target.vae.config.sampling_rate)
        return float(target.max_duration) / float(target.audio_seq_len)

    def lattice(self, site: SiteCall) -> Lattice:
        window = site.conditioning.window if site.conditioning is not None else None
        return time_lattice(site.queries, self.seconds_per_column(site.target), window=window)


@hookimpl
def aiba_backbones() -> list[Backbone]:
    return [TangoFlux()]
