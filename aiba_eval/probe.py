"""What a model attends to in *real* audio: encode it, noise it to a known level, run the denoiser once under capture.

A generated sample has no ground truth: nobody played it. A probe starts from a mix whose stems are known::

    waveform → log-mel (the pipeline's own front end) → VAE latent x0 → x_t = √ᾱ_t · x0 + √(1 − ᾱ_t) · noise
             → one forward of the denoiser, conditioned on a prompt that names the instruments → word maps

At high noise (t near the end of training's range) the model speaks from the text, at low noise from this audio: probe
both. Average several draws of noise.

This module takes diffusers' AudioLDM2 pipelines, and others of their class: a 2-D ``vae`` on log-mels, a ``vocoder``
whose configuration states the mel, a ``scheduler`` with ``alphas_cumprod``, and ``encode_prompt``. For a pipeline of
another class, its backbone plugin may have methods ``encode(target, waveform, sample_rate)`` and
``predict(target, latents, timestep, conditioning)``; or they are passed to :func:`probe`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aiba_eval.grid import MelGrid
from aiba_eval.loading import few_threads
from aiba_hooks.plugins import manager

if TYPE_CHECKING:
    from torch import Tensor

    from aiba_hooks import AttentionMaps

#: ``encode(pipeline, waveform, sample_rate) -> latents``, clean and scaled as the denoiser expects them
Encode = Callable[[Any, NDArray[np.float32], int], "Tensor"]
#: ``predict(pipeline, latents, timestep, conditioning)``: one denoiser forward, without guidance; ``conditioning`` is
#: what the pipeline's ``encode_prompt`` returned
Predict = Callable[[Any, "Tensor", "Tensor", Any], "Tensor"]


class CannotProbe(TypeError):
    """The pipeline lacks a part that a probe needs. The message names it."""


@dataclass(frozen=True)
class FrontEnd:
    """The log-mel that an AudioLDM2-class pipeline was trained on.

    Attributes
    ----------
    sample_rate : hertz
    hop_length : samples
    bands : mel bands
    fmax : upper end of the mel scale in hertz
    """

    sample_rate: int
    hop_length: int
    bands: int
    fmax: float

    @classmethod
    def of(cls, pipeline: Any) -> FrontEnd:
        """Read it off the vocoder's configuration.

        The configuration does not hold the window (1024 samples) and the range (0 Hz to half the sample rate): these
        are AudioLDM2's.

        Raises
        ------
        CannotProbe
            There is no vocoder of that kind.
        """
        config: Any = getattr(getattr(pipeline, "vocoder", None), "config", None)
        missing = [n for n in ("sampling_rate", "upsample_rates", "model_in_dim") if not hasattr(config, n)]
        if missing:
            raise CannotProbe(
                f"{type(pipeline).__name__} has no mel vocoder (its configuration lacks {', '.join(missing)}): a probe needs "
                "a pipeline of AudioLDM2's class, or encode= and predict= of your own"
            )
        rate = int(config.sampling_rate)
        return cls(rate, int(np.prod(config.upsample_rates)), int(config.model_in_dim), rate / 2)

    def grid(self, samples: int, multiple: int = 1) -> MelGrid:
        """One column per hop over ``samples``, rounded up to a multiple of columns as the pipeline does."""
        columns = -(-samples // self.hop_length)
        columns = -(-columns // multiple) * multiple
        return MelGrid(
            time=columns,
            mel=self.bands,
            duration=columns * self.hop_length / self.sample_rate,
            fmax=self.fmax,
            sample_rate=self.sample_rate,
            n_fft=1024,
            hop_length=self.hop_length,
        )


def normalise(audio: ArrayLike) -> NDArray[np.float32]:
    """Mono, mean removed, peak 0.5: how AudioLDM2 prepares audio. Silence stays silence."""
    wave = np.asarray(audio, np.float32)
    wave = wave.mean(axis=0) if wave.ndim == 2 else wave
    wave = wave - wave.mean()
    return (wave / (np.abs(wave).max() + 1e-8) * 0.5).astype(np.float32)


def encode_audioldm2(pipeline: Any, waveform: NDArray[np.float32], sample_rate: int) -> Tensor:
    """The clean latent of a waveform, [1, channels, time, frequency]: log-mel, VAE mean, scaling factor.

    The VAE's mean, not a draw from its posterior: a probe's only randomness is the noise that it is given.

    Raises
    ------
    CannotProbe
        The pipeline has no VAE that encodes log-mels.
    """
    import torch

    vae = getattr(pipeline, "vae", None)
    if vae is None or not hasattr(vae.config, "scaling_factor"):
        raise CannotProbe(f"{type(pipeline).__name__} has no image-like VAE to encode a log-mel with")
    scale = int(getattr(pipeline, "vae_scale_factor", 2 ** (len(vae.config.block_out_channels) - 1)))
    front = FrontEnd.of(pipeline)
    samples = round(len(waveform) * front.sample_rate / sample_rate)
    mel = front.grid(samples, scale).spectrogram(waveform, sample_rate)
    pixels = torch.from_numpy(mel)[None, None].to(pipeline._execution_device, vae.dtype)
    return vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor


def predict_audioldm2(pipeline: Any, latents: Tensor, timestep: Tensor, conditioning: Any) -> Tensor:
    """One forward of AudioLDM2's U-Net, called as the pipeline calls it.

    Raises
    ------
    CannotProbe
        The pipeline has no U-Net.
    """
    if not hasattr(pipeline, "unet"):
        raise CannotProbe(
            f"{type(pipeline).__name__} has no unet: give its backbone a method predict(target, latents, timestep, "
            "conditioning) that runs its denoiser once, or pass predict="
        )
    prompt_embeds, attention_mask, generated_prompt_embeds = conditioning
    return pipeline.unet(
        latents,
        timestep,
        encoder_hidden_states=generated_prompt_embeds,
        encoder_hidden_states_1=prompt_embeds,
        encoder_attention_mask_1=attention_mask,
        return_dict=False,
    )[0]


def add_noise(pipeline: Any, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
    """x_t = √ᾱ_t · x0 + √(1 − ᾱ_t) · noise, with the scheduler's training noise levels.

    It is what the ``add_noise`` of DDPM and DDIM schedulers computes; written out here because other schedulers'
    takes only the timesteps of the schedule that is set, and in units of their own.

    Raises
    ------
    CannotProbe
        The scheduler has no cumulative alphas.
    ValueError
        The timestep is outside the training range.
    """
    alphas = getattr(pipeline.scheduler, "alphas_cumprod", None)
    if alphas is None:
        raise CannotProbe(f"{type(pipeline.scheduler).__name__} has no alphas_cumprod: the noise level of t is unknown")
    if not 0 <= timestep < len(alphas):
        raise ValueError(f"timestep {timestep} is outside 0–{len(alphas) - 1}, the range of this model's training")
    alpha = float(alphas[timestep])
    return alpha**0.5 * latents + (1 - alpha) ** 0.5 * noise


def probe(
    pipeline: Any,
    waveform: ArrayLike,
    sample_rate: int,
    prompt: str,
    *,
    words: Sequence[str] | None = None,
    timesteps: Sequence[int] = (300,),
    draws: int = 1,
    seed: int = 0,
    layers: str | Sequence[str] = "*",
    kinds: Sequence[str] = ("cross",),
    pooling: Literal["sum", "mean", "weighted", "max", "logmean"] = "sum",
    encode: Encode | None = None,
    predict: Predict | None = None,
) -> AttentionMaps:
    """Maps of the words of a prompt on real audio.

    Parameters
    ----------
    pipeline
        Of AudioLDM2's class, or any that ``encode`` and ``predict`` are for.
    waveform : array_like, shape (samples,) or (channels, samples)
        Normalised as the model's training audio was. Its end is padded to whole latent columns.
    sample_rate : int
        Of the waveform, in hertz.
    prompt : str
    words : sequence of str, optional
        Words of the prompt; default all of them.
    timesteps : sequence of int
        Noise levels, as timesteps of the model's training: 0 is nearly clean.
    draws : int
        Draws of noise per level. The same draws are used at every level, for every piece.
    seed : int
        Of the noise, drawn on the CPU.
    layers, kinds, pooling
        As in :func:`aiba_hooks.capture`.
    encode, predict : callable, optional
        See :data:`Encode` and :data:`Predict`. Default: the backbone's own methods of these names where it has them,
        else :func:`encode_audioldm2` and :func:`predict_audioldm2`.

    Returns
    -------
    AttentionMaps
        Dims (prompt, step, word, time, frequency); steps run over timesteps, then draws, and their coordinate
        ``timestep`` tells them apart. :func:`aiba_eval.project` averages them.

    Raises
    ------
    CannotProbe
        The pipeline lacks a part.
    ValueError
        A timestep outside the training range, or no timesteps or draws.
    aiba_hooks.AibaError
        As :func:`aiba_hooks.capture`.
    """
    import torch

    from aiba_hooks import capture

    if not timesteps or draws < 1:
        raise ValueError(f"need at least one timestep and one draw, got timesteps={list(timesteps)}, draws={draws}")
    if not hasattr(pipeline, "encode_prompt") or not hasattr(pipeline, "scheduler"):
        raise CannotProbe(f"{type(pipeline).__name__} has no encode_prompt or no scheduler: a probe needs both")
    own = next((b for b in manager().collect("aiba_backbones") if b.matches(pipeline)), None)
    to_latents: Encode = encode if encode is not None else getattr(own, "encode", encode_audioldm2)
    denoise: Predict = predict if predict is not None else getattr(own, "predict", predict_audioldm2)
    device = pipeline._execution_device
    with few_threads(pipeline), torch.no_grad():
        clean = to_latents(pipeline, normalise(waveform), sample_rate)
        with capture(pipeline, words=words, layers=layers, kinds=kinds, pooling=pooling) as captured:
            # by keyword, without guidance: every row of the denoiser's batch is the prompt's
            conditioning = pipeline.encode_prompt(
                prompt=prompt, device=device, num_waveforms_per_prompt=1, do_classifier_free_guidance=False
            )
            for timestep in timesteps:
                generator = torch.Generator().manual_seed(seed)
                for _ in range(draws):
                    noise = torch.randn(clean.shape, generator=generator).to(clean)
                    noised = add_noise(pipeline, clean, noise, timestep)
                    denoise(pipeline, noised, torch.tensor(timestep, device=device), conditioning)
    return captured.maps
