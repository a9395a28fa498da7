"""Reweight: scale how much of a word reaches the output (Auffusion, after prompt-to-prompt).

Prompt-to-prompt multiplies the probabilities of a word's tokens by a factor c after the softmax. Attention is linear in the
values, so this is the kernel asked with that word's value rows scaled: (A·diag(c))·V = A·(diag(c)·V), for whatever kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from aiba_hooks.backbone import Backbone
from aiba_hooks.calls import AttentionCall
from aiba_hooks.capturing import Branch, Capture
from aiba_hooks.errors import NothingCaptured
from aiba_hooks.interception import Edited
from aiba_hooks.options import Options
from aiba_hooks.runs import Run
from aiba_hooks.sites import Site
from aiba_hooks.stores import Spans, Store


def intervene(
    target: Any,
    *,
    reweight: Mapping[str, float],
    layers: str | Sequence[str] = "*",
    steps: Sequence[int] | slice | None = None,
    branch: Branch = "conditional",
    backbone: Backbone | str | None = None,
) -> Intervention:
    """Scale words of the prompt in the cross-attention of every denoiser forward inside a ``with`` block.

    Parameters
    ----------
    target
        A pipeline that a backbone plugin recognises.
    reweight
        Word (or phrase, or ``"bass#1"``) to factor: 0 removes what the word contributes, 1 changes nothing, 2 doubles it.
        The row sums of the edited attention are no longer 1, as in prompt-to-prompt. The groups of other keys can be named
        too: ``"(special)"``, ``"(padding)"``.
    layers, steps, branch, backbone
        As for :func:`aiba_hooks.capture`; only the conditional rows unless asked.

    Returns
    -------
    Intervention
        ``edit.sites`` says what was edited (``captured`` is True there) and what was not, and why.

    Raises
    ------
    NothingCaptured
        At exit, if no attention call was edited.
    UnknownWord
        A word is not in the prompt.
    TypeError
        A kernel at a chosen site shows its probabilities or its module's output only, so that it cannot be edited.
    RuntimeError
        The model runs with attention dropout, which an edited call cannot repeat.

    Examples
    --------
    >>> with intervene(pipe, reweight={"drums": 0.0}):                  # doctest: +SKIP
    ...     audio = pipe("a bass and drums").audios
    """
    return Intervention(target, reweight, layers, steps, branch, backbone)


class Intervention(Capture):
    """An edit in progress. Made by :func:`intervene`; enter it once. Captures inside or around it see the edited model."""

    _uncompiled = "an edit changes outputs, which compiled code has no place for"

    def __init__(
        self,
        target: Any,
        reweight: Mapping[str, float],
        layers: str | Sequence[str],
        steps: Sequence[int] | slice | None,
        branch: str,
        backbone: Backbone | str | None,
    ) -> None:
        if not reweight:
            raise ValueError("reweight is empty: name a word and its factor, as in {'drums': 0.0}")
        self._factors = {str(word): float(factor) for word, factor in reweight.items()}
        bad = [word for word, factor in self._factors.items() if factor != factor or abs(factor) == float("inf")]
        if bad:
            raise ValueError(f"the factor of {bad[0]!r} must be a finite number, got {self._factors[bad[0]]}")
        words = [word for word in self._factors if not word.startswith("(")]
        options = Options.read(words=words or None, layers=layers, steps=steps, branch=branch, budget="1B")
        super().__init__(target, options, backbone)

    def _act(self, site: Site, key: tuple[str, int], call: AttentionCall, run: Run) -> Edited | None:
        wanted = {b: span for b, span in self._branch_rows.items() if b in self.options.branches}
        if not wanted:
            site.reason = f"branch={self.options.branches[0]!r} is not in this forward"
            return None
        restore = call.restore
        if restore is None:
            raise TypeError(
                f"{site.name}: the kernel {call.kernel!r} cannot be edited, because it does not return what its values "
                "make. Use an implementation with a fused kernel (torch's SDPA), or leave the site out with layers="
            )
        if call.dropout > 0:
            raise RuntimeError(
                f"{site.name} runs with dropout {call.dropout}, which an edited call cannot repeat; use .eval()"
            )
        call = call.prepared()
        rows = self._rows(site, call, run)
        store = self._stores.setdefault((len(self._runs) - 1, *key), self._open_store(site, key, call, run))
        site.captured, site.reason = True, "edited"
        factor = self._factor(store, call, rows, run, wanted)
        # linear in the values: the change is the kernel's answer to (factor − 1)·V
        change = call.again((call.value * (factor - 1)).to(call.value.dtype))
        return Edited(change, restore, call.output)

    def _factor(self, store: Store, call: AttentionCall, rows: int, run: Run, wanted: Spans) -> torch.Tensor:
        """[batch, 1, Tk, 1]: 1, and a word's factor on its keys in the rows of the chosen branches."""
        if store.selector is not None and store.selector.shape[0] == call.value.shape[0]:
            return store.selector
        repeat = call.value.shape[0] // rows
        factor = torch.ones(call.value.shape[0], 1, call.keys, 1)
        assert run.conditioning is not None
        groups = store.row_groups(run.conditioning, rows, repeat)
        for span in wanted.values():
            first, last = (0, rows) if span is None else span
            for row in range(first * repeat, last * repeat):
                for word, value in self._factors.items():
                    factor[row, 0, groups[row].get(word, []), 0] *= value
        store.selector = factor.to(call.value.device)
        return store.selector

    def _finish(self) -> None:
        self._read_back()
        if not any(site.captured for site in self._sites.values()):
            raise NothingCaptured("nothing was edited: " + self._explain_nothing())

    @property
    def maps(self) -> Any:
        """An intervention keeps no maps: capture inside it."""
        raise AttributeError("an intervention keeps no maps; nest a capture inside it")
