"""Contestants: ways to see a denoiser's attention while it runs, each with a word on what it keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from aiba_eval.bench.subjects import BenchBackbone, Subject
from aiba_hooks import capture

Maps = Mapping[str, NDArray[Any]]


class Watch(Protocol):
    """What a contestant's ``with`` block gives."""

    def read(self) -> Maps:
        """After the block: the maps as arrays, by site."""
        ...


class Refused(Exception):
    """A contestant that cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Contestant:
    """One way of watching.

    Attributes
    ----------
    name : what ``aiba bench --contestant`` calls it
    keeps : what it has at the end, in words
    watch : enters it on a subject
    foreign : another library's: it may fail, and then its error is its result
    """

    name: str
    keeps: str
    watch: Callable[[Subject], AbstractContextManager[Watch]]
    foreign: bool = False


class _Nothing:
    def read(self) -> Maps:
        return {}


@contextmanager
def _bare(subject: Subject) -> Iterator[Watch]:
    yield _Nothing()


# ---- ours


@dataclass
class _Ours:
    capture: Any

    def read(self) -> Maps:
        return {site: array.values for site, array in self.capture.maps.items()}


def ours(**options: Any) -> Callable[[Subject], AbstractContextManager[Watch]]:
    """:func:`aiba_hooks.capture` with these options; ``words=True`` stands for the subject's."""

    @contextmanager
    def watch(subject: Subject) -> Iterator[Watch]:
        chosen = {**options, "words": subject.asked} if options.get("words") else options
        with capture(subject, backbone=BenchBackbone(), budget="64GiB", **chosen) as held:
            yield _Ours(held)

    return watch


def sites_of(subject: Subject) -> list[Any]:
    """Every attention site of a subject, as one forward under capture shows it."""
    with capture(subject, words=subject.asked, backbone=BenchBackbone(), budget="64GiB") as held:
        subject.encode()
        subject.forward(0)
    return held.sites


# ---- the paper's


@dataclass
class _PaperMaps:
    """Head means on the host, one for each call."""

    kept: dict[str, list[Tensor]] = field(default_factory=dict)

    def read(self) -> Maps:
        return {site: torch.stack(maps).float().numpy() for site, maps in self.kept.items()}


@dataclass
class PaperProcessor:
    """An attention processor that computes the softmax itself, and copies its head mean to the host at every call.

    It lets the model's own processor do everything else, so it serves every diffusers model; only the fused kernel is
    replaced, while the processor runs.
    """

    inner: Any
    kept: list[Tensor]
    cross_only: bool

    # diffusers passes on only what the signature names
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Any:
        options = {} if rotary_emb is None else {"rotary_emb": rotary_emb}
        given = (attn, hidden_states, encoder_hidden_states, attention_mask)
        if self.cross_only and encoder_hidden_states is None:
            return self.inner(*given, **options)
        functional = torch.nn.functional
        fused = functional.scaled_dot_product_attention
        functional.scaled_dot_product_attention = self._attention
        try:
            return self.inner(*given, **options)
        finally:
            functional.scaled_dot_product_attention = fused

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        scores = query @ key.transpose(-2, -1) * (options.get("scale") or 1 / math.sqrt(query.shape[-1]))
        if attn_mask is not None:
            scores = scores + attn_mask
        probabilities = scores.softmax(-1)
        self.kept.append(probabilities.mean(1).cpu())
        return probabilities @ value


def paper(*, cross_only: bool) -> Callable[[Subject], AbstractContextManager[Watch]]:
    """The processor of arXiv 2509.20891's method on every attention module, or on those that are given other keys."""

    @contextmanager
    def watch(subject: Subject) -> Iterator[Watch]:
        maps = _PaperMaps()
        replaced = []
        try:
            for name, module in subject.denoiser.named_modules():
                if hasattr(module, "set_processor") and hasattr(module, "processor"):
                    replaced.append((module, module.processor))
                    module.set_processor(PaperProcessor(module.processor, maps.kept.setdefault(name, []), cross_only))
            yield maps
        finally:
            for module, processor in replaced:
                module.set_processor(processor)
            maps.kept = {name: kept for name, kept in maps.kept.items() if kept}

    return watch


def contestants() -> dict[str, Contestant]:
    """Every contestant by name; the first is the bare model."""
    from aiba_eval.bench import peers

    found = (
        Contestant("bare", "nothing: the model alone", _bare),
        Contestant("words", "AIBA: of every text-aligned site, queries × asked words and groups", ours(words=True)),
        Contestant(
            "words-reduced",
            "AIBA: the same, averaged over steps as they come",
            ours(words=True, reduce_steps="uniform"),
        ),
        Contestant("tokens", "AIBA: of every cross-attention site, queries × keys", ours(keep="full")),
        Contestant(
            "all",
            "AIBA: words as above, and the attention that each key of every self-attention site receives",
            ours(words=True, kinds=("cross", "self")),
        ),
        Contestant(
            "paper",
            "softmax in full, head mean copied to the host at each cross-attention call, queries × keys, both branches",
            paper(cross_only=True),
        ),
        Contestant("paper-all", "the same at every attention call", paper(cross_only=False)),
        Contestant("amd-fast", "attention-map-diffusers: queries and keys; maps afterwards", peers.amd("fast"), True),
        Contestant("amd-exact", "attention-map-diffusers: head means of the softmax", peers.amd("exact"), True),
        Contestant("daam", "DAAM: heat maps of every token, summed over steps", peers.daam, True),
    )
    return {contestant.name: contestant for contestant in found}
