"""Effect maps: what the denoiser's prediction loses without a word, as a picture on the mel grid.

Attention says where the model *looks*; an effect map says what a word *does* to the clean latent that the model predicts.
It needs no attention, and no frequency axis in the latent, so it serves a diffusion transformer as well as a U-Net::

    x_t  = √ᾱ_t · x0 + √(1 − ᾱ_t) · noise              the same noised latent for both predictions
    L⁺   = decode(x̂0(x_t, prompt))                     log-mel of the clean latent predicted with the word
    L⁻   = decode(x̂0(x_t, prompt without the word))    and without it
    E    = mean over draws of max(L⁺ − L⁻, 0)           log: nats of magnitude
    E    = mean over draws of max(e^2L⁺ − e^2L⁻, 0)     energy: power
    E    = mean over draws of (L⁻ − L0)² − (L⁺ − L0)²   fit, signed: how much nearer the audio L0 = decode(x0) comes with the word

The first two ask what a word adds, whether the audio has it or not; the third asks whether the audio agrees. It is the
difference of denoising errors that Li et al. 2023 (arXiv 2303.16203) classify images by, in decoded log-mels.

x̂0 follows from the denoiser's output by the scheduler's ``prediction_type`` (:func:`clean_latent`). The predictions are
conditional ones, without guidance.

A word can be taken away in two ways (``remove=``), which ask different questions:

``"prompt"``
    The prompt is encoded anew without the word. Everything that the word did is gone: its own tokens, what the text
    encoder let it tell the other words, and pooled or generated embeddings. But the text encoder sees another sentence,
    often an ungrammatical one, and the tokens after the word move up.
``"values"``
    The prompt stays, and the word's value rows are multiplied by 0 in every cross-attention
    (:func:`aiba_hooks.intervene`). Nothing moves; attention keeps its weights, and what it gave the word is lost rather
    than given to others. But the other words' embeddings still know the word, and so do streams that are not aligned
    with words (AudioLDM2's GPT-2 embeddings).

Contents
--------

* :func:`effect_map`: the maps, on real or generated audio.
* :func:`edit_maps`: the same for pairs of texts, whatever differs between them; :func:`edit_quantities`, several quantities at once.
* :func:`effect_mass`, :func:`presence`: how much a word does; present words against absent and neutral ones.
* :func:`agreement`: rank correlation of attention maps with effect maps, beside that of other words' maps;
  :func:`rank_correlation`.
* :func:`clean_latent`, :func:`decode_audioldm2`, :func:`without_word`: the parts.

What such a map does not show is in ``docs/effects.md``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aiba_eval.grid import MelGrid, area_matrix, linear_matrix
from aiba_eval.loading import few_threads
from aiba_eval.probe import (
    CannotProbe,
    Encode,
    FrontEnd,
    Predict,
    add_noise,
    encode_audioldm2,
    normalise,
    predict_audioldm2,
)
from aiba_hooks import Backbone, UnknownBackbone
from aiba_hooks.plugins import manager
from aiba_hooks.words import check_words, distinct_words, find, split_words

if TYPE_CHECKING:
    from torch import Tensor
    from xarray import DataArray, Dataset

Floats = NDArray[np.float64]
Remove = Literal["prompt", "values"]
Quantity = Literal["log", "energy", "fit"]
Part = Literal["positive", "signed"]
UNITS: dict[str, str] = {"log": "nats", "energy": "power", "fit": "nats²"}
Levels = Literal["mean", "each"]
#: ``decode_mel(pipeline, latents) -> log-mel [batch, time, mel]``: natural logarithm of the magnitude mel, row 0 lowest
DecodeMel = Callable[[Any, "Tensor"], "Tensor"]


def decode_audioldm2(pipeline: Any, latents: Tensor) -> Tensor:
    """Log-mel of clean latents by the VAE of an AudioLDM2-class pipeline: ``vae.decode(latents / scaling_factor)``.

    Parameters
    ----------
    latents : Tensor, shape (batch, channels, time, frequency)
        Scaled as the denoiser expects them.

    Returns
    -------
    Tensor, shape (batch, time, mel)
        ln of the magnitude mel, as the vocoder is given it.

    Raises
    ------
    CannotProbe
        The pipeline has no VAE that decodes to log-mels.
    """
    vae: Any = getattr(pipeline, "vae", None)
    if not hasattr(vae, "decode") or not hasattr(getattr(vae, "config", None), "scaling_factor"):
        raise CannotProbe(
            f"{type(pipeline).__name__} has no image-like VAE that decodes a log-mel: give its backbone a method "
            "decode_mel(target, latents) that returns log-mels [batch, time, mel], or pass decode_mel="
        )
    weight = next(iter(vae.parameters()), None) if hasattr(vae, "parameters") else None
    scaled = latents / vae.config.scaling_factor
    return vae.decode(scaled if weight is None else scaled.to(weight.dtype)).sample[:, 0]


def prediction_type(pipeline: Any) -> Literal["epsilon", "v_prediction", "sample"]:
    """What the denoiser predicts, as the configuration of its scheduler says.

    Raises
    ------
    CannotProbe
        Flow matching, a scheduler without cumulative alphas (EDM's: Stable Audio), or one that does not say.
    """
    scheduler = getattr(pipeline, "scheduler", None)
    config = getattr(scheduler, "config", None)
    kind, name = getattr(config, "prediction_type", None), type(scheduler).__name__
    if "FlowMatch" in name or str(kind).startswith("flow") or getattr(config, "use_flow_sigmas", False):
        raise CannotProbe(
            f"{name} is for flow matching, whose clean latent this version does not compute: effect maps take epsilon, "
            "v_prediction and sample"
        )
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise CannotProbe(
            f"{name} has no alphas_cumprod: its noise levels are not those of a variance-preserving diffusion, from which "
            "effect maps take the clean latent"
        )
    if kind == "epsilon" or kind == "v_prediction" or kind == "sample":
        return kind
    raise CannotProbe(
        f"{name} states prediction_type={kind!r}: effect maps take epsilon, v_prediction and sample, because the clean latent "
        "follows from these"
    )


def clean_latent(pipeline: Any, noised: Tensor, prediction: Tensor, timestep: int) -> Tensor:
    """x̂0, the clean latent that a denoiser's output stands for, in float32 or the latents' own finer dtype.

    ::

        epsilon        x̂0 = (x_t − √(1 − ᾱ_t) · prediction) / √ᾱ_t
        v_prediction   x̂0 = √ᾱ_t · x_t − √(1 − ᾱ_t) · prediction
        sample         x̂0 = prediction

    (Ho et al. 2020, arXiv 2006.11239, Eq. 15, for epsilon; Salimans & Ho 2022, arXiv 2202.00512, Appendix D, for v).
    Nothing is clipped, whatever the scheduler would do.

    Parameters
    ----------
    pipeline
        Its scheduler has ``alphas_cumprod`` and states ``prediction_type``.
    noised, prediction : Tensor
        x_t and the denoiser's output for it, of one shape.
    timestep : int
        Of the model's training.

    Raises
    ------
    CannotProbe
        As :func:`prediction_type`, or the scheduler has no cumulative alphas.
    ValueError
        The timestep is outside the training range, or ᾱ_t is 0 and the model predicts epsilon: x_t holds no signal.
    """
    import torch

    kind = prediction_type(pipeline)
    dtype = torch.promote_types(noised.dtype, torch.float32)
    # the two factors of add_noise, read off it, so that both have one definition of the noise level
    one, none = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    signal = float(add_noise(pipeline, one, none, timestep))
    noise = float(add_noise(pipeline, none, one, timestep))
    noised, prediction = noised.to(dtype), prediction.to(dtype)
    if kind == "sample":
        return prediction
    if kind == "v_prediction":
        return signal * noised - noise * prediction
    if signal == 0:
        raise ValueError(
            f"timestep {timestep} is pure noise (ᾱ = 0): no clean latent follows from a prediction of epsilon"
        )
    return (noised - noise * prediction) / signal


def without_word(prompt: str, word: str) -> str:
    """The prompt less a word: every occurrence cut out, then the blanks tidied, nothing else.

    ``"a bass, drums and piano"`` less ``"drums"`` is ``"a bass, and piano"``. What else a sentence would lose with the word
    (articles, commas) is a choice; :func:`effect_map` takes sentences of your own as ``without=``.

    Parameters
    ----------
    word : str
        A word, a phrase, or one occurrence (``"bass#1"``), as in :func:`aiba_hooks.capture`.

    Raises
    ------
    aiba_hooks.UnknownWord
        The prompt does not have it.
    """
    check_words([word], [prompt])
    spans = split_words(prompt)
    kept, last = "", 0
    for index in find(word, prompt):
        _, start, stop = spans[index]
        kept, last = kept + prompt[last:start], stop
    left = " ".join((kept + prompt[last:]).split())
    for mark in ",.;:!?":
        left = left.replace(f" {mark}", mark)
    return left.lstrip(",.;:!? ")


@dataclass(frozen=True)
class _Means:
    """What a pipeline is worked with."""

    pipeline: Any
    backbone: Backbone | str | None
    encode: Encode
    predict: Predict
    decode_mel: DecodeMel
    mel: MelGrid  # definition of the decoded mel; its extent is set by what is decoded

    @classmethod
    def of(
        cls,
        pipeline: Any,
        backbone: Backbone | str | None,
        encode: Encode | None,
        predict: Predict | None,
        decode_mel: DecodeMel | None,
        mel: MelGrid | None,
    ) -> _Means:
        if not hasattr(pipeline, "encode_prompt") or getattr(pipeline, "scheduler", None) is None:
            raise CannotProbe(
                f"{type(pipeline).__name__} has no encode_prompt or no scheduler: an effect map needs both"
            )
        prediction_type(pipeline)
        own: Any = backbone
        if not isinstance(own, Backbone):
            known = manager().collect("aiba_backbones")
            own = next((b for b in known if (b.matches(pipeline) if backbone is None else b.name == backbone)), None)
            if own is None and backbone is not None:
                raise UnknownBackbone(
                    f"no backbone is named {backbone!r}; registered: {', '.join(b.name for b in known)}"
                )
        if decode_mel is None:
            decode_mel = getattr(own, "decode_mel", decode_audioldm2)
        if mel is None and hasattr(own, "mel_grid"):
            mel = own.mel_grid(pipeline)
        if mel is None:
            try:
                mel = FrontEnd.of(pipeline).grid(1)
            except CannotProbe as error:
                raise CannotProbe(
                    f"{type(pipeline).__name__} has no vocoder that states its mel: give its backbone the methods "
                    "decode_mel(target, latents) and mel_grid(target), or pass decode_mel= and mel="
                ) from error
        return cls(
            pipeline,
            backbone,
            encode if encode is not None else getattr(own, "encode", encode_audioldm2),
            predict if predict is not None else getattr(own, "predict", predict_audioldm2),
            decode_mel,
            mel,
        )

    def condition(self, text: str, rows: int = 1) -> Any:
        # by keyword, without guidance: every row of the denoiser's batch is the prompt's
        return self.pipeline.encode_prompt(
            prompt=text,
            device=self.pipeline._execution_device,
            num_waveforms_per_prompt=rows,
            do_classifier_free_guidance=False,
        )

    def log_mel(self, noised: Tensor, timestep: int, conditioning: Any) -> Floats:
        """Decoded prediction [rows, time, mel] for noised latents [rows, ...]."""
        import torch

        at = torch.tensor(timestep, device=self.pipeline._execution_device)
        output = self.predict(self.pipeline, noised, at, conditioning)
        if output.shape != noised.shape:
            raise ValueError(f"predict returned {tuple(output.shape)} for latents of shape {tuple(noised.shape)}")
        return self.decoded(clean_latent(self.pipeline, noised, output, timestep))

    def decoded(self, latents: Tensor) -> Floats:
        """Log-mels [rows, time, mel] of clean latents [rows, ...]."""
        mels = self.decode_mel(self.pipeline, latents)
        if mels.ndim != 3 or mels.shape[0] != len(latents) or mels.shape[2] != self.mel.mel:
            raise ValueError(
                f"decode_mel returned {tuple(mels.shape)}; needed: [batch = {len(latents)}, time, mel = {self.mel.mel}]"
            )
        return mels.float().cpu().numpy().astype(float)


def effect_map(
    pipeline: Any,
    prompt: str | Sequence[str],
    *,
    waveform: ArrayLike | None = None,
    sample_rate: int | None = None,
    latents: Tensor | None = None,
    words: Sequence[str] | None = None,
    remove: Remove = "prompt",
    without: Mapping[str, str] | None = None,
    timesteps: Sequence[int] = (300,),
    draws: int = 4,
    seed: int = 0,
    quantity: Quantity = "log",
    part: Part = "positive",
    levels: Levels = "mean",
    grid: MelGrid | None = None,
    batch: int = 8,
    backbone: Backbone | str | None = None,
    encode: Encode | None = None,
    predict: Predict | None = None,
    decode_mel: DecodeMel | None = None,
    mel: MelGrid | None = None,
) -> DataArray:
    """What the predicted audio loses without each word of a prompt, on the mel grid.

    For every noise draw: noise the clean latent to x_t, predict the clean latent from the same x_t with and without the
    word, decode both, and keep the positive part of the difference of their log-mels (or energies). See the module for
    the formula and for what the two ways to take a word away mean.

    Parameters
    ----------
    pipeline
        Of AudioLDM2's class, or any whose backbone has the methods ``encode``, ``predict`` and ``decode_mel``, or with the
        arguments of these names.
    prompt : str or sequence of str
        Several make the axis ``prompt``.
    waveform, sample_rate : array_like, shape (samples,) or (channels, samples), and int in hertz
        Real audio, encoded as :func:`aiba_eval.probe.probe` does; the same for every prompt.
    latents : Tensor, shape (1 or prompts, channels, time, ...), instead of a waveform
        Clean latents, scaled as the denoiser expects them: what a pipeline returns with ``output_type="latent"``.
    words : sequence of str, optional
        Words, phrases or occurrences (``"bass#1"``), or labels that ``without`` has; default every word of the prompts.
    remove : {"prompt", "values"}
        Encode the prompt without the word, or multiply the word's value rows by 0 in every cross-attention.
    without : mapping of label to str, optional
        For ``remove="prompt"`` and one prompt: the text to compare with, where cutting the word out is not what you mean. A
        label need not be a word: ``{"reordered": "drums and a bass"}`` is a neutral edit.
    timesteps : sequence of int
        Noise levels, as timesteps of the model's training: 0 is nearly clean.
    draws : int
        Draws of noise per level: the same for every level, word and prompt, with and without.
    seed : int
        Of the noise, drawn on the CPU.
    quantity : {"log", "energy", "fit"}
        Difference of log-mels (nats: ln of a magnitude ratio), of powers, exp(2 · log-mel), or of squared errors of the
        log-mels against the audio's own (nats²): above 0 where the word brings the prediction nearer to the audio.
    part : {"positive", "signed"}
        Positive part of each draw's difference, or the difference itself. The mean of positive parts has a floor: it is
        above 0 wherever a word changes anything at all. Read "fit" signed.
    levels : {"mean", "each"}
        Average over noise levels, or keep them as a dimension ``timestep``.
    grid : MelGrid, optional
        Default ``MelGrid()``. With ``duration=None`` its columns span the latent, whose last column may be padding.
    batch : int
        Most rows in one forward. Words and draws share forwards where their conditionings have the same shapes
        (``remove="prompt"``); draws alone do with ``remove="values"``.
    backbone
        As in :func:`aiba_hooks.capture`.
    encode, predict, decode_mel : callable, optional
        See :data:`~aiba_eval.probe.Encode`, :data:`~aiba_eval.probe.Predict` and :data:`DecodeMel`. Default: the backbone's
        own methods of these names where it has them, else those for AudioLDM2.
    mel : MelGrid, optional
        The mel that ``decode_mel`` returns: bands, range, scale, sample rate and hop (its extent is ignored). Default: what
        the backbone's method ``mel_grid(target)`` returns, else the vocoder's.

    Returns
    -------
    DataArray of float32, dims (prompt, word, time, mel)
        With ``levels="each"``: (prompt, timestep, word, time, mel). Coordinates as :func:`aiba_eval.project` has them, so
        that :func:`aiba_eval.score` takes it, and with ``remove="prompt"`` ``without`` (prompt, word), the texts compared
        with. A word that a prompt lacks is NaN there, as are cells outside the audio. Attributes: ``remove``,
        ``quantity``, ``part``, ``units``, ``timesteps``, ``draws``, ``seed``, ``model``, ``prediction_type`` and those of
        ``project`` about the grid; ``finest_lattice`` is that of the decoded mel.

    Raises
    ------
    CannotProbe
        The pipeline lacks a part (the message names it), or is trained by flow matching.
    ValueError
        No audio or two, an option that does not exist, no timesteps or draws, a timestep outside the training range.
    aiba_hooks.UnknownWord
        A word is in no prompt.
    aiba_hooks.AibaError
        With ``remove="values"``, as :func:`aiba_hooks.intervene`.

    Examples
    --------
    >>> maps = effect_map(pipe, "a bass and drums", waveform=mix, sample_rate=16000)      # doctest: +SKIP
    >>> maps.sel(word="bass")[0]                                                          # doctest: +SKIP
    """
    import torch

    _one_of("remove", remove, ("prompt", "values"))
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    _check_options(timesteps, draws, batch, quantity, part, levels, waveform, sample_rate, latents)
    levels_at = list(timesteps)
    if not prompts:
        raise ValueError("need at least one prompt, got none")
    texts = dict(without or {})
    if texts and (remove != "prompt" or len(prompts) > 1):
        raise ValueError(
            "without= says what one prompt reads less a word: it needs remove='prompt' and a single prompt"
        )
    requests = distinct_words(prompts) if words is None else [words] if isinstance(words, str) else list(words)
    if len(set(requests)) != len(requests) or not requests:
        raise ValueError(f"words must be distinct and at least one, got {requests}")
    check_words([word for word in requests if word not in texts], prompts)

    means = _Means.of(pipeline, backbone, encode, predict, decode_mel, mel)
    grid = MelGrid() if grid is None else grid
    with few_threads(pipeline), torch.no_grad():
        clean = _clean(means, waveform, sample_rate, latents)
        if len(clean) not in (1, len(prompts)):
            raise ValueError(f"{len(clean)} latents for {len(prompts)} prompts: pass one, or one for each")
        noise = _noise(clean, draws, seed)
        shape = (len(prompts), len(levels_at), len(requests))
        rasters: Floats | None = None
        for i, text in enumerate(prompts):
            own = clean[i : i + 1] if len(clean) > 1 else clean
            noised = [add_noise(pipeline, own, noise, timestep) for timestep in levels_at]
            there = {j: word for j, word in enumerate(requests) if word in texts or find(word, text)}
            others = {j: texts[word] if word in texts else without_word(text, word) for j, word in there.items()}
            if remove == "prompt":
                whole, *changed = _by_prompt(means, [text, *others.values()], noised, levels_at, batch)
            else:
                whole = _by_values(means, text, None, noised, levels_at, batch)
                changed = [_by_values(means, text, word, noised, levels_at, batch) for word in there.values()]
            if rasters is None:
                rasters = np.full((*shape, *whole.shape[-2:]), np.nan)
            audio = means.decoded(own) if quantity == "fit" else None
            for j, lost in zip(there, changed, strict=True):
                rasters[i, :, j] = _difference(whole, lost, audio, quantity, part).mean(axis=1)
    assert rasters is not None
    result = _on_grid(rasters, means.mel, grid, prompts, levels_at, requests)
    if remove == "prompt":
        cut = [
            [texts[w] if w in texts else without_word(p, w) if find(w, p) else "" for w in requests] for p in prompts
        ]
        result = result.assign_coords(without=(("prompt", "word"), np.asarray(cut, str)))
    result.attrs |= {"remove": remove, **_described(pipeline, quantity, part, levels_at, draws, seed)}
    return result if levels == "each" else result.mean("timestep", keep_attrs=True, skipna=False)


def edit_maps(
    pipeline: Any,
    edits: Mapping[str, tuple[str, str]],
    *,
    quantity: Quantity = "log",
    part: Part = "positive",
    **options: Any,
) -> DataArray:
    """What the predicted audio of one text has that the predicted audio of another lacks, for pairs of texts.

    :func:`effect_map` with ``remove="prompt"`` is the case (prompt, prompt less a word). A text that is in several pairs is
    predicted once.

    Parameters
    ----------
    edits : mapping of label to (text, text)
        L⁺ is of the first text, L⁻ of the second.
    pipeline, quantity, part
        As in :func:`effect_map`.
    options
        Of :func:`edit_quantities`: ``waveform``, ``latents``, ``timesteps``, ``draws``, ...

    Returns
    -------
    DataArray of float32, dims (word, time, mel)
        The labels along ``word``, with the coordinates ``with`` and ``without`` there: the texts. With ``levels="each"``
        (timestep, word, time, mel). Other coordinates and attributes as in :func:`effect_map`, without ``remove``.

    Raises
    ------
    CannotProbe, ValueError, aiba_hooks.AibaError
        As :func:`effect_map`; also if there are no edits, or several latents.
    """
    return edit_quantities(pipeline, edits, [(quantity, part)], **options)[0]


def edit_quantities(
    pipeline: Any,
    edits: Mapping[str, tuple[str, str]],
    quantities: Sequence[tuple[Quantity, Part]],
    *,
    waveform: ArrayLike | None = None,
    sample_rate: int | None = None,
    latents: Tensor | None = None,
    timesteps: Sequence[int] = (300,),
    draws: int = 4,
    seed: int = 0,
    levels: Levels = "mean",
    grid: MelGrid | None = None,
    batch: int = 8,
    backbone: Backbone | str | None = None,
    encode: Encode | None = None,
    predict: Predict | None = None,
    decode_mel: DecodeMel | None = None,
    mel: MelGrid | None = None,
) -> list[DataArray]:
    """:func:`edit_maps` in several quantities of the same predictions, which are made once.

    Parameters
    ----------
    quantities : sequence of (quantity, part)
        ``[("log", "positive"), ("fit", "signed")]``: one map each, in this order.
    pipeline, waveform, sample_rate, latents, timesteps, draws, seed, levels, grid, batch, backbone, encode, predict, decode_mel, mel
        As in :func:`effect_map`; one clean latent.
    edits
        As in :func:`edit_maps`.

    Returns
    -------
    list of DataArray
        As :func:`edit_maps` returns them.

    Raises
    ------
    CannotProbe, ValueError, aiba_hooks.AibaError
        As :func:`edit_maps`.
    """
    import torch

    for quantity, part in quantities:
        _check_options(timesteps, draws, batch, quantity, part, levels, waveform, sample_rate, latents)
    levels_at = list(timesteps)
    if not edits:
        raise ValueError("edits is empty: give a label and its two texts")
    means = _Means.of(pipeline, backbone, encode, predict, decode_mel, mel)
    grid = MelGrid() if grid is None else grid
    with few_threads(pipeline), torch.no_grad():
        clean = _clean(means, waveform, sample_rate, latents)
        if len(clean) != 1:
            raise ValueError(f"edit_maps takes one clean latent, got {len(clean)}")
        noise = _noise(clean, draws, seed)
        noised = [add_noise(pipeline, clean, noise, timestep) for timestep in levels_at]
        texts = list(dict.fromkeys(text for pair in edits.values() for text in pair))
        decoded = dict(zip(texts, _by_prompt(means, texts, noised, levels_at, batch), strict=True))
        audio = means.decoded(clean) if any(quantity == "fit" for quantity, _ in quantities) else None
    sides = np.asarray(list(edits.values()), str)
    found = []
    for quantity, part in quantities:
        rasters = np.stack(
            [
                _difference(decoded[whole], decoded[lost], audio, quantity, part).mean(axis=1)
                for whole, lost in edits.values()
            ],
            axis=1,
        )
        result = _on_grid(rasters[None], means.mel, grid, [""], levels_at, list(edits)).isel(prompt=0, drop=True)
        result = result.assign_coords({"with": ("word", sides[:, 0]), "without": ("word", sides[:, 1])})
        result.attrs |= _described(pipeline, quantity, part, levels_at, draws, seed)
        found.append(result if levels == "each" else result.mean("timestep", keep_attrs=True, skipna=False))
    return found


def _check_options(
    timesteps: Sequence[int],
    draws: int,
    batch: int,
    quantity: str,
    part: str,
    levels: str,
    waveform: ArrayLike | None,
    sample_rate: int | None,
    latents: Tensor | None,
) -> None:
    _one_of("quantity", quantity, tuple(UNITS))
    _one_of("part", part, ("positive", "signed"))
    _one_of("levels", levels, ("mean", "each"))
    if not len(timesteps) or draws < 1 or batch < 1:
        raise ValueError(
            f"need at least one timestep, draw and row, got timesteps={list(timesteps)}, draws={draws}, batch={batch}"
        )
    if (waveform is None) == (latents is None) or (waveform is not None and sample_rate is None):
        raise ValueError("pass either waveform= with sample_rate=, or latents=")


def _clean(means: _Means, waveform: ArrayLike | None, sample_rate: int | None, latents: Tensor | None) -> Tensor:
    if latents is not None:
        return latents.to(means.pipeline._execution_device)
    assert sample_rate is not None
    return means.encode(means.pipeline, normalise(np.asarray(waveform)), sample_rate)


def _noise(clean: Tensor, draws: int, seed: int) -> Tensor:
    """The draws that :func:`aiba_eval.probe.probe` makes with this seed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randn(clean[:1].shape, generator=generator) for _ in range(draws)]).to(clean)


