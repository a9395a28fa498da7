"""capture(): the context manager. Runs nothing of its own until an attention kernel is called inside the ``with`` block."""

from __future__ import annotations

import fnmatch
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from aiba_hooks import compilation, compiled, fastpaths, interception, selectors
from aiba_hooks.backbone import Backbone, Conditioning, MethodCall, Segment, SiteCall, Step
from aiba_hooks.calls import AttentionCall
from aiba_hooks.checks import CheckLog
from aiba_hooks.coverage import Audit, CoverageWarning, Uncovered, uncovered
from aiba_hooks.differential import DifferentialCheck
from aiba_hooks.errors import (
    BackboneMismatch,
    CaptureBudgetExceeded,
    CheckColumnError,
    LatticeMismatch,
    NothingCaptured,
    UnknownBackbone,
)
from aiba_hooks.kernel import Kernel
from aiba_hooks.maps import AttentionMaps
from aiba_hooks.options import Options
from aiba_hooks.plugins import manager
from aiba_hooks.runs import Run, batch_of, observe_method, owner_of, seeds_of
from aiba_hooks.serving import Serving
from aiba_hooks.sites import Site, SourceWatch, calling_module, site_names
from aiba_hooks.stores import Columns, Spans, Store, key_groups, size_text
from aiba_hooks.tagging import Tag, from_lengths, from_sources
from aiba_hooks.words import check_words, distinct_words, merge_groups

Branch = Literal["conditional", "unconditional", "both"]


def capture(
    target: Any,
    *,
    words: Sequence[str] | Mapping[str, float] | None = None,
    kinds: Sequence[str] = ("cross",),
    layers: str | Sequence[str] = "*",
    steps: Sequence[int] | slice | None = None,
    branch: Branch = "conditional",
    heads: Literal["mean", "all"] = "mean",
    keep: Literal["pooled", "full"] = "pooled",
    pooling: Literal["sum", "mean", "weighted", "max", "logmean"] = "sum",
    reduce_steps: bool | Literal["uniform"] | Sequence[float] = False,
    budget: str | int = "2GiB",
    backbone: Backbone | str | None = None,
) -> Capture:
    """Capture attention maps of every denoiser forward inside a ``with`` block. The model's outputs do not change.

    Parameters
    ----------
    target
        A pipeline that a backbone plugin recognises, or any ``torch.nn.Module`` (then with ``keep="full"``: without a
        backbone there are no words).
    words
        Words or phrases of the prompt to keep a map of; None for every word. ``"bass#1"`` is the second occurrence only.
        With ``pooling="weighted"`` a mapping word → β·relevance.
    kinds
        Which tags to keep: any of ``"cross"``, ``"self"``, ``"joint"``, ``"unknown"``.
    layers
        One fnmatch pattern on site names, or a list (``*`` crosses dots).
    steps
        Denoiser steps to keep: indices (negative from the end), a slice, or None for all.
    branch
        Guidance branch: ``"conditional"``, ``"unconditional"`` (at the prompt's token positions) or ``"both"``, which adds a
        dimension ``branch``.
    heads
        ``"mean"`` over heads, or ``"all"``, which adds a dimension ``head``.
    keep
        ``"pooled"`` per word (memory queries × words), or ``"full"``: every key.
    pooling
        How the tokens of a word become its map: ``"sum"`` of their probabilities; ``"mean"`` (the paper's Eqs. 4 and 7);
        ``"weighted"`` (Eq. 6: each word's mean times softmax(words' values), so that the sum over words is Eq. 6); ``"max"``
        (Eq. 5); ``"logmean"`` (mean of log probability). Pooling follows the head mean where ``heads="mean"``. Self-attention
        has no words: ``"max"`` gives its Eq. 5, any other pooling the attention each position receives.
    reduce_steps
        False keeps each step; ``"uniform"`` (or True) averages them as they come, and a sequence of weights, one per
        denoiser step, averages by those: memory then does not grow with steps.
    budget
        Largest size of what is kept, as bytes or ``"500MB"``, ``"2GiB"``.
    backbone
        A :class:`Backbone` or the name of a registered one, instead of the first that recognises ``target``.

    Returns
    -------
    Capture
        ``cap.maps`` (an :class:`AttentionMaps`) after the block, ``cap.sites`` at any time.

    Raises
    ------
    NothingCaptured, CaptureBudgetExceeded, DegeneratePooling, CheckColumnError, UnknownWord, UnknownBackbone, ValueError

    Examples
    --------
    >>> with capture(pipe, words=["bass", "drums"]) as cap:             # doctest: +SKIP
    ...     audio = pipe("a bass and drums", num_inference_steps=50).audios
    >>> cap.maps["up_blocks.0.attentions.2.transformer_blocks.0.attn2"]  # doctest: +SKIP
    """
    options = Options.read(
        words=words,
        kinds=kinds,
        layers=layers,
        steps=steps,
        branch=branch,
        heads=heads,
        keep=keep,
        pooling=pooling,
        reduce_steps=reduce_steps,
        budget=budget,
    )
    return Capture(target, options, backbone)


