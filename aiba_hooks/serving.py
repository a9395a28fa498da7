"""Capture inside compiled code: when a forward runs eagerly, where taps are placed, and what they do when they run.

The first forward inside the block runs eagerly. Tags need to see what projections read, the coverage audit needs every
operation, and only a call that was seen can be found again in compiled code. The forwards after it run compiled, anew:
with a tap at each chosen site. A forward whose taps do not match what the first one showed sends the next ones back to
eager, with a warning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aiba_hooks import compilation, compiled, fastpaths, interception
from aiba_hooks.interception import original_of
from aiba_hooks.sites import calling_module

if TYPE_CHECKING:
    from aiba_hooks.capturing import Capture


class Serving:
    """One capture of a compiled model. It listens before the capture does, and counts what is called where."""

    def __init__(self, capture: Capture, names: dict[int, str]) -> None:
        self.serving = self
        self.names = names
        #: why the forwards from now on run eagerly
        self.refusal: str | None = None
        self._capture = capture
        self._learned = self._inside = False
        self._modules: dict[str, nn.Module] = {}
        self._tappable: dict[str, list[bool]] = {}
        self._wanted: set[str] = set()
        self._seen: Counter[str] = Counter()
        self._lost: list[str] = []
        self._stack = ExitStack()
        self._stack.enter_context(compiled.tapping(_run_tap))
        self._stack.enter_context(compilation.more_variants())
        self._forward = ExitStack()

    @property
    def listening(self) -> bool:
        """As the capture."""
        return self._capture.listening

    def close(self) -> None:
        """Take out the places."""
        self._forward.close()
        self._stack.close()

    # ---- around each forward of the denoiser

    def watch(self, given: nn.Module, root: nn.Module) -> Iterator[Callable[[], Any]]:
        """Call :meth:`before` and :meth:`after` around every forward of ``root``, from outside of compiled code. ``given``
        is what is called: ``root`` or what torch.compile made of it. Yields what undoes each step."""
        if compilation.is_optimized(given):
            yield from fastpaths.watch_method(given, "forward", root, self._enter, self._leave)
        if getattr(root, "_compiled_call_impl", None) is not None:
            yield from fastpaths.watch_method(root, "_compiled_call_impl", root, self._enter, self._leave)
            return  # its hooks would be traced

        def before_hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not torch.compiler.is_compiling() and not self._inside:
                self.before(module, args, kwargs)

        def after_hook(module: nn.Module, args: Any, output: Any) -> None:
            if not torch.compiler.is_compiling() and not self._inside:
                self.after(module, args, output)

        yield root.register_forward_pre_hook(before_hook, with_kwargs=True).remove
        yield root.register_forward_hook(after_hook, always_call=True).remove

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inside = self._capture in interception.ACTIVE.get()
        self.before(module, args, kwargs)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside = False
        self.after(module, args, output)

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A forward begins."""
        if self._capture not in interception.ACTIVE.get():
            return
        self._seen.clear()
        if not self._learned or self.refusal is not None:
            self._forward.enter_context(compilation.force_eager())
        try:
            self._capture._before_forward(module, args, kwargs)
        except BaseException:
            self._forward.close()
            raise

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward has ended; ``output`` is None if it failed."""
        if self._capture not in interception.ACTIVE.get():
            return
        self._forward.close()
        self._capture._after_forward(module, args, output)
        if output is None:
            return
        if not self._learned:
            self._learn()
        elif self.refusal is None:
            self._compare()

    # ---- what was called

    def observe(self, function: Callable[..., Any], args: Any, kwargs: Any, output: Any) -> None:
        """One kernel call of this context."""
        where = calling_module(self.names, 3)
        if where is None:
            return
        name, module = where
        self._seen[name] += 1
        if not self._learned:
            self._modules[name] = module
            self._tappable.setdefault(name, []).append(self._ends_in_sdpa(function, args, kwargs, output))

    def _ends_in_sdpa(self, function: Callable[..., Any], args: Any, kwargs: Any, output: Any) -> bool:
        """Whether what SDPA is given by this call is what the kernel's adapter reads from it."""
        if compiled.is_sdpa(function):
            return True
        inner = [call for call in interception.reached() if compiled.is_sdpa(call[0])]
        kernel = self._capture._adapters.get(function)
        if len(inner) != 1 or kernel is None:
            return False
        call = kernel.read(function, kernel.bind(function, args, kwargs), output)
        query, key = (_argument(inner[0], index, name) for index, name in ((0, "query"), (1, "key")))
        return (
            call is not None and call.prepare is None and query.shape == call.query.shape and key.shape[-2] == call.keys
        )

    def knows(self, name: str) -> bool:
        """Whether the first forward called attention in the module of this name."""
        return name in self._tappable

    def lose(self, name: str | None) -> None:
        """A tap ran whose module is not known."""
        if not self._learned:
            raise RuntimeError(
                f"{type(self._capture.target).__name__} runs inside compiled code that the capture was not given. Pass the "
                'compiled object (what torch.compile returned), or run it under torch.compiler.set_stance("force_eager")'
            )
        self._lost.append(name or "(the module itself)")

    # ---- after the first forward, and after the next ones

    def _learn(self) -> None:
        self._learned = True
        sites = {key: site for key, site in self._capture._sites.items() if self._capture._wants(site)}
        self._wanted = {name for name, _ in sites}
        refused = {site.kernel for (name, _), site in sites.items() if not all(self._tappable.get(name, [False]))}
        if refused:
            self._refuse(f"{', '.join(sorted(refused))} is not F.scaled_dot_product_attention, which alone is tapped")
            return
        for name, module in self._modules.items():
            self._stack.enter_context(_placed(module, name in self._wanted))

    def _compare(self) -> None:
        """Whether every chosen site was called as often as in the first forward."""
        if self._lost:
            shown = ", ".join(dict.fromkeys(self._lost))
            self._refuse(
                f"attention inside {shown} was called in this forward and not in the first, and is missing from it"
            )
            return
        different = [name for name in sorted(self._wanted) if self._seen[name] != len(self._tappable[name])]
        if different:
            name = different[0]
            self._refuse(
                f"{name or '(the module itself)'} called attention {self._seen[name]} times in this forward and "
                f"{len(self._tappable[name])} times in the first"
            )

    def _refuse(self, reason: str) -> None:
        self.refusal = reason
        compilation.warn([type(self._capture._denoiser).__name__], reason, stacklevel=6, later=True)