def _described(
    pipeline: Any, quantity: Quantity, part: Part, timesteps: Sequence[int], draws: int, seed: int
) -> dict[str, Any]:
    return {
        "quantity": quantity,
        "part": part,
        "units": UNITS[quantity],
        "timesteps": [int(t) for t in timesteps],
        "draws": int(draws),
        "seed": int(seed),
        "model": type(pipeline).__name__,
        "prediction_type": prediction_type(pipeline),
    }


def _one_of(name: str, value: str, options: Sequence[str]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}; got {value!r}")


def _difference(whole: Floats, lost: Floats, audio: Floats | None, quantity: Quantity, part: Part) -> Floats:
    if quantity == "fit":
        assert audio is not None
        difference = (lost - audio) ** 2 - (whole - audio) ** 2
    else:
        difference = whole - lost if quantity == "log" else np.exp(2 * whole) - np.exp(2 * lost)
    return np.maximum(difference, 0) if part == "positive" else difference


def _by_prompt(
    means: _Means, texts: Sequence[str], noised: Sequence[Tensor], timesteps: Sequence[int], batch: int
) -> list[Floats]:
    """Decoded predictions [level, draw, time, mel], one array for each text.

    Each text is encoded alone: in a batch of texts of unequal length, padding can change what an encoder returns.
    """
    import torch

    encoded = {text: means.condition(text) for text in dict.fromkeys(texts)}
    alike: dict[Any, list[str]] = {}
    for position, (text, conditioning) in enumerate(encoded.items()):
        alike.setdefault(_signature(conditioning, position), []).append(text)
    decoded: dict[str, list[list[Floats]]] = {text: [[] for _ in timesteps] for text in encoded}
    for signature, group in alike.items():
        jobs = list(itertools.product(group, range(len(noised[0]))))
        size = 1 if signature[0] == "single" else batch
        for start in range(0, len(jobs), size):
            rows = jobs[start : start + size]
            conditioning = _stack([encoded[text] for text, _ in rows])
            for level, timestep in enumerate(timesteps):
                sample = torch.stack([noised[level][draw] for _, draw in rows])
                for (text, _), mel in zip(rows, means.log_mel(sample, timestep, conditioning), strict=True):
                    decoded[text][level].append(mel)
    stacked = {text: np.asarray(per_level) for text, per_level in decoded.items()}
    return [stacked[text] for text in texts]


