"""What an evaluation does: the protocol, what varies, and what is measured. A run is decided by this and by its seed.

Protocols
---------

``probe``
    A dataset's own mix, encoded and noised to given levels; each word's map against that piece's own stems.
``generate``
    The paper's: one prompt per instrument class (50 steps, guidance 2.5, 8.0 s, seed 0), each word's map against knowledge
    bands and data-driven profiles. A generated sample has no stems.

Variants are the ablations: each is one way to make a map of the same forwards. The first is called ``default`` and is what
contrasts, controls and intervals are of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from aiba_eval import metrics

Protocol = Literal["probe", "generate"]

#: pooling over tokens that needs no further input; see :func:`aiba_hooks.capture`
Pooling = Literal["sum", "mean", "max", "logmean"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
#: metrics of the controls and of every re-initialisation
PRIMARY = ("average_precision",)


class CannotEvaluate(ValueError):
    """An evaluation that cannot be made as asked. The message names what is wrong and what to do."""


@dataclass(frozen=True)
class Variant:
    """One way to make a map.

    Attributes
    ----------
    attention : ``"cross"``, or ``"all"``: self-attention sites too, as the attention that each query receives (with
        ``pooling="max"`` the paper's Eq. 5). These have no words, so that every word gets the same; both kinds are divided by
        their mean before they are averaged, each site counting once
    pooling : over the tokens of a word, as :func:`aiba_hooks.capture` does it
    layers : patterns of site names, as in :func:`aiba_eval.project`
    steps : ``"uniform"`` or ``"late"`` (σ⁻¹), where there is more than one step
    spatial, top_k : aggregation over layers and steps, as in :func:`aiba_eval.project`
    layer_weights : ``"equal"``, or ``"fitted"`` on the validation pieces (:func:`aiba_eval.evaluation.weights.fit`)
    """

    attention: Literal["cross", "all"] = "cross"
    pooling: Pooling = "sum"
    layers: tuple[str, ...] = ("*",)
    steps: Literal["uniform", "late"] = "uniform"
    spatial: Literal["mean", "max", "topk"] = "mean"
    top_k: int = 8
    layer_weights: Literal["equal", "fitted"] = "equal"

    def __post_init__(self) -> None:
        allowed: dict[str, Sequence[str]] = {
            "attention": ("cross", "all"),
            "pooling": POOLINGS,
            "steps": ("uniform", "late"),
            "spatial": ("mean", "max", "topk"),
            "layer_weights": ("equal", "fitted"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise CannotEvaluate(f"a variant's {name} is one of {', '.join(values)}, got {getattr(self, name)!r}")
        object.__setattr__(self, "layers", (self.layers,) if isinstance(self.layers, str) else tuple(self.layers))
        if not self.layers or self.top_k < 1:
            raise CannotEvaluate(f"a variant needs layers and top_k >= 1, got {self.layers} and {self.top_k}")

    @property
    def capture(self) -> tuple[str, Pooling]:
        """What has to be captured for it: variants that agree share their forwards."""
        return self.attention, self.pooling

    @classmethod
    def parse(cls, text: str) -> Variant:
        """``"pooling=max,spatial=topk,layers=up_*|mid_*"`` as a variant.

        Raises
        ------
        CannotEvaluate
            A part is no ``name=value`` of a variant.
        """
        names = {each.name: each for each in dataclasses.fields(cls)}
        given: dict[str, Any] = {}
        for part in filter(None, (one.strip() for one in text.split(","))):
            name, equals, value = part.partition("=")
            if not equals or name not in names:
                raise CannotEvaluate(f"{part!r} is no part of a variant: give name=value with {', '.join(names)}")
            given[name] = tuple(value.split("|")) if name == "layers" else int(value) if name == "top_k" else value
        return cls(**given)


#: the ablation grid: one change to the default each
ABLATIONS: Mapping[str, Variant] = {
    "all attention": Variant(attention="all"),
    "pooling mean": Variant(pooling="mean"),
    "pooling max": Variant(pooling="max"),
    "pooling logmean": Variant(pooling="logmean"),
    "spatial max": Variant(spatial="max"),
    "spatial topk": Variant(spatial="topk"),
    "steps late": Variant(steps="late"),
    "layers fitted": Variant(layer_weights="fitted"),
}


@dataclass(frozen=True)
class Configuration:
    """What decides the results of an evaluation, beside the model and the pieces.

    Attributes
    ----------
    protocol : ``"probe"`` or ``"generate"``
    words : instruments that prompts may name; None is all that the pieces have (``generate``: that have a measured band)
    seed : of windows, orders of words, partners, intervals and, in ``probe``, of noise
    seconds : length of a window or of generated audio
    timesteps, draws, windows : ``probe``: noise levels, draws of noise for each, windows of each piece
    seeds, steps, guidance : ``generate``: one sample of every class for each seed, denoiser steps, guidance scale
    variants : name to :class:`Variant`; ``default`` comes first
    metrics : of :data:`aiba_eval.metrics.METRICS`
    partners : other pieces' maps that a map's score is compared with, per word, in the column ``other_piece``
    reinitialisations : models with fresh weights to repeat it with (20 or more to conclude)
    prompt_swap, absent, neutral : further controls of ``probe``
    noise_seeds : further seeds of the noise to repeat it with
    keep_maps : keep every site's maps at every step, for the report's sliders
    time, mel : cells of the grid
    threads : of torch and numpy; the last bits of results depend on it
    resamples : of intervals and permutations
    """

    protocol: Protocol = "probe"
    words: tuple[str, ...] | None = None
    seed: int = 0
    seconds: float = 8.0
    timesteps: tuple[int, ...] = (300, 800)
    draws: int = 4
    windows: int = 1
    seeds: tuple[int, ...] = (0,)
    steps: int = 50
    guidance: float = 2.5
    variants: Mapping[str, Variant] = field(default_factory=lambda: {"default": Variant()})
    metrics: tuple[str, ...] = metrics.METRICS
    partners: int = 4
    reinitialisations: int = 0
    prompt_swap: bool = False
    absent: bool = False
    neutral: bool = False
    noise_seeds: int = 0
    keep_maps: bool = True
    time: int = 128
    mel: int = 64
    threads: int = 1
    resamples: int = 9_999

    def __post_init__(self) -> None:
        low = {
            name: getattr(self, name) for name in ("draws", "windows", "steps", "threads", "resamples", "time", "mel")
        }
        none = {
            name: getattr(self, name) for name in ("seed", "partners", "reinitialisations", "noise_seeds", "guidance")
        }
        if self.protocol not in ("probe", "generate"):
            raise CannotEvaluate(f"the protocol is 'probe' or 'generate', got {self.protocol!r}")
        if min(low.values()) < 1 or min(none.values()) < 0 or self.seconds <= 0:
            raise CannotEvaluate(
                f"need {', '.join(low)} >= 1, {', '.join(none)} >= 0 and seconds > 0, got {low | none} and {self.seconds} s"
            )
        if not self.timesteps or not self.seeds or len(set(self.timesteps)) < len(self.timesteps):
            raise CannotEvaluate(f"need timesteps and seeds, each once, got {self.timesteps} and {self.seeds}")
        unknown = [name for name in self.metrics if name not in metrics.METRICS]
        if unknown or "average_precision" not in self.metrics:
            raise CannotEvaluate(
                f"metrics are of {', '.join(metrics.METRICS)}, with average_precision among them, got {self.metrics}"
            )
        if self.generates and (self.prompt_swap or self.absent or self.neutral or self.noise_seeds):
            raise CannotEvaluate(
                "prompt swap, absent instruments, neutral edits and noise seeds are controls of real audio: use the protocol "
                "'probe' (in 'generate' give several seeds)"
            )
        if next(iter(self.variants), None) != "default":
            raise CannotEvaluate(f"the first variant is called 'default', got {list(self.variants)}")

    @property
    def generates(self) -> bool:
        """Whether the protocol is ``generate``."""
        return self.protocol == "generate"

    @property
    def levels(self) -> tuple[int, ...]:
        """The noise levels; 0 stands for a whole generation."""
        return (0,) if self.generates else self.timesteps

    @property
    def fits(self) -> bool:
        """Whether layer weights have to be fitted first."""
        return any(variant.layer_weights == "fitted" for variant in self.variants.values())

    @property
    def conditions(self) -> tuple[str, ...]:
        """``own`` and what is measured beside it, each with maps of every item."""
        return (
            "own",
            *(["prompt_swap"] if self.prompt_swap else []),
            *(["absent"] if self.absent else []),
            *(["neutral"] if self.neutral else []),
            *(f"seed-{self.seed + 1 + k}" for k in range(self.noise_seeds)),
            *(f"fresh-{k}" for k in range(self.reinitialisations)),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as the run's manifest holds it. What does not touch results already made is left out, so that a
        run may be asked for more controls later."""
        found = dataclasses.asdict(self)
        for name in ("reinitialisations", "prompt_swap", "absent", "neutral", "noise_seeds", "resamples"):
            del found[name]
        return found
