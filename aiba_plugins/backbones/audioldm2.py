"""AudioLDM2 (diffusers ``AudioLDM2Pipeline``): a U-Net on a mel latent, with two text streams.

Geometry, from ``diffusers/pipelines/audioldm2``: latent [B, C, H = time, W = frequency], raster t·F + f, band 0 the lowest;
mel of 64 bins, 0–8000 Hz, slaney scale, hop 10 ms; the VAE reduces both axes by ``vae_scale_factor``. Each position
of the U-Net holds three transformers: self-attention only, keys from ``encoder_hidden_states`` (GPT-2 embeddings, not aligned
with words), keys from ``encoder_hidden_states_1`` (T5 tokens)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aiba_hooks import Backbone, Conditioning, Lattice, SiteCall, TokenStream, hookimpl, mel_edges


class AudioLDM2(Backbone):
    """diffusers' AudioLDM2Pipeline and subclasses of it."""

    name = "audioldm2"
    denoiser_names = ("unet",)
    ranking_method = "score_waveforms"
    #: upper end of the mel scale of AudioLDM2's front end; lower end 0
    fmax = 8000.0

    def matches(self, target: Any) -> bool:
        return any(cls.__name__ == "AudioLDM2Pipeline" for cls in type(target).__mro__)

    def conditioning(self, target: Any, arguments: Mapping[str, Any], result: Any) -> Conditioning:
        prompt_embeds, _, generated = result
        waveforms = int(arguments["num_waveforms_per_prompt"])
        guided = bool(arguments["do_classifier_free_guidance"])
        prompt = arguments["prompt"]
        rows = prompt_embeds.shape[0] // waveforms // (2 if guided else 1)
        if prompt is None or arguments.get("prompt_embeds") is not None:
            # embeddings were given: there is no text to align
            prompts: tuple[str, ...] = ("",) * rows
            t5 = TokenStream.opaque("t5", prompts, prompt_embeds.shape[1], argument="encoder_hidden_states_1")
        else:
            prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
            t5 = self._t5(target, prompts, arguments.get("transcription"))
        gpt2 = TokenStream.opaque("gpt2", prompts, generated.shape[1], argument="encoder_hidden_states")
        return Conditioning(prompts, waveforms, guided, (t5, gpt2))

    def _t5(self, target: Any, prompts: tuple[str, ...], transcription: Any) -> TokenStream:
        """Tokens of the second text encoder, with the options that ``encode_prompt`` passes."""
        tokenizer = target.tokenizer_2
        texts: Sequence[str] = prompts
        if "Vits" in type(tokenizer).__name__:  # the speech checkpoints read a transcription with this encoder
            texts = (transcription,) if isinstance(transcription, str) else tuple(transcription or ())
        return TokenStream.from_tokenizer(
            "t5",
            tokenizer,
            texts,
            argument="encoder_hidden_states_1",
            padding=True,
            max_length=tokenizer.model_max_length,
            truncation=True,
        )

    def order(self, target: Any, arguments: Mapping[str, Any], result: Any) -> list[int]:
        """The pipeline returns waveforms sorted by their CLAP score; rows are found again by their samples."""
        given, returned = np.asarray(arguments["audio"]), np.asarray(result)
        return [
            next(i for i, wave in enumerate(given) if np.array_equal(wave, row, equal_nan=True)) for row in returned
        ]

    def lattice(self, site: SiteCall) -> Lattice:
        sample = site.arguments["sample"]
        height, width = int(sample.shape[-2]), int(sample.shape[-1])
        vocoder = site.target.vocoder.config
        hop = float(np.prod(vocoder.upsample_rates)) / vocoder.sampling_rate
        scale = site.target.vae_scale_factor
        bands = int(vocoder.model_in_dim)
        edges = mel_edges(bands, 0.0, self.fmax)[:: bands // width]
        return Lattice.of_level(site.queries, (height, width), seconds_per_column=hop * scale, frequency_edges=edges)


@hookimpl
def aiba_backbones() -> list[Backbone]:
    return [AudioLDM2()]