def _by_values(
    means: _Means, text: str, word: str | None, noised: Sequence[Tensor], timesteps: Sequence[int], batch: int
) -> Floats:
    """Decoded predictions [level, draw, time, mel], with a word's value rows at 0 where one is given."""
    from aiba_hooks import intervene

    decoded: list[list[Floats]] = [[] for _ in timesteps]
    for start in range(0, len(noised[0]), batch):
        rows = slice(start, min(start + batch, len(noised[0])))
        edit: AbstractContextManager[Any] = nullcontext()
        if word is not None:
            edit = intervene(means.pipeline, reweight={word: 0.0}, backbone=means.backbone)
        with edit:
            conditioning = means.condition(text, rows.stop - rows.start)
            for level, timestep in enumerate(timesteps):
                decoded[level] += list(means.log_mel(noised[level][rows], timestep, conditioning))
    return np.asarray(decoded)


def _signature(conditioning: Any, position: int) -> tuple[Any, ...]:
    """Equal for conditionings that can share a forward; one that cannot be stacked equals no other."""
    shapes = _shapes(conditioning)
    return ("single", position) if shapes is None else ("stack", shapes)


def _shapes(value: Any) -> Any:
    """Structure and tensor shapes of a conditioning, or None if it holds more than plain containers of tensors with one row."""
    import torch

    if isinstance(value, torch.Tensor):
        one = value.ndim > 0 and value.shape[0] == 1
        return (tuple(value.shape), str(value.dtype)) if one else None
    if value is None:
        return "none"
    if type(value) is dict:
        parts = {str(k): _shapes(v) for k, v in value.items()}
        return None if None in parts.values() else ("mapping", tuple(parts.items()))
    if type(value) in (tuple, list):
        entries = tuple(_shapes(v) for v in value)
        return None if None in entries else ("sequence", entries)
    return None


