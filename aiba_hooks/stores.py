"""Store: what is kept of one site in one run. It puts the question to the kernel and adds up the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from aiba_hooks import dense, fused, selectors
from aiba_hooks.backbone import Conditioning, Segment
from aiba_hooks.calls import AttentionCall
from aiba_hooks.checks import Check, CheckLog
from aiba_hooks.errors import BackboneMismatch
from aiba_hooks.options import Options
from aiba_hooks.sites import Site

#: branch → its rows of the denoiser's batch, None for all of them
Spans = Mapping[str, tuple[int, int] | None]


class Columns:
    """Selector columns, and within a forward the values that were made of them for the kernel; shared by all sites that pool alike.

    Attributes
    ----------
    selector : [rows, Tk, groups + 1] float32, the last column a sum over every key
    """

    def __init__(self, selector: Tensor) -> None:
        self.selector = selector
        self._templates: dict[tuple[Any, ...], list[Tensor]] = {}

    def templates(self, call: AttentionCall) -> list[Tensor]:
        """Those laid out as the call's values; empty the first time, and on a CPU always: made anew they are gone when the model's
        feed-forward layers need their most memory, and take less than 0.1 ms, where a GPU would wait for two more launches."""
        value = call.value
        if value.device.type == "cpu":
            return []
        return self._templates.setdefault((value.shape, value.stride(), value.dtype, value.device), [])

    def forget_templates(self) -> None:
        """They are as wide as the values and as long as the keys: not to be kept between forwards."""
        self._templates.clear()


@dataclass
class Store:
    """What is kept of one site.

    Attributes
    ----------
    mode : "pooled", "received" or "max" (Eq. 5 of a self site), "full", or "from_text" (of a joint site)
    lattice : of the queries
    queries : the latent's own tokens among the queries
    segments : how the keys are made up where text and audio share them
    keys : Tk
    names, groups : columns, and per prompt the key positions of each
    selector, words : of a "from_text" store: weights of the queries [rows, Tq, groups], and from where to where they are
    columns : what is asked of a "pooled" one
    values : (step, branch) → [rows, (heads), ...]
    sums, weight : branch → running weighted sum over steps, and the sum of its weights
    seen : steps that are kept
    fused : when the fused kernel pools, see ``fused.py``
    shared : columns of the capture's sites, by what they select
    """

    site: Site
    options: Options
    mode: str = "pooled"
    lattice: Any = None
    queries: slice = field(default_factory=lambda: slice(None))
    segments: Sequence[Segment] | None = None
    keys: int = 0
    names: list[str] = field(default_factory=list)
    groups: list[dict[str, list[int]]] = field(default_factory=list)
    selector: Tensor | None = None
    words: slice = field(default_factory=lambda: slice(0, 0))
    columns: Columns | None = None
    branches: list[str] = field(default_factory=list)
    values: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    weight: dict[str, float] = field(default_factory=dict)
    seen: list[int] = field(default_factory=list)
    fused: str = field(default_factory=fused.choice)
    shared: dict[tuple[Any, ...], Columns] = field(default_factory=dict)

    def from_text(self) -> Store:
        """A store beside a joint site's word maps: what the words' own queries attend to in the audio."""
        names = [name for name in self.names if name != "(audio)"]
        return replace(
            self,
            mode="from_text",
            names=names,
            selector=None,
            columns=None,
            branches=[],
            values={},
            sums={},
            weight={},
            seen=[],
        )

    def bytes_for(self, call: AttentionCall, wanted: Spans, rows: int) -> int:
        """What a call will add."""
        if self.options.reduced and self.seen:
            return 0  # added in place
        queries, columns, heads, kept = self._extent(call, wanted, rows)
        return 4 * kept * heads * (call.keys if self.mode == "received" else queries * columns)

    def described(self, call: AttentionCall, wanted: Spans, rows: int) -> str:
        """The same in words, for a message."""
        nouns = (("query", "queries"), ("column", "columns"), ("head", "heads"), ("row", "rows"))
        extent = zip(self._extent(call, wanted, rows), nouns, strict=True)
        return " × ".join(f"{count} {one if count == 1 else many}" for count, (one, many) in extent)

    def _extent(self, call: AttentionCall, wanted: Spans, rows: int) -> tuple[int, int, int, int]:
        """Queries, columns, heads and rows of what a call will add."""
        queries = len(range(*self.queries.indices(call.queries)))
        columns = {"full": call.keys, "max": 1}.get(self.mode, len(self.names))
        heads = call.query.shape[1] * call.query.shape[0] // rows if self.options.heads == "all" else 1
        return queries, columns, heads, sum(rows if span is None else span[1] - span[0] for span in wanted.values())

    def add(self, values: Tensor, wanted: Spans, step: int) -> None:
        """Add one call's values [rows, ...] to what is kept."""
        for branch, span in wanted.items():
            part = values if span is None else values[span[0] : span[1]]
            if branch not in self.branches:
                self.branches.append(branch)
            if not self.options.reduced:
                # a slice would keep the whole batch alive
                self.values[step, branch] = part.clone() if part.shape != values.shape or part._is_view() else part
            else:
                weight = self._step_weight(step)
                held = self.sums.get(branch)
                self.sums[branch] = part * weight if held is None else held.add_(part, alpha=weight)
                self.weight[branch] = self.weight.get(branch, 0.0) + weight
        if step not in self.seen:
            self.seen.append(step)

    def _step_weight(self, step: int) -> float:
        weights = self.options.step_weights
        if weights is None:
            return 1.0
        if step >= len(weights):
            raise ValueError(f"reduce_steps gives {len(weights)} weights, but the run reached step {step}")
        return weights[step]

    # ---- asking

    def ask(
        self, call: AttentionCall, rows: int, conditioning: Conditioning | None, log: CheckLog
    ) -> tuple[Tensor, Check, Tensor | None]:
        """``(values, check, row sums)``; values [rows, (heads), Tq, columns], or [rows, (heads), Tk] received."""
        if fused.serves(call, self.fused) and call.query.shape[0] == rows:
            try:
                made = self._ask_fused(call, rows, conditioning, log)
            except Exception as error:
                fused.gave_up(error, self.fused)
            else:
                if made is not None:
                    return made

        def heads(answer: Tensor) -> Tensor:
            return self._heads(answer, rows)

        mean = self.options.heads == "mean"
        # one pass over all keys instead of many asks; a kernel called with heads in the batch does not say which are one row's
        known = call.known and call.query.shape[0] == rows and call.asks > 1
        if self.mode == "received":
            return *(dense.received(call, mean) if known else selectors.received(call, heads)), None
        if self.mode == "max":
            return *(dense.largest(call, mean) if known else selectors.largest(call, heads)), None
        if self.mode == "full":
            full, check = dense.every_key(call, mean) if known else selectors.every_key(call, heads)
            return full, check, full.sum(-1)
        assert conditioning is not None
        pooling = self.options.pooling
        if pooling in selectors.LINEAR:
            columns = self._columns(call, rows, conditioning)
            if known and columns.selector.shape[-1] >= call.value.shape[-1]:  # more than one ask
                pooled, check = dense.pool(call, columns.selector, mean)
            else:
                pooled, check = call.pool(columns.selector, heads, columns.templates(call))
            return pooled[..., :-1], check, pooled[..., -1]
        per_row = self.row_groups(conditioning, rows, 1)
        pooled, check = selectors.pool_nonlinear(call, per_row, self.names, pooling, heads)
        return pooled, check, None

    def _ask_fused(
        self, call: AttentionCall, rows: int, conditioning: Conditioning | None, log: CheckLog
    ) -> tuple[Tensor, Check, Tensor | None] | None:
        """The same by the fused kernel; None for what it does not do."""
        mean, device = self.options.heads == "mean", call.query.device
        if self.mode == "received":
            return *fused.received(call, mean, log.slot(device)), None
        if self.mode != "pooled" or self.options.pooling not in selectors.LINEAR:
            return None
        assert conditioning is not None
        columns = self._columns(call, rows, conditioning)
        pooled, check = fused.pool(call, columns.selector, mean, log.slot(device))
        return pooled[..., :-1], check, pooled[..., -1]

    def _columns(self, call: AttentionCall, rows: int, conditioning: Conditioning) -> Columns:
        batch = call.value.shape[0]
        if self.columns is None or self.columns.selector.shape[0] != batch:
            device = call.value.device
            key = (repr(self.groups), tuple(self.names), call.keys, rows, batch, conditioning.waveforms, device)
            if key not in self.shared:
                per_row = self.row_groups(conditioning, rows, batch // rows)
                relevance = self.options.relevance
                selector = selectors.columns(per_row, self.names, call.keys, self.options.pooling, relevance)
                # one more column sums every key
                selector = torch.cat([selector, torch.ones_like(selector[..., :1])], -1)
                self.shared[key] = Columns(selector.to(device))
            self.columns = self.shared[key]
        return self.columns

    def ask_from_text(self, call: AttentionCall, rows: int, conditioning: Conditioning) -> Tensor:
        """[rows, (heads), audio keys, groups]: the mean over a word's queries of their probabilities of each audio key."""
        if self.selector is None or self.selector.shape[0] != rows:
            per_row = self.row_groups(conditioning, rows, 1)
            weights = selectors.means(per_row, self.names, call.keys)
            used = [position for groups in per_row for name in self.names for position in groups.get(name, ())]
            self.words = slice(min(used, default=0), max(used, default=-1) + 1)
            self.selector = weights.to(call.value.device)
        weights = self.selector
        if call.known and call.query.shape[0] == rows:
            return dense.from_queries(call, weights, self.words, self.options.heads == "mean")[..., self.queries, :]
        audio = torch.arange(call.keys, device=call.value.device)[self.queries]
        parts = [
            torch.einsum("r...qk,rqg->r...kg", self._heads(answer, rows), weights)
            for _, answer, _ in call.ask_keys(audio)
        ]
        return torch.cat(parts, -2)

    def _heads(self, answer: Tensor, rows: int) -> Tensor:
        """An answer as [rows, (heads), Tq, columns] float32."""
        if answer.shape[0] != rows:  # heads folded into the batch
            answer = answer.reshape(rows, -1, *answer.shape[-2:])
        if self.options.heads != "mean":
            return answer.float()
        return answer.mean(1, dtype=torch.float64 if answer.dtype == torch.float64 else torch.float32).float()

    def row_groups(self, conditioning: Conditioning, rows: int, repeat: int) -> list[dict[str, list[int]]]:
        """Groups of every kernel row: prompts by waveforms, the same positions in every branch, heads in the batch last."""
        one_branch = conditioning.spread(self.groups)
        batch = one_branch * (rows // len(one_branch))
        return [groups for groups in batch for _ in range(repeat)]


def key_groups(
    site: Site,
    layout: Sequence[Segment],
    row: int,
    requests: Sequence[str],
    conditioning: Conditioning,
    backbone_name: str,
) -> dict[str, list[int]]:
    """Key positions by group for one prompt, over every segment of the keys.

    Raises
    ------
    BackboneMismatch
        A stream is not as long as its segment.
    """
    streams = {stream.name: stream for stream in conditioning.streams}
    merged: dict[str, list[int]] = {}
    start = 0
    for segment in layout:
        if segment.stream is None:
            found: Mapping[str, Sequence[int]] = {"(audio)": range(segment.length)}
        elif segment.stream not in streams or streams[segment.stream].length != segment.length:
            length = streams[segment.stream].length if segment.stream in streams else 0
            raise BackboneMismatch(
                f"{site.label}: stream {segment.stream!r} has {length} tokens, but the kernel saw {segment.length} keys; "
                f"the backbone {backbone_name!r} tokenises differently from the pipeline, "
                "or the keys are those of a negative prompt of another length (then capture branch='conditional')"
            )
        else:
            stream = streams[segment.stream]
            found = stream.groups(row, requests if stream.has_words else ())
        for name, positions in found.items():
            merged.setdefault(name, []).extend(start + position for position in positions)
        start += segment.length
    return merged


def size_text(count: int) -> str:
    """Bytes as a person reads them."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
