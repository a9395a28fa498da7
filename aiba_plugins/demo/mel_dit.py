"""A pipeline around ``StableAudioDiTModel`` on a mel latent: the counterpart of AudioLDM2's U-Net pipeline.

It works on the same VAE latent [batch, channels, time, bands], its bands folded into channels, so that the transformer's
tokens are time columns only. As in Stable Audio, the text is padded to a fixed length, padded positions are zeroed and not
masked, the unconditional text is all zeros, and one token with the noise level is put before the columns."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AudioPipelineOutput, DiffusionPipeline
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.utils.torch_utils import randn_tensor


class MelDiTPipeline(DiffusionPipeline):
    """Text to audio: T5, diffusion transformer, mel VAE, vocoder.

    Parameters
    ----------
    vae : AutoencoderKL on log-mels
    text_encoder, tokenizer : T5
    transformer : StableAudioDiTModel with ``channels × bands`` input channels
    scheduler : with ``alphas_cumprod``; its timesteps reach the transformer divided by their number
    vocoder : SpeechT5HifiGan
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae->vocoder"

    def __init__(
        self, vae: Any, text_encoder: Any, tokenizer: Any, transformer: Any, scheduler: Any, vocoder: Any
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
            scheduler=scheduler,
            vocoder=vocoder,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)

    @classmethod
    def from_pretrained(cls, folder: Any, **options: Any) -> Any:
        """Load a saved pipeline.

        Parts that ``model_index.json`` names but the folder does not hold are read from ``../unet``, the pipeline that
        shares them.
        """
        shared = Path(folder).parent / "unet"
        if Path(folder).is_dir() and shared.is_dir():
            from diffusers import AutoencoderKL
            from transformers import SpeechT5HifiGan

            dtype = options.get("torch_dtype", options.get("dtype", torch.float32))
            if "vae" not in options and not (Path(folder) / "vae").is_dir():
                options["vae"] = AutoencoderKL.from_pretrained(shared / "vae", dtype=dtype)
            if "vocoder" not in options and not (Path(folder) / "vocoder").is_dir():
                options["vocoder"] = SpeechT5HifiGan.from_pretrained(shared / "vocoder", dtype=dtype)
        return super().from_pretrained(folder, **options)

    def encode_prompt(
        self,
        prompt: str | list[str],
        device: Any,
        num_waveforms_per_prompt: int = 1,
        do_classifier_free_guidance: bool = False,
        negative_prompt: str | list[str] | None = None,
    ) -> torch.Tensor:
        """Text embeddings [rows, tokens, width], prompt-major; with guidance the unconditional rows come first."""
        embeds = self._embed(prompt, device).repeat_interleave(num_waveforms_per_prompt, 0)
        if not do_classifier_free_guidance:
            return embeds
        if negative_prompt is None:
            null = torch.zeros_like(embeds)
        else:
            null = self._embed(negative_prompt, device)
            null = null.repeat_interleave(len(embeds) // len(null), 0)
        return torch.cat([null, embeds])

    def _embed(self, text: str | list[str], device: Any) -> torch.Tensor:
        tokens = self.tokenizer(
            [text] if isinstance(text, str) else list(text),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(device)
        embeds = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return embeds * tokens.attention_mask[..., None].to(embeds.dtype)

    @staticmethod
    def fold(latents: torch.Tensor) -> torch.Tensor:
        """[batch, channels, time, bands] to [batch, channels × bands, time]."""
        return latents.permute(0, 1, 3, 2).flatten(1, 2)

    def unfold(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`fold`."""
        channels = int(self.vae.config.latent_channels)
        return latents.unflatten(1, (channels, -1)).permute(0, 1, 3, 2)

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """One forward of the transformer on folded latents; ``timestep`` in the scheduler's units, one or one per row."""
        config = self.transformer.config
        rotary = get_1d_rotary_pos_embed(
            config.attention_head_dim // 2, latents.shape[-1] + 1, use_real=True, repeat_interleave_real=False
        )
        level = (timestep / self.scheduler.config.num_train_timesteps).to(latents)
        no_global = latents.new_zeros(len(latents), 1, config.global_states_input_dim)
        return self.transformer(
            latents,
            level.expand(len(latents)),
            encoder_hidden_states=prompt_embeds,
            global_hidden_states=no_global,
            rotary_embedding=tuple(part.to(latents) for part in rotary),
            return_dict=False,
        )[0]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        audio_length_in_s: float = 5.0,
        num_inference_steps: int = 20,
        guidance_scale: float = 2.5,
        negative_prompt: str | list[str] | None = None,
        num_waveforms_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> Any:
        """Generate audio.

        Parameters
        ----------
        prompt : one text or several
        audio_length_in_s : rounded up to whole latent columns, then cut
        num_inference_steps : of the scheduler
        guidance_scale : 1 or less is without guidance
        negative_prompt : instead of the empty text, for guidance
        num_waveforms_per_prompt : the result is prompt-major
        generator : of the first noise
        latents : first noise [batch, channels, time, bands] instead
        output_type : ``"np"``, ``"pt"`` or ``"latent"`` (clean latents, scaled)
        return_dict : False for a plain tuple
        callback_on_step_end : ``callback(pipeline, step, timestep, {"latents": …})`` after each step, as in diffusers: latents
            that it returns (folded: [batch, channels × bands, time]) go into the next step

        Returns
        -------
        AudioPipelineOutput
            ``audios`` [rows, samples] at the vocoder's sampling rate

        Raises
        ------
        ValueError
            The length is shorter than one latent column, or the latents do not fit.
        """
        rate = int(self.vocoder.config.sampling_rate)
        hop = math.prod(self.vocoder.config.upsample_rates)
        columns = math.ceil(round(audio_length_in_s * rate) / hop / self.vae_scale_factor)
        if columns < 1:
            raise ValueError(f"audio_length_in_s must be positive, got {audio_length_in_s}")
        device, guided = self._execution_device, guidance_scale > 1
        embeds = self.encode_prompt(prompt, device, num_waveforms_per_prompt, guided, negative_prompt)
        rows = len(embeds) // (2 if guided else 1)
        bands = int(self.vocoder.config.model_in_dim) // self.vae_scale_factor
        shape = (rows, int(self.vae.config.latent_channels), columns, bands)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=torch.device(device), dtype=embeds.dtype)
        elif latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        sample = self.fold(latents.to(device, embeds.dtype)) * self.scheduler.init_noise_sigma
        for step, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            model_input = torch.cat([sample, sample]) if guided else sample
            prediction = self.predict(self.scheduler.scale_model_input(model_input, timestep), timestep, embeds)
            if guided:
                null, conditional = prediction.chunk(2)
                prediction = null + guidance_scale * (conditional - null)
            sample = self.scheduler.step(prediction, timestep, sample, return_dict=False)[0]
            if callback_on_step_end is not None:
                sample = callback_on_step_end(self, step, timestep, {"latents": sample}).get("latents", sample)
        self.maybe_free_model_hooks()
        audio: Any = self.unfold(sample)
        if output_type != "latent":
            mel = self.vae.decode(audio / self.vae.config.scaling_factor).sample[:, 0]
            audio = self.vocoder(mel).cpu().float()[:, : round(audio_length_in_s * rate)]
            if output_type == "np":
                audio = audio.numpy()
        return AudioPipelineOutput(audios=audio) if return_dict else (audio,)