def _stack(conditionings: Sequence[Any]) -> Any:
    import torch

    first = conditionings[0]
    if len(conditionings) == 1 or first is None:
        return first
    if isinstance(first, torch.Tensor):
        return torch.cat(list(conditionings))
    if isinstance(first, dict):
        return {key: _stack([c[key] for c in conditionings]) for key in first}
    return type(first)(_stack(list(entries)) for entries in zip(*conditionings, strict=True))


def _on_grid(
    rasters: Floats, mel: MelGrid, grid: MelGrid, prompts: list[str], timesteps: Sequence[int], words: list[str]
) -> DataArray:
    """Rasters (prompt, timestep, word, frames, bands) of the decoded mel as a DataArray on the grid.

    Along each axis a raster finer than the grid is averaged over the grid's cells, a coarser one interpolated linearly.
    """
    import xarray

    *_, frames, bands = rasters.shape
    seconds = mel.hop_length / mel.sample_rate
    frame_edges = seconds * np.arange(frames + 1)
    start, duration = (0.0, float(frame_edges[-1])) if grid.duration is None else (grid.start, grid.duration)
    column_edges = np.linspace(start, start + duration, grid.time + 1)
    band_edges = grid.hz_to_row(replace(mel, mel=bands).edges)
    across, inside = _resampling(column_edges, frame_edges)
    up, within = _resampling(np.arange(grid.mel + 1.0), band_edges)
    values = np.where(np.outer(inside, within), across @ rasters @ up.T, np.nan)
    in_time = (frame_edges[1:] > start) & (frame_edges[:-1] < start + duration)
    in_range = (band_edges[1:] > 1e-6) & (band_edges[:-1] < grid.mel - 1e-6)
    return xarray.DataArray(
        values.astype(np.float32),
        dims=("prompt", "timestep", "word", "time", "mel"),
        coords={
            "prompt": prompts,
            "timestep": list(timesteps),
            "word": words,
            "time": (column_edges[:-1] + column_edges[1:]) / 2,
            "mel": np.arange(grid.mel),
            "frequency": ("mel", grid.frequencies),
        },
        attrs={
            "frequency_resolved": bool(in_range.sum() > 1),
            "finest_lattice": [max(1, int(in_time.sum())), max(1, int(in_range.sum()))],
            "time_start": start,
            "seconds_per_column": duration / grid.time,
            "mel_scale": grid.scale,
            "fmin": grid.fmin,
            "fmax": grid.fmax,
        },
        name="effect",
    )


