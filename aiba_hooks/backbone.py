"""Backbone: what a plugin says about one kind of pipeline. Subclass it; the defaults serve a diffusers-style pipeline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiba_hooks.tagging import Tag
from aiba_hooks.words import TokenStream

if TYPE_CHECKING:
    from torch import nn

    from aiba_hooks.lattice import Lattice


@dataclass(frozen=True)
class Conditioning:
    """What one pipeline call is conditioned on, read when the pipeline encodes its prompt.

    Attributes
    ----------
    prompts : one text per prompt of the call
    waveforms : waveforms generated per prompt, or None if the call does not tell: read off the denoiser's batch then. Rows are
        prompt-major (p0w0, p0w1, p1w0, ...)
    guided : whether classifier-free guidance runs, so that both branches exist
    streams : the token streams, each with one row per prompt
    window : start and end, in seconds of what the denoiser generates, of what the pipeline keeps; None: all of it
    """

    prompts: tuple[str, ...]
    waveforms: int | None = 1
    guided: bool = False
    streams: tuple[TokenStream, ...] = ()
    window: tuple[float, float] | None = None

    @property
    def rows(self) -> int:
        """Samples being denoised: prompts × waveforms."""
        return len(self.prompts) * (self.waveforms or 1)

    def spread(self, per_prompt: Sequence[Any]) -> list[Any]:
        """One entry per prompt, as one entry per sample."""
        return [entry for entry in per_prompt for _ in range(self.waveforms or 1)]


@dataclass(frozen=True)
class MethodCall:
    """One call of a pipeline's method: its name, its bound arguments and what it returned."""

    name: str
    arguments: Mapping[str, Any]
    result: Any


@dataclass(frozen=True)
class Segment:
    """A run of tokens in a sequence that text and audio share (joint attention).

    Attributes
    ----------
    length : tokens
    stream : name of the token stream that they are, or None for the latent's own tokens
    """

    length: int
    stream: str | None = None


@dataclass(frozen=True)
class Step:
    """Where the denoiser is in the schedule. Values may be tensors: they are read after the run, never during it."""

    timestep: Any = None
    sigma: Any = None


@dataclass(frozen=True)
class SiteCall:
    """What a backbone is told of one attention site when it is asked for its lattice, tag or stream.

    Attributes
    ----------
    name : dotted module name relative to the denoiser
    module : the calling module
    queries, keys : Tq and Tk
    tag : as concluded from what was seen
    arguments : the denoiser's bound forward arguments in this call
    target : the pipeline (or module) given to ``capture``
    conditioning : of the running pipeline call, if its prompt was seen
    """

    name: str
    module: Any
    queries: int
    keys: int
    tag: Tag
    arguments: Mapping[str, Any]
    target: Any
    conditioning: Conditioning | None = None


