"""Subject: a denoiser with its inputs, in the shape of a pipeline, so that capture treats it like one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from aiba_eval.bench import models
from aiba_hooks import Backbone, Conditioning, Lattice, SiteCall, TokenStream, mel_edges

#: words of the default prompt, unless more are asked for; the first ones are asked for
PROMPT_WORDS = 12


class CannotBench(ValueError):
    """A setting that cannot be run. The message names it and says what to do."""


@dataclass(frozen=True)
class Setting:
    """What is raced.

    Attributes
    ----------
    model : a name in ``ARCHITECTURES``
    batch : rows of a forward; an even number is guided, half of its rows unconditional
    seconds : of audio, None for the model's usual length
    tokens : keys of the text stream, None for the model's usual number
    words : words of the prompt that are asked for
    device, dtype : of torch
    compiled : whether the denoiser is compiled with ``torch.compile``
    """

    model: str
    batch: int = 2
    seconds: float | None = None
    tokens: int | None = None
    words: int = 2
    device: str = "cpu"
    dtype: str = "float32"
    compiled: bool = False


class BenchBackbone(Backbone):
    """Says of a Subject what a plugin says of a pipeline."""

    name = "bench"
    denoiser_names = ("denoiser",)
    prompt_method = "encode"

    def matches(self, target: Any) -> bool:
        return isinstance(target, Subject)

    def conditioning(self, target: Any, arguments: Mapping[str, Any], result: Any) -> Conditioning:
        return result

    def steps(self, target: Any) -> int | None:
        return None

    def lattice(self, site: SiteCall) -> Lattice:
        return site.target.lattice(site.queries)


class Subject:
    """A denoiser of random weights, with inputs of the right shapes.

    Attributes
    ----------
    setting, architecture, shape : what it was made from
    denoiser : the module, compiled if the setting says so
    prompt, asked : the text and the words of it that are asked for

    Raises
    ------
    CannotBench
        No such model, or sizes that do not fit.
    """

    def __init__(self, setting: Setting) -> None:
        known = models.ARCHITECTURES
        if setting.model not in known:
            raise CannotBench(f"no model is named {setting.model!r} for a benchmark; there are {', '.join(known)}")
        self.setting = setting
        self.architecture = architecture = known[setting.model]
        tokens = architecture.tokens if setting.tokens is None else setting.tokens
        if setting.batch < 1 or setting.words < 1:
            raise CannotBench(f"batch and words must be at least 1, got {setting.batch} and {setting.words}")
        if setting.words > tokens - 1:
            raise CannotBench(
                f"{setting.words} words do not fit in {tokens} tokens, one of which ends the text: ask for fewer words or more tokens"
            )
        seconds = architecture.seconds if setting.seconds is None else setting.seconds
        if seconds < 0 or (seconds == 0 and architecture.kind != "stable-diffusion"):
            raise CannotBench(f"the length must be positive, got {seconds} s")
        self.shape = models.Shape(setting.batch, models.columns_of(architecture, seconds), tokens)
        self.guided = setting.batch % 2 == 0
        words = [f"word{i}" for i in range(min(max(PROMPT_WORDS, setting.words), tokens - 1))]
        self.prompt, self.asked = " ".join(words), words[: setting.words]
        dtype = getattr(torch, setting.dtype)
        self.denoiser: Any = models.build(architecture, device=setting.device, dtype=dtype)
        if setting.compiled:
            self.denoiser = torch.compile(self.denoiser)
        self._conditioning = self._condition(len(words))
        self._arguments: Any = None

    @property
    def seconds(self) -> float:
        """Length of the audio; 0 for an image model."""
        if self.architecture.kind == "audioldm2":
            return self.shape.columns / models.COLUMNS_PER_SECOND
        if self.architecture.kind == "stable-audio":
            return self.shape.columns * models.SAMPLES_PER_COLUMN / models.RATE
        return 0.0

    def encode(self) -> Conditioning:
        """What a pipeline's ``encode_prompt`` does for a capture: the run begins, and the prompt is known."""
        return self._conditioning

    def forward(self, step: int) -> Any:
        """One denoiser forward."""
        if self._arguments is None:
            dtype = getattr(torch, self.setting.dtype)
            self._arguments = models.inputs_of(
                self.architecture, self.shape, guided=self.guided, device=self.setting.device, dtype=dtype
            )
        with torch.inference_mode():
            return self.denoiser(**self._arguments(step))[0]

    def synchronise(self) -> None:
        """Wait until the device has done what it was given."""
        if self.setting.device.startswith("cuda"):
            torch.cuda.synchronize(self.setting.device)

    def lattice(self, queries: int) -> Lattice:
        """Where a site's queries lie."""
        kind, columns = self.architecture.kind, self.shape.columns
        if kind == "stable-audio":
            per_column = models.SAMPLES_PER_COLUMN / models.RATE
            return Lattice(shape=(columns,), axes=("time",), seconds_per_column=per_column, prefix=queries - columns)
        if kind == "audioldm2":
            edges = mel_edges(64, 0.0, models.TOP_HERTZ)[:: 64 // models.BANDS]
            return Lattice.of_level(
                queries,
                (columns, models.BANDS),
                seconds_per_column=1 / models.COLUMNS_PER_SECOND,
                frequency_edges=edges,
            )
        side = math.isqrt(queries)  # an image: its axes are called time and frequency all the same
        return Lattice(shape=(side, side), frequency_edges=tuple(float(edge) for edge in range(side + 1)))

    def _condition(self, words: int) -> Conditioning:
        kind, tokens = self.architecture.kind, self.shape.tokens
        padding = tokens - words - 1
        roles = ("word",) * words + ("special",) + ("padding",) * padding
        texts = (*self.prompt.split(), "</s>", *("<pad>",) * padding)
        text = TokenStream(
            "text",
            (self.prompt,),
            (texts,),
            (roles,),
            ((*range(words), *(None,) * (padding + 1)),),
            self._argument(kind),
        )
        streams: tuple[TokenStream, ...] = (text,)
        if kind == "stable-audio":
            timing = TokenStream.opaque("timing", (self.prompt,), models.TIMING_KEYS, role="duration")
            streams = (text.join(timing, argument="encoder_hidden_states"),)
        elif kind == "audioldm2":
            generated = TokenStream.opaque(
                "generated", (self.prompt,), models.GENERATED_KEYS, argument="encoder_hidden_states"
            )
            streams = (text, generated)
        branches = 2 if self.guided else 1
        return Conditioning((self.prompt,), self.setting.batch // branches, self.guided, streams)

    @staticmethod
    def _argument(kind: str) -> str:
        return "encoder_hidden_states_1" if kind == "audioldm2" else "encoder_hidden_states"
