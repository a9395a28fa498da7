"""Taps: an operator inside compiled code that tells listeners of an attention call as the interceptor does in eager code.

Dynamo traces the interceptor (``interception.wrapper_of``) as it traces everything else. What the interceptor does in eager
code (context variables, hooks, dictionaries of sites) would break the graph, so that in traced code it only adds the operator
``aiba::tap`` after the model's own call. Which module is calling is known while tracing: the ``forward`` of every module that
was seen to call a kernel is wrapped, and the wrapper notes its :class:`Place` around the call. A place is a tensor to the
graph, an input and not a constant: blocks that share compiled code (regional compilation) still tell their sites apart.

The operator declares that it writes to that tensor, which it does not. That keeps it from being removed as dead code, keeps
the calls of a site in order, and keeps inductor from recording it in a CUDA graph, whose replays would not run it."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Place:
    """A module that calls attention, as traced code knows it.

    Attributes
    ----------
    token : [] its number, on the CPU
    wanted : whether its calls are tapped; traced code is guarded on it
    """

    def __init__(self, number: int) -> None:
        with torch.inference_mode(False):
            self.token = torch.tensor(number, dtype=torch.int64, device="cpu")
        self.wanted = False
        self.users = 0


class _Trace:
    """What traced code reads; Dynamo guards on each of the values that it read."""

    def __init__(self) -> None:
        #: the place whose forward is being traced; never set while code runs
        self.place: Place | None = None
        #: where a call that is traced in no place is tapped; its module is found among the running frames
        self.anywhere: Tensor | None = None
        #: a forward of a captured model is running, in whatever thread
        self.listening = False


TRACE = _Trace()
_SDPA = {"function": torch._C._nn.scaled_dot_product_attention}  # a global that held it itself would be intercepted
_tap: Any = None  # the operator, once a compiled model is captured


# ---- what Dynamo traces


def is_sdpa(function: Any) -> bool:
    """Whether this is the only function that is tapped; what ends in it is tapped there."""
    return function is _SDPA["function"]


def traced(original: Callable[..., Any], sdpa: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An intercepted call in compiled code."""
    place = TRACE.place
    if place is not None:
        output = original(*args, **kwargs)
        if sdpa and place.wanted:
            _add_tap(place.token, output, *args, **kwargs)
        return output
    if TRACE.listening:
        anywhere = TRACE.anywhere
        if anywhere is None:
            # a capture that was not told of the compiled object: its call is run, and seen, outside the graph
            torch._dynamo.graph_break()
        output = original(*args, **kwargs)
        if sdpa:
            _add_tap(anywhere, output, *args, **kwargs)
        return output
    return original(*args, **kwargs)


def _add_tap(
    token: Any,
    output: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    mask = None if attn_mask is None else attn_mask.detach()
    tensors = query.detach(), key.detach(), value.detach(), output.detach()
    _tap(token, *tensors, mask, dropout_p, is_causal, scale, enable_gqa)


def in_place(function: Callable[..., Any], place: Place) -> Callable[..., Any]:
    """``function``, noting ``place`` where it is traced."""

    @functools.wraps(function)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        before = TRACE.place
        TRACE.place = place
        try:
            return function(*args, **kwargs)
        finally:
            TRACE.place = before

    for name in [name for name in vars(forward) if name.startswith("_torchdynamo")]:
        delattr(forward, name)
    return forward


# ---- places and the operator

_LOCK = threading.RLock()
_PLACES: weakref.WeakKeyDictionary[nn.Module, tuple[Place, Any]] = weakref.WeakKeyDictionary()
_MODULES: dict[int, weakref.ref[nn.Module]] = {}
_ANYWHERE = Place(0)
_counts = {"listening": 0, "tapping": 0, "places": 0}
_library: Any = None


def place_of(module: nn.Module) -> tuple[Place, Callable[..., Any]]:
    """The place of a module, and its class's ``forward`` that notes it: the same for every capture, as they are guarded on.

    Modules are held weakly."""
    with _LOCK:
        place, forward = _PLACES.get(module, (None, None))
        if place is None:
            number = _counts["places"] = _counts["places"] + 1
            place = Place(number)
            _MODULES[number] = weakref.ref(module, lambda _: _MODULES.pop(number, None) and None)
        if forward is None or forward.__wrapped__ is not type(module).forward:
            forward = in_place(type(module).forward, place)
            _PLACES[module] = place, forward
        return place, forward


def module_at(token: Tensor) -> nn.Module | None:
    """The module of a place; None where it is to be found among the running frames."""
    found = _MODULES.get(int(token))
    return None if found is None else found()


def want(place: Place, more: int) -> None:
    """``more`` (1 or -1) captures tap the calls of ``place``."""
    with _LOCK:
        place.users += more
        place.wanted = place.users > 0


def listen(started: bool) -> None:
    """A forward of a captured model begins, or has ended."""
    with _LOCK:
        _counts["listening"] += 1 if started else -1
        TRACE.listening = _counts["listening"] > 0


@contextmanager
def tapping(run: Callable[..., None]) -> Iterator[None]:
    """While this is open, a call that is traced in no place is tapped too. ``run`` is what the operator does.

    ``torch.library.custom_op`` would register it in a line, and each of its calls would take 15 times as long."""
    global _library, _tap
    with _LOCK:
        if _library is None:
            _library = torch.library.Library("aiba", "FRAGMENT")
            _library.define(
                "tap(Tensor(a!) place, Tensor query, Tensor key, Tensor value, Tensor output, Tensor? attn_mask, "
                "float dropout_p, bool is_causal, float? scale, bool enable_gqa) -> ()"
            )
            _library.impl("tap", run, "CompositeExplicitAutograd")
            torch.library.register_fake("aiba::tap", lambda *args: None, lib=_library)
            _tap = torch.ops.aiba.tap.default
        _counts["tapping"] += 1
        TRACE.anywhere = _ANYWHERE.token
    try:
        yield
    finally:
        with _LOCK:
            _counts["tapping"] -= 1
            if not _counts["tapping"]:
                TRACE.anywhere = None
