"""Conformance kits that plugin authors call from their own tests.

``check_kernel`` verifies a kernel adapter against the function that it wraps; ``check_backbone`` verifies what a backbone
says about a pipeline against the pipeline itself. Both raise :class:`ConformanceError`, naming what does not hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aiba_hooks import interception
from aiba_hooks.backbone import Backbone
from aiba_hooks.calls import AttentionCall
from aiba_hooks.capturing import Capture, capture
from aiba_hooks.interventions import intervene
from aiba_hooks.kernel import Kernel
from aiba_hooks.lattice import Lattice
from aiba_hooks.maps import AttentionMaps
from aiba_hooks.options import Options
from aiba_hooks.runs import Run
from aiba_hooks.sites import Site


class ConformanceError(AssertionError):
    """A plugin does not keep what its base class promises."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConformanceError(message)


# ---- kernels


class _Spy:
    """A listener that reads every call with one kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.listening = kernel, True
        self.read: list[tuple[AttentionCall | None, Any]] = []
        self.questions: Callable[[AttentionCall], None] | None = None

    def observe(self, function: Any, args: Any, kwargs: Any, output: Any) -> None:
        call = self.kernel.read(function, self.kernel.bind(function, args, kwargs), output)
        self.read.append((call, output))
        if call is not None and self.questions is not None:
            with torch.no_grad():
                self.questions(call)


def check_kernel(
    kernel: Kernel,
    run: Callable[[], Any],
    *,
    probabilities: Tensor | None = None,
    modules: Sequence[nn.Module] = (),
    atol: float | None = None,
) -> dict[str, float]:
    """Verify a kernel adapter on one real call.

    Parameters
    ----------
    kernel
        The adapter.
    run
        Calls the attention function once, looked up where the adapter says it is bound, and returns its output.
    probabilities : [batch, heads, Tq, Tk], optional
        What the attention should be, computed by plain softmax.
    modules
        Torch modules of a target, for kernels whose ``places`` needs them.
    atol
        Allowed difference from ``probabilities``; default 1e-5 in float32 and float64, 2e-2 in half precision.

    Returns
    -------
    dict
        ``calls``, ``check`` (the check column's error), ``row_sum_min``, ``row_sum_max``, ``error`` (against
        ``probabilities``, nan without).

    Raises
    ------
    ConformanceError
        The adapter is bound nowhere, does not see the call, misreads it, moves the random generator or the output, or
        leaves something behind.
    """
    places = list(kernel.places(list(modules)))
    _require(bool(places), f"{kernel!r} is bound nowhere: is the library of {kernel.bindings} imported?")
    before = [_lookup(namespace, name) for namespace, name, _ in places]
    torch.manual_seed(0)
    plain = run()
    state = torch.random.get_rng_state()

    spy = _Spy(kernel)
    figures: dict[str, float] = {
        "calls": 0,
        "check": 0.0,
        "row_sum_min": np.inf,
        "row_sum_max": -np.inf,
        "error": np.nan,
    }

    def questions(call: AttentionCall) -> None:
        figures["calls"] += 1
        _check_shapes(kernel, call)
        ones = torch.ones(1, call.keys, 1, device=call.value.device)
        sums, error = call.ask(ones)
        figures["row_sum_min"] = min(figures["row_sum_min"], float(sums.float().amin()))
        figures["row_sum_max"] = max(figures["row_sum_max"], float(sums.float().amax()))
        if call.dropout == 0:
            figures["check"] = max(figures["check"], float(error))
            _require(
                float(error) <= call.allowed,
                f"{kernel!r}: asked again, the kernel differs from its own output by {float(error):.3g} of the largest "
                f"value, allowed {call.allowed:.3g}: scale, mask, key order or heads are misread",
            )
        _check_linear(kernel, call)
        if probabilities is not None:
            full = torch.cat([part for _, part, _ in call.ask_keys()], -1).float()
            _require(
                full.shape == probabilities.shape,
                f"{kernel!r}: maps have shape {tuple(full.shape)}, the reference {tuple(probabilities.shape)}",
            )
            figures["error"] = float((full - probabilities.float()).abs().amax())
        if call.restore is not None:
            _require(
                _same(call.restore(call.output), plain),
                f"{kernel!r}: restore(output) is not what the kernel returned",
            )

    spy.questions = questions
    with ExitStack() as stack:
        for key in interception.intercept([kernel], modules, {}):
            stack.callback(interception.PATCHES.release, key)
        token = interception.ACTIVE.set((spy,))
        stack.callback(interception.ACTIVE.reset, token)
        torch.manual_seed(0)
        output = run()
    after = [_lookup(namespace, name) for namespace, name, _ in places]
    _require(all(a is b for a, b in zip(before, after, strict=True)), f"{kernel!r}: a binding was not restored")
    _require(figures["calls"] > 0, f"{kernel!r} did not see the call: is it looked up at one of {kernel.bindings}?")
    _require(_same(output, plain), f"{kernel!r}: the output changed under interception")
    _require(bool(torch.equal(state, torch.random.get_rng_state())), f"{kernel!r}: asking moved the random generator")
    if probabilities is not None:
        half = probabilities.dtype in (torch.float16, torch.bfloat16)
        allowed = atol if atol is not None else (2e-2 if half else 1e-5)
        _require(
            figures["error"] <= allowed,
            f"{kernel!r}: maps differ from the reference probabilities by {figures['error']:.3g}, allowed {allowed:.3g}",
        )
    return figures


def _check_shapes(kernel: Kernel, call: AttentionCall) -> None:
    shapes = {name: tuple(getattr(call, name).shape) for name in ("query", "key", "value", "output")}
    shown = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    _require(all(len(shape) == 4 for shape in shapes.values()), f"{kernel!r}: not [batch, heads, tokens, dim]: {shown}")
    query, key, value, output = shapes.values()
    _require(
        query[0] == output[0] and query[1] == output[1] and query[2] == output[2],
        f"{kernel!r}: query and output differ in batch, heads or tokens: {shown}",
    )
    _require(
        key[:3] == value[:3] and key[0] == query[0] and query[1] % key[1] == 0,
        f"{kernel!r}: key and value do not fit the query's batch and heads: {shown}",
    )


def _check_linear(kernel: Kernel, call: AttentionCall) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(call.value.shape, generator=generator).to(call.value) for _ in range(2))
    joined, apart = call.again(a + b).double(), call.again(a).double() + call.again(b).double()
    error = float(torch.nan_to_num(joined - apart).abs().amax() / torch.nan_to_num(apart).abs().amax().clamp_min(1e-6))
    _require(error <= 2 * call.allowed, f"{kernel!r}: `again` is not linear in the values (error {error:.3g})")


def _lookup(namespace: Any, name: Any) -> Any:
    return namespace[name] if isinstance(namespace, dict) else inspect.getattr_static(namespace, name)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return bool(a == b) if not hasattr(a, "__dict__") else True


# ---- backbones


class _Queries(Capture):
    """A capture that keeps the query tensors of cross sites, to see which tokens move with the latent."""

    def _keep_call(self, site: Site, key: tuple[str, int], call: AttentionCall, run: Run) -> None:
        site.captured, site.reason = True, "queries"
        info = self._site_call(site.name, site.module, call.queries, call.keys, site.tag, run)
        assert self.backbone is not None
        lattice = self.backbone.lattice(info)
        self.found.setdefault(site.name, (lattice, call.query.detach().float().clone()))

    @property
    def found(self) -> dict[str, tuple[Lattice, Tensor]]:
        """Site → (its lattice, its query in the first forward)."""
        return self.__dict__.setdefault("_found", {})

    def _finish(self) -> None:
        self._read_back()


def check_backbone(
    backbone: Backbone,
    target: Any,
    generate: Callable[[str], Any],
    *,
    prompt: str,
    other_prompt: str,
    words: Sequence[str],
    latent: str | None = None,
    latent_axes: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Verify a backbone on the pipeline that it describes.

    Parameters
    ----------
    target
        The pipeline.
    generate
        Runs the pipeline on a prompt and returns its output: the same seed each time, guidance on if the pipeline has it, few
        steps.
    prompt, other_prompt
        Two prompts of equally many tokens: the unconditional branch must not notice which one is given.
    words
        Words of ``prompt``.
    latent
        Name of the denoiser's argument that holds the latent; by default its first.
    latent_axes
        Axes of that tensor in the order of the lattices' ``axes``; by default those after batch and channels.

    Returns
    -------
    dict
        ``sites``, ``lattices`` (the distinct shapes), ``check``, ``steps``.

    Raises
    ------
    ConformanceError
        One of these does not hold: the backbone recognises the pipeline; outputs are bit-identical under capture; every
        captured site passes its check column and its groups sum to 1; lattices fit the token counts, agree on duration
        and run upwards in hertz; a bump in the latent moves the queries where the lattice says that it lies; the
        unconditional rows do not depend on the prompt and the conditional ones do; editing a word changes the output;
        hooks and attributes are left as found.
    """
    _require(backbone.matches(target), f"{backbone!r} does not recognise {type(target).__name__}")
    denoiser = backbone.denoiser(target)
    plain = generate(prompt)
    hooks = _hooks(target, denoiser)  # after a call: pipelines set attributes of their own
    with capture(target, words=list(words), backbone=backbone) as cap:
        output = generate(prompt)
    _require(_equal_outputs(plain, output), f"{backbone!r}: the output changed under capture")
    _require(hooks == _hooks(target, denoiser), f"{backbone!r}: hooks or attributes were left behind")
    worst = 0.0
    for site in cap.sites:
        if not site.captured:
            continue
        worst = max(worst, site.check or 0.0)
        low, high = site.row_sum or (np.nan, np.nan)
        _require(
            abs(low - 1) < 1e-2 and abs(high - 1) < 1e-2, f"{site.name}: rows sum to {low:.4f}..{high:.4f}, not to 1"
        )
    shapes = set()
    durations = []
    for name, array in cap.maps.items():
        total = array.sum("word", skipna=False)
        rows = sum(array.attrs.get("signs", [1.0]))  # a differential map is a signed sum
        _require(bool(np.allclose(total, rows, atol=1e-2)), f"{name}: the words and groups do not cover every key")
        _require(
            bool((np.diff(array.time) > 0).all()) or array.sizes["time"] == 1, f"{name}: time does not run forwards"
        )
        if "frequency" in array.dims:
            _require(
                bool((array.frequency_high > array.frequency_low).all()) and bool((np.diff(array.frequency) > 0).all()),
                f"{name}: frequency does not run upwards in hertz",
            )
        shapes.add(tuple(array.sizes[dim] for dim in ("time", "frequency") if dim in array.dims))
        durations.append(array.sizes["time"] * array.attrs["seconds_per_column"])
    longest = max(array.attrs["seconds_per_column"] for array in cap.maps.values())
    _require(
        max(durations) - min(durations) <= longest + 1e-6,
        f"lattices disagree on the duration: {min(durations):.3f} s to {max(durations):.3f} s",
    )
    _check_geometry(backbone, target, denoiser, generate, prompt, latent, latent_axes)
    _check_branches(backbone, target, generate, prompt, other_prompt)
    with intervene(target, reweight={words[0]: 0.0}, backbone=backbone):
        edited = generate(prompt)
    _require(
        not _equal_outputs(plain, edited), f"{backbone!r}: removing {words[0]!r} from the attention changed nothing"
    )
    steps = next(iter(cap.maps.values())).sizes["step"]
    return {"sites": len(cap.maps), "lattices": sorted(shapes, reverse=True), "check": worst, "steps": steps}