class Capture:
    """A capture in progress. Made by :func:`capture`; enter it once."""

    #: why this runs a compiled model eagerly, whatever the model; None if it need not
    _uncompiled: str | None = None

    def __init__(self, target: Any, options: Options, backbone: Backbone | str | None) -> None:
        self.target = target
        self.options = options
        self._backbone_request = backbone
        self.backbone: Backbone | None = None

        self.listening = False
        self.serving: Serving | None = None
        self._entered = self._closed = False
        self._runs: list[Run] = []
        self._sites: dict[tuple[str, int], Site] = {}
        self._stores: dict[tuple[int, str, int], Store] = {}
        self._from_text: dict[tuple[int, str, int], Store] = {}
        self._segments: dict[tuple[str, int], Sequence[Segment]] = {}
        self._differential = DifferentialCheck()
        self._checks = CheckLog()
        self._columns: dict[tuple[Any, ...], Columns] = {}
        # (pipeline calls so far, site) → whether its calls are kept
        self._chosen: dict[tuple[int, tuple[str, int]], bool] = {}
        self._wanted: Spans = {}
        self._held = 0
        self._calls: list[MethodCall] = []
        self._forward_calls: dict[str, int] = {}
        self._arguments: Mapping[str, Any] = {}
        self._batch: int | None = None
        self._adapters: dict[Any, Kernel] = {}
        self._maps: AttentionMaps | None = None
        #: attention that ran in the first forward without an intercepted kernel
        self.uncovered: list[Uncovered] = []
        self._failed: BaseException | None = None

    # ---- entering and leaving

    def __enter__(self) -> Capture:
        if self._entered:
            raise RuntimeError("a capture is entered once; call capture(...) again for another")
        self._entered = True
        self.backbone = self._find_backbone()
        denoiser = self.target if self.backbone is None else self.backbone.denoiser(self.target)
        if not isinstance(denoiser, nn.Module):
            raise TypeError(
                f"the denoiser of {type(self.target).__name__} is no torch.nn.Module: {type(denoiser).__name__}"
            )
        given, denoiser = denoiser, compilation.unwrap(denoiser)
        modules = fastpaths.modules_of(denoiser)
        parts = compilation.compiled_parts(self.target, given, modules)
        kernels: list[Kernel] = manager().collect("aiba_kernels")
        with ExitStack() as stack:
            self._denoiser = denoiser
            self._names = site_names(denoiser)
            self._forward_signature = inspect.signature(type(denoiser).forward)
            stack.callback(self._restore_late_imports, set(sys.modules))
            for key in interception.intercept(kernels, modules, self._adapters):
                stack.callback(interception.PATCHES.release, key)
            parts += compilation.compiled_functions(modules)
            if parts or (files := compilation.compiled_files(modules)):
                refusal = self._uncompiled or compilation.refusal(self.target, given, denoiser, parts)
                compilation.warn(parts or files, refusal, stacklevel=3)
                if refusal is not None:
                    stack.enter_context(compilation.force_eager())
                else:
                    self.serving = Serving(self, self._names)
                    stack.callback(self.serving.close)
            self._watch = SourceWatch(modules)
            self._watch.on_read = self._differential.projection_read
            stack.callback(self._watch.close)
            self._audit = Audit(self._names)
            stack.callback(self._audit.stop)
            watching = (
                fastpaths.watch_forward(denoiser, modules, self._before_forward, self._after_forward)
                if self.serving is None
                else self.serving.watch(given, denoiser)
            )
            for undo in watching:
                stack.callback(undo)
            if self.backbone is None:
                self._runs.append(Run())
            else:
                watched = (*self.backbone.prompt_methods, *self.backbone.observed_methods)
                if watched and not any(owner_of(self.target, name) is not None for name in watched):
                    raise BackboneMismatch(
                        f"{type(self.target).__name__} has no method {' or '.join(map(repr, watched))}, where the backbone "
                        f"{self.backbone.name!r} expects prompts to be encoded"
                    )
                for name in dict.fromkeys((*watched, self.backbone.ranking_method, "prepare_latents")):
                    if name is not None and owner_of(self.target, name) is not None:
                        stack.callback(interception.PATCHES.release, observe_method(self.target, name))
            before = () if self.serving is None else (self.serving,)
            interception.ACTIVE.set((*interception.ACTIVE.get(), *before, self))
            stack.callback(self._deactivate)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listen(False)
        self._stack.close()
        self._closed = True
        self._arguments = {}
        self._calls = []
        self._failed = error
        if error is None:
            self._finish()

    def _deactivate(self) -> None:
        interception.ACTIVE.set(tuple(c for c in interception.ACTIVE.get() if c not in (self, self.serving)))

    def _listen(self, listening: bool) -> None:
        if listening is not self.listening:
            self.listening = listening
            compiled.listen(listening)

    def _restore_late_imports(self, known: set[str]) -> None:
        """Modules imported inside the block may have taken our interceptor by value: give them the original."""
        late = [module for name, module in list(sys.modules.items()) if name not in known and module is not None]
        wrappers = {id(w): original for original, w in interception.all_wrappers()}
        held = [wrapper for _, wrapper in interception.all_wrappers()]
        for module, name, value in interception.importers(held, late):
            if not interception.PATCHES.replaced(module, name):
                setattr(module, name, wrappers[id(value)])

    def _find_backbone(self) -> Backbone | None:
        request = self._backbone_request
        if isinstance(request, Backbone):
            return request
        known: list[Backbone] = manager().collect("aiba_backbones")
        if isinstance(request, str):
            for candidate in known:
                if candidate.name == request:
                    return candidate
            names = ", ".join(sorted(candidate.name for candidate in known)) or "none"
            raise UnknownBackbone(f"no backbone is named {request!r}; registered: {names}")
        if request is not None:
            raise TypeError(f"backbone must be a Backbone, a name or None, got {type(request).__name__}")
        for candidate in known:
            if candidate.matches(self.target):
                return candidate
        if not isinstance(self.target, nn.Module):
            names = ", ".join(sorted(candidate.name for candidate in known)) or "none"
            raise UnknownBackbone(
                f"no backbone recognises {type(self.target).__name__} (registered: {names}). Install a plugin for it, pass "
                "backbone=..., or capture its denoiser module with keep='full'"
            )
        if self.options.keep == "pooled":
            raise ValueError(
                f"keep='pooled' pools over the words of a prompt, and no backbone says which keys of "
                f"{type(self.target).__name__} are words. Pass keep='full', or the pipeline instead of its module"
            )
        return None

    # ---- what the hooks call

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self not in interception.ACTIVE.get():
            return
        try:
            bound = self._forward_signature.bind(module, *args, **kwargs)
        except TypeError:
            return  # the forward will say so itself
        bound.apply_defaults()
        self._arguments = bound.arguments
        if not self._runs:
            methods = " or ".join(self.backbone.prompt_methods) if self.backbone is not None else ""
            raise BackboneMismatch(
                f"the denoiser ran before {type(self.target).__name__}.{methods} was called inside the capture, so the "
                "prompt is unknown. Encode the prompt inside the with block"
            )
        run = self._runs[-1]
        self._batch = batch_of(bound.arguments)
        if self.backbone is not None:
            run.settle_waveforms(self.backbone, self._batch)
        self._step, self._branch_rows = run.place(self.backbone, self.target, self._arguments)
        if self._step == len(run.steps):
            run.steps.append(self.backbone.step(self.target, self._arguments) if self.backbone is not None else Step())
            if self._step == 0:
                run.select(self.options.steps, self.backbone.steps(self.target) if self.backbone is not None else None)
        self._wanted = {b: span for b, span in self._branch_rows.items() if b in self.options.branches} or (
            {} if self._branch_rows else {"": None}
        )
        self._forward_calls = {}
        first = run is self._runs[0] and run.forwards == 0
        self._watch.enabled = first
        if first:
            self._audit.start()
        self._listen(True)

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.listening or self not in interception.ACTIVE.get():
            return
        self._listen(False)
        run = self._runs[-1]
        run.forwards += 1
        self._watch.close()
        self._audit.stop()
        self._checks.flush()
        for columns in self._columns.values():
            columns.forget_templates()
        self._arguments = {}

    def method_called(self, name: str, arguments: Mapping[str, Any], result: Any) -> None:
        """A method of the pipeline that the backbone watches has returned."""
        assert self.backbone is not None
        watched = (*self.backbone.prompt_methods, *self.backbone.observed_methods)
        if name in watched:
            self._calls.append(MethodCall(name, arguments, result))
        if name in self.backbone.prompt_methods:
            conditioning = self.backbone.conditioning_from(self.target, self._calls)
            if conditioning is None:
                return
            self._calls = []
            if self._runs and not self._runs[-1].forwards:
                self._runs.pop()  # encoded again before denoising: the last prompt counts
            if self.options.words is not None:
                check_words(self.options.words, conditioning.prompts)
            self._runs.append(Run(conditioning))
        if name == self.backbone.ranking_method and self._runs:
            self._runs[-1].order = [int(row) for row in self.backbone.order(self.target, arguments, result)]
        elif name == "prepare_latents" and self._runs:
            self._runs[-1].seeds = seeds_of(arguments.get("generator"))

    def observe(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> interception.Edited | None:
        """One kernel call of this context, after the model's own."""
        kernel = self._adapters.get(function)
        where = calling_module(self._names, 3)
        if kernel is None or where is None:
            return None
        call = kernel.read(function, kernel.bind(function, args, kwargs), output)
        if call is None:
            return None
        if call.query.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph is being recorded inside the capture: its replays call no function that could be seen. "
                "Run the model without CUDA graphs while it is captured"
            )
        name, module = where
        if call.inside is not None:
            module = getattr(module, call.inside, module)
            name = self._names.get(id(module), name)
        index = self._forward_calls.get(name, 0)
        self._forward_calls[name] = index + 1
        run = self._runs[-1]
        key = (name, index)
        site = self._site(name, index, module, call, run)
        site.calls += 1
        if self._watch.enabled:
            self._differential.note(name, call)
        chosen = self._chosen.get((len(self._runs), key))
        if chosen is None:
            chosen = self._chosen[len(self._runs), key] = self._wants(site)
        if not chosen or not run.wants(self._step, self.options.steps):
            return None
        return self._act(site, key, call, run)

    def _act(self, site: Site, key: tuple[str, int], call: AttentionCall, run: Run) -> interception.Edited | None:
        """What is done with a call that was chosen."""
        if torch.is_inference_mode_enabled() or torch.is_grad_enabled():
            with torch.inference_mode(False), torch.no_grad():
                self._keep_call(site, key, call.prepared(), run)
        else:
            self._keep_call(site, key, call.prepared(), run)
        return None

    # ---- sites

    def _site(self, name: str, index: int, module: Any, call: AttentionCall, run: Run) -> Site:
        site = self._sites.get((name, index))
        shapes = tuple(call.query.shape), tuple(call.key.shape)
        if site is None:
            tag = self._tag(name, module, call, run)
            site = Site(name, call.kernel, self._lay_out(name, index, module, call, tag, run), *shapes, module=module)
            self._sites[name, index] = site
        else:
            site.query_shape, site.key_shape = shapes
        return site

    def _tag(self, name: str, module: Any, call: AttentionCall, run: Run) -> Tag:
        queries, keys = call.queries, call.keys
        tag = call.tag
        if tag is None and self._watch.enabled:
            tag = from_sources(self._watch.sources(module, self._arguments), queries, keys)
        backbone = self.backbone
        unseen = Tag("unknown")
        if tag is None and backbone is not None:
            tag = backbone.tag(self._site_call(name, module, queries, keys, unseen, run))
        if tag is None:
            tag = from_lengths(queries, keys, backbone.cross_ratio if backbone is not None else None)
        if backbone is not None and tag.kind in ("cross", "joint"):
            stream = backbone.stream(self._site_call(name, module, queries, keys, tag, run))
            return Tag(tag.kind, stream, tag.evidence)
        return tag

    def _lay_out(self, name: str, index: int, module: Any, call: AttentionCall, tag: Tag, run: Run) -> Tag:
        """Ask the backbone for segments and signs; a site with segments is joint, whatever its projections read."""
        if self.backbone is None:
            return tag
        info = self._site_call(name, module, call.queries, call.keys, tag, run)
        segments = self.backbone.segments(info)
        if segments:
            total = sum(segment.length for segment in segments)
            shown = " + ".join(f"{segment.stream or 'audio'} {segment.length}" for segment in segments)
            if total != call.keys or sum(segment.stream is None for segment in segments) != 1:
                raise LatticeMismatch(
                    f"{name}: the backbone {self.backbone.name!r} lays its keys out as {shown} = {total}, but there are "
                    f"{call.keys}; exactly one segment has to be the latent's"
                )
            self._segments[name, index] = segments
            streams = {s.name: s for s in (run.conditioning.streams if run.conditioning is not None else ())}
            named = [segment.stream for segment in segments if segment.stream is not None]
            text = next((n for n in named if n in streams and streams[n].has_words), named[0] if named else None)
            tag = Tag("joint", text, f"the backbone lays out {call.keys} keys as {shown}; {tag.evidence}")
        self._differential.declare(name, module, self.backbone.signs(info))
        return tag

    def _site_call(self, name: str, module: Any, queries: int, keys: int, tag: Tag, run: Run) -> SiteCall:
        return SiteCall(name, module, queries, keys, tag, self._arguments, self.target, run.conditioning)

    def _wants(self, site: Site) -> bool:
        if site.captured:
            return True
        if not any(fnmatch.fnmatchcase(site.name, pattern) for pattern in self.options.layers):
            site.reason = f"name does not match layers={self.options.layers}"
        elif site.tag.kind not in self.options.kinds:
            site.reason = f"tagged {site.tag.kind}, not in kinds={self.options.kinds}"
        elif (
            self.options.keep == "pooled"
            and site.tag.kind in ("cross", "joint", "unknown")
            and not self._has_words(site)
        ):
            site.reason = f"its keys ({site.stream or 'no known stream'}) are not aligned with words; use keep='full'"
        else:
            return True
        return False

    def _has_words(self, site: Site) -> bool:
        conditioning = self._runs[-1].conditioning
        if conditioning is None:
            return False
        return any(stream.name == site.stream and stream.has_words for stream in conditioning.streams)

    # ---- keeping

    def _keep_call(self, site: Site, key: tuple[str, int], call: AttentionCall, run: Run) -> None:
        rows = self._rows(site, call, run)
        wanted = self._wanted
        if not wanted:
            if not site.captured:
                known = ", ".join(self._branch_rows)
                site.reason = f"branch={self.options.branches[0]!r} is not in this forward ({known})"
            return
        store_key = (len(self._runs) - 1, *key)
        store = self._stores.get(store_key)
        if store is None:
            store = self._stores[store_key] = self._open_store(site, key, call, run)
        elif store.keys != call.keys and self.backbone is not None and not self.backbone.batched:
            raise BackboneMismatch(
                f"{site.label}: {call.keys} keys in the {' and '.join(wanted)} forward, {store.keys} before: a negative prompt of "
                "another length does not share the prompt's positions. Capture one branch at a time"
            )
        site.captured, site.reason = True, self.options.keep
        self._reserve(site, store, call, wanted, rows)
        call, rows, wanted = _narrowed(call, rows, wanted)
        values, check, sums = store.ask(call, rows, run.conditioning, self._checks)
        if call.dropout == 0:  # else the model's own output is a random draw
            self._checks.note(key, check)
            self._checks.allowed[key] = call.allowed
        if sums is not None:
            self._checks.sums(key, sums)
        if store.mode != "received" and store.queries != slice(None):
            values = values[..., store.queries, :]
        store.add(values, wanted, self._step)
        if store.segments is not None and store.mode == "pooled" and call.queries == call.keys:
            assert run.conditioning is not None
            beside = self._from_text.setdefault(store_key, store.from_text())
            self._reserve(site, beside, call, wanted, rows)
            beside.add(beside.ask_from_text(call, rows, run.conditioning), wanted, self._step)

    def _rows(self, site: Site, call: AttentionCall, run: Run) -> int:
        """Rows of the denoiser's batch; a kernel called with heads folded into the batch has a multiple of them."""
        batch = call.query.shape[0]
        if run.conditioning is None or self.backbone is None:
            return batch
        branches = max(len(self._branch_rows), 1)
        rows = run.conditioning.rows * branches
        fits = batch == rows or (batch % rows == 0 and call.query.shape[1] == 1)
        given = run.conditioning.rows if self.backbone.branches_inside else rows
        if fits and self._batch in (None, given):
            return rows
        raise BackboneMismatch(
            f"{site.label}: the denoiser's batch is {self._batch} and the kernel's {batch}, but "
            f"{len(run.conditioning.prompts)} prompts × {run.conditioning.waveforms} waveforms × {branches} guidance branches "
            f"are {rows} rows (backbone {self.backbone.name!r})"
        )

    def _open_store(self, site: Site, key: tuple[str, int], call: AttentionCall, run: Run) -> Store:
        store = Store(site, self.options, mode=self.options.keep, segments=self._segments.get(key), keys=call.keys)
        store.shared = self._columns
        queries = call.queries
        if store.segments is not None:
            start = 0
            for segment in store.segments:
                if segment.stream is None:
                    if call.queries == call.keys:
                        store.queries, queries = slice(start, start + segment.length), segment.length
                    break
                start += segment.length
        if self.backbone is not None:
            store.lattice = self.backbone.lattice(
                self._site_call(site.name, site.module, queries, call.keys, site.tag, run)
            )
        conditioning = run.conditioning
        if self.options.keep == "full" or conditioning is None:
            return store
        if site.name in self._differential.signs and self._nonlinear(site):
            raise ValueError(
                f"{site.name}: its attention is a signed sum of calls, and pooling={self.options.pooling!r} of a sum is not the sum of "
                "poolings. Use pooling='sum', 'mean' or 'weighted', or keep='full'"
            )
        if site.tag.kind == "self":
            store.mode = "max" if self.options.pooling == "max" else "received"
            store.names = ["(max)" if store.mode == "max" else "(received)"]
            return store
        prompts = conditioning.prompts
        requests = self.options.words if self.options.words is not None else distinct_words(prompts)
        layout = store.segments or [Segment(call.keys, site.stream)]
        name = self.backbone.name if self.backbone is not None else ""
        store.groups = [key_groups(site, layout, row, requests, conditioning, name) for row in range(len(prompts))]
        store.names = merge_groups(store.groups, requests)
        for groups in store.groups:
            selectors.refuse_degenerate(groups, call.keys, self.options.pooling, site.label)
        return store

    def _nonlinear(self, site: Site) -> bool:
        """Whether the chosen pooling is no linear function of this site's probabilities."""
        if site.tag.kind == "self":
            return self.options.pooling == "max"  # anything else is the attention received
        return self.options.pooling not in selectors.LINEAR

    def _reserve(self, site: Site, store: Store, call: AttentionCall, wanted: Spans, rows: int) -> None:
        """Account for what this call will add, and refuse before it is allocated."""
        need = store.bytes_for(call, wanted, rows)
        if self._held + need > self.options.budget:
            raise CaptureBudgetExceeded(
                f"{site.label}: keeping {store.described(call, wanted, rows)} needs {size_text(need)} more on top of {size_text(self._held)}, past "
                f"budget={size_text(self.options.budget)}. Narrow it (words=, layers=, steps=), reduce_steps='uniform', "
                "keep='pooled', or raise budget="
            )
        self._held += need

    # ---- results

    @property
    def sites(self) -> list[Site]:
        """Every place where attention was seen, in order of first call, captured or not."""
        repeated = {name for name, index in self._sites if index > 0}
        shown = []
        for (name, index), site in self._sites.items():
            site.name = f"{name}#{index}" if name in repeated else name
            shown.append(site)
        return shown

    @property
    def conditionings(self) -> list[Conditioning | None]:
        """What each pipeline call inside the block was conditioned on; None without a backbone."""
        return [run.conditioning for run in self._runs]

    @property
    def token_groups(self) -> dict[tuple[str, str], dict[str, list[int]]]:
        """(site, prompt) → group → its key positions, for the captured sites that have words."""
        found = {}
        for (index, *_), store in self._stores.items():
            conditioning = self._runs[index].conditioning
            for prompt, groups in zip(conditioning.prompts if conditioning else (), store.groups, strict=False):
                found[store.site.name, prompt] = groups
        return found

    @property
    def maps(self) -> AttentionMaps:
        """The captured maps, once the block has ended."""
        if not self._closed:
            raise RuntimeError("cap.maps is available after the with block has ended")
        if self._maps is None:
            if self._failed is None:
                raise RuntimeError("this capture ended with an error; see it for the reason")
            self._maps = self._build()  # what there was when the body failed
        return self._maps

    def _finish(self) -> None:
        self._read_back()
        names = [name for name, _ in self._sites]
        self.uncovered = uncovered(self._denoiser, names, self._audit.eager, self._watch.ran, self._names)
        worst = [
            (site.check / allowed, site, allowed)
            for key, allowed in self._checks.allowed.items()
            if (site := self._sites[key]).check is not None and site.check > allowed
        ]
        if worst:
            _, site, allowed = max(worst, key=lambda item: item[0])
            raise CheckColumnError(
                f"{site.label} ({site.kernel}): asked again, the kernel differs from the model's own output by "
                f"{site.check:.3g} of its largest value, where {allowed:.3g} is allowed"
                f"{f' ({len(worst)} sites in all)' if len(worst) > 1 else ''}. Its adapter misreads the call (scale, mask, "
                "key order or heads); the maps would be wrong"
            )
        self._differential.verify()
        if not any(site.captured for site in self._sites.values()):
            raise NothingCaptured(self._explain_nothing())
        self._warn()
        self._maps = self._build()

    def _read_back(self) -> None:
        for key, error in self._checks.errors():
            self._sites[key].check = error
        for key, (low, high), broken in self._checks.row_sums():
            self._sites[key].row_sum = (low, high) if low <= high else None
            self._sites[key].nonfinite = broken
        for site in self.sites:
            if not site.captured and not site.reason:
                site.reason = f"no call at the chosen steps={self.options.steps}"

    def _explain_nothing(self) -> str:
        lines = ["no attention call matched what was asked for."]
        forwards = sum(run.forwards for run in self._runs)
        if not forwards:
            lines.append(f"The denoiser ({type(self._denoiser).__name__}) did not run inside the with block.")
        sites = self.sites
        if sites:
            lines.append(f"Sites seen in {forwards} forwards, those that match layers={self.options.layers} first:")
            by_reason: dict[str, list[Site]] = {}
            for site in sorted(sites, key=lambda site: site.reason.startswith("name does not match")):
                by_reason.setdefault(site.reason, []).append(site)
            for reason, group in by_reason.items():
                lines.append(f"  {reason}:")
                lines += [f"    {site.describe()}" for site in group[:12]]
                lines += [f"    ... and {len(group) - 12} more"] if len(group) > 12 else []
        elif forwards:
            lines.append(f"No intercepted kernel was called in {forwards} forwards.")
        if self.uncovered:
            lines.append("Attention that ran without an intercepted kernel:")
            lines += [f"  {entry}" for entry in self.uncovered[:20]]
        return "\n".join(lines)

    def _warn(self) -> None:
        if self.uncovered:
            shown = "\n".join(f"  {entry}" for entry in self.uncovered[:10])
            more = f"\n  ... and {len(self.uncovered) - 10} more" if len(self.uncovered) > 10 else ""
            warnings.warn(
                f"this capture misses attention that no adapter caught:\n{shown}{more}", CoverageWarning, stacklevel=4
            )
        broken = [site for site in self._sites.values() if site.nonfinite]
        if broken:
            worst = max(broken, key=lambda site: site.nonfinite)
            warnings.warn(
                f"{len(broken)} sites have rows that are not finite, most of them {worst.name} ({worst.nonfinite} rows, "
                f"{worst.kernel}): overflow in the model's own dtype, or a mask over every key",
                RuntimeWarning,
                stacklevel=4,
            )

    def _build(self) -> AttentionMaps:
        from_text = self._build_arrays(self._from_text)
        return AttentionMaps.concatenate(self._build_arrays(self._stores), AttentionMaps.concatenate(from_text))

    def _build_arrays(self, stores: Mapping[tuple[int, str, int], Store]) -> dict[str, list[Any]]:
        """Site → one array for each run; a differential site has its signed sum besides its single calls."""
        from aiba_hooks.labelling import build  # imports xarray, which is slow to start

        repeated = {name for name, index in self._sites if index > 0}
        arrays: dict[str, list[Any]] = {}
        for (run_index, name, index), store in stores.items():
            label = f"{name}#{index}" if name in repeated else name
            array = build(self, self._runs[run_index], store)
            if array is None:
                continue
            signs = self._differential.signs.get(name)
            if signs is not None and index < len(signs):
                whole = arrays.setdefault(name, [])
                term = array * np.float32(signs[index])
                term.attrs = {**array.attrs, "site": name, "signs": list(signs)}
                if index == 0:
                    whole.append(term)
                else:
                    whole[-1] = (whole[-1] + term).assign_attrs(whole[-1].attrs)
            arrays.setdefault(label, []).append(array)
        return arrays

    @property
    def held_bytes(self) -> int:
        """Bytes of attention kept, as counted against ``budget``."""
        return self._held


def _narrowed(call: AttentionCall, rows: int, wanted: Spans) -> tuple[AttentionCall, int, Spans]:
    """The call of the only branch that is wanted, where its rows of the batch stand alone: half of what guidance costs."""
    if len(wanted) != 1 or call.narrow is None:
        return call, rows, wanted
    ((branch, span),) = wanted.items()
    if span is None or span[1] - span[0] == rows:
        return call, rows, wanted
    repeat = call.query.shape[0] // rows
    return call.narrow(span[0] * repeat, span[1] * repeat), span[1] - span[0], {branch: None}