def _resampling(target: Floats, source: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """``matrix @ source cells`` are target cells; and which of these have their centre inside the source."""
    centres = (target[:-1] + target[1:]) / 2
    weights = linear_matrix(centres, source)
    inside = np.asarray(np.isfinite(weights).all(axis=1), bool)
    if np.diff(target).mean() > (1 + 1e-6) * np.diff(source).mean():
        weights = area_matrix(target, source)
        covered = weights.sum(axis=1, keepdims=True)
        weights = weights / np.where(covered > 0, covered, 1)
    return np.where(inside[:, None], weights, 0.0), inside


# ---- how much a word does


def effect_mass(maps: DataArray) -> DataArray:
    """Mean of an effect map over the cells that it covers: how much a word does, wherever.

    Parameters
    ----------
    maps : DataArray, dims (..., word, time, mel)
        From :func:`effect_map`.

    Returns
    -------
    DataArray, dims (..., word)
        In the unit of the map: nats (``quantity="log"``), power, or nats² (``"fit"``). NaN for a word that the prompt lacks.
    """
    missing = [dim for dim in ("word", "time", "mel") if dim not in maps.dims]
    if missing:
        raise ValueError(f"maps lack {missing}: dims are {maps.dims} = {maps.shape}")
    return maps.mean(("time", "mel"), skipna=True, keep_attrs=True).rename("effect_mass")


def listed(words: Sequence[str]) -> str:
    """``["bass", "drums", "piano"]`` as ``"bass, drums and piano"``."""
    *first, last = words if words else [""]
    return f"{', '.join(first)} and {last}" if first else last


def presence(
    pipeline: Any,
    present: Sequence[str],
    *,
    absent: Sequence[str] = (),
    neutral: Sequence[str] = (),
    compose: Callable[[Sequence[str]], str] = listed,
    remove: Remove = "prompt",
    **options: Any,
) -> DataArray:
    """Effect mass of words that are in the audio, beside words that are not and words that mean no sound.

    A model that only follows the text gives a word as much mass whether the audio has it or not; with ``quantity="fit",
    part="signed"`` the mass is above 0 only where the audio agrees with the word. Present and absent words
    are measured by the same edit of a text of the same length: each absent word takes the place of a present one, in turn. An
    edit of a shorter text does more, in an untrained model too::

        present w       compose(other present words + w)   against   compose(other present words)
        absent a of w   compose(other present words + a)   against   compose(other present words)
        neutral n       compose(present words)             against   the same less n, where it stands

    With ``remove="values"`` it is the prompt on the left, with and without the word's values.

    Parameters
    ----------
    pipeline
    present : sequence of str
        Words for what the audio has.
    absent : sequence of str
        Words for what it does not have.
    neutral : sequence of str
        Words of ``compose(present)`` without a sound of their own: ``["and"]``.
    compose : callable
        Makes a prompt of words. It has to bear an empty list where there is one present word.
    remove
        As in :func:`effect_map`.
    options
        Of :func:`effect_map`: ``waveform``, ``latents``, ``timesteps``, ``draws``, ...

    Returns
    -------
    DataArray, dims (word,) or (timestep, word)
        Effect masses with the coordinates ``role`` ("present", "absent" or "neutral") and ``prompt`` along word. Attribute
        ``auroc``: the share of pairs of an absent word and the present one whose place it takes in which the present one has
        more mass, ties counted half. On one piece it says little: :func:`aiba_eval.compare` does it over pieces. With ``levels="each"`` a list, one entry per level; NaN without
        absent words.

    Raises
    ------
    ValueError
        No present words, an absent word is in the prompt, or a word is named twice.
    CannotProbe, aiba_hooks.AibaError
        As :func:`effect_map`.
    """
    import xarray

    whole = compose(present)
    there = [word for word in absent if find(word, whole)]
    if there or not present:
        raise ValueError(f"absent words {there} are in the prompt {whole!r}" if there else "present is empty")
    asked = [(w, "present") for w in present] + [(w, "absent") for w in absent] + [(w, "neutral") for w in neutral]
    if len({word for word, _ in asked}) < len(asked):
        raise ValueError(f"a word is named twice: {[word for word, _ in asked]}")
    edits = {word: (whole, without_word(whole, word)) for word in neutral}
    for replaced, word in [*zip(present, present, strict=True), *zip(itertools.cycle(present), absent, strict=False)]:
        others = [other for other in present if other != replaced]
        edits[word] = (compose([*others, word]), compose(others))
    edits = {word: edits[word] for word, _ in asked}
    if remove == "prompt":
        joined = effect_mass(edit_maps(pipeline, edits, **options)).drop_vars(["with", "without"])
    else:
        maps = [effect_map(pipeline, edits[word][0], words=[word], remove=remove, **options) for word, _ in asked]
        masses = [effect_mass(one).isel(prompt=0, drop=True) for one in maps]
        joined = xarray.concat(masses, "word", coords="minimal", compat="override").assign_attrs(masses[0].attrs)
    joined = joined.assign_attrs(remove=remove)
    prompts = [edits[word][0] for word, _ in asked]
    roles = np.asarray([role for _, role in asked])
    yes, no = (np.atleast_2d(joined.values)[:, roles == role] for role in ("present", "absent"))
    yes = yes[:, np.arange(no.shape[1]) % yes.shape[1]]
    wins = (yes > no) + 0.5 * (yes == no)
    shares = [float(of.mean()) if of.size else float("nan") for of in wins]
    joined = joined.assign_coords(role=("word", roles), prompt=("word", prompts))
    return joined.assign_attrs(auroc=shares if joined.ndim == 2 else shares[0])


# ---- does attention say what a word does?


def agreement(attention: DataArray, effect: DataArray) -> Dataset:
    """Spearman rank correlation of attention maps with effect maps over the grid's cells: a figure of faithfulness.

    ::

        spearman(w)   = ρ(attention of w, effect of w)
        null(w)       = mean over v ≠ w of ρ(attention of v, effect of w)
        difference(w) = spearman(w) − null(w)

    Two maps of one model on one piece agree because both follow the audio; the null is what is left when the word is
    another. A faithful map has a positive difference, not merely a positive correlation.

    Parameters
    ----------
    attention : DataArray, dims (prompt, word, time, mel)
        From :func:`aiba_eval.project`, on the same grid, with the same duration.
    effect : DataArray, dims (prompt, word, time, mel)
        From :func:`effect_map`.

    Returns
    -------
    Dataset, dims (prompt, word)
        Variables ``spearman``, ``null`` and ``difference`` for the words that both have; cells that either lacks are left
        out. NaN where a map is constant or a prompt lacks the word; ``null`` is NaN where there is no other word.

    Raises
    ------
    ValueError
        The maps are not on one grid, differ in prompts, or share no word.
    """
    import xarray

    expected = ("prompt", "word", "time", "mel")
    for name, maps in (("attention", attention), ("effect", effect)):
        if maps.dims != expected:
            raise ValueError(f"{name} must have dims {expected}, got {maps.dims} = {maps.shape}")
    same = attention.shape[2:] == effect.shape[2:] and attention.sizes["prompt"] == effect.sizes["prompt"]
    if same:
        half = 0.5 * float(effect.attrs.get("seconds_per_column", 0))
        times = np.abs(attention["time"].values - effect["time"].values).max() <= half
        same = bool(times) and np.allclose(attention["frequency"].values, effect["frequency"].values)
    if not same:
        raise ValueError(
            f"attention {attention.shape} and effect {effect.shape} are not on one grid: give `project` and `effect_map` the "
            "same MelGrid with a duration, and the same prompts"
        )
    listed, others = ([str(w) for w in maps["word"].values] for maps in (attention, effect))
    words = [word for word in others if word in listed]
    if not words:
        raise ValueError(f"no common word: attention has {listed}, effect has {others}")
    a = attention.values[:, [listed.index(w) for w in words]].astype(float)
    e = effect.values[:, [others.index(w) for w in words]].astype(float)
    rho = np.asarray([[[rank_correlation(x, y) for y in e[i]] for x in a[i]] for i in range(len(a))])
    own = np.einsum("pww->pw", rho).copy()
    elsewhere = np.where(np.eye(len(words), dtype=bool), np.nan, rho)
    count = np.isfinite(elsewhere).sum(axis=1)
    null = np.where(count > 0, np.nansum(elsewhere, axis=1) / np.maximum(count, 1), np.nan)
    dims = ("prompt", "word")
    return xarray.Dataset(
        {"spearman": (dims, own), "null": (dims, null), "difference": (dims, own - null)},
        coords={"prompt": effect["prompt"].values, "word": words},
        attrs={k: v for k, v in effect.attrs.items() if k in ("remove", "quantity", "timesteps", "draws", "seed")},
    )


def rank_correlation(one: ArrayLike, other: ArrayLike) -> float:
    """Spearman's ρ of two arrays of one shape, cell by cell (``scipy.stats.spearmanr``): ties share their rank.

    Cells that either lacks (NaN) are left out. NaN where fewer than three are left, or one of the arrays is constant there.
    """
    from scipy.stats import spearmanr

    x, y = np.asarray(one, float), np.asarray(other, float)
    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < 3 or np.ptp(x[both]) == 0 or np.ptp(y[both]) == 0:
        return float("nan")
    return float(spearmanr(x[both], y[both]).statistic)