def _check_geometry(
    backbone: Backbone,
    target: Any,
    denoiser: nn.Module,
    generate: Callable[[str], Any],
    prompt: str,
    latent: str | None,
    latent_axes: Sequence[int] | None,
) -> None:
    """Move one spot of the latent and see which queries of the finest site move with it."""
    signature = inspect.signature(type(denoiser).forward)
    argument = latent or next(name for name in signature.parameters if name != "self")
    spots = ((0.25, 0.75), (0.75, 0.25))

    def queries(spot: tuple[float, float] | None) -> Mapping[str, tuple[Lattice, Tensor]]:
        def bump(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            bound = signature.bind(module, *args, **kwargs)
            sample = bound.arguments[argument]
            if spot is not None:
                sample = sample.clone()
                where: list[Any] = [slice(None)] * sample.ndim
                for axis, share in zip(latent_axes or range(2, sample.ndim), spot, strict=False):
                    where[axis] = int(share * sample.shape[axis])
                sample[tuple(where)] += 4 * sample.std()
                bound.arguments[argument] = sample
            return bound.args[1:], bound.kwargs

        handle = denoiser.register_forward_pre_hook(bump, with_kwargs=True)
        try:
            spy = _Queries(target, Options.read(steps=[0], keep="full", budget="1GiB"), backbone)
            with spy:
                generate(prompt)
        finally:
            handle.remove()
        return spy.found

    still = queries(None)
    _require(bool(still), f"{backbone!r}: no cross-attention site was seen")
    finest = max(still, key=lambda name: still[name][0].tokens)
    lattice, rest = still[finest]
    for spot in spots:
        _, moved = queries(spot)[finest]
        change = (moved - rest).pow(2).sum((1, 3))[-1]  # [Tq] of the last row: conditional where both are in the batch
        placed = lattice.place(change).numpy()
        peak = np.unravel_index(int(placed.argmax()), placed.shape)
        expected = []
        for dim in lattice.dims:
            axis = lattice.axes.index(dim)
            index = int(spot[axis] * lattice.shape[axis])
            expected.append(lattice.shape[axis] - 1 - index if dim == "frequency" and lattice.descending else index)
        off = [abs(int(p) - e) for p, e in zip(peak, expected, strict=True)]
        _require(
            max(off) <= 1,
            f"{finest}: a bump at {spot} of the latent's axes {lattice.axes} moved the query at "
            f"{tuple(int(p) for p in peak)} of the {'×'.join(map(str, placed.shape))} lattice {lattice.dims}, where the "
            f"lattice puts it at {tuple(expected)}: axes, prefix or shape are wrong",
        )


def _check_branches(
    backbone: Backbone, target: Any, generate: Callable[[str], Any], prompt: str, other_prompt: str
) -> None:
    """At the first step, from the same noise: the unconditional rows do not know the prompt, the conditional ones do."""

    def first_step(text: str, branch: Any) -> AttentionMaps:
        with capture(target, keep="full", steps=[0], branch=branch, backbone=backbone) as cap:
            generate(text)
        return cap.maps

    with capture(target, keep="full", steps=[0], backbone=backbone) as cap:
        generate(prompt)
    conditioning = cap.conditionings[-1]
    assert conditioning is not None
    a, b = cap.maps, first_step(other_prompt, "conditional")
    aligned = [
        name for name in a if any(s.has_words and s.name == a[name].attrs["stream"] for s in conditioning.streams)
    ]
    _require(bool(aligned), f"{backbone!r}: no site reads a stream of words")
    changed = [n for n in aligned if a[n].shape != b[n].shape or not np.allclose(a[n], b[n], atol=1e-6)]
    _require(bool(changed), f"{backbone!r}: the conditional rows are the same for {prompt!r} and {other_prompt!r}")
    if not conditioning.guided:
        return
    a, b = first_step(prompt, "unconditional"), first_step(other_prompt, "unconditional")
    for name in aligned[:1]:
        _require(
            a[name].shape == b[name].shape,
            f"{prompt!r} and {other_prompt!r} differ in tokens ({a[name].sizes['key']}, {b[name].sizes['key']}): choose "
            "prompts of the same length",
        )
        _require(
            bool(np.allclose(a[name], b[name], atol=1e-6)),
            f"{name}: the unconditional rows depend on the prompt: branches={tuple(backbone.branches)} are in another order",
        )


def _hooks(target: Any, denoiser: nn.Module) -> Any:
    counts = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in denoiser.modules()]
    return counts, sorted(getattr(target, "__dict__", {}))


def _equal_outputs(a: Any, b: Any) -> bool:
    a, b = (np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x) for x in (a, b))
    return np.array_equal(a, b, equal_nan=True)
