"""Tags: what an attention call attends to, always with the evidence.

Module names and flags lie (AudioLDM2's 16 ``attn2`` are self-attention; AudioLDM's ``is_cross_attention`` is true where
there is no text), so neither is read. In order: what the projections that feed the kernel were seen to read, the
backbone's word, and the lengths (Tq ≠ Tk: cross; equal: unknown)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

KINDS = ("cross", "self", "joint", "unknown")


class Tag(str):
    """``"cross"``, ``"self"``, ``"joint"`` or ``"unknown"``: a string, so ``site.tag == "cross"`` reads as it should.

    Attributes
    ----------
    stream : str or None
        Name of the token stream that the keys come from (AudioLDM2 has ``"t5"`` and ``"gpt2"``), if known.
    evidence : str
        What the kind was concluded from, in words.
    """

    stream: str | None
    evidence: str

    def __new__(cls, kind: str, stream: str | None = None, evidence: str = "") -> Tag:
        if kind not in KINDS:
            raise ValueError(f"a tag is one of {', '.join(KINDS)}; got {kind!r}")
        tag = super().__new__(cls, kind)
        tag.stream, tag.evidence = stream, evidence
        return tag

    @property
    def kind(self) -> str:
        """The plain string."""
        return str.__str__(self)

    def __repr__(self) -> str:
        return f"Tag({self.kind!r}, stream={self.stream!r}, evidence={self.evidence!r})"


@dataclass
class Source:
    """One tensor that a call site's projections read: which one, by storage, and as how many tokens it can count."""

    shape: tuple[int, ...]
    projection: str
    name: str | None = None  # the denoiser's own argument that it is, where it is one

    @property
    def lengths(self) -> set[int]:
        """Token counts under the layouts in use: [B, T, C], [T, B, C], [B, C, H, W]."""
        shape = self.shape
        counts = {shape[-2]} if len(shape) >= 2 else {1}
        if len(shape) >= 3:
            counts |= {shape[0], _product(shape[2:]), _product(shape[1:-1])}
        return counts

    def describe(self) -> str:
        name = f"{self.name} " if self.name else ""
        return f"{self.projection} read {name}[{', '.join(map(str, self.shape))}]"


def _product(values: Sequence[int]) -> int:
    result = 1
    for value in values:
        result *= int(value)
    return result


def from_sources(sources: Sequence[Source], queries: int, keys: int) -> Tag | None:
    """Tag a call by the distinct tensors that the site's projections read before it, or None if they do not settle it.

    Parameters
    ----------
    sources : distinct sources, in the order in which they were read
    queries, keys : Tq and Tk of the call
    """
    read = "; ".join(source.describe() for source in sources)
    as_query = [s for s in sources if queries in s.lengths]
    as_key = [s for s in sources if keys in s.lengths]
    if len(sources) == 1:
        if queries == keys and as_query:
            return Tag("self", evidence=f"one source for query and key: {read}")
        return None
    if not as_query and not as_key and not sources:
        return None
    counts = [max(s.lengths & {s.shape[-2]} or {0}) if len(s.shape) >= 3 else 0 for s in sources]
    joined = any(counts[i] + counts[j] == keys for i in range(len(counts)) for j in range(i) if counts[i] and counts[j])
    if queries != keys and as_query and as_key:
        key = next((s for s in as_key if s is not as_query[0]), as_key[0])
        return Tag("cross", stream=key.name, evidence=f"keys come from another tensor: {read}")
    if joined and (queries == keys or as_query):
        return Tag("joint", evidence=f"two streams concatenated to {keys} keys: {read}")
    if queries == keys and len(as_key) > 1:
        key = as_key[1]
        return Tag("cross", stream=key.name, evidence=f"keys come from another tensor of the same length: {read}")
    if queries == keys and len(as_key) == 1:
        return Tag("self", evidence=f"one source of {keys} tokens: {read}")
    return None


def from_lengths(queries: int, keys: int, cross_ratio: float | None = None) -> Tag:
    """Tag by length alone, the last resort.

    ``cross_ratio`` is the paper's rule as an option: cross only if Tk / Tq is at most this.
    """
    if cross_ratio is not None:
        kind = "cross" if keys <= cross_ratio * queries else "unknown"
        return Tag(kind, evidence=f"lengths only: {keys} keys for {queries} queries, cross_ratio {cross_ratio}")
    if queries != keys:
        return Tag("cross", evidence=f"lengths only: {queries} queries, {keys} keys")
    return Tag("unknown", evidence=f"lengths only: {queries} queries and as many keys")


def module_label(root: Any, module: Any) -> str:
    """Name of ``module`` below ``root`` for evidence texts."""
    for name, child in root.named_modules():
        if child is module:
            return name or type(module).__name__
    return type(module).__name__