@contextmanager
def _placed(module: nn.Module, wanted: bool) -> Iterator[None]:
    """While this is open, code traced in ``module.forward`` knows its place; its calls are tapped if ``wanted``."""
    place, forward = compiled.place_of(module)
    own = vars(module).get("forward")
    # one that was set on the instance may hold the instance, and so is not kept with the place
    replacement = MethodType(forward, module) if own is None else compiled.in_place(own, place)
    key = interception.PATCHES.acquire(module, "forward", own, replacement)
    if wanted:
        compiled.want(place, 1)
    try:
        yield
    finally:
        if wanted:
            compiled.want(place, -1)
        interception.PATCHES.release(key)


def _argument(call: tuple[Any, tuple[Any, ...], dict[str, Any]], index: int, name: str) -> Any:
    _, args, kwargs = call
    return args[index] if len(args) > index else kwargs[name]


# ---- what a tap does when it runs


def _run_tap(
    token: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> None:
    listeners = interception.listeners()
    if not listeners:
        return  # another thread runs the same model uncaptured, or an ask runs compiled code
    names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    kwargs = dict(zip(names, (attn_mask, dropout_p, is_causal, scale, enable_gqa), strict=True))
    module = compiled.module_at(token)
    with interception.busy():
        for listener in listeners:
            serving = getattr(listener, "serving", None)
            if serving is None:
                raise RuntimeError(
                    f"{type(listener.target).__name__} runs inside compiled code that the capture was not given. Pass the "
                    'compiled object (what torch.compile returned), or run it under torch.compiler.set_stance("force_eager")'
                )
            caller = module
            if caller is None:
                where = calling_module(serving.names, 1)
                if where is None or not serving.knows(where[0]):
                    serving.lose(None if where is None else where[0])
                    continue
                caller = where[1]
            _called_by(caller, listener, (query, key, value), kwargs, output)


def _called_by(module: Any, listener: Any, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
    """Tell a listener from a frame of ``module``, where ``calling_module`` finds it as it finds the caller of a kernel."""

    def tell() -> Any:
        return listener.observe(original_of(F.scaled_dot_product_attention), args, kwargs, output)

    if tell() is not None:
        raise RuntimeError("an edit of attention was made inside compiled code, which cannot return it to the model")