class Backbone:
    """One kind of pipeline. Override ``matches``, ``conditioning`` and ``lattice``; the rest has defaults.

    Attributes
    ----------
    name : what ``aiba plugins`` and the provenance of maps call it
    denoiser_names : attributes of the pipeline that hold its denoiser, first found wins
    prompt_method : the pipeline's method (or methods) that encode prompts; each call to one starts a new run. A dotted
        name is a method of a part of it (``"conditioner.forward"``)
    observed_methods : further methods whose calls ``conditioning_from`` needs (durations, number of waveforms)
    ranking_method : the method that re-sorts finished audio, if there is one (see ``order``)
    branches : guidance branches in the order in which the denoiser's batch (or its separate passes) holds them
    batched : True if one forward holds all branches along its batch axis, False if each branch is a forward of its own
    branches_inside : True if the denoiser is given one branch's rows and adds the others itself
    cross_ratio : the paper's length rule: where lengths alone decide, cross only if Tk / Tq is at most this
    """

    name: str = "backbone"
    denoiser_names: Sequence[str] = ("unet", "transformer")
    prompt_method: str | Sequence[str] | None = "encode_prompt"
    observed_methods: Sequence[str] = ()
    ranking_method: str | None = None
    branches: Sequence[str] = ("unconditional", "conditional")
    batched: bool = True
    branches_inside: bool = False
    cross_ratio: float | None = None

    @property
    def prompt_methods(self) -> tuple[str, ...]:
        """``prompt_method`` as a tuple."""
        method = self.prompt_method
        return () if method is None else (method,) if isinstance(method, str) else tuple(method)

    def matches(self, target: Any) -> bool:
        """Whether this backbone describes ``target``. Compare class names; do not import the library here."""
        return False

    def denoiser(self, target: Any) -> nn.Module:
        """The module that is run once (or once a branch) per step."""
        for name in self.denoiser_names:
            module = getattr(target, name, None)
            if module is not None:
                return module
        raise AttributeError(f"{type(target).__name__} has none of the attributes {', '.join(self.denoiser_names)}")

    def conditioning(self, target: Any, arguments: Mapping[str, Any], result: Any) -> Conditioning:
        """Prompts and token streams of a pipeline call.

        Parameters
        ----------
        arguments : bound arguments of ``prompt_method`` in this call
        result : what it returned
        """
        raise NotImplementedError(f"backbone {self.name!r} does not say how prompts are conditioned")

    def conditioning_from(self, target: Any, calls: Sequence[MethodCall]) -> Conditioning | None:
        """The same from the calls of several methods; override it together with ``observed_methods``.

        Parameters
        ----------
        calls : of ``observed_methods`` and ``prompt_methods`` since the last run began, in order; the last is one of the latter

        Returns
        -------
        Conditioning or None
            None where that call begins no run (a negative prompt, encoded after the prompt).
        """
        return self.conditioning(target, calls[-1].arguments, calls[-1].result)

    def guided(self, target: Any, arguments: Mapping[str, Any], conditioning: Conditioning) -> bool:
        """Whether this denoiser forward holds every branch, from its bound arguments. Default: what the run says."""
        return conditioning.guided

    def order(self, target: Any, arguments: Mapping[str, Any], result: Any) -> Sequence[int]:
        """Denoiser rows in the order of the returned audio, from a call of ``ranking_method``."""
        raise NotImplementedError(f"backbone {self.name!r} declares a ranking_method but not its order")

    def step(self, target: Any, arguments: Mapping[str, Any]) -> Step:
        """Timestep or sigma of a denoiser forward, from its bound arguments."""
        timestep = next((arguments[n] for n in ("timestep", "timesteps", "t") if arguments.get(n) is not None), None)
        sigma = next((arguments[n] for n in ("sigma", "sigmas") if arguments.get(n) is not None), None)
        return Step(timestep, sigma)

    def steps(self, target: Any) -> int | None:
        """How many denoiser steps the running call takes, if known (needed for negative indices in ``steps=``)."""
        timesteps = getattr(getattr(target, "scheduler", None), "timesteps", None)
        return None if timesteps is None else len(timesteps)

    def sigma(self, target: Any, timestep: float) -> float | None:
        """Noise level of a timestep: sqrt((1 − ᾱ) / ᾱ) where the scheduler has cumulative alphas, else None."""
        alphas = getattr(getattr(target, "scheduler", None), "alphas_cumprod", None)
        index = int(timestep)
        if alphas is None or not 0 <= index < len(alphas):
            return None
        alpha = float(alphas[index])
        return math.sqrt((1 - alpha) / alpha)

    def tag(self, site: SiteCall) -> Tag | None:
        """The backbone's word on a site whose key source was not seen; None leaves it to the lengths."""
        return None

    def stream(self, site: SiteCall) -> str | None:
        """Name of the token stream that a cross site reads, or None.

        Default: the stream whose ``argument`` the site's projections were seen to read, else the only one of that length.
        """
        if site.conditioning is None:
            return None
        streams = site.conditioning.streams
        for stream in streams:
            if stream.argument is not None and stream.argument == site.tag.stream:
                return stream.name
        fitting = [stream.name for stream in streams if stream.length == site.keys]
        return fitting[0] if len(fitting) == 1 else None

    def segments(self, site: SiteCall) -> Sequence[Segment] | None:
        """How a site's keys are made up where text and audio share one sequence, in order; None where they do not.

        A site with segments is tagged joint. Its word maps are the latent's queries on the text's keys; ``lattice`` is then
        asked with ``site.queries`` the number of latent tokens.
        """
        return None

    def signs(self, site: SiteCall) -> Sequence[float] | None:
        """Differential attention: the sign with which each of a site's calls enters the output, in order of the calls.

        A kernel cannot see it. The map of the site is then Σ sign·A, beside those of the single calls, and the input of the
        site's output projection is checked to be Σ sign·output. None where one call is one attention.
        """
        return None

    def lattice(self, site: SiteCall) -> Lattice:
        """Where the site's queries lie in time and frequency, read off the running call, never from a table."""
        raise NotImplementedError(f"backbone {self.name!r} declares no lattice")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"
